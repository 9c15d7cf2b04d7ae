"""What mechmerge measures of components: one place that calls its localization engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

from benchmarks.planted.testbeds import Bed
from mechmerge.localize.anchor import States, direction, judge, normalised
from mechmerge.localize.bench import Bench
from mechmerge.localize.measure import Anchor, screen
from mechmerge.localize.patching import Patcher
from mechmerge.localize.path import along_path
from mechmerge.localize.scores import AnchorRecord
from mechmerge.models.components import Component

Array = np.ndarray
Source = Callable[[str], torch.Tensor]
Tensors = Mapping[str, torch.Tensor]
MEASURES = ("screening", "screening_path", "sufficiency", "necessity", "activation")
STEPS = 4
"""Points on the path from base to expert at which `screening_path` takes gradients."""


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


def anchor_of(testbed: Bed, expert: Tensors) -> tuple[Anchor, AnchorRecord]:
    """The anchor, made from the testbed's vector prompts and judged on its score prompts."""
    bench, pairs = testbed.bench, [*testbed.vector, *testbed.score]

    def last(texts: Sequence[str]) -> Array:
        trace = bench.trace(bench.encode(texts), testbed.anchor_layer)
        return torch.stack([x[:, -1].float() for x in trace.residual]).numpy()

    base = last([x for x, _ in pairs])
    with holding(bench, expert):
        states = States(last([x for x, _ in pairs]), last([y for _, y in pairs]), base)
    n = len(testbed.vector)
    vector = normalised(direction(states, testbed.anchor_layer, range(n)))
    record = judge(states, testbed.anchor_layer, range(n), range(n, len(pairs)), None, seed=0)
    return Anchor(testbed.anchor_layer, torch.from_numpy(vector)), record


class Measurement:
    """Scores of components, means over the score prompts, in units of the gap between expert and base (recovery).

    Args:
        testbed: its bench holds the base.
        anchor: from `anchor_of`.
        expert: the tensors that differ from the base.
    """

    def __init__(self, testbed: Bed, anchor: Anchor, expert: Tensors) -> None:
        self.bench, self.anchor, self.expert = testbed.bench, anchor, expert
        self.texts = [x for x, _ in testbed.score]
        ids = [self.bench.tokenizer(text, add_special_tokens=False).input_ids for text in self.texts]
        self.patcher = Patcher(self.bench, ids, anchor)
        self.start = self.patcher.run()
        with holding(self.bench, expert):
            self.end = self.patcher.run()
        self.gap = float((self.end.state - self.start.state).mean())

    def theirs(self, name: str) -> torch.Tensor:
        """The expert's tensor of that name."""
        return self.expert[name] if name in self.expert else self.bench.checkpoint.tensor(name)

    def screening(self, components: Sequence[Component], steps: int = 0) -> Array:
        """First-order change of the state, from the base's gradient, or from the mean of `steps` points on the way."""
        batches = [self.bench.encode(self.texts[i : i + 4]) for i in range(0, len(self.texts), 4)]
        anchors = [self.anchor] * len(batches)

        def measure(origin: Source | None) -> dict[str, Array]:
            return screen(self.bench, batches, anchors, self.theirs, origin)

        found = along_path(self.bench, self.bench.checkpoint.tensor, self.theirs, steps, measure)
        return np.asarray([found[c.kind][:, c.layer, c.unit].mean() for c in components]) / self.gap

    def screening_path(self, components: Sequence[Component]) -> Array:
        """The same with gradients at `STEPS` points between base and expert."""
        return self.screening(components, STEPS)

    def sufficiency(self, components: Sequence[Component]) -> Array:
        """Recovery with the expert's weights of one component in the base."""
        found = self.patcher.patch(self.start, components, self.theirs)
        return np.asarray([found[str(c)].mean() for c in components]) / self.gap

    def necessity(self, components: Sequence[Component]) -> Array:
        """Recovery lost with the base's weights of one component in the expert."""
        with holding(self.bench, self.expert):
            found = self.patcher.patch(self.end, components, self.bench.checkpoint.tensor)
        return np.asarray([-found[str(c)].mean() for c in components]) / self.gap

    def activation(self, components: Sequence[Component]) -> Array:
        """Recovery with what one component of the expert computes in the base."""
        found = self.patcher.transplant(self.start, self.end, components, self.theirs)
        return np.asarray([found[str(c)].mean() for c in components]) / self.gap

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
    return np.asarray(np.round(np.array(found) / max(found), 3))
