"""Settling a merge in rounds: effects measured where the decision is taken, not along a path that leads elsewhere.

Effects along the path from the base to the sum (localize/effects.py) say who made the sum what it is. What happens when a
component is taken out of the sum is another question, and where a loss saturates the first answers the second badly. So
(ours):

1. start from the sum of all experts;
2. take gradients at the current merge; a component whose effect, over all behaviours and each in units of its own expert's
   gain, asks for a change (out when it is in and harms; in when it is out and would help) on both halves of the calibration
   prompts, and by some standard errors on all of them, is proposed;
3. integrate the effects along the short path from the current merge to the proposal, and change only what still does;
4. measure the losses there; go on while the weighted gain rises, four rounds at most; a round that does not raise it is taken
   back.

No weight is trained; the answers are the experts' own to calibration prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BeforeValidator, Field

from mechmerge.artifacts import lock
from mechmerge.localize.calibration import BehaviorRow, Calibration, CalibrationSettings, Point
from mechmerge.localize.effect_file import Tokens
from mechmerge.localize.proposal import (
    Units,
    agreed,
    drop,
    everything,
    mean_losses,
    per_nat,
    propose,
    references,
    switch,
    turned_over,
)
from mechmerge.localize.rounds_file import CERTAINTY, MOST_CERTAIN, RoundRecord, RoundsFile, RoundsMetadata, SettledBehavior
from mechmerge.localize.settings import loss_of_rounds
from mechmerge.models.deltas import unit_parameters
from mechmerge.models.references import Model
from mechmerge.progress import SILENT, Progress
from mechmerge.versions import versions

Array = np.ndarray


class LossSettings(CalibrationSettings):
    """Settings of what is measured on the loss alone."""

    metric: Annotated[Literal["loss"], BeforeValidator(loss_of_rounds)] = "loss"
    """Rounds are measured on the loss alone, which covers all components."""


class RoundSettings(LossSettings):
    """Settings of the rounds stage."""

    tokens: Tokens = "contested"
    """Which tokens of an answer its loss is the mean over: the mean over all hides the few at which an answer is won or lost
    (benchmarks/log.md, 2026-11-28).
    """
    max_rounds: int = Field(default=4, ge=1, le=4)
    """Most rounds."""
    certainty: float = Field(default=CERTAINTY, ge=0, le=MOST_CERTAIN, allow_inf_nan=False)
    """Standard errors (over topics) by which turning a component over must help; 0: that it helps on both halves is enough."""


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
    names = [row.name for row in calibration.rows]
    base_loss, own = references(calibration)
    counts = per_nat(calibration, base_loss - own)
    current = everything(calibration)
    at = sum_loss = mean_losses(calibration, current, "the sum")
    gain = float(counts @ (base_loss - at))
    records: list[RoundRecord] = []
    for number in range(1, settings.max_rounds + 1):
        units = dict(current.units or {})
        proposal = propose(calibration, current, counts, f"the merge, round {number}", settings.certainty)
        direction: Units = {kind: switch(units)[kind] * wanted for kind, wanted in proposal.wanted.items()}
        kept = agreed(calibration, proposal.along, counts, direction, settings.certainty)
        proposed, changed = (int(sum(mask.sum() for mask in masks.values())) for masks in (proposal.wanted, kept))
        if changed == 0:
            sure = f", by {settings.certainty:g} standard errors" if settings.certainty else ""
            calibration.progress.note(
                f"round {number}: no change helps on both halves of the prompts{sure}: the merge stays as it is"
            )
            break
        following = Point(current.rest, turned_over(units, kept))
        there = mean_losses(calibration, following, f"the merge after round {number}")
        new_gain = float(counts @ (base_loss - there))
        predicted = drop(calibration, proposal.along, {kind: direction[kind] * kept[kind] for kind in kept})
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
        tokens=settings.tokens,
        certainty=settings.certainty,
        base=calibration.base.id,
        experts={name: expert.id for name, expert in calibration.experts.items()},
        behaviors=settled_behaviors(calibration, base_loss, own, sum_loss, at),
        rounds=tuple(records),
        parameters=unit_parameters(calibration.checkpoint),
        dtype=settings.dtype,
        seed=settings.seed,
        versions=versions(),
    )
    return RoundsFile(metadata, {f"{kind}.coefficient": array for kind, array in (current.units or {}).items()})


def settled_behaviors(
    calibration: Calibration, base_loss: Array, own: Array, sum_loss: Array, at: Array
) -> tuple[SettledBehavior, ...]:
    """The behaviours with their losses [R] at the base, their own experts, the sum and the settled merge."""
    return tuple(
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
        for r, row in enumerate(calibration.rows)
    )
