"""What a merge would change next: components whose effect where it stands asks for it, and their effects on the way there.

At a merge, a component that is in and harms, or is out and would help, on both halves of the calibration prompts and by some
standard errors, is proposed to be turned over; effects are then integrated along the short path from the merge to the proposal.
Rounds (localize/rounds.py) decide by them, effects from the sum (localize/effects.py) are these, and linearity
(localize/linearity.py) is theirs (ours).

Many components harm a little, and a merge that leaves all of them out is not what their effects add up to: what is predicted
of a few is. So rounds change only what is far from nothing (`certainty`; benchmarks/log.md has what that is worth).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mechmerge.errors import LocalizeError
from mechmerge.localize.anchor import standard_error
from mechmerge.localize.calibration import Calibration, Point
from mechmerge.localize.integrals import gauss_legendre, integrate
from mechmerge.models.components import UNIT_KINDS

Array = np.ndarray
CUTS = (0.0, 0.5, 1.0)
"""Of a short path; two Gauss-Legendre nodes between each."""
NODES = tuple(t for piece in pairwise(CUTS) for t in gauss_legendre(*piece))
"""Points of a short path at which gradients are taken."""
Units = dict[str, Array]
"""head, kv, neuron → float32 [experts, layers, units]."""


class Proposal(NamedTuple):
    """What is proposed at a merge."""

    wanted: dict[str, Array]
    """kind → bool [E, layers, units]: what would be turned over."""
    point: Point
    """The merge with it turned over."""
    along: dict[str, Array]
    """Effects of every example along the path from the merge to `point`: kind → float32 [E, n, layers, units]."""


def everything(calibration: Calibration) -> Point:
    """The sum of all experts, with a coefficient for every unit."""
    arch, experts = calibration.checkpoint.arch, len(calibration.experts)
    ones: Units = {kind: np.ones((experts, arch.layers, arch.units(kind)), np.float32) for kind in UNIT_KINDS}
    return Point((1.0,) * experts, ones)


def mean_losses(calibration: Calibration, point: Point, label: str) -> Array:
    """Each behaviour's loss at a point, float64 [R]."""
    found: Array = calibration.weights() @ calibration.losses(point, label)
    return found


def references(calibration: Calibration) -> tuple[Array, Array]:
    """Each behaviour's value at the base and at its own expert (the base again where it is protected), float64 [R] each."""
    base_loss = mean_losses(calibration, calibration.point(0.0), "the base")
    own = base_loss.copy()
    for r, row in enumerate(calibration.rows):
        if row.protected:
            continue
        own[r] = mean_losses(calibration, calibration.point(1.0, row.expert), row.expert)[r]
    return base_loss, own


def per_nat(calibration: Calibration, gains: Array) -> Array:
    """What one unit of each behaviour's value counts, [R]: its weight, divided by its own expert's gain where it has an expert.

    A protected behaviour has no expert and no gain: a nat of damage to it counts as much as `weight` whole own gains do.

    Raises:
        LocalizeError: an expert does nothing for the behaviour it answers for.
    """
    rows = calibration.rows
    does, unit = {
        "loss": ("lower its loss", "nats"),
        "anchor": ("move its state along the anchor", "of recovery"),
    }[calibration.metric]
    for row, gain in zip(rows, gains, strict=True):
        if not row.protected and not gain > 0:
            raise LocalizeError(
                f"behaviour {row.name}", expected=f"its expert {row.expert} to {does}", found=f"a gain of {gain:.3f} {unit}"
            )
    return np.array([row.weight / (1.0 if row.protected else gain) for row, gain in zip(rows, gains, strict=True)])


