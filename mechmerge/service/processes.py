"""Finding processes and ending them: no worker outlives its server, and nothing that it started outlives it.

A worker and all that it starts carry the job's name in their environment, where a later server finds them. Elsewhere than on
Linux nothing is found here: there a worker still ends when its server does (the pipe), and limits of memory are not kept.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

PROC = Path("/proc")
MARK = "_MECHMERGE_JOB"
"""The environment variable that holds the job's name."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with(parent: int) -> None:
    """Lets this process be killed when its parent ends (prctl(2), PR_SET_PDEATHSIG); at once if it has ended already."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def marked(mark: str) -> list[int]:
    """Processes whose environment holds a mark, this one aside."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for folder in _folders():
        with contextlib.suppress(OSError):
            if int(folder.name) != os.getpid() and wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def end_marked(mark: str, patience: float = 20.0) -> bool:
    """Kills all processes with a mark; whether they are gone."""
    until = time.monotonic() + patience
    while left := marked(mark):
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def end_group(leader: int) -> None:
    """Kills a process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def memory_of(roots: Iterable[int]) -> dict[int, int]:
    """Resident bytes of each process together with everything that it started; pages that several share count for each."""
    page = os.sysconf("SC_PAGE_SIZE")
    children: dict[int, list[int]] = defaultdict(list)
    resident: dict[int, int] = {}
    for folder in _folders():
        with contextlib.suppress(OSError, ValueError, IndexError):
            # The command's name, in brackets, may hold anything.
            fields = (folder / "stat").read_text("utf-8", "replace").rsplit(")", 1)[1].split()
            pid, parent = int(folder.name), int(fields[1])
            children[parent].append(pid)
            resident[pid] = int(fields[21]) * page
    return {root: _sum(root, children, resident) for root in roots}


def _sum(root: int, children: dict[int, list[int]], resident: dict[int, int]) -> int:
    total, waiting = 0, [root]
    while waiting:
        pid = waiting.pop()
        total += resident.get(pid, 0)
        waiting.extend(children.get(pid, ()))
    return total


def _folders() -> list[Path]:
    try:
        return [folder for folder in PROC.iterdir() if folder.name.isdigit()]
    except OSError:
        return []
