"""Where derived models live: `MECHMERGE_CACHE`, else `~/.cache/mechmerge`; and who is using what lies there.

A process holds a shared lock on every entry that it uses, until it ends; `mechmerge cache prune` takes the exclusive one before
it removes an entry. The lock is of the file `.ENTRY.use` beside the entry. An entry's own time of change is the time of its
last use.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

_HELD: dict[Path, int] = {}
"""Descriptors of the locks that this process holds, by entry."""


def cache_folder() -> Path:
    """The cache folder (made when something is written into it)."""
    named = os.environ.get("MECHMERGE_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "mechmerge"


def use_lock(entry: Path) -> Path:
    """The file whose lock says that an entry is in use."""
    return entry.with_name(f".{entry.name}.use")


def hold(entry: Path) -> None:
    """Marks a cache entry as used by this process until it ends, whether it is there already or will be made.

    Call it before looking whether the entry is there: from then on nobody removes it. In a cache that this process may only
    read there is nothing to mark.
    """
    if entry not in _HELD:
        with contextlib.suppress(OSError):
            entry.parent.mkdir(parents=True, exist_ok=True)
            _HELD[entry] = _locked(use_lock(entry), fcntl.LOCK_SH)
    with contextlib.suppress(OSError):
        os.utime(entry)


def hold_if_cached(path: Path) -> None:
    """`hold` of the entry that a path lies in, where it lies in one."""
    root = cache_folder()
    if path.is_relative_to(root) and len(path.relative_to(root).parts) >= 2:
        hold(root.joinpath(*path.relative_to(root).parts[:2]))


@contextlib.contextmanager
def claim(entry: Path) -> Iterator[bool]:
    """Tries for an entry alone; yields whether nobody uses it (others wait until the block ends), this process included."""
    if entry in _HELD:
        yield False
        return
    try:
        descriptor = _locked(use_lock(entry), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
        return
    try:
        yield True
    finally:
        # Under the lock, so that whoever waits for it finds it gone and makes a new one.
        use_lock(entry).unlink(missing_ok=True)
        os.close(descriptor)


def _locked(path: Path, how: int) -> int:
    """A descriptor with the lock of the file that is at `path` then: one that was removed while we waited does not count."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, how)
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except FileNotFoundError:
            pass  # removed between the two looks
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
