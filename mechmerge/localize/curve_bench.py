"""The model with growing sets of components on it, and what is measured there: state, KL to the expert, pass rate.

Memory beside the bench: the base's own values of the components that are moved, and the answers' logits of a few prompts; the
expert's log-probabilities lie on disk.

Shapes: n prompts.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mechmerge.artifacts import Units
from mechmerge.localize.asked import Asked
from mechmerge.localize.bench import Bench, layer_source
from mechmerge.localize.curve_sets import Sets
from mechmerge.localize.outputs import Agreement, Answers, ask_expert
from mechmerge.localize.resume import Prompts, Readout
from mechmerge.models.checkpoint import Checkpoint

Array = np.ndarray
MakeReadout = Callable[[Bench, Asked, Answers], tuple[list[list[int]], Readout]]
"""The bench, the curves' prompts and the expert's answers to them → the texts that recovery is measured on, and the readout."""


@dataclass(frozen=True)
class Point:
    """The curves' prompts on the base with one set moved in."""

    state: Array
    """The readout of each prompt, float64 [n]."""
    kl: Array | None
    """KL summed over the tokens of each of the expert's answers, float64 [n], nats; None where not measured."""
    passed: list[bool]
    """Verdicts on the patched model's answers; empty where not asked."""


def rate(verdicts: Sequence[bool]) -> float | None:
    """Share of verdicts that are true; None without any."""
    return sum(verdicts) / len(verdicts) if verdicts else None


class CurveBench:
    """Measures sets of one expert's components on one behaviour.

    Args:
        bench: a bench that holds the base's weights, and does so again after every call.
        base: the base.
        expert: the expert.
        readout: what recovery is measured on.
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
        readout: MakeReadout,
        asked: Asked,
        answered: int,
        units: Units,
        key: str,
    ) -> None:
        self.bench, self.base, self.checkpoint, self.readout, self.asked = bench, base, expert, readout, asked
        self.answered = asked.first(0 if asked.behavior.verifier is None else answered)
        self.units, self.key = units, key
        self.source = layer_source(expert)

    # -------------------------------------------------------------------------------------------------------------- expert
    @functools.cached_property
    def expert(self) -> Answers:
        """The expert's answers, made once and kept with their log-probabilities."""
        return ask_expert(self.bench, self.base, self.checkpoint, self.asked, self.units, "curve")

    @functools.cached_property
    def expert_state(self) -> Array:
        """The expert's own readout of every prompt, float64 [n]."""

        def read() -> dict[str, Array]:
            self.bench.load(self.checkpoint)
            try:
                return {"state": self.state()}
            finally:
                self.bench.load(self.base)

        _ = self.expert  # made while the bench is free
        state: Array = self.units.arrays(f"{self.key}-expert-state", read)["state"]
        return state

    # -------------------------------------------------------------------------------------------------------- measurements
    @functools.cached_property
    def _read(self) -> Prompts:
        return Prompts(self.bench, *self.readout(self.bench, self.asked, self.expert))

    @functools.cached_property
    def _spoken(self) -> Prompts:
        return Prompts(self.bench, self.expert.texts, Agreement(self.bench, self.expert))

    def state(self) -> Array:
        """The readout of every prompt with the weights as they stand, float64 [n]."""
        return _value(self._read)

    def divergence(self) -> Array:
        """KL(expert ‖ the weights as they stand) summed over each answer's tokens, float64 [n], nats."""
        return -_value(self._spoken)

    def verdicts(self) -> list[bool]:
        """Which answers of the model as it stands the verifier passes."""
        return self.answered.verdicts(self.answered.answers(self.bench))

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


def _value(prompts: Prompts) -> Array:
    """The readout with the weights as they stand, float64 [n]."""
    found: Array = prompts.state(prompts.embedded(), 0)[0].numpy()
    return found
