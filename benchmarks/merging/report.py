"""Figures, tables and goals of what is finished: HOME/report/report.md, a picture a family, and the benchmark's figures."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import RESULTS, Goal
from benchmarks.merging import arms as catalogue
from benchmarks.merging.arms import HEADLINE
from benchmarks.merging.families import FAMILIES
from benchmarks.merging.gains import Answers, Board, Figure
from benchmarks.merging.study import Sizes, Study
from mechmerge.artifacts import write_text
from mechmerge.evaluate.columns import Column
from mechmerge.report.style import figure

BY_MEAN, BY_MIN, TUNED = "best baseline by mean", "best baseline by min", "fine-tuned"
FAR = 0.1
"""What counts as far above, in retained gain."""
ABOVE = 1e-6
"""A lower end of at least so much excludes 0."""


class Found(NamedTuple):
    """What is known of one family."""

    family: str
    studies: dict[int, Study]
    board: Board | None
    """None until the base and the experts of some seed have answered."""
    named: dict[tuple[str, int], str]
    """(role, seed) → the setting that plays it, where it was chosen."""
    controls: dict[str, list[str]]
    """Policy → the roles of its controls."""


def gather(home: Path, sizes: Sizes, family: str, seeds: Iterable[int]) -> Found:
    """Reads everything that is finished of a family. A role of several models is there when all are that were not refused."""
    studies = {seed: Study(family, seed, home, sizes) for seed in seeds}
    cells: dict[tuple[str, int], list[Answers]] = {}
    named: dict[tuple[str, int], str] = {}
    controls: dict[str, list[str]] = {}
    for seed, study in studies.items():
        roles: dict[str, list[str]] = {name: [name] for name in ("base", *study.skills)}
        for arm in (*catalogue.telling(), *catalogue.others()):
            roles[arm.name] = [arm.name]
            drawn = {r: [a.name for a in made] for r, made in catalogue.controls(arm, sizes.shuffles).items()}
            roles |= drawn
            controls[arm.name] = list(drawn)
        if not all(study.done(name, "test") for name in ("base", *study.skills)):
            continue
        if all(study.done(name, "develop") for name in ("base", *study.skills)):
            chosen = study.best() | ({TUNED: tuned} if (tuned := study.tuned()) else {})
            named |= {(role, seed): name for role, name in chosen.items()}
            roles |= {role: [name] for role, name in chosen.items()}
        for role, asked in roles.items():
            names = [name for name in asked if study.refused(name) is None]
            if names and all(study.done(name, "test") for name in names):
                cells[role, seed] = [study.answers(name, "test") for name in names]
    skills = tuple(FAMILIES[family])
    board = Board(cells, skills, resamples=400 if sizes.limit else 4000) if cells else None
    return Found(family, studies, board, named, controls)


def report(
    home: Path, sizes: Sizes, families: Sequence[str], seeds: Sequence[int], save: bool, quick: bool
) -> tuple[dict[str, Any], dict[str, Goal]]:
    """Writes the report and returns the benchmark's figures and goals."""
    folder = home / "report"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    figures: dict[str, Any] = {}
    goals: dict[str, Goal] = {}
    parts = ["# Merging: retained gains\n"]
    for family in families:
        found = gather(home, sizes, family, seeds)
        own, wanted = judged(found)
        figures |= own
        goals |= wanted
        parts.append(section(found))
        if found.board is not None:
            picture(found, folder / f"{family}.png")
    write_text(folder / "report.md", "\n".join(parts))
    if save:
        kept = RESULTS / f"merging{'-quick' if quick else ''}-{time.strftime('%Y-%m-%d')}"
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(folder, kept)
    return figures, goals


# ------------------------------------------------------------------------------------------------------------------- figures
def judged(found: Found) -> tuple[dict[str, Any], dict[str, Goal]]:
    """The figures of a family and what they must reach."""
    family, board = found.family, found.board
    figures: dict[str, Any] = {}
    goals: dict[str, Goal] = {f"{family}: seeds": Goal(3, at_most=False)}
    if board is None:
        return figures, goals | _goals(found, {})
    figures[f"{family}: seeds"] = len(board.seeds(HEADLINE, BY_MEAN))
    for seed, skill in board.unclear:
        figures[f"{family}: seed {seed} left out"] = f"its {skill} expert gains nothing for certain"
    roles = [role for role in dict.fromkeys(role for role, _ in board.cells) if role not in ("base", *board.skills)]
    for role in roles:
        for over in ("mean", "min"):
            if (held := board.retained(role, over)) is not None:
                figures[f"{family}: {role}, retained {over}"] = f"{held} seeds={held.seeds}"
    differences: dict[tuple[str, str, str], Figure] = {}
    for role, other in [
        *((HEADLINE, other) for other in (BY_MEAN, BY_MIN, TUNED, "conflict")),
        *((policy, control) for policy, drawn in found.controls.items() for control in drawn),
    ]:
        for over in ("mean", "min"):
            if (difference := board.difference(role, other, over)) is not None:
                differences[role, other, over] = difference
                figures[f"{family}: {role} less {other}, {over}"] = str(difference)
    named = _numbers(found, differences)
    return figures | named, goals | _goals(found, named)


