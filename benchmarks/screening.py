"""Screening in forward-equivalents: `python -m benchmarks.screening [--quick] [--save]`.

A random pair of SmolLM2-135M's shape, in memory: screening every head, KV group and neuron below an anchor against plain
forward passes of the whole model over the same batches, in one process (medians). Goal: at most 3 forward-equivalents with
the anchor at two thirds of the depth (the demo's anchors lie at 12 to 24 of 30 layers); over all layers the figure is told.
Several behaviours on one loaded model are set against as many processes.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import click

from benchmarks.common import Goal, finish
from benchmarks.synthetic import SHAPES, screen_in_a_process, write_pair

PROMPTS, TOKENS, BATCH = 12, 64, 4
BEHAVIORS = 3


@click.command()
@click.option("--quick", is_flag=True)
@click.option("--save", is_flag=True)
def main(quick: bool, save: bool) -> None:
    """Measure what screening costs in forward passes."""
    shape = SHAPES["135M"]
    with tempfile.TemporaryDirectory() as folder:
        base, expert = (str(path) for path in write_pair(shape, Path(folder)))

        def run(**options: Any) -> dict[str, float]:
            sizes = {"prompts": PROMPTS, "tokens": TOKENS, "batch": BATCH}
            return screen_in_a_process(base=base, expert=expert, forwards=True, **sizes, **options)

        repeats = 1 if quick else 3
        figures: dict[str, float] = {"prompts": PROMPTS, "tokens a prompt": TOKENS, "layers": shape.layers}
        for name, layers in (("two thirds of the depth", shape.layers * 2 // 3), ("all layers", shape.layers)):
            runs = [run(layers=layers, behaviors=BEHAVIORS) for _ in range(repeats)]
            ratios = [r["screening"] / BEHAVIORS / r["forward"] for r in runs]
            figures[f"forward-equivalents, {name}"] = statistics.median(ratios)
            figures[f"forward pass over the prompts s, {name}"] = statistics.median(r["forward"] for r in runs)
        together = runs[-1]["loading"] + runs[-1]["screening"]
        alone = run(behaviors=1)
        figures["behaviours together over one by one"] = together / (BEHAVIORS * (alone["loading"] + alone["screening"]))
    finish("screening", figures, {"forward-equivalents, two thirds of the depth": Goal(3.0)}, save, quick)


if __name__ == "__main__":
    main()
