"""The direct writer's arithmetic, on a few rows of a tensor at a time.

    merged = base + Σ over experts whose coefficient is not 0, in the recipe's order, of c × (expert − base)

in float32, rounded once. Where exactly one coefficient is 1 and all others are 0 the expert's value is copied, where all are 0
the base's. An expert with coefficient 0 is not read at all, so its ±0 is not added either: that can only be seen in the sign
of a zero. Everything is done element by element, so no order of work and no number of threads changes a bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from mechmerge.merge.cuts import BASE
from mechmerge.recipe.schema import Array

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
"""Integers of the same size: numpy knows no bfloat16, and moving values needs none."""
Index = Array | slice
"""Rows or columns: a contiguous run, or their ascending numbers."""


def combine(
    out: torch.Tensor, base: torch.Tensor, experts: Sequence[torch.Tensor], values: Array, who: Array, dim: int
) -> bool:
    """Writes the merged values over `out`, which holds the base's already.

    Args:
        out: [rows, columns], contiguous, in the output dtype.
        base: the base's values, [rows, columns], in any floating dtype.
        experts: likewise, in the recipe's order; those with no coefficient but 0 are not looked at.
        values: float32 [experts, rows or columns].
        who: `copied_from(values)`.
        dim: 0 where `values` belong to rows, 1 where they belong to columns.

    Returns:
        Whether all computed values are finite (those copied are not looked at).
    """
    for kind in np.unique(who[who > BASE]):
        own = as_run(np.flatnonzero(who == kind))
        put(out, own, take(experts[int(kind)], own, dim), dim)
    summed = np.flatnonzero(who < BASE)
    if not summed.size:
        return True
    # Rows of one kind (the same experts enter) side by side, so that every kind is a slice of what was gathered.
    kinds = who[summed]
    order = summed if (kinds == kinds[0]).all() else summed[np.argsort(kinds, kind="stable")]
    starts = [0, *(np.flatnonzero(np.diff(who[order])) + 1).tolist(), order.size]
    index = as_run(order) if len(starts) == 2 else order
    # float() may be the parent itself, which nobody may write into: the sum is a tensor of its own.
    start = take(base, index, dim).float()
    merged = torch.empty_like(start)
    for first, last in pairwise(starts):
        part = order[first:last]
        here, total = start.narrow(dim, first, last - first), merged.narrow(dim, first, last - first)
        entering = [
            (take(e, as_run(part), dim), along(c[part], dim)) for e, c in zip(experts, values, strict=True) if c[part[0]]
        ]
        for number, (expert, share) in enumerate(entering):
            if number == 0:
                torch.sub(expert.float(), here, out=total).mul_(share)
            else:
                total.add_(expert.float().sub(here).mul_(share))
        total.add_(here)
    rounded = merged.to(out.dtype)
    put(out, index, rounded, dim)
    return is_finite(rounded)


def as_run(index: Array) -> Index:
    """A slice where ascending numbers follow one another, else the numbers."""
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == index.size else index


def along(values: Array, dim: int) -> torch.Tensor:
    """Coefficients as a column (dim 0) or a row (dim 1)."""
    return torch.from_numpy(np.ascontiguousarray(values)).unsqueeze(1 - dim)


def take(tensor: torch.Tensor, index: Index, dim: int) -> torch.Tensor:
    """Some rows or columns of a matrix; a view where they are contiguous."""
    if isinstance(index, slice):
        return tensor[index] if dim == 0 else tensor[:, index]
    if dim == 0:
        return tensor.index_select(0, torch.from_numpy(index))
    # numpy's take is more than twice as fast as torch's index_select along the last dimension
    bits = tensor.contiguous().view(BITS[tensor.dtype]).numpy()
    return torch.from_numpy(np.take(bits, index, axis=1)).view(tensor.dtype)


def put(tensor: torch.Tensor, index: Index, values: torch.Tensor, dim: int) -> None:
    """Writes some rows or columns of a contiguous matrix, rounding to its dtype."""
    if isinstance(index, slice):
        (tensor[index] if dim == 0 else tensor[:, index]).copy_(values)
        return
    # through float32, as everything that is rounded
    values = values if values.dtype == tensor.dtype else values.float().to(tensor.dtype)
    if dim == 0:
        tensor.index_copy_(0, torch.from_numpy(index), values)
        return
    rows, columns = tensor.shape
    flat = np.add.outer(np.arange(rows) * columns, index).reshape(-1)
    bits = BITS[tensor.dtype]
    tensor.view(bits).numpy().reshape(-1)[flat] = values.contiguous().view(bits).numpy().reshape(-1)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether there is no NaN and no infinity (one pass; `torch.isfinite` is twenty times slower in bfloat16)."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))
