"""What a recipe's experts and behaviours contested, component by component, and how each was decided, in rows.

Under `conflict` and `rounds` a component is contested that helps some behaviours and harms others; under `top` and `weighted`
one that several experts want. `explain.py` says the rest of what a recipe is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mechmerge.errors import InputError
from mechmerge.localize.effect_file import EffectFile
from mechmerge.localize.rounds_file import RoundsFile
from mechmerge.localize.scores import ScoreFile
from mechmerge.models.components import PARTS, UNIT_KINDS, Component
from mechmerge.recipe.coefficients import Coefficients
from mechmerge.recipe.policies import behavior_weights, mean_scores, top, weighted
from mechmerge.recipe.schema import Array, Masks, Recipe

STRONGEST = 10
"""Conflicts that are named where not all are asked for."""
OVERLAPS = {
    ("top", "sum"): "1 for each",
    ("top", "share"): "divided among them",
    ("top", "winner"): "the highest score",
    ("weighted", "sum"): "each as it is",
    ("weighted", "share"): "to a sum of 1 at most",
    ("weighted", "winner"): "the largest",
}
"""What a component that several experts want gets, by policy and overlap rule."""
RULES = {
    "solve": "linear program",
    "top": "by score",
    "weighted": "by score",
    "random": "drawn",
    "magnitude": "size of the delta",
    "task-arithmetic": "like all",
}
"""What decided on a component, by policy, where it is neither its weighted effect nor rounds of measuring."""
Rows = list[dict[str, Any]]
Shapes = Mapping[str, tuple[int, ...]]
Scores = Mapping[str, Sequence[ScoreFile]]


def effect_shapes(effects: EffectFile | None) -> dict[str, tuple[int, ...]]:
    """[layers, units] by kind, as far as effects tell them."""
    arrays = {} if effects is None else effects.arrays
    return {kind: arrays[f"{kind}.effect"].shape[-2:] for kind in UNIT_KINDS if f"{kind}.effect" in arrays}


def counts_of(recipe: Recipe, effects: EffectFile, rounds: RoundsFile | None = None) -> Array | str:
    """float64 [behaviours]: what an effect on each counts in the recipe's decision (its weight / its own expert's gain), or in
    one line why that cannot be said.
    """
    behaviors, metric = effects.metadata.behaviors, effects.metadata.metric
    asked = {b.name: recipe.policy.parameters.get(f"weight.{b.name}") for b in behaviors}
    if recipe.policy.name == "rounds" and rounds is not None and metric == "loss":
        asked |= {b.name: b.weight for b in rounds.metadata.behaviors if b.name in asked}
    given = {name: float(weight) for name, weight in asked.items() if isinstance(weight, int | float)}
    try:
        return behavior_weights(behaviors, given, "equal" if _equal(recipe) else "own-gain", metric)
    except InputError as error:
        return str(error)


def _equal(recipe: Recipe) -> bool:
    return recipe.policy.name == "conflict" and recipe.policy.parameters.get("weighting") == "equal"


def weight_rows(recipe: Recipe, effects: EffectFile, counts: Array) -> Rows:
    """One row for each behaviour: what its effects are multiplied by (`counts_of`)."""
    counted = "weight" if _equal(recipe) else "weight / own gain"
    return [
        {"behavior": b.name, "its expert": b.expert, "own gain": "–" if b.protected else round(b.own_gain, 6),
         counted: float(f"{count:.6g}")}
        for b, count in zip(effects.metadata.behaviors, counts, strict=True)
    ]  # fmt: skip


def conflict_rows(
    recipe: Recipe, found: Coefficients, effects: EffectFile, counts: Array, strongest: int | None = STRONGEST
) -> tuple[Rows, int]:
    """One row for each component of an expert that helps some behaviours and harms others, and how many there are.

    The strongest come first: a conflict is as strong as the smaller of what is gained and what is lost by it.

    Args:
        recipe: the recipe.
        found: its coefficients.
        effects: effects on its experts.
        counts: see `counts_of`.
        strongest: how many are named; None: all.
    """
    stakes = {}
    for kind in effect_shapes(effects):
        values = effects.arrays[f"{kind}.effect"] * counts[:, None, None, None]
        stakes[kind] = np.minimum(np.maximum(values, 0).sum(axis=0), np.maximum(-values, 0).sum(axis=0))
    places, number = _largest({kind: np.where(stake > 0, stake, -np.inf) for kind, stake in stakes.items()}, strongest)
    rows: Rows = []
    for kind, (e, layer, unit) in places:
        expert, component = list(effects.metadata.experts)[e], Component(layer, kind, unit)
        row: dict[str, Any] = {"component": str(component), "expert": expert}
        on = effects.arrays[f"{kind}.effect"][:, e, layer, unit] * counts
        for wish, sign in (("wanted in by", 1), ("wanted out by", -1)):
            asking = sorted((b for b in range(len(on)) if sign * on[b] > 0), key=lambda b: -abs(on[b]))
            row[wish] = ", ".join(f"{_asking(effects, b)} {signed(on[b])}" for b in asking)
        row |= sums(effects, component, e, counts)
        rows.append(row | {"decided": verdict(recipe, found, effects, component, e, counts)})
    return rows, number


def _largest(values: Mapping[str, Array], most: int | None) -> tuple[list[tuple[str, tuple[int, ...]]], int]:
    """Kind and place of the largest values that are not −inf, the first of equal ones first, and how many there are."""
    flat = np.concatenate([np.zeros(0), *(array.ravel() for array in values.values())])
    number = int((flat > -np.inf).sum())
    ends = np.cumsum([array.size for array in values.values()])
    places = []
    for index in np.argsort(-flat, kind="stable")[: number if most is None else min(most, number)]:
        which = int(np.searchsorted(ends, index, side="right"))
        kind, array = list(values.items())[which]
        place = np.unravel_index(int(index) - int(ends[which]) + array.size, array.shape)
        places.append((kind, tuple(int(i) for i in place)))
    return places, number


def overlap_conflict_rows(
    recipe: Recipe, found: Coefficients, scores: Scores | None = None, strongest: int | None = STRONGEST
) -> tuple[Rows, int]:
    """One row for each component that several experts want under `top` or `weighted`, and how many there are.

    Without score files what an expert wanted is known only as far as it got something. The strongest come first: where the
    second of the experts scores (without score files: gets) most.
    """
    names = list(recipe.experts)
    wants = wanted_by(recipe, scores) if scores else {}
    tables = {name: mean_scores(name, scores[name], []) for name in names} if scores else {}
    gets = {kind: np.stack([found.units[name][kind] for name in names]) for kind in UNIT_KINDS}
    wanted = {kind: np.stack([wants[f"{name}.{kind}"] for name in names]) if scores else gets[kind] for kind in UNIT_KINDS}
    rank: dict[str, Array] = {}
    for kind in UNIT_KINDS:
        score = np.stack([tables[name][kind] for name in names]) if scores else gets[kind]
        rank[kind] = np.sort(np.where(wanted[kind] != 0, score, -np.inf), axis=0)[-min(2, len(names))]
    places, number = _largest(rank if len(names) > 1 else {}, strongest)
    rows: Rows = []
    for place, (layer, unit) in places:
        row: dict[str, Any] = {"component": str(Component(layer, place, unit))}
        if scores:
            asked = {name: wants[f"{name}.{place}"][layer, unit] for name in names}
            row["wanted by"] = ", ".join(
                f"{name} {value:.3g} (score {tables[name][place][layer, unit]:.3g})" for name, value in asked.items() if value
            )
        row["gets"] = ", ".join(f"{name} {found.units[name][place][layer, unit]:.3g}" for name in names)
        rows.append(row | {"decided": overlap_rule(recipe)})
    return rows, number


def wanted_by(recipe: Recipe, scores: Scores) -> Masks:
    """What each expert would have of its own, before what several want is settled."""
    told: dict[str, Any] = {key: value for key, value in recipe.policy.parameters.items() if key in ("budget", "scale")}
    if not isinstance(told.setdefault("budget", 0.5), int | float):
        raise InputError("recipe: policy.parameters.budget", expected="a number", found=repr(told["budget"]))
    return (top if recipe.policy.name == "top" else weighted)(scores, overlap="sum", **told).masks


def overlap_rule(recipe: Recipe) -> str:
    """The overlap rule of `top` or `weighted`, in words."""
    overlap = str(recipe.policy.parameters.get("overlap", "sum"))
    return f"overlap {overlap}: {OVERLAPS.get((recipe.policy.name, overlap), 'as the policy says')}"


def _asking(effects: EffectFile, b: int) -> str:
    behavior = effects.metadata.behaviors[b]
    return behavior.name if behavior.name == behavior.expert else f"{behavior.name} ({behavior.expert})"


def sums(effects: EffectFile, component: Component, e: int, counts: Array) -> dict[str, Any]:
    """A component's weighted effect over all behaviours: on all prompts with its standard error, and on each half."""
    whole, error = weighed(effects, component, e, counts)
    row: dict[str, Any] = {"sum": figure(whole)} | ({} if error is None else {"standard error": figure(error)})
    halves = part_of(effects, "half", component)
    if halves.size:
        row |= {f"half {h + 1}": figure(float(np.tensordot(counts, halves[h, :, e], 1).sum())) for h in (0, 1)}
    return row


