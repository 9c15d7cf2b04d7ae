"""Set curves drawn: what moving the best components does beside random sets and the largest deltas of the same size.

One row a behaviour, one column a measure. The area between the score curve and the mean of the random ones is the lift: that is
why the share of components moved runs linearly.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mechmerge.errors import InputError
from mechmerge.localize.curve_record import SetCurve, SetCurves
from mechmerge.localize.scores import ScoreFile
from mechmerge.report.style import Array, figure, signed, wrapped
from mechmerge.report.tables import marked

PANELS = (("recovery", "recovery of the state"), ("kl", "KL to the expert\n(nats per token)"), ("pass_rate", "pass rate"))
"""Fields of a point and what their axes are called."""
ORDERS = {"score": ("#2166ac", "by score"), "random": ("#767676", "random"), "magnitude": ("#b35806", "largest deltas")}
"""Colour and name of each order."""


class Line(NamedTuple):
    """One order of the components and one measure."""

    order: str
    share: Array
    """Share of components moved, 0 … 1."""
    value: Array
    """The measure; of the random orders their mean."""
    low: Array
    """Smallest value of the random orders; the value itself elsewhere."""
    high: Array


def lines_of(curves: SetCurves, field: str) -> list[Line]:
    """The curves of one measure by order, random ones as mean, smallest and largest; points without a value are left out."""
    found = []
    for order in ORDERS:
        drawn = [_points(curve, field) for curve in curves.curves if curve.order == order]
        drawn = [points for points in drawn if len(points)]
        if not drawn:
            continue
        # Random orders share their budgets; a budget that one of them lacks has no mean.
        shares = sorted(set.intersection(*({float(x) for x in points[:, 0]} for points in drawn)))
        if not shares:
            continue
        values = np.array([[dict(points.tolist())[share] for share in shares] for points in drawn])
        found.append(Line(order, np.array(shares), values.mean(axis=0), values.min(axis=0), values.max(axis=0)))
    return found


def _points(curve: SetCurve, field: str) -> Array:
    pairs = [(point.share, getattr(point, field)) for point in curve.points if getattr(point, field) is not None]
    return np.array(pairs, float).reshape(-1, 2)


def curve_map(scores: Mapping[str, ScoreFile], path: Path) -> None:
    """Draws the set curves of every behaviour that has some.

    Args:
        scores: behaviour → a score file.
        path: the PNG to write.

    Raises:
        InputError: none of the files has curves.
    """
    measured = {label: file.metadata.curves for label, file in scores.items() if file.metadata.curves is not None}
    if not measured:
        raise InputError("set curves", expected="at least one score file with curves", found="none")
    panels = [(field, name) for field, name in PANELS if any(lines_of(curves, field) for curves in measured.values())]
    title = "Set curves: the base with a growing share of the expert's components moved in"
    for doubt in dict.fromkeys(curves.doubt for curves in measured.values() if curves.doubt):
        title += f"\n⚠ {doubt}: {', '.join(label for label, curves in measured.items() if curves.doubt == doubt)}"
    height = 0.5 + 1.65 * len(measured)
    with figure(path, title, len(measured), height, len(panels), sharex=True) as (drawn, axes):
        for row, (label, curves) in enumerate(measured.items()):
            for column, (field, name) in enumerate(panels):
                axis = axes[row, column]
                _panel(axis, curves, field)
                axis.set_ylabel(name)
                if row + 1 == len(measured):
                    axis.set_xlabel("share of components moved", loc="left")
            lift = f"lift {signed(curves.lift)} [{signed(curves.lift_low)}, {signed(curves.lift_high)}]"
            axes[row, 0].set_title(wrapped(f"{marked(label, scores[label])}: {lift}", 110), loc="left", fontsize=9)
        handles, names = axes[0, 0].get_legend_handles_labels()
        drawn.legend(handles, names, loc="outside lower left", ncols=len(names), frameon=False, fontsize=8)


def _panel(axis: Any, curves: SetCurves, field: str) -> None:
    lines = lines_of(curves, field)
    for line in lines:
        colour, name = ORDERS[line.order]
        seeds = sum(curve.order == line.order for curve in curves.curves)
        said = f"{name} (mean and range of {seeds})" if line.order == "random" else name
        axis.fill_between(line.share, line.low, line.high, color=colour, alpha=0.2, linewidth=0)
        style = {"score": "-", "random": "-", "magnitude": "--"}[line.order]
        axis.plot(line.share, line.value, style, color=colour, label=said, linewidth=1.6, marker=".", markersize=4)
    if not lines:
        axis.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axis.transAxes, color="#767676")
    axis.set_xlim(0, 1)
    axis.spines[["top", "right"]].set_visible(False)
