"""Progress is an object that long work is given; the library never prints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Progress(Protocol):
    """What a long computation reports to."""

    def start(self, label: str, total: int) -> None:
        """A step called `label` of `total` units begins (steps do not nest)."""

    def advance(self, units: int = 1) -> None:
        """`units` of the current step are done."""

    def end(self) -> None:
        """The current step is done."""

    def note(self, text: str) -> None:
        """One line that the user should see."""


class NullProgress:
    """Reports nothing; the default everywhere."""

    def start(self, label: str, total: int) -> None:
        pass

    def advance(self, units: int = 1) -> None:
        pass

    def end(self) -> None:
        pass

    def note(self, text: str) -> None:
        pass


SILENT: Progress = NullProgress()


def track(items: Iterable[T], label: str, total: int, progress: Progress) -> Iterator[T]:
    """Iterates `items`, reporting each one done to `progress`."""
    progress.start(label, total)
    try:
        for item in items:
            yield item
            progress.advance()
    finally:
        progress.end()
