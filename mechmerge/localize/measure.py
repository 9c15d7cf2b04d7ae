"""The anchor's state, and gradient screening (arXiv 2604.13694 §III-D), which ranks every head, KV group and neuron.

Shapes: n prompts, L layers, U units.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mechmerge.localize.bench import Batch, Bench
from mechmerge.localize.gradients import DeltaProbe
from mechmerge.localize.resume import Readout
from mechmerge.models.components import LEAF_KINDS, PARTS, SCORED_KINDS, UNIT_KINDS, Component

Array = np.ndarray
Source = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Anchor:
    """A unit direction [D] in the residual stream after `layer` layers."""

    layer: int
    vector: torch.Tensor

    @property
    def positions(self) -> int:
        """Only the last prompt token is read."""
        return 1

    def needs(self, prompt: int) -> int:
        """The same of every prompt."""
        return 1

    def read(self, residual: torch.Tensor) -> torch.Tensor:
        """s(θ; x), [..., n], from the residual stream at the last prompt token, [..., n, 1, D]."""
        return residual[..., -1, :].float() @ self.vector

    def state(self, residual: torch.Tensor) -> torch.Tensor:
        """s(θ; x) at the last prompt token, [n], from the residual stream [n, T, D]."""
        return residual[:, -1].float() @ self.vector


def screen(
    bench: Bench, batches: Sequence[Batch], readouts: Sequence[Readout], expert: Source, origin: Source | None = None
) -> dict[str, Array]:
    """First-order change of a readout for every component below it.

    Args:
        bench: the base.
        batches: the prompts.
        readouts: what is measured of each batch, all at one layer.
        expert: the expert's tensor by name.
        origin: where the differences to the expert start, by name, when the bench stands elsewhere (localize/path.py).

    Returns:
        For each scored kind, [n, L, U] in the readout's unit; 0 above it. The prompts stand in the batches' order.
    """
    arch, stop = bench.checkpoint.arch, readouts[0].layer

    def scalar(i: int, residual: torch.Tensor) -> torch.Tensor:
        return readouts[i].read(residual[None, :, -readouts[i].positions :])[0]

    # The tensors of about one layer are kept, for a bench that takes every batch through one layer before the next.
    @functools.lru_cache(maxsize=16)
    def deltas(name: str) -> list[torch.Tensor | None]:
        if not name.startswith(f"{arch.family.layers}."):
            return [None]  # nothing outside the layers is scored
        own, other = bench.weight(name), expert(name).to(bench.device)
        own = own if origin is None else origin(name).to(own)
        exact = torch.promote_types(own.dtype, other.dtype) == own.dtype
        delta = (other if exact else other.to(own.dtype)) - own
        # `equal` stops at the first difference.
        return [None if torch.equal(delta, delta.new_zeros(()).expand_as(delta)) else delta]

    with DeltaProbe(bench, deltas, 1, below=stop) as probe:
        bench.backward(batches, stop, scalar, probe.turn)
        parts = [probe.take(i) for i in range(len(batches))]
    n = sum(batch.ids.shape[0] for batch in batches)
    leaves: dict[str, Array] = {kind: np.zeros((n, arch.layers, arch.units(kind)), np.float64) for kind in LEAF_KINDS}
    start = 0
    for batch, part in zip(batches, parts, strict=True):
        stop = start + batch.ids.shape[0]
        for (layer, kind), values in part.items():
            if layer >= 0:
                leaves[kind][start:stop, layer] = values[0].double().numpy()
        start = stop
    return {
        kind: leaves[kind] if kind in UNIT_KINDS else sum(leaves[part].sum(2, keepdims=True) for part in PARTS[kind])
        for kind in SCORED_KINDS
    }


def best_units(scores: dict[str, Array], anchor_layer: int, count: int) -> list[Component]:
    """The `count` best heads, KV groups and neurons each by a mean score [L, U], below the anchor."""
    chosen = []
    for kind in UNIT_KINDS:
        values = scores[kind][:anchor_layer]
        order = np.argsort(-values, axis=None, kind="stable")[:count]
        chosen += [Component(int(i) // values.shape[1], kind, int(i) % values.shape[1]) for i in order]
    return chosen
