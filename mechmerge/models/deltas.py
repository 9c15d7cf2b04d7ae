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
