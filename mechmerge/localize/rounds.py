"""Settling a merge in rounds: effects measured where the decision is taken, not along a path that leads elsewhere.

Effects along the path from the base to the sum (localize/effects.py) say who made the sum what it is. What happens when a
component is taken out of the sum is another question, and where a loss saturates the first answers the second badly. So
(ours):

1. start from the sum of all experts; 2. take gradients at the current merge; a component whose effect, over all
behaviours and each in units of its own expert's gain, asks
   for a change (out when it is in and harms; in when it is out and would help) on both halves of the calibration prompts
   is proposed;
3. integrate the effects along the short path from the current merge to the proposal, and change only what still agrees on
both halves; 4. measure the losses there; go on while the weighted gain rises, four rounds at most; a round that does not
raise it is taken back.

No weight is trained; the answers are the experts' own to calibration prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from mechmerge.artifacts import lock
from mechmerge.errors import LocalizeError
from mechmerge.localize.calibration import BehaviorRow, Calibration, CalibrationSettings, Point
from mechmerge.localize.effects import integrate
from mechmerge.localize.rounds_file import RoundRecord, RoundsFile, RoundsMetadata, SettledBehavior
from mechmerge.localize.settings import loss_of_rounds
from mechmerge.models.components import UNIT_KINDS
from mechmerge.models.deltas import unit_parameters
from mechmerge.models.references import Model
from mechmerge.progress import SILENT, Progress
from mechmerge.versions import versions

Array = np.ndarray
INTERVALS = ((0.0, 0.5), (0.5, 1.0))
"""Of the path to a proposal; two Gauss-Legendre nodes each."""
Units = dict[str, Array]
"""head, kv, neuron → float32 [experts, layers, units]."""


class RoundSettings(CalibrationSettings):
    """Settings of the rounds stage."""

    metric: Annotated[Literal["loss"], BeforeValidator(loss_of_rounds)] = "loss"
    """Rounds are measured on the loss alone, which covers all components."""
    max_rounds: int = Field(default=4, ge=1, le=4)
    """Most rounds."""


def settle(
    base: Model,
    experts: Mapping[str, Model],
    rows: Sequence[BehaviorRow],
    out: Path,
    settings: RoundSettings | None = None,
    progress: Progress = SILENT,
) -> RoundsFile:
    """Settles the coefficients of a merge in rounds and writes them to `out`.

    Args:
        base: the base model.
        experts: experts by name, in the order in which a recipe sums them.
        rows: the behaviours, with their weights.
        out: the rounds file.
        settings: see `RoundSettings`.
        progress: told of every unit.

    Raises:
        InputError: no behaviours, or one of an expert that is not given.
        PairError: the models cannot be compared.
        LocalizeError: an expert has no verified answer, or does not lower the loss of the behaviour it answers for.
    """
    settings = settings or RoundSettings()
    calibration = Calibration(base, experts, rows, out.parent / f".{out.stem}.units", settings, progress)
    with lock(out.with_name(f".{out.name}.lock"), f"rounds file {out}"):
        file = _rounds(calibration, settings)
        calibration.check()
        file.write(out)
        calibration.units.discard()
    return file


def _rounds(calibration: Calibration, settings: RoundSettings) -> RoundsFile:
    rows, weights = calibration.rows, calibration.weights()
    names = [row.name for row in rows]

    def loss(point: Point, label: str) -> Array:
        found: Array = weights @ calibration.losses(point, label)
        return found

    base_loss = loss(calibration.point(0.0), "the base")
    own = np.array([loss(calibration.point(1.0, row.expert), row.expert)[r] for r, row in enumerate(rows)])
    for row, gain in zip(rows, base_loss - own, strict=True):
        if gain <= 0:
            raise LocalizeError(
                f"behaviour {row.name}",
                expected=f"its expert {row.expert} to lower its loss",
                found=f"a gain of {gain:.3f} nats",
            )
    per_nat = np.array([row.weight for row in rows]) / (base_loss - own)

    arch = calibration.checkpoint.arch
    shape = {kind: (len(calibration.experts), arch.layers, arch.units(kind)) for kind in UNIT_KINDS}
    current = Point((1.0,) * len(calibration.experts), {kind: np.ones(size, np.float32) for kind, size in shape.items()})
    at = sum_loss = loss(current, "the sum")
    gain = float(per_nat @ (base_loss - at))
    records: list[RoundRecord] = []
    for number in range(1, settings.max_rounds + 1):
        units = dict(current.units or {})
        wanted = _agreed(calibration, calibration.gradients(current, f"the merge, round {number}"), per_nat, _switch(units))
        proposal = Point(current.rest, _changed(units, wanted))
        parts = [integrate(calibration, current, proposal, a, b) for a, b in INTERVALS]
        along: Units = {kind: np.sum([part[kind] for part in parts], axis=0) for kind in UNIT_KINDS}
        direction: Units = {kind: _switch(units)[kind] * wanted[kind] for kind in UNIT_KINDS}
        kept = _agreed(calibration, along, per_nat, direction)
        proposed, changed = (int(sum(mask.sum() for mask in masks.values())) for masks in (wanted, kept))
        if changed == 0:
            break
        following = Point(current.rest, _changed(units, kept))
        there = loss(following, f"the merge after round {number}")
        new_gain = float(per_nat @ (base_loss - there))
        change: Units = {kind: direction[kind] * kept[kind] for kind in UNIT_KINDS}
        predicted = _total(calibration, along, change)
        accepted = new_gain > gain
        records.append(
            RoundRecord(
                proposed=proposed,
                changed=changed,
                predicted={name: float(-value) for name, value in zip(names, predicted, strict=True)},
                realised={name: float(value) for name, value in zip(names, there - at, strict=True)},
                gain=new_gain,
                accepted=accepted,
            )
        )
        calibration.progress.note(
            f"round {number}: {changed} of {proposed} components changed, weighted gain {gain:.3f} → {new_gain:.3f}"
            + ("" if accepted else ", taken back")
        )
        if not accepted:
            break
        current, at, gain = following, there, new_gain
    metadata = RoundsMetadata(
        base=calibration.base.id,
        experts={name: expert.id for name, expert in calibration.experts.items()},
        behaviors=tuple(
            SettledBehavior(
                name=row.name,
                expert=row.expert,
                weight=row.weight,
                members=tuple(member.name for member in row.members),
                digests={member.name: member.digest for member in row.members},
                answers=sum(example.row == r for example in calibration.examples),
                loss_base=float(base_loss[r]),
                loss_expert=float(own[r]),
                loss_sum=float(sum_loss[r]),
                loss_merge=float(at[r]),
            )
            for r, row in enumerate(rows)
        ),
        rounds=tuple(records),
        parameters=unit_parameters(calibration.checkpoint),
        dtype=settings.dtype,
        seed=settings.seed,
        versions=versions(),
    )
    return RoundsFile(metadata, {f"{kind}.coefficient": array for kind, array in (current.units or {}).items()})


def _switch(units: Units) -> Units:
    """The change that would turn each component over: −1 where it is in, +1 where it is out."""
    return {kind: (1 - 2 * array).astype(np.float32) for kind, array in units.items()}


def _changed(units: Units, which: Mapping[str, Array]) -> Units:
    """Coefficients with the given components turned over."""
    return {kind: np.where(which[kind], 1 - array, array).astype(np.float32) for kind, array in units.items()}


def _agreed(calibration: Calibration, values: Mapping[str, Array], per_nat: Array, direction: Units) -> dict[str, Array]:
    """Components for which the change in `direction` (0: none) helps on both halves: kind → bool [E, layers, units].

    Args:
        calibration: whose halves are meant.
        values: effects of every example, [E, n, layers, units] each; positive lowers the loss as the coefficient rises.
        per_nat: what a nat of each behaviour counts, [R].
        direction: change of each coefficient.
    """
    halves = [per_nat @ calibration.weights(half) for half in (0, 1)]
    agreed: dict[str, Array] = {}
    for kind in UNIT_KINDS:
        helps = [np.einsum("n,enlu->elu", half, values[kind]) * direction[kind] > 0 for half in halves]
        agreed[kind] = helps[0] & helps[1]
    return agreed


def _total(calibration: Calibration, values: Mapping[str, Array], change: Units) -> Array:
    """Predicted drop of each behaviour's loss, [R], for a change of coefficients."""
    per_example = sum(np.einsum("enlu,elu->n", values[kind], change[kind], dtype=np.float64) for kind in UNIT_KINDS)
    total: Array = calibration.weights() @ per_example
    return total
