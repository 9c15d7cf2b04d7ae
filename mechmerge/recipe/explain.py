"""What a recipe takes from whom, in rows: by expert, kind and depth, what was contested and how that was decided, what is
expected, and against another.

Shares are mean coefficients (so 1/k counts as 1/k); `in` means a coefficient other than 0. Nothing here needs a model: sizes
come from the recipe's masks and what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mechmerge.errors import InputError, MissingError
from mechmerge.localize.effect_file import MEASURED, EffectFile, unit_of
from mechmerge.localize.rounds_file import RoundsFile
from mechmerge.localize.settings import ScoreSource
from mechmerge.models.components import LEAF_KINDS, OUTSIDE, UNIT_KINDS
from mechmerge.models.families import FAMILIES, Architecture
from mechmerge.recipe.coefficients import Coefficients, coefficients
from mechmerge.recipe.conflicts import (
    RULES,
    Rows,
    Scores,
    Shapes,
    counts_of,
    effect_shapes,
    signed,
)
from mechmerge.recipe.policies import predicted_change
from mechmerge.recipe.schema import Masks, Recipe
from mechmerge.recipe.sources import effect_gains, round_gains

DEPTHS = ("early", "middle", "late")
"""Thirds of the layers."""
NAMES = {"head": "heads", "kv": "kv groups", "neuron": "neurons"}
BY_WEIGHT = ("ties", "dare_ties", "della", "breadcrumbs", "sce")
"""Methods of mergekit that choose single weights, not components."""


def in_place_of_coefficients(recipe: Recipe) -> str | None:
    """What decides in the place of coefficients of components, in two words; None where these do.

    `by weight`: mergekit's method chooses single weights, in a recipe that works within coefficients too; `whole model`: it
    takes all of each expert at shares of its own.
    """
    if recipe.mergekit is None or recipe.mergekit.method == "task_arithmetic":
        return None
    return "by weight" if recipe.mergekit.method in BY_WEIGHT else "whole model"


def has_coefficients(recipe: Recipe) -> bool:
    """Whether components have coefficients: in all recipes but most baselines."""
    return in_place_of_coefficients(recipe) is None or (recipe.mergekit is not None and recipe.mergekit.within)


def mask_shapes(masks: Masks) -> dict[str, tuple[int, ...]]:
    """[layers, units] by kind, as far as masks tell them."""
    return {name.rpartition(".")[2]: mask.shape for name, mask in masks.items()}


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
    if not has_coefficients(recipe):
        raise InputError(
            "recipe", expected="a recipe of coefficients",
            found=f"the baseline {recipe.policy.name}, whose method decides {in_place_of_coefficients(recipe)}",
        )  # fmt: skip
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


def rule_rows(recipe: Recipe) -> Rows:
    """One row for each rule, in the recipe's order."""
    return [{"component": r.component, "expert": r.expert, "coefficient": f"{r.coefficient:g}"} for r in recipe.rules]


def shares(
    recipe: Recipe, masks: Masks, unit_parameters: Mapping[str, int], found: Coefficients | None = None
) -> list[dict[str, Any]]:
    """One row for each expert: its default and how much of its heads, KV groups and neurons is taken.

    Shares are mean coefficients (so 1/k counts as 1/k), in percent. `head + kv + neuron` weighs the kinds by their parameters,
    and is a dash where these are not told. Where rules decide, no share can be said without the model's sizes: `by rules`.
    Nor can it where a method of mergekit decides in the place of coefficients: its word stands there, and its weight.

    Args:
        recipe: the recipe.
        masks: its masks.
        unit_parameters: parameters of a unit by kind, where they are known.
        found: the recipe's coefficients, where the sizes are known: they tell what rules come to.
    """
    rows = []
    for name, expert in recipe.experts.items():
        if not has_coefficients(recipe):
            given = recipe.mergekit is not None and recipe.mergekit.weighted
            words = dict.fromkeys(("everything else", *UNIT_KINDS, "head + kv + neuron"), in_place_of_coefficients(recipe))
            rows.append({"expert": name, "weight": f"{expert.default:g}" if given else "–", **words})
            continue
        row: dict[str, Any] = {"expert": name, "everything else": f"{expert.default:g}"}
        ruled = any(rule.expert == name for rule in recipe.rules)
        parts, sizes = [], []
        for kind in UNIT_KINDS:
            known = masks.get(f"{name}.{kind}") if found is None else found.units[name][kind]
            share = float(expert.default if known is None else known.mean(dtype=np.float64))
            row[kind] = "by rules" if known is None and ruled else share_text(recipe, share)
            parts.append(share)
            sizes.append((known.size if known is not None else 0) * unit_parameters.get(kind, 0))
        if "by rules" in row.values():
            whole = "by rules"
        elif all(sizes):
            whole = share_text(recipe, float(np.average(parts, weights=sizes)))
        else:
            whole = row["head"] if len(set(parts)) == 1 else "–"
        row["head + kv + neuron"] = whole
        rows.append(row)
    return rows


