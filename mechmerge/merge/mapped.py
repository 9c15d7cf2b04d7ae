"""The weights of a checkpoint as they lie in its files: tensors that are read when they are touched, and places of bytes."""

from __future__ import annotations

import mmap
import os
import warnings
from dataclasses import dataclass
from types import TracebackType

import torch

from mechmerge.errors import CheckpointError
from mechmerge.merge.cuts import matrix_shape
from mechmerge.models.checkpoint import Checkpoint

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Place:
    """A run of bytes of an open file."""

    file: int
    """Descriptor."""
    start: int
    bytes: int


def ended(where: str, place: Place) -> CheckpointError:
    """What is said of a file that ends before a place does."""
    expected = f"{place.bytes} bytes from byte {place.start} on"
    return CheckpointError(where, expected=expected, found="the end of the file", fix="it was changed meanwhile")


class Mapped:
    """A checkpoint with its files open and mapped; a context.

    A mapped tensor costs no memory of the process's own: its pages are the page cache's.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._files: dict[str, int] = {}
        self._maps: dict[str, mmap.mmap] = {}
        self._matrices: dict[str, torch.Tensor] = {}

    def __enter__(self) -> Mapped:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        # The maps go with the last tensor that looks into them.
        self._matrices.clear()
        self._maps.clear()
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def open(self, file: str) -> int:
        """The descriptor of a file of the folder, open for reading."""
        if file not in self._files:
            self._files[file] = os.open(self.checkpoint.folder / file, os.O_RDONLY)
        return self._files[file]

    def dtype(self, name: str) -> torch.dtype:
        """The stored dtype of a tensor."""
        return DTYPES[self.checkpoint.entries[name]["dtype"]]

    def place(self, name: str) -> Place:
        """Where a tensor's bytes are.

        Raises:
            CheckpointError: its size in the header is not that of its shape.
        """
        entry = self.checkpoint.entries[name]
        file = self.checkpoint.files[self.checkpoint.stored[name]]
        rows, columns = matrix_shape(entry["shape"])
        size = rows * columns * DTYPES[entry["dtype"]].itemsize
        if size != entry["bytes"]:
            raise CheckpointError(
                f"{self.checkpoint.folder / file}: {name}", expected=f"{size} bytes", found=f"{entry['bytes']} in its header"
            )
        return Place(self.open(file), entry["start"], size)

    def matrix(self, name: str) -> torch.Tensor:
        """A tensor as a matrix of its first dimension by all others, in its stored dtype. It must not be written to.

        Raises:
            CheckpointError: the file is shorter than its header says.
        """
        if name not in self._matrices:
            place, file = self.place(name), self.checkpoint.files[self.checkpoint.stored[name]]
            shape, dtype = matrix_shape(self.checkpoint.entries[name]["shape"]), self.dtype(name)
            try:
                if file not in self._maps:
                    self._maps[file] = mmap.mmap(place.file, 0, prot=mmap.PROT_READ)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # that nobody may write into it
                    flat = torch.frombuffer(self._maps[file], dtype=dtype, count=shape[0] * shape[1], offset=place.start)
            except ValueError:
                raise ended(str(self.checkpoint.folder / file), place) from None
            self._matrices[name] = flat.reshape(shape)
        return self._matrices[name]
