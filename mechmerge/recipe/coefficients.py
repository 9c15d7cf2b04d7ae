"""From a recipe's rules and masks to one coefficient for every component and every tensor slice.

Specificity is inclusion: a rule is more specific than another where everything it names is named by the other as well.
`L7.head.3` stands above `L*.head.3`, `L7.head.*`, `L7.attention` and `L7`; `L7.attention` and `L*.head.3` are
not comparable, so they must agree where they meet, or a third rule must say what holds there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mechmerge.errors import InputError, MechmergeError
from mechmerge.models.components import LEAF_KINDS, OUTSIDE, PARTS, UNIT_KINDS, Block, Component, Layout, parse_component
from mechmerge.models.families import Architecture
from mechmerge.recipe.schema import PATTERN, Array, Masks, Recipe, Rule

Owners = Sequence[tuple[int, str, Block]]
"""The (layer, leaf kind, block) triples that share one tensor, from `Layout.owners`."""


@dataclass(frozen=True)
class Pattern:
    """A rule's components: leaf kinds, a layer (None: any, -1: outside the layers) and a unit (None: any)."""

    kinds: frozenset[str]
    layer: int | None
    unit: int | None

    def meets(self, layer: int, kind: str) -> bool:
        """Whether it names units of this leaf kind in this layer."""
        return kind in self.kinds and self.layer in (None, layer)

    def within(self, other: Pattern) -> bool:
        """Whether everything it names is named by `other` as well."""
        return (
            self.kinds <= other.kinds
            and (other.layer is None or other.layer == self.layer)
            and (other.unit is None or other.unit == self.unit)
        )


def parse_pattern(text: str, arch: Architecture) -> Pattern:
    """Parses a rule's component or pattern for one architecture.

    Raises:
        InputError: not a pattern, or a layer or unit that the architecture lacks.
    """
    match = PATTERN.fullmatch(text)
    if match is None:
        return Pattern(frozenset({parse_component(text, arch).kind}), -1, None)
    layer, unit = match["layer"], match["unit"]
    # Checked with 0 in the place of *: every layer and kind of unit has at least one.
    component = parse_component(".".join([f"L{layer}", *text.split(".")[1:]]).replace("*", "0"), arch)
    kinds = frozenset(PARTS.get(component.kind, (component.kind,)))
    return Pattern(kinds, None if layer == "*" else component.layer, None if unit in (None, "*") else component.unit)


@dataclass(frozen=True)
class Coefficients:
    """Every coefficient of a recipe, for one architecture."""

    arch: Architecture
    units: dict[str, dict[str, Array]]
    """Expert → leaf kind → float32 [layers, units] (units is 1 for rests and norms)."""
    outside: dict[str, dict[str, float]]
    """Expert → `embed`, `final_norm`, `lm_head` → coefficient (a tied `lm_head` is `embed`'s)."""

    def of(self, expert: str, component: str | Component) -> float:
        """The coefficient of a component.

        Raises:
            InputError: no such component, or one whose parts have different coefficients.
        """
        found = parse_component(component, self.arch) if isinstance(component, str) else component
        if found.layer < 0:
            return self.outside[expert][found.kind]
        if found.kind in UNIT_KINDS:
            return float(self.units[expert][found.kind][found.layer, found.unit])
        parts = PARTS.get(found.kind, (found.kind,))
        values = np.unique(np.concatenate([self.units[expert][kind][found.layer] for kind in parts]))
        if len(values) > 1:
            raise InputError(f"{expert}: {found}", expected="one coefficient", found=f"{len(values)} in its parts")
        return float(values[0])

    def leaf(self, expert: str, layer: int, kind: str) -> Array:
        """float32 [units] of a leaf kind in a layer, or [1] of one outside the layers (layer -1)."""
        if layer < 0:
            return np.array([self.outside[expert][kind]], np.float32)
        row: Array = self.units[expert][kind][layer]
        return row


