"""Does localization find what was planted? `python -m benchmarks.planted [--quick] [--save] [--folder DIR] [--only T/PLAN]`.

A behaviour is trained into chosen heads or neurons of a base (planting.py, training.py), others are moved by as much for
another behaviour, and every measure ranks them all; truth.py says which of the planted ones matter, by the loss. With
`--folder` and `--only` it can be done in pieces; the whole takes about half an hour on two cores, `--quick` a minute.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import click

from benchmarks.common import Goal, finish
from benchmarks.planted.experiment import experiment
from benchmarks.planted.testbeds import smollm2, synthetic
from mechmerge.cli.common import set_threads

GOALS = {
    "sufficiency AP": Goal(0.95, at_most=False),
    "screening AP": Goal(0.9, at_most=False),
    "magnitude AP": Goal(0.3),
    "random AP": Goal(0.3),
    "sufficiency AP less activation AP": Goal(0.1, at_most=False),
    "identity control": Goal(0),
}


@click.command()
@click.option("--quick", is_flag=True, help="A smaller language model alone.")
@click.option("--save", is_flag=True)
@click.option(
    "--folder", type=click.Path(path_type=Path), help="Where finished units are kept; a call that was stopped goes on."
)
@click.option("--only", multiple=True, help="A plan, TESTBED/PLAN; can be given again.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", type=click.IntRange(1))
def main(quick: bool, save: bool, folder: Path | None, only: tuple[str, ...], seed: int, threads: int | None) -> None:
    """Rank planted components by every measure."""
    set_threads(threads)
    figures: dict[str, Any] = {"seed": seed}
    with tempfile.TemporaryDirectory() as scratch:
        home = (folder or Path(scratch)) / ("quick" if quick else "full")
        for make in (synthetic,) if quick else (synthetic, smollm2):
            if only and make.__name__ not in {name.split("/")[0] for name in only}:
                continue
            testbed = make(home / make.__name__, quick)
            for plan in testbed.plans:
                if not only or f"{testbed.name}/{plan.name}" in only:
                    figures |= experiment(testbed, plan, home, seed)
    goals = {name: goal for name in figures for figure, goal in GOALS.items() if name.endswith(f" {figure}")}
    finish("planted", figures, goals, save, quick)


if __name__ == "__main__":
    main()
