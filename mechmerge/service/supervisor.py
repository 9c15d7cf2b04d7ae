"""The supervisor: one thread of the server that takes jobs from the queue, starts a worker process for each, keeps their
limits, and writes down how they ended.

A worker is a session of its own. It dies with the server; what a server that was killed left behind is ended and queued again
by the next one, which holds the data folder's lock.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sqlalchemy.exc import SQLAlchemyError

from mechmerge.artifacts import read_document
from mechmerge.errors import MechmergeError
from mechmerge.service.log import write_event
from mechmerge.service.metrics import Metrics
from mechmerge.service.problems import Problem
from mechmerge.service.processes import MARK, end_group, end_marked, memory_of
from mechmerge.service.settings import Settings
from mechmerge.service.store import LEASE, Claim, Job, Store
from mechmerge.service.worker import Orders, Outcome, no_memory, outcome_file

LOG = logging.getLogger("mechmerge.service")
TICK = 0.25
"""Seconds between two looks at workers and queue."""
WEIGH = 2.0
"""Seconds between two looks at memory, disk and leases."""
KEPT = ("MECHMERGE_CACHE",)
"""What workers get of the server's own environment variables; the others are for the server, and may hold passwords."""


@dataclass
class Running:
    """A worker at work."""

    job: Job
    claim: Claim
    folder: Path
    process: subprocess.Popen[bytes]
    since: float
    """By the monotonic clock."""
    stamps: dict[str, int]
    """Stages that were finished when it started, with the time of their stamps."""
    verdict: tuple[Literal["failed", "cancelled"], Problem | None] | None = None
    """Why it is being ended."""
    seconds: float = field(default=0.0)
    """How long it worked; set when it is gone."""


