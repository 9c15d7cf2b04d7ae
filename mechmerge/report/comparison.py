"""The chart of an evaluation: every model's headline metrics, and every difference to a reference, with 95 % intervals."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechmerge.report.style import figure

if TYPE_CHECKING:
    from mechmerge.evaluate.record import Evaluation, PairTest

COLUMNS = 4
"""Panels side by side."""
FEW = 12
"""Up to so many pairs of models their groups and types are drawn as well."""
PLAIN, WORSE, BETTER = "#4d4d4d", "#b2182b", "#2166ac"


def draw_chart(evaluation: Evaluation, path: Path) -> None:
    """Draws a panel for each headline metric (a row a model) and one for each pair of models (a row a metric).

    Args:
        evaluation: what was measured.
        path: the PNG to write.
    """
    from mechmerge.evaluate.table import headlines

    names = [name for name in headlines(evaluation) if not name.partition("@")[0].endswith(".min")]
    pairs = list(dict.fromkeys((pair.model, pair.against) for pair in evaluation.pairs))
    shown = [pair for pair in evaluation.pairs if pair.headline or (len(pairs) <= FEW and "@" not in pair.metric)]
    metrics = list(dict.fromkeys(pair.metric for pair in sorted(shown, key=lambda pair: not pair.headline)))
    columns = min(COLUMNS, max(len(names), len(pairs)))
    above, below = -(-len(names) // columns), -(-len(pairs) // columns)
    heights = [0.75 + 0.3 * len(evaluation.models)] * above + [0.75 + 0.17 * len(metrics)] * below
    title = "Pass rates with 95 % intervals"
    if pairs:
        title += "; below: differences to the reference (▼ worse beyond chance, ▲ better, after Holm's correction)"
    with figure(path, title, above + below, sum(heights), columns, height_ratios=heights, sharey="row") as (_, axes):
        for axis in axes.flat:
            axis.set_visible(False)
        for axis, name in zip(axes[:above].flat, names, strict=False):
            _rates(axis, evaluation, name)
        reach = max((max(abs(pair.low), abs(pair.high)) for pair in shown), default=0) * 1.05
        for axis, (model, against) in zip(axes[above:].flat, pairs, strict=False):
            found = {pair.metric: pair for pair in shown if (pair.model, pair.against) == (model, against)}
            _differences(axis, f"{model}\n− {against}", metrics, found, reach)


def _rates(axis: Any, evaluation: Evaluation, name: str) -> None:
    models = list(evaluation.models)
    for row, model in enumerate(models):
        metric = evaluation.metrics(model).get(name)
        if metric is None:
            continue
        axis.plot([metric.low, metric.high], [row, row], linewidth=1.5, color=PLAIN)
        axis.plot([metric.value], [row], "o", color=PLAIN, markersize=4)
        axis.annotate(f"{metric.value:.2f}", (metric.value, row), (0, 3), textcoords="offset points", ha="center", fontsize=7)
    axis.set(xlim=(-0.05, 1.05), ylim=(len(models) - 0.4, -0.8), visible=True)
    axis.set_title(name.replace(".", "\n", 1).replace("@", "\n"), fontsize=8)
    axis.set_yticks(range(len(models)), models, fontsize=8)
    _finish(axis)


def _differences(axis: Any, title: str, metrics: list[str], found: dict[str, PairTest], reach: float) -> None:
    from mechmerge.evaluate.table import mark

    for row, metric in enumerate(metrics):
        pair = found.get(metric)
        if pair is None:
            continue
        shape, color = {"▼": ("v", WORSE), "▲": ("^", BETTER), "": ("o", PLAIN)}[mark(pair)]
        axis.plot([pair.low, pair.high], [row, row], linewidth=1, color=color)
        axis.plot([pair.difference], [row], shape, color=color, markersize=4 if shape != "o" else 2.5)
    heads = sum(pair.headline for pair in found.values())
    if 0 < heads < len(metrics):
        axis.axhline(heads - 0.5, color=PLAIN, linewidth=0.5)
    axis.axvline(0, color="black", linewidth=0.6)
    axis.set(xlim=(-reach, reach), ylim=(len(metrics) - 0.4, -0.6), visible=True)
    axis.set_title(title, fontsize=8)
    axis.set_yticks(range(len(metrics)), [_label(metric) for metric in metrics], fontsize=6.5)
    _finish(axis)


def _label(metric: str) -> str:
    """A metric's name; of a type of instruction its last part, since they are long."""
    return metric.partition(":")[2] or metric


def _finish(axis: Any) -> None:
    axis.tick_params(length=2, axis="both")
    axis.tick_params(axis="x", labelsize=7)
    axis.grid(axis="x", alpha=0.3)
