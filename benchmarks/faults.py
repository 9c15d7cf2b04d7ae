"""Every command under every fault of the machine: `python -m benchmarks.faults [--quick] [--save]`.

run, localize, effects, merge and evaluate on a tiny project (an adapter that the cache has to make included), and publish
against the loopback Hub of `tests/hub`. Each is killed (SIGKILL) at 50 moments, half of them drawn by the clock and half among
the moments at which it touches the disk; and interrupted (Ctrl-C), out of room on the disk, cut off in the middle of a write,
misread, run beside another call of itself, and given a model whose weights change while they are read. Where the system allows
a mount, also on a file system that is too small. What must hold after each, and after the same command again, stands in
`tests/faults/campaign.py`; the reference is an undisturbed call in the same run. Goal: no problem in any case.
"""

from __future__ import annotations

import itertools
import random
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click

from benchmarks.common import Goal, finish
from tests.faults.campaign import CHANGES, IMPORTS, Campaign, Verdict, moments
from tests.faults.project import COMMANDS, Command
from tests.hub.campaign import Campaign as Publishing
from tests.hub.merges import sources
from tests.hub.runner import Runner
from tests.hub.ways import WAYS

HELD = re.compile(r"found process \d+ on \S+ since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC")
"""What a second call is told of the first."""


@click.command()
@click.option("--quick", is_flag=True)
@click.option("--save", is_flag=True)
@click.option("--kills", default=50, show_default=True, help="Moments at which each command is killed.")
@click.option("--others", default=5, show_default=True, help="Moments of every other fault.")
@click.option("--command", "commands", multiple=True, type=click.Choice([*COMMANDS, "publish"]), help="Only these; repeat.")
@click.option("--seed", default=0, show_default=True)
def main(quick: bool, save: bool, kills: int, others: int, commands: tuple[str, ...], seed: int) -> None:
    """Strike every command with every fault."""
    kills, others = (4, 1) if quick else (kills, others)
    chosen = commands or (*COMMANDS, "publish")
    verdicts: list[Verdict] = []
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        wanted = [command for command in COMMANDS if command in chosen]
        if wanted:
            with Campaign(root / "campaign") as campaign:
                for command in wanted:
                    verdicts += told(command, of_command(campaign, command, kills, others, seed))
        if "publish" in chosen:
            verdicts += told("publish", of_publish(root, kills, others, seed))
    kinds = Counter(verdict.case.split(" at ")[0].split(" after ")[0] for verdict in verdicts)
    print(", ".join(f"{kind}: {count}" for kind, count in sorted(kinds.items())))
    figures = {
        "cases": len(verdicts),
        **{f"cases, {command}": sum(v.case.startswith(f"{command}:") for v in verdicts) for command in chosen},
        "minutes": (time.monotonic() - start) / 60,
        "first calls that were killed": sum(v.code < 0 for v in verdicts),
        "first calls that answered in one line": sum(v.code in (2, 4) for v in verdicts),
        "first calls that were interrupted": sum(v.code == 130 for v in verdicts),
        "first calls that got over it": sum(v.code == 0 for v in verdicts),
        "problems": sum(bool(v.problems) for v in verdicts),
    }
    goals = {"problems": Goal(0)} | {f"cases, {command}": Goal(kills, at_most=False) for command in chosen}
    finish("faults", figures, goals, save, quick)


def told(command: str, cases: Iterator[Verdict]) -> list[Verdict]:
    """The cases of a command, carried out, with what went wrong printed at once."""
    found = []
    for verdict in cases:
        found.append(verdict)
        for problem in verdict.problems:
            print(f"{verdict.case}: {problem}", flush=True)
    print(f"{command}: {len(found)} cases, {sum(bool(v.problems) for v in found)} with problems", flush=True)
    return found


def of_command(campaign: Campaign, command: Command, kills: int, others: int, seed: int) -> Iterator[Verdict]:
    """All the cases of one command."""
    draw, whole = random.Random(seed), campaign.whole(command)
    writes, reads = whole.moments["write"], whole.moments["read"]
    for at in moments(writes, kills - kills // 2, seed):
        yield campaign.struck(command, "kill", at)
    for _ in range(kills // 2):
        yield campaign.by_clock(command, signal.SIGKILL, draw.uniform(0.02, 1.0))
    for at in moments(writes, others, seed + 1):
        yield campaign.struck(command, "interrupt", at)
    for _ in range(others):
        yield campaign.by_clock(command, signal.SIGINT, draw.uniform(0.02, 1.0))
    for at in moments(writes, others, seed + 2):
        yield campaign.struck(command, "full", at)
    for at in moments(reads, others, seed + 3):
        yield campaign.struck(command, "unreadable", at)
    for _ in range(others):
        yield campaign.struck(command, "short", draw.randint(1, 60_000))
    for change, at in itertools.product(CHANGES, moments(writes, others, seed + 4)):
        yield campaign.changed(command, at, change)
    yield from beside(campaign, command, moments(writes, others, seed + 5))
    yield from small_disks(campaign, command, others, draw)


def beside(campaign: Campaign, command: Command, places: list[int]) -> Iterator[Verdict]:
    """Two calls at once: the second is told who holds what it wants, or wants nothing that the first holds at that moment."""
    with Runner(campaign.environment, campaign.root / "second", IMPORTS) as other:
        for at in places:
            second, verdict = campaign.beside(command, at, other)
            if second.code not in (0, 2):
                verdict.problems.append(f"the second call ended with {second.code}: {second.err[-300:]}")
            elif second.code == 2 and not HELD.search(second.err):
                verdict.problems.append(f"the second call was not told who holds it: {second.err[-300:]}")
            yield verdict


def small_disks(campaign: Campaign, command: Command, number: int, draw: random.Random) -> Iterator[Verdict]:
    """File systems too small for the command's output, where this user may mount."""
    try:
        for _ in range(number):
            yield campaign.small_disk(command, draw.randint(1, 60) * 4096)
    except PermissionError as error:
        print(f"{command}: no small file systems here ({error})")


def of_publish(root: Path, kills: int, others: int, seed: int) -> Iterator[Verdict]:
    """Kills and interruptions by the clock; `benchmarks.publish_faults` strikes at every request."""
    draw = random.Random(seed)
    (states,) = sources(root / "sources", ["main"]).values()
    for xet in (False, True):
        with Publishing(root / f"publish-{xet}", *states, xet=xet, way=WAYS["main"]) as campaign:
            start = campaign.start(False)
            campaign.hub.restore(start.state)
            began = time.monotonic()
            campaign.publish(campaign.new)
            seconds = time.monotonic() - began
            for number, count in ((signal.SIGKILL, kills), (signal.SIGINT, others)):
                for _ in range((count + xet) // 2):
                    after = draw.uniform(0.05, 1.0) * seconds
                    code, problems = campaign.struck_after(after, number, first=draw.random() < 0.5)
                    yield Verdict(f"publish: {number.name} after {after:.2f} s", code, "", problems)


if __name__ == "__main__":
    main()