class Supervisor:
    """Runs the jobs of a store.

    Args:
        settings: the server's.
        store: the jobs.
        instance: name of the data folder.
        metrics: told of workers and ends.
    """

    def __init__(self, settings: Settings, store: Store, instance: str, metrics: Metrics) -> None:
        self.settings, self.store, self.instance, self.metrics = settings, store, instance, metrics
        self.name = machine() + secrets.token_hex(8)
        self.running: list[Running] = []
        self.heard = time.monotonic()
        """When it last went once around."""
        self._weighed = 0.0
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._loop, name="supervisor", daemon=True)

    # ---------------------------------------------------------------------------------------------------- start and stop
    def start(self) -> None:
        """Takes over what an earlier server left, and goes to work."""
        self._thread.start()

    def stop(self) -> None:
        """Ends all workers; their jobs go back into the queue."""
        self._stop.set()
        self._wake.set()
        self._thread.join(timeout=60)

    def wake(self) -> None:
        """Lets it look at the queue now."""
        self._wake.set()

    @property
    def is_alive(self) -> bool:
        """Whether it went around lately."""
        return self._thread.is_alive() and time.monotonic() - self.heard < LEASE

    def _loop(self) -> None:
        while not self._stop.is_set():
            try:
                self._once()
                self.heard = time.monotonic()
            except SQLAlchemyError as error:
                LOG.error("the store cannot be reached, trying again: %s", " ".join(str(error).split())[:200])
                self._stop.wait(1)
            except Exception:
                LOG.exception("the supervisor goes on after an error")
                self._stop.wait(1)
            self._wake.wait(TICK)
            self._wake.clear()
        self._end_all()

    # --------------------------------------------------------------------------------------------------------- the round
    def _once(self) -> None:
        for worker in list(self.running):
            if worker.process.poll() is not None:
                self._ended(worker)
        self._obey()
        if time.monotonic() - self._weighed > WEIGH:
            self._recover()
            self._weigh()
            self._weighed = time.monotonic()
        while len(self.running) < self.settings.slots and self.has_space():
            job = self.store.claim(self.name, self.settings.quota_running)
            if job is None:
                break
            try:
                self._start(job)
            except OSError:  # no process, or no folder: not for ever
                LOG.exception("job %s: its worker cannot be started", job.id)
                claim = Claim(job.id, self.name, job.attempt)
                self.store.requeue(claim, seconds=0.0, died="worker", attempts=self.settings.attempts)
                break

    def has_space(self) -> bool:
        """Whether enough of the disk is free."""
        return shutil.disk_usage(self.settings.data).free >= self.settings.free_disk

    def _start(self, job: Job) -> None:
        """Starts a worker."""
        settings, claim = self.settings, Claim(job.id, self.name, job.attempt)
        folder = settings.jobs / job.id
        run = settings.jobs / (job.parent or job.id) / "run"
        orders = Orders(
            kind=job.kind,
            folder=folder,
            run=run,
            attempt=job.attempt,
            parent=os.getpid(),
            threads=settings.threads or max(1, (os.cpu_count() or 1) // max(1, settings.slots)),
            settings=settings.model_copy(update={"database": None}),
            request=job.request,
        )
        stamps = _stamps(run)
        write_event(folder / "log.jsonl", job.attempt, "state", "running")
        with (folder / "worker.log").open("ab") as output:
            process = subprocess.Popen(
                # -P: the working folder holds the user's files, and nothing is imported from there.
                [sys.executable, "-P", "-m", "mechmerge.service.worker"],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=folder / "input",
                env=self._environment(job.id, orders.threads),
                start_new_session=True,
            )
        self.running.append(Running(job, claim, folder, process, time.monotonic(), stamps))
        self.metrics.started()
        with contextlib.suppress(BrokenPipeError):  # it died already: its end is seen in the next round
            assert process.stdin is not None  # noqa: S101 - a pipe was asked for
            process.stdin.write(orders.model_dump_json().encode() + b"\n")
            process.stdin.flush()

    def _environment(self, id: str, threads: int) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name in KEPT or not name.startswith(("MECHMERGE_", "PG", "PYTHONSTARTUP"))
        }
        return kept | {
            MARK: self._mark(id),
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_DATASETS_TRUST_REMOTE_CODE": "0",
            "PYTHONSAFEPATH": "1",
        }

    def _mark(self, id: str) -> str:
        return f"{self.instance}/{id}"

    # ----------------------------------------------------------------------------------------------- orders from outside
    def _obey(self) -> None:
        """Ends workers whose jobs were cancelled, or are no longer ours."""
        for claim in self.store.cancels([w.claim for w in self.running if w.verdict is None]):
            for worker in self.running:
                if worker.claim == claim:
                    self._end(worker, "cancelled", None)

    def _weigh(self) -> None:
        """Says again that we answer for our jobs, and ends workers that took more than they may."""
        self.store.renew([w.claim for w in self.running])
        limits = self.settings.limits
        memory = memory_of([w.process.pid for w in self.running]) if limits.memory else {}
        for worker in self.running:
            if worker.verdict is not None:
                continue
            taken = worker.job.seconds + time.monotonic() - worker.since
            if taken > limits.seconds:
                self._end(worker, "failed", _beyond("time", f"{limits.seconds:g} s", f"{taken:.0f} s", "--time"))
            elif limits.memory and memory[worker.process.pid] > limits.memory:
                self._end(worker, "failed", no_memory(f"{memory[worker.process.pid] / 1e9:.2f} GB used"))
            elif limits.disk and (size := folder_size(worker.folder)) > limits.disk:
                wanted = f"at most {limits.disk / 1e9:g} GB in the job's folder"
                self._end(worker, "failed", _beyond("disk", wanted, f"{size / 1e9:.3f} GB", "--disk"))

    def _end(self, worker: Running, state: Literal["failed", "cancelled"], error: Problem | None) -> None:
        worker.verdict = (state, error)
        end_group(worker.process.pid)

    # ----------------------------------------------------------------------------------------------------------- endings
    def _ended(self, worker: Running) -> None:
        """Writes down how a worker ended. It stays in the list until that is done, should the store not answer."""
        worker.seconds = worker.seconds or time.monotonic() - worker.since
        _let_go(worker)
        end_group(worker.process.pid)
        if not end_marked(self._mark(worker.job.id)):
            LOG.error("job %s: a process that it started cannot be killed", worker.job.id)
            return
        state = self._settle(worker)
        self.running.remove(worker)
        self.metrics.ended(worker.job.kind, state or "lost", worker.seconds)

    def _settle(self, worker: Running) -> str | None:
        outcome = read_outcome(worker.folder, worker.claim.attempt)
        log = worker.folder / "log.jsonl"
        if worker.verdict is not None and outcome is None:
            state, error = worker.verdict
            held = self.store.finish(worker.claim, state, seconds=worker.seconds, error=error)
            if held:
                write_event(log, worker.claim.attempt, "state", state)
            return state if held else None
        if outcome is not None:
            held = self.store.finish(
                worker.claim, outcome.state, seconds=worker.seconds, result=outcome.result, error=outcome.error
            )
            if held:
                write_event(log, worker.claim.attempt, "state", outcome.state)
            return outcome.state if held else None
        advanced = _stamps(self.settings.jobs / (worker.job.parent or worker.job.id) / "run") != worker.stamps
        now = self.store.requeue(
            worker.claim, seconds=worker.seconds, died="worker", advanced=advanced, attempts=self.settings.attempts
        )
        if now is not None:
            code = worker.process.returncode
            write_event(
                log, worker.claim.attempt, "note", f"the worker died ({f'signal {-code}' if code < 0 else f'exit {code}'})"
            )
            write_event(log, worker.claim.attempt, "state", now)
        return "crashed"

    def _end_all(self) -> None:
        """The server stops: its jobs go back into the queue, to go on when it is there again."""
        for worker in self.running:
            end_group(worker.process.pid)
        for worker in list(self.running):
            worker.process.wait()
            _let_go(worker)
            worker.seconds = time.monotonic() - worker.since
            end_marked(self._mark(worker.job.id))
            try:
                if worker.verdict is not None or read_outcome(worker.folder, worker.claim.attempt) is not None:
                    self._settle(worker)
                elif now := self.store.requeue(worker.claim, seconds=worker.seconds):
                    write_event(worker.folder / "log.jsonl", worker.claim.attempt, "state", now)
            except SQLAlchemyError:
                LOG.error("job %s: the store cannot be reached; the next server takes it over", worker.job.id)
            self.running.remove(worker)

    def _recover(self) -> None:
        """Takes up jobs whose server is gone: ends what it left running, and queues them again.

        A server of this machine, started since it was, is gone where we hold the data folder's lock; of another machine we
        wait for the end of its lease. A job of our own without a worker is one whose claim was made but not answered.
        """
        ours = {worker.claim for worker in self.running}
        for claim, over in self.store.claimed():
            if claim in ours or not (over or claim.server.startswith(machine())):
                continue
            if not end_marked(self._mark(claim.id)):
                LOG.error("job %s: what an earlier server started cannot be killed", claim.id)
                continue
            folder = self.settings.jobs / claim.id
            outcome = read_outcome(folder, claim.attempt)
            if outcome is not None:
                state: str | None = outcome.state
                self.store.finish(claim, outcome.state, seconds=0.0, result=outcome.result, error=outcome.error)
            else:
                job = self.store.job(claim.id)
                stamps = _stamps(self.settings.jobs / (job.parent or job.id) / "run")
                advanced = any(stamp / 1e9 > (job.started or 0.0) for stamp in stamps.values())
                state = self.store.requeue(
                    claim, seconds=0.0, died="server", advanced=advanced, attempts=self.settings.interruptions
                )
                write_event(folder / "log.jsonl", claim.attempt, "note", "the server was interrupted")
            if state is not None:
                write_event(folder / "log.jsonl", claim.attempt, "state", state)


