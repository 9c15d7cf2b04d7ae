"""Publishing under every fault at every request, in LFS and xet mode: `python -m benchmarks.publish_faults [--quick] [--save]`.

The real command line and the real clients (huggingface_hub, hf_xet) against the loopback Hub of `tests/hub`. What a case is and
what must hold after it stands in `tests/hub/campaign.py`; the reference is an undisturbed publication in the same run. Goals:
main is broken by none, every second run finishes, and nothing that is stored is sent again. `--quick` draws one case of every
kind in either mode.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
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
from tests.hub.merges import OPTIONS, tiny_merges

CASES = 400
"""At least so many are a full campaign: else the publisher's requests were not all found."""


@click.command()
@click.option("--quick", is_flag=True)
@click.option("--save", is_flag=True)
@click.option("--jobs", default=2, show_default=True, help="Hubs at work at once, in either mode.")
def main(quick: bool, save: bool, jobs: int) -> None:
    """Strike every request of a publication with every fault."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        older, newer = tiny_merges(Path(folder))
        arguments = [str(older), *OPTIONS], [str(newer), *OPTIONS]
        hubs = [
            stack.enter_context(Campaign(Path(folder) / f"{xet}-{job}", *arguments, xet=xet))
            for xet in (False, True)
            for job in range(jobs)
        ]
        verdicts = carry_out(hubs, quick)
    for verdict in verdicts:
        for problem in verdict.problems:
            print(f"{verdict.case}: {problem}")
    kinds = Counter(f"{'xet' if verdict.case.xet else 'lfs'} {verdict.case.kind}" for verdict in verdicts)
    print(", ".join(f"{kind}: {count}" for kind, count in sorted(kinds.items())))
    figures = {
        "cases": len(verdicts),
        "faults that struck": sum(verdict.struck for verdict in verdicts),
        "first runs that got over the fault": sum(verdict.code == 0 for verdict in verdicts),
        "main_broken": sum(bool(verdict.main_broken) for verdict in verdicts),
        "reruns_failed": sum(bool(verdict.rerun_failed) for verdict in verdicts),
        "objects_sent_twice": sum(bool(verdict.sent_twice) for verdict in verdicts),
    }
    goals = {name: Goal(0) for name in ("main_broken", "reruns_failed", "objects_sent_twice")}
    finish("publish_faults", figures, goals | {"cases": Goal(2 * len(KINDS) if quick else CASES, at_most=False)}, save, quick)


def carry_out(campaigns: list[Campaign], quick: bool) -> list[Verdict]:
    """Runs all cases (a seeded draw when quick), each on a Hub of its mode."""
    cases = [case for xet in (False, True) for case in next(each for each in campaigns if each.hub.xet == xet).cases()]
    waiting: dict[bool, SimpleQueue[Case]] = {xet: SimpleQueue() for xet in (False, True)}
    for case in drawn(cases) if quick else cases:
        waiting[case.xet].put(case)

    def work(campaign: Campaign) -> list[Verdict]:
        return [campaign.run(case) for case in rest(waiting[campaign.hub.xet])]

    with ThreadPoolExecutor(len(campaigns)) as pool:
        return [verdict for verdicts in pool.map(work, campaigns) for verdict in verdicts]


def drawn(cases: list[Case]) -> list[Case]:
    """One case of every kind in either mode, by a fixed seed."""
    draw = random.Random(0)
    return [draw.choice([c for c in cases if c.xet == xet and c.kind == kind]) for xet in (False, True) for kind in KINDS]


def rest(queue: SimpleQueue[Case]) -> Iterator[Case]:
    """What is left in a queue that others empty as well."""
    with contextlib.suppress(Empty):
        while True:
            yield queue.get_nowait()


if __name__ == "__main__":
    main()
