"""Peak memory of `localize` and of streamed screening: `python -m benchmarks.memory [--quick] [--no-demo] [--save]`.

Everything measured runs in a process of its own. Goals: `localize` on the demo's pair within 2.5 × the fp32 base + 500 MB; a
streamed screening of a random pair of Llama-3.2-3B's shape (bf16 on disk, fp32 weights and activations) within 4 GB; where
the model fits, streamed against in memory: the same scores to 1e-6, and at most 1.5 × its time, loading included. The pairs
are written to a temporary folder (13 GB) and removed. `--quick` leaves the 3B shape out, compares on 135M parameters, and
gives `localize` few prompts; `--no-demo` leaves the demo's pair out.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import numpy as np

from benchmarks.common import Goal, finish
from benchmarks.synthetic import SHAPES, screen_in_a_process, write_pair
from mechmerge.models.references import resolve

MEASURE = """
import sys
from benchmarks.synthetic import peak_memory
from mechmerge.cli.main import cli
cli.main(args=sys.argv[1:], standalone_mode=False)
print("PEAK", peak_memory())
"""
PROMPTS, TOKENS, BATCH = 12, 64, 4


@click.command()
@click.option("--quick", is_flag=True)
@click.option("--demo/--no-demo", "with_demo", default=True)
@click.option("--save", is_flag=True)
def main(quick: bool, with_demo: bool, save: bool) -> None:
    """Measure peak memory of localize, and streamed screening against screening in memory."""
    figures = {"prompts": PROMPTS, "tokens a prompt": TOKENS} | compared("135M" if quick else "1B")
    goals = {"largest difference": Goal(1e-6), "time ratio": Goal(1.5)}
    if not quick:
        figures |= largest()
        goals |= {"3B streamed: peak GB": Goal(4.0)}
    if with_demo:
        figures |= demo(quick)
        goals |= {"peak over (2.5 x base + 500 MB)": Goal(1.0)}
    finish("memory", figures, goals, save, quick)


def demo(quick: bool) -> dict[str, float]:
    """`localize` on the demo's pair."""
    base = resolve("demo:smollm2-135m-instruct")
    expert = "demo:smollm2-135m-instruct+" + str(Path(__file__).parent.parent / "recipes/demo/experts/formats")
    resolve(expert)  # materialised here, so that only localize is measured
    parameters = sum(math.prod(shape) for shape in base.checkpoint().shapes.values())
    with tempfile.TemporaryDirectory() as out:
        few = ["--verify", "2", "--prompts", "4", "--steering-prompts", "2", "--no-curves"] if quick else []
        arguments = ["localize", base.id.name, expert, "--behavior", "sections", *few, "--out", out, "--quiet"]
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, *arguments, "--invalid-anchor", "report"],
            capture_output=True, text=True, check=True, env=os.environ,
        )  # fmt: skip
    peak = int(done.stdout.rsplit("PEAK", 1)[1]) / 1e6
    model = parameters * 4 / 1e6
    return {"fp32 base MB": model, "peak RSS MB": peak, "peak over (2.5 x base + 500 MB)": peak / (2.5 * model + 500)}


def compared(name: str) -> dict[str, float | str]:
    """Screening in memory against streamed, all layers, on one pair that fits."""
    with tempfile.TemporaryDirectory() as folder:
        base, expert = (str(path) for path in write_pair(SHAPES[name], Path(folder)))
        results, scores = [], []
        for streamed in (False, True):
            file = str(Path(folder) / f"{streamed}.npz")
            options = {"prompts": PROMPTS, "tokens": TOKENS, "batch": BATCH, "scores": file}
            results.append(screen_in_a_process(base=base, expert=expert, streamed=streamed, **options))
            scores.append(dict(np.load(file)))
    whole, in_parts = ({f"{key} s": r[key] for key in ("loading", "screening")} | {"peak GB": r["peak"] / 1e9} for r in results)
    seconds = [r["loading"] + r["screening"] for r in results]
    return {
        "compared on": name,
        **{f"in memory: {key}": value for key, value in whole.items()},
        **{f"streamed: {key}": value for key, value in in_parts.items()},
        "layers in memory at once": results[1]["resident"],
        "largest score": max(float(np.abs(values).max()) for values in scores[0].values()),
        "largest difference": max(float(np.abs(values - scores[1][kind]).max()) for kind, values in scores[0].items()),
        "time ratio": seconds[1] / seconds[0],
        "time ratio without loading": results[1]["screening"] / results[0]["screening"],
    }


def largest() -> dict[str, float]:
    """Streamed screening of the 3B shape."""
    needed = 4.5 * SHAPES["3B"].parameters
    if shutil.disk_usage(tempfile.gettempdir()).free < needed:
        raise click.ClickException(f"{tempfile.gettempdir()} needs {needed / 1e9:.0f} GB for the pair (TMPDIR names another)")
    with tempfile.TemporaryDirectory() as folder:
        base, expert = (str(path) for path in write_pair(SHAPES["3B"], Path(folder)))
        found = screen_in_a_process(base=base, expert=expert, streamed=True, prompts=PROMPTS, tokens=TOKENS, batch=BATCH)
    return {
        "3B streamed: peak GB": found["peak"] / 1e9,
        "3B streamed: screening s": found["screening"],
        "3B streamed: layers in memory at once": found["resident"],
    }


if __name__ == "__main__":
    main()
