"""Strengths: every coefficient of an expert times one number, whatever the policy chose (`strength.NAME`).

With all coefficients at 1 it is the weight of task arithmetic (https://arxiv.org/abs/2212.04089), an expert at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mechmerge.errors import InputError
from mechmerge.localize.effect_file import EffectFile
from mechmerge.recipe.policies import predicted_change
from mechmerge.recipe.schema import Masks, Recipe

PREFIX = "strength."
LARGEST = 100.0


def without_strengths(parameters: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(strengths by expert, the other parameters)."""
    strengths = {name.removeprefix(PREFIX): value for name, value in parameters.items() if name.startswith(PREFIX)}
    return strengths, {name: value for name, value in parameters.items() if not name.startswith(PREFIX)}


def check_strengths(policy: str, strengths: Mapping[str, Any], weighted: bool) -> None:
    """Whether these can be strengths.

    Args:
        policy: its name.
        strengths: by expert.
        weighted: whether coefficients, or a method's weights, are there to be multiplied.

    Raises:
        InputError: no number from −100 to 100, or a method that takes no weights.
    """
    if strengths and not weighted:
        raise InputError(
            f"policy {policy}", expected="no strengths: its method finds the experts' weights itself",
            found=", ".join(PREFIX + name for name in strengths),
        )  # fmt: skip
    for name, value in strengths.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
            raise InputError(f"{PREFIX}{name}", expected=f"a number from {-LARGEST:g} to {LARGEST:g}", found=repr(value))


def strengthened(
    recipe: Recipe, masks: Masks, strengths: Mapping[str, Any], effects: EffectFile | None
) -> tuple[Recipe, Masks]:
    """The recipe with every coefficient of some experts multiplied.

    Args:
        recipe: a recipe, or a baseline, whose weights are multiplied.
        masks: its masks.
        strengths: by expert, numbers from −100 to 100.
        effects: what the change is predicted from anew; a prediction of other coefficients is dropped.

    Raises:
        InputError: an expert that the recipe lacks, no number, or a baseline whose method takes no weights.
    """
    check_strengths(recipe.policy.name, strengths, recipe.mergekit is None or recipe.mergekit.weighted)
    for name in strengths:
        if name not in recipe.experts:
            raise InputError(f"{PREFIX}{name}", expected=f"an expert of {', '.join(recipe.experts)}", found=name)
    factors = {name: float(strengths.get(name, 1.0)) for name in recipe.experts}
    experts = {
        name: expert.model_copy(update={"default": expert.default * factors[name]}) for name, expert in recipe.experts.items()
    }
    rules = tuple(rule.model_copy(update={"coefficient": rule.coefficient * factors[rule.expert]}) for rule in recipe.rules)
    scaled = {name: (mask * np.float32(factors[name.rpartition(".")[0]])).astype(np.float32) for name, mask in masks.items()}
    known = recipe.predicted is not None and effects is not None and effects.metadata.experts.keys() == experts.keys()
    predicted = (
        predicted_change(effects, {name: expert.default for name, expert in experts.items()}, scaled)
        if known and effects is not None
        else None
    )
    told = recipe.policy.parameters | {f"{PREFIX}{name}": value for name, value in strengths.items()}
    changed: dict[str, Any] = {
        "experts": experts,
        "rules": rules,
        "policy": recipe.policy.model_copy(update={"parameters": told}),
        "predicted": predicted,
        "realised": None,
    }
    if predicted is not None and effects is not None:
        changed["predicted_on"] = effects.metadata.metric
    return recipe.model_copy(update=changed), scaled
