"""Do predicted changes of loss come true? `python -m benchmarks.effects [--quick] [--save] [--folder DIR]`.

On the demo's pair, for more than a hundred masks from each of two starting points (chosen by predicted harm, and the same
shuffled within every layer, kind and expert; a few that lower what has no component of its own), the predicted change of each
behaviour's loss is held against the measured one. The starting points:

- *the sum*, and *the merge* that one round settles (localize/rounds.py);
- predicted by the *path* effects (base → sum, localize/effects.py), and by *local* ones: integrated over the short path from
  the starting point to what a round would propose there.

Masks and lines are those of localize/linearity.py, which measures an effect file's own. A prediction is linear:
Σ effect × change of coefficient. Slope and R² are those of the least-squares line of measured on predicted changes over all
masks. `apart` predicts from one half of the calibration prompts and measures on the other.
Goals (of the local effects, each behaviour, both starting points): slope .8 … 1.2, R² ≥ .8. `solve` needs them.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.common import Goal, finish
from mechmerge.behaviors.schema import load_group
from mechmerge.cli.common import LineProgress, set_threads
from mechmerge.localize.calibration import BehaviorRow, Calibration, Point
from mechmerge.localize.effect_file import LEAST_MASKS
from mechmerge.localize.effects import FIRST_INTERVALS
from mechmerge.localize.integrals import integrate
from mechmerge.localize.linearity import line, masks_of, predicted_change
from mechmerge.localize.proposal import Proposal, Units, agreed, everything, per_nat, propose, switch, turned_over
from mechmerge.localize.rounds import RoundSettings
from mechmerge.models.references import resolve

DEMO = Path(__file__).parent.parent / "recipes" / "demo" / "experts"
NAMES = ("formats", "arithmetic")


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
    settings = RoundSettings(prompts=36 if quick else 48, tokens="all")  # as effect files, which `solve` goes by
    calibration = Calibration(base, experts, rows, folder / "units", settings, LineProgress())
    weights = calibration.weights()
    losses = {name: weights @ calibration.losses(calibration.point(1.0, name), name) for name in NAMES}
    before = weights @ calibration.losses(calibration.point(0.0), "the base")
    counts = per_nat(calibration, np.array([before[r] - losses[name][r] for r, name in enumerate(NAMES)]))
    start, end = calibration.point(0.0), calibration.point(1.0)
    cuts = FIRST_INTERVALS[-2:] if quick else (*FIRST_INTERVALS[:-1], 0.625, 1.0)
    parts = [integrate(calibration, start, end, a, b) for a, b in itertools.pairwise(cuts)]
    path: Units = {kind: np.sum([part[kind] for part in parts], axis=0) for kind in parts[0]}

    whole = everything(calibration)
    first = propose(calibration, whole, counts, "the sum", certainty=0.0)
    points = {"sum": (whole, first), "merge": (_settled(calibration, first, counts), None)}
    figures: dict[str, Any] = {"masks a starting point": 0}
    for title, (here, known) in points.items():
        at = calibration.losses(here, title)
        local = (known or propose(calibration, here, counts, title, certainty=0.0)).along
        masks = masks_of(calibration, path if title == "sum" else local, counts, here, 8 if quick else LEAST_MASKS)
        figures["masks a starting point"] = len(masks)
        found: dict[str, list[np.ndarray]] = {key: [] for key in ("path", "local", "measured", "apart", "elsewhere")}
        for number, there in enumerate(masks):
            change = calibration.losses(there, f"{title}, mask {number + 1} of {len(masks)}") - at
            found["measured"].append(weights @ change)
            found["path"].append(predicted_change(calibration, path, here, there))
            found["local"].append(predicted_change(calibration, local, here, there))
            found["apart"].append(predicted_change(calibration, local, here, there, half=0))
            found["elsewhere"].append(calibration.weights(1) @ change)
        table = {key: np.array(values) for key, values in found.items()}
        for r, name in enumerate(NAMES):
            figures[f"{title}: {name}, measured change, least"] = float(table["measured"][:, r].min())
            figures[f"{title}: {name}, measured change, largest"] = float(table["measured"][:, r].max())
            for method, truth in (("path", "measured"), ("local", "measured"), ("apart", "elsewhere")):
                slope, fit = line(table[method][:, r], table[truth][:, r])
                figures |= {f"{title}: {name}, {method} slope": slope, f"{title}: {name}, {method} R2": fit}
    return figures


def _settled(calibration: Calibration, proposal: Proposal, counts: np.ndarray) -> Point:
    """What a round by the halves alone leaves of the sum: without what is proposed and still agrees along the short path."""
    start = everything(calibration)
    units = dict(start.units or {})
    direction = {kind: switch(units)[kind] * wanted for kind, wanted in proposal.wanted.items()}
    kept = agreed(calibration, proposal.along, counts, direction, certainty=0.0)
    return Point(start.rest, turned_over(units, kept))


if __name__ == "__main__":
    main()
