"""Digests of large files, computed once: hashing three models costs more than merging them.

A digest is kept under the file's device, inode, size and times of change. Only the kernel sets a ctime, so a file that was
written to, replaced or swapped has another one; times have a grain, though, so the digest of a file that changed within the
last seconds is not kept (git's rule for its index: https://git-scm.com/docs/racy-git).
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from mechmerge.artifacts import digest, sha256_file, write_json
from mechmerge.models.cache import cache_folder

GRAIN = 2.0
"""Seconds that a file must have been left alone for its digest to be kept."""


def file_digest(path: Path) -> str:
    """The sha256 of a file, in hex: as it was kept, where the file is the same since, else computed and kept."""
    before = _state(path)
    record = cache_folder() / "digests" / f"{digest(before)[:32]}.json"
    try:
        kept = json.loads(record.read_text("utf-8"))
        if kept["state"] == before:
            return str(kept["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    started = time.time()
    found = sha256_file(path)
    changed = max(before["mtime"], before["ctime"]) / 1e9
    if started - changed > GRAIN and _state(path) == before:
        write_json(record, {"state": before, "sha256": found})
    return found


def _state(path: Path) -> dict[str, int]:
    status = os.stat(path)
    return {
        "device": status.st_dev,
        "inode": status.st_ino,
        "size": status.st_size,
        "mtime": status.st_mtime_ns,
        "ctime": status.st_ctime_ns,
    }
