"""What every benchmark shares: its table, its last line of JSON, its exit code and its dated file.

`python -m benchmarks.NAME [--quick] [--save]` prints a table of figures against their goals, and as its last line one
JSON object; it exits 1 when a goal is missed; `--save` also writes `benchmarks/results/NAME-DATE.json`.
"""

from __future__ import annotations

import json
import platform
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechmerge.versions import versions

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Goal:
    """A bound that a figure must keep."""

    bound: float
    at_most: bool = True

    def met(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.bound:g}"


def end_on_sigterm() -> None:
    """Lets SIGTERM end a benchmark as an error does, so that the servers it started end with it and its folders are removed."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def processor() -> str:
    """The processor's name and the number of cores."""
    import os

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{name}, {os.cpu_count()} cores"


def commit() -> str:
    """The checkout's commit, marked where files differ from it."""
    root = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--", "../mechmerge", "../benchmarks", "../recipes"],
        cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    dirty = [line for line in changed.stdout.splitlines() if "benchmarks/results" not in line]
    return (head.stdout.strip() or "unknown") + ("+changes" if dirty else "")


def saved(name: str, quick: bool = False, part: str = "") -> Path:
    """Where today's figures of a benchmark are kept, without an ending; `part` says which part of it was run."""
    return RESULTS / "-".join([name, *filter(None, [part, "quick" if quick else ""]), time.strftime("%Y-%m-%d")])


def finish(name: str, figures: dict[str, Any], goals: dict[str, Goal], save: bool, quick: bool = False, part: str = "") -> None:
    """Prints figures and goals, saves if asked, and exits 1 when a goal is missed; one whose figure is absent is missed."""
    met = all(figure in figures and goal.met(float(figures[figure])) for figure, goal in goals.items())
    for figure, value in figures.items():
        goal = goals.get(figure)
        verdict = "" if goal is None else f"   goal {goal}: {'met' if goal.met(float(value)) else 'MISSED'}"
        print(f"{figure:44s} {value if not isinstance(value, float) else f'{value:.4g}'}{verdict}")
    for figure in filter(lambda name: name not in figures, goals):
        print(f"{figure:44s} absent   goal {goals[figure]}: MISSED")
    record = {
        "name": name,
        "quick": quick,
        "figures": figures,
        "goals": {figure: str(goal) for figure, goal in goals.items()},
        "met": met,
        "commit": commit(),
        "versions": versions(),
        "cpu": processor(),
    }
    if save:
        kept = saved(name, quick, part)
        path = kept.with_name(f"{kept.name}.json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(record, ensure_ascii=False))
    sys.exit(0 if met else 1)
