"""The chart of an evaluation: every model's headline metrics with their 95 % intervals, or every type against a reference."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mechmerge.report.style import figure

if TYPE_CHECKING:
    from mechmerge.evaluate.record import Evaluation


def draw_chart(evaluation: Evaluation, path: Path) -> None:
    """Draws a panel for each headline metric: a row a model, the value as a dot, its 95 % interval as a bar.

    Args:
        evaluation: what was measured.
        path: the PNG to write.
    """
    from mechmerge.evaluate.table import headlines

    names = [name for name in headlines(evaluation) if not name.partition("@")[0].endswith(".min")]
    models = list(evaluation.models)
    height = 0.6 + 0.32 * len(models)
    with figure(path, "Pass rates with 95 % intervals", 1, height, columns=len(names), sharey=True) as (_, axes):
        for axis, name in zip(np.ravel(axes), names, strict=True):
            for row, model in enumerate(models):
                metric = evaluation.metrics(model).get(name)
                if metric is None:
                    continue
                axis.plot([metric.low, metric.high], [row, row], linewidth=2, color="C0", alpha=0.5)
                axis.plot([metric.value], [row], "o", color="C0", markersize=5)
                axis.annotate(
                    f"{metric.value:.2f}", (metric.value, row), (0, 4), textcoords="offset points", ha="center", fontsize=7
                )
            axis.set(xlim=(-0.05, 1.05))
            axis.set_title(name.replace(".", "\n", 1).replace("@", "\n"), fontsize=9)
            axis.set_yticks(range(len(models)), models)
            axis.set_ylim(len(models) - 0.4, -0.7)
            axis.grid(axis="x", alpha=0.3)
