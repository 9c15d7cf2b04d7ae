"""The effect matrix: what every component of every expert does to every behaviour.

For a behaviour with value ℓ (the metric `loss`: negative log-likelihood of its expert's own answers, nats per answer token; the
metric `anchor`: −state/gap along its expert's anchor, so that what it loses is recovery) and the straight path θ(t) from the
base to base + Σ_e δ_e, the integrated gradient ∫₀¹ −⟨∂ℓ/∂θ_c at θ(t), δ_{e,c}⟩ dt is component c's share of the drop of ℓ;
over all experts and components the shares add up to the whole drop (completeness: Sundararajan et al. 2017,
https://arxiv.org/abs/1703.01365). Using it across experts to decide a merge is ours.

Nodes are adaptive: each interval of the path has two Gauss-Legendre nodes, the value at its ends is known, so the error of
each interval is exact; the worst one is halved until the completeness error is small enough or the nodes run out.

With the origin `sum` the path is the short one from the sum to what is left of it without all that harms on both halves
(localize/proposal.py): effects where merges are decided, at five points.

Cost, in forward-equivalents (tokens through all layers, over those of the measured texts): at a node a behaviour takes one
forward pass, one backward pass (to activations alone: no weight has a gradient), and one product with the deltas of each of the
E experts: 2 + E, which is 3 for one expert and less than 3 a behaviour, expert and node for several. On an anchor each is the
anchor's share of the layers. Not counted in it: one forward pass at each end of an interval (half as many as nodes, and one)
and at each expert; once, the experts' answers, or the anchors; and where the model is streamed, a second forward pass a node.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from pydantic import Field

from mechmerge.artifacts import lock
from mechmerge.localize.anchor_calibration import AnchorCalibration, AnchorCalibrationSettings, members_of
from mechmerge.localize.calibration import BASE, BehaviorRow, Calibration, rows_of
from mechmerge.localize.effect_file import EFFECT_KINDS, PATHS, BehaviorEffect, EffectFile, EffectMetadata, Linearity, Origin
from mechmerge.localize.integrals import gauss_legendre, integrate
from mechmerge.localize.linearity import check_linearity
from mechmerge.localize.plan import Plan
from mechmerge.localize.plan_steps import plan_anchor_effects, plan_effects
from mechmerge.localize.proposal import NODES, drop, everything, mean_losses, per_nat, propose, references, standard_errors
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.models.deltas import unit_parameters
from mechmerge.models.references import Model
from mechmerge.progress import SILENT, Progress
from mechmerge.versions import versions

Array = np.ndarray
COMPLETENESS_FLOOR = 0.05
"""In the metric's unit: smaller changes are not divided by."""
FIRST_INTERVALS = (0.0, 0.0625, 0.25, 1.0)
"""Most of a loss falls near the base, so the path starts out divided there."""


class EffectSettings(AnchorCalibrationSettings):
    """Settings of the effects stage."""

    tolerance: float = Field(default=0.05, gt=0)
    """Completeness error at which no more nodes are added."""
    max_nodes: int = Field(default=10, ge=6)
    """Most points of the path that are kept (from the base; a short path has four). Halving an interval gives up its two points
    for four new ones, so that gradients are taken at up to 2 × max_nodes − 6.
    """
    origin: Origin = "base"
    """Where the path starts: at the base, or at the sum, where merges are decided."""
    check: int = Field(default=0, ge=0)
    """Masks on which predictions are held against measured changes around the sum; 0: none."""


def measure_effects(
    base: Model,
    experts: Mapping[str, Model],
    rows: Sequence[BehaviorRow],
    out: Path,
    settings: EffectSettings | None = None,
    progress: Progress = SILENT,
) -> EffectFile:
    """Measures the effect matrix and writes it to `out`.

    Args:
        base: the base model.
        experts: experts by name, in the order in which a recipe sums them.
        rows: the behaviours.
        out: the effect file.
        settings: see `EffectSettings`.
        progress: told of every unit.

    Raises:
        InputError: no behaviours, or one of an expert that is not given.
        PairError: the models cannot be compared.
        LocalizeError: on the loss, an expert has no answer that passes its behaviour's verifier; on the anchor, an anchor is
            not valid and such are refused, or has no gap; from the sum or with a check, an expert does nothing for its own
            behaviour.
    """
    settings = settings or EffectSettings()
    kind = AnchorCalibration if settings.metric == "anchor" else Calibration
    calibration = kind(base, experts, rows, out.parent / f".{out.stem}.units", settings, progress)
    with lock(out.with_name(f".{out.name}.lock"), f"effect file {out}"):
        along = _along_the_path if settings.origin == "base" else _from_the_sum
        file = along(calibration, settings)
        calibration.check()
        file.write(out)
        calibration.discard()
    return file


def plan_matrix(base: Checkpoint, experts: int, rows: Sequence[BehaviorRow], settings: EffectSettings) -> Plan:
    """What measuring the matrix will take, with rates measured (half a second)."""
    if settings.metric == "loss":
        return plan_effects(base, experts, rows_of(rows), settings, timed=True)
    return plan_anchor_effects(base, experts, list(members_of(rows, settings.prompts).values()), settings, timed=True)


