"""Servers and workers under SIGKILL: `python -m benchmarks.service_kills [--quick] [--save]`.

Runs of the tiny pipeline in two slots; at random moments a worker, or the server, is killed (the server is started again at
once), fifty times in all; then the queue is left to end. Jobs are submitted between the kills, by the client of
`mechmerge submit`, which sends again what was not answered. The reference is a run without a server in the same process,
compared byte by byte. Goals: every job that was submitted is there once, ends once, as done, with the reference's bytes, and
no process is left, not even for the moment between two servers. `--quick` kills six times.
"""

from __future__ import annotations

import json
import random
import tempfile
import threading
import time
from pathlib import Path

import click
import psutil

from benchmarks.common import Goal, end_on_sigterm, finish
from mechmerge.models.references import resolve
from mechmerge.pipeline.run import run_pipeline
from mechmerge.service.client import Bundle, Client
from tests.serving import ServerProcess, light_files, submission, write_light
from tests.test_pipeline import content
from tests.tiny import tiny_expert, tiny_model

KILLS, QUICK = 50, 6
AT_ONCE = 2
"""Jobs that are queued or running at the same time, which is also the number of slots."""


@click.command()
@click.option("--quick", is_flag=True)
@click.option("--save", is_flag=True)
@click.option("--kills", type=click.IntRange(1), help=f"How many (default: {KILLS}; with --quick {QUICK}).")
@click.option("--seed", default=0, show_default=True)
@click.option("--database", help="URL of an empty PostgreSQL database (default: SQLite).")
def main(quick: bool, save: bool, kills: int | None, seed: int, database: str | None) -> None:
    """Kill servers and workers at random."""
    draw, kills = random.Random(seed), kills or (QUICK if quick else KILLS)
    start = time.monotonic()
    end_on_sigterm()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = resolve(str(tiny_model(root / "models" / "base")))
        expert = resolve(str(tiny_expert(base.path, root / "models" / "expert", seed=1)))
        began = time.monotonic()
        run_pipeline(write_light(root / "undisturbed", base, expert), root / "undisturbed" / "run")
        reference, pace = content(root / "undisturbed" / "run"), time.monotonic() - began
        sent = Bundle(submission(str(base.path), str(expert.path))["pipeline"], light_files())
        arguments = ["--allow-folder", str(root / "models"), "--slots", str(AT_ONCE), "--threads", "1"]
        arguments += ["--nice", "0", "--attempts", "1000"]
        arguments += ["--database", database] if database else []
        with ServerProcess(root / "data", *arguments) as server:
            queue = Queue(server, sent)
            queue.start()
            struck = {"server": 0, "worker": 0}
            orphans = 0
            while sum(struck.values()) < kills:
                time.sleep(draw.uniform(0, pace))
                workers = server.workers()
                if not workers:
                    continue
                if draw.random() < 0.5:
                    server.kill()
                    orphans += left_over(server)
                    server.start()
                    struck["server"] += 1
                else:
                    try:
                        draw.choice(workers).kill()
                    except psutil.NoSuchProcess:
                        continue
                    struck["worker"] += 1
                print(f"{sum(struck.values())} kills, {len(queue.ids)} jobs", flush=True)
            queue.stop()
            with Client(server.url) as client:
                wait_all(client, queue.ids)
                listed = [job["id"] for job in client.jobs(limit=200)]
                done = [client.job(id)["state"] == "done" for id in queue.ids]
                # The store counts; a server that was killed in between may not have come to tell the log.
                ends = [states(server.data / "jobs" / id / "log.jsonl") for id in queue.ids]
                differ = sum(content(server.data / "jobs" / id / "run") != reference for id in queue.ids)
            code = server.stop()
            orphans += left_over(server)
    figures = {
        "kills": sum(struck.values()),
        **{f"kills of the {name}": number for name, number in struck.items()},
        "jobs": len(queue.ids),
        "minutes": (time.monotonic() - start) / 60,
        "jobs lost": len(set(queue.ids) - set(listed)),
        "jobs doubled": len(listed) - len(set(listed) & set(queue.ids)),
        "jobs not ended once, as done": done.count(False) + sum(end not in (["done"], []) for end in ends),
        "jobs with other bytes": differ,
        "orphans": orphans,
        "exit code of the server": code,
    }
    names = ("jobs lost", "jobs doubled", "jobs not ended once, as done", "jobs with other bytes", "orphans")
    goals = {name: Goal(0) for name in names} | {"kills": Goal(kills, at_most=False), "jobs": Goal(1, at_most=False)}
    finish("service_kills", figures, goals, save, quick)


class Queue(threading.Thread):
    """Keeps jobs coming, through every kill."""

    def __init__(self, server: ServerProcess, sent: Bundle) -> None:
        super().__init__(daemon=True)
        self.server, self.sent = server, sent
        self.ids: list[str] = []
        self._over = threading.Event()

    def run(self) -> None:
        """Submits a job whenever fewer than so many have not ended."""
        while not self._over.is_set():
            try:
                with Client(self.server.url, patience=120) as client:
                    open_ = [job for job in client.jobs(("queued", "running")) if job["id"] in self.ids]
                    if len(open_) < AT_ONCE:
                        self.ids.append(client.submit(self.sent)["id"])
            except Exception as error:  # the server is away
                print(f"  queue: {error}", flush=True)
            self._over.wait(0.5)

    def stop(self) -> None:
        """No more jobs."""
        self._over.set()
        self.join()


def left_over(server: ServerProcess) -> int:
    """Workers that are still there a moment after their server ended."""
    until = time.monotonic() + 5
    while (left := server.workers()) and time.monotonic() < until:
        time.sleep(0.05)
    return len(left)


def wait_all(client: Client, ids: list[str]) -> None:
    """Waits until all jobs have ended."""
    while any(client.job(id)["state"] in ("queued", "running") for id in ids):
        time.sleep(0.5)


def states(log: Path) -> list[str]:
    """The states in which a job ended, by its log."""
    events = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
    return [event["text"] for event in events if event["type"] == "state" and event["text"] in ("done", "failed", "cancelled")]


if __name__ == "__main__":
    main()
