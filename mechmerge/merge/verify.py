"""Verification of a written model: mergekit logs some failures and goes on, so nothing is believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from mechmerge.errors import MechmergeError
from mechmerge.models.adapters import SIDE_FILES
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.models.load import quiet, torch_dtype
from mechmerge.progress import SILENT, Progress, track

Expected = Callable[[str], torch.Tensor]
"""The tensor that should have been written under a name, in float32."""


def verify(
    folder: Path, base: Checkpoint, out_dtype: str, expected: Expected | None = None, progress: Progress = SILENT
) -> None:
    """Checks a merged model against its base and its recipe.

    Every tensor of the base is there with its shape, in the output dtype and finite, and no other; the tied head is not a
    second tensor; tokenizer, chat template and generation settings are the base's, byte for byte; transformers builds the
    model and finds all its parameters; and the tensors of the first and last layer and the final norm are those that the
    formula gives.

    Args:
        folder: the written model.
        base: the base that it must look like.
        out_dtype: `float32`, `bfloat16` or `float16`.
        expected: the plain formula (None for a baseline of mergekit's own).
        progress: told about tensors.

    Raises:
        MechmergeError: naming what is not right. It is never the user's fault.
    """
    merged = Checkpoint(folder)
    merged.check_complete()
    if merged.shapes != base.shapes:
        odd = sorted(set(merged.shapes.items()) ^ set(base.shapes.items()))
        raise MechmergeError(
            f"merged model {folder}", expected="the base's tensors and shapes", found=f"a difference in {odd[0][0]}"
        )
    dtype = torch_dtype(out_dtype)
    sample = _sample(base)
    for name, tensor in track(merged.tensors(), "verifying the merged model", len(merged.entries), progress):
        where = f"merged model {folder}: {name}"
        if tensor.dtype != dtype:
            raise MechmergeError(where, expected=out_dtype, found=str(tensor.dtype))
        if not bool(torch.isfinite(tensor).all()):
            raise MechmergeError(
                where,
                expected="finite weights",
                found="NaN or infinite ones",
                fix="a coefficient may be too large for the dtype",
            )
        if expected is not None and name in sample and not torch.equal(tensor, expected(name).to(dtype)):
            raise MechmergeError(where, expected="what the recipe's formula gives", found="other values")
    for pattern in SIDE_FILES:
        for file in base.folder.glob(pattern):
            copy = folder / file.name
            if not copy.is_file() or copy.read_bytes() != file.read_bytes():
                raise MechmergeError(f"merged model {folder}", expected=f"the base's {file.name}", found="none or another")
    check_loads(merged)


def _sample(base: Checkpoint) -> set[str]:
    layout = base.layout
    layers = {0, base.arch.layers - 1}
    return {
        block.tensor
        for layer, kind in layout.leaves()
        if layer in layers or kind == "final_norm"
        for block in layout.blocks(layer, kind)
    }


def check_loads(merged: Checkpoint) -> None:
    """Builds the model without memory for its weights, and compares its parameters with what was written."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet(), torch.device("meta"):
        config = AutoConfig.from_pretrained(merged.folder, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    written = {merged.arch.family.loaded_name(name): shape for name, shape in merged.shapes.items()}
    if merged.arch.tied:
        # Whether the head still counts as a parameter of its own differs between transformers' versions.
        wanted.pop(f"{merged.arch.family.loaded_head}.weight", None)
    if wanted != written:
        odd = sorted(set(wanted.items()) ^ set(written.items()))
        raise MechmergeError(
            f"merged model {merged.folder}",
            expected="the parameters that transformers builds",
            found=f"a difference in {odd[0][0]}",
        )
    if json.loads((merged.folder / "config.json").read_text("utf-8")).get("model_type") != config.model_type:
        raise MechmergeError(f"merged model {merged.folder}", expected="its config to load", found=str(config.model_type))
