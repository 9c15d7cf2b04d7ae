"""LoRA adapters become full checkpoints: fp32 arithmetic by peft, one rounding to the base's dtype, content-addressed.

The materialised checkpoint is named by the digests of the base's shards and of the adapter's files, so the same pair is
made once and a changed adapter is another folder (mergekit keys its own cache by path).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from mechmerge.artifacts import atomic_folder, digest, lock, sha256_file
from mechmerge.errors import CheckpointError, PairError
from mechmerge.models.cache import cache_folder
from mechmerge.models.checkpoint import Checkpoint, read_header

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
SIDE_FILES = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "added_tokens.json", "chat_template*",
              "generation_config.json")  # fmt: skip
"""Files beside the weights that make a model folder usable."""


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a peft adapter rather than a model."""
    return (folder / CONFIG).exists() and not (folder / "config.json").exists()


def adapter_digests(adapter: Path) -> dict[str, str]:
    """sha256 of the adapter's config and weights.

    Raises:
        CheckpointError: not an adapter, a pickle, or broken weights.
    """
    if not (adapter / CONFIG).exists():
        raise CheckpointError(str(adapter), expected=f"a peft adapter with {CONFIG}", found="none")
    if not (adapter / WEIGHTS).exists():
        found = "the pickle adapter_model.bin" if (adapter / "adapter_model.bin").exists() else "none"
        raise CheckpointError(str(adapter), expected=WEIGHTS, found=found, fix="save the adapter as safetensors")
    read_header(adapter / WEIGHTS)
    return {name: sha256_file(adapter / name) for name in (CONFIG, WEIGHTS)}


def materialise(base: Path, base_digests: dict[str, str], adapter: Path) -> Path:
    """The folder of `base` with `adapter` merged into it (LoRA, rsLoRA and DoRA alike), made on first use.

    Raises:
        CheckpointError: the adapter cannot be read.
        PairError: the adapter is not for this base, or is of a kind that peft cannot merge.
    """
    key = digest({"base": base_digests, "sides": side_digest(base), "adapter": adapter_digests(adapter)})[:32]
    folder = cache_folder() / "materialised" / key
    if folder.exists():
        return folder
    with lock(folder.with_suffix(".lock"), f"cache entry {folder.name}"):
        if not folder.exists():
            _merge(base, adapter, folder)
    return folder


def _merge(base: Path, adapter: Path, folder: Path) -> None:
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import save_file

    from mechmerge.models.load import load_model, quiet

    checkpoint = Checkpoint(base)
    try:
        with quiet():
            model = PeftModel.from_pretrained(load_model(base), adapter, torch_device="cpu")
            expected = {name for name in get_peft_model_state_dict(model) if "lora_" in name}
            given = set(read_header(adapter / WEIGHTS))
            missing = sorted(n for n in given - expected if "lora_" in n) + sorted(expected - given)
            if missing:
                raise PairError(str(adapter), expected=f"an adapter for {base.name}", found=f"other modules ({missing[0]})")
            merged = model.merge_and_unload(safe_merge=False)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PairError(str(adapter), expected=f"a peft adapter that merges into {base}", found=str(error)) from None
    state = merged.state_dict()
    with atomic_folder(folder) as partial:
        tensors = {}
        for name in sorted(checkpoint.entries):
            stored, loaded = checkpoint.tensor(name), checkpoint.arch.family.loaded_name(name)
            if loaded not in state or state[loaded].shape != stored.shape:
                raise PairError(str(adapter), expected=f"{name} of shape {tuple(stored.shape)}", found="none after merging")
            tensors[checkpoint.stored[name]] = state[loaded].to(stored.dtype).contiguous()
        save_file(tensors, partial / "model.safetensors", {"format": "pt"})
        (partial / "config.json").write_text(json.dumps(checkpoint.config, indent=1, sort_keys=True) + "\n")
        copy_side_files(base, partial)


def side_digest(folder: Path) -> str:
    """One sha256 over a model folder's config and side files."""
    files = {file.name: sha256_file(file) for pattern in ("config.json", *SIDE_FILES) for file in folder.glob(pattern)}
    return digest(files)


def copy_side_files(source: Path, target: Path) -> None:
    """Copies tokenizer, chat template and generation settings from one model folder to another."""
    for pattern in SIDE_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)
