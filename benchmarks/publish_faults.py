"""Publishing under every fault at every request, in LFS and xet mode: `python -m benchmarks.publish_faults [--quick] [--save]`.

The real command line and the real clients (huggingface_hub, hf_xet) against the loopback Hub of `tests/hub`. Onto main every
kind of fault strikes every request; in the other ways to publish (onto a branch, as a pull request, directly, score files as a
data set) every request is struck by one kind, dealt out in turn, and by every kind with `--thorough`. What a case is and what
must hold after it stands in `tests/hub/campaign.py`; the reference is an undisturbed publication in the same run. Goals: main
(or what is published onto in its place) is broken by none, every second run finishes, and nothing that is stored is sent again.
`--quick` draws one case of every kind onto main in either mode.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from queue import Empty, SimpleQueue

import click

from benchmarks.common import Goal, finish
from tests.hub.campaign import Campaign, Case, Verdict
from tests.hub.faults import KINDS
from tests.hub.merges import sources
from tests.hub.ways import WAYS, Name

CASES = 400
"""At least so many onto main are a full campaign: else the publisher's requests were not all found."""
DEALT = 40
"""The same in another way, where every request is struck once."""


@click.command()
@click.option("--quick", is_flag=True)
@click.option("--save", is_flag=True)
@click.option("--way", "ways", multiple=True, type=click.Choice(list(WAYS)), help="Only these; repeat (default: all).")
@click.option("--thorough", is_flag=True, help="Every kind at every request in every way (hours).")
@click.option("--jobs", default=4, show_default=True, help="Hubs at work at once; clients wait more than they work.")
def main(quick: bool, save: bool, ways: tuple[Name, ...], thorough: bool, jobs: int) -> None:
    """Strike every request of a publication with every fault."""
    ways = ways or (("main",) if quick else tuple(WAYS))
    verdicts: list[Verdict] = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        states = sources(Path(folder), ways)
        for way, xet in itertools.product(ways, (False, True)):
            with ExitStack() as stack:
                root = Path(folder) / f"{way}-{xet}"
                hubs = [
                    stack.enter_context(Campaign(root / str(job), *states[way], xet=xet, way=WAYS[way]))
                    for job in range(1 if quick else jobs)
                ]
                cases = list(hubs[0].cases(dealt=way != "main" and not thorough and not quick))
                found = carry_out(hubs, drawn(cases) if quick else cases)
            problems = sum(bool(verdict.problems) for verdict in found)
            print(f"{way}, {'xet' if xet else 'lfs'}: {len(found)} cases, {problems} with problems", flush=True)
            verdicts += found
    for verdict in verdicts:
        for problem in verdict.problems:
            print(f"{verdict.case}: {problem}")
    kinds = Counter(f"{'xet' if verdict.case.xet else 'lfs'} {verdict.case.kind}" for verdict in verdicts)
    print(", ".join(f"{kind}: {count}" for kind, count in sorted(kinds.items())))
    figures = {
        "cases": len(verdicts),
        **{f"cases, {way}": sum(verdict.case.way == way for verdict in verdicts) for way in ways},
        "minutes": (time.monotonic() - start) / 60,
        "faults that struck": sum(verdict.struck for verdict in verdicts),
        "first runs that got over the fault": sum(verdict.code == 0 for verdict in verdicts),
        "main_broken": sum(bool(verdict.main_broken) for verdict in verdicts),
        "reruns_failed": sum(bool(verdict.rerun_failed) for verdict in verdicts),
        "objects_sent_twice": sum(bool(verdict.sent_twice) for verdict in verdicts),
    }
    goals = {name: Goal(0) for name in ("main_broken", "reruns_failed", "objects_sent_twice")}
    full = {f"cases, {way}": CASES if way == "main" or thorough else DEALT for way in ways}
    least = {"cases": 2 * len(KINDS) * len(ways)} if quick else full
    goals |= {name: Goal(bound, at_most=False) for name, bound in least.items()}
    finish("publish_faults", figures, goals, save, quick)


def carry_out(campaigns: list[Campaign], cases: list[Case]) -> list[Verdict]:
    """Runs cases of one way and mode on several Hubs at once."""
    waiting: SimpleQueue[Case] = SimpleQueue()
    for case in cases:
        waiting.put(case)

    def work(campaign: Campaign) -> list[Verdict]:
        return [campaign.run(case) for case in rest(waiting)]

    with ThreadPoolExecutor(len(campaigns)) as pool:
        return [verdict for verdicts in pool.map(work, campaigns) for verdict in verdicts]


def drawn(cases: list[Case]) -> list[Case]:
    """One case of every kind, by a fixed seed."""
    draw = random.Random(0)
    return [draw.choice([c for c in cases if c.kind == kind]) for kind in KINDS]


def rest(queue: SimpleQueue[Case]) -> Iterator[Case]:
    """What is left in a queue that others empty as well."""
    with contextlib.suppress(Empty):
        while True:
            yield queue.get_nowait()


if __name__ == "__main__":
    main()
