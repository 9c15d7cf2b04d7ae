"""The steering check of an anchor: whether adding its vector to the base makes it behave.

As in "Improving Instruction-Following in Language Models through Activation Steering" (ICLR 2025,
microsoft/llm-steer-instruct); localize/anchor.py says what differs here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from mechmerge.localize.asked import Asked
from mechmerge.localize.bench import Bench
from mechmerge.progress import Progress, track

Array = np.ndarray


class Steering:
    """Pass rates of the steered base.

    Args:
        bench: the base.
        asked: the prompts that are answered, of a behaviour with a verifier.
        progress: told of every strength tried.
    """

    def __init__(self, bench: Bench, asked: Asked, progress: Progress) -> None:
        self.bench, self.asked, self.progress = bench, asked, progress

    def best_rate(self, layer: int, v: Array, strengths: Sequence[float]) -> float:
        """The best pass rate, 0 … 1, over multiples of v [D] added after `layer` layers."""
        best = 0.0
        label = f"{self.asked.behavior.name}: steering the base at layer {layer}"
        for strength in track(strengths, label, len(strengths), self.progress):
            with _added(self.bench, layer, torch.from_numpy(v) * strength):
                verdicts = self.asked.verdicts(self.asked.answers(self.bench))
            best = max(best, sum(verdicts) / len(verdicts))
        return best


@contextlib.contextmanager
def _added(bench: Bench, layer: int, vector: torch.Tensor) -> Iterator[None]:
    """Adds a vector to the residual stream after `layer` layers, at the last prompt token and at every token generated."""
    vector = vector.to(bench.device, bench.module.dtype)

    def add(_module: torch.nn.Module, _inputs: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        x = torch.cat([x[:, :-1], x[:, -1:] + vector], 1)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = bench.layers[layer - 1].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
