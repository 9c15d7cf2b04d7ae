"""The report of what is finished and of what is missing: HOME/report/report.md, a picture a family, and all figures."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import Goal, commit, saved
from benchmarks.merging import arms as catalogue
from benchmarks.merging.arms import HEADLINE
from benchmarks.merging.calls import Worked, worked
from benchmarks.merging.families import COMMITTED_AT, FAMILIES, committed
from benchmarks.merging.found import BY_MEAN, BY_MIN, TUNED, Found, gather
from benchmarks.merging.gains import Board
from benchmarks.merging.goals import LEAST_SEEDS, STATES, Standing, judged, standings
from benchmarks.merging.steps import STEPS
from benchmarks.merging.study import Sizes, Study
from benchmarks.merging.tables import develop, gains_row, picture, place, rates_row, table
from mechmerge.artifacts import write_text

HEAD = f"""# Merging: retained gains

An expert's retained gain is (merged − base) / (expert − base) on its own suite of the test split: 0 is the base, 1 the expert.
`mean` and `min` are over the experts of a family, for each training seed, and then averaged over seeds. Intervals are of 95 %;
a goal needs {LEAST_SEEDS} training seeds: with fewer it is not measured yet, and counts as missed.

- Policies: `{HEADLINE}` is the headline; a policy with a budget is named after it.
- `shuffles of`, `norm-matched of`, `magnitude of` a policy: its controls, with its shares of every layer, kind and expert.
- `best …`: the setting of a baseline that retains most on the develop split; `{BY_MEAN}` and `{BY_MIN}`: of all
  settings of all baselines. Nothing is chosen on the test split.
- `{TUNED}`: the sum of the experts, fine-tuned on the answers that the policies measure (equal information). It costs as
  much as the dearer of the measurements of `effects` and `rounds`, whichever policy it is compared with.

The headline policy was named before any run of this benchmark, but after its results on the test split with the experts of
`conflict`, seed 0, had been seen in the demo (benchmarks/results/demo-2026-11-22.json). Which tokens its loss weighs and
how sure a change must be were changed after a first run of that seed, whose test answers had been seen too, and chosen on its
develop split (benchmarks/log.md, 2026-11-28): seed 0 of `conflict` flatters it, seeds 1 and 2 do not.
"""


def report(
    home: Path, sizes: Sizes, families: Sequence[str], seeds: Sequence[int], save: bool, quick: bool, part: str = ""
) -> tuple[dict[str, Any], dict[str, Goal]]:
    """Writes the report and returns the benchmark's figures and goals; `part` says what is reported where that is not all."""
    folder = home / "report"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    done = worked(home)
    figures: dict[str, Any] = {"families": ", ".join(families), "training seeds": ", ".join(map(str, seeds))}
    for one in done:
        name = f"evaluations in the folder, commit {one.commit}"
        figures[name] = figures.get(name, 0) + one.evaluations
    goals: dict[str, Goal] = {}
    parts: list[str] = []
    stand: list[Standing] = []
    for family in families:
        found = gather(home, sizes, family, seeds)
        own, wanted = judged(found)
        figures |= own
        goals |= wanted
        stand += standings(found).values()
        parts.append(section(found))
        if found.board is not None:
            picture(found, folder / f"{family}.png")
    head = [HEAD, *(["Quick: two dozen prompts a suite; the figures mean nothing.\n"] if quick else []), made_at(done)]
    write_text(folder / "report.md", "\n".join([*head, f"Goals of all families: {_counted(stand)}.\n", *parts]))
    if save:
        kept = saved("merging", quick, part)
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(folder, kept)
    return figures, goals


def made_at(done: Sequence[Worked]) -> str:
    """Which commits the evaluations come from."""
    rows = [
        {"commit": one.commit, "calls": one.calls or "", "first": one.first, "last": one.last, "evaluations": one.evaluations,
         "versions": one.versions} for one in done
    ]  # fmt: skip
    told = [f"This report was made at commit {commit()}. The calls that worked in the folder:", "", *table(rows)]
    return "\n".join(
        [*(told if rows else [f"This report was made at commit {commit()}; no call has worked in the folder."]), ""]
    )


# ------------------------------------------------------------------------------------------------------------------- sections
def section(found: Found) -> str:
    """A family in Markdown: what is missing, where its goals stand, and its tables."""
    lines = [f"## {found.family}", "", f"Skills: {', '.join(FAMILIES[found.family])}.", "", *_notes(found)]
    lines += ["### Goals", "", *_goals(found), "### Done and missing", "", *_progress(found)]
    lines += _test_split(found, found.board) if found.board is not None else []
    for seed, study in found.studies.items():
        lines += develop(found, seed, study)
    return "\n".join(lines)


