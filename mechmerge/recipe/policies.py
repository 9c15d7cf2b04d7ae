"""Policies: from effect and score files to a coefficient for every head, KV group and neuron of every expert.

`conflict`: task arithmetic (Ilharco et al., https://arxiv.org/abs/2212.04089) without the parts that do harm. Effects along the
    path from the base to the sum are integrated gradients (Sundararajan et al., https://arxiv.org/abs/1703.01365) of the
    components' deltas. New here: a component's verdict is its effect summed over all behaviours, each divided by
    its own expert's gain, and it must hold on both halves of the calibration prompts (and, where
    that is asked for, by some standard errors on all of them).
`rounds`: the same question asked where the decision is taken, in rounds of measuring (localize/rounds.py).
`solve`: the best predicted worst case under a budget and limits of damage, by a linear program (localize/program.py) over the
    effects, where these are known to predict; or the one that was measured and solved once more (localize/solving.py).
`top`: the best share of each expert by its localization score ("Weight Patching", arXiv 2604.13694, ranks components so), where
    DARE keeps a random share (https://arxiv.org/abs/2311.03099) and TIES the largest (https://arxiv.org/abs/2306.01708).

`weighted`: no hard cut: a coefficient for every component from its rank or its score, as Fisher merging (Matena and Raffel,
    https://arxiv.org/abs/2111.09832) has one for every parameter from its information. One for each component from
    localization scores, calibrated to a budget, is ours.

All are pure: the same files give the same coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from mechmerge.errors import InputError, SchemaError
from mechmerge.localize.effect_file import EFFECT_KINDS, BehaviorEffect, EffectFile
from mechmerge.localize.effect_program import check_proven, solve_effects
from mechmerge.localize.rounds_file import RoundsFile
from mechmerge.localize.scores import ScoreFile
from mechmerge.localize.settings import ScoreSource
from mechmerge.models.components import UNIT_KINDS
from mechmerge.recipe.schema import Array, Masks

Weighting = Literal["own-gain", "equal"]
Overlap = Literal["sum", "share", "winner"]
Scale = Literal["rank", "share"]


@dataclass(frozen=True)
class Choice:
    """What a policy decided."""

    defaults: dict[str, float]
    """Coefficient of everything of an expert that no mask covers."""
    masks: Masks
    """`<expert>.<kind>` → float32 [layers, units]."""
    predicted: dict[str, float] | None = None
    """Predicted change against the base by behaviour: of what, `metric` says."""
    metric: ScoreSource = "loss"
    """`loss`: nats per answer token, negative is better; `anchor`: recovery, positive is better."""
    notes: tuple[str, ...] = field(default=())
    """What a user should know of how the files were used."""
    realised: dict[str, float] | None = None
    """Measured change of loss against the base by behaviour, where it was measured at this very choice."""


def behavior_weights(
    behaviors: Sequence[BehaviorEffect],
    weights: Mapping[str, float] | None = None,
    weighting: Weighting = "own-gain",
    metric: ScoreSource = "loss",
) -> Array:
    """float64 [behaviours]: the user's weight, divided by the own expert's gain under `own-gain`. A protected behaviour has no
    expert and no gain: its weight stays as it is, so a nat of damage to it counts as much as `weight` whole own gains do.

    Args:
        behaviors: rows of the effect file.
        weights: weights by name, in the place of those in the file.
        weighting: `own-gain` makes an effect count by how much the behaviour had to win; `equal` counts effects as they are.
        metric: of the effect file.

    Raises:
        InputError: a weight for a behaviour that is not there, one that is not positive, or an expert that gains nothing.
    """
    given = dict(weights or {})
    if unknown := given.keys() - {b.name for b in behaviors}:
        known = ", ".join(b.name for b in behaviors)
        raise InputError("weights", expected=f"behaviours among {known}", found=", ".join(sorted(unknown)))
    result = []
    for behavior in behaviors:
        weight = float(given.get(behavior.name, behavior.weight))
        if not (np.isfinite(weight) and weight > 0):
            raise InputError(f"weight of {behavior.name}", expected="a positive number", found=str(weight))
        if weighting == "own-gain" and not behavior.protected:
            if behavior.own_gain <= 0:
                wanted, unit = {
                    "loss": ("lower its loss", "nats per token"),
                    "anchor": ("move its state along the anchor", "of recovery"),
                }[metric]
                raise InputError(
                    f"behaviour {behavior.name}",
                    expected=f"its own expert {behavior.expert} to {wanted}",
                    found=f"a gain of {behavior.own_gain:.3f} {unit}",
                    fix="leave the behaviour out, or use --weighting equal",
                )
            weight /= behavior.own_gain
        result.append(weight)
    return np.array(result)


def conflict(
    effects: EffectFile,
    weights: Mapping[str, float] | None = None,
    agreement: bool = True,
    weighting: Weighting = "own-gain",
    certainty: float = 0.0,
) -> Choice:
    """All deltas at coefficient 1, except heads, KV groups and neurons that harm the behaviours taken together, at 0.

    Args:
        effects: effects along the path from the base to the sum.
        weights: weights by behaviour, in the place of those in the file.
        agreement: drop only what is harmful on both halves of the calibration prompts (else: on their mean).
        weighting: see `behavior_weights`.
        certainty: standard errors (over topics, behaviours taken for independent) by which the effect on all prompts must be
            below 0; 0: any harm counts.

    Raises:
        SchemaError: the file holds no effects or errors of a kind, or no halves although agreement is asked for.
        InputError: see `behavior_weights`.
    """
    metadata = effects.metadata
    w = behavior_weights(metadata.behaviors, weights, weighting, metadata.metric)
    masks: Masks = {}
    for kind in UNIT_KINDS:
        total = np.tensordot(w, _tensor(effects, f"{kind}.effect"), 1)
        harmful: Array = np.less(total, 0)
        if agreement:
            harmful = np.all(np.tensordot(w, _tensor(effects, f"{kind}.half"), axes=(0, 1)) < 0, axis=0)
        if certainty:
            harmful &= -total > certainty * np.sqrt(np.tensordot(w**2, _tensor(effects, f"{kind}.stderr") ** 2, 1))
        for i, expert in enumerate(metadata.experts):
            masks[f"{expert}.{kind}"] = np.where(harmful[i], 0, 1).astype(np.float32)
    defaults = dict.fromkeys(metadata.experts, 1.0)
    notes = tuple(f"effects on {name}: {caveat}" for name, caveat in metadata.caveats.items())
    return Choice(defaults, masks, predicted_change(effects, defaults, masks), metadata.metric, notes)


def _tensor(effects: EffectFile, name: str) -> Array:
    if name not in effects.arrays:
        raise SchemaError("effect file", expected=f"a tensor {name}", found="none", fix="measure the effects again")
    return effects.arrays[name].astype(np.float64)


def rounds(file: RoundsFile) -> Choice:
    """The coefficients that were settled in rounds (localize/rounds.py); everything else of every expert at 1.

    The file has measured the change of loss at this very merge, so the prediction is what the accepted rounds predicted
    on top of the measured loss of the sum, and what was realised stands beside it.
    """
    return _settled(file, "rounds")


def _settled(file: RoundsFile, method: str) -> Choice:
    """The coefficients of a file of rounds or solutions, with what was predicted and realised at them."""
    metadata = file.metadata
    if metadata.method != method:
        raise InputError(f"policy {method}", expected=f"a rounds file of the method {method}", found=metadata.method)
    masks = {f"{e}.{k}": file.arrays[f"{k}.coefficient"][i] for k in UNIT_KINDS for i, e in enumerate(metadata.experts)}
    accepted = [record for record in metadata.rounds if record.accepted]
    predicted = {b.name: b.loss_sum - b.loss_base + sum(r.predicted[b.name] for r in accepted) for b in metadata.behaviors}
    realised = {b.name: b.loss_merge - b.loss_base for b in metadata.behaviors}
    notes = () if accepted else ("no round raised the weighted gain: this is the sum of the experts",)
    if metadata.solve is not None and (metadata.solve.linearity is None or not metadata.solve.linearity.holds):
        notes = ("not proven: the effects that were solved over are not known to predict; the realised change was measured",)
    return Choice(
        {name: metadata.rest.get(name, 1.0) for name in metadata.experts},
        masks,
        {name: round(value, 6) for name, value in predicted.items()},
        "loss",
        notes,
        {name: round(value, 6) for name, value in realised.items()},
    )


def solve(
    measured: EffectFile | RoundsFile,
    budget: float = 1.0,
    limits: Mapping[str, float] | None = None,
    agreement: bool = True,
    unproven: bool = False,
) -> Choice:
    """The coefficients of the best predicted worst case: the largest retained gain of the worst-off behaviour.

    Args:
        measured: effects, or a file of solutions that were measured (`mechmerge rounds --solve`), which has its own budget.
        budget: share of each expert's head + KV + neuron parameters; a coefficient counts in proportion.
        limits: most predicted rise of a behaviour's loss (on the anchor: fall of its recovery) against the base, in the
            metric's unit; protected behaviours have .1 where none is given.
        agreement: the worst case is that of both halves of the calibration prompts (else: of their mean).
        unproven: solve although the effects are not known to predict.

    Raises:
        InputError: the effects are not known to predict, limits that cannot be met, or what `solve_effects` raises.
        SchemaError: the file holds no effects of a kind, or no halves although agreement is asked for.
    """
    if isinstance(measured, RoundsFile):
        return _settled(measured, "solve")
    doubt = check_proven(measured, unproven)
    solved = solve_effects(measured, budget, limits, agreement)
    metadata = measured.metadata
    masks = {f"{e}.{kind}": solved.units[kind][i] for kind in UNIT_KINDS for i, e in enumerate(metadata.experts)}
    defaults = dict(zip(metadata.experts, solved.rest, strict=True))
    caveats = (f"effects on {name}: {caveat}" for name, caveat in metadata.caveats.items())
    worst = f"the worst-off behaviour is predicted to keep {solved.worst:.3f} of its own expert's gain"
    notes = (*((doubt,) if doubt else ()), *caveats, worst)
    return Choice(defaults, masks, predicted_change(measured, defaults, masks), metadata.metric, notes)


def predicted_change(effects: EffectFile, defaults: Mapping[str, float], masks: Masks) -> dict[str, float]:
    """Change of each behaviour that the effects predict: on the loss −Σ coefficient × effect, nats per answer token; on the
    anchor Σ coefficient × effect, recovery.

    It is exact (up to the completeness error) at coefficient 1 everywhere, and linear in between, which neither metric is.
    Effects whose path starts at the sum predict from the gain that was measured there.
    """
    sign = -1 if effects.metadata.metric == "loss" else 1
    total = sum(
        effects.arrays[f"{kind}.effect"].sum(axis=(1, 2, 3), dtype=np.float64)
        for kind in EFFECT_KINDS
        if f"{kind}.effect" in effects.arrays
    )
    gains = effects.gains_at_nothing(np.asarray(total))
    for kind in EFFECT_KINDS:
        values = effects.arrays.get(f"{kind}.effect")
        if values is None:
            continue
        for i, expert in enumerate(effects.metadata.experts):
            coefficient = masks.get(f"{expert}.{kind}", np.float32(defaults[expert]))
            gains += (values[:, i].astype(np.float64) * coefficient).sum(axis=(-2, -1))
    return {b.name: float(round(sign * gain, 6)) for b, gain in zip(effects.metadata.behaviors, gains, strict=True)}


def top(scores: Mapping[str, Sequence[ScoreFile]], budget: float, overlap: Overlap = "sum") -> Choice:
    """Each expert's best heads, KV groups and neurons up to a budget; all else stays the base's, embeddings and norms too.

    Args:
        scores: each expert's score files; a component's score is its mean over them.
        budget: fraction of each expert's head + KV + neuron parameters, 0 < budget ≤ 1. Components are taken in the order of
            their scores and the first that would not fit ends it, so the budget is never exceeded.
        overlap: what a component chosen for k experts gets: coefficient 1 for each (`sum`), 1/k (`share`), or 1 for the
            highest score alone (`winner`).

    Components without a score, not above 0, or above the anchor are never taken. Files whose anchor is not valid are left out
    where an expert has valid ones, and raw differences where it has recoveries; the notes say so.

    Raises:
        InputError: a budget outside (0, 1], or an expert without score files.
    """
    if not 0 < budget <= 1:
        raise InputError("budget", expected="a fraction above 0 and at most 1", found=str(budget))
    notes: list[str] = []
    tables = {expert: mean_scores(expert, files, notes) for expert, files in scores.items()}
    taken = {expert: _best(table, _unit_parameters(scores[expert]), budget) for expert, table in tables.items()}
    masks: Masks = {}
    for kind in UNIT_KINDS:
        chosen = np.stack([taken[expert][kind] for expert in scores])
        values = chosen.astype(np.float32)
        if overlap == "share":
            values /= np.maximum(chosen.sum(axis=0), 1)
        elif overlap == "winner":
            ranked = np.where(chosen, np.stack([tables[expert][kind] for expert in scores]), -np.inf)
            values *= np.arange(len(scores))[:, None, None] == ranked.argmax(axis=0)
        for i, expert in enumerate(scores):
            masks[f"{expert}.{kind}"] = values[i]
    return Choice(dict.fromkeys(scores, 0.0), masks, notes=tuple(notes))


def weighted(
    scores: Mapping[str, Sequence[ScoreFile]], budget: float = 0.5, scale: Scale = "rank", overlap: Overlap = "sum"
) -> Choice:
    """A coefficient for each head, KV group and neuron that rises with its score; all else stays the base's.

    Args:
        scores: each expert's score files; a component's score is its mean over them.
        budget: mean coefficient of each kind of each expert, 0 < budget ≤ 1: what is moved is as much as under `top`.
        scale: `rank`: r^γ with r = (rank − ½) / number, 0 … 1, over the components of the kind that have a score (the mean
            rank where scores are equal), and γ such that the budget is met; `share`: score / τ, at most 1, of those above 0,
            and τ such that it is met.
        overlap: where several experts have a coefficient: as they are (`sum`), divided by their sum where that is above 1
            (`share`), or the largest alone (`winner`; equal ones: the first expert's).

    Components without a score, or above the anchor, get 0. The budget is not reached where too few have one; the notes say so,
    and which files were left out, as for `top`.

    Raises:
        InputError: a budget outside (0, 1], or an expert without score files.
    """
    if not 0 < budget <= 1:
        raise InputError("budget", expected="a fraction above 0 and at most 1", found=str(budget))
    notes: list[str] = []
    tables = {expert: mean_scores(expert, files, notes) for expert, files in scores.items()}
    masks: Masks = {}
    for kind in UNIT_KINDS:
        found = np.stack([_graded(table[kind], budget, scale) for table in tables.values()])
        for expert, values in zip(scores, found, strict=True):
            if values.mean() < budget - 1e-3:
                notes.append(f"{expert}: too few {kind} components have a score: mean coefficient {values.mean():.3f}")
        if overlap == "share":
            found = found / np.maximum(found.sum(axis=0), 1)
        elif overlap == "winner":
            found = found * (np.arange(len(scores))[:, None, None] == found.argmax(axis=0))
        for i, expert in enumerate(scores):
            masks[f"{expert}.{kind}"] = found[i].astype(np.float32)
    return Choice(dict.fromkeys(scores, 0.0), masks, notes=tuple(notes))


def _graded(score: Array, budget: float, scale: Scale) -> Array:
    """float64 [layers, units], 0 … 1, rising with the score, with the mean `budget` as far as that can be."""
    from scipy.stats import rankdata

    known = np.isfinite(score) if scale == "rank" else np.isfinite(score) & (score > 0)
    result = np.zeros(score.shape)
    if not known.any():
        return result
    wanted = budget * score.size / known.sum()
    values = (rankdata(score[known]) - 0.5) / known.sum() if scale == "rank" else score[known] / score[known].max()

    def graded(knob: float) -> Array:
        made: Array = values**knob if scale == "rank" else np.minimum(values / knob, 1.0)
        return made

    # The mean falls as either knob (γ, or τ in units of the largest score) rises: bisection on its logarithm.
    low, high = 1e-9, 1e9
    for _ in range(100):
        middle = float(np.sqrt(low * high))
        low, high = (middle, high) if graded(middle).mean() > wanted else (low, middle)
    # Rounded, so that equal ranks of two experts are equal coefficients whatever the order of summation was.
    result[known] = graded(high).round(6)
    return result


def mean_scores(expert: str, files: Sequence[ScoreFile], notes: list[str]) -> dict[str, Array]:
    """kind → float64 [layers, units], −inf where no file has a score, and above the anchors of all that are used."""
    if not files:
        raise InputError(f"expert {expert}", expected="at least one score file", found="none")
    valid = [file for file in files if file.metadata.valid]
    used = valid or [file for file in files if file.metadata.scale == "recovery"] or list(files)
    sources = sorted({file.metadata.source for file in files if file not in used})
    left = ", ".join(file.metadata.label for file in files if file not in used)
    if left:
        what = " or ".join({"anchor": "anchors", "loss": "losses"}[source] for source in sources)
        reason = f"their {what} are not valid" if valid else "they are raw differences"
        notes.append(f"{expert}: scores of {left} were left out of the mean, since {reason}")
    if not valid:
        what = " and no ".join(sorted({file.metadata.source for file in files}))
        notes.append(f"{expert}: no {what} is valid; its scores may mean nothing")
    result: dict[str, Array] = {}
    for kind in UNIT_KINDS:
        stacked = np.stack([file.score(kind).astype(np.float64) for file in used])
        known = np.isfinite(stacked)
        total = np.where(known, stacked, 0.0).sum(axis=0)
        count = known.sum(axis=0)
        result[kind] = np.where(count > 0, total / np.maximum(count, 1), -np.inf)
        result[kind][max(file.depth for file in used) :] = -np.inf
    return result


def _unit_parameters(files: Sequence[ScoreFile]) -> dict[str, Array]:
    """kind → int64 [layers]: parameters of one unit."""
    found: dict[str, Array] = {}
    for kind in UNIT_KINDS:
        if f"{kind}.parameters" not in files[0].arrays:
            raise SchemaError(
                f"score file of {files[0].metadata.behavior}", expected=f"a tensor {kind}.parameters", found="none"
            )
        found[kind] = files[0].arrays[f"{kind}.parameters"].astype(np.int64)
    return found


def _best(table: dict[str, Array], parameters: dict[str, Array], budget: float) -> dict[str, Array]:
    """kind → bool [layers, units]: the best components within the budget."""
    sizes = {kind: np.broadcast_to(parameters[kind][:, None], table[kind].shape) for kind in UNIT_KINDS}
    score = np.concatenate([table[kind].ravel() for kind in UNIT_KINDS])
    size = np.concatenate([sizes[kind].ravel() for kind in UNIT_KINDS])
    order = np.argsort(-score, kind="stable")
    order = order[score[order] > 0]
    order = order[np.cumsum(size[order]) <= budget * size.sum()]
    flat = np.zeros(len(score), bool)
    flat[order] = True
    ends = np.cumsum([table[kind].size for kind in UNIT_KINDS])[:-1]
    return {kind: part.reshape(table[kind].shape) for kind, part in zip(UNIT_KINDS, np.split(flat, ends), strict=True)}
