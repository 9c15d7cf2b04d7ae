"""What a node of the effect matrix costs: `python -m benchmarks.effects_cost [--quick] [--save]`.

A random pair of SmolLM2-135M's shape in bfloat16, as `mechmerge effects` takes it: prompts with answers, whose loss is read
with and without gradients. A *forward-equivalent* is a plain pass with the loss of the same batches; all take turns in one
process, medians of their ratios. By construction a node costs two passes for the gradient of the residual stream (forward,
backward) and one for each expert (its deltas times what they meet), beside the head's. Goal: at most 3 with one expert; what
two and three experts cost is told.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import torch

from benchmarks.common import Goal, finish
from benchmarks.synthetic import SHAPES, write_pair
from mechmerge.cli.common import set_threads
from mechmerge.localize.bench import Bench
from mechmerge.localize.gradients import DeltaProbe
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.models.deltas import delta_of
from mechmerge.models.references import Model, ModelId

EXPERTS = (1, 2, 3)
PROMPT, ANSWER, BATCH = 60, 96, 16
"""Tokens of a prompt and of its answer, and prompts a batch: about the demo's."""


@click.command()
@click.option("--quick", is_flag=True)
@click.option("--save", is_flag=True)
@click.option("--threads", type=click.IntRange(1))
def main(quick: bool, save: bool, threads: int | None) -> None:
    """Measure what a node costs in forward passes."""
    set_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        base, expert = write_pair(SHAPES["135M"], Path(folder))
        bench = Bench(Model(id=ModelId(name="base", shards={}), path=base), "bfloat16")
        deltas = deltas_of(bench, Checkpoint(expert))
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(bench.checkpoint.arch.vocabulary, (BATCH, PROMPT + ANSWER), generator=generator).tolist()
        batch, labels = bench.encode_answers([(row[:PROMPT], row[PROMPT:]) for row in ids])
        layers = bench.checkpoint.arch.layers

        def loss(_number: int, residual: torch.Tensor) -> torch.Tensor:
            return bench.answer_losses(batch, labels, residual)

        def forward() -> None:
            with torch.no_grad():
                loss(0, bench.run(batch, layers))

        def node(experts: int) -> None:
            with DeltaProbe(bench, lambda name: [deltas[name]] * experts, experts, below=layers) as probe:
                bench.backward([batch], layers, loss, probe.turn)
                probe.take(0)

        forward()  # everything is allocated once
        node(1)
        rounds = [(timed(forward), [timed(partial(node, e)) for e in EXPERTS]) for _ in range(1 if quick else 5)]
    figures: dict[str, float] = {"prompts": BATCH, "tokens a prompt, answer included": PROMPT + ANSWER}
    figures |= {"forward pass s": statistics.median(alone for alone, _ in rounds)}
    for number, experts in enumerate(EXPERTS):
        name = f"forward-equivalents, {experts} expert{'s' * (experts > 1)}"
        figures[name] = statistics.median(nodes[number] / alone for alone, nodes in rounds)
    finish("effects_cost", figures, {"forward-equivalents, 1 expert": Goal(3.0)}, save, quick)


def deltas_of(bench: Bench, expert: Checkpoint) -> dict[str, torch.Tensor | None]:
    """An expert's deltas by tensor, in the bench's dtype."""
    found = {name: delta_of(bench.checkpoint, expert, name) for name in bench.checkpoint.entries}
    return {name: None if delta is None else delta.to(bench.module.dtype) for name, delta in found.items()}


def timed(work: Callable[[], None]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