def propose(calibration: Calibration, current: Point, counts: Array, label: str, certainty: float) -> Proposal:
    """What the gradients at a merge ask for, and the effects on the way there.

    Args:
        calibration: the models and behaviours.
        current: the merge, with coefficients 0 or 1 of every unit.
        counts: what a unit of each behaviour's value counts, [R].
        label: what the merge is called.
        certainty: see `agreed`.
    """
    units = dict(current.units or {})
    wanted = agreed(calibration, calibration.gradients(current, label), counts, switch(units), certainty)
    point = Point(current.rest, turned_over(units, wanted))
    parts = [integrate(calibration, current, point, a, b) for a, b in pairwise(CUTS)]
    return Proposal(wanted, point, {kind: np.sum([part[kind] for part in parts], axis=0) for kind in parts[0]})


def switch(units: Mapping[str, Array]) -> Units:
    """The change that would turn each component over: −1 where it is in, +1 where it is out."""
    return {kind: (1 - 2 * array).astype(np.float32) for kind, array in units.items()}


def turned_over(units: Mapping[str, Array], which: Mapping[str, Array]) -> Units:
    """Coefficients with the given components turned over."""
    return {kind: np.where(which[kind], 1 - array, array).astype(np.float32) for kind, array in units.items()}


def agreed(
    calibration: Calibration,
    values: Mapping[str, Array],
    counts: Array,
    direction: Mapping[str, Array],
    certainty: float,
) -> dict[str, Array]:
    """Components for which the change in `direction` (0: none) surely helps: kind → bool [E, layers, units].

    Args:
        calibration: whose halves are meant.
        values: effects of every example, [E, n, layers, units] each; positive lowers the loss as the coefficient rises.
        counts: what a unit of each behaviour's value counts, [R].
        direction: change of each coefficient.
        certainty: standard errors (over topics, behaviours taken for independent) by which it must help on all prompts, beside
            helping on each half; 0: the halves alone decide.
    """
    whole, *halves = (counts @ calibration.weights(half) for half in (None, 0, 1))
    found: dict[str, Array] = {}
    for kind in UNIT_KINDS:
        helps = [np.einsum("n,enlu->elu", half, values[kind]) * direction[kind] > 0 for half in halves]
        found[kind] = helps[0] & helps[1]
        if certainty:
            error = np.sqrt(np.tensordot(counts**2, standard_errors(calibration, values[kind]) ** 2, 1))
            found[kind] &= np.einsum("n,enlu->elu", whole, values[kind]) * direction[kind] > certainty * error
    return found


def standard_errors(calibration: Calibration, values: Array) -> Array:
    """Standard errors over topics of each behaviour's mean effect, [R, E, layers, units], from those of every example,
    [E, n, layers, units]. A group's members are not drawn: how they differ from one another is no error, also where some
    have more answers than others.
    """
    examples, errors = calibration.examples, []
    told = [example.topic or f"{i}" for i, example in enumerate(examples)]
    members = np.array([example.member for example in examples])
    for row in calibration.weights():
        own = np.flatnonzero(row)
        apart = values[:, own].swapaxes(0, 1).astype(np.float64)
        for member in np.unique(members[own]):
            apart[members[own] == member] -= apart[members[own] == member].mean(0)
        errors.append(standard_error(apart, [told[i] for i in own], row[own]))
    return np.stack(errors)


def drop(
    calibration: Calibration,
    values: Mapping[str, Array],
    change: Mapping[str, Array],
    half: int | None = None,
    rest: Array | None = None,
) -> Array:
    """Predicted drop of each behaviour's value, [R].

    Args:
        calibration: whose prompts are meant.
        values: effects of every example, [E, n, layers, units] each.
        change: of the coefficients of heads, KV groups and neurons, [E, layers, units] each.
        half: one half of the prompts, instead of all.
        rest: change of each expert's coefficient of everything else, [E].
    """
    parts = [np.einsum("enlu,elu->n", values[kind], change[kind], dtype=np.float64) for kind in UNIT_KINDS]
    if rest is not None:
        others = [kind for kind in values if kind not in UNIT_KINDS]
        parts += [np.einsum("enlu,e->n", values[kind], rest, dtype=np.float64) for kind in others]
    found: Array = calibration.weights(half) @ np.sum(parts, axis=0)
    return found
