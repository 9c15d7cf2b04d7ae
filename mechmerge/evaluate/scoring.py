"""From verdicts to metrics: flat names, tiers, groups, instructions, and paired tests.

A suite with groups: `SUITE` is the mean over groups of the share of passing answers, `SUITE.min` the worst group, `SUITE.GROUP`
one group. A suite by instruction (IFEval): `SUITE` is the share of prompts whose every instruction is followed,
`SUITE.instruction` the share of instructions, `SUITE.TYPE` that of one type. `SUITE.loose` and `SUITE.loose-instruction` are
the loose reading. All are on prompts worded as in training; `…@unseen` is the same on unseen wordings,
`…@hard` on what is harder than anything trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mechmerge.evaluate.columns import Column
from mechmerge.evaluate.record import EvaluateSettings, Metric, PairTest
from mechmerge.evaluate.statistics import holm, interval, p_value, paired
from mechmerge.evaluate.suites import Suite

MIN_GROUPS = 3
"""A suite of fewer groups shows no `min`: of two groups both are in the breakdown."""


def columns(suite: Suite, rows: Sequence[Mapping[str, Any]]) -> dict[str, Column]:
    """The outcomes of every metric of a suite by flat name, a tier's headlines before its parts.

    Args:
        suite: what was asked.
        rows: one for each prompt, in order, with a list of verdicts a reading (see `judging.judge_row`).
    """
    found: dict[str, Column] = {}
    for tier, at in (("seen", ""), ("unseen", "@unseen"), ("hard", "@hard")):
        mine = [(prompt, row) for prompt, row in zip(suite.prompts, rows, strict=True) if prompt.tier == tier]
        if mine:
            made = _by_group(suite, mine) if suite.breakdown == "group" else _by_instruction(suite, mine)
            found |= {f"{name}{at}": column for name, column in made.items()}
    return found


def _by_group(suite: Suite, rows: Sequence[tuple[Any, Mapping[str, Any]]]) -> dict[str, Column]:
    found: dict[str, Column] = {}
    groups = list(dict.fromkeys(prompt.group for prompt, _ in rows))
    for reading in suite.readings:
        name = suite.name if reading == "strict" else f"{suite.name}.{reading}"
        found[name] = _prompts(rows, reading, [prompt.group for prompt, _ in rows])
    whole = found[suite.name]
    if len(groups) >= MIN_GROUPS:
        found[f"{suite.name}.min"] = whole._replace(over="min", headline=False)
    for group in groups if len(groups) > 1 else []:
        part = [(prompt, row) for prompt, row in rows if prompt.group == group]
        found[f"{suite.name}.{group}"] = _prompts(part, "strict", [group] * len(part))._replace(headline=False)
    return found


def _by_instruction(suite: Suite, rows: Sequence[tuple[Any, Mapping[str, Any]]]) -> dict[str, Column]:
    found: dict[str, Column] = {}
    for reading in suite.readings:
        prompts = suite.name if reading == "strict" else f"{suite.name}.{reading}"
        instructions = f"{suite.name}.{'' if reading == 'strict' else 'loose-'}instruction"
        found[prompts] = _prompts(rows, reading, ["all"] * len(rows))
        found[instructions] = _instructions(rows, reading)
    present = {i.verifier.name for prompt, _ in rows for i in prompt.instructions}
    for kind in [group for group in suite.groups if group in present]:
        found[f"{suite.name}.{kind}"] = _instructions(rows, "strict", kind)._replace(headline=False)
    return found


def _prompts(rows: Sequence[tuple[Any, Mapping[str, Any]]], reading: str, groups: list[str]) -> Column:
    values = [float(all(row[reading])) for _, row in rows]
    return Column(values, [prompt.cluster for prompt, _ in rows], groups, headline=True)


def _instructions(rows: Sequence[tuple[Any, Mapping[str, Any]]], reading: str, kind: str | None = None) -> Column:
    chosen = [
        (float(followed), prompt.cluster)
        for prompt, row in rows
        for instruction, followed in zip(prompt.instructions, row[reading], strict=True)
        if kind in (None, instruction.verifier.name)
    ]
    return Column([value for value, _ in chosen], [c for _, c in chosen], ["all"] * len(chosen), headline=True)


def metric(column: Column, settings: EvaluateSettings) -> Metric:
    """The mean of a column with its interval."""
    found = interval(column, seed=settings.seed, resamples=settings.resamples)
    return Metric(value=found.value, n=len(column.values), clusters=len(set(column.clusters)), low=found.low, high=found.high)


def pair_tests(
    pairs: Sequence[tuple[str, str]], outcomes: Mapping[str, Mapping[str, Column]], settings: EvaluateSettings
) -> tuple[PairTest, ...]:
    """Paired tests of every metric but the worst group, for each (model, against).

    p-values are corrected by Holm's method over all headline tests, and over all others.

    Args:
        pairs: names of the models to compare.
        outcomes: by model and flat name; all models answered the same prompts.
        settings: seed and resamples.
    """
    tests: list[dict[str, Any]] = []
    for model, against in pairs:
        for name, mine in outcomes[model].items():
            if mine.over == "min":
                continue
            theirs = outcomes[against][name]
            difference = paired(mine, theirs, seed=settings.seed, resamples=settings.resamples)
            p, test = p_value(mine, theirs)
            ahead = [a - b for a, b in zip(mine.values, theirs.values, strict=True)]
            tests.append(
                {
                    "model": model,
                    "against": against,
                    "metric": name,
                    "headline": mine.headline,
                    "difference": difference.value,
                    "low": difference.low,
                    "high": difference.high,
                    "better": sum(value > 0 for value in ahead),
                    "worse": sum(value < 0 for value in ahead),
                    "p": p,
                    "test": test,
                }
            )
    corrected: dict[int, float] = {}
    for family in (True, False):
        members = [i for i, test in enumerate(tests) if test["headline"] is family]
        corrected.update(zip(members, holm([tests[i]["p"] for i in members]), strict=True))
    return tuple(PairTest(**test, p_holm=corrected[i]) for i, test in enumerate(tests))
