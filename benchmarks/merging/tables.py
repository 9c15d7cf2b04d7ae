"""Tables of what is finished of a family, in Markdown, and the picture of its retained gains."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.merging import arms as catalogue
from benchmarks.merging.arms import HEADLINE
from benchmarks.merging.found import TUNED, Found
from benchmarks.merging.gains import Board, Figure
from benchmarks.merging.study import Study
from mechmerge.evaluate.columns import Column
from mechmerge.report.style import figure


def gains_row(found: Found, board: Board, role: str) -> dict[str, object]:
    """What a role retains."""
    held = {over: board.retained(role, over) for over in ("mean", "min", *board.skills)}
    told = held["mean"]
    if told is None:
        return {"model": role, "models a seed": _models(found, role), "seeds": "none that counts"}
    row = {"model": role, "models a seed": _models(found, role), "seeds": told.seeds, "interval over": told.over}
    return row | {over: str(value) for over, value in held.items()}


def _models(found: Found, role: str) -> str:
    """How many models play a role: one number where it is the same for all seeds."""
    assert found.board is not None
    told = [str(found.drawn[role, seed]) for seed in found.board.whole if (role, seed) in found.board.cells]
    return told[0] if len(set(told)) == 1 else " / ".join(told)


def rates_row(board: Board, role: str) -> dict[str, object]:
    """How often a role passes."""
    held = {skill: board.level(role, skill) for skill in board.skills}
    told = next(iter(held.values()))
    if told is None:
        return {"model": role, "seeds": "none that counts"}
    row = {"model": role, "seeds": told.seeds, "interval over": told.over}
    return row | {skill: str(value) for skill, value in held.items()} | {"worst format": _worst(board, role)}


def develop(found: Found, seed: int, study: Study) -> list[str]:
    """The sweep of a seed on the develop split, what was chosen, and what fine-tuning took."""
    if not study.parents_done("develop"):
        return []
    lines = [f"### Seed {seed}, develop split", ""]
    roles: dict[str, list[str]] = {}
    for (role, at), name in found.named.items():
        if at == seed:
            roles.setdefault(name, []).append(role)
    tuned = {n: study.retained(n, "develop") for n in map(study.tuned_name, study.sizes.rates) if study.done(n, "develop")}
    arms = {arm.name: arm for arm in catalogue.sweep(study.skills, study.seed, study.sizes.few)}
    rows = []
    for name, shares in (study.swept() | tuned).items():
        values = list(shares.values())
        row = {"setting": name} | {skill: f"{share:.3f}" for skill, share in shares.items()}
        row |= {"mean": f"{sum(values) / len(values):.3f}", "min": f"{min(values):.3f}"}
        ends = catalogue.edges(arms[name], list(arms.values())) if name in roles and name in arms else []
        rows.append(row | {"chosen as": ", ".join(roles.get(name, [])), "at an end of the sweep": ", ".join(ends)})
    lines += [*(table(rows) if rows else ["No setting has been evaluated yet."]), ""]
    if not study.sweep_done():
        done, total = found.steps[seed]["sweep"]
        lines += [f"The sweep is not whole ({done} of {total}): nothing is chosen from it yet.", ""]
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


def place(found: Found, role: str) -> tuple[int, str]:
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


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
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
    held: dict[str, Figure] = {}
    for role in sorted(found.roles, key=lambda r: place(found, r)):
        if (mean := board.retained(role, "mean")) is not None:
            held[role] = mean
    if not held:
        return
    title = f"Retained gain on the test split, {found.family}: mean (filled) and minimum (hollow) over experts"
    with figure(path, title, 1, 0.6 + 0.24 * len(held)) as (_, grid):
        axes = grid[0, 0]
        for row, (role, mean) in enumerate(held.items()):
            least = board.retained(role, "min")
            assert least is not None
            for one, shift, face in ((mean, -0.14, "#2166ac"), (least, 0.14, "white")):
                value, low, high = one.interval
                arms = np.array([[value - low], [high - value]])
                axes.errorbar(value, row + shift, xerr=arms, fmt="o", ms=4, color="#2166ac", mfc=face, lw=1, capsize=2)
        for at, style in ((0, "-"), (1, "--")):
            axes.axvline(at, color="#8a8a8a", lw=0.7, ls=style, zorder=0)
        kinds = {one.over for one in held.values()}
        mixed = len(kinds) > 1
        axes.set_yticks(range(len(held)), [f"{r} (1 seed)" if mixed and one.seeds == 1 else r for r, one in held.items()])
        axes.set_ylim(len(held) - 0.5, -0.5)
        over = "topics and seeds, of one seed over topics (and draws)" if mixed else kinds.pop()
        axes.set_xlabel(f"0: base, 1: expert; 95 % over {over}")
