"""How figures look: one size, one colour-blind safe diverging map centred at 0, one way of saying what an anchor is worth.

Red-blue diverging map: Brewer's RdBu (https://colorbrewer2.org), reversed, so that red is positive. Cells above the anchor are
grey (their score is 0 by construction) and cells that were not measured are hatched: neither is a result.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mechmerge.artifacts import atomic_file
from mechmerge.localize.scores import ScoreMetadata
from mechmerge.localize.settings import CALLED
from mechmerge.models.references import ModelId

Array = np.ndarray
WIDTH, DPI = 8.0, 150
"""Inches and dots an inch: figures are 1200 pixels wide."""
COLOURS = "RdBu_r"
GREY = "#d4d4d4"
MEASURES: dict[str, str] = {"screen": "first-order estimate", **CALLED, "output": "output"}
"""What each measure of a score file is called in titles."""


def short_name(model: ModelId) -> str:
    """A model's name as titles say it: the adapter's, else the last part of the reference."""
    return model.name.rsplit("+", 1)[-1].rsplit("/", 1)[-1]


def unit_of(metadata: ScoreMetadata) -> str:
    """The unit of a score file's scores."""
    if metadata.scale != "recovery":
        return "change of state, not a recovery"
    return "recovery (base 0, expert 1)" if metadata.valid else f"invalid {metadata.source}: not a recovery"


def doubts(metadata: ScoreMetadata) -> tuple[str, ...]:
    """What weakens a localization, in a few words each; empty for a recovery that is above its controls or has no curves."""
    found = []
    if not metadata.valid or metadata.scale != "recovery":
        found.append("not a recovery")
    if metadata.curves is not None and metadata.curves.doubt:
        found.append(metadata.curves.doubt)
    return tuple(found)


def caveat(metadata: ScoreMetadata) -> str:
    """What has to be said wherever the scores are shown; empty where `doubts` finds nothing."""
    said = []
    if not metadata.valid:
        said.append(f"{metadata.source} not valid ({'; '.join(metadata.reasons)})")
    if metadata.scale != "recovery":
        said.append("raw differences")
    parts = [f"{', '.join(said)}: not a recovery"] if said else []
    if metadata.curves is not None and metadata.curves.doubt:
        parts.append(f"{metadata.curves.doubt} ({metadata.curves.verdict.partition(': ')[2]})")
    return "; ".join(parts)


def title_of(metadata: ScoreMetadata, what: str) -> str:
    """Title of a figure: what is shown, then behaviour, expert and anchor layer, then the caveat on a line of its own."""
    lines = [what, f"{metadata.behavior} · expert {short_name(metadata.expert)} · {metadata.where}"]
    return "\n".join([*lines, f"⚠ {caveat(metadata)}"] if caveat(metadata) else lines)


def wrapped(text: str, width: int) -> str:
    """The text with each of its lines broken at `width` characters."""
    return "\n".join(part for line in text.split("\n") for part in textwrap.wrap(line, width))


def signed(value: float) -> str:
    """A number with its sign and three decimals, with a real minus."""
    return f"{value:+.3f}".replace("-", "−")


def small(value: float, error: float = math.nan) -> str:
    """A number with its sign and three decimals or, below 0.1, three significant digits; with its standard error if known."""
    decimals = 3 if value == 0 or abs(value) >= 0.1 else min(8, 2 - math.floor(math.log10(abs(value))))
    said = f"{value:+.{decimals}f}".replace("-", "−")
    return f"{said} ± {error:.{decimals}f}" if math.isfinite(error) else said


@contextmanager
def figure(path: Path, title: str, rows: int, height: float, columns: int = 1, **keywords: Any) -> Iterator[tuple[Any, Array]]:
    """A figure with a grid of axes, saved as PNG to `path` when the block ends well (`height`: inches, title apart)."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"font.size": 9, "axes.titlesize": 10, "hatch.linewidth": 0.4, "hatch.color": "#8a8a8a"}):
        # No pyplot: it keeps figures alive in a global list and picks a backend by the display.
        lines = wrapped(title, 104)
        drawn = Figure(figsize=(WIDTH, height + 0.17 * (lines.count("\n") + 1)), dpi=DPI, layout="constrained")
        FigureCanvasAgg(drawn)
        drawn.suptitle(lines, x=0.01, ha="left", fontsize=10)
        yield drawn, drawn.subplots(rows, columns, squeeze=False, **keywords)
        with atomic_file(path) as partial:
            drawn.savefig(partial, format="png", metadata={"Software": None})


def span(values: Array) -> float:
    """Half the colour range, symmetric around 0.

    The largest absolute value, or the 99th percentile where a few outliers would wash out the rest; 1 where all is 0.
    """
    finite = np.abs(values[np.isfinite(values)])
    if not finite.any():
        return 1.0
    common = float(np.percentile(finite[finite > 0], 99))
    return float(finite.max()) if finite.max() <= 2 * common else common


def colour_bar(drawn: Any, image: Any, axes: Any, label: str) -> None:
    """A colour bar beside `axes`; pointed ends say that values lie beyond it."""
    beyond = image.get_array().compressed()
    low, high = bool((beyond < image.norm.vmin).any()), bool((beyond > image.norm.vmax).any())
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[low, high]
    drawn.colorbar(image, ax=axes, label=label, fraction=0.04, pad=0.015, extend=extend)


def grid(axes: Any, values: Array, limit: float, grey: Array | None = None) -> Any:
    """Draws `values` [rows, columns] as coloured cells; NaN is hatched, `grey` cells (a mask of the same shape) are grey.

    Returns:
        The image, for a colour bar.
    """
    from matplotlib.patches import Rectangle

    grey = np.zeros(values.shape, bool) if grey is None else grey
    shown = np.ma.masked_where(grey | ~np.isfinite(values), values)
    image = axes.imshow(shown, cmap=COLOURS, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.imshow(np.ma.masked_where(~grey, np.ones(values.shape)), cmap=_flat(), aspect="auto", interpolation="nearest")
    for row, column in np.argwhere(~np.isfinite(values) & ~grey):
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, hatch="////", linewidth=0, edgecolor="#8a8a8a"))
    axes.set_xlim(-0.5, values.shape[1] - 0.5)
    axes.set_ylim(values.shape[0] - 0.5, -0.5)
    axes.tick_params(length=2)
    return image


def _flat() -> Any:
    from matplotlib.colors import ListedColormap

    return ListedColormap([GREY])


def layer_ticks(axes: Any, layers: int) -> None:
    """Ticks and label of a layer axis (x), at most about twenty."""
    step = max(1, -(-layers // 20))
    axes.set_xticks(range(0, layers, step))
    axes.set_xlabel("layer", loc="left")


def unit_ticks(axes: Any, units: int, label: str) -> None:
    """Ticks and label of a unit axis (y), at most about sixteen."""
    step = max(1, -(-units // 16))
    axes.set_yticks(range(0, units, step))
    axes.set_ylabel(label)
