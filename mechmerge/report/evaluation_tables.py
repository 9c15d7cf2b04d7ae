"""An evaluation in rows: headline metrics with intervals, and every merge against each parent, regressions marked.

A regression is what the evaluation calls one (`PairTest.regression`: the corrected p is below .05 and the interval below 0); an
improvement is its mirror image. Everything else is no clear difference, whatever its sign.
"""

from __future__ import annotations

from mechmerge.evaluate.record import Evaluation, Metric, PairTest
from mechmerge.evaluate.table import headlines, prompts_of
from mechmerge.report.style import signed
from mechmerge.report.tables import Rows

WORSE, BETTER, UNCLEAR = "▼ regression", "▲ better", "no clear difference"
DIFFERENCES_SAID = (
    f"Differences are those of paired tests on the same prompts. {WORSE}: the corrected p is below 0.05 and the 95 % interval "
    f"is below 0; {BETTER}: the same above 0. By group: the difference, and in brackets the parent's value."
)


def verdict(pair: PairTest) -> str:
    """What a paired test says, in words."""
    if pair.regression:
        return WORSE
    return BETTER if pair.low > 0 and pair.p_holm < 0.05 else UNCLEAR


def headline_rows(record: Evaluation) -> Rows:
    """A header and one row for each model: its headline metrics with 95 % intervals."""
    names = headlines(record)
    header = ["model", *(f"{name.replace('@', ', ')} (n = {prompts_of(record, name)})" for name in names)]
    rows: list[tuple[object, ...]] = []
    for model in record.models:
        metrics = record.metrics(model)
        rows.append((model, *(_with_interval(metrics.get(name)) for name in names)))
    return header, rows


def compared_models(record: Evaluation) -> list[str]:
    """Models that are no parents, in the evaluation's order."""
    return [model for model in record.models if model not in record.against]


def difference_rows(record: Evaluation, model: str) -> Rows:
    """A header and one row for each headline metric and parent."""
    rows: list[tuple[object, ...]] = [
        (
            pair.metric,
            pair.against,
            f"{signed(pair.difference)} [{signed(pair.low)}, {signed(pair.high)}]",
            f"{pair.better} / {pair.worse}",
            f"{pair.p_holm:.2g}",
            verdict(pair),
        )
        for pair in record.pairs
        if pair.model == model and pair.headline
    ]
    return ["metric", "against", "difference [95 %]", "better / worse", "p (Holm)", "verdict"], rows


def group_rows(record: Evaluation, model: str) -> Rows:
    """A header and one row for each metric that is no headline: the model's value with its interval, then for each parent the
    difference, marked where it is clear, and the parent's value.
    """
    shown = set(headlines(record))
    metrics = {name: metric for name, metric in record.metrics(model).items() if name not in shown}
    parents = [parent for parent in record.against if parent != model and parent in record.models]
    rows: list[tuple[object, ...]] = []
    for name, metric in metrics.items():
        cells = [_against(record, model, parent, name) for parent in parents]
        rows.append((name, metric.n, _with_interval(metric), *cells))
    return ["group", "n", model, *(f"minus {parent} (its value)" for parent in parents)], rows


def regressions(record: Evaluation, model: str) -> list[PairTest]:
    """The paired tests of a model, headlines and groups, that are regressions."""
    return [pair for pair in record.pairs if pair.model == model and pair.regression]


def _against(record: Evaluation, model: str, parent: str, name: str) -> str:
    value = record.metrics(parent).get(name)
    if value is None:
        return "–"
    pair = record.pair(model, parent, name)
    said = "not tested " if pair is None else f"{verdict(pair)} " if verdict(pair) != UNCLEAR else ""
    difference = record.metrics(model)[name].value - value.value
    # The mark comes first: a page colours a cell by it.
    return f"{said}{signed(difference)} ({value.value:.2f})"


def _with_interval(metric: Metric | None) -> str:
    return "–" if metric is None else f"{metric.value:.2f} [{metric.low:.2f}, {metric.high:.2f}]"
