"""Differences between two checkpoints, summed up by component."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mechmerge.models.checkpoint import Checkpoint
from mechmerge.models.components import PARTS, SCORED_KINDS, UNIT_KINDS, Block


def delta_of(base: Checkpoint, expert: Checkpoint, name: str) -> torch.Tensor | None:
    """expert − base of one tensor in float32, or None where they are equal."""
    one, other = base.tensor(name), expert.tensor(name)
    return None if torch.equal(one, other) else other.float() - one.float()


def square_sums(delta: torch.Tensor, block: Block) -> torch.Tensor:
    """Sum of squares of each unit's part of a difference, [units]."""
    squares = delta.square()
    if block.dim is None:
        return squares.sum().reshape(1)
    along = squares.sum([d for d in range(squares.dim()) if d != block.dim]) if squares.dim() > 1 else squares
    span = (block.units - 1) * block.stride + block.width
    return along[block.offset : block.offset + span].unfold(0, block.width, block.stride).sum(-1)


def delta_norms(base: Checkpoint, expert: Checkpoint) -> dict[str, Any]:
    """Frobenius norm of expert − base for every component of every scored kind: kind → float32 [layers, units]."""
    layout, arch = base.layout, base.arch
    squares = {kind: np.zeros((arch.layers, arch.units(kind))) for kind in SCORED_KINDS}
    for layer in range(arch.layers):
        changed: dict[str, torch.Tensor | None] = {}
        for coarse in ("attention", "mlp", "layer"):
            for kind in PARTS[coarse]:
                for block in layout.blocks(layer, kind):
                    if block.tensor not in changed:
                        changed[block.tensor] = delta_of(base, expert, block.tensor)
                    delta = changed[block.tensor]
                    if delta is None:
                        continue
                    sums = square_sums(delta, block).numpy().astype(np.float64)
                    squares[coarse][layer, 0] += sums.sum()
                    if coarse != "layer" and kind in UNIT_KINDS:
                        squares[kind][layer] += sums
    return {kind: np.sqrt(values).astype(np.float32) for kind, values in squares.items()}


def unit_parameters(checkpoint: Checkpoint) -> dict[str, int]:
    """Parameters of one head, one KV group and one neuron (the same in every layer of these families)."""
    return {kind: checkpoint.layout.unit_parameters(0, kind, checkpoint.shapes) for kind in UNIT_KINDS}


def delta_by_depth(base: Checkpoint, expert: Checkpoint) -> list[dict[str, Any]]:
    """Where two checkpoints differ: one row a layer and one for each of embed, final_norm and lm_head.

    Each row holds `where`, and for every part there is (`attention`, `mlp`, `norms`; `all` outside the layers) the Frobenius
    norm of expert − base over that of the base: 0 is no difference. `changed` counts tensors with any difference, of `tensors`.
    """
    squares: dict[tuple[str, str], list[float]] = {}
    counts: dict[str, list[int]] = {}
    for name, owned in base.layout.owners().items():
        layer, kind, _ = owned[0]
        where = kind if layer < 0 else f"L{layer}"
        part = "all" if layer < 0 else next((coarse for coarse in ("attention", "mlp") if kind in PARTS[coarse]), "norms")
        delta = delta_of(base, expert, name)
        sums = squares.setdefault((where, part), [0.0, 0.0])
        sums[0] += 0.0 if delta is None else float(delta.double().square().sum())
        sums[1] += float(base.tensor(name).double().square().sum())
        count = counts.setdefault(where, [0, 0])
        count[0] += delta is not None
        count[1] += 1
    rows = []
    for where, (changed, tensors) in counts.items():
        parts = {part: (d / b) ** 0.5 if b else d**0.5 for (place, part), (d, b) in squares.items() if place == where}
        rows.append({"where": where, **parts, "changed": changed, "tensors": tensors})
    return rows
