"""The steering check of an anchor: whether adding its vector to the base makes it behave.

As in "Improving Instruction-Following in Language Models through Activation Steering" (ICLR 2025,
microsoft/llm-steer-instruct); localize/anchor.py says what differs here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from mechmerge.behaviors.generation import Answer, Decoder
from mechmerge.localize.asked import Asked
from mechmerge.localize.bench import Bench
from mechmerge.progress import Progress

Array = np.ndarray


class Push(NamedTuple):
    """What is added to the residual stream."""

    layer: int
    """After so many layers."""
    vector: Array
    """[D]"""


class Steering:
    """Pass rates of the steered base.

    Args:
        bench: the base.
        asked: the prompts that are answered, of a behaviour with a verifier.
        progress: told of every check.
    """

    def __init__(self, bench: Bench, asked: Asked, progress: Progress) -> None:
        self.bench, self.asked, self.progress = bench, asked, progress

    def rates(self, pushes: Sequence[Push]) -> list[float]:
        """The pass rate of the base under each push, 0 … 1."""
        layers = ", ".join(map(str, sorted({push.layer for push in pushes})))
        self.progress.start(f"{self.asked.behavior.name}: steering the base after layer {layers}", 1)
        try:
            verdicts = [self.asked.verdicts(answers) for answers in self.answers(pushes)]
            self.progress.advance()
        finally:
            self.progress.end()
        return [sum(passed) / len(passed) for passed in verdicts]

    def answers(self, pushes: Sequence[Push]) -> list[list[Answer]]:
        """The base's greedy answers to all prompts under each push, [pushes][prompts], made in one batch: decoding reads the
        weights for every token, however many rows there are.
        """
        count = len(self.asked.texts)
        prompts = self.asked.prompts(self.bench) * len(pushes)
        limit = self.asked.behavior.answer_tokens
        decoder = Decoder(self.bench.module, self.bench.tokenizer, prompts, max_new_tokens=limit)
        by_layer: dict[int, torch.Tensor] = {}
        for number, (layer, vector) in enumerate(pushes):
            rows = by_layer.setdefault(layer, torch.zeros(len(prompts), len(vector)))
            rows[number * count : (number + 1) * count] = torch.from_numpy(vector)
        with contextlib.ExitStack() as stack:
            for layer, rows in by_layer.items():
                stack.enter_context(added(self.bench, layer, rows, lambda: decoder.now))
            found = decoder.answers(range(len(prompts)))
        return [found[start : start + count] for start in range(0, len(found), count)]


@contextlib.contextmanager
def added(bench: Bench, layer: int, vectors: torch.Tensor, now: Callable[[], Sequence[int]]) -> Iterator[None]:
    """Adds a vector to the residual stream after `layer` layers, at the last prompt token and at every token generated.

    Args:
        bench: the model.
        layer: layers that run before.
        vectors: one for each text, [texts, D].
        now: the text of each row of the batch that runs.
    """
    vectors = vectors.to(bench.device, bench.module.dtype)

    def add(_module: torch.nn.Module, _inputs: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        x = torch.cat([x[:, :-1], x[:, -1:] + vectors[list(now())].unsqueeze(1)], 1)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = bench.layers[layer - 1].register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()
