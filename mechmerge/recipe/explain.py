"""What a recipe takes from whom, in rows: by expert, kind and depth, what was contested, what is expected, and against another.

Shares are mean coefficients (so 1/k counts as 1/k); `in` means a coefficient other than 0. Nothing here needs a model: sizes
come from the recipe's masks and what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mechmerge.errors import InputError, MissingError
from mechmerge.localize.effect_file import MEASURED, EffectFile
from mechmerge.models.components import PARTS, UNIT_KINDS, Component, parse_component
from mechmerge.models.families import FAMILIES, Architecture
from mechmerge.recipe.coefficients import Coefficients, coefficients, most_specific, parse_pattern
from mechmerge.recipe.schema import Array, Masks, Recipe

DEPTHS = ("early", "middle", "late")
"""Thirds of the layers."""
NAMES = {"head": "heads", "kv": "kv groups", "neuron": "neurons"}
Rows = list[dict[str, Any]]
Shapes = Mapping[str, tuple[int, ...]]


def mask_shapes(masks: Masks) -> dict[str, tuple[int, ...]]:
    """[layers, units] by kind, as far as masks tell them."""
    return {name.rpartition(".")[2]: mask.shape for name, mask in masks.items()}


def effect_shapes(effects: EffectFile | None) -> dict[str, tuple[int, ...]]:
    """[layers, units] by kind, as far as effects tell them."""
    arrays = {} if effects is None else effects.arrays
    return {kind: arrays[f"{kind}.effect"].shape[-2:] for kind in UNIT_KINDS if f"{kind}.effect" in arrays}


def plain_architecture(shapes: Shapes, tied: bool = True) -> Architecture:
    """An architecture of these sizes: coefficients need nothing else of a model.

    Raises:
        MissingError: the sizes of a kind are not told.
    """
    if missing := [NAMES[kind] for kind in UNIT_KINDS if kind not in shapes]:
        raise MissingError("recipe", expected="masks, or a file that was measured", found=f"nothing that tells of {missing[0]}",
                           fix="give the effect file with --effects")  # fmt: skip
    # Its family's names of tensors play no part.
    return Architecture(
        family=FAMILIES[0],
        layers=shapes["head"][0],
        hidden=1,
        heads=shapes["head"][1],
        kv_groups=shapes["kv"][1],
        head_dim=1,
        neurons=shapes["neuron"][1],
        vocabulary=1,
        tied=tied,
    )


def resolved(recipe: Recipe, masks: Masks, shapes: Shapes) -> Coefficients:
    """The coefficients of a recipe.

    Raises:
        InputError: a baseline, whose method decides weight by weight, or rules that do not fit.
        MissingError: sizes are not told.
    """
    if recipe.mergekit is not None and not recipe.mergekit.within:
        raise InputError(
            "recipe",
            expected="a recipe of coefficients",
            found=f"the baseline {recipe.policy.name}: it has one weight an expert",
        )
    # Whether the head is tied is the models' affair: a recipe may name it.
    return coefficients(recipe, masks, plain_architecture({**shapes, **mask_shapes(masks)}, tied=False))


def parameters_of(recipe: Recipe, found: Coefficients, sizes: Mapping[str, int]) -> dict[str, tuple[float, int]]:
    """Expert → parameters of heads, KV groups and neurons that are taken (each in proportion to its coefficient), and all."""
    told = {}
    for name in recipe.experts:
        arrays = {kind: found.units[name][kind] for kind in UNIT_KINDS}
        taken = sum(float(array.sum(dtype=np.float64)) * sizes.get(kind, 0) for kind, array in arrays.items())
        told[name] = (taken, sum(array.size * sizes.get(kind, 0) for kind, array in arrays.items()))
    return told


def depth_rows(recipe: Recipe, found: Coefficients, sizes: Mapping[str, int]) -> Rows:
    """One row for each expert and third of the layers: shares by kind, and parameters taken where sizes are known."""
    rows: Rows = []
    for name in recipe.experts:
        parts = {kind: np.array_split(found.units[name][kind], len(DEPTHS)) for kind in UNIT_KINDS}
        for i, depth in enumerate(DEPTHS):
            row: dict[str, Any] = {"expert": name, "depth": depth}
            row |= {NAMES[kind]: _percent(parts[kind][i]) for kind in UNIT_KINDS}
            if sizes:
                row["parameters"] = sum(round(float(parts[k][i].sum(dtype=np.float64)) * sizes[k]) for k in UNIT_KINDS)
            rows.append(row)
    return rows


def contested_rows(recipe: Recipe, found: Coefficients, effects: EffectFile) -> Rows:
    """One row for each expert and verdict of the effects on its components: whom they help, and what became of them.

    `contested`: helps some behaviour and harms another. Shares of `kept` are mean coefficients.
    """
    rows: Rows = []
    for i, name in enumerate(effects.metadata.experts):
        if name not in recipe.experts:
            continue
        values = np.concatenate(
            [effects.arrays[f"{kind}.effect"][:, i].reshape(len(effects.metadata.behaviors), -1) for kind in UNIT_KINDS], axis=1
        )
        kept = np.concatenate([found.units[name][kind].ravel() for kind in UNIT_KINDS])
        helps, harms = (values > 0).any(axis=0), (values < 0).any(axis=0)
        for verdict, which in (("helps only", helps & ~harms), ("contested", helps & harms), ("harms only", harms & ~helps),
                               ("no effect", ~helps & ~harms)):  # fmt: skip
            if which.any():
                row: dict[str, Any] = {"expert": name, "components": verdict, "number": int(which.sum())}
                row |= {"in": int((kept[which] != 0).sum()), "out": int((kept[which] == 0).sum())}
                rows.append(row | {"mean coefficient": round(float(kept[which].mean(dtype=np.float64)), 3)})
    return rows


def overlap_rows(recipe: Recipe, found: Coefficients) -> Rows:
    """One row for each kind: components that several experts put in, and the coefficients that they get together."""
    rows: Rows = []
    for kind in UNIT_KINDS:
        stacked = np.stack([found.units[name][kind] for name in recipe.experts])
        shared = (stacked != 0).sum(axis=0) > 1
        together = stacked.sum(axis=0)[shared]
        row: dict[str, Any] = {"kind": NAMES[kind], "of several experts": int(shared.sum()), "all": int(shared.size)}
        rows.append(row | {"mean sum of coefficients": round(float(together.mean()), 3) if together.size else "–"})
    return rows


def expected_rows(recipe: Recipe, effects: EffectFile | None = None) -> Rows:
    """One row for each behaviour: predicted and realised change, and the share of its own expert's gain where that is known."""
    own = {} if effects is None else {b.name: b for b in effects.metadata.behaviors}
    rows: Rows = []
    for name, change in (recipe.predicted or {}).items():
        behavior = own.get(name)
        row: dict[str, Any] = {"behavior": name, f"predicted change of {MEASURED[recipe.predicted_on]}": round(change, 4)}
        if recipe.realised is not None:
            row["measured"] = round(recipe.realised[name], 4) if name in recipe.realised else "–"
        if own:
            gain = None if behavior is None or behavior.protected or behavior.own_gain <= 0 else behavior.own_gain
            sign = -1 if recipe.predicted_on == "loss" else 1
            row["its expert"] = "–" if behavior is None else behavior.expert
            row["expected recovery"] = "–" if gain is None else round(sign * change / gain, 3)
        rows.append(row)
    return rows


