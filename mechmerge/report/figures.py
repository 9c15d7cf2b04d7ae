"""The figures of a run: heads, modules and neurons by layer, and what every expert's layers do to every behaviour.

Layers run from left to right, first to last. The heat maps follow figures 3-5 of "Weight Patching" (arXiv 2604.13694), with the
part above the anchor greyed out instead of drawn as 0, and marks on what was really patched.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mechmerge.errors import InputError
from mechmerge.localize.effect_file import EFFECT_KINDS, EffectFile
from mechmerge.localize.scores import ScoreFile
from mechmerge.models.components import LEAF_KINDS
from mechmerge.report.style import (
    GREY,
    MEASURES,
    Array,
    colour_bar,
    doubts,
    figure,
    grid,
    layer_ticks,
    short_name,
    signed,
    span,
    title_of,
    unit_of,
    unit_ticks,
    wrapped,
)

TOP_SHARE = 0.01
"""Neurons that count as top ones, as a share of all."""


def above_anchor(scores: ScoreFile, shape: tuple[int, ...]) -> Array:
    """Mask [layers, units] of the layers after the anchor, whose scores are 0 by construction."""
    mask = np.zeros(shape, bool)
    mask[scores.depth :] = True
    return mask


def head_map(scores: ScoreFile, path: Path, measure: str = "screen") -> None:
    """Draws layers × heads of one measure; a dot marks heads that were really patched.

    Args:
        scores: a score file with `head.<measure>`.
        path: the PNG to write.
        measure: screen, sufficiency, necessity or activation.

    Raises:
        InputError: the file does not hold that measure of heads.
    """
    values = _measured(scores, f"head.{measure}")
    layers, heads = values.shape
    title = title_of(scores.metadata, f"Attention heads: {MEASURES.get(measure, measure)}")
    with figure(path, title, 1, 1.0 + 0.26 * min(max(heads, 5), 20)) as (drawn, axes):
        image = grid(axes[0, 0], values.T, span(values), above_anchor(scores, values.shape).T)
        verified = scores.arrays.get("head.sufficiency")
        if verified is not None and measure == "screen":
            chosen = np.argwhere(np.isfinite(verified) & ~above_anchor(scores, values.shape))
            axes[0, 0].scatter(
                chosen[:, 0], chosen[:, 1], s=16, marker="o", facecolor="white", edgecolor="black", linewidth=0.8
            )
        layer_ticks(axes[0, 0], layers)
        unit_ticks(axes[0, 0], heads, "head")
        colour_bar(drawn, image, axes[0, 0], wrapped(unit_of(scores.metadata), 34))
        _legend(axes[0, 0], dots=verified is not None and measure == "screen", hatched=_has_gaps(scores, values))


def module_map(scores: Mapping[str, ScoreFile], path: Path) -> None:
    """Draws the sufficiency of every layer's attention and MLP, two rows a behaviour, one panel a unit of measurement.

    Args:
        scores: behaviour → a score file with `attention.sufficiency` and `mlp.sufficiency`.
        path: the PNG to write.

    Raises:
        InputError: no behaviour, or a file without those measures.
    """
    if not scores:
        raise InputError("module map", expected="at least one score file", found="none")
    panels = {unit: [(b, s) for b, s in scores.items() if unit_of(s.metadata) == unit] for unit in _units(scores)}
    rows = [len(panel) * 2 for panel in panels.values()]
    experts = ", ".join(dict.fromkeys(short_name(s.metadata.expert) for s in scores.values()))
    anchors = ", ".join(f"{b} {s.depth}" for b, s in scores.items() if s.metadata.anchor is not None)
    title = f"Modules: weight patching · experts: {experts}\nanchor after layer: {anchors}"
    said = dict.fromkeys(doubt for s in scores.values() for doubt in doubts(s.metadata))
    weak = {doubt: [b for b, s in scores.items() if doubt in doubts(s.metadata)] for doubt in said}
    title += "".join(f"\n⚠ {doubt}: {', '.join(names)}" for doubt, names in weak.items() if names)
    heights = [0.6 + max(0.27 * n, 0.9) for n in rows]
    with figure(path, title, len(panels), sum(heights), height_ratios=heights) as (drawn, axes):
        for axis, (unit, panel) in zip(axes[:, 0], panels.items(), strict=True):
            parts = [(b, s, kind, _measured(s, f"{kind}.sufficiency")) for b, s in panel for kind in ("attention", "mlp")]
            values = np.stack([part[3][:, 0] for part in parts])
            grey = np.stack([above_anchor(s, v.shape)[:, 0] for _, s, _, v in parts])
            image = grid(axis, values, span(np.where(grey, 0, values)), grey)
            for row in range(2, len(parts), 2):
                axis.axhline(row - 0.5, color="black", linewidth=0.8)
            marks = ["⚠ " if doubts(s.metadata) else "" for _, s, _, _ in parts]
            axis.set_yticks(range(len(parts)), [f"{m}{b} · {kind}" for m, (b, _, kind, _) in zip(marks, parts, strict=True)])
            layer_ticks(axis, values.shape[1])
            colour_bar(drawn, image, axis, wrapped(unit, 17 if len(parts) < 5 else 34))
        _legend(axes[-1, 0], dots=False, hatched=any(_has_gaps(s, s.arrays["mlp.sufficiency"]) for s in scores.values()))


def neuron_density(scores: ScoreFile, path: Path) -> None:
    """Draws, by layer, the share of the top 1 % of neurons and the sum of positive scores (first-order estimates).

    Raises:
        InputError: the file does not hold `neuron.screen`.
    """
    values = _measured(scores, "neuron.screen")
    below = ~above_anchor(scores, values.shape) & np.isfinite(values)
    count = max(1, round(TOP_SHARE * values.size))
    ranked = np.where(below & (values > 0), values, -np.inf)
    order = np.argsort(-ranked, axis=None, kind="stable")[:count]
    chosen = order[np.isfinite(ranked.ravel()[order])]
    share = np.bincount(chosen // values.shape[1], minlength=values.shape[0]) / max(1, len(chosen))
    positive = np.where(below, np.clip(values, 0, None), 0).sum(axis=1)
    title = title_of(scores.metadata, f"MLP neurons: the top {TOP_SHARE:.0%}, first-order estimate")
    with figure(path, title, 2, 4.2, sharex=True) as (_, axes):
        anchor = scores.depth
        for axis, heights, label in (
            (axes[0, 0], 100 * share, f"share of the top\n{count} neurons (%)"),
            (axes[1, 0], positive, f"sum of positive scores:\n{wrapped(unit_of(scores.metadata), 32)}"),
        ):
            axis.bar(range(len(heights)), heights, color="#2166ac", width=0.85)
            axis.set_ylabel(label)
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_xlim(-0.5, len(heights) - 0.5)
            if anchor < len(heights):
                axis.axvspan(anchor - 0.5, len(heights) - 0.5, color=GREY, alpha=0.6, linewidth=0)
        layer_ticks(axes[1, 0], values.shape[0])
        _legend(axes[1, 0], dots=False, hatched=False)


def effect_map(effects: EffectFile, path: Path) -> None:
    """Draws the summed effect of each kind by layer, one panel for each behaviour (row) and expert (column).

    Red lowers the behaviour's loss: it helps. Components outside the layers are summed in the panel's title.
    """
    metadata = effects.metadata
    kinds = [kind for kind in LEAF_KINDS if np.any(effects.arrays.get(f"{kind}.effect", np.zeros(1)))] or [
        "head",
        "kv",
        "neuron",
    ]
    # [behaviours, experts, kinds, layers]
    values = np.stack([effects.arrays[f"{kind}.effect"].sum(axis=-1) for kind in kinds], axis=2)
    outside = sum((effects.arrays[name].sum(axis=(-2, -1)) for name in _outside(effects)), np.zeros(values.shape[:2]))
    total = values.sum(axis=(-2, -1)) + outside
    height = 0.5 + len(metadata.behaviors) * (0.6 + 0.24 * len(kinds))
    title = f"Effect of every expert on every behaviour, by kind and layer, along {metadata.path}"
    with figure(path, title, len(metadata.behaviors), height, len(metadata.experts), sharex=True, sharey=True) as (drawn, axes):
        limit = span(values)
        for b, behavior in enumerate(metadata.behaviors):
            for e, expert in enumerate(metadata.experts):
                axis = axes[b, e]
                image = grid(axis, values[b, e], limit)
                own = " (its own)" if behavior.expert == expert else ""
                extra = f", outside the layers {signed(outside[b, e])}" if abs(outside[b, e]) >= 0.0005 else ""
                axis.set_title(f"on {behavior.name}, of {expert}{own}\ntotal {signed(total[b, e])}{extra}", fontsize=9)
                layer_ticks(axis, values.shape[-1])
                axis.set_yticks(range(len(kinds)), [_plural(kind) for kind in kinds])
                if b + 1 < len(metadata.behaviors):
                    axis.set_xlabel("")
        colour_bar(drawn, image, axes, wrapped("effect (nats per answer token; positive helps)", 34))


def _outside(effects: EffectFile) -> list[str]:
    return [f"{k}.effect" for k in EFFECT_KINDS if k not in LEAF_KINDS and f"{k}.effect" in effects.arrays]


def _plural(kind: str) -> str:
    return {"head": "heads", "kv": "kv groups", "neuron": "neurons"}.get(kind, kind.replace(".", " "))


def _measured(scores: ScoreFile, name: str) -> Array:
    if name not in scores.arrays:
        raise InputError(
            f"score file of {scores.metadata.behavior}", expected=f"the measure {name}", found=", ".join(sorted(scores.arrays))
        )
    return np.asarray(scores.arrays[name], float)


def _units(scores: Mapping[str, ScoreFile]) -> list[str]:
    return list(dict.fromkeys(unit_of(s.metadata) for s in scores.values()))


def _has_gaps(scores: ScoreFile, values: Array) -> bool:
    return bool((np.isnan(values) & ~above_anchor(scores, values.shape)).any())


def _legend(axis: object, *, dots: bool, hatched: bool) -> None:
    said = ["grey: after the anchor, 0 by construction"]
    said += ["dot: really patched"] if dots else []
    said += ["hatched: not measured"] if hatched else []
    axis.annotate(  # type: ignore[attr-defined]
        " · ".join(said),
        (1, 0),
        (0, -20),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=8,
    )
