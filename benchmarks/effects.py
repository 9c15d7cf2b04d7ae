"""Do predicted changes of loss come true? `python -m benchmarks.effects [--quick] [--save] [--folder DIR]`.

On the demo's pair, for more than a hundred masks (chosen by predicted harm, and the same shuffled within every layer, kind and
expert), the predicted change of each behaviour's loss is held against the measured one, from two starting points:

- *the sum*, and *the merge* that one round settles (localize/rounds.py);
- predicted by the *path* effects (base → sum, localize/effects.py), and by *local* ones: integrated over the short path from
  the starting point to what a round would propose there.

A prediction is linear: Σ effect × change of coefficient. Slope and R² are those of the least-squares line of measured on
predicted changes over all masks. `apart` predicts from one half of the calibration prompts and measures on the other.
Goals (of the local effects, each behaviour, both starting points): slope .8 … 1.2, R² ≥ .8. `solve` needs them.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.common import Goal, finish
from mechmerge.behaviors.schema import load_group
from mechmerge.cli.common import LineProgress, set_threads
from mechmerge.localize.calibration import BehaviorRow, Calibration, Point
from mechmerge.localize.effects import FIRST_INTERVALS, integrate
from mechmerge.localize.rounds import INTERVALS, RoundSettings
from mechmerge.models.components import UNIT_KINDS
from mechmerge.models.references import resolve

DEMO = Path(__file__).parent.parent / "recipes" / "demo" / "experts"
NAMES = ("formats", "arithmetic")
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
WEIGHTS = ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (2.0, 1.0))
WHERE = ("all", "neuron", "formats", "arithmetic")
"""All components, neurons alone, or those of one expert."""
Units = dict[str, np.ndarray]


def ones(calibration: Calibration) -> Units:
    """Everything of every expert: kind → [E, layers, units]."""
    arch, experts = calibration.checkpoint.arch, len(calibration.experts)
    return {kind: np.ones((experts, arch.layers, arch.units(kind)), np.float32) for kind in UNIT_KINDS}


def total(calibration: Calibration, values: Units, change: Units, half: int | None = None) -> np.ndarray:
    """Predicted change of each behaviour's loss, [R]."""
    per_example = sum(np.einsum("enlu,elu->n", values[kind], change[kind], dtype=np.float64) for kind in UNIT_KINDS)
    result: np.ndarray = -(calibration.weights(half) @ per_example)
    return result


def chosen(calibration: Calibration, values: Units, per_nat: np.ndarray, inside: Units) -> Iterator[tuple[str, Units]]:
    """Masks that leave out, of what is inside, the share that is predicted to harm most."""
    for weight, where, share in itertools.product(WEIGHTS, WHERE, SHARES):
        if where != "all" and weight != WEIGHTS[0]:
            continue
        row = (np.array(weight) * per_nat) @ calibration.weights()
        mask: Units = {}
        for kind in UNIT_KINDS:
            score = np.einsum("n,enlu->elu", row, values[kind])
            score = np.where(inside[kind] > 0, score, np.inf)
            if (where == "neuron" and kind != "neuron") or kind == "kv":  # few and large: left in
                score[:] = np.inf
            for e, name in enumerate(NAMES):
                if where in NAMES and where != name:
                    score[e] = np.inf
            count = int(share * np.isfinite(score).sum())
            worst = np.zeros(score.size, bool)
            worst[np.argsort(score, axis=None, kind="stable")[:count]] = True
            mask[kind] = inside[kind] * ~worst.reshape(score.shape)
        yield f"{weight[0]:g}:{weight[1]:g} {where} {share:g}", mask


def shuffled(mask: Units, inside: Units, seed: int) -> Units:
    """As many components left out of each layer, kind and expert, drawn from what is inside."""
    draw = np.random.default_rng(seed)
    result = {kind: array.copy() for kind, array in mask.items()}
    for kind, array in result.items():
        for e, layer in np.ndindex(array.shape[:2]):
            held = np.flatnonzero(inside[kind][e, layer])
            array[e, layer, held] = draw.permutation(array[e, layer, held])
    return result


def line(predicted: np.ndarray, measured: np.ndarray) -> tuple[float, float]:
    """Slope and R² of the least-squares line of `measured` on `predicted`."""
    slope = float(np.cov(predicted, measured)[0, 1] / predicted.var(ddof=1))
    return slope, float(np.corrcoef(predicted, measured)[0, 1] ** 2)


@click.command()
@click.option("--quick", is_flag=True, help="Few prompts and masks; the figures mean nothing.")
@click.option("--save", is_flag=True)
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where finished units are kept; a call that was stopped goes on."
)
@click.option("--threads", type=click.IntRange(1))
def main(quick: bool, save: bool, folder: Path | None, threads: int | None) -> None:
    """Hold predicted changes of loss against measured ones."""
    set_threads(threads)
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(folder or Path(scratch), quick)
    local = {name: value for name, value in figures.items() if " local " in name}
    slopes = [value for name, value in local.items() if name.endswith("slope")]
    figures |= {
        "local slope, least": min(slopes),
        "local slope, largest": max(slopes),
        "local R2, least": min(value for name, value in local.items() if name.endswith("R2")),
    }
    goals = {
        "local slope, least": Goal(0.8, at_most=False),
        "local slope, largest": Goal(1.2),
        "local R2, least": Goal(0.8, at_most=False),
    }
    finish("effects", figures, goals, save, quick)


