"""How often and how long a request to the Hub is tried again.

huggingface_hub repeats some requests by itself and others, a commit among them, not at all. Here everything is repeated a
bounded number of times, after the time that the server asks for (`Retry-After`) or an exponentially growing one; what is
repeated must therefore be safe to repeat.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from mechmerge.models.hub_errors import hub_error, is_fleeting, is_hubs, said_by, wait_asked
from mechmerge.progress import SILENT, Progress

T = TypeVar("T")


class Patience(NamedTuple):
    """The policy."""

    attempts: int = 5
    """Of every request, the first one counted."""
    first_wait: float = 1.0
    """Seconds before the second attempt; doubled each time."""
    longest_wait: float = 120.0
    """Seconds; a server that asks for more is not waited for."""
    sleep: Callable[[float], None] = time.sleep

    def call(self, action: Callable[[], T], where: str, progress: Progress = SILENT) -> T:
        """Does something that asks the Hub, again where that may help.

        Raises:
            MechmergeError: what went wrong, in one line.
        """
        for attempt in range(1, self.attempts + 1):
            try:
                return action()
            except Exception as error:
                if not is_hubs(error):
                    raise
                wait = wait_asked(error)
                wait = self.first_wait * 2 ** (attempt - 1) if wait is None else wait
                if attempt == self.attempts or not is_fleeting(error) or wait > self.longest_wait:
                    raise hub_error(error, where) from error
                progress.note(f"{where}: {said_by(error)}; again in {wait:g} s ({attempt} of {self.attempts - 1})")
                self.sleep(wait)
        raise AssertionError("an attempt either returns or raises")


PATIENCE = Patience()
