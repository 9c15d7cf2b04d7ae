"""What is finished of a family: the answers by role and seed, and how far every step and every role has come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks.merging import arms as catalogue
from benchmarks.merging.families import FAMILIES
from benchmarks.merging.gains import Answers, Board, Figure
from benchmarks.merging.steps import STEPS, finished
from benchmarks.merging.study import Sizes, Study

BY_MEAN, BY_MIN, TUNED = "best baseline by mean", "best baseline by min", "fine-tuned"


class Drawn(NamedTuple):
    """The models that play a role with the experts of one seed."""

    asked: int
    done: int
    refused: int

    @property
    def whole(self) -> bool:
        """Whether all are there that were not refused, and one at least."""
        return self.done > 0 and self.done + self.refused == self.asked

    def __str__(self) -> str:
        told = f"{self.done}" if self.done == self.asked else f"{self.done} of {self.asked}"
        return told + (f", {self.refused} refused" if self.refused else "")


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
    drawn: dict[tuple[str, int], Drawn]
    """(role, seed) → its models; those that are not whole are not on the board."""
    steps: dict[int, dict[str, tuple[int, int]]]
    """Seed → step → (evaluations that are done, all of them); of `experts`, adapters."""

    @property
    def begun(self) -> bool:
        """Whether anything has been evaluated."""
        return any(done for steps in self.steps.values() for step, (done, _) in steps.items() if step != "experts")

    @property
    def roles(self) -> list[str]:
        """Roles on the board that merge experts."""
        if self.board is None:
            return []
        return [r for r in dict.fromkeys(role for role, _ in self.board.cells) if r not in ("base", *self.board.skills)]

    def pairs(self) -> Iterator[tuple[str, str]]:
        """(policy, what it is compared with): its controls, the best baselines, fine-tuning; the headline's rival as well."""
        for policy, drawn in self.controls.items():
            rivals = catalogue.TELLING[1:] if policy == catalogue.HEADLINE else ()
            yield from ((policy, other) for other in (*drawn, BY_MEAN, BY_MIN, TUNED, *rivals))

    def differences(self) -> dict[tuple[str, str], dict[str, Figure]]:
        """(policy, other) → how much more it retains, by `mean` and `min`, of all that can be compared."""
        made: dict[tuple[str, str], dict[str, Figure]] = {}
        for policy, other in self.pairs() if self.board is not None else ():
            assert self.board is not None
            held = {over: self.board.difference(policy, other, over) for over in ("mean", "min")}
            if told := {over: figure for over, figure in held.items() if figure is not None}:
                made[policy, other] = told
        return made


def gather(home: Path, sizes: Sizes, family: str, seeds: Iterable[int]) -> Found:
    """Reads everything that is finished of a family."""
    studies = {seed: Study(family, seed, home, sizes) for seed in seeds}
    cells: dict[tuple[str, int], list[Answers]] = {}
    named: dict[tuple[str, int], str] = {}
    drawn: dict[tuple[str, int], Drawn] = {}
    controls: dict[str, list[str]] = {}
    for seed, study in studies.items():
        roles: dict[str, list[str]] = {name: [name] for name in ("base", *study.skills)}
        for arm in (*catalogue.telling(), *catalogue.others()):
            roles[arm.name] = [arm.name]
            made = {role: [a.name for a in several] for role, several in catalogue.controls(arm, sizes.shuffles).items()}
            roles |= made
            controls[arm.name] = list(made)
        chosen = study.best() | ({TUNED: tuned} if (tuned := study.tuned()) else {})
        named |= {(role, seed): name for role, name in chosen.items()}
        roles |= {role: [name] for role, name in chosen.items()}
        for role, asked in roles.items():
            names = [name for name in asked if study.refused(name) is None]
            done = [name for name in names if study.done(name, "test")]
            drawn[role, seed] = Drawn(len(asked), len(done), len(asked) - len(names))
            if drawn[role, seed].whole and study.parents_done("test"):
                cells[role, seed] = [study.answers(name, "test") for name in done]
    board = Board(cells, tuple(FAMILIES[family]), resamples=400 if sizes.limit else 4000) if cells else None
    progress = {seed: {step: finished(study, step) for step in STEPS} for seed, study in studies.items()}
    return Found(family, studies, board, named, controls, drawn, progress)
