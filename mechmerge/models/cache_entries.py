"""What lies in the cache, how large it is, when it was used last, and what refers to it; and removing what is not needed.

Everything in the cache can be made again from what it was made of: the demo's base from its wheel, a materialised or aligned
model from its parents (which must still be there then). A recipe whose models are gone asks for them with `--model`.

    models/NAME        the demo's base        materialised/KEY   a base with an adapter merged in
    aligned/KEY        an expert with its rows in the base's order
    nltk, ifbench      data of checkers       known/DIGEST.json  where weights were last found
    digests/KEY.json   digests of weight files that did not change since
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mechmerge.artifacts import remove_leftovers
from mechmerge.errors import InputError
from mechmerge.models.cache import cache_folder, claim

MODELS = ("models", "materialised", "aligned")
"""Folders whose entries are models."""
DATA = ("nltk", "ifbench")
"""Entries of their own."""
RECORDS = ("known", "digests")
"""Folders whose entries are small files."""
UNITS = {"": 86400, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


class Entry(NamedTuple):
    """One entry of the cache."""

    kind: str
    """`models`, `materialised`, `aligned`, `data`, `known`, `digests`, or `other`."""
    path: Path
    bytes: int
    used: float
    """When it was used last, in seconds since 1970."""
    refers: tuple[str, ...]
    """Names of the references that were resolved to it; of a record, the path that it names."""
    in_use: bool
    """Whether a running process uses it."""


def parse_age(text: str) -> float:
    """Seconds of an age such as `30d`, `12h`, `2w` or `0`.

    Raises:
        InputError: not such a text.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw]?)", text.strip())
    if match is None:
        raise InputError("--older-than", expected="an age such as 30d, 12h or 2w", found=repr(text))
    return float(match[1]) * UNITS[match[2]]


def entries() -> list[Entry]:
    """Everything in the cache, by kind and name."""
    root = cache_folder()
    if not root.is_dir():
        return []
    known = dict(_known(root))
    found: list[Entry] = []
    for path in _paths(root):
        refers = tuple(sorted({name for record, (name, at) in known.items() if at.is_relative_to(path) and record != path}))
        kind = path.parent.name if path.parent != root else "data" if path.name in DATA else "other"
        if path in known:
            refers = (f"{known[path][0]} in {known[path][1]}" + ("" if known[path][1].is_dir() else " (gone)"),)
        found.append(Entry(kind, path, _size(path), path.stat().st_mtime, refers, _in_use(path)))
    return sorted(found, key=lambda entry: (entry.kind, entry.path.name))


def prune(older_than: float, *, dry_run: bool = False, now: float | None = None) -> tuple[list[Entry], list[Entry]]:
    """Removes entries that were not used for a while and that nobody uses now, and what dead processes left half made.

    Args:
        older_than: in seconds.
        dry_run: remove nothing.
        now: the time (default: the clock's).

    Returns:
        What was (or would be) removed, and what is old enough but in use.
    """
    limit = (time.time() if now is None else now) - older_than
    old = [entry for entry in entries() if entry.used <= limit and entry.kind != "other"]
    removed: list[Entry] = []
    kept: list[Entry] = []
    for entry in old:
        if dry_run:
            (kept if entry.in_use else removed).append(entry)
        elif _remove(entry.path):
            removed.append(entry)
        else:
            kept.append(entry)
    if not dry_run:
        for folder in MODELS:
            for leftover in cache_folder().glob(f"{folder}/.*.partial-*"):
                remove_leftovers(leftover.with_name(leftover.name[1:].rpartition(".partial-")[0]))
    return removed, kept


def _remove(path: Path) -> bool:
    """Removes an entry that nobody uses or makes: it vanishes at once, and is deleted under another name."""
    with claim(path) as free:
        # Whoever makes an entry holds `ENTRY.lock` (artifacts.lock).
        if not free or not _unlocked(path.with_suffix(".lock")):
            return False
        if path.is_dir():
            gone = path.with_name(f".{path.name}.removed")
            shutil.rmtree(gone, ignore_errors=True)
            path.rename(gone)
            shutil.rmtree(gone)
        else:
            path.unlink(missing_ok=True)
    return True


def _in_use(path: Path) -> bool:
    with contextlib.suppress(OSError), claim(path) as free:
        return not (free and _unlocked(path.with_suffix(".lock")))
    return False


def _unlocked(path: Path) -> bool:
    if not path.is_file():
        return True
    with path.open("rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _paths(root: Path) -> Iterator[Path]:
    for path in root.iterdir():
        if path.name.startswith(".") or path.suffix == ".lock":
            continue
        inner = (*MODELS, *RECORDS)
        yield from (
            (p for p in path.iterdir() if p.name[0] != "." and p.suffix != ".lock")
            if path.name in inner and path.is_dir()
            else (path,)
        )


def _known(root: Path) -> Iterator[tuple[Path, tuple[str, Path]]]:
    """(record, (name, path)) of every place that was remembered; a record that cannot be read is of no use to anybody."""
    for record in (root / "known").glob("*.json"):
        try:
            value = json.loads(record.read_text("utf-8"))
            yield record, (str(value["name"]), Path(value["path"]))
        except (OSError, ValueError, KeyError, TypeError):
            yield record, ("unreadable", root / "nowhere")


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files if file.is_file())
