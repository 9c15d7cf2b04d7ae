"""The direct writer's arithmetic, on a few rows of a tensor at a time.

    merged = base + Σ over experts whose coefficient is not 0, in the recipe's order, of c × (expert − base)

in float32, rounded once. Where exactly one coefficient is 1 and all others are 0 the expert's value is copied, where all are 0
the base's. An expert with coefficient 0 is not read at all, so its ±0 is not added either: that can only be seen in the sign
of a zero. Everything is done element by element, so no order of work and no number of threads changes a bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from mechmerge.merge.cuts import BASE
from mechmerge.recipe.schema import Array

BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
"""Integers of the same size: numpy knows no bfloat16, and moving values needs none."""
Index = Array | slice
"""Rows or columns: a contiguous run, or their numbers."""


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Has torch work on one thread: sums over a tensor (norms, products, decompositions) come out in other bits on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Part:
    """Rows (or columns) that the same experts enter."""

    first: int
    last: int
    """Their places `first` ... `last` − 1 among all that are summed."""
    index: Index
    experts: tuple[tuple[int, torch.Tensor], ...]
    """Those that enter, in the recipe's order, each with its coefficients as a column (dim 0) or row (dim 1)."""


@dataclass(frozen=True)
class Selection:
    """What is done to which rows (or columns) of a matrix; the same for every piece of a matrix that is cut along columns."""

    dim: int
    copies: tuple[tuple[int, Index], ...]
    """(expert, where its values are copied)."""
    summed: Index | None
    """Where a sum is written, part after part."""
    parts: tuple[Part, ...]
    _places: dict[tuple[int, int], Array] = field(default_factory=dict)

    def places(self, rows: int, columns: int) -> Array:
        """Numbers of the summed columns' elements in a matrix of this shape, [rows × summed]."""
        if (rows, columns) not in self._places:
            assert isinstance(self.summed, np.ndarray)  # noqa: S101 - a run is a slice
            self._places[rows, columns] = np.add.outer(np.arange(rows) * columns, self.summed).reshape(-1)
        return self._places[rows, columns]


def select(values: Array, who: Array, dim: int) -> Selection:
    """Sorts rows or columns by what is done to them.

    Args:
        values: float32 [experts, rows or columns].
        who: `copied_from(values)`.
        dim: 0 where `values` belong to rows, 1 where they belong to columns.
    """
    copies = tuple((int(k), as_run(np.flatnonzero(who == k))) for k in np.unique(who[who > BASE]))
    summed = np.flatnonzero(who < BASE)
    if not summed.size:
        return Selection(dim, copies, None, ())
    # Rows that the same experts enter side by side, so that they are a slice of what is gathered.
    kinds = who[summed]
    order = summed if (kinds == kinds[0]).all() else summed[np.argsort(kinds, kind="stable")]
    parts = []
    for first, last in pairwise([0, *(np.flatnonzero(np.diff(who[order])) + 1).tolist(), order.size]):
        own = order[first:last]
        entering = tuple((k, along(mine[own], dim)) for k, mine in enumerate(values) if mine[own[0]])
        parts.append(Part(first, last, as_run(own), entering))
    return Selection(dim, copies, parts[0].index if len(parts) == 1 else order, tuple(parts))


def combine(out: torch.Tensor, experts: Sequence[torch.Tensor], selection: Selection, base: torch.Tensor) -> bool:
    """Writes the merged values over `out`, which holds the base's already.

    Args:
        out: [rows, columns], contiguous, in the output dtype.
        experts: likewise, in the recipe's order and in any floating dtype; those that do not enter are not looked at.
        selection: what is done where.
        base: the base's values; `out` itself where it has the base's dtype.

    Returns:
        Whether all computed values are finite (those copied are not looked at).
    """
    dim = selection.dim
    for k, index in selection.copies:
        put(out, index, take(experts[k], index, dim), dim)
    if selection.summed is None:
        return True
    # float() may be the parent itself, which must not be written to: the sum is a tensor of its own.
    start = take(base, selection.summed, dim).float()
    merged = torch.empty_like(start, memory_format=torch.contiguous_format)
    for part in selection.parts:
        here, total = (tensor.narrow(dim, part.first, part.last - part.first) for tensor in (start, merged))
        for number, (k, share) in enumerate(part.experts):
            expert = take(experts[k], part.index, dim).float()
            if number == 0:
                torch.sub(expert, here, out=total).mul_(share)
            else:
                total.add_(expert.sub(here).mul_(share))
        total.add_(here)
    rounded = merged.to(out.dtype)
    if dim == 1 and not isinstance(selection.summed, slice):
        write(out, selection.places(*out.shape), rounded)
    else:
        put(out, selection.summed, rounded, dim)
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
    write(tensor, np.add.outer(np.arange(rows) * columns, index).reshape(-1), values)


def write(tensor: torch.Tensor, places: Array, values: torch.Tensor) -> None:
    """Writes values of the same dtype to numbered elements of a contiguous matrix."""
    bits = BITS[tensor.dtype]
    tensor.view(bits).numpy().reshape(-1)[places] = values.contiguous().view(bits).numpy().reshape(-1)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether there is no NaN and no infinity (one pass; `torch.isfinite` is twenty times slower in bfloat16)."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))
