"""Do predicted changes come true? Effects are linear predictions, losses are not linear: this measures how far that matters.

Masks leave components out of the sum: those that are predicted to harm most, under several weightings, of several kinds and
experts, in several shares; and the same shuffled within every layer, kind and expert. A few more lower the coefficient of all
that has no component of its own (norms, embeddings, rest), as solutions may. For each the predicted change of every behaviour,
Σ effect × change of coefficient, is held against the measured one. Slope and R² are those of the least-squares line of measured
on predicted changes over all masks (ours).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mechmerge.localize.calibration import Calibration, Point
from mechmerge.localize.effect_file import LEAST_MASKS, Line, Linearity
from mechmerge.localize.proposal import Units, drop, everything
from mechmerge.models.components import UNIT_KINDS

Array = np.ndarray
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
"""Shares of the components inside that are left out, and of their coefficient by which the rest is lowered."""


def weightings(behaviors: int) -> list[tuple[float, ...]]:
    """Weights of the behaviours against one another: all alike, each alone, and the first twice."""
    alone = [tuple(float(r == b) for r in range(behaviors)) for b in range(behaviors)] if behaviors > 1 else []
    return [(1.0,) * behaviors, *alone, *([(2.0,) + (1.0,) * (behaviors - 1)] if behaviors > 1 else [])]


def chosen(
    calibration: Calibration, values: Mapping[str, Array], counts: Array, inside: Mapping[str, Array]
) -> Iterator[tuple[str, Units]]:
    """Masks that leave out, of what is inside, the share that is predicted to harm most, each with its name.

    Args:
        calibration: the models and behaviours.
        values: effects of every example, [E, n, layers, units] each.
        counts: what a unit of each behaviour's value counts, [R].
        inside: coefficients that the masks start from, [E, layers, units] each.
    """
    names = tuple(calibration.experts)
    told = weightings(len(counts))
    places = ("all", *UNIT_KINDS, *(names if len(names) > 1 else ()))
    for weight, where, share in itertools.product(told, places, SHARES):
        if where != "all" and weight != told[0]:
            continue
        row = (np.array(weight) * counts) @ calibration.weights()
        mask: Units = {}
        for kind in UNIT_KINDS:
            score = np.einsum("n,enlu->elu", row, values[kind])
            score = np.where(inside[kind] > 0, score, np.inf)
            if where in UNIT_KINDS and kind != where:
                score[:] = np.inf
            for e, name in enumerate(names):
                if where in names and where != name:
                    score[e] = np.inf
            count = math.ceil(share * np.isfinite(score).sum())
            worst = np.zeros(score.size, bool)
            worst[np.argsort(score, axis=None, kind="stable")[:count]] = True
            mask[kind] = (inside[kind] * ~worst.reshape(score.shape)).astype(np.float32)
        yield f"{':'.join(f'{w:g}' for w in weight)} {where} {share:g}", mask


def shuffled(mask: Mapping[str, Array], inside: Mapping[str, Array], seed: int) -> Units:
    """As many components left out of each layer, kind and expert, drawn from what is inside."""
    draw = np.random.default_rng(seed)
    result = {kind: array.copy() for kind, array in mask.items()}
    for kind, array in result.items():
        for e, layer in np.ndindex(array.shape[:2]):
            held = np.flatnonzero(inside[kind][e, layer])
            array[e, layer, held] = draw.permutation(array[e, layer, held])
    return result


def masks_of(
    calibration: Calibration, values: Mapping[str, Array], counts: Array, here: Point, number: int = LEAST_MASKS
) -> list[Point]:
    """`number` points around a merge: chosen masks, each followed by its shuffles, evenly thinned, and points at which the rest
    of all experts is lowered.

    Args:
        calibration: the models and behaviours.
        values: effects of every example, [E, n, layers, units] each.
        counts: what a unit of each behaviour's value counts, [R].
        here: the merge, with a coefficient of every unit.
        number: masks, at least four.
    """
    inside = dict(here.units or {})
    made = [mask for _, mask in chosen(calibration, values, counts, inside)]
    lowered = [Point(tuple((1 - share) * c for c in here.rest), inside) for share in SHARES]
    if number < LEAST_MASKS:
        few = min(max((number - 1) // 2, 1), len(made))
        made = [made[i] for i in np.linspace(0, len(made) - 1, few).round().astype(int)]
        lowered = lowered[-1:] if number % 2 else lowered[-2:]
    draws = max(1, math.ceil((number - len(lowered)) / len(made)) - 1)
    units = [
        each for i, mask in enumerate(made) for each in (mask, *(shuffled(mask, inside, draws * i + d) for d in range(draws)))
    ]
    kept = np.linspace(0, len(units) - 1, number - len(lowered)).round().astype(int)
    return [*(Point(here.rest, units[i]) for i in kept), *lowered]


def predicted_change(
    calibration: Calibration, values: Mapping[str, Array], here: Point, there: Point, half: int | None = None
) -> Array:
    """Predicted change of each behaviour's value, [R], between two points (over one half of the prompts, if told)."""
    at, to = here.units or {}, there.units or {}
    change: Units = {kind: to[kind] - at[kind] for kind in UNIT_KINDS}
    return -drop(calibration, values, change, half, np.subtract(there.rest, here.rest))


def line(predicted: Sequence[float] | Array, measured: Sequence[float] | Array) -> tuple[float, float]:
    """Slope and R² of the least-squares line of `measured` on `predicted`; 0 and 0 where either does not vary."""
    x, y = np.asarray(predicted, np.float64), np.asarray(measured, np.float64)
    if x.std() == 0 or y.std() == 0:
        return 0.0, 0.0
    return float(np.cov(x, y)[0, 1] / x.var(ddof=1)), float(np.corrcoef(x, y)[0, 1] ** 2)


def check_linearity(calibration: Calibration, values: Mapping[str, Array], counts: Array, masks: int) -> Linearity:
    """Holds predicted changes against measured ones around the sum.

    Args:
        calibration: the models and behaviours.
        values: effects of every example, [E, n, layers, units] each.
        counts: what a unit of each behaviour's value counts, [R].
        masks: masks to be measured, shuffled ones among them (four at least).
    """
    start, weights = everything(calibration), calibration.weights()
    at = calibration.losses(start, "the sum")
    made = masks_of(calibration, values, counts, start, masks)
    predicted, measured = np.zeros((2, len(made), len(calibration.rows)))
    for number, there in enumerate(made):
        measured[number] = weights @ (calibration.losses(there, f"mask {number + 1} of {len(made)}") - at)
        predicted[number] = predicted_change(calibration, values, start, there)
    lines = {}
    for r, row in enumerate(calibration.rows):
        slope, r2 = line(predicted[:, r], measured[:, r])
        lines[row.name] = Line(slope=slope, r2=r2, largest=float(np.abs(measured[:, r]).max()))
    return Linearity(masks=len(made), lines=lines)
