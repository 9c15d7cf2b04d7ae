"""The order of the work: what tells most comes first, and a call may do any part of it.

First wave   for each family and seed: experts, parents, the telling policies and their shuffles, the sweep of the baselines
             with its best settings on test, fine-tuning with equal information
Second wave  the other policies at their budgets, and the remaining controls of all policies
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from benchmarks.merging import arms as catalogue
from benchmarks.merging.arms import Arm
from benchmarks.merging.families import FAMILIES, committed
from benchmarks.merging.study import Sizes, Study

SECONDS = {"evaluation": 45, "baseline merge": 10, "merge": 4, "training": 400, "effects": 170, "rounds": 410, "scores": 330,
           "solution": 180, "fine-tuning": 1100}  # fmt: skip
"""What a unit takes on two free cores: measured in the demo's runs, fine-tuning on one core (35 min), solutions not at all."""


def experts(study: Study) -> None:
    """Trains the experts."""
    assert study.experts


def parents(study: Study) -> None:
    """Base and experts on both splits."""
    study.parents()


def policies(study: Study) -> None:
    """The telling policies on test."""
    for arm in catalogue.telling():
        study.evaluate_arm(arm, "test")


def shuffles(study: Study) -> None:
    """The shuffles of the telling policies on test."""
    for arm in catalogue.telling():
        _controls(study, arm, lambda role: role.startswith("shuffles"))


def sweep(study: Study) -> None:
    """Every baseline at every setting on develop."""
    for arm in catalogue.sweep(study.skills, study.seed, study.sizes.few):
        study.evaluate_arm(arm, "develop")


def baselines(study: Study) -> None:
    """The best settings on test; nothing before the sweep is whole and the parents have answered on develop."""
    if not study.choosable():
        study.progress.note(f"{study.family}, seed {study.seed}: no setting is chosen before `parents` and `sweep` are done")
    chosen = set(study.best().values())
    for arm in catalogue.sweep(study.skills, study.seed, study.sizes.few):
        if arm.name in chosen:
            study.evaluate_arm(arm, "test")


def equal(study: Study) -> None:
    """Fine-tuning with equal information, on develop and the best on test."""
    study.equal_information()


def others(study: Study) -> None:
    """The other policies on test."""
    for arm in catalogue.others():
        study.evaluate_arm(arm, "test")


def controls(study: Study) -> None:
    """All controls of all policies on test."""
    for arm in (*catalogue.telling(), *catalogue.others()):
        _controls(study, arm, lambda role: True)


def _controls(study: Study, arm: Arm, wanted: Callable[[str], bool]) -> None:
    if not study.done(arm.name, "test"):
        return  # its policy refuses
    for role, drawn in catalogue.controls(arm, study.sizes.shuffles).items():
        for control in drawn if wanted(role) else ():
            study.evaluate_arm(control, "test")


WAVES: tuple[tuple[Callable[[Study], None], ...], ...] = (
    (experts, parents, policies, shuffles, sweep, baselines, equal),
    (others, controls),
)
STEPS = tuple(step.__name__ for wave in WAVES for step in wave)


class Task(NamedTuple):
    """A step of one study."""

    family: str
    seed: int
    name: str
    work: Callable[[Study], None]


def tasks(families: Sequence[str], seeds: Sequence[int], only: Sequence[str] = ()) -> Iterator[Task]:
    """The steps that are asked for, in order."""
    for wave in WAVES:
        for family in families:
            for seed in seeds:
                for step in wave:
                    if not only or step.__name__ in only:
                        yield Task(family, seed, step.__name__, step)


