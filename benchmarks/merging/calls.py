"""Which calls worked in a folder, and at which commits: HOME/calls.jsonl, a line for each, written when it begins."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import commit
from mechmerge.artifacts import write_text
from mechmerge.versions import versions

UNKNOWN = "not recorded"
"""The commit of what was there before any call was recorded."""


class Worked(NamedTuple):
    """What was done in a folder at one commit, with the same versions."""

    commit: str
    calls: int
    first: str
    """When the first of the calls began, UTC."""
    last: str
    """When the last one began."""
    evaluations: int
    """Evaluations of the folder that they made, of those that are there."""
    versions: str


def record(home: Path, arguments: Mapping[str, Any]) -> None:
    """Adds the call that begins now."""
    path = home / "calls.jsonl"
    line = {
        "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "commit": commit(),
        "versions": versions(),
        "arguments": dict(arguments),
        "evaluations there": _evaluations(home),
    }
    before = path.read_text("utf-8") if path.exists() else ""
    write_text(path, before + json.dumps(line, ensure_ascii=False) + "\n")


def worked(home: Path) -> list[Worked]:
    """What was done at each commit, in order; first what was there before any call was recorded."""
    path = home / "calls.jsonl"
    calls = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    there = [*(call["evaluations there"] for call in calls), _evaluations(home)]
    found = [Worked(UNKNOWN, 0, "", "", there[0], "")] if there[0] else []
    kinds: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for call, (before, after) in zip(calls, pairwise(there), strict=True):
        told = ", ".join(f"{name} {version}" for name, version in call["versions"].items())
        kinds.setdefault((call["commit"], told), []).append((call["date"], max(0, after - before)))
    for (at, told), made in kinds.items():
        found.append(Worked(at, len(made), made[0][0], made[-1][0], sum(count for _, count in made), told))
    return found


def _evaluations(home: Path) -> int:
    return sum(1 for _ in home.glob("evaluations/*/*.json"))
