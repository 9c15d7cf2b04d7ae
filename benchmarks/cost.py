"""Cost of screening against size: `python -m benchmarks.cost [--quick] [--save]`.

Random pairs of five shapes, all layers, 8 prompts of 64 tokens, fp32: time, peak memory and forward runs of each layer,
streamed and, up to 1B parameters, in memory. Screening must grow linearly in layers × tokens: on the 135M shape with half and
all of its layers and 64 and 128 tokens, the time for a layer and a token may differ by at most a factor of 1.5. `--quick`
stops at 360M.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import click

from benchmarks.common import Goal, finish
from benchmarks.synthetic import SHAPES, screen_in_a_process, write_pair

PROMPTS, TOKENS = 8, 64


@click.command()
@click.option("--quick", is_flag=True)
@click.option("--save", is_flag=True)
def main(quick: bool, save: bool) -> None:
    """Measure time, memory and forward passes of screening for models of five sizes."""
    figures: dict[str, float] = {"prompts": PROMPTS, "tokens a prompt": TOKENS}
    for name, shape in itertools.islice(SHAPES.items(), 3 if quick else None):
        with tempfile.TemporaryDirectory() as folder:
            base, expert = (str(path) for path in write_pair(shape, Path(folder)))
            for streamed in (True,) if name == "3B" else (False, True):
                found = screen_in_a_process(base=base, expert=expert, streamed=streamed, prompts=PROMPTS, tokens=TOKENS)
                row = f"{name} {'streamed' if streamed else 'in memory'}"
                figures |= {
                    f"{row}: s": found["screening"],
                    f"{row}: peak GB": found["peak"] / 1e9,
                    f"{row}: forward runs": found["runs"],
                    f"{row}: ns a layer parameter and token": found["screening"] * 1e9
                    / ((shape.parameters - shape.vocabulary * shape.hidden) * PROMPTS * TOKENS),
                }  # fmt: skip
            if name == "135M":
                figures |= linear(base, expert, shape.layers)
    finish("cost", figures, {"layers x tokens: largest over smallest": Goal(1.5)}, save, quick)


def linear(base: str, expert: str, layers: int) -> dict[str, float]:
    """Time for a layer and a token of the smallest and the largest screening, and of two between."""
    each = {}
    for depth, tokens in itertools.product((layers // 2, layers), (TOKENS, 2 * TOKENS)):
        found = screen_in_a_process(
            base=base, expert=expert, prompts=PROMPTS, tokens=tokens, batch=PROMPTS * TOKENS // tokens // 2, layers=depth
        )
        each[f"us a layer and token, {depth} layers, {tokens} tokens"] = found["screening"] * 1e6 / (depth * tokens * PROMPTS)
    return each | {"layers x tokens: largest over smallest": max(each.values()) / min(each.values())}


if __name__ == "__main__":
    main()
