"""A weight file as a list of pieces: bytes that are copied from a parent, and rows that are computed.

A piece knows what it reads, so that it can be read ahead, and what of it differs from the base.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from mechmerge.errors import CheckpointError, MechmergeError
from mechmerge.merge.arithmetic import Selection, combine, is_finite, put, select
from mechmerge.merge.cuts import BASE, Cut
from mechmerge.merge.files import OutFile
from mechmerge.merge.mapped import Mapped, Place, ended
from mechmerge.recipe.schema import Array

ELEMENTS = 1 << 18
"""Elements that are computed in one piece: their float32 values fit a processor's second-level cache."""
LARGEST = 1 << 21
"""Elements of a piece that are computed or copied along, at most (but at least one row)."""
COPIED = 1 << 24
"""Bytes of a copied piece, at most."""
GAP = 1 << 15
"""Bytes between two rows up to which reading through costs less than another request."""


@dataclass(frozen=True)
class Copy:
    """A run of bytes that a parent has already."""

    start: int
    """First byte in the written file."""
    bytes: int
    source: Place
    of_base: bool

    def reads(self) -> Iterator[Place]:
        yield self.source


@dataclass(frozen=True)
class Tensor:
    """A tensor with everything that its pieces need."""

    name: str
    cut: Cut
    dtype: torch.dtype
    """Of what is written."""
    base: Mapped
    experts: Mapping[str, Mapped]
    """In the recipe's order."""

    @functools.cached_property
    def columns(self) -> Selection:
        """What is done to which column, where the tensor is cut along columns."""
        return select(self.cut.values, self.cut.who, 1)


@dataclass(frozen=True)
class Rows:
    """Some rows of a tensor that are computed."""

    start: int
    bytes: int
    tensor: Tensor
    first: int
    last: int
    """Rows first ... last − 1."""

    @property
    def values(self) -> Array:
        """Coefficients, float32 [experts, these rows or all columns]."""
        cut = self.tensor.cut
        return cut.values if cut.dim == 1 else cut.values[:, self.first : self.last]

    @property
    def who(self) -> Array:
        """Where the values come from, for every one of `values` (`copied_from`)."""
        cut = self.tensor.cut
        return cut.who if cut.dim == 1 else cut.who[self.first : self.last]

    def reads(self) -> Iterator[Place]:
        yield self._place(self.tensor.base, 0, self.last - self.first)
        for values, expert in zip(self.values, self.tensor.experts.values(), strict=True):
            for first, last in self._runs(values):
                yield self._place(expert, first, last)

    def changed(self) -> Iterator[tuple[int, int]]:
        """(first, last) bytes of this piece outside which it is the base's, small gaps included."""
        width = self.bytes // (self.last - self.first)
        for first, last in self._runs(self.who != BASE):
            yield first * width, last * width

    def compute(self, memory: torch.Tensor) -> memoryview:
        """The merged bytes, in `memory` (uint8, at least `bytes` long).

        Raises:
            CheckpointError: a parent has NaN or infinite weights here.
            MechmergeError: the sum leaves the range of the output dtype.
        """
        tensor, shape = self.tensor, (self.last - self.first, self.tensor.cut.columns)
        out = memory[: self.bytes].view(tensor.dtype).reshape(shape)
        if tensor.base.dtype(tensor.name) == tensor.dtype:
            base = self._read(tensor.base, memory)
        else:
            base = tensor.base.matrix(tensor.name)[self.first : self.last]
            put(out, slice(0, shape[0]), base.float(), 0)
        experts = []
        for number, (values, expert) in enumerate(zip(self.values, tensor.experts.values(), strict=True)):
            if not values.any():
                experts.append(base)  # nobody looks at it
            elif tensor.cut.dim == 1 or np.count_nonzero(values) * 2 > values.size:
                experts.append(self._read(expert, _scratch(number, self._place(expert, 0, shape[0]).bytes)))
            else:
                experts.append(expert.matrix(tensor.name)[self.first : self.last])
        if not combine(out, experts, self.selection, base):
            self._explain()
        return memory[: self.bytes].numpy().data

    @property
    def selection(self) -> Selection:
        """What is done to which of these rows, or of the tensor's columns."""
        cut = self.tensor.cut
        return self.tensor.columns if cut.dim == 1 else select(self.values, self.who, 0)

    def _read(self, parent: Mapped, memory: torch.Tensor) -> torch.Tensor:
        """These rows of a parent, in `memory`: reading costs less than mapping where all is looked at."""
        place, dtype = self._place(parent, 0, self.last - self.first), parent.dtype(self.tensor.name)
        content = memory[: place.bytes]
        read(place, content.numpy().data)
        return content.view(dtype).reshape(-1, self.tensor.cut.columns)

    def _explain(self) -> None:
        experts = [e for e, values in zip(self.tensor.experts.values(), self.values, strict=True) if values.any()]
        for parent in (self.tensor.base, *experts):
            if not is_finite(parent.matrix(self.tensor.name)[self.first : self.last]):
                where = f"{parent.checkpoint.folder}: {self.tensor.name}"
                raise CheckpointError(where, expected="finite weights", found="NaN or infinite values")
        raise MechmergeError(
            f"merged {self.tensor.name}",
            expected="finite weights",
            found="NaN or infinite ones",
            fix="a coefficient may be too large for the dtype",
        )

    def _place(self, parent: Mapped, first: int, last: int) -> Place:
        """The bytes of rows `first` ... `last` − 1 of this piece in a parent's file."""
        whole = parent.place(self.tensor.name)
        width = whole.bytes // max(self.tensor.cut.rows, 1)
        return Place(whole.file, whole.start + (self.first + first) * width, (last - first) * width)

    def _runs(self, entering: Array) -> Iterator[tuple[int, int]]:
        """Runs of rows of this piece (counted from its first) in which a coefficient is not 0."""
        if self.tensor.cut.dim == 1:
            if entering.any():
                yield 0, self.last - self.first
            return
        numbers = np.flatnonzero(entering)
        if not numbers.size:
            return
        width = self.bytes // (self.last - self.first)
        breaks = np.flatnonzero((np.diff(numbers) - 1) * width > GAP)
        for first, last in zip(numbers[np.r_[0, breaks + 1]], numbers[np.r_[breaks, -1]], strict=True):
            yield int(first), int(last) + 1