def _let_go(worker: Running) -> None:
    """Closes our end of a worker's lifeline."""
    assert worker.process.stdin is not None  # noqa: S101 - a pipe was asked for
    with contextlib.suppress(BrokenPipeError):
        worker.process.stdin.close()


def machine() -> str:
    """A short name of this machine since it was started; empty where the system does not tell one."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").replace("-", "")[:8]
    except OSError:
        return ""


def read_outcome(folder: Path, attempt: int) -> Outcome | None:
    """How an attempt ended; None where it died, which a file that cannot be read is as good as."""
    path = outcome_file(folder, attempt)
    try:
        return read_document(Outcome, path) if path.is_file() else None
    except MechmergeError as error:
        LOG.error("%s", error)
        return None


def folder_size(folder: Path) -> int:
    """Bytes of the files below a folder, links not followed; files that go meanwhile count nothing."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.lstat().st_size
    return total


def _stamps(run: Path) -> dict[str, int]:
    """The finished stages of a run, with the time of their stamps."""
    found = {}
    for path in run.glob(".state/*.json"):
        with contextlib.suppress(OSError, json.JSONDecodeError):
            found[path.name] = path.stat().st_mtime_ns
    return found


def _beyond(where: str, expected: str, found: str, option: str) -> Problem:
    fix = f"make the pipeline smaller and send it again, or ask for `mechmerge serve {option}` and resume"
    return Problem(where=where, expected=expected, found=found, fix=fix)
