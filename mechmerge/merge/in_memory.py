"""A merge as a loaded model, without a checkpoint on disk: for trying many recipes of the same models.

Its weights are those that `merge` writes, bit for bit: the direct writer's arithmetic (merge/arithmetic.py), rounded once to
the recipe's output dtype, then to the dtype that is computed in. A baseline of mergekit's own is written to a
temporary folder and read back.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mechmerge.artifacts import digest
from mechmerge.errors import InputError
from mechmerge.merge.arithmetic import combine, select
from mechmerge.merge.cuts import cut_of
from mechmerge.merge.mapped import Mapped
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.models.load import load_model, torch_dtype
from mechmerge.models.packed import load_packed, packed
from mechmerge.models.references import ModelId
from mechmerge.recipe.coefficients import coefficients, owners_of
from mechmerge.recipe.schema import Masks, Recipe, write_recipe


def merge_id(name: str, recipe: Recipe, masks: Masks, base: Checkpoint) -> ModelId:
    """The identity of a merge that lies in no folder: what its weights follow from, and nothing else.

    So recipes that come to the same coefficients by other ways have one identity.
    """
    models = [recipe.base.shards, *([name, expert.model.shards] for name, expert in recipe.experts.items())]
    common = [models, recipe.out_dtype, recipe.vocabulary]
    if recipe.mergekit is not None:
        weights = {name: expert.default for name, expert in recipe.experts.items()}
        told: Any = [recipe.mergekit.model_dump(mode="json"), weights, recipe.policy.seed]
    else:
        found = coefficients(recipe, masks, base.arch)
        units = {e: {kind: array.tobytes().hex() for kind, array in kinds.items()} for e, kinds in found.units.items()}
        told = [units, found.outside]
    return ModelId(name=name, shards={"merge": digest([common, told])})


def merged_model(
    recipe: Recipe, masks: Masks, base: Checkpoint, experts: Mapping[str, Checkpoint], dtype: str, device: str
) -> Any:
    """The merge in evaluation mode, packed for generating (models/packed.py).

    Args:
        recipe: what is merged.
        masks: its masks.
        base: the base, opened.
        experts: the experts by name, opened, aligned and checked against the base, in the recipe's order.
        dtype: `float32`, `bfloat16` or `float16`.
        device: a torch device.

    Raises:
        InputError: the recipe does not fit the models.
    """
    if recipe.mergekit is not None:
        return _by_mergekit(recipe, masks, base, experts, dtype, device)
    found, owners = coefficients(recipe, masks, base.arch), owners_of(base.layout)
    model = load_model(base.folder, dtype, device)
    places = dict(model.named_parameters(remove_duplicate=False))
    with contextlib.ExitStack() as stack, torch.no_grad():
        own, *others = (stack.enter_context(Mapped(checkpoint)) for checkpoint in (base, *experts.values()))
        for name, shape in base.shapes.items():
            cut = cut_of(name, shape, owners[name], found, list(experts))
            start = own.matrix(name)
            merged = start.float().to(torch_dtype(recipe.out_dtype), copy=True)
            if not combine(merged, [other.matrix(name) for other in others], select(cut.values, cut.who, cut.dim), start):
                raise InputError(
                    f"recipe: {name}", expected="finite weights", found="NaN or infinite ones",
                    fix="a coefficient may be too large for the dtype",
                )  # fmt: skip
            places[base.arch.family.loaded_name(name)].copy_(merged.reshape(shape))
    return packed(model, dtype, device)


def _by_mergekit(
    recipe: Recipe, masks: Masks, base: Checkpoint, experts: Mapping[str, Checkpoint], dtype: str, device: str
) -> Any:
    from mechmerge.merge.engine import merge

    with tempfile.TemporaryDirectory() as scratch:
        write_recipe(Path(scratch) / "recipe.yaml", recipe, masks)
        paths = {"base": base.folder} | {name: checkpoint.folder for name, checkpoint in experts.items()}
        merge(Path(scratch) / "recipe.yaml", Path(scratch) / "merged", paths)
        return load_packed(Path(scratch) / "merged", dtype, device)
