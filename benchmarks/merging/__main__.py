"""Do mechanism-aware recipes beat what people merge with today, and their own controls? `python -m benchmarks.merging`.

    python -m benchmarks.merging --folder DIR --family conflict               # the first wave of one family, then its second
    python -m benchmarks.merging --folder DIR --family conflict --seed 0 --only policies --only shuffles --minutes 50
    python -m benchmarks.merging --folder DIR --plan                          # what is done, what is left, how long it takes
    python -m benchmarks.merging --folder DIR --report [--save]               # figures, tables, goals, and what is missing

Three families of experts (families.py) with three training seeds each; every baseline at the best setting of a stated sweep
(arms.py), which is chosen on the develop split; every policy with its controls at the same shares; fine-tuning of the sum with
equal information (tuning.py). What counts is the retained gain on the test split, 396 prompts a model (492 with JSON), with
intervals over topics and seeds (gains.py). Nothing is chosen on test; the headline policy, `rounds`, was
named before any run of this benchmark, but not before the demo had asked both policies these prompts with the experts of
`conflict`, seed 0, and the tokens that its loss weighs and the certainty of its changes were chosen on develop after a run of
that seed (benchmarks/log.md).

Goals: on `conflict` the headline policy retains ≥ .9 on average, and its mean and minimum are ≥ 10 points above those of the
baselines that are best on develop by the mean and by the minimum; on `mild` the lower end of its difference to the best
baseline is ≥ −5 points; shuffles of equal shares are ≥ 10 points below it (lower end); it and every policy at 10, 25 and 50 %
is above each of its controls, and it is above fine-tuning with equal information (lower ends above 0). A goal's figure rests on
three training seeds at least; one that is not there yet, or rests on fewer, is a goal that is missed.

A call goes on where an earlier one stopped, at the batch; one call at a time works in a folder. It keeps everything but the
merges (about 70 MB of answers and recipes a family and seed, 1.1 GB more while fine-tunings wait for their test). A policy
that has changed needs a new folder, or its recipes and evaluations removed.

--plan counts what is done and left. All three families and seeds are 2390 evaluations at most, 36 fine-tunings and 10
trainings: some 116 evaluations a family and seed in the first wave, of which 82 are the sweep (101 for `three-way`), and 144
in the second, where each policy at each budget has eleven controls. An evaluation was 21-43 s in the demo's runs on two free
cores and is counted as 45. So the first wave is about 3 hours a family and seed (10 hours for `conflict`, with its trainings;
30 for all) and the second 2.2 (20 for all). These are estimates: fine-tuning (35 minutes a step size on one core) counts as
half of that on two, and solutions were never timed at full size.
`--quick` has two dozen prompts a suite, one round and two settings; its figures mean nothing, and with some twenty
evaluations, effects and rounds it takes several minutes on two free cores, not one.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import click

from benchmarks.common import finish
from benchmarks.merging import calls
from benchmarks.merging.families import FAMILIES
from benchmarks.merging.report import report
from benchmarks.merging.steps import STEPS, expected, finished, hours, tasks
from benchmarks.merging.study import FULL, QUICK, Paused, Sizes, Study
from mechmerge.artifacts import lock
from mechmerge.cli.common import LineProgress, set_threads

SEEDS = (0, 1, 2)


@click.command()
@click.option("--quick", is_flag=True, help="One family and seed, two dozen prompts a suite; the figures mean nothing.")
@click.option("--save", is_flag=True, help="Keep the figures, and the report beside them, under benchmarks/results/.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where everything is kept; a call that was stopped goes on.")
@click.option("--family", "families", multiple=True, type=click.Choice(tuple(FAMILIES)), help="Can be given again.")
@click.option("--seed", "seeds", multiple=True, type=click.IntRange(0), help="Of the experts; can be given again.  [0, 1, 2]")
@click.option("--only", multiple=True, type=click.Choice(STEPS), help="A step; can be given again.")
@click.option("--minutes", type=click.FloatRange(0), help="Begin nothing new after so long.")
@click.option("--report", "reported", is_flag=True, help="Only report what is finished and what is missing.")
@click.option("--plan", "planned", is_flag=True, help="Only say what is done and what is left.")
@click.option("--threads", type=click.IntRange(1))
def main(
    quick: bool,
    save: bool,
    folder: Path | None,
    families: tuple[str, ...],
    seeds: tuple[int, ...],
    only: tuple[str, ...],
    minutes: float | None,
    reported: bool,
    planned: bool,
    threads: int | None,
) -> None:
    """Compare merges, in pieces if need be."""
    set_threads(threads)
    if folder is None and not quick:
        raise click.UsageError("the whole takes many hours: name a --folder that keeps what is done")
    sizes = QUICK if quick else FULL
    families = tuple(dict.fromkeys(families)) or usual_families(quick)
    seeds = tuple(dict.fromkeys(seeds)) or usual_seeds(quick)
    with tempfile.TemporaryDirectory() as scratch:
        home = (folder or Path(scratch)) / ("quick" if quick else "full")
        if planned:
            plan(home, sizes, families, seeds, only)
            return
        whole = reported or work(home, sizes, families, seeds, only, minutes)
        if not whole or (only and not reported):
            print(f"kept in {home}; the same call goes on, --plan says what is left")
            return
        part = part_of(families, seeds, quick)
        figures, goals = report(home, sizes, families, seeds, save, quick, part)
    finish("merging", figures, goals, save, quick, part)


def usual_families(quick: bool) -> tuple[str, ...]:
    """The families of a call that names none."""
    return ("conflict",) if quick else tuple(FAMILIES)


def usual_seeds(quick: bool) -> tuple[int, ...]:
    """The training seeds of a call that names none."""
    return (0,) if quick else SEEDS


def part_of(families: Sequence[str], seeds: Sequence[int], quick: bool) -> str:
    """What a save is called after where not all is reported: families and seeds that are not the usual ones."""
    named = [family for family in FAMILIES if family in families] if set(families) != set(usual_families(quick)) else []
    numbered = sorted(seeds) if set(seeds) != set(usual_seeds(quick)) else []
    return "-".join([*named, *(["seeds" if len(numbered) > 1 else "seed"] if numbered else []), *map(str, numbered)])


def work(
    home: Path,
    sizes: Sizes,
    families: Sequence[str],
    seeds: Sequence[int],
    only: Sequence[str],
    minutes: float | None,
) -> bool:
    """Does the steps in their order; False where the time was over before all were done."""
    progress = LineProgress()
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    studies: dict[tuple[str, int], Study] = {}
    with lock(home / ".lock", f"benchmark in {home}"), suppress(Paused):
        Study(families[0], seeds[0], home, sizes)  # refuses a folder of other settings before the call is recorded
        calls.record(home, {"families": families, "seeds": seeds, "only": only, "minutes": minutes})
        for task in tasks(families, seeds, only):
            progress.note(f"▶ {task.family}, seed {task.seed}: {task.name}")
            key = task.family, task.seed
            studies[key] = studies.get(key) or Study(*key, home, sizes, progress, deadline)
            task.work(studies[key])
        return True
    return False


def plan(home: Path, sizes: Sizes, families: Sequence[str], seeds: Sequence[int], only: Sequence[str]) -> None:
    """Prints, for every step, what is done of how much, and what the rest takes on two free cores."""
    whole: Counter[str] = Counter()
    left = 0.0
    print(f"{'family':10s} {'seed':>4s}  {'step':10s} {'done':>9s}  hours left of")
    for task in tasks(families, seeds, only):
        units = expected(task, sizes)
        done, total = finished(Study(task.family, task.seed, home, sizes), task.name)
        rest = hours(units) * (1 - done / total if total else 0)
        left, whole = left + rest, whole + Counter(units)
        print(f"{task.family:10s} {task.seed:4d}  {task.name:10s} {done:4d}/{total:4d}  {rest:5.2f}  {hours(units):5.2f}")
    print(", ".join(f"{count} × {name}" for name, count in whole.items()))
    print(f"{hours(dict(whole)):.1f} hours on two free cores, {left:.1f} of them left")


if __name__ == "__main__":
    main()
