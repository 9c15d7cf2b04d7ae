"""The model with growing sets of components on it, and what is measured there: state, KL to the expert, pass rate.

Memory beside the bench: the base's own values of the components that are moved, and the answers' logits of a few prompts; the
expert's log-probabilities lie on disk.

Shapes: n prompts, t tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mechmerge.artifacts import Units
from mechmerge.localize.asked import Asked
from mechmerge.localize.bench import Bench, layer_source
from mechmerge.localize.curve_sets import Sets
from mechmerge.localize.measure import Anchor
from mechmerge.models.checkpoint import Checkpoint

Array = np.ndarray
LOGITS_BYTES = 64_000_000
"""Logits (float32) of one forward pass stay below this many bytes, or are one prompt's."""


@dataclass(frozen=True)
class Point:
    """The curves' prompts on the base with one set moved in."""

    state: Array
    """s of each prompt, float64 [n]."""
    kl: Array | None
    """KL summed over the tokens of each of the expert's answers, float64 [n], nats; None where not measured."""
    passed: list[bool]
    """Verdicts on the patched model's answers; empty where not asked."""


def rate(verdicts: Sequence[bool]) -> float | None:
    """Share of verdicts that are true; None without any."""
    return sum(verdicts) / len(verdicts) if verdicts else None


@dataclass(frozen=True)
class ExpertAnswers:
    """What the expert says to the curves' prompts."""

    state: Array
    """[n]"""
    answers: list[list[int]]
    """Token ids of each answer, its end token included."""
    passed: list[bool]
    """Verdicts; empty without a verifier."""