def depth_rows(recipe: Recipe, found: Coefficients | None, sizes: Mapping[str, int]) -> Rows:
    """One row for each expert and third of the layers: shares by kind, and parameters taken where sizes are known.

    Args:
        recipe: the recipe.
        found: its coefficients; None where its method decides in their place.
        sizes: parameters of a unit by kind, where they are known.
    """
    rows: Rows = []
    for name in recipe.experts:
        if found is None:
            word = in_place_of_coefficients(recipe)
            rows += [{"expert": name, "depth": depth} | dict.fromkeys(NAMES.values(), word) for depth in DEPTHS]
            continue
        parts = {kind: np.array_split(found.units[name][kind], len(DEPTHS)) for kind in UNIT_KINDS}
        for i, depth in enumerate(DEPTHS):
            row: dict[str, Any] = {"expert": name, "depth": depth}
            for kind in UNIT_KINDS:
                part = parts[kind][i]
                row[NAMES[kind]] = share_text(recipe, float(part.mean(dtype=np.float64))) if part.size else "–"
            if sizes:
                row["parameters"] = sum(round(float(parts[k][i].sum(dtype=np.float64)) * sizes[k]) for k in UNIT_KINDS)
            rows.append(row)
    return rows


def share_text(recipe: Recipe, share: float) -> str:
    """A mean coefficient in percent; `within 50.0 %` where a method chooses weights inside of what has one."""
    return f"{'' if in_place_of_coefficients(recipe) is None else 'within '}{100 * share:.1f} %"


def contested_rows(recipe: Recipe, found: Coefficients, effects: EffectFile) -> Rows:
    """One row for each expert and verdict of the effects on its components: whom they help, and what became of them.

    `contested`: helps some behaviour and harms another. Shares of `kept` are mean coefficients.
    """
    rows: Rows = []
    for i, name in enumerate(effects.metadata.experts):
        if name not in recipe.experts:
            continue
        kinds = effect_shapes(effects)
        values = np.concatenate(
            [np.zeros((len(effects.metadata.behaviors), 0)),
             *(effects.arrays[f"{kind}.effect"][:, i].reshape(len(effects.metadata.behaviors), -1) for kind in kinds)], axis=1
        )  # fmt: skip
        kept = np.concatenate([np.zeros(0), *(found.units[name][kind].ravel() for kind in kinds)])
        helps, harms = (values > 0).any(axis=0), (values < 0).any(axis=0)
        for told, which in (("helps only", helps & ~harms), ("contested", helps & harms), ("harms only", harms & ~helps),
                               ("no effect", ~helps & ~harms)):  # fmt: skip
            if which.any():
                row: dict[str, Any] = {"expert": name, "components": told, "number": int(which.sum())}
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


def predicted_by(
    recipe: Recipe, found: Coefficients | None, effects: EffectFile | None
) -> tuple[dict[str, float], ScoreSource] | None:
    """The change of each behaviour that the recipe predicts, else that the effects predict of its coefficients, and of what.

    None where neither does: what a method of mergekit does beyond coefficients is not foreseen.
    """
    if recipe.predicted is not None:
        return recipe.predicted, recipe.predicted_on
    if effects is None or found is None or in_place_of_coefficients(recipe) is not None:
        return None
    if effects.metadata.experts.keys() != recipe.experts.keys():
        return None
    masks: Masks = {}
    for name in recipe.experts:
        masks |= {f"{name}.{kind}": found.units[name][kind] for kind in LEAF_KINDS}
        masks |= {f"{name}.{place}": np.full((1, 1), found.outside[name][place], np.float32) for place in OUTSIDE}
    defaults = {name: expert.default for name, expert in recipe.experts.items()}
    return predicted_change(effects, defaults, masks), effects.metadata.metric


def own_gains(
    recipe: Recipe, metric: ScoreSource, effects: EffectFile | None = None, rounds: RoundsFile | None = None
) -> dict[str, float]:
    """What each behaviour's own expert gains in a metric: as the recipe says it of what its prediction is from, else as the
    files tell; empty where nothing does.
    """
    told: list[tuple[str, dict[str, float]]] = []
    if recipe.predicted is not None:
        told += [(source.kind, source.gains) for source in recipe.provenance if source.metric == metric]
    if effects is not None and effects.metadata.metric == metric:
        told.append(("effects", effect_gains(effects)))
    if rounds is not None and metric == "loss":
        told.append(("rounds", round_gains(rounds)))
    # What was measured at the merge was measured on the answers of the rounds.
    first = "rounds" if recipe.realised is not None else "effects"
    return next((gains for _, gains in sorted(told, key=lambda one: one[0] != first) if gains), {})