# --------------------------------------------------------------------------------------------------------------- one component
def component_rows(recipe: Recipe, masks: Masks, found: Coefficients, text: str) -> Rows:
    """One row for each expert: a component's coefficient, and what decides it (a mask, a rule or the default).

    Raises:
        InputError: no such component.
    """
    component = parse_component(text, found.arch)
    rows: Rows = []
    for name in recipe.experts:
        values = _values(found, name, component)
        row: dict[str, Any] = {"expert": name, "coefficient": round(float(values.mean(dtype=np.float64)), 6)}
        if values.size > 1:
            row |= {"least": round(float(values.min()), 6), "largest": round(float(values.max()), 6), "parts": values.size}
        tied = " (where the head is tied: what embed has)" if component.kind == "lm_head" else ""
        rows.append(row | {"decided by": _decided(recipe, masks, found.arch, name, component) + tied})
    return rows


def component_effects(effects: EffectFile, text: str, arch: Architecture) -> Rows:
    """One row for each expert and behaviour: a component's effect, its standard error and its effect on both halves; a dash
    where the file holds none of it (a head that is tied, on the anchor what lies above it).

    Raises:
        InputError: no such component.
    """
    component = parse_component(text, arch)
    rows: Rows = []
    for e, expert in enumerate(effects.metadata.experts):
        for b, behavior in enumerate(effects.metadata.behaviors):
            row: dict[str, Any] = {"expert": expert, "on": behavior.name}
            values = _part(effects, "effect", component)[b, e]
            row["effect"] = round(float(values.sum(dtype=np.float64)), 7) if values.size else "–"
            if not values.size:
                rows.append(row)
                continue
            if component.layer < 0 or component.kind in effect_shapes(effects):
                row["stderr"] = round(float(_part(effects, "stderr", component)[b, e].sum(dtype=np.float64)), 7)
            halves = _part(effects, "half", component)
            row |= {f"half {h + 1}": round(float(halves[h, b, e].sum(dtype=np.float64)), 7) for h in (0, 1) if halves.size}
            rows.append(row)
    return rows


