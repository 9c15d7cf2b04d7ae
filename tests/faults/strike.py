"""Runs a command of mechmerge in this process and lets one fault strike it, at one of the moments at which it touches the disk.

    python -c 'from tests.faults.strike import strike; strike()' '{"kind": "kill", "at": 12, "roots": […]}' run pipeline.yaml …

Moments are counted by CPython's own audit events (PEP 578), so nothing of the program is replaced: every opening of a file for
writing, and every rename, removal and new folder, beneath `roots` and not `besides`; for `unreadable` every opening for reading
there. What Rust writes (safetensors) raises no event between that of its folder and its rename: a clock in the parent strikes
there, and the limit on file sizes, which the kernel enforces in the middle of a write.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any, Literal

Kind = Literal["none", "kill", "interrupt", "full", "short", "unreadable", "pause"]
"""
none         no fault
kill         SIGKILL to itself                    interrupt    SIGINT to itself, as Ctrl-C sends it
full         "no space left on device", from then on at the next opening or renaming
short        no file can grow beyond `at` bytes (the kernel's RLIMIT_FSIZE, in the middle of a write)
unreadable   an I/O error as a file is opened for reading
pause        SIGSTOP to itself, until the parent sends SIGCONT
"""
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
NEEDS_ROOM = {"open", "os.rename"}
STRIKE = "from tests.faults.strike import strike; strike()"


class Faults:
    """The audit hook: counts moments, and strikes at one of them."""

    def __init__(self, kind: Kind, at: int, roots: list[str], besides: list[str]) -> None:
        self.kind, self.at, self.roots, self.besides = kind, at, tuple(roots), tuple(besides)
        self.seen = {"write": 0, "read": 0}
        self.struck = False
        self._busy = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._busy or not (event == "open" or event in CHANGES) or not self._beneath(arguments[0]):
            return
        writes = event != "open" or bool(int(arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR))
        self.seen["write" if writes else "read"] += 1
        if writes == (self.kind == "unreadable"):
            return
        seen = self.seen["write" if writes else "read"]
        if seen >= self.at > 0 and not self.struck and (self.kind != "full" or event in NEEDS_ROOM):
            self.struck = True
            self._strike(str(arguments[0]))

    def _beneath(self, path: object) -> bool:
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str | os.PathLike):
            return False
        whole = os.path.abspath(path)
        return whole.startswith(self.roots) and not whole.startswith(self.besides)

    def _strike(self, path: str) -> None:
        match self.kind:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "interrupt":
                signal.raise_signal(signal.SIGINT)
            case "pause":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "full":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            case "unreadable":
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)
            case _:
                pass


def strike() -> None:
    """Carries out `sys.argv`: a fault as JSON, then the command's arguments; tells how many moments there were, if asked."""
    told = json.loads(sys.argv[1])
    from mechmerge.cli.main import main

    # A shell starts its background jobs with SIGINT ignored, and so would this one be.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faults = Faults(told["kind"], told.get("at", 0), told["roots"], told["besides"])
    if told["kind"] == "short":
        resource.setrlimit(resource.RLIMIT_FSIZE, (told["at"], resource.RLIM_INFINITY))
    else:
        sys.addaudithook(faults)
    try:
        main(sys.argv[2:])
    finally:
        if told.get("count"):
            faults._busy = True
            Path(told["count"]).write_text(json.dumps(faults.seen))
