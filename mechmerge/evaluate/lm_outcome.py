"""From what lm-eval reports of a task to columns: metrics that are means of one value a prompt in 0 … 1.

A column's value is what lm-eval reports, checked at every run; other metrics are named in the notes and left out.

    TASK.METRIC[-FILTER]            a task's metric (gsm8k.exact_match-strict-match), or a group's own combination (mmlu.acc)
    GROUP.MEMBER.METRIC[-FILTER]    a task or group within a group or tag (mmlu.mmlu_anatomy.acc)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mechmerge.artifacts import digest
from mechmerge.errors import InputError
from mechmerge.evaluate.columns import Column
from mechmerge.evaluate.lm_tasks import Loaded, silent
from mechmerge.evaluate.resampling import Layout

HEADLINES = ("acc_norm", "acc", "exact_match", "pass_at_1")
"""Metrics that stand for a task, the first that it has; with several filters, the first."""


class TaskOutcome(NamedTuple):
    """What one model did in one task, group or tag."""

    columns: dict[str, Column]
    """By flat name."""
    samples: list[dict[str, Any]]
    """A row a document: `id` (TASK:NUMBER), `task`, `prompt`, `answer` (a text, or the log-likelihood of each choice),
    `target`, and its `metrics` by flat name."""
    n: int
    """Documents."""
    tasks: tuple[str, ...]
    """Names of the tasks proper."""
    digest: str
    """sha256 of what was asked: configuration, version and documents of every task, and the limit."""
    key: str
    """sha256 of what the outcome depends on: the above, weights, tokenizer, decoding settings and versions."""
    notes: tuple[str, ...]
    """Metrics that were left out, and why."""


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def sample_rows(name: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a document; what lm-eval wrote once a filter is brought together."""
    made: dict[int, dict[str, Any]] = {}
    for row in rows:
        arguments, responses = row["arguments"], row["resps"]
        first = responses[0][0]
        answer = (
            first if isinstance(first, str) else [number(r[0][0] if isinstance(r[0], Sequence) else r[0]) for r in responses]
        )
        document = made.setdefault(
            row["doc_id"],
            {
                "id": f"{name}:{row['doc_id']}",
                "task": name,
                "prompt": str(arguments[0][0]),
                "answer": answer,
                "target": str(row["target"]),
                "metrics": {},
            },
        )
        document["metrics"] |= {_flat(f"{metric},{row['filter']}"): number(row.get(metric)) for metric in row["metrics"]}
    return list(made.values())


def _flat(key: str) -> str:
    """`exact_match,strict-match` → `exact_match-strict-match`; the filter `none` goes, and `pass@1` becomes `pass_at_1`."""
    metric, _, chosen = key.rpartition(",")
    name = metric if chosen == "none" else f"{metric}-{chosen}"
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name.replace("@", "_at_"))


def outcome(found: Loaded, results: Mapping[str, dict[str, Any]]) -> TaskOutcome:
    """The columns of a task, group or tag.

    Args:
        found: what the name stands for.
        results: of every task proper, as `harness` keeps them.

    Raises:
        InputError: no metric is a mean of values in 0 … 1.
    """
    columns: dict[str, Column] = {}
    notes: list[str] = []
    for group in found.groups.values():
        columns |= _group_columns(found.name, group, results, notes)
    for name, result in results.items():
        prefix = name if name == found.name else f"{found.name}.{name}"
        columns |= {f"{prefix}.{_flat(key)}": column for key, column in _task_columns(name, result, notes).items()}
    if not columns:
        raise InputError(f"lm_eval:{found.name}", expected="a metric that is a mean of values in 0 … 1", found="; ".join(notes))
    return TaskOutcome(
        columns=_with_headlines(found.name, columns, list(results)),
        samples=[row for result in results.values() for row in result["samples"]],
        n=sum(result["size"] for result in results.values()),
        tasks=tuple(results),
        digest=digest([found.name, *(result["asked"] for result in results.values())]),
        key=digest([found.name, *(result["key"] for result in results.values())]),
        notes=tuple(notes),
    )


def _task_columns(name: str, result: Mapping[str, Any], notes: list[str]) -> dict[str, Column]:
    """The columns of one task by lm-eval's key."""
    columns = {}
    for key in result["metrics"]:
        reported, values = result["reported"][key], result["values"][key]
        if reported is None or key not in result["means"] or any(value is None for value in values):
            notes.append(f"{name}.{_flat(key)} is left out: it is no mean of one number a prompt.")
        elif not all(0 <= value <= 1 for value in values):
            notes.append(f"{name}.{_flat(key)} is left out: its values are not within 0 … 1.")
        else:
            clusters = [f"{name}:{number}" for number in range(len(values))]
            column = Column(values, clusters, [name] * len(values))
            _check_value(f"{name}.{_flat(key)}", column, reported)
            columns[key] = column
    return columns


def _group_columns(outer: str, group: Any, results: Mapping[str, dict[str, Any]], notes: list[str]) -> dict[str, Column]:
    """What lm-eval combines over the members of a group: weighted by documents a plain mean, else a mean of means."""
    members = [task.task_name for task in group.get_all_tasks()]
    single = {name: _task_columns(name, results[name], []) for name in members}
    with silent():
        combined = group.aggregate(
            {name: results[name]["reported"] | {"sample_len": results[name]["size"]} for name in members}
        )
    prefix = group.name if group.name == outer else f"{outer}.{group.name}"
    columns = {}
    for rule in group.aggregate_metric_list:
        for key in [key for key in combined if key.startswith(f"{rule.metric},")]:
            having = [name for name in members if key in results[name]["reported"]]
            if any(key not in single[name] for name in having):
                notes.append(f"{prefix}.{_flat(key)} is left out: it is no mean of values in 0 … 1 in every member.")
                continue
            parts = [single[name][key] for name in having]
            values = [value for part in parts for value in part.values]
            clusters = [cluster for part in parts for cluster in part.clusters]
            groups = [group.name] * len(values) if rule.weight_by_size else [name for part in parts for name in part.groups]
            column = Column(values, clusters, groups)
            _check_value(f"{prefix}.{_flat(key)}", column, combined[key])
            columns[f"{prefix}.{_flat(key)}"] = column
    return columns


def _check_value(name: str, column: Column, reported: float) -> None:
    """A column's mean over groups of the groups' means is what lm-eval reports."""
    value = Layout(column).mean(column.values)
    if not math.isclose(value, reported, rel_tol=1e-12, abs_tol=1e-12):
        raise InputError(
            f"lm_eval:{name}",
            expected=f"lm-eval's own {reported!r}",
            found=f"a mean of {value!r}",
            fix="report this version of lm-eval",
        )


def _with_headlines(name: str, columns: Mapping[str, Column], tasks: Sequence[str]) -> dict[str, Column]:
    """Marks one column of the whole, or one of each task where nothing is combined; headlines stand first."""
    whole = _headline([key for key in columns if key.startswith(f"{name}.") and key.count(".") == name.count(".") + 1])
    parts = [_headline([key for key in columns if key.startswith(f"{name}.{task}.")]) for task in tasks]
    marked = {whole} if whole else {key for key in parts if key}
    ordered = sorted(columns, key=lambda key: key not in marked)
    return {key: columns[key]._replace(headline=key in marked) for key in ordered}


def _headline(names: Sequence[str]) -> str | None:
    for metric in HEADLINES:
        for name in names:
            if re.fullmatch(rf"{metric}(?:-.*)?", name.rpartition(".")[2]):
                return name
    return names[0] if names else None