def _along_the_path(calibration: Calibration, settings: EffectSettings) -> EffectFile:
    """Integrates from the base to the sum."""
    weights = calibration.weights()
    zero, whole_sum = calibration.point(0.0), calibration.point(1.0)

    def loss(t: float) -> Array:
        found: Array = weights @ calibration.losses(zero.between(whole_sum, t), f"{t:.3f} of the path")
        return found

    ends = {t: loss(t) for t in FIRST_INTERVALS}  # each [R]
    intervals = {(a, b): integrate(calibration, zero, whole_sum, a, b) for a, b in pairwise(FIRST_INTERVALS)}
    floor = np.maximum(np.abs(ends[0.0] - ends[1.0]), COMPLETENESS_FLOOR)
    while True:
        errors = {(a, b): _total(values, weights) - (ends[a] - ends[b]) for (a, b), values in intervals.items()}
        error = np.abs(sum(errors.values())) / floor
        if error.max() <= settings.tolerance or 2 * len(intervals) + 2 > settings.max_nodes:
            break
        a, b = max(errors, key=lambda interval: float((np.abs(errors[interval]) / floor).max()))
        middle = (a + b) / 2
        ends[middle] = loss(middle)
        del intervals[(a, b)]
        intervals |= {half: integrate(calibration, zero, whole_sum, *half) for half in ((a, middle), (middle, b))}
    nodes = sorted(t for interval in intervals for t in gauss_legendre(*interval))
    summed = {kind: np.sum([values[kind] for values in intervals.values()], axis=0) for kind in EFFECT_KINDS}
    return _file(calibration, settings, summed, nodes, describe(calibration, ends[0.0], ends[1.0], error))


def _from_the_sum(calibration: Calibration, settings: EffectSettings) -> EffectFile:
    """Integrates from the sum to what a round would leave of it."""
    start = everything(calibration)
    base, own = references(calibration)
    at = mean_losses(calibration, start, "the sum")
    proposal = propose(calibration, start, per_nat(calibration, base - own), "the sum", certainty=0.0)
    there = mean_losses(calibration, proposal.point, "the proposal")
    change = {kind: array - 1 for kind, array in (proposal.point.units or {}).items()}
    error = np.abs(drop(calibration, proposal.along, change) - (at - there))
    error /= np.maximum(np.abs(at - there), COMPLETENESS_FLOOR)
    return _file(calibration, settings, proposal.along, NODES, describe(calibration, at, there, error, base))


def _file(
    calibration: Calibration,
    settings: EffectSettings,
    effects: Mapping[str, Array],
    nodes: Sequence[float],
    behaviors: tuple[BehaviorEffect, ...],
) -> EffectFile:
    """The file of the effects of every example, checked where that is asked for."""
    linearity: Linearity | None = None
    if settings.check:
        gains = np.array([b.own_gain for b in behaviors])
        linearity = check_linearity(calibration, effects, per_nat(calibration, gains), settings.check)
    metadata = EffectMetadata(
        metric=calibration.metric,
        tokens=settings.tokens,
        base=calibration.base.id,
        experts={name: expert.id for name, expert in calibration.experts.items()},
        behaviors=behaviors,
        path=PATHS[settings.origin],
        nodes=tuple(nodes),
        parameters=unit_parameters(calibration.checkpoint),
        dtype=settings.dtype,
        linearity=linearity,
        seed=settings.seed,
        versions=versions(),
    )
    return EffectFile(metadata, statistics(calibration, effects))


def describe(
    calibration: Calibration, start: Array, end: Array, error: Array, base: Array | None = None
) -> tuple[BehaviorEffect, ...]:
    """The records of the behaviours, with their values [R] at the ends of a path, at their own experts, and at the base where
    the path does not start there.
    """
    weights, rows = calibration.weights(), calibration.rows
    owners = {row.expert for row in rows if not row.protected}
    own = {name: weights @ calibration.losses(calibration.point(1.0, name), name) for name in sorted(owners)}
    own[BASE] = start if base is None else base
    return tuple(
        BehaviorEffect(
            name=row.name,
            expert=row.expert,
            weight=row.weight,
            members=tuple(member.name for member in row.members),
            digests={member.name: member.digest for member in row.members},
            prompts=calibration.asked[r],
            answers=sum(example.row == r for example in calibration.examples),
            loss_start=float(start[r]),
            loss_end=float(end[r]),
            loss_expert=float(own[row.expert][r]),
            loss_base=None if base is None else float(base[r]),
            completeness_error=float(error[r]),
            anchors=calibration.anchors_of(r),
        )
        for r, row in enumerate(rows)
    )


def _total(values: Mapping[str, Array], weights: Array) -> Array:
    """Sum of the effects over experts and components, [R]."""
    per_example = sum(array.sum((0, 2, 3), dtype=np.float64) for array in values.values())
    total: Array = weights @ per_example
    return total


def statistics(calibration: Calibration, summed: Mapping[str, Array]) -> dict[str, Array]:
    """Means, standard errors over topics and the means of both halves from effects of examples, [E, n, layers, units] each."""
    weights, halves = calibration.weights(), [calibration.weights(half) for half in (0, 1)]
    arrays: dict[str, Array] = {}
    for kind, values in summed.items():
        if kind == "lm_head" and calibration.checkpoint.arch.tied:
            continue
        arrays[f"{kind}.effect"] = np.einsum("rn,enlu->relu", weights, values).astype(np.float32)
        arrays[f"{kind}.stderr"] = standard_errors(calibration, values).astype(np.float32)
        arrays[f"{kind}.half"] = np.stack([np.einsum("rn,enlu->relu", half, values) for half in halves]).astype(np.float32)
    return arrays
