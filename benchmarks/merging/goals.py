"""What a family must reach, where each goal stands, and the figures of a family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from benchmarks.common import Goal
from benchmarks.merging import arms as catalogue
from benchmarks.merging.arms import HEADLINE
from benchmarks.merging.found import BY_MEAN, BY_MIN, TUNED, Found
from benchmarks.merging.gains import Figure

LEAST_SEEDS = 3
"""Training seeds that a figure must rest on to count for a goal."""
FAR = 0.1
"""What counts as far above, in retained gain."""
ABOVE = 1e-6
"""A lower end of at least so much excludes 0."""


STATES = ("met", "missed", "not measured yet")


class Standing(NamedTuple):
    """Where a goal stands."""

    goal: Goal
    value: float | None
    """None until it is measured on some seed."""
    seeds: int
    """Seeds that the value rests on: the fewest of its parts."""
    lacking: str = ""
    """Why the value, or its absence, counts as missed whatever it is; empty where the bound decides."""
    final: bool = True
    """False where more measuring may still decide otherwise."""

    @property
    def met(self) -> bool:
        return self.value is not None and not self.lacking and self.goal.met(self.value)

    @property
    def bound(self) -> str:
        return "> 0" if self.goal.bound == ABOVE else str(self.goal)

    @property
    def state(self) -> str:
        """One of `STATES`."""
        return STATES[0] if self.met else STATES[1] if self.final else STATES[2]

    @property
    def verdict(self) -> str:
        return self.lacking or ("met" if self.met else "MISSED")


class Part(NamedTuple):
    """A figure that a goal rests on: what a role retains, or how much more than another one."""

    role: str
    other: str | None = None
    over: str = "mean"

    @property
    def roles(self) -> list[str]:
        return [self.role] if self.other is None else [self.role, self.other]


def judged(found: Found) -> tuple[dict[str, Any], dict[str, Goal]]:
    """The figures of a family and what they must reach; one that may not count for its goal stands under another name."""
    family, board = found.family, found.board
    figures: dict[str, Any] = {}
    for seed, skill in board.unclear if board is not None else ():
        figures[f"{family}: seed {seed} left out"] = f"its {skill} expert gains nothing for certain"
    for role in found.roles if board is not None else ():
        assert board is not None
        for over in ("mean", "min"):
            if (held := board.retained(role, over)) is not None:
                figures[f"{family}: {role}, retained {over}"] = held.told
    for (policy, other), difference in found.differences().items():
        figures |= {f"{family}: {policy} less {other}, {over}": figure.told for over, figure in difference.items()}
    made = standings(found)
    for name, standing in made.items():
        if standing.value is None:
            continue
        if standing.lacking:
            figures[f"{name}, withheld"] = f"{standing.value:.3f} seeds={standing.seeds} ({standing.lacking})"
        else:
            figures |= {name: standing.value, f"{name}, seeds": standing.seeds}
    return figures, {name: standing.goal for name, standing in made.items()}


def standings(found: Found) -> dict[str, Standing]:
    """Where every goal of a family stands, by the name of its figure."""
    wanted: dict[str, tuple[float, str, Sequence[Part]]] = {}
    if found.family == "conflict":
        wanted |= {
            f"{HEADLINE} retains on average": (0.9, "value", [Part(HEADLINE)]),
            f"{HEADLINE} above {BY_MEAN}": (0.1, "value", [Part(HEADLINE, BY_MEAN)]),
            f"{HEADLINE} above {BY_MIN}": (0.1, "value", [Part(HEADLINE, BY_MIN, "min")]),
        }
    if found.family == "mild":
        wanted[f"{HEADLINE} above {BY_MEAN}, lower end"] = (-0.05, "low", [Part(HEADLINE, BY_MEAN)])
    wanted |= {
        f"{HEADLINE} above its shuffles, lower end": (FAR, "low", [Part(HEADLINE, f"shuffles of {HEADLINE}")]),
        f"{HEADLINE} above {TUNED}, lower end": (ABOVE, "low", [Part(HEADLINE, TUNED)]),
    }
    for policy in (HEADLINE, *(arm.name for arm in catalogue.others() if "budget" in arm.parameters)):
        parts = [Part(policy, control) for control in found.controls[policy]]
        wanted[f"{policy} above each control, lower end"] = (ABOVE, "low", parts)
    return {f"{found.family}: {name}": _standing(found, *asked) for name, asked in wanted.items()}


def _standing(found: Found, bound: float, end: str, parts: Sequence[Part]) -> Standing:
    """Where a goal stands whose value is the least of its parts' `value`, or of their lower ends (`low`)."""
    goal, held = Goal(bound, at_most=False), [_figure(found, part) for part in parts]
    figures = [figure for figure in held if figure is not None]
    if len(figures) < len(parts):
        missing = [part for part, figure in zip(parts, held, strict=True) if figure is None]
        never = next(filter(None, (_never(found, part) for part in missing)), "")
        return Standing(goal, None, 0, never or f"not measured yet: {_absent(found, missing)}", final=bool(never))
    value = min(float(getattr(figure.interval, end)) for figure in figures)
    seeds = min(figure.seeds for figure in figures)
    if seeds < LEAST_SEEDS:
        return Standing(goal, value, seeds, f"too few seeds: {seeds} of {LEAST_SEEDS}", final=False)
    thinned = [role for part in parts for role in part.roles if _thinned(found, role)]
    return Standing(goal, value, seeds, f"missed: draws of {thinned[0]} were refused" if thinned else "")


def _figure(found: Found, part: Part) -> Figure | None:
    if found.board is None:
        return None
    if part.other is None:
        return found.board.retained(part.role, part.over)
    return found.board.difference(part.role, part.other, part.over)


def _never(found: Found, part: Part) -> str:
    """Why a part cannot have a figure on any of the seeds; empty where it may come to have one."""
    for role in part.roles:
        drawn = [found.drawn.get((role, seed)) for seed in found.studies]
        if all(one is not None and one.refused == one.asked for one in drawn):
            return f"missed: {role} was refused"
    unclear = {seed for seed, _ in found.board.unclear} if found.board is not None else set()
    return "missed: no seed whose experts all gain for certain" if unclear == set(found.studies) else ""


def _absent(found: Found, parts: Sequence[Part]) -> str:
    """What parts wait for: a policy that is absent is told without its controls."""
    board, absent = found.board, list[str]()
    for role in dict.fromkeys(role for part in parts for role in part.roles):
        if (board is None or not board.seeds(role)) and not any(role in found.controls.get(policy, ()) for policy in absent):
            absent.append(role)
    return ", ".join(absent) if absent else f"no seed has both {' and '.join(parts[0].roles)}"


def _thinned(found: Found, role: str) -> bool:
    """Whether a control has fewer draws than it should, on a seed where it counts."""
    seeds = found.board.seeds(role) if found.board is not None else ()
    return any(found.drawn[role, seed].refused for seed in seeds)
