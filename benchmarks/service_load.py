"""Fifty clients at once while two jobs run: `python -m benchmarks.service_load [--quick] [--save]`.

A server of its own with two slots, each kept at work by tiny pipelines. Half of the clients ask again and again, as a page
that polls does (list, job, log, artifacts, figures, and the pages that the server has), half follow a job's event stream and
take the next one when it ends. Everything runs on this machine, clients included: they take part of its processors.
Goals: no answer but 2xx, no broken stream, p95 of the time to a whole answer at most 200 ms. Also told, without a goal: how
late events arrive. `--quick` takes 15 seconds in the place of 60.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np

from benchmarks.common import Goal, end_on_sigterm, finish
from mechmerge.models.references import resolve
from tests.serving import ServerProcess, submission
from tests.tiny import tiny_expert, tiny_model

CLIENTS = 50
PAUSE = 0.5
"""Seconds that a polling client waits on average between two requests."""
PAGES = ("/", "/jobs")
"""Asked as well where the server has them."""


class Record:
    """What the clients met."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.delays: list[float] = []
        self.errors: Counter[str] = Counter()


@click.command()
@click.option("--quick", is_flag=True)
@click.option("--save", is_flag=True)
@click.option("--seconds", default=None, type=float, help="Length (default: 60; with --quick 15).")
def main(quick: bool, save: bool, seconds: float | None) -> None:
    """Poll and follow a server at work."""
    end_on_sigterm()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = resolve(str(tiny_model(root / "models" / "base")))
        expert = resolve(str(tiny_expert(base.path, root / "models" / "expert", seed=1)))
        body = submission(str(base.path), str(expert.path))
        arguments = ("--allow-folder", str(root / "models"), "--slots", "2", "--threads", "1", "--quota", "1000")
        with ServerProcess(root / "data", *arguments) as server:
            record, busy = asyncio.run(load(server.url, body, seconds or (15 if quick else 60)))
    every = np.concatenate([np.array(times) for times in record.seconds.values()])
    for path, times in sorted(record.seconds.items()):
        print(f"{path:32s} n {len(times):6d}   p50 {np.percentile(times, 50):.4f} s   p95 {np.percentile(times, 95):.4f} s")
    for error, count in record.errors.most_common():
        print(f"{count} × {error}")
    figures = {
        "clients": CLIENTS,
        "requests": len(every),
        "jobs running, mean": busy,
        "errors": sum(record.errors.values()),
        "p50, s": float(np.percentile(every, 50)),
        "p95, s": float(np.percentile(every, 95)),
        "p99, s": float(np.percentile(every, 99)),
        "events": len(record.delays),
        "event delay p95, s": float(np.percentile(record.delays, 95)) if record.delays else None,
    }
    goals = {"errors": Goal(0), "p95, s": Goal(0.2), "jobs running, mean": Goal(1.5, at_most=False)}
    finish("service_load", figures, goals, save, quick)


async def load(url: str, body: dict[str, Any], seconds: float) -> tuple[Record, float]:
    """Fifty clients for so many seconds: what they met, and how many jobs ran on average meanwhile."""
    record, busy = Record(), []
    limits = httpx.Limits(max_connections=CLIENTS + 10, max_keepalive_connections=CLIENTS + 10)
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=30, limits=limits) as client:
        pages = [page for page in PAGES if (await client.get(page)).status_code == 200]
        await fill(client, body)
        await running(client, 2)
        until = time.monotonic() + seconds
        tasks = [asyncio.create_task(poll(client, pages, until, record, seed)) for seed in range(CLIENTS // 2)]
        tasks += [asyncio.create_task(follow(client, until, record)) for _ in range(CLIENTS - CLIENTS // 2)]
        while time.monotonic() < until:
            busy.append(await fill(client, body))
            await asyncio.sleep(1)
        await asyncio.gather(*tasks)
    return record, float(np.mean(busy))


async def fill(client: httpx.AsyncClient, body: dict[str, Any]) -> int:
    """Keeps the queue filled; how many jobs are running."""
    jobs = (await client.get("/api/service")).json()["jobs"]
    for _ in range(4 - jobs["queued"] - jobs["running"]):
        (await client.post("/api/jobs", json=body)).raise_for_status()
    return int(jobs["running"])


async def running(client: httpx.AsyncClient, number: int) -> None:
    """Waits until so many jobs run."""
    while len((await client.get("/api/jobs", params={"state": "running"})).json()["jobs"]) < number:
        await asyncio.sleep(0.2)


async def poll(client: httpx.AsyncClient, pages: list[str], until: float, record: Record, seed: int) -> None:
    """Asks for everything in turn."""
    draw = random.Random(seed)
    for path in paths(pages):
        if time.monotonic() >= until:
            return
        jobs = (await timed(client, "/api/jobs", record))["jobs"]
        if jobs:
            job = draw.choice(jobs)["id"]
            await timed(client, path.format(id=job), record, path)
        await asyncio.sleep(draw.uniform(0, 2 * PAUSE))


def paths(pages: list[str]) -> Iterator[str]:
    """What is asked for, in turn."""
    api = ["/api/jobs/{id}", "/api/jobs/{id}/log", "/api/jobs/{id}/artifacts", "/api/service", "/metrics", "/readyz"]
    return itertools.cycle(api + pages)


async def timed(client: httpx.AsyncClient, path: str, record: Record, name: str | None = None) -> dict[str, Any]:
    """One request, noted; its JSON, if it is some."""
    start = time.monotonic()
    try:
        answer = await client.get(path)
    except httpx.HTTPError as error:
        record.errors[f"{name or path}: {type(error).__name__}"] += 1
        return {"jobs": []}
    record.seconds[name or path].append(time.monotonic() - start)
    if not answer.is_success:
        record.errors[f"{name or path}: {answer.status_code}"] += 1
        return {"jobs": []}
    return dict(answer.json()) if answer.headers["Content-Type"].startswith("application/json") else {}


async def follow(client: httpx.AsyncClient, until: float, record: Record) -> None:
    """Follows running jobs, one after the other."""
    while time.monotonic() < until:
        jobs = (await timed(client, "/api/jobs?state=running", record))["jobs"]
        if not jobs:
            await asyncio.sleep(0.5)
            continue
        try:
            async with asyncio.timeout(max(0.1, until - time.monotonic())):
                await stream(client, random.choice(jobs)["id"], record)
        except TimeoutError:
            return
        except httpx.HTTPError as error:
            record.errors[f"stream: {type(error).__name__}"] += 1


async def stream(client: httpx.AsyncClient, id: str, record: Record) -> None:
    """Follows one job to its end."""
    opened, ended = time.time(), False
    async with client.stream("GET", f"/api/jobs/{id}/events", timeout=60) as answer:
        if answer.status_code != 200:
            record.errors[f"stream: {answer.status_code}"] += 1
        async for line in answer.aiter_lines():
            ended = ended or line == "event: end"
            if line.startswith("data: ") and not ended:
                told = json.loads(line[6:])["time"]
                if told > opened:
                    record.delays.append(time.time() - told)
    if not ended:
        record.errors["stream: broke off"] += 1


if __name__ == "__main__":
    main()