def _numbers(found: Found, differences: Mapping[tuple[str, str, str], Figure]) -> dict[str, float]:
    """The figures that goals are about, as far as they are there."""
    family, board = found.family, found.board
    assert board is not None
    numbers: dict[str, float] = {}
    if (held := board.retained(HEADLINE, "mean")) is not None:
        numbers[f"{family}: {HEADLINE} retains on average"] = held.interval.value
    for over, other in (("mean", BY_MEAN), ("min", BY_MIN)):
        if (difference := differences.get((HEADLINE, other, over))) is not None:
            numbers[f"{family}: {HEADLINE} above {other}"] = difference.interval.value
            numbers[f"{family}: {HEADLINE} above {other}, lower end"] = difference.interval.low
    if (difference := differences.get((HEADLINE, f"shuffles of {HEADLINE}", "mean"))) is not None:
        numbers[f"{family}: {HEADLINE} above its shuffles, lower end"] = difference.interval.low
    if (difference := differences.get((HEADLINE, TUNED, "mean"))) is not None:
        numbers[f"{family}: {HEADLINE} above {TUNED}, lower end"] = difference.interval.low
    for policy, drawn in found.controls.items():
        ends = [
            differences[policy, control, "mean"].interval.low for control in drawn if (policy, control, "mean") in differences
        ]
        if ends and len(ends) == len(drawn):
            numbers[f"{family}: {policy} above each control, lower end"] = min(ends)
    return numbers


def _goals(found: Found, numbers: Mapping[str, float]) -> dict[str, Goal]:
    family = found.family
    least = {
        f"{family}: {HEADLINE} above its shuffles, lower end": FAR,
        f"{family}: {HEADLINE} above {TUNED}, lower end": ABOVE,
    }
    if family == "conflict":
        least |= {
            f"{family}: {HEADLINE} retains on average": 0.9,
            f"{family}: {HEADLINE} above {BY_MEAN}": 0.1,
            f"{family}: {HEADLINE} above {BY_MIN}": 0.1,
        }
    if family == "mild":
        least[f"{family}: {HEADLINE} above {BY_MEAN}, lower end"] = -0.05
    budgets = [arm.name for arm in catalogue.others() if "budget" in arm.parameters]
    least |= {f"{family}: {policy} above each control, lower end": ABOVE for policy in (HEADLINE, *budgets)}
    return {name: Goal(bound, at_most=False) for name, bound in least.items()}


# -------------------------------------------------------------------------------------------------------------------- tables
def section(found: Found) -> str:
    """The tables of a family in Markdown."""
    family, board = found.family, found.board
    lines = [f"## {family}", "", f"Skills: {', '.join(FAMILIES[family])}.", ""]
    if board is None:
        return "\n".join([*lines, "Nothing is finished.", ""])
    lines += [f"Seeds {', '.join(map(str, board.whole))}; intervals of 95 % over topics and seeds.", ""]
    lines += [
        f"Seed {seed} is left out of retained gains: its {skill} expert gains nothing for certain."
        for seed, skill in board.unclear
    ]
    roles = list(dict.fromkeys(role for role, _ in board.cells))
    rows = []
    for role in sorted(roles, key=lambda r: _place(found, r)):
        row: dict[str, object] = {"model": role, "seeds": sum((role, seed) in board.cells for seed in board.whole)}
        row |= {skill: str(board.level(role, skill)) for skill in board.skills}
        row["worst format"] = _worst(board, role)
        if role not in ("base", *board.skills):
            row |= {f"retained, {over}": _shown(board.retained(role, over)) for over in (*board.skills, "mean", "min")}
        rows.append(row)
    lines += ["### Test split", "", *_table(rows), "", "### Differences of retained gain", ""]
    rows = list[dict[str, object]]()
    for policy, drawn in found.controls.items():
        others = [*drawn, BY_MEAN, BY_MIN, TUNED] if policy in catalogue.TELLING else [*drawn, BY_MEAN]
        for other in others:
            held = {over: board.difference(policy, other, over) for over in ("mean", "min")}
            if any(held.values()):
                row = {"model": policy, "less": other}
                rows.append(row | {over: _shown(value) for over, value in held.items()})
    lines += [*_table(rows), ""]
    for seed, study in found.studies.items():
        lines += _chosen(found, seed, study)
    return "\n".join(lines)