def counted_in(recipe: Recipe, metric: ScoreSource, effects: EffectFile | None = None) -> str:
    """The unit of a recipe's predicted and measured changes, in words."""
    told = [(source.kind, source.tokens) for source in recipe.provenance if source.metric == metric]
    if recipe.predicted is None or not told:
        return unit_of(metric, "all" if effects is None else effects.metadata.tokens)
    first = "rounds" if recipe.realised is not None else "effects"
    return unit_of(metric, min(told, key=lambda one: one[0] != first)[1])


def expected_rows(
    recipe: Recipe,
    predicted: Mapping[str, float],
    metric: ScoreSource,
    gains: Mapping[str, float],
    effects: EffectFile | None = None,
) -> Rows:
    """One row for each behaviour: predicted and realised change, and which share of its own expert's gain they are.

    Args:
        recipe: the recipe.
        predicted: change by behaviour.
        metric: of what.
        gains: see `own_gains`; without any there are no shares.
        effects: where they are known, they name the experts.
    """
    experts = {} if effects is None else {b.name: b.expert for b in effects.metadata.behaviors}
    sign = -1 if metric == "loss" else 1
    rows: Rows = []
    for name, change in predicted.items():
        row: dict[str, Any] = {"behavior": name, f"predicted change of {MEASURED[metric]}": round(change, 4)}
        gain = gains.get(name, 0.0)
        shares = {"expected recovery": round(sign * change / gain, 3) if gain > 0 else "–"}
        if recipe.realised is not None:
            measured = recipe.realised.get(name)
            row["measured"] = "–" if measured is None else round(measured, 4)
            shares["measured recovery"] = round(sign * measured / gain, 3) if measured is not None and gain > 0 else "–"
        if experts:
            row["its expert"] = experts.get(name, "–")
        rows.append(row | (shares if gains else {}))
    return rows


def unexpected_rows(recipe: Recipe, effects: EffectFile | None = None, rounds: RoundsFile | None = None) -> Rows:
    """Why no change or no recovery can be expected of a recipe, or what would tell it: one row, or none."""
    metric, instead = recipe.predicted_on, in_place_of_coefficients(recipe)
    if recipe.predicted is None:
        if instead is not None:
            return [{"what": "expected change", "why": f"{instead}: effects of components do not foresee what the method does"}]
        known = effects is not None or recipe.policy.name.split()[0] not in (*RULES, "conflict", "rounds")
        return [] if known else [{"what": "expected change", "why": "needs an effect file of these models (--effects)"}]
    if own_gains(recipe, metric, effects, rounds):
        return []
    why = "nothing tells what the experts gain: give the effect file (--effects) or the rounds file (--rounds)"
    if effects is not None and effects.metadata.metric != metric:
        other = MEASURED[effects.metadata.metric]
        why = f"the recipe predicts a change of {MEASURED[metric]}, and the effect file tells of {other}"
    return [{"what": "expected recovery", "why": why}]


def undecided_rows(
    recipe: Recipe, effects: EffectFile | None = None, rounds: RoundsFile | None = None, scores: Scores | None = None
) -> Rows:
    """What cannot be said of how a recipe's components were decided on, and why or what would tell it: one row each."""
    rows: Rows = []
    policy = recipe.policy.name
    if policy in ("conflict", "solve", "rounds") and effects is None:
        rows.append({"what": "what was decided on", "why": "needs the effect file (--effects)"})
    elif policy == "rounds" and effects is not None:
        why = f"the effects at its merges are kept nowhere; those here are along {effects.metadata.path}"
        rows.append({"what": "what each round decided on", "why": why})
    if policy in ("top", "weighted") and len(recipe.experts) > 1 and not scores:
        lost = ", since winner keeps one of them" if recipe.policy.parameters.get("overlap") == "winner" else ""
        rows.append({"what": "what each expert wanted", "why": f"needs the score files (--scores){lost}"})
    counts = None if effects is None else counts_of(recipe, effects, rounds)
    if isinstance(counts, str):
        rows.append({"what": "weighted effects", "why": counts})
    return rows


def round_rows(rounds: RoundsFile) -> Rows:
    """One row for each round, or measured solution: what was proposed, changed, predicted and found, and whether it stayed."""
    rows: Rows = []
    for number, record in enumerate(rounds.metadata.rounds, 1):
        row: dict[str, Any] = {rounds.metadata.method: number, "proposed": record.proposed, "changed": record.changed}
        for name, change in record.realised.items():
            row[f"{name}: predicted, found"] = f"{signed(record.predicted[name])}, {signed(change)}"
        rows.append(row | {"weighted gain": round(record.gain, 4), "stayed": "yes" if record.accepted else "no"})
    return rows
