"""Recipes in tables: how the coefficients were chosen, and how much of each expert's delta enters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from mechmerge.localize.effect_file import EffectFile
from mechmerge.localize.scores import ScoreFile
from mechmerge.models.components import UNIT_KINDS
from mechmerge.recipe.schema import Masks, Recipe, read_recipe
from mechmerge.report.style import signed
from mechmerge.report.tables import Rows

HEADER = ["recipe", "policy", "expert", "default", "rules", "heads in", "kv groups in", "neurons in", "parameters in"]
"""`in`: share of the expert's units with a coefficient other than 0; parameters: the same by head, kv and neuron parameters."""


def unit_sizes(matrix: EffectFile | None, files: Iterable[ScoreFile]) -> dict[str, int]:
    """Parameters of one head, kv group and neuron, as the measurements tell them; empty where none does."""
    if matrix is not None:
        return dict(matrix.metadata.parameters)
    for file in files:
        if all(f"{kind}.parameters" in file.arrays for kind in UNIT_KINDS):
            return {kind: int(file.arrays[f"{kind}.parameters"].flat[0]) for kind in UNIT_KINDS}
    return {}


def recipe_rows(recipes: Mapping[str, Path], sizes: Mapping[str, int] | None = None) -> Rows:
    """A header and one row for each expert of each recipe.

    Args:
        recipes: recipe files by name.
        sizes: parameters of one unit of each kind, for the last column (default: unknown).

    Raises:
        SchemaError: a recipe or its masks break their schema.
    """
    rows: list[tuple[object, ...]] = []
    for name, path in recipes.items():
        recipe, masks = read_recipe(path)
        for expert, entry in recipe.experts.items():
            rules = sum(rule.expert == expert for rule in recipe.rules)
            shares = [_share(recipe, masks, expert, kind) for kind in UNIT_KINDS]
            whole = _whole(shares, masks, expert, sizes or {})
            rows.append((name, _policy(recipe), expert, f"{entry.default:g}", rules, *shares, whole))
    return HEADER, rows


def predicted_rows(recipes: Mapping[str, Path]) -> Rows:
    """A header and one row for each recipe that predicts changes of loss; no rows where none does."""
    read = {name: read_recipe(path)[0] for name, path in recipes.items()}
    behaviors = list(dict.fromkeys(behavior for recipe in read.values() for behavior in recipe.predicted or {}))
    rows: list[tuple[object, ...]] = [
        (name, *(_change(recipe, behavior) for behavior in behaviors)) for name, recipe in read.items() if recipe.predicted
    ]
    return ["recipe", *behaviors], rows


def _change(recipe: Recipe, behavior: str) -> str:
    """The predicted change of a behaviour's loss, and the measured one where there is one."""
    if behavior not in (recipe.predicted or {}):
        return "–"
    measured = (recipe.realised or {}).get(behavior)
    said = signed((recipe.predicted or {})[behavior])
    return said if measured is None else f"{said}, measured {signed(measured)}"


def _policy(recipe: Recipe) -> str:
    parameters: dict[str, object] = dict(recipe.policy.parameters)
    if recipe.policy.seed is not None:
        parameters["seed"] = recipe.policy.seed
    said = ", ".join(f"{key} {value}" for key, value in parameters.items())
    return f"{recipe.policy.name} ({said})" if said else recipe.policy.name


def _share(recipe: Recipe, masks: Masks, expert: str, kind: str) -> str:
    mask = masks.get(f"{expert}.{kind}")
    if mask is not None:
        return f"{100 * float((mask != 0).mean()):.1f} %"
    if any(rule.expert == expert for rule in recipe.rules):
        return "by rule"
    if recipe.mergekit is not None and recipe.mergekit.method in ("ties", "dare_ties"):
        # These methods choose single weights, not components.
        return "by weight"
    return "100 %" if recipe.experts[expert].default != 0 else "0 %"


def _whole(shares: list[str], masks: Masks, expert: str, sizes: Mapping[str, int]) -> str:
    if len(set(shares)) == 1 and shares[0] in ("100 %", "0 %", "by rule", "by weight"):
        return shares[0]
    found = [(masks.get(f"{expert}.{kind}"), sizes.get(kind)) for kind in UNIT_KINDS]
    if any(mask is None or size is None for mask, size in found):
        return "–"
    total = sum(mask.size * size for mask, size in found if mask is not None and size is not None)
    kept = sum(int(np.count_nonzero(mask)) * size for mask, size in found if mask is not None and size is not None)
    return f"{100 * kept / total:.1f} %"