def _part(effects: EffectFile, measure: str, component: Component) -> Array:
    """The effects of a component's parts, with the parts as the last dimension (empty where the file has none)."""
    kinds = PARTS.get(component.kind, (component.kind,))
    arrays = [effects.arrays[f"{kind}.{measure}"][..., max(component.layer, 0), :] for kind in kinds
              if f"{kind}.{measure}" in effects.arrays]  # fmt: skip
    if not arrays:
        lead = (2,) if measure == "half" else ()
        return np.zeros((*lead, len(effects.metadata.behaviors), len(effects.metadata.experts), 0))
    joined: Array = np.concatenate(arrays, axis=-1)
    return joined[..., component.unit : component.unit + 1] if component.kind in UNIT_KINDS else joined


def _values(found: Coefficients, expert: str, component: Component) -> Array:
    if component.layer < 0:
        return np.array([found.outside[expert][component.kind]])
    if component.kind in UNIT_KINDS:
        return found.units[expert][component.kind][component.layer, component.unit : component.unit + 1]
    parts: Array = np.concatenate(
        [found.units[expert][k][component.layer] for k in PARTS.get(component.kind, (component.kind,))]
    )
    return parts


def _decided(recipe: Recipe, masks: Masks, arch: Architecture, expert: str, component: Component) -> str:
    """What a component's coefficients come from: masks, the most specific rules, and the default where nothing else tells."""
    told: dict[str, None] = {}
    default = False
    for kind in PARTS.get(component.kind, (component.kind,)):
        if f"{expert}.{kind}" in masks:
            told[f"mask {expert}.{kind}"] = None
            continue
        named = [(parse_pattern(rule.component, arch), rule) for rule in recipe.rules if rule.expert == expert]
        meeting = [(pattern, rule) for pattern, rule in named if pattern.meets(component.layer, kind)]
        single = component.unit if component.kind in UNIT_KINDS else None
        units = {single} if single is not None else {None, *(pattern.unit for pattern, _ in meeting)}
        deciding = [
            rule
            for unit in units
            for rule in most_specific([(pattern, rule) for pattern, rule in meeting if pattern.unit in (None, unit)])
        ]
        told |= {f"rule {rule.component} = {rule.coefficient:g}": None for rule in recipe.rules if rule in deciding}
        default |= not any(pattern.unit is None or pattern.unit == single for pattern, _ in meeting)
    return ", ".join([*told, *([f"default {recipe.experts[expert].default:g}"] if default or not told else [])])


# ------------------------------------------------------------------------------------------------------------------ differences
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
    return "; ".join(f"{r.component} of {r.expert} = {r.coefficient:g}" for r in recipe.rules) or "none"


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
