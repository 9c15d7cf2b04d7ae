"""A merge from a linear program over measured effects, measured at its solution and, where the prediction is off, once more.

1. Solve the program over an effect file (localize/effect_program.py). 2. Measure the losses at the solution. 3. Where a
behaviour's change differs from the predicted one by more than a share of its own expert's gain, or a limit is broken,
integrate the effects along the path from the sum to the solution, whose prediction is exact at the solution, solve again, and
measure that. 4. Keep the better of the two: one within the limits before one that is not, then the one whose worst-off
behaviour keeps more of its expert's gain. No weight is trained.

Linear programs over first-order estimates, re-estimated at their solution, are sequential linear programming (Griffith and
Stewart 1961, https://doi.org/10.1287/mnsc.7.4.379), of which this is one step and no trust region; its use here is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from pydantic import Field

from mechmerge.artifacts import lock
from mechmerge.errors import InputError
from mechmerge.localize.calibration import BehaviorRow, Calibration, Point
from mechmerge.localize.effect_file import EffectFile
from mechmerge.localize.effect_program import Anchored, Solved, check_proven, limits_of, solve_effects
from mechmerge.localize.effects import statistics
from mechmerge.localize.integrals import integrate
from mechmerge.localize.proposal import CUTS, everything, mean_losses, per_nat, references
from mechmerge.localize.rounds import LossSettings, settled_behaviors
from mechmerge.localize.rounds_file import RoundRecord, RoundsFile, RoundsMetadata, SolveRecord
from mechmerge.models.deltas import unit_parameters
from mechmerge.models.references import Model
from mechmerge.progress import SILENT, Progress
from mechmerge.versions import versions

Array = np.ndarray


class SolveSettings(LossSettings):
    """Settings of solving and measuring."""

    budget: float = Field(default=1.0, gt=0, le=1)
    """Share of each expert's head + kv + neuron parameters; a coefficient counts in proportion."""
    limits: dict[str, float] = Field(default_factory=dict)
    """Most predicted rise of a behaviour's loss above the base's, nats per answer token (protected ones: .1 if not told)."""
    agreement: bool = True
    """Whether the worst case is that of both halves of the prompts."""
    tolerance: float = Field(default=0.1, gt=0)
    """Share of the own expert's gain by which a prediction may be off without being measured again."""
    unproven: bool = False
    """Solve although the effects' predictions are not known to come true."""


def settle_solution(
    base: Model,
    experts: Mapping[str, Model],
    rows: Sequence[BehaviorRow],
    effects: EffectFile,
    out: Path,
    settings: SolveSettings | None = None,
    progress: Progress = SILENT,
) -> RoundsFile:
    """Solves over `effects`, measures at the solution, once more where that is needed, and writes a rounds file to `out`.

    Args:
        base: the base model.
        experts: experts by name, as in the effect file.
        rows: the behaviours, as in the effect file.
        effects: effects on the loss.
        out: the rounds file.
        settings: see `SolveSettings`; by default the effect file's tokens, and all prompts' worst case without a limit.
        progress: told of every unit.

    Raises:
        InputError: predictions that are not known to come true, other models or behaviours than those of the effect file, or
            limits that cannot be met.
        PairError: the models cannot be compared.
        LocalizeError: an expert has no verified answer, or does not lower the loss of the behaviour it answers for.
    """
    settings = settings or SolveSettings(tokens=effects.metadata.tokens)
    doubt = check_proven(effects, settings.unproven)
    _check_same(base, experts, rows, effects, settings)
    limits = limits_of(effects, settings.limits)
    first = solve_effects(effects, settings.budget, limits, settings.agreement)
    if doubt is not None:
        progress.note(f"solve: {doubt}")
    calibration = Calibration(base, experts, rows, out.parent / f".{out.stem}.units", settings, progress)
    with lock(out.with_name(f".{out.name}.lock"), f"rounds file {out}"):
        file = _solutions(calibration, effects, settings, limits, first)
        calibration.check()
        file.write(out)
        calibration.units.discard()
    return file