def weighed(effects: EffectFile, component: Component, e: int, counts: Array) -> tuple[float, float | None]:
    """A component's weighted effect on all prompts, and its standard error: None where it has parts, whose errors do not add
    up, or where the file has none.
    """
    whole = float(np.tensordot(counts, part_of(effects, "effect", component)[:, e].astype(np.float64), 1).sum())
    errors = part_of(effects, "stderr", component)[:, e].astype(np.float64)
    if component.kind not in UNIT_KINDS or not errors.size:
        return whole, None
    return whole, float(np.sqrt(counts**2 @ errors[:, 0] ** 2))


def verdict(recipe: Recipe, found: Coefficients, effects: EffectFile, component: Component, e: int, counts: Array) -> str:
    """What was decided on a component of an expert, and by which rule."""
    name = list(effects.metadata.experts)[e]
    values = values_of(found, name, component)
    if component.kind not in UNIT_KINDS:
        asked = [found.units[name][k][component.layer] for k in PARTS.get(component.kind, ()) if k in UNIT_KINDS]
        if not asked:
            return f"at {values.mean():g}: not decided on"
        parts = np.concatenate(asked)
        return f"{int((parts != 0).sum())} of {parts.size} parts in, each decided by itself"
    value = float(values[0])
    got = "out" if value == 0 else "in" if value == 1 else f"at {value:g}"
    policy = recipe.policy.name.split()
    if policy[0] == "rounds":
        return f"{got}: {'turned over in rounds' if value == 0 else 'as in the sum'}"
    if policy != ["conflict"]:
        return f"{got}: {'the recipe within' if 'within' in policy else RULES.get(policy[0], 'rules and masks')}"
    agreement = recipe.policy.parameters.get("agreement", True) is not False
    arrays = part_of(effects, "half" if agreement else "effect", component).astype(np.float64)
    if not arrays.size:
        return f"{got}: the file holds no halves"
    sums = np.atleast_1d(np.tensordot(counts, arrays, axes=(0, 1 if agreement else 0))[..., e, 0])
    negative = int((sums < 0).sum())
    where = "on both halves" if agreement else "on all prompts"
    said = f"< 0 {where}" if negative == len(sums) else "< 0 on one half" if negative else f"≥ 0 {where}"
    harmful = negative == len(sums)
    certainty = recipe.policy.parameters.get("certainty", 0.0)
    least = float(certainty) if isinstance(certainty, int | float) else 0.0
    whole, error = weighed(effects, component, e, counts)
    if harmful and least and error is None:
        return f"{got}: the file holds no standard errors"
    if harmful and least:
        harmful = -whole > least * (error or 0.0)
        said += "" if harmful else f", by less than {least:g} standard errors"
    unlike = harmful != (value == 0) and recipe.policy.parameters.get(f"strength.{name}", 1.0) != 0
    return f"{got}: {said}" + (", so not by these effects" if unlike else "")