Piece = Copy | Rows
_own = threading.local()


def _scratch(number: int, size: int) -> torch.Tensor:
    """Memory of this thread's own for one expert's rows."""
    kept: dict[int, torch.Tensor] = _own.__dict__.setdefault("kept", {})
    if number not in kept or kept[number].numel() < size:
        kept[number] = torch.empty(size, dtype=torch.uint8)
    return kept[number]


def read(place: Place, memory: memoryview) -> None:
    """Reads a run of bytes.

    Raises:
        CheckpointError: the file ends before.
    """
    done = 0
    while done < place.bytes:
        got = os.preadv(place.file, [memory[done : place.bytes]], place.start + done)
        if not got:
            raise ended("a parent's weights", place)
        done += got


def pieces_of(
    file: OutFile, cuts: Mapping[str, Cut], dtype: torch.dtype, base: Mapped, experts: Mapping[str, Mapped]
) -> list[Piece]:
    """The pieces of a weight file in the order of their bytes; copies that continue one another are one.

    Args:
        file: the file, whose own header (if it has one) is not a piece.
        cuts: of its tensors.
        dtype: output dtype.
        base: the base.
        experts: in the recipe's order.
    """
    found: list[Piece] = []
    if file.header is None:
        _add(found, Copy(0, file.tensors[0][1], Place(base.open(file.name), 0, file.tensors[0][1]), True))
    for name, start in file.tensors:
        for piece in _pieces(Tensor(name, cuts[name], dtype, base, experts), start):
            _add(found, piece)
    return found


def _add(found: list[Piece], piece: Piece) -> None:
    before = found[-1] if found else None
    if isinstance(piece, Copy) and isinstance(before, Copy) and before.of_base == piece.of_base:
        one, two = before.source, piece.source
        follows = (one.file, one.start + one.bytes, before.start + before.bytes) == (two.file, two.start, piece.start)
        size = before.bytes + piece.bytes
        if follows and size <= COPIED:
            found[-1] = Copy(before.start, size, Place(one.file, one.start, size), before.of_base)
            return
    if piece.bytes:
        found.append(piece)


def _pieces(tensor: Tensor, start: int) -> Iterator[Piece]:
    cut = tensor.cut
    width = cut.columns * tensor.dtype.itemsize
    # Copying a whole piece costs little: what counts is what is computed in it.
    step = max(1, int(ELEMENTS / max(cut.share, ELEMENTS / LARGEST)) // max(cut.columns, 1))
    parents = list(tensor.experts.values())
    for first in range(0, cut.rows, step):
        piece = Rows(start + first * width, min(step, cut.rows - first) * width, tensor, first, min(first + step, cut.rows))
        who = int(piece.who[0])
        parent = tensor.base if who == BASE else None if who < BASE else parents[who]
        if parent is not None and parent.dtype(tensor.name) == tensor.dtype and (piece.who == who).all():
            place = parent.place(tensor.name)
            yield Copy(piece.start, piece.bytes, Place(place.file, place.start + first * width, piece.bytes), who == BASE)
        else:
            yield piece