def _test_split(found: Found, board: Board) -> list[str]:
    """The tables of the test split."""
    lines = []
    for seed, skill in board.unclear:
        lines += [f"Seed {seed} is left out of retained gains: its {skill} expert gains nothing for certain.", ""]
    roles = sorted(dict.fromkeys(role for role, _ in board.cells), key=lambda role: place(found, role))
    gains = [gains_row(found, board, role) for role in roles if role in found.roles]
    differences = []
    for (policy, other), held in found.differences().items():
        one = held["mean"]
        row = {"policy": policy, "less": other, "seeds": one.seeds, "interval over": one.over}
        differences.append(row | {over: str(value) for over, value in held.items()})
    lines += ["### Retained gains, test split", "", *table(gains), ""]
    lines += ["### Differences of retained gain, test split", "", *table(differences), ""]
    return [*lines, "### Pass rates, test split", "", *table([rates_row(board, role) for role in roles]), ""]


def _notes(found: Found) -> list[str]:
    """What a reader must know of the models that are compared."""
    lines = []
    for seed in found.studies:
        older = [skill for skill, training in FAMILIES[found.family].items() if committed(training, seed) is not None]
        if older:
            those, are = " and ".join(older), "adapters are" if len(older) > 1 else "adapter is"
            lines.append(
                f"Seed {seed}'s {those} {are} the demo's, from an older training script (commit {COMMITTED_AT}) than those of "
                "other seeds."
            )
    solved = [arm for arm in catalogue.others() if arm.measured == "solution"]
    ran = [
        seed
        for seed, study in found.studies.items()
        if any(study.solution_file(arm).exists() or study.done(arm.name, "test") for arm in solved)
    ]
    if ran:
        lines.append(
            f"`solve` ran with unproven=True (seeds {', '.join(map(str, ran))}): it was not checked whether the predictions of "
            "its effects come true."
        )
    return [text for line in lines for text in (line, "")]


def _goals(found: Found) -> list[str]:
    """Where every goal stands, the numbers of each first."""
    made = standings(found)
    rows = [
        {
            "goal": name.removeprefix(f"{found.family}: "),
            "bound": one.bound,
            "figure": "" if one.value is None else f"{one.value:.3f}",
            "seeds": one.seeds or "",
            "verdict": one.verdict,
        }
        for name, one in made.items()
    ]
    if not found.begun:
        return [f"None is measured yet: {'; '.join(str(row['goal']) for row in rows)}.", ""]
    return [f"{_counted(made.values())}.", "", *table(rows), ""]


def _counted(made: Iterable[Standing]) -> str:
    """How many goals stand how."""
    states = Counter(one.state for one in made)
    return ", ".join(f"{states[state]} {state}" for state in STATES)


def _progress(found: Found) -> list[str]:
    """What is done of what, by seed and step; controls that are begun; refusals."""
    lines = []
    if not found.begun:
        lines += ["Nothing is evaluated yet.", ""]
    elif found.board is None:
        lines += ["No seed has the base and all of its experts on the test split yet, so that there are no figures.", ""]
    lines += ["Evaluations (of `experts`: adapters) that are done of all; what is not whole is bold.", ""]
    rows = []
    for seed, steps in found.steps.items():
        cells = {step: f"{done}/{total}" if done == total else f"**{done}/{total}**" for step, (done, total) in steps.items()}
        rows.append({"seed": seed} | {step: cells[step] for step in STEPS})
    lines += [*table(rows), ""]
    for seed, study in found.studies.items():
        begun = [
            f"{role} {drawn}"
            for (role, at), drawn in found.drawn.items()
            if at == seed and drawn.asked > 1 and drawn.done > 0 and not drawn.whole
        ]
        if begun:
            lines += [f"Seed {seed}, begun and not in the tables yet: {'; '.join(begun)}.", ""]
        lines += _refusals(found, seed, study)
    return lines


def _refusals(found: Found, seed: int, study: Study) -> list[str]:
    """What refused, by reason, and which controls have fewer draws for it."""
    reasons: dict[str, list[str]] = {}
    for file in sorted((study.folder / "recipes").glob("*/refused.json")):
        reasons.setdefault(str(study.refused(file.parent.name)), []).append(f"`{file.parent.name}`")
    lines = [f"Seed {seed}, refused: {', '.join(names)}, because: {reason}" for reason, names in reasons.items()]
    fewer = [f"{r} {d}" for (r, at), d in found.drawn.items() if at == seed and d.refused and d.asked > 1]
    lines += [f"Seed {seed}, draws that are left: {'; '.join(fewer)}."] if fewer else []
    return [text for line in lines for text in (line, "")]
