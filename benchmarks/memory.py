"""Peak memory of `localize` on the demo's pair, in a process of its own: `python -m benchmarks.memory [--quick] [--save]`.

Goal: peak resident memory of at most 2.5 × the fp32 base + 500 MB. `--quick` measures one behaviour with few prompts.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click

from benchmarks.common import Goal, finish
from mechmerge.models.references import resolve

MEASURE = """
import resource, sys
from mechmerge.cli.main import cli
cli.main(args=sys.argv[1:], standalone_mode=False)
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@click.command()
@click.option("--quick", is_flag=True)
@click.option("--save", is_flag=True)
def main(quick: bool, save: bool) -> None:
    """Measure the peak memory of localize on the demo's pair."""
    base = resolve("demo:smollm2-135m-instruct")
    expert = "demo:smollm2-135m-instruct+" + str(Path(__file__).parent.parent / "recipes/demo/experts/formats")
    resolve(expert)  # materialised here, so that only localize is measured
    parameters = sum(math.prod(shape) for shape in base.checkpoint().shapes.values())
    with tempfile.TemporaryDirectory() as out:
        few = ["--verify", "2", "--prompts", "4", "--steering-prompts", "2"] if quick else []
        arguments = ["localize", base.id.name, expert, "--behavior", "sections", *few, "--out", out, "--quiet"]
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, *arguments, "--invalid-anchor", "report"],
            capture_output=True, text=True, check=True, env=os.environ,
        )  # fmt: skip
    peak = int(done.stdout.rsplit("PEAK", 1)[1]) / 1e3
    model = parameters * 4 / 1e6
    figures = {"fp32 base MB": model, "peak RSS MB": peak, "peak over (2.5 x base + 500 MB)": peak / (2.5 * model + 500)}
    finish("memory", figures, {"peak over (2.5 x base + 500 MB)": Goal(1.0)}, save, quick)


if __name__ == "__main__":
    main()
