"""The direct writer: a sum of masked deltas at the speed of copying files, without mergekit.

The base's shards are cloned where the file system can (FICLONE: Btrfs, XFS, ...) and at least half of them stays, else copied;
of the experts only those rows are read whose coefficient is not 0 (of a tensor that is cut along its columns, all rows), and
each is computed once and written in its place. What is written where is `merge/files.py`'s, what is computed
`merge/arithmetic.py`'s.

Four things go on at once, each in the order of the written bytes: reading ahead, computing (as many threads as torch has),
writing (one thread: two that write to one file wait for each other), and flushing what is written, so that little is left to be
flushed at the end. Pieces are written 256 KiB at a time: larger writes make Linux look for larger folios than it has at hand.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import queue
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from mechmerge.merge.cuts import Cut, cut_of
from mechmerge.merge.files import lay_out
from mechmerge.merge.mapped import Mapped, Place
from mechmerge.merge.pieces import Copy, Piece, Rows, pieces_of, read
from mechmerge.models.checkpoint import INDEX, Checkpoint
from mechmerge.models.load import torch_dtype
from mechmerge.progress import SILENT, Progress
from mechmerge.recipe.coefficients import Coefficients

FICLONE = 0x40049409
"""ioctl of linux/fs.h: the target shares the source's blocks until one of them is written to."""
WRITE = 1 << 18
"""Bytes of one write."""
AHEAD = 1 << 26
"""Bytes of the written file by which reading is ahead of writing."""
COMPUTED = 1 << 25
"""Bytes of computed pieces that wait to be written, at most."""
FLUSH = 1 << 28
"""Bytes after which a flush is started."""
REQUEST = 1 << 19
"""Bytes of one request to read ahead: the kernel cuts longer ones short."""

Clone = Callable[[int, int], bool]
"""(source, target), descriptors: makes the target's content that of the source at once, or says that it cannot."""


class Written(NamedTuple):
    """What the writer did."""

    copied: int
    """Bytes copied from a parent (or left as they were in a clone)."""
    computed: int
    """Bytes of pieces that were computed."""
    cloned: int
    """Files that were cloned."""


def clone(source: int, target: int) -> bool:
    """Clones a whole file by FICLONE, where both lie on one file system that can."""
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError:
        return False
    return True


def cuts_of(base: Checkpoint, found: Coefficients, experts: Mapping[str, Checkpoint]) -> dict[str, Cut]:
    """How the coefficients lie in every tensor, by full name."""
    owners = base.layout.owners()
    return {name: cut_of(name, base.shapes[name], owners[name], found, list(experts)) for name in base.entries}


