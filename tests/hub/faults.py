"""Faults on demand: what a network, a server or another person can do to one request.

Requests are numbered as they arrive; a fault says which numbers or which addresses it strikes, and how often.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

Kind = Literal["cut", "half", "lost", "truncated", "error", "busy", "expired", "push", "slow", "kill", "hold"]
"""What a fault does.

    cut         the connection ends before the request is carried out
    half        the connection ends when half of the request's body has arrived
    lost        the request is carried out, but the connection ends before the answer
    truncated   the request is carried out, but only half of the answer arrives
    error       503, nothing is carried out
    busy        429 with Retry-After, nothing is carried out
    expired     from this request on the token has expired
    push        someone else commits to main just before the request is carried out
    slow        the answer comes late
    kill        the client is killed (SIGKILL) when the request arrives
    hold        the request is carried out once `act` has returned
"""
KINDS: tuple[Kind, ...] = tuple(kind for kind in get_args(Kind) if kind != "hold")
"""Those that say by themselves what they do."""


@dataclass
class Fault:
    """Strikes requests by number, by method or by address (a regular expression searched in the path)."""

    kind: Kind
    index: int | None = None
    method: str | None = None
    pattern: str = ""
    times: int = 1
    """How many requests it strikes."""
    status: int = 503
    """For `error`."""
    seconds: float = 0.0
    """For `slow`: the delay; for `busy`: the Retry-After."""
    act: Callable[[], Any] | None = None
    """For `push`, `kill` and `hold`: what happens (a push is by default a note in every repository)."""
    struck: int = 0
    """How many requests it has struck."""

    def fits(self, number: int, method: str, path: str) -> bool:
        return (
            self.struck < self.times
            and self.index in (None, number)
            and self.method in (None, method)
            and re.search(self.pattern, path) is not None
        )


class Faults:
    """The faults of a Hub."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, kind: Kind, **settings: Any) -> Fault:
        """Adds a fault (the fields of `Fault`) and returns it, so that a test can ask whether it struck."""
        fault = Fault(kind, **settings)
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def strike(self, number: int, method: str, path: str) -> Fault | None:
        """The first fault that fits the request; it counts as struck."""
        with self._lock:
            fault = next((fault for fault in self._faults if fault.fits(number, method, path)), None)
            if fault:
                fault.struck += 1
            return fault
