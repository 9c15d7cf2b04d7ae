"""Screening and weight patching against one anchor.

Gradient screening (arXiv 2604.13694 §III-D) ranks every head, KV group and neuron; weight patching (§III-C) really puts
the expert's weights of a component into the base and measures the state: sufficiency. Patches resume from the base's
residual stream at the patched layer and stop at the anchor; nothing else about them is approximate.

Shapes: n prompts, L layers, U units.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mechmerge.localize.bench import Batch, Bench, Trace
from mechmerge.localize.gradients import DeltaProbe
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

    def read(self, residual: torch.Tensor) -> torch.Tensor:
        """s(θ; x), [..., n], from the residual stream at the last prompt token, [..., n, 1, D]."""
        return residual[..., -1, :].float() @ self.vector

    def state(self, residual: torch.Tensor) -> torch.Tensor:
        """s(θ; x) at the last prompt token, [n], from the residual stream [n, T, D]."""
        return residual[:, -1].float() @ self.vector


def screen(bench: Bench, batches: Sequence[Batch], anchor: Anchor, expert: Source) -> dict[str, Array]:
    """First-order change of the state for every component below the anchor.

    Returns:
        For each scored kind, [n, L, U] in units of the state; 0 above the anchor. The prompts stand in the batches' order.
    """
    arch = bench.checkpoint.arch

    # The tensors of about one layer are kept, for a bench that takes every batch through one layer before the next.
    @functools.lru_cache(maxsize=16)
    def deltas(name: str) -> list[torch.Tensor | None]:
        if not name.startswith(f"{arch.family.layers}."):
            return [None]  # nothing outside the layers is scored
        own, other = bench.weight(name), expert(name).to(bench.device)
        return [None if torch.equal(own, other) else other.to(own.dtype) - own]

    with DeltaProbe(bench, deltas, 1, below=anchor.layer) as probe:
        bench.backward(batches, anchor.layer, lambda _, residual: anchor.state(residual), probe.turn)
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


def patch_state(bench: Bench, trace: Trace, anchor: Anchor, component: Component, source: Source) -> Array:
    """State of every prompt, [n], with the component's weights taken from `source`."""
    with bench.patched(bench.checkpoint.layout.component_blocks(component), source):
        return anchor.state(bench.resume(trace, component.layer)).double().cpu().numpy()


def patch_layer(
    bench: Bench, trace: Trace, anchor: Anchor, components: Iterable[Component], source: Source
) -> dict[str, Array]:
    """States with each of the components patched in alone, by component name."""
    return {str(component): patch_state(bench, trace, anchor, component, source) for component in components}


def identity_control(bench: Bench, trace: Trace, anchor: Anchor) -> float:
    """Largest |change of state| when the base is patched with itself; 0 or the measurement is wrong."""
    start = anchor.state(trace.residual[-1]).double().cpu().numpy()
    own = {name: bench.weight(name).clone() for name in _some(bench, anchor.layer)}
    worst = 0.0
    for layer in sorted({0, anchor.layer // 2, anchor.layer - 1}):
        for component in (Component(layer, "layer"), Component(layer, "head"), Component(layer, "neuron")):
            worst = max(worst, float(np.abs(patch_state(bench, trace, anchor, component, own.__getitem__) - start).max()))
    return worst


def _some(bench: Bench, below: int) -> Iterable[str]:
    prefixes = tuple(f"{bench.checkpoint.arch.family.layers}.{layer}." for layer in (0, below // 2, below - 1))
    return (name for name in bench.parameters if name.startswith(prefixes))


def best_units(scores: dict[str, Array], anchor_layer: int, count: int) -> list[Component]:
    """The `count` best heads, KV groups and neurons each by a mean score [L, U], below the anchor."""
    chosen = []
    for kind in UNIT_KINDS:
        values = scores[kind][:anchor_layer]
        order = np.argsort(-values, axis=None, kind="stable")[:count]
        chosen += [Component(int(i) // values.shape[1], kind, int(i) % values.shape[1]) for i in order]
    return chosen
