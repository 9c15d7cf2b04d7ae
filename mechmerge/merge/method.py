"""Our merge method in mergekit 0.1.5's registry: `mechmerge_masked`; importing this module registers it. Where another mergekit
is installed, that import is a `MissingError` (merge/probe.py).

    merged = base + Σ over experts, in the recipe's order, of c ⊙ (expert − base)

c is one value for a whole tensor, or one for every row or column where heads, KV groups or neurons share it. It is task
arithmetic (https://arxiv.org/abs/2212.04089) with coefficients below the tensor, which mergekit's YAML alone cannot say:

    merge_method: mechmerge_masked
    parameters: {recipe: /path/to/recipe.yaml}      # its masks beside it
    models: [{model: …, parameters: {expert: NAME_IN_THE_RECIPE}}]

and `mechmerge_within`, which takes the same and is TIES or DARE-TIES inside those coefficients (merge/within.py).
"""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from mechmerge.errors import InputError, MechmergeError
from mechmerge.merge.delta import coefficient_of, summed_delta
from mechmerge.merge.probe import probe
from mechmerge.merge.within import merge_within
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.recipe.coefficients import Coefficients, Owners, coefficients, owners_of
from mechmerge.recipe.emit import METHOD, WITHIN
from mechmerge.recipe.schema import Recipe, read_recipe

probe()  # before mergekit is imported: what another version fails with says little
with warnings.catch_warnings():
    # numpy.core, through one of mergekit's dependencies
    warnings.simplefilter("ignore", DeprecationWarning)
    from mergekit.merge_methods.base import BasePolicy, InputContract, PerNonBase, TensorGroup
    from mergekit.merge_methods.easy_define import merge_method
    from mergekit.merge_methods.registry import register


class Plan(NamedTuple):
    """A recipe, read once for all tensors."""

    recipe: Recipe
    found: Coefficients
    owners: dict[str, Owners]
    """Owners of every tensor."""


def masked(group: TensorGroup, recipe: str, expert: PerNonBase[str]) -> torch.Tensor:
    """Merges one tensor; mergekit has cast the inputs to `dtype: float32` and casts the result to `out_dtype`."""
    base, name = group.base, group.metadata.name
    if base is None or name is None:
        raise MechmergeError(METHOD, expected="a base and a named tensor", found=str(name))
    plan = _plan(recipe, str(base.id.model.path))
    by_expert = _by_expert(group, expert, plan)
    ordered = {which: by_expert[which] for which in plan.recipe.experts}
    total = summed_delta(name, base.tensor, ordered, plan.owners[name], plan.found)
    merged: torch.Tensor = total.add_(base.tensor)
    return merged


def within(group: TensorGroup, recipe: str, expert: PerNonBase[str]) -> torch.Tensor:
    """Merges one tensor by TIES or DARE-TIES inside the recipe's coefficients."""
    base, name = group.base, group.metadata.name
    if base is None or name is None:
        raise MechmergeError(WITHIN, expected="a base and a named tensor", found=str(name))
    plan = _plan(recipe, str(base.id.model.path))
    method = plan.recipe.mergekit
    if method is None:
        raise MechmergeError(WITHIN, expected="a recipe with a mergekit block", found=plan.recipe.policy.name)
    by_expert = _by_expert(group, expert, plan)
    names = list(plan.recipe.experts)
    deltas = [by_expert[which] - base.tensor for which in names]
    told = [method.expert_parameters.get(which, {}) for which in names]
    weights = [
        coefficient_of(name, delta, plan.owners[name], plan.found, which) * float(own.get("weight", 1.0))
        for delta, which, own in zip(deltas, names, told, strict=True)
    ]
    densities = [float(own.get("density", 1.0)) for own in told]
    change = merge_within(
        deltas,
        weights,
        densities,
        drawn=method.method == "dare_ties",
        normalize=bool(method.parameters.get("normalize", False)),
    )
    merged: torch.Tensor = base.tensor + change * float(method.parameters.get("lambda", 1.0))
    return merged


def _by_expert(group: TensorGroup, expert: PerNonBase[str], plan: Plan) -> dict[str, torch.Tensor]:
    """The experts' tensors by their names in the recipe, whose experts the YAML must name, each once."""
    named = [str(expert[entry.id]) for entry in group.non_base]
    if sorted(named) != sorted(plan.recipe.experts):
        wanted = ", ".join(plan.recipe.experts)
        raise InputError("mergekit YAML", expected=f"models with expert: {wanted}, each once", found=", ".join(named) or "none")
    return {expert[entry.id]: entry.tensor for entry in group.non_base}


register(
    merge_method(
        masked,
        name=METHOD,
        pretty_name="Masked task arithmetic",
        reference_url="https://arxiv.org/abs/2212.04089",
        contract=InputContract(base=BasePolicy.REQUIRED),
    )
)
register(
    merge_method(
        within,
        name=WITHIN,
        pretty_name="TIES and DARE-TIES within a mask",
        reference_url="https://arxiv.org/abs/2306.01708",
        contract=InputContract(base=BasePolicy.REQUIRED),
    )
)


def _plan(recipe: str, base: str) -> Plan:
    try:
        changed = os.stat(recipe).st_mtime_ns
    except FileNotFoundError:
        raise InputError("mergekit YAML: recipe", expected="the recipe that it was written for", found=f"no file {recipe}",
                         fix="set `recipe:` to where it is now, its masks beside it") from None  # fmt: skip
    return _read_plan(recipe, changed, base)


@functools.lru_cache(maxsize=1)
def _read_plan(recipe: str, _changed: int, base: str) -> Plan:
    parsed, masks = read_recipe(Path(recipe))
    checkpoint = Checkpoint(Path(base))
    return Plan(parsed, coefficients(parsed, masks, checkpoint.arch), owners_of(checkpoint.layout))
