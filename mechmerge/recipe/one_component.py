"""What a recipe does with one component, why, and what was measured of it, in rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from mechmerge.localize.effect_file import EffectFile
from mechmerge.models.components import PARTS, UNIT_KINDS, Component, parse_component
from mechmerge.models.families import Architecture
from mechmerge.recipe.coefficients import Coefficients, most_specific, parse_pattern
from mechmerge.recipe.conflicts import (
    Rows,
    Scores,
    effect_shapes,
    figure,
    overlap_rule,
    part_of,
    sums,
    values_of,
    verdict,
    wanted_by,
)
from mechmerge.recipe.policies import mean_scores
from mechmerge.recipe.schema import Array, Masks, Recipe


def component_rows(recipe: Recipe, masks: Masks, found: Coefficients, text: str) -> Rows:
    """One row for each expert: a component's coefficient, and what decides it (a mask, a rule or the default).

    Raises:
        InputError: no such component.
    """
    component = parse_component(text, found.arch)
    rows: Rows = []
    for name in recipe.experts:
        values = values_of(found, name, component)
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
            values = part_of(effects, "effect", component)[b, e]
            row["effect"] = round(float(values.sum(dtype=np.float64)), 7) if values.size else "–"
            if not values.size:
                rows.append(row)
                continue
            if component.layer < 0 or component.kind in effect_shapes(effects):
                row["stderr"] = round(float(part_of(effects, "stderr", component)[b, e].sum(dtype=np.float64)), 7)
            halves = part_of(effects, "half", component)
            row |= {f"half {h + 1}": round(float(halves[h, b, e].sum(dtype=np.float64)), 7) for h in (0, 1) if halves.size}
            rows.append(row)
    return rows


def weighted_rows(recipe: Recipe, found: Coefficients, effects: EffectFile, counts: Array, text: str) -> Rows:
    """One row for each expert: a component's effects times what they count (`counts_of`), their sum on all prompts and on each
    half, and what was decided by it.

    Raises:
        InputError: no such component.
    """
    component = parse_component(text, found.arch)
    rows: Rows = []
    for e, expert in enumerate(effects.metadata.experts):
        row: dict[str, Any] = {"expert": expert}
        values = part_of(effects, "effect", component)[:, e]
        if values.shape[-1]:
            for b, behavior in enumerate(effects.metadata.behaviors):
                row[f"on {behavior.name}"] = figure(float(counts[b] * values[b].sum(dtype=np.float64)))
            rows.append(
                row | sums(effects, component, e, counts) | {"decided": verdict(recipe, found, effects, component, e, counts)}
            )
    return rows


def score_rows(recipe: Recipe, found: Coefficients, scores: Scores, text: str) -> Rows:
    """One row for each expert: a component's score, its rank among those that it competes with, what the expert wanted and what
    it gets; nothing of what `top` and `weighted` do not ask for.

    Raises:
        InputError: no such component.
    """
    component = parse_component(text, found.arch)
    if component.kind not in UNIT_KINDS:
        return []
    kind, at = component.kind, (component.layer, component.unit)
    wants = wanted_by(recipe, scores)
    several = sum(wants[f"{name}.{kind}"][at] != 0 for name in recipe.experts) > 1
    rows: Rows = []
    for name in recipe.experts:
        tables = mean_scores(name, scores[name], [])
        rivals = np.concatenate([tables[k].ravel() for k in (UNIT_KINDS if recipe.policy.name == "top" else (kind,))])
        score, known = float(tables[kind][at]), int(np.isfinite(rivals).sum())
        wanted = float(wants[f"{name}.{kind}"][at])
        rows.append(
            {
                "expert": name,
                "score": figure(score) if np.isfinite(score) else "–",
                "rank": f"{1 + int((rivals > score).sum())} of {known}" if np.isfinite(score) else "–",
                "wanted": round(wanted, 6),
                "gets": round(float(found.units[name][kind][at]), 6),
                "decided": overlap_rule(recipe) if several and wanted else "its own score",
            }
        )
    return rows


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
