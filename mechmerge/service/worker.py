"""The process that carries out one job: `python -m mechmerge.service.worker`, started by the supervisor and by nobody else.

Its orders are one line of JSON on stdin. Then stdin is its lifeline: when the server ends in whatever way, the pipe closes and
the worker kills its process group, itself included; on Linux the kernel does that too (`die_with`), should the interpreter be
busy. What it did so far stays in the run directory, where the next worker goes on.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, Literal

from mechmerge.artifacts import Document, parse_document, parse_json, read_text, write_json
from mechmerge.errors import MechmergeError, machine_error
from mechmerge.service.admission import PIPELINE, admit, check_repo, sent_files
from mechmerge.service.log import LogWriter
from mechmerge.service.problems import Problem, problem_of
from mechmerge.service.processes import die_with
from mechmerge.service.settings import Settings


class Orders(Document):
    """What a worker is told."""

    kind: Literal["run", "publish"]
    folder: Path
    """The job's."""
    run: Path
    """The run directory: the job's own, or that of the job whose merge is published."""
    attempt: int
    parent: int
    """The server's process."""
    threads: int
    settings: Settings
    request: dict[str, Any]
    """What a publication was asked for."""


class Outcome(Document):
    """How a worker ended, in `outcome-ATTEMPT.json`; without one it died."""

    state: Literal["done", "failed"]
    result: dict[str, Any] | None = None
    error: Problem | None = None


def outcome_file(folder: Path, attempt: int) -> Path:
    """Where the outcome of an attempt is written."""
    return folder / f"outcome-{attempt}.json"


class LogProgress:
    """Progress as events of the job's log; of a step's units at most one event a second."""

    def __init__(self, log: LogWriter) -> None:
        self.log = log
        self._label, self._done, self._total, self._told, self._said = "", 0, 0, 0, 0.0

    def start(self, label: str, total: int) -> None:
        self._label, self._done, self._total, self._told, self._said = label, 0, total, 0, time.monotonic()
        self.log.write("step", label, 0, total)

    def advance(self, units: int = 1) -> None:
        self._done += units
        if time.monotonic() - self._said >= 1:
            self._tell()

    def end(self) -> None:
        if self._done != self._told:
            self._tell()

    def _tell(self) -> None:
        self._told, self._said = self._done, time.monotonic()
        self.log.write("progress", self._label, self._done, self._total)

    def note(self, text: str) -> None:
        mark, _, name = text.partition(" ")
        if mark in ("▶", "✓"):  # as RunState says it
            self.log.stage = name.removesuffix(" (unchanged)")
            self.log.write("stage", "begins" if mark == "▶" else "unchanged")
        else:
            self.log.write("note", text)


def main() -> int:
    """Carries out the orders on stdin."""
    line = sys.stdin.buffer.readline()
    orders = parse_document(Orders, parse_json(line.decode(), "orders"), "orders")
    die_with(orders.parent)
    _hold_lifeline()
    _restrain(orders.settings)
    log = LogWriter(orders.folder / "log.jsonl", orders.attempt)
    outcome = carry_out(orders, LogProgress(log))
    if outcome.error is not None:
        error = outcome.error
        log.write("error", str(MechmergeError(error.where, expected=error.expected, found=error.found, fix=error.fix)))
    write_json(outcome_file(orders.folder, orders.attempt), outcome)
    return 0


def carry_out(orders: Orders, progress: LogProgress) -> Outcome:
    """Does the work; whatever goes wrong becomes an outcome of one line."""
    try:
        import torch

        torch.set_num_threads(orders.threads)
        result = _publish(orders, progress) if orders.kind == "publish" else _run(orders, progress)
    except MechmergeError as error:
        return Outcome(state="failed", error=_without_folders(problem_of(error), orders))
    except Exception as error:
        traceback.print_exc()
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "out of memory" in str(error):
            return Outcome(state="failed", error=no_memory("none left"))
        trouble = machine_error(error)
        if trouble is not None:
            return Outcome(state="failed", error=_without_folders(problem_of(trouble), orders))
        text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        problem = Problem(where="worker", expected="no bug, and a machine in order", found=text, fix="see the server's files")
        return Outcome(state="failed", error=_without_folders(problem, orders))
    return Outcome(state="done", result=result)


def no_memory(found: str) -> Problem:
    """Memory ran out."""
    return Problem(
        where="memory", expected="enough for this job", found=found,
        fix="use dtype bfloat16, smaller batches or fewer prompts, or ask for `mechmerge serve --memory`",
    )  # fmt: skip


def _run(orders: Orders, progress: LogProgress) -> dict[str, Any]:
    from mechmerge.pipeline.run import run_pipeline

    source = orders.folder / "input"
    admit(read_text(source / PIPELINE), sent_files(source), orders.settings)
    result = run_pipeline(source / PIPELINE, orders.run, progress, orders.settings.device)
    return {"gate": "passed" if result.gate.passed else "refused", "worked": list(result.worked)}


def _publish(orders: Orders, progress: LogProgress) -> dict[str, Any]:
    from mechmerge.publish.hub import publish

    request = dict(orders.request)
    repo = check_repo(request.pop("repo"), orders.settings)
    # The gate is always asked: there is no way to leave it out.
    published = publish(orders.run, repo, **request, progress=progress)
    return published.model_dump(mode="json")


def _without_folders(problem: Problem, orders: Orders) -> Problem:
    """A problem that names files as the user sent them, not as the server keeps them."""

    def cut(text: str | None) -> str | None:
        for folder, name in ((orders.folder / "input", ""), (orders.run, "RUN/"), (orders.folder, "JOB/")):
            text = None if text is None else text.replace(f"{folder}/", name).replace(str(folder), name or "input")
        return text

    return Problem(where=cut(problem.where) or "", expected=cut(problem.expected), found=cut(problem.found), fix=problem.fix)


def _hold_lifeline() -> None:
    """Watches stdin from a thread, and gives everybody else an empty one."""
    lifeline = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def watch() -> None:
        while os.read(lifeline, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="lifeline").start()


def _restrain(settings: Settings) -> None:
    """Leaves processor and memory to the server first, writes no core files and no file beyond the disk's limit."""
    os.umask(0o077)
    with contextlib.suppress(OSError):
        os.nice(settings.nice)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if settings.limits.disk:
        resource.setrlimit(resource.RLIMIT_FSIZE, (settings.limits.disk, settings.limits.disk))


if __name__ == "__main__":
    sys.exit(main())
