"""Recipes in tables: how the coefficients were chosen, and how much of each expert's delta enters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mechmerge.localize.effect_file import MEASURED, EffectFile
from mechmerge.localize.scores import ScoreFile
from mechmerge.models.components import UNIT_KINDS
from mechmerge.models.references import ModelId
from mechmerge.recipe.coefficients import coefficients
from mechmerge.recipe.explain import in_place_of_coefficients, plain_architecture
from mechmerge.recipe.schema import Masks, Recipe, read_recipe
from mechmerge.report.loading import Measurements
from mechmerge.report.style import Array, signed
from mechmerge.report.tables import DEPTHS, Rows

HEADER = ["recipe", "policy", "expert", "default", "rules", "heads in", "kv groups in", "neurons in", "parameters in"]
"""`in`: share of the expert's units with a coefficient other than 0; parameters: the same by head, kv and neuron parameters."""


class KeptOf(NamedTuple):
    """The coefficients of a recipe."""

    experts: dict[str, ModelId]
    kinds: dict[str, dict[str, Array]]
    """Expert → head, kv, neuron → float32 [layers, units]; an expert is missing where they are not known."""
    instead: str | None
    """What decides in the place of coefficients of components; None where those decide."""

    def of(self, expert: str, kind: str) -> Array | None:
        """[layers, units], or None where they are not known."""
        return self.kinds.get(expert, {}).get(kind)

    def units(self, model: ModelId, kind: str, shape: tuple[int, ...]) -> Array | None:
        """The same by the expert's weights; None for another shape than `shape` as well."""
        name = next((name for name, other in self.experts.items() if other.digest == model.digest), "")
        found = self.of(name, kind)
        return found if found is not None and found.shape == shape else None


def coefficient_arrays(path: Path, run: Measurements) -> KeptOf:
    """`kept_of` of a recipe file.

    Raises:
        InputError: a rule or mask does not fit the model's layers and units.
        SchemaError: the recipe or its masks break their schema.
    """
    return kept_of(*read_recipe(path), run)


def kept_of(recipe: Recipe, masks: Masks, run: Measurements) -> KeptOf:
    """Resolves a recipe's defaults, rules and masks for the model that the run measured.

    Raises:
        InputError: a rule or mask does not fit the model's layers and units.
    """
    experts = {name: entry.model for name, entry in recipe.experts.items()}
    if (instead := in_place_of_coefficients(recipe)) is not None:
        return KeptOf(experts, {}, instead)
    shapes = _shapes(run, masks)
    if set(shapes) != set(UNIT_KINDS):
        return KeptOf(experts, {}, None)
    units = coefficients(recipe, masks, plain_architecture(shapes, tied=False)).units
    return KeptOf(experts, {name: {kind: units[name][kind] for kind in UNIT_KINDS} for name in experts}, None)


def _shapes(run: Measurements, masks: Masks) -> dict[str, tuple[int, int]]:
    """[layers, units] of heads, kv groups and neurons, as measurements or masks tell them."""
    shapes: dict[str, tuple[int, int]] = {name.rpartition(".")[2]: mask.shape for name, mask in masks.items()}
    for file in run.scores.values():
        shapes |= {kind: file.arrays[f"{kind}.screen"].shape for kind in UNIT_KINDS if f"{kind}.screen" in file.arrays}
    if run.effects is not None:
        arrays = run.effects.arrays
        shapes |= {kind: arrays[f"{kind}.effect"].shape[-2:] for kind in UNIT_KINDS if f"{kind}.effect" in arrays}
    return shapes


def depth_kept_rows(recipes: Mapping[str, KeptOf]) -> Rows:
    """A header and one row for each recipe and expert: the share of units taken, by kind and third of the model."""
    rows: list[tuple[object, ...]] = []
    for name, kept in recipes.items():
        for expert in kept.experts:
            shares = []
            for kind in UNIT_KINDS:
                array = kept.of(expert, kind)
                parts = [None] * len(DEPTHS) if array is None else np.array_split(array != 0, len(DEPTHS))
                shares += ["–" if part is None or not part.size else f"{100 * part.mean():.0f} %" for part in parts]
            rows.append((name, expert, *(shares if kept.instead is None else [kept.instead] * len(shares))))
    names = {"head": "heads", "kv": "kv groups", "neuron": "neurons"}
    return ["recipe", "expert", *(f"{names[kind]}, {depth}" for kind in UNIT_KINDS for depth in DEPTHS)], rows


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
    """A header and one row for each recipe that predicts changes, of what its second column says; no rows where none does."""
    read = {name: read_recipe(path)[0] for name, path in recipes.items()}
    behaviors = list(dict.fromkeys(behavior for recipe in read.values() for behavior in recipe.predicted or {}))
    rows: list[tuple[object, ...]] = [
        (name, MEASURED[recipe.predicted_on], *(_change(recipe, behavior) for behavior in behaviors))
        for name, recipe in read.items()
        if recipe.predicted
    ]
    return ["recipe", "change of", *behaviors], rows


def _change(recipe: Recipe, behavior: str) -> str:
    """The predicted change of a behaviour, and the measured one where there is one."""
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
    if (instead := in_place_of_coefficients(recipe)) is not None:
        return instead
    return "100 %" if recipe.experts[expert].default != 0 else "0 %"


def _whole(shares: list[str], masks: Masks, expert: str, sizes: Mapping[str, int]) -> str:
    if len(set(shares)) == 1 and shares[0] in ("100 %", "0 %", "by rule", "by weight", "whole model"):
        return shares[0]
    found = [(masks.get(f"{expert}.{kind}"), sizes.get(kind)) for kind in UNIT_KINDS]
    if any(mask is None or size is None for mask, size in found):
        return "–"
    total = sum(mask.size * size for mask, size in found if mask is not None and size is not None)
    kept = sum(int(np.count_nonzero(mask)) * size for mask, size in found if mask is not None and size is not None)
    return f"{100 * kept / total:.1f} %"
