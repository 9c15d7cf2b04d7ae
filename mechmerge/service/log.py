"""What happens to a job, as lines of JSON in one file that only grows: `jobs/ID/log.jsonl`.

An event's number is the offset in bytes of the line after it, so that whoever has read up to a number goes on exactly there,
after any interruption of reader, worker or server. Server and workers append; a line is one write to a file opened with
O_APPEND, and a line that a killed writer left unfinished is closed by the next one and skipped by readers.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import Field, ValidationError

from mechmerge.artifacts import Document

Type = Literal["state", "stage", "step", "progress", "note", "error"]
CHUNK = 1 << 16
"""Bytes that are read at once."""
TAIL = 8192


class Event(Document):
    """One thing that happened."""

    type: Type
    """`state`: of the job; `stage`: one begins, or is there already; `step`: a step of a stage begins; `progress`: units of it
    are done; `note`: a line to be seen; `error`: why it failed.
    """
    time: float
    """Seconds since 1970."""
    attempt: int = Field(ge=0)
    """The worker that it is from, counted from 1; 0 before the first."""
    stage: str | None = None
    """The stage that the worker is in."""
    text: str = ""
    """The state, `begins` or `unchanged`, the name of the step, the note or the error."""
    done: int | None = None
    """Units of the step that are done."""
    total: int | None = None
    """Units of the step."""


class Numbered(NamedTuple):
    """An event with its number."""

    number: int
    event: Event


class LogWriter:
    """Appends events.

    Args:
        path: the log file.
        attempt: the worker's number.
    """

    def __init__(self, path: Path, attempt: int) -> None:
        self.attempt = attempt
        self.stage: str | None = None
        """The stage that events are from."""
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":
            os.write(self._file, b"\n")

    def write(self, type: Type, text: str = "", done: int | None = None, total: int | None = None) -> None:
        """Appends one event; its text becomes one line of at most 2000 characters."""
        event = Event(
            type=type,
            time=round(time.time(), 3),
            attempt=self.attempt,
            stage=self.stage,
            text="".join(c if c.isprintable() else "�" for c in " ".join(text.split()))[:2000],
            done=done,
            total=total,
        )
        os.write(self._file, event.model_dump_json(exclude_none=True).encode() + b"\n")

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


def write_event(path: Path, attempt: int, type: Type, text: str) -> None:
    """Appends one event to a log that nobody holds open."""
    writer = LogWriter(path, attempt)
    try:
        writer.write(type, text)
    finally:
        writer.close()


def read_events(path: Path, after: int = 0) -> tuple[list[Numbered], int]:
    """Events after a number, about 64 kB of them at most, and the number up to which the log was read.

    A number that no line ends at counts as the one before; one beyond the end as the end.
    """
    try:
        with path.open("rb") as handle:
            size = handle.seek(0, os.SEEK_END)
            start = min(max(after, 0), size)
            if start:
                handle.seek(start - 1)
                if handle.read(1) != b"\n":
                    start = _line_start(handle, start)
            handle.seek(start)
            data = handle.read(CHUNK)
    except FileNotFoundError:
        return [], 0
    found: list[Numbered] = []
    position = start
    for line in data.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        position += len(line)
        event = _parse(line)
        if event is not None:
            found.append(Numbered(position, event))
    return found, position


def _line_start(handle: object, position: int) -> int:
    """Where the line begins that a position is in."""
    start = max(0, position - CHUNK)
    handle.seek(start)  # type: ignore[attr-defined]
    data: bytes = handle.read(position - start)  # type: ignore[attr-defined]
    return start + data.rfind(b"\n") + 1


class Progress(Document):
    """Where a job is, from the end of its log."""

    stage: str | None = None
    """The stage that began last."""
    step: str | None = None
    """The step that began last."""
    done: int | None = None
    total: int | None = None
    time: float | None = None
    """When anything was last heard of it."""


def progress_of(path: Path) -> Progress:
    """Where a job is, by the last lines of its log (8 kB of them at most)."""
    try:
        with path.open("rb") as handle:
            handle.seek(max(0, handle.seek(0, os.SEEK_END) - TAIL))
            lines = handle.read().split(b"\n")
    except FileNotFoundError:
        return Progress()
    last = None
    for event in filter(None, map(_parse, reversed(lines))):
        last = last or event
        if event.type in ("step", "progress") and event.stage == last.stage:
            return Progress(stage=last.stage, step=event.text, done=event.done, total=event.total, time=last.time)
        if event.type == "stage":
            break
    return Progress() if last is None else Progress(stage=last.stage, time=last.time)


def _parse(line: bytes) -> Event | None:
    try:
        return Event.model_validate(json.loads(line))
    except (ValueError, ValidationError):
        return None
