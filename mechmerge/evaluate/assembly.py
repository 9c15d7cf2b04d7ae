"""From judged rows to `evaluation.json`: what evaluations of models and of answers made elsewhere share."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from mechmerge.artifacts import write_text
from mechmerge.evaluate.columns import Column
from mechmerge.evaluate.record import (
    EvaluateSettings,
    Evaluation,
    ModelResult,
    ResponsesId,
    SuiteRecord,
    SuiteResult,
    Units,
)
from mechmerge.evaluate.scoring import columns, metric, pair_tests
from mechmerge.evaluate.suites import Suite
from mechmerge.models.references import ModelId
from mechmerge.versions import versions

JUDGES = ("lm_eval", "langdetect", "nltk", "scipy")
"""Packages that verdicts and statistics depend on."""


class Done(NamedTuple):
    """What one model did in one suite."""

    result: SuiteResult
    outcomes: dict[str, Column]
    """By flat name."""


def suite_record(suite: Suite) -> SuiteRecord:
    """The suite as it stands in the evaluation file."""
    blank: list[Mapping[str, Any]] = [
        {reading: [False] * len(prompt.instructions) for reading in suite.readings} for prompt in suite.prompts
    ]
    return SuiteRecord(
        digest=suite.digest,
        split=suite.split,
        prompts=len(suite.prompts),
        answer_tokens=suite.answer_tokens,
        chat_template=suite.chat_template,
        groups=suite.groups,
        units={name: units_of(column) for name, column in columns(suite, blank).items()},
        readings=suite.readings,
        limited=suite.limited,
    )


def units_of(column: Column) -> Units:
    """The units of a column, without its outcomes."""
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(column.clusters))}
    places = {group: place for place, group in enumerate(dict.fromkeys(column.groups))}
    return Units(
        cluster=tuple(numbers[cluster] for cluster in column.clusters),
        groups=tuple(places),
        group=tuple(places[group] for group in column.groups),
        over=column.over,
        headline=column.headline,
    )


def packed(column: Column) -> str | tuple[float, ...]:
    """The outcomes of a column as an evaluation file holds them."""
    if set(column.values) <= {0.0, 1.0}:
        return "".join("1" if value else "0" for value in column.values)
    return tuple(column.values)


def suite_done(
    suite: Suite, rows: Sequence[Mapping[str, Any]], settings: EvaluateSettings, *, template: str, key: str, missing: int = 0
) -> Done:
    """Metrics of one model in one suite, from its rows in the order of the prompts."""
    outcomes = columns(suite, rows)
    result = SuiteResult(
        metrics={name: metric(column, settings) for name, column in outcomes.items()},
        outcomes={name: packed(column) for name, column in outcomes.items()},
        errors=sum("error" in row for row in rows),
        missing=missing,
        tokens=sum(row["tokens"] for row in rows),
        unfinished=sum(not row["finished"] for row in rows),
        template=template,
        answers=key,
    )
    return Done(result, outcomes)


def assemble(
    models: Mapping[str, tuple[ModelId | ResponsesId, Mapping[str, Done]]],
    suites: Mapping[str, SuiteRecord],
    against: Sequence[str],
    settings: EvaluateSettings,
) -> Evaluation:
    """The evaluation with the paired tests of every model against each reference.

    Args:
        models: by name, what it is and what it did in each suite.
        suites: by name; every model did all of them.
        against: names of references; of two references only the later is compared with the earlier.
        settings: as they were.
    """
    wanted = [
        (model, other)
        for model in models
        for other in against
        if model != other and not (model in against and against.index(model) < against.index(other))
    ]
    outcomes = {
        name: {flat: column for one in done.values() for flat, column in one.outcomes.items()}
        for name, (_, done) in models.items()
    }
    return Evaluation(
        suites=dict(suites),
        models={
            name: ModelResult(id=what, suites={suite: one.result for suite, one in done.items()})
            for name, (what, done) in models.items()
        },
        against=tuple(against),
        pairs=pair_tests(wanted, outcomes, settings),
        settings=settings,
        versions=versions() | {package: metadata.version(package) for package in JUDGES},
    )


def write_samples(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a samples file atomically, a row a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
