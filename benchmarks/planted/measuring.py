"""What mechmerge measures of components: one place that calls its localization engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from benchmarks.planted.testbeds import Testbed
from mechmerge.localize.anchor import States, judge
from mechmerge.localize.bench import Bench
from mechmerge.localize.measure import Anchor, screen
from mechmerge.localize.patching import Patcher
from mechmerge.localize.scores import AnchorRecord
from mechmerge.models.components import Component

Array = np.ndarray
Tensors = Mapping[str, torch.Tensor]
MEASURES = ("screening", "screening_path", "sufficiency", "necessity", "activation")
NODES = 4
"""Points of the path from base to expert at which gradients are taken."""


@contextlib.contextmanager
def holding(bench: Bench, tensors: Tensors) -> Iterator[None]:
    """The bench holds these tensors inside the `with`, and its own again afterwards."""
    own = {name: bench.parameters[name].detach().clone() for name in tensors}

    def put(given: Tensors) -> None:
        with torch.no_grad():
            for name, tensor in given.items():
                bench.parameters[name].copy_(tensor)

    try:
        put(tensors)
        yield
    finally:
        put(own)


def anchor_of(testbed: Testbed, expert: Tensors) -> tuple[Anchor, AnchorRecord]:
    """The anchor, made from the testbed's vector prompts and judged on its score prompts."""
    bench, pairs = testbed.bench, [*testbed.vector, *testbed.score]

    def last(texts: Sequence[str]) -> Array:
        trace = bench.trace(bench.encode(texts), testbed.anchor_layer)
        return torch.stack([x[:, -1].float() for x in trace.residual]).numpy()

    base = last([x for x, _ in pairs])
    with holding(bench, expert):
        states = States(last([x for x, _ in pairs]), last([y for _, y in pairs]), base)
    n = len(testbed.vector)
    vector, record = judge(states, testbed.anchor_layer, range(n), range(n, len(pairs)), None, seed=0)
    return Anchor(testbed.anchor_layer, torch.from_numpy(vector)), record


class Measurement:
    """Scores of components, means over the score prompts, in units of the gap between expert and base (recovery).

    Args:
        testbed: its bench holds the base.
        anchor: from `anchor_of`.
        expert: the tensors that differ from the base.
    """

    def __init__(self, testbed: Testbed, anchor: Anchor, expert: Tensors) -> None:
        self.bench, self.anchor, self.expert = testbed.bench, anchor, expert
        self.texts = [x for x, _ in testbed.score]
        ids = [self.bench.tokenizer(text, add_special_tokens=False).input_ids for text in self.texts]
        self.base = {name: self.bench.parameters[name].detach().clone() for name in expert}
        self.patcher = Patcher(self.bench, ids, anchor)
        self.start = self.patcher.run()
        with holding(self.bench, expert):
            self.end = self.patcher.run()
        self.gap = float((self.end.state - self.start.state).mean())

    def theirs(self, name: str) -> torch.Tensor:
        """The expert's tensor of that name."""
        return self.expert[name] if name in self.expert else self.bench.parameters[name].detach()

    def screening(self, components: Sequence[Component]) -> Array:
        """First-order change of the state, from the base's gradient."""
        batches = [self.bench.encode(self.texts[i : i + 4]) for i in range(0, len(self.texts), 4)]
        found = screen(self.bench, batches, self.anchor, self.theirs)
        return np.array([found[c.kind][:, c.layer, c.unit].mean() for c in components]) / self.gap

    def screening_path(self, components: Sequence[Component]) -> Array:
        """The same with the mean gradient of `NODES` midpoints between base and expert (integrated gradients)."""
        found = []
        for t in (np.arange(NODES) + 0.5) / NODES:
            between = {name: tensor + float(t) * (self.expert[name] - tensor) for name, tensor in self.base.items()}
            with holding(self.bench, between):  # what is left of the change from here on is 1 − t of it
                found.append(self.screening(components) / (1 - t))
        return np.mean(found, axis=0)

    def sufficiency(self, components: Sequence[Component]) -> Array:
        """Recovery with the expert's weights of one component in the base."""
        found = self.patcher.patch(self.start, components, self.theirs)
        return np.array([found[str(c)].mean() for c in components]) / self.gap

    def necessity(self, components: Sequence[Component]) -> Array:
        """Recovery lost with the base's weights of one component in the expert."""
        with holding(self.bench, self.expert):
            base = {name: self.base[name] for name in self.expert}
            found = self.patcher.patch(self.end, components, lambda name: base.get(name, self.bench.weight(name)))
        return np.array([-found[str(c)].mean() for c in components]) / self.gap

    def activation(self, components: Sequence[Component]) -> Array:
        """Recovery with what one component of the expert computes in the base."""
        found = self.patcher.transplant(self.start, self.end, components, self.theirs)
        return np.array([found[str(c)].mean() for c in components]) / self.gap

    def control(self, components: Sequence[Component]) -> float:
        """Largest |change of state| with the base's own weights patched in: 0, or the measurement is wrong."""
        found = self.patcher.patch(self.start, components, self.bench.weight)
        return max(float(np.abs(found[str(c)]).max()) for c in components)


def magnitude(bench: Bench, expert: Tensors, components: Sequence[Component]) -> Array:
    """Norm of each component's change, to three digits of the largest: what is equal by construction is tied."""
    found = []
    for component in components:
        total = 0.0
        for block, unit in bench.checkpoint.layout.component_blocks(component):
            if block.tensor in expert:
                where = block.indices(unit or 0)
                change = expert[block.tensor] - bench.parameters[block.tensor].detach()
                total += float(change.narrow(block.dim or 0, where.start, block.width).square().sum())
        found.append(np.sqrt(total))
    return np.round(np.array(found) / max(found), 3)