def measure(folder: Path, quick: bool) -> dict[str, Any]:
    """All figures."""
    base = resolve("demo:smollm2-135m-instruct")
    experts = {name: resolve(f"demo:smollm2-135m-instruct+{DEMO / name}") for name in NAMES}
    rows = [BehaviorRow(name, load_group(name), name) for name in NAMES]
    settings = RoundSettings(prompts=36 if quick else 48)
    calibration = Calibration(base, experts, rows, folder / "units", settings, LineProgress())
    weights = calibration.weights()
    losses = {name: weights @ calibration.losses(calibration.point(1.0, name), name) for name in NAMES}
    before = weights @ calibration.losses(calibration.point(0.0), "the base")
    per_nat = 1 / np.array([before[r] - losses[name][r] for r, name in enumerate(NAMES)])
    start, end = calibration.point(0.0), calibration.point(1.0)
    cuts = FIRST_INTERVALS[-2:] if quick else (*FIRST_INTERVALS[:-1], 0.625, 1.0)
    parts = [integrate(calibration, start, end, a, b) for a, b in itertools.pairwise(cuts)]
    path: Units = {kind: np.sum([part[kind] for part in parts], axis=0) for kind in UNIT_KINDS}

    everything = ones(calibration)
    points = {"sum": everything, "merge": _settled(calibration, everything, per_nat)}
    figures: dict[str, Any] = {"masks a starting point": 0}
    for title, inside in points.items():
        here = Point((1.0,) * len(NAMES), inside)
        at = calibration.losses(here, title)
        local, _ = _short_path(calibration, inside, per_nat)
        masks: list[Units] = []
        for i, (_, mask) in enumerate(chosen(calibration, path if title == "sum" else local, per_nat, inside)):
            if not quick or i % 12 == 0:
                masks += [mask, shuffled(mask, inside, i)]
        figures["masks a starting point"] = len(masks)
        found: dict[str, list[np.ndarray]] = {key: [] for key in ("path", "local", "measured", "apart", "elsewhere")}
        for number, mask in enumerate(masks):
            change = {kind: mask[kind] - inside[kind] for kind in UNIT_KINDS}
            there = calibration.losses(Point(here.rest, mask), f"{title}, mask {number + 1} of {len(masks)}")
            found["measured"].append(weights @ (there - at))
            found["path"].append(total(calibration, path, change))
            found["local"].append(total(calibration, local, change))
            found["apart"].append(total(calibration, local, change, half=0))
            found["elsewhere"].append(calibration.weights(1) @ (there - at))
        table = {key: np.array(values) for key, values in found.items()}
        for r, name in enumerate(NAMES):
            figures[f"{title}: {name}, measured change, least"] = float(table["measured"][:, r].min())
            figures[f"{title}: {name}, measured change, largest"] = float(table["measured"][:, r].max())
            for method, truth in (("path", "measured"), ("local", "measured"), ("apart", "elsewhere")):
                slope, fit = line(table[method][:, r], table[truth][:, r])
                figures |= {f"{title}: {name}, {method} slope": slope, f"{title}: {name}, {method} R2": fit}
    return figures


def _short_path(calibration: Calibration, inside: Units, per_nat: np.ndarray) -> tuple[Units, Units]:
    """Effects over the path from `inside` to what a round would leave of it, and that proposal."""
    here = Point((1.0,) * len(NAMES), inside)
    now = calibration.gradients(here, "the starting point")
    halves = [per_nat @ calibration.weights(half) for half in (0, 1)]
    proposal: Units = {}
    for kind in UNIT_KINDS:
        harmful = np.all([np.einsum("n,enlu->elu", half, now[kind]) < 0 for half in halves], axis=0)
        proposal[kind] = (inside[kind] * ~harmful).astype(np.float32)
    parts = [integrate(calibration, here, Point(here.rest, proposal), a, b) for a, b in INTERVALS]
    return {kind: np.sum([part[kind] for part in parts], axis=0) for kind in UNIT_KINDS}, proposal


def _settled(calibration: Calibration, inside: Units, per_nat: np.ndarray) -> Units:
    """What a round leaves of the sum: proposed components whose effects along the short path still agree on both halves."""
    along, proposal = _short_path(calibration, inside, per_nat)
    halves = [per_nat @ calibration.weights(half) for half in (0, 1)]
    kept: Units = {}
    for kind in UNIT_KINDS:
        harmful = np.all([np.einsum("n,enlu->elu", half, along[kind]) < 0 for half in halves], axis=0)
        kept[kind] = np.where((proposal[kind] == 0) & harmful, 0, inside[kind]).astype(np.float32)
    return kept


if __name__ == "__main__":
    main()