def _check_same(
    base: Model, experts: Mapping[str, Model], rows: Sequence[BehaviorRow], effects: EffectFile, settings: SolveSettings
) -> None:
    metadata = effects.metadata
    if metadata.metric != "loss":
        raise InputError("effect file", expected="effects on the loss", found=f"on the {metadata.metric}")
    if metadata.tokens != settings.tokens:
        raise InputError("effect file", expected=f"losses over {settings.tokens} tokens", found=f"over {metadata.tokens}",
                         fix=f"ask for tokens {metadata.tokens}")  # fmt: skip
    told = [(b.name, b.expert, dict(b.digests)) for b in metadata.behaviors]
    asked = [(row.name, row.expert, {member.name: member.digest for member in row.members}) for row in rows]
    if told != asked:
        raise InputError(
            "effect file", expected=f"the behaviours {', '.join(row.name for row in rows)} in this order",
            found=", ".join(b.name for b in metadata.behaviors) + (" with other prompts" if [t[0] for t in told] ==
                                                                  [a[0] for a in asked] else ""),
        )  # fmt: skip
    given = {"base": base.id.digest} | {name: model.id.digest for name, model in experts.items()}
    known = {"base": metadata.base.digest} | {name: model.digest for name, model in metadata.experts.items()}
    if list(given.items()) != list(known.items()):
        raise InputError(
            "effect file", expected=f"effects of {', '.join(given)}", found=f"of {', '.join(known)} or other weights"
        )


def _solutions(
    calibration: Calibration, effects: EffectFile, settings: SolveSettings, limits: dict[str, float], solved: Solved
) -> RoundsFile:
    """Measures at the first solution, and where its predictions are off, at a second one."""
    base_loss, own = references(calibration)
    counts = per_nat(calibration, base_loss - own)
    names = [row.name for row in calibration.rows]
    start = everything(calibration)
    sum_loss = mean_losses(calibration, start, "the sum")
    found: list[tuple[Solved, Array]] = []
    for number in (1, 2):
        point = Point(solved.rest, solved.units)
        there = mean_losses(calibration, point, f"solution {number}")
        found.append((solved, there))
        off = np.abs(solved.gains - (base_loss - there)) > settings.tolerance * np.abs(base_loss - own)
        owned = np.array([not row.protected for row in calibration.rows])
        broken = [name for r, name in enumerate(names) if name in limits and there[r] - base_loss[r] > limits[name]]
        calibration.progress.note(
            f"solution {number}: worst retained gain predicted {solved.worst:.3f}, measured {_worst(base_loss, own, there):.3f}"
            + (f"; over the limit: {', '.join(broken)}" if broken else "")
        )
        if number == 2 or not (bool((off & owned).any()) or broken):
            break
        parts = [integrate(calibration, start, point, a, b) for a, b in pairwise(CUTS)]
        along = {kind: np.sum([part[kind] for part in parts], axis=0) for kind in parts[0]}
        again = EffectFile(effects.metadata, statistics(calibration, along))
        anchored = Anchored(solved.rest, solved.units, base_loss - there)
        solved = solve_effects(again, settings.budget, limits, settings.agreement, anchored)
    held = [all(there[r] - base_loss[r] <= limits.get(name, np.inf) for r, name in enumerate(names)) for _, there in found]
    best = max(range(len(found)), key=lambda i: (held[i], _worst(base_loss, own, found[i][1]), -i))
    records = tuple(
        RoundRecord(
            proposed=_different(one),
            changed=_different(one),
            predicted={n: float(v) for n, v in zip(names, base_loss - one.gains - sum_loss, strict=True)},
            realised={n: float(v) for n, v in zip(names, there - sum_loss, strict=True)},
            gain=float(counts @ (base_loss - there)),
            accepted=i == best,
        )
        for i, (one, there) in enumerate(found)
    )
    solved, there = found[best]
    metadata = RoundsMetadata(
        base=calibration.base.id,
        method="solve",
        tokens=settings.tokens,
        experts={name: expert.id for name, expert in calibration.experts.items()},
        rest=dict(zip(calibration.experts, solved.rest, strict=True)),
        solve=SolveRecord(
            budget=settings.budget,
            limits=limits,
            agreement=settings.agreement,
            worst_predicted=solved.worst,
            worst_realised=_worst(base_loss, own, there),
            path=effects.metadata.path,
            linearity=effects.metadata.linearity,
        ),
        behaviors=settled_behaviors(calibration, base_loss, own, sum_loss, there),
        rounds=records,
        parameters=unit_parameters(calibration.checkpoint),
        dtype=settings.dtype,
        seed=settings.seed,
        versions=versions(),
    )
    return RoundsFile(metadata, {f"{kind}.coefficient": array for kind, array in solved.units.items()})


def _worst(base_loss: Array, own: Array, there: Array) -> float:
    """The retained gain of the worst-off behaviour that an expert answers for."""
    owned = base_loss > own
    return float(((base_loss - there)[owned] / (base_loss - own)[owned]).min())


def _different(solved: Solved) -> int:
    """Components whose coefficient is not the sum's."""
    return int(sum((array != 1).sum() for array in solved.units.values()))