def coefficients(recipe: Recipe, masks: Masks, arch: Architecture) -> Coefficients:
    """Resolves a recipe's defaults, rules and masks for an architecture.

    Raises:
        InputError: a rule names what the architecture lacks, two equally specific rules differ, a mask has another shape, or
            a mask and a rule name the same units.
    """
    units: dict[str, dict[str, Array]] = {}
    outside: dict[str, dict[str, float]] = {}
    for name, expert in recipe.experts.items():
        rules = [(parse_pattern(rule.component, arch), rule) for rule in recipe.rules if rule.expert == name]
        units[name] = {}
        for kind in LEAF_KINDS:
            values = np.full((arch.layers, arch.units(kind)), expert.default, np.float32)
            for layer in range(arch.layers):
                _fill(values[layer], layer, kind, rules)
            units[name][kind] = values
        for kind in UNIT_KINDS:
            if f"{name}.{kind}" in masks:
                units[name][kind] = _mask(masks[f"{name}.{kind}"], f"mask {name}.{kind}", units[name][kind].shape)
                for pattern, rule in rules:
                    if pattern.kinds == {kind}:
                        raise InputError(
                            f"rule {rule.component} of {name}",
                            expected="no mask of the same units",
                            found=f"mask {name}.{kind}",
                        )
        outside[name] = {}
        for place in OUTSIDE:
            value = np.full(1, expert.default, np.float32)
            if place == "lm_head" and arch.tied:
                outside[name][place] = outside[name]["embed"]
                continue
            _fill(value, -1, place, rules)
            outside[name][place] = float(value[0])
    return Coefficients(arch, units, outside)


def _mask(mask: Array, where: str, shape: tuple[int, ...]) -> Array:
    if mask.shape != shape:
        raise InputError(where, expected=f"{list(shape)} (layers, units)", found=str(list(mask.shape)))
    return mask.astype(np.float32)


def _fill(row: Array, layer: int, kind: str, rules: list[tuple[Pattern, Rule]]) -> None:
    """Writes the coefficients that rules give to the units of one leaf kind in one layer."""
    meeting = [(pattern, rule) for pattern, rule in rules if pattern.meets(layer, kind)]
    if not meeting:
        return
    where = kind if layer < 0 else f"L{layer}.{kind}"
    whole = [(pattern, rule) for pattern, rule in meeting if pattern.unit is None]
    if whole:
        row[:] = _strongest(whole, where)
    for unit in sorted({pattern.unit for pattern, _ in meeting if pattern.unit is not None}):
        candidates = [(pattern, rule) for pattern, rule in meeting if pattern.unit in (None, unit)]
        row[unit] = _strongest(candidates, f"{where}.{unit}")


def most_specific(candidates: list[tuple[Pattern, Rule]]) -> list[Rule]:
    """The rules whose pattern has no narrower one among the candidates: these decide."""
    return [rule for pattern, rule in candidates if not any(p != pattern and p.within(pattern) for p, _ in candidates)]


def _strongest(candidates: list[tuple[Pattern, Rule]], where: str) -> float:
    """The coefficient of the most specific rules, which must agree."""
    top = most_specific(candidates)
    other = next((rule for rule in top if rule.coefficient != top[0].coefficient), None)
    if other is not None:
        first = top[0]
        raise InputError(
            f"{where} of {first.expert}",
            expected="one most specific rule",
            found=f"{first.component} = {first.coefficient:g} and {other.component} = {other.coefficient:g}",
            fix=f"remove one, or add a rule for {where}",
        )
    return top[0].coefficient


def tensor_coefficient(
    tensor: str, shape: tuple[int, ...], owners: Owners, found: Coefficients, expert: str
) -> tuple[int | None, Array]:
    """The coefficients of one tensor of an expert.

    Returns:
        (dim, float32 [size of dim]) where the tensor is cut along `dim`, or (None, float32 [1]) where one value holds for all.
    """
    dim = next((block.dim for _, _, block in owners if block.dim is not None), None)
    if dim is None:
        if len(owners) != 1:
            raise MechmergeError(tensor, expected="one owner of a tensor that is not cut", found=str(len(owners)))
        layer, kind, _ = owners[0]
        return None, found.leaf(expert, layer, kind)[:1]
    values = np.full(shape[dim], np.nan, np.float32)
    for layer, kind, block in owners:
        if block.dim != dim:
            raise MechmergeError(tensor, expected=f"cuts along dimension {dim}", found=str(block.dim))
        unit = np.arange(block.units)[:, None]
        index = block.offset + unit * block.stride + np.arange(block.width)[None, :]
        values[index] = found.leaf(expert, layer, kind)[:, None]
    if np.isnan(values).any():
        raise MechmergeError(tensor, expected="an owner for every part", found="parts without one")
    return (None, values[:1]) if (values == values[0]).all() else (dim, values)


def owners_of(layout: Layout) -> dict[str, Owners]:
    """Owners of every tensor, a tied head's among them (it is the embeddings under another name)."""
    owners: dict[str, Owners] = dict(layout.owners())
    family = layout.arch.family
    if layout.arch.tied:
        owners[f"{family.head}.weight"] = owners[f"{family.embed[0]}.weight"]
    return owners