def _chosen(found: Found, seed: int, study: Study) -> list[str]:
    """The sweep of a seed on the develop split, what was chosen, what fine-tuning took, and what refused."""
    if not all(study.done(name, "develop") for name in ("base", *study.skills)):
        return []
    lines = [f"### Seed {seed}, develop split", ""]
    roles: dict[str, list[str]] = {}
    for (role, at), name in found.named.items():
        if at == seed:
            roles.setdefault(name, []).append(role)
    tuned = {n: study.retained(n, "develop") for n in map(study.tuned_name, study.sizes.rates) if study.done(n, "develop")}
    rows = []
    for name, shares in (study.swept() | tuned).items():
        values = list(shares.values())
        row = {"setting": name} | {skill: f"{share:.3f}" for skill, share in shares.items()}
        row |= {"mean": f"{sum(values) / len(values):.3f}", "min": f"{min(values):.3f}"}
        rows.append(row | {"chosen as": ", ".join(roles.get(name, []))})
    lines += [*_table(rows), ""]
    if not study.sweep_done():
        lines += ["The sweep is not whole: nothing is chosen from it yet.", ""]
    for log in sorted((study.folder / "tuned").glob("*.log.json")):
        record = json.loads(log.read_text("utf-8"))
        cost = record["cost"]
        lines += [
            f"{log.name.removesuffix('.log.json')}: {record['steps']} steps of {record['batch']} examples, "
            f"{record['forward-equivalents']} forward-equivalents; measuring took {cost['nodes']} examples both ways "
            f"with {cost['experts']} products each, and {cost['points']} forward. "
            f"Loss {record['loss'][0]:.3f} → {record['loss'][-1]:.3f}.",
            "",
        ]
    for file in sorted((study.folder / "recipes").glob("*/refused.json")):
        lines += [f"Refused: {file.parent.name}: {study.refused(file.parent.name)}", ""]
    return lines


def _worst(board: Board, role: str) -> str:
    """The worst format of a role, by its rate over all seeds and models that play it."""
    if "formats" not in board.skills:
        return ""
    rates: dict[str, list[float]] = {}
    for seed in board.whole:
        for answers in board.cells.get((role, seed), ()):
            for group, rate in by_group(answers["formats"]).items():
                rates.setdefault(group, []).append(rate)
    means = {group: sum(found) / len(found) for group, found in rates.items()}
    worst = min(means, key=lambda group: means[group])
    return f"{means[worst]:.3f} ({worst})"


def by_group(column: Column) -> dict[str, float]:
    """The mean of each group."""
    found: dict[str, list[float]] = {}
    for value, group in zip(column.values, column.groups, strict=True):
        found.setdefault(group, []).append(value)
    return {group: sum(values) / len(values) for group, values in found.items()}


def _place(found: Found, role: str) -> tuple[int, str]:
    """Where a role stands in tables: parents, policies, baselines, fine-tuning, controls."""
    board = found.board
    assert board is not None
    if role in ("base", *board.skills):
        return ("base", *board.skills).index(role), ""
    if role in found.controls:
        return 10, "" if role == HEADLINE else role
    if role.startswith("best"):
        return 11, "" if "baseline" in role else role
    return (12, role) if role == TUNED else (13, role)


def _shown(value: Figure | None) -> str:
    return "" if value is None else str(value)


def _table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows as a Markdown table, with the columns of all of them."""
    if not rows:
        return ["Nothing yet."]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in rows]


# ------------------------------------------------------------------------------------------------------------------- picture
def picture(found: Found, path: Path) -> None:
    """Retained gains of every role: filled the mean over experts, hollow the minimum, with their intervals."""
    board = found.board
    assert board is not None
    roles = [role for role in dict.fromkeys(role for role, _ in board.cells) if role not in ("base", *board.skills)]
    roles = [role for role in sorted(roles, key=lambda r: _place(found, r)) if board.retained(role, "mean") is not None]
    if not roles:
        return
    title = f"Retained gain on the test split, {found.family}: mean (filled) and minimum (hollow) over experts"
    with figure(path, title, 1, 0.6 + 0.24 * len(roles)) as (_, grid):
        axes = grid[0, 0]
        for row, role in enumerate(roles):
            for over, shift, face in (("mean", -0.14, "#2166ac"), ("min", 0.14, "white")):
                held = board.retained(role, over)
                assert held is not None
                value, low, high = held.interval
                arms = np.array([[value - low], [high - value]])
                axes.errorbar(value, row + shift, xerr=arms, fmt="o", ms=4, color="#2166ac", mfc=face, lw=1, capsize=2)
        for at, style in ((0, "-"), (1, "--")):
            axes.axvline(at, color="#8a8a8a", lw=0.7, ls=style, zorder=0)
        axes.set_yticks(range(len(roles)), roles)
        axes.set_ylim(len(roles) - 0.5, -0.5)
        axes.set_xlabel("0: base, 1: expert; 95 % over topics and seeds")
