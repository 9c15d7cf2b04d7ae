"""An evaluation as the Hub's metadata takes it.

`model-index` (https://github.com/huggingface/hub-docs/blob/main/modelcard.md) holds every headline metric with its interval.
`.eval_results/*.yaml` (https://huggingface.co/docs/hub/eval-results) is for benchmarks that are data sets of the Hub: of our
suites that is IFEval alone, asked whole, in its official words and by its own verifiers; anything else there would claim a
place on a leaderboard that it does not have. The task is named `default`: we know of no list of IFEval's tasks on the Hub.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import yaml

from mechmerge.evaluate.record import Evaluation
from mechmerge.evaluate.table import headlines

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

TASK = "text-generation"
METRIC = "pass_rate"
BENCHMARKS = {"ifeval": ("google/IFEval", "default")}
"""Suite → data set and task on the Hub."""


def _is_official(evaluation: Evaluation, suite: str) -> bool:
    """Whether a suite is a benchmark of the Hub with all of its official prompts, and nothing else of that name."""
    record = evaluation.suites.get(suite)
    return suite in BENCHMARKS and record is not None and record.split == "official" and not record.limited


def model_index(evaluation: Evaluation, name: str) -> list[EvalResult]:
    """The headline metrics of one model; empty where it was not evaluated."""
    from huggingface_hub import EvalResult

    if name not in evaluation.models:
        return []
    metrics, results = evaluation.metrics(name), []
    for metric in headlines(evaluation):
        suite = next((suite for suite in evaluation.suites if metric in evaluation.models[name].suites[suite].metrics), None)
        if suite is None or metric not in metrics:
            continue
        value, record = metrics[metric], evaluation.suites[suite]
        results.append(
            EvalResult(
                task_type=TASK,
                dataset_type=BENCHMARKS[suite][0] if _is_official(evaluation, suite) else f"mechmerge/{suite}",
                dataset_name=f"{suite} ({record.prompts} prompts{', limited' if record.limited else ''})",
                dataset_split=record.split,
                metric_type=METRIC,
                metric_value=round(value.value, 4),
                metric_name=metric,
                metric_args={"n": value.n, "low": round(value.low, 4), "high": round(value.high, 4)},
            )
        )
    return results


def eval_results(evaluation: Evaluation, name: str) -> str | None:
    """The text of `.eval_results/mechmerge.yaml`, None where no benchmark of the Hub was asked whole."""
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    if name not in evaluation.models:
        return None
    metrics = evaluation.metrics(name)
    entries = [
        EvalResultEntry(
            dataset_id=dataset,
            task_id=task,
            value=round(metrics[suite].value, 4),
            notes=f"strict by prompt, n = {metrics[suite].n}, 95 % [{metrics[suite].low:.3f}, {metrics[suite].high:.3f}]",
        )
        for suite, (dataset, task) in BENCHMARKS.items()
        if suite in metrics and _is_official(evaluation, suite)
    ]
    return yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False) if entries else None