class CurveBench:
    """Measures sets of one expert's components on one behaviour.

    Args:
        bench: a bench that holds the base's weights, and does so again after every call.
        base: the base.
        expert: the expert.
        anchor: what recovery is measured on.
        asked: the curves' prompts.
        answered: how many of them the patched models answer (0: no pass rates).
        units: where points are kept.
        key: prefix of the points' names, which tells the sets apart.
    """

    def __init__(
        self,
        bench: Bench,
        base: Checkpoint,
        expert: Checkpoint,
        anchor: Anchor,
        asked: Asked,
        answered: int,
        units: Units,
        key: str,
    ) -> None:
        self.bench, self.base, self.checkpoint, self.anchor, self.asked = bench, base, expert, anchor, asked
        self.answered = asked.first(0 if asked.behavior.verifier is None else answered)
        self.units, self.key = units, key
        self.source = layer_source(expert)
        self.prompts = asked.prompts(bench)
        self._expert: ExpertAnswers | None = None

    # -------------------------------------------------------------------------------------------------------------- expert
    @property
    def expert(self) -> ExpertAnswers:
        """The expert's answers, made once and kept with their log-probabilities."""
        if self._expert is None:
            found = self.units.json("curve-expert", self._ask)
            self._expert = ExpertAnswers(np.array(found["state"]), found["answers"], found["passed"])
        return self._expert

    def _ask(self) -> dict[str, Any]:
        self.bench.load(self.checkpoint)
        try:
            answers = self.asked.answers(self.bench)
            ids = [[*a.ids, *([] if a.end is None else [a.end])] for a in answers]
            for rows, logits in self._logits(ids):
                for row, own in zip(rows, logits, strict=True):
                    values = own[-len(ids[row]) :].float().log_softmax(-1).cpu().numpy()
                    self.units.arrays(f"curve-logp-{row}", functools.partial(dict, logp=values))
            return {"state": self.state().tolist(), "answers": ids, "passed": self.asked.verdicts(answers)}
        finally:
            self.bench.load(self.base)

    # -------------------------------------------------------------------------------------------------------- measurements
    @torch.no_grad()
    def state(self) -> Array:
        """s of every prompt with the weights as they stand, float64 [n]."""
        batch = self.bench.encode(self.asked.texts, special_tokens=self.asked.special_tokens)
        return self.anchor.state(self.bench.run(batch, self.anchor.layer)).double().cpu().numpy()

    def divergence(self) -> Array:
        """KL(expert ‖ the weights as they stand) summed over each answer's tokens, float64 [n], nats."""
        found = np.zeros(len(self.prompts))
        answers = self.expert.answers
        for rows, logits in self._logits(answers):
            for row, own in zip(rows, logits, strict=True):
                logp = torch.from_numpy(self._logp(row)).to(own.device)
                logq = own[-len(answers[row]) :].float().log_softmax(-1)
                found[row] = (logp.exp() * (logp - logq)).sum(dtype=torch.float64).item()
        return found

    def verdicts(self) -> list[bool]:
        """Which answers of the model as it stands the verifier passes."""
        return self.answered.verdicts(self.answered.answers(self.bench))

    def _logp(self, row: int) -> Array:
        logp: Array = self.units.arrays(f"curve-logp-{row}", dict)["logp"]
        return logp

    def _logits(self, answers: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """(prompts, logits [prompts, longest answer, V]) of the given answers, some prompts at a time."""
        longest = max(len(answer) for answer in answers)
        size = max(1, LOGITS_BYTES // (longest * self.bench.checkpoint.arch.vocabulary * 4))
        for start in range(0, len(answers), size):
            rows = list(range(start, min(start + size, len(answers))))
            batch, labels = self.bench.encode_answers([(self.prompts[i], answers[i]) for i in rows])
            with torch.no_grad():
                yield rows, self.bench.answer_logits(batch, labels)

    # --------------------------------------------------------------------------------------------------------------- points
    def point(self, name: str, kl: bool, answers: bool, reach: Callable[[], None]) -> Point:
        """Measures one set, or reads it when it is done.

        Args:
            name: the point's own name among all of this key.
            kl: whether the divergence is measured.
            answers: whether the prompts are answered.
            reach: puts the set into the bench; called only when something is missing.
        """

        def state() -> dict[str, Array]:
            reach()
            return {"state": self.state()}

        def divergence() -> dict[str, Array]:
            reach()
            return {"kl": self.divergence()}

        def answer() -> list[bool]:
            reach()
            return self.verdicts()

        name = f"{self.key}-{name}"
        states = self.units.arrays(name, state)["state"]
        found = self.units.arrays(f"{name}-kl", divergence)["kl"] if kl else None
        answered = len(self.answered.pairs) if answers else 0
        passed = self.units.json(f"{name}-answers-{answered}", answer) if answered else []
        return Point(states, found, passed)

    def walk(self, name: str, sets: Sets, wanted: Sequence[tuple[bool, bool]], done: Callable[[], None]) -> list[Point]:
        """Measures an order's points 1, 2, …, each set on top of the one before.

        Args:
            name: of the order.
            sets: which point each component enters at.
            wanted: (KL, answers) of each point.
            done: called after each.
        """
        reached = 0
        _ = self.expert  # made while no set is in: it takes the whole bench
        with contextlib.ExitStack() as stack:

            def reach(point: int) -> None:
                nonlocal reached
                while reached < point:
                    reached += 1
                    stack.enter_context(self.bench.patched_units(_units_at(sets, reached), self.source))

            found = []
            for number, (kl, answers) in enumerate(wanted, 1):
                found.append(self.point(f"{name}-{number}", kl, answers, functools.partial(reach, number)))
                done()
        return found


def _units_at(sets: Sets, point: int) -> Iterator[tuple[int, str, list[int]]]:
    """(layer, kind, units) that enter at a point, layer by layer: so the expert's tensors are each read once."""
    layers = len(next(iter(sets.values())))
    for layer in range(layers):
        for kind, first in sets.items():
            units = np.flatnonzero(first[layer] == point).tolist()
            if units:
                yield layer, kind, units


def discard_expert(units: Units) -> None:
    """Removes the expert's answers and log-probabilities, which are many bytes, once the curves are a unit."""
    # The answers first: where they stand, the log-probabilities are complete.
    (units.folder / "curve-expert.json").unlink(missing_ok=True)
    for path in units.folder.glob("curve-logp-*.safetensors"):
        path.unlink()