def expected(task: Task, sizes: Sizes) -> dict[str, int]:
    """Units of a step, as many as it has when nothing is done yet and nothing is refused."""
    skills = len(FAMILIES[task.family])
    swept = catalogue.sweep(list(FAMILIES[task.family]), task.seed, sizes.few)
    telling, rest = catalogue.telling(), catalogue.others()

    def drawn(arms: Sequence[Arm], only: str = "") -> int:
        return sum(len(d) for a in arms for r, d in catalogue.controls(a, sizes.shuffles).items() if r.startswith(only))

    match task.name:
        case "experts":
            earlier = itertools.takewhile(lambda family: family != task.family, FAMILIES)
            shared = {training for family in earlier for training in FAMILIES[family].values()}
            own = [t for t in FAMILIES[task.family].values() if t not in shared and committed(t, task.seed) is None]
            return {"training": len(own)}
        case "parents":
            return {"evaluation": 2 * (skills + 1)}
        case "policies":
            return {"effects": 1, "rounds": 1, "merge": len(telling), "evaluation": len(telling)}
        case "shuffles":
            return {"merge": drawn(telling, "shuffles"), "evaluation": drawn(telling, "shuffles")}
        case "sweep":
            return {"baseline merge": len(swept), "evaluation": len(swept)}
        case "baselines":
            count = _chosen_at_most(tuple(FAMILIES[task.family]), task.seed, sizes)
            return {"baseline merge": count, "evaluation": count}
        case "equal":
            return {"fine-tuning": len(sizes.rates), "evaluation": len(sizes.rates) + 1}
        case "others":
            solved = sum(arm.measured == "solution" for arm in rest)
            return {"scores": 1, "solution": solved, "merge": len(rest), "evaluation": len(rest)}
        case _:
            count = drawn([*telling, *rest]) - drawn(telling, "shuffles")
            return {"merge": count, "evaluation": count}


def _chosen_at_most(skills: Sequence[str], seed: int, sizes: Sizes) -> int:
    """Settings that are asked on test: the best of each baseline, and the best of all by the minimum where it is another."""
    return len({arm.policy for arm in catalogue.sweep(skills, seed, sizes.few)}) + 1


def hours(units: dict[str, int]) -> float:
    """What units take on two free cores."""
    return sum(SECONDS[name] * count for name, count in units.items()) / 3600


def finished(study: Study, name: str) -> tuple[int, int]:
    """(evaluations that are done, all) of a step; for `experts`, adapters."""
    telling, rest = catalogue.telling(), catalogue.others()
    swept = [arm.name for arm in catalogue.sweep(study.skills, study.seed, study.sizes.few)]

    def test(names: Sequence[str]) -> tuple[int, int]:
        known = [n for n in names if study.refused(n) is None]
        return sum(study.done(n, "test") for n in known), len(known)

    def drawn(arms: Sequence[Arm], shuffled: bool | None = None) -> list[str]:
        return [
            a.name
            for arm in arms
            if study.refused(arm.name) is None
            for role, made in catalogue.controls(arm, study.sizes.shuffles).items()
            for a in made
            if shuffled is None or role.startswith("shuffles") == shuffled
        ]

    match name:
        case "experts":
            return sum(study.trained(skill) for skill in study.skills), len(study.skills)
        case "parents":
            roles = ("base", *study.skills)
            return sum(study.done(r, split) for r in roles for split in ("develop", "test")), 2 * len(roles)
        case "policies":
            return test([arm.name for arm in telling])
        case "shuffles":
            return test(drawn(telling, True))
        case "sweep":
            return sum(study.done(n, "develop") for n in swept), sum(study.refused(n) is None for n in swept)
        case "baselines":
            if not study.choosable():
                return 0, _chosen_at_most(study.skills, study.seed, study.sizes)
            return test(sorted(set(study.best().values())))
        case "equal":
            tuned = study.tuned()
            rates = [study.tuned_name(rate) for rate in study.sizes.rates]
            held = sum(study.done(n, "develop") for n in rates)
            return held + (tuned is not None and study.done(tuned, "test")), len(rates) + 1
        case "others":
            return test([arm.name for arm in rest])
        case _:
            done, total = test([*drawn(telling, False), *drawn(rest)])
            return done, total