def write_weights(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    found: Coefficients,
    out_dtype: str,
    folder: Path,
    progress: Progress = SILENT,
    clone_file: Clone = clone,
) -> Written:
    """Writes the weight files of a merge, with their index where there are several.

    Args:
        base: the base.
        experts: in the recipe's order, of the base's tensors and shapes.
        found: the recipe's coefficients.
        out_dtype: `float32`, `bfloat16` or `float16`.
        folder: an empty folder.
        progress: told about pieces.
        clone_file: how a file is cloned.

    Raises:
        CheckpointError: a file is not what its header says, or weights that are summed are not finite (those that are
            copied are not looked at: `verify` does).
        MechmergeError: a sum leaves the range of the output dtype.
    """
    cuts, dtype = cuts_of(base, found, experts), torch_dtype(out_dtype)
    files, index = lay_out(base, out_dtype)
    if index is not None:
        (folder / INDEX).write_text(index, "utf-8")
    with contextlib.ExitStack() as stack:
        one = stack.enter_context(Mapped(base))
        others = {name: stack.enter_context(Mapped(expert)) for name, expert in experts.items()}
        plans = [pieces_of(file, cuts, dtype, one, others) for file in files]
        _open_all(plans)
        targets = stack.enter_context(contextlib.ExitStack())
        work = stack.enter_context(_Work([piece for plan in plans for piece in plan]))
        progress.start("writing the merged weights", sum(len(plan) for plan in plans))
        stack.callback(progress.end)
        copied = computed = cloned = 0
        for file, plan in zip(files, plans, strict=True):
            target = os.open(folder / file.name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            targets.callback(os.close, target)
            in_clone = file.header is None and _stays(plan) and clone_file(one.open(file.name), target)
            cloned += in_clone
            if file.header is not None:
                _write(target, memoryview(file.header), 0)
            for piece in plan:
                if isinstance(piece, Rows):
                    with work.result(piece) as content:
                        for first, last in piece.changed() if in_clone else [(0, piece.bytes)]:
                            _write(target, content[first:last], piece.start + first)
                    computed += piece.bytes
                else:
                    if not (in_clone and piece.of_base):
                        work.copy(piece, target)
                    copied += piece.bytes
                work.written(piece, target)
                progress.advance()
            work.flush(target)
        work.finish()
    return Written(copied, computed, cloned)


def _stays(plan: list[Piece]) -> bool:
    """Whether at least half of a file is the base's: writing into a clone costs more than writing a new file."""
    changed = 0
    for piece in plan:
        if isinstance(piece, Rows):
            changed += sum(last - first for first, last in piece.changed())
        elif not piece.of_base:
            changed += piece.bytes
    return 2 * changed <= sum(piece.bytes for piece in plan)


def _open_all(plans: list[list[Piece]]) -> None:
    """Maps every tensor that will be computed, in this thread: the others only look."""
    for plan in plans:
        for piece in plan:
            if isinstance(piece, Rows):
                parents = [
                    expert for expert, values in zip(piece.tensor.experts.values(), piece.values, strict=True) if values.any()
                ]
                for parent in (piece.tensor.base, *parents):
                    parent.matrix(piece.tensor.name)


def _write(target: int, content: memoryview, start: int) -> None:
    """Writes bytes at their place, in steps that end where the file's 256 KiB do."""
    done = 0
    while done < len(content):
        step = WRITE - (start + done) % WRITE
        done += os.pwrite(target, content[done : done + step], start + done)


class _Work:
    """Everything that goes on beside writing; a context, in which an exception stops it all.

    With one thread of torch's, pieces are computed when they are asked for.
    """

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces
        self.rows = (piece for piece in pieces if isinstance(piece, Rows))
        self.threads = torch.get_num_threads()
        size = max((piece.bytes for piece in pieces if isinstance(piece, Rows)), default=0)
        self.room = max(self.threads + 1, COMPUTED // max(size, 1)) if self.threads > 1 else 1
        self.size, self.made = size, 0
        self.free: queue.SimpleQueue[torch.Tensor] = queue.SimpleQueue()
        self.waiting: deque[Future[tuple[torch.Tensor, memoryview]]] = deque()
        self.flushes: list[Future[None]] = []
        self.ahead = self.dirty = 0
        self.position = self.reached = 0
        self.buffer = memoryview(bytearray(WRITE))

    def __enter__(self) -> _Work:
        # Every computing thread computes alone: its steps are small. torch keeps this number by thread and, for threads that
        # are still to come, by process; the process's is put back at the end.
        self.computing = ThreadPoolExecutor(self.threads, "compute", lambda: torch.set_num_threads(1))
        self.reading = ThreadPoolExecutor(1, "read ahead")
        self.flushing = ThreadPoolExecutor(1, "flush")
        self._look_ahead()
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self.computing, self.reading, self.flushing):
            pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self.threads)

    @contextlib.contextmanager
    def result(self, piece: Rows) -> Iterator[memoryview]:
        """The content of the next computed piece."""
        if self.threads == 1:
            memory = self._memory()
            content = piece.compute(memory)
        else:
            self._compute_ahead()
            memory, content = self.waiting.popleft().result()
        yield content
        self.free.put(memory)
        self._compute_ahead()

    def copy(self, piece: Copy, target: int) -> None:
        """Copies the bytes of a piece."""
        source, done = piece.source, 0
        while done < piece.bytes:
            step = min(WRITE - (piece.start + done) % WRITE, piece.bytes - done)
            read(Place(source.file, source.start + done, step), self.buffer)
            _write(target, self.buffer[:step], piece.start + done)
            done += step

    def written(self, piece: Piece, target: int) -> None:
        """Reads on, and starts a flush where enough is written."""
        self.position += piece.bytes
        self.dirty += piece.bytes
        self._look_ahead()
        if self.dirty >= FLUSH:
            self.dirty = 0
            self.flushes.append(self.flushing.submit(os.fdatasync, target))

    def flush(self, target: int) -> None:
        """Starts the last flush of a file."""
        self.dirty = 0
        self.flushes.append(self.flushing.submit(os.fsync, target))

    def finish(self) -> None:
        """Waits until everything is on the disk; an error of any flush is raised here."""
        for done in self.flushes:
            done.result()

    def _memory(self) -> torch.Tensor:
        try:
            return self.free.get_nowait()
        except queue.Empty:
            return torch.empty(self.size, dtype=torch.uint8)

    def _compute_ahead(self) -> None:
        while len(self.waiting) < self.room and (piece := next(self.rows, None)) is not None:
            self.waiting.append(self.computing.submit(_compute, piece, self._memory()))

    def _look_ahead(self) -> None:
        while self.ahead < len(self.pieces) and self.reached <= self.position + AHEAD:
            piece = self.pieces[self.ahead]
            self.reading.submit(_read_ahead, piece)
            self.reached += piece.bytes
            self.ahead += 1


def _compute(piece: Rows, memory: torch.Tensor) -> tuple[torch.Tensor, memoryview]:
    return memory, piece.compute(memory)


def _read_ahead(piece: Piece) -> None:
    """Asks the kernel for what a piece reads; it is only a wish."""
    for place in piece.reads():
        for start in range(place.start, place.start + place.bytes, REQUEST):
            size = min(REQUEST, place.start + place.bytes - start)
            with contextlib.suppress(OSError):
                os.posix_fadvise(place.file, start, size, os.POSIX_FADV_WILLNEED)
