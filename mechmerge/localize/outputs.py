"""What the model says, as readouts: the loss of an expert's own answers, and the divergence from its next-token distribution.

An anchor is a state inside the model; these are measured at the end of it, over the tokens of the expert's own greedy answers
to the same prompts, so components of every layer count. Both are readouts of `localize/resume.py`: higher is nearer to the
expert.

Shapes: n prompts, K tokens of the longest answer, D residual width, V variants.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mechmerge.artifacts import Units
from mechmerge.localize.asked import Asked
from mechmerge.localize.bench import Bench
from mechmerge.models.checkpoint import Checkpoint

Array = np.ndarray
LOGITS_BYTES = 64_000_000
"""Logits (float32) that are in memory at once stay below this many bytes, or are one row's."""


@dataclass(frozen=True)
class Answers:
    """What an expert says to some prompts."""

    prompts: list[list[int]]
    """Token ids of each prompt."""
    answers: list[list[int]]
    """Token ids of each answer, its end token included."""
    passed: list[bool]
    """Verdicts; empty without a verifier."""
    logp: Callable[[int], Array]
    """The expert's log-probabilities over one answer, float32 [tokens, vocabulary]."""

    @property
    def texts(self) -> list[list[int]]:
        """Token ids of each prompt with its answer."""
        return [[*prompt, *answer] for prompt, answer in zip(self.prompts, self.answers, strict=True)]

    @property
    def tokens(self) -> Array:
        """Tokens of each answer, [n]."""
        return np.array([len(answer) for answer in self.answers], float)

    def some(self, rows: Sequence[int]) -> Answers:
        """Those of some prompts."""
        passed = [self.passed[i] for i in rows] if self.passed else []
        return Answers(
            [self.prompts[i] for i in rows], [self.answers[i] for i in rows], passed, lambda row: self.logp(rows[row])
        )


def ask_expert(bench: Bench, base: Checkpoint, expert: Checkpoint, asked: Asked, units: Units, key: str) -> Answers:
    """The expert's greedy answers, with its log-probabilities on disk: made once, and read when they are there.

    Args:
        bench: holds the base's weights, and does so again afterwards.
        base: the base.
        expert: the expert.
        asked: the prompts.
        units: where they are kept.
        key: prefix of their names.
    """
    prompts = asked.prompts(bench)

    def ask() -> dict[str, Any]:
        bench.load(expert)
        try:
            answers = asked.answers(bench)
            ids = [[*a.ids, *([] if a.end is None else [a.end])] for a in answers]
            for row, logits in _answer_logits(bench, prompts, ids):
                values = logits.float().log_softmax(-1).cpu().numpy()
                units.arrays(f"{key}-logp-{row}", functools.partial(dict, logp=values))
            return {"answers": ids, "passed": asked.verdicts(answers)}
        finally:
            bench.load(base)

    found = units.json(f"{key}-expert", ask)

    def logp(row: int) -> Array:
        values: Array = units.arrays(f"{key}-logp-{row}", dict)["logp"]
        return values

    return Answers(prompts, found["answers"], found["passed"], logp)


def discard_answers(units: Units, key: str) -> None:
    """Removes what `ask_expert` keeps, which is many bytes, once it is not needed any more."""
    # The answers first: where they stand, the log-probabilities are complete.
    (units.folder / f"{key}-expert.json").unlink(missing_ok=True)
    for path in units.folder.glob(f"{key}-logp-*.safetensors"):
        path.unlink()


def _answer_logits(
    bench: Bench, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> Iterator[tuple[int, torch.Tensor]]:
    """(prompt, logits [tokens, vocabulary]) of each answer, some prompts at a time."""
    longest = max(len(answer) for answer in answers)
    size = max(1, LOGITS_BYTES // (longest * bench.checkpoint.arch.vocabulary * 4))
    for start in range(0, len(answers), size):
        rows = list(range(start, min(start + size, len(answers))))
        batch, labels = bench.encode_answers([(prompts[i], answers[i]) for i in rows])
        with torch.no_grad():
            for row, logits in zip(rows, bench.answer_logits(batch, labels), strict=True):
                yield row, logits[-len(answers[row]) :]


class _OutputReadout:
    """Something of the logits that predict each answer."""

    def __init__(self, bench: Bench, answers: Answers) -> None:
        self.bench, self.answers = bench, answers
        self.layer = bench.checkpoint.arch.layers
        # The last position predicts what comes after the answer, which nobody asks.
        self.positions = max(len(answer) for answer in answers.answers) + 1

    def needs(self, prompt: int) -> int:
        """The positions that predict this prompt's answer, and the one after."""
        return len(self.answers.answers[prompt]) + 1

    def read(self, residual: torch.Tensor) -> torch.Tensor:
        """[V, n] from the residual stream [V, n, K + 1, D]."""
        vocabulary = self.bench.checkpoint.arch.vocabulary
        size = max(1, LOGITS_BYTES // (self.positions * vocabulary * 4))
        variants, n = residual.shape[:2]
        rows = residual.flatten(0, 1)
        found = []
        for start in range(0, len(rows), size):
            logits = self.bench.logits(rows[start : start + size])[:, :-1]
            for i, own in enumerate(logits, start):
                found.append(self.score(own[-len(self.answers.answers[i % n]) :].float(), i % n))
        return torch.stack(found).view(variants, n)

    def score(self, logits: torch.Tensor, row: int) -> torch.Tensor:
        """A number from the logits of one answer, [tokens, vocabulary]."""
        raise NotImplementedError


class AnswerLoss(_OutputReadout):
    """−(negative log-likelihood per token) of the expert's own answers, in nats."""

    def score(self, logits: torch.Tensor, row: int) -> torch.Tensor:
        """Mean log-likelihood of the answer's tokens."""
        labels = torch.tensor(self.answers.answers[row], device=logits.device)
        return -torch.nn.functional.cross_entropy(logits, labels)


class Agreement(_OutputReadout):
    """−KL(expert ‖ the weights as they stand), summed over each answer's tokens, in nats."""

    def score(self, logits: torch.Tensor, row: int) -> torch.Tensor:
        """−KL of one answer."""
        logp = torch.from_numpy(self.answers.logp(row)).to(logits.device)
        return -(logp.exp() * (logp - logits.log_softmax(-1))).sum(dtype=torch.float64)
