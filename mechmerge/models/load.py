"""Loading models and tokenizers through transformers: the only place that does."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechmerge.errors import CheckpointError, InputError, MechmergeError, MissingError, machine_error

if TYPE_CHECKING:
    import torch


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers' and peft's bars, notices and deprecation warnings off the terminal."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            # Of an adapter whose base is named otherwise than a folder or a repository: which base it is, we know.
            warnings.filterwarnings("ignore", message="Could not find a config file")
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _loading(folder: Path, expected: str) -> Iterator[None]:
    """What libraries raise over files that someone else wrote, as an error about the folder.

    They raise whatever their parsers raise, panics of Rust included, which are no `Exception`. Errors of the machine pass.
    """
    try:
        yield
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"
        if isinstance(error, MechmergeError) or not (isinstance(error, Exception) or is_panic):
            raise
        found, trouble = str(error), machine_error(error)
        if isinstance(trouble, MissingError) or "out of memory" in found or "can't allocate" in found:
            raise
        if not isinstance(error, OSError | ValueError | KeyError):
            found = f"{type(error).__name__}: {found}"
        raise CheckpointError(str(folder), expected=expected, found=found) from None


def torch_dtype(name: str) -> torch.dtype:
    """`float32`, `bfloat16` or `float16` as a torch dtype."""
    import torch

    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def load_model(folder: Path, dtype: str = "float32", device: str = "cpu") -> Any:
    """A transformers causal language model in evaluation mode, from safetensors only, remote code never.

    Args:
        folder: a local checkpoint folder.
        dtype: `float32`, `bfloat16` or `float16`.
        device: a torch device.
    """
    from transformers import AutoModelForCausalLM

    _check_device(device)
    with quiet(), _loading(folder, "a model that transformers loads"):
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch_dtype(dtype), local_files_only=True, trust_remote_code=False, use_safetensors=True
        )
    return _with_compact_head(model.to(device).eval().requires_grad_(False))


def _with_compact_head(model: Any) -> Any:
    """Lets the head copy what is cut out of a batch before it multiplies.

    With `logits_to_keep` transformers hand it a slice of [rows, tokens, width] that is not contiguous, and torch then copies
    the head's weight for every row (measured on SmolLM2, 32 prompts of 60 tokens, bfloat16: 2 s in the place of .01 s).
    """
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(lambda _module, inputs: tuple(value.contiguous() for value in inputs))
    return model


def empty_model(folder: Path, dtype: str = "float32", device: str = "cpu") -> Any:
    """The model of `load_model` without its weights: every parameter is one NaN, stretched to the parameter's shape.

    Buffers (rotary tables, masks) are real. Tied parameters are one object. Peak memory is that of the buffers.
    """
    import torch
    from torch.nn.modules.module import register_module_parameter_registration_hook
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    def to_meta(_module: torch.nn.Module, _name: str, parameter: torch.nn.Parameter | None) -> Any:
        # A parameter is registered before anything is written into it, so its memory was never touched. One that is registered
        # again is being tied, and stays the same object.
        if parameter is None or parameter.is_meta:
            return None
        return torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    _check_device(device)
    handle = register_module_parameter_registration_hook(to_meta)
    try:
        with quiet(), _loading(folder, "a model that transformers loads"):
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, dtype=torch_dtype(dtype), trust_remote_code=False)
            if (folder / "generation_config.json").exists():
                model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    finally:
        handle.remove()
    nan = torch.full((), torch.nan, dtype=torch_dtype(dtype), device=device)
    # By identity: tied parameters stay one object, and the list keeps the old ones alive meanwhile.
    named = list(model.named_parameters(remove_duplicate=False))
    empty = {id(old): torch.nn.Parameter(nan.expand(old.shape), requires_grad=False) for _, old in named}
    for name, old in named:
        module, _, own = name.rpartition(".")
        setattr(model.get_submodule(module), own, empty[id(old)])
    return _with_compact_head(model.to(device).eval())


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError("device", expected="a torch device of this machine", found=f"{device} ({error})") from None


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, padding on the left, with a padding token."""
    from transformers import AutoTokenizer

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with quiet(), _loading(folder, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise CheckpointError(str(folder), expected="a tokenizer with a padding or end token", found="neither")
            tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
