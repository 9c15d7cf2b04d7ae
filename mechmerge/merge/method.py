"""Our merge method in mergekit 0.1.5's registry: `mechmerge_masked`; importing this module registers it.

    merged = base + Σ over experts, in the recipe's order, of c ⊙ (expert − base)

c is one value for a whole tensor, or one for every row or column where heads, KV groups or neurons share it. It is task
arithmetic (https://arxiv.org/abs/2212.04089) with coefficients below the tensor, which mergekit's YAML alone cannot say:

    merge_method: mechmerge_masked
    parameters: {recipe: /path/to/recipe.yaml}      # its masks beside it
    models: [{model: …, parameters: {expert: NAME_IN_THE_RECIPE}}]
"""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path

import torch

from mechmerge.errors import MechmergeError
from mechmerge.merge.delta import summed_delta
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.recipe.coefficients import Coefficients, Owners, coefficients, owners_of
from mechmerge.recipe.emit import METHOD
from mechmerge.recipe.schema import read_recipe

with warnings.catch_warnings():
    # numpy.core, through one of mergekit's dependencies
    warnings.simplefilter("ignore", DeprecationWarning)
    from mergekit.merge_methods.base import BasePolicy, InputContract, PerNonBase, TensorGroup
    from mergekit.merge_methods.easy_define import merge_method
    from mergekit.merge_methods.registry import register

Plan = tuple[Coefficients, dict[str, Owners], tuple[str, ...]]
"""Coefficients, owners of every tensor, and the experts in the recipe's order."""


def masked(group: TensorGroup, recipe: str, expert: PerNonBase[str]) -> torch.Tensor:
    """Merges one tensor; mergekit has cast the inputs to `dtype: float32` and casts the result to `out_dtype`."""
    base, name = group.base, group.metadata.name
    if base is None or name is None:
        raise MechmergeError(METHOD, expected="a base and a named tensor", found=str(name))
    found, owners, order = _plan(recipe, str(base.id.model.path))
    by_expert = {expert[entry.id]: entry.tensor for entry in group.non_base}
    total = summed_delta(name, base.tensor, {which: by_expert[which] for which in order}, owners[name], found)
    merged: torch.Tensor = total.add_(base.tensor)
    return merged


register(
    merge_method(
        masked,
        name=METHOD,
        pretty_name="Masked task arithmetic",
        reference_url="https://arxiv.org/abs/2212.04089",
        contract=InputContract(base=BasePolicy.REQUIRED),
    )
)


def _plan(recipe: str, base: str) -> Plan:
    return _read_plan(recipe, os.stat(recipe).st_mtime_ns, base)


@functools.lru_cache(maxsize=1)
def _read_plan(recipe: str, _changed: int, base: str) -> Plan:
    parsed, masks = read_recipe(Path(recipe))
    checkpoint = Checkpoint(Path(base))
    return coefficients(parsed, masks, checkpoint.arch), owners_of(checkpoint.layout), tuple(parsed.experts)
