"""How two recipes differ, in rows: settings, sizes, coefficients by kind and depth, predicted changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mechmerge.errors import InputError
from mechmerge.localize.effect_file import MEASURED
from mechmerge.models.components import UNIT_KINDS
from mechmerge.recipe.coefficients import Coefficients
from mechmerge.recipe.conflicts import Rows
from mechmerge.recipe.explain import DEPTHS, NAMES, mask_shapes
from mechmerge.recipe.schema import Array, Masks, Recipe


def differing_fields(one: Recipe, other: Recipe) -> Rows:
    """What differs between two recipes beside their coefficients: one row for each field."""
    rows: Rows = []
    for field, (a, b) in {
        "policy": (_policy(one), _policy(other)),
        "base": (_model(one.base.name, one.base.digest), _model(other.base.name, other.base.digest)),
        "experts": (", ".join(one.experts), ", ".join(other.experts)),
        **{
            f"expert {name}": (_model(one.experts[name].model.name, one.experts[name].model.digest),
                               _model(other.experts[name].model.name, other.experts[name].model.digest))
            for name in one.experts if name in other.experts
        },
        **{
            f"default of {name}": (one.experts[name].default, other.experts[name].default)
            for name in one.experts if name in other.experts
        },
        "rules": (_rules(one), _rules(other)),
        "masks": (_masks(one), _masks(other)),
        "mergekit": (_method(one), _method(other)),
        **{name: (getattr(one, name), getattr(other, name)) for name in ("out_dtype", "vocabulary", "positions")},
        "made from": (_sources(one), _sources(other)),
    }.items():  # fmt: skip
        if a != b:
            rows.append({"field": field, "A": a, "B": b})
    return rows


def are_same(one: Recipe, one_masks: Masks, other: Recipe, other_masks: Masks) -> bool:
    """Whether two recipes are one: all that they say, what they foresee included, and every coefficient."""
    if one != other or one_masks.keys() != other_masks.keys():
        return False
    return all(np.array_equal(mask, other_masks[name]) for name, mask in one_masks.items())


def differing_sizes(one: Masks, other: Masks) -> Rows:
    """One row for each kind of which the models of two recipes have other numbers: their components have no common names."""
    a, b = mask_shapes(one), mask_shapes(other)
    kinds = [kind for kind in UNIT_KINDS if kind in a and kind in b and a[kind] != b[kind]]
    return [{"field": f"{NAMES[kind]}, by layer", "A": _times(a[kind]), "B": _times(b[kind])} for kind in kinds]


def _times(shape: tuple[int, ...]) -> str:
    layers, units = shape
    return f"{layers} layers × {units}"


def difference_rows(experts: Mapping[str, tuple[Coefficients, Coefficients]]) -> Rows:
    """One row for each expert of both recipes and kind: how many components differ, and how.

    Raises:
        InputError: recipes of models with other numbers of components.
    """
    rows: Rows = []
    for name, (one, other) in experts.items():
        for kind in UNIT_KINDS:
            a, b = one.units[name][kind], other.units[name][kind]
            if a.shape != b.shape:
                raise InputError(f"{name}.{kind}", expected=f"{list(a.shape)} in both recipes", found=str(list(b.shape)))
            thirds = [int((x != y).sum()) for x, y in zip(np.array_split(a, 3), np.array_split(b, 3), strict=True)]
            row: dict[str, Any] = {"expert": name, "kind": NAMES[kind], "share A": _percent(a), "share B": _percent(b)}
            row |= {"in A alone": int(((a != 0) & (b == 0)).sum()), "in B alone": int(((a == 0) & (b != 0)).sum())}
            row |= {"in both": int(((a != 0) & (b != 0)).sum()), "differ": int((a != b).sum())}
            rows.append(row | {f"differ, {depth}": count for depth, count in zip(DEPTHS, thirds, strict=True)})
    return rows


def predicted_difference(one: Recipe, other: Recipe) -> Rows:
    """One row for each behaviour of either: the predicted (and the measured) change against the base."""
    rows: Rows = []
    for name in dict.fromkeys([*(one.predicted or {}), *(other.predicted or {})]):
        row: dict[str, Any] = {"behavior": name}
        for label, recipe in (("A", one), ("B", other)):
            value, measured = (recipe.predicted or {}).get(name), (recipe.realised or {}).get(name)
            row[f"{label}: {MEASURED[recipe.predicted_on]}, predicted"] = "–" if value is None else round(value, 4)
            if one.realised or other.realised:
                row[f"{label}: measured"] = "–" if measured is None else round(measured, 4)
        rows.append(row)
    return rows


def _percent(array: Array) -> str:
    return f"{100 * float(array.mean(dtype=np.float64)):.1f} %" if array.size else "–"


def _policy(recipe: Recipe) -> str:
    told = {**recipe.policy.parameters, **({} if recipe.policy.seed is None else {"seed": recipe.policy.seed})}
    said = ", ".join(f"{key} {value}" for key, value in told.items())
    return f"{recipe.policy.name} ({said})" if said else recipe.policy.name


def _model(name: str, digest: str) -> str:
    return f"{name} ({digest[:12]})"


def _rules(recipe: Recipe) -> str:
    return "; ".join(f"{r.component} of {r.expert} = {r.coefficient!r}" for r in recipe.rules) or "none"


def _masks(recipe: Recipe) -> str:
    return "none" if recipe.masks is None else recipe.masks.sha256[:12]


def _method(recipe: Recipe) -> str:
    if recipe.mergekit is None:
        return "none"
    each = {
        f"{expert}.{key}": value for expert, told in recipe.mergekit.expert_parameters.items() for key, value in told.items()
    }
    said = ", ".join(f"{key} {value}" for key, value in {**recipe.mergekit.parameters, **each}.items())
    return f"{recipe.mergekit.method} ({said})" if said else recipe.mergekit.method


def _sources(recipe: Recipe) -> str:
    return ", ".join(f"{source.file} ({source.sha256[:12]})" for source in recipe.provenance) or "nothing"
