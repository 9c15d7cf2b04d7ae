"""Speed and memory of merging: `python -m benchmarks.merge_speed [--quick] [--save] [--no-3b]`.

A random bf16 trio (base and two experts) of Llama-3.2-1B's shape is written to a temporary folder, and merged by recipes that
take 10 % of each expert's head, kv and neuron parameters: neurons at coefficient 0.8, spread over all layers or gathered in a
third of them. Five runs of `cp --reflink=never` of the base (with the same fsync) and of the direct writer alternate; figures
are the ratios of their medians. *warm*: the inputs were read before; *cold*: their pages were dropped (POSIX_FADV_DONTNEED;
what a virtual machine's host caches is out of reach). mergekit runs the same recipe through our merge method, and the dense
merge (both experts at 0.5) through its own task arithmetic.

Everything measured runs in a process of its own and is timed without its imports. The writer's time is that of `mechmerge merge
--no-verify`: finding and checking the models (digests of unchanged files are remembered), writing, fsync, the final rename.
mergekit's is that of its planner and executor with an fsync, without what we check beside. Verification, which
`mechmerge merge` does unless told not to, reads everything once more and is a figure of its own.

`--quick` takes a 360M shape, three runs, and the spread recipe alone; `--no-3b` leaves out the 3B shape (26 GB of disk in all).
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

from benchmarks.common import Goal, finish
from benchmarks.merge_job import Job, run
from benchmarks.synthetic import SHAPES, Shape, tensors, write_trio
from mechmerge.models.references import resolve
from mechmerge.recipe.schema import Policy, Recipe, RecipeExpert, write_recipe

BUDGET = 0.1
SEVEN = Shape(4096, 32, 32, 32, 11008, 32_000)
"""Llama-2-7B but for its untied head."""


@click.command()
@click.option("--quick", is_flag=True)
@click.option("--3b/--no-3b", "with_3b", default=True)
@click.option("--save", is_flag=True)
def main(quick: bool, with_3b: bool, save: bool) -> None:
    """Measure the direct writer against cp and mergekit."""
    name, runs = ("360M", 3) if quick else ("1B", 5)
    figures: dict[str, float | str] = {"shape": name, "runs": runs, "load before": os.getloadavg()[0]}
    goals = {"memory: anonymous peak over its bound": Goal(1.0)}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MECHMERGE_CACHE"] = str(Path(folder) / "cache")
        trio = Trio(SHAPES[name], Path(folder) / "trio")
        figures["GB a model"] = trio.size / 1e9
        for where in ("spread",) if quick else ("spread", "gathered"):
            for state in ("warm", "cold"):
                found = trio.against_cp(where, state == "cold", runs)
                figures |= {f"{where}, {state}: {key}": value for key, value in found.items()}
                goals[f"{where}, {state}: writer / cp"] = Goal(1.3)
        figures |= trio.against_mergekit("10 %", "spread", "masked", 1 if quick else 3)
        goals["10 %: mergekit / writer"] = Goal(2.0, at_most=False)
        if not quick:
            figures |= trio.against_mergekit("dense", "dense", "stock", 3)
            goals["dense: mergekit / writer"] = Goal(1.0, at_most=False)
            figures["verified: s"] = trio.timed("verified", "spread")
        figures |= trio.memory(verified=not quick)
        per_gb = float(figures["spread, cold: writer s"]) / trio.size * 1e9
        shutil.rmtree(trio.folder)
        if with_3b and not quick:
            figures |= larger(Path(folder) / "3B", per_gb)
            goals |= {"3B, cold: s a GB against 1B's": Goal(1.3), "3B memory: anonymous peak over its bound": Goal(1.0)}
    figures["load after"] = os.getloadavg()[0]
    finish("merge_speed", figures, goals, save, quick)


class Trio:
    """A base with two experts on disk, and recipes for them.

    Args:
        shape: of the three.
        folder: a new folder.
    """

    def __init__(self, shape: Shape, folder: Path) -> None:
        self.shape, self.folder = shape, folder
        folder.mkdir()
        write_trio(shape, folder)
        os.sync()
        time.sleep(2.5)  # digests of files that were just written are not remembered
        self.models = {name: resolve(str(folder / name)) for name in ("base", "one", "two")}
        self.size = sum(path.stat().st_size for path in (folder / "base").glob("*.safetensors"))
        for name in ("spread", "gathered", "dense"):
            self._write_recipe(name)

    def _write_recipe(self, name: str) -> None:
        """spread, gathered: some neurons of each expert at 0.8, and nothing else; dense: both experts at 0.5."""
        shape = self.shape
        width = shape.hidden // shape.heads
        attention = shape.layers * shape.hidden * 2 * width * (shape.heads + shape.kv)
        neurons = shape.layers * shape.neurons
        chosen = round(BUDGET * (attention + neurons * 3 * shape.hidden) / (3 * shape.hidden))
        layers = shape.layers if name == "spread" else round(shape.layers / 3)
        generator, masks = np.random.default_rng(0), {}
        for expert in ("one", "two"):
            mask = np.zeros((shape.layers, shape.neurons), np.float32)
            for layer in range(layers):
                mask[layer, generator.choice(shape.neurons, chosen // layers, replace=False)] = 0.8
            masks[f"{expert}.neuron"] = mask
        default = 0.5 if name == "dense" else 0.0
        experts = {e: RecipeExpert(model=self.models[e].id, default=default) for e in ("one", "two")}
        recipe = Recipe(base=self.models["base"].id, experts=experts, policy=Policy(name=name))
        write_recipe(self.folder / f"{name}.yaml", recipe, None if name == "dense" else masks)

    def job(self, engine: str, recipe: str = "dense", cold: bool = False) -> Job:
        """A merge, or a copy of the base."""
        return Job(engine, str(self.folder / f"{recipe}.yaml"), str(self.folder), str(self.folder / "out"), cold)

    def timed(self, engine: str, recipe: str = "dense", cold: bool = False) -> float:
        """Seconds of one job."""
        return run(self.job(engine, recipe, cold))[0]

    def against_cp(self, recipe: str, cold: bool, runs: int) -> dict[str, float]:
        """The writer against cp, alternating."""
        cp, writer = alternating(runs, lambda: self.timed("cp", cold=cold), lambda: self.timed("direct", recipe, cold))
        return {"cp s": cp, "writer s": writer, "writer / cp": writer / cp}

    def against_mergekit(self, name: str, recipe: str, engine: str, runs: int) -> dict[str, float]:
        """mergekit against the writer, warm, alternating."""
        slow, fast = alternating(runs, lambda: self.timed(engine, recipe), lambda: self.timed("direct", recipe))
        return {f"{name}: mergekit s": slow, f"{name}: writer s": fast, f"{name}: mergekit / writer": slow / fast}

    def memory(self, verified: bool = True) -> dict[str, float]:
        """Peaks of anonymous memory, in MB; the bound is 150 MB over a bare `import torch` + 3 × the largest tensor."""
        bare = run(Job("torch"), sample=True)[1]
        largest = max(rows * max(columns, 1) * 2 for _, rows, columns in tensors(self.shape))
        peak = max(run(self.job("direct", recipe), sample=True)[1] for recipe in ("dense", "spread"))
        figures = {
            "memory: import torch MB": bare / 1e6,
            "memory: largest tensor MB": largest / 1e6,
            "memory: writer over import torch MB": (peak - bare) / 1e6,
            "memory: anonymous peak over its bound": (peak - bare) / (150e6 + 3 * largest),
        }
        if verified:
            peak = run(self.job("verified", "spread"), sample=True)[1]
            figures["memory: verified over import torch MB"] = (peak - bare) / 1e6
        return figures


def alternating(runs: int, first: Callable[[], float], second: Callable[[], float]) -> tuple[float, float]:
    """Medians of two measurements that take turns."""
    pairs = [(first(), second()) for _ in range(runs)]
    print(f"  {[f'{a:.2f} {b:.2f}' for a, b in pairs]}", file=sys.stderr)
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def larger(folder: Path, per_gb: float) -> dict[str, float]:
    """The 3B shape, cold, and what follows for 7B."""
    if shutil.disk_usage(folder.parent).free < 10 * SHAPES["3B"].parameters:
        raise click.ClickException(f"{folder.parent} has no room for the 3B shape (TMPDIR names another, --no-3b skips it)")
    trio = Trio(SHAPES["3B"], folder)
    found = trio.against_cp("spread", True, 3)
    figures = {f"3B, cold: {key}": value for key, value in found.items()} | {"3B: GB a model": trio.size / 1e9}
    figures["3B, cold: s a GB against 1B's"] = found["writer s"] / trio.size * 1e9 / per_gb
    figures["7B, cold: writer s (computed from 3B's)"] = found["writer s"] / trio.size * SEVEN.parameters * 2
    return figures | {f"3B {key}": value for key, value in trio.memory().items()}


if __name__ == "__main__":
    main()
