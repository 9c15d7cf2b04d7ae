"""Drawing tokens: softmax(logits / temperature), by inverse transform of one uniform number a token.

Uniform numbers come from a generator of each prompt's own, seeded by (seed, the prompt's number): an answer does not change
because another prompt was asked before it. The distribution is computed in float64 on the CPU, so that a device's own
generator and its rounding of a sum of a hundred thousand shares play no part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mechmerge.errors import InputError


class Sampler:
    """Draws the next token of each row.

    Args:
        temperature: above 0; 1 is the model's own distribution.
        seed: of all draws.

    Raises:
        InputError: a temperature that is not a positive finite number.
    """

    def __init__(self, temperature: float, seed: int = 0) -> None:
        if not 0 < temperature < float("inf"):
            raise InputError("temperature", expected="a positive number (0 is greedy)", found=f"{temperature:g}")
        self.temperature, self.seed = temperature, seed
        self._draws: dict[int, np.random.Generator] = {}

    def tokens(self, logits: Any, prompts: Sequence[int]) -> Any:
        """Tokens [rows, 1] drawn from `logits` [rows, vocabulary]; `prompts` are the numbers of the rows' prompts."""
        scaled = logits.detach().to("cpu").double().numpy() / self.temperature
        shares = np.exp(scaled - scaled.max(-1, keepdims=True))
        sums = shares.cumsum(-1)
        drawn = [self._generator(number).random() * row[-1] for number, row in zip(prompts, sums, strict=True)]
        # The first token whose cumulated share is above the number: one of share 0 is never drawn.
        chosen = [int(np.searchsorted(row, number, side="right")) for number, row in zip(drawn, sums, strict=True)]
        return logits.new_tensor([[min(token, scaled.shape[-1] - 1)] for token in chosen]).long()

    def _generator(self, number: int) -> np.random.Generator:
        if number not in self._draws:
            self._draws[number] = np.random.default_rng([self.seed % 2**64, number])
        return self._draws[number]