def figure(value: float) -> float:
    """Three significant digits."""
    return float(f"{value:.3g}")


def signed(value: float) -> str:
    """Three significant digits, with the sign."""
    return f"{value:+.3g}".replace("-", "−", 1)


def part_of(effects: EffectFile, measure: str, component: Component) -> Array:
    """The effects of a component's parts, with the parts as the last dimension (empty where the file has none)."""
    kinds = PARTS.get(component.kind, (component.kind,))
    arrays = [effects.arrays[f"{kind}.{measure}"][..., max(component.layer, 0), :] for kind in kinds
              if f"{kind}.{measure}" in effects.arrays]  # fmt: skip
    if not arrays:
        lead = (2,) if measure == "half" else ()
        return np.zeros((*lead, len(effects.metadata.behaviors), len(effects.metadata.experts), 0))
    joined: Array = np.concatenate(arrays, axis=-1)
    return joined[..., component.unit : component.unit + 1] if component.kind in UNIT_KINDS else joined


def values_of(found: Coefficients, expert: str, component: Component) -> Array:
    """The coefficients of an expert in a component, one for each of its parts."""
    if component.layer < 0:
        return np.array([found.outside[expert][component.kind]])
    if component.kind in UNIT_KINDS:
        return found.units[expert][component.kind][component.layer, component.unit : component.unit + 1]
    parts: Array = np.concatenate(
        [found.units[expert][k][component.layer] for k in PARTS.get(component.kind, (component.kind,))]
    )
    return parts
