"""The tables of the summary: models, anchors, set curves, top components, and where scores lie by depth."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mechmerge.errors import visible
from mechmerge.localize.roles import ROLE_NAMES
from mechmerge.localize.scores import ScoreFile
from mechmerge.models.components import Component
from mechmerge.models.references import ModelId
from mechmerge.report.style import Array, doubts, signed, small

Rows = tuple[list[str], list[tuple[object, ...]]]
"""A header and rows as long as it."""
RANKED = ("sufficiency", "screen", "necessity", "activation")
"""Measures of a ranking, in the order of `Ranked`."""
DEPTHS = ("first third", "middle third", "last third")
"""Parts of the whole model, by layer."""


def printable(text: str) -> str:
    """`visible`, in one line."""
    return visible(" ".join(text.split()))


def cell(value: object) -> str:
    """A value as one Markdown table cell: names come from files that others wrote."""
    text = printable(str(value)).replace("\\", "\\\\").replace("|", "\\|").replace("`", "'")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("[", "\\[")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return [*lines, *(f"| {' | '.join(cell(value) for value in row)} |" for row in rows), ""]


def slug(name: str) -> str:
    """A name as part of a file name: no separators, no leading dot."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip(".-") or "unnamed"


def models_rows(base: ModelId, experts: Mapping[str, ModelId]) -> Rows:
    """Base and experts with revision and the digest of their weights."""
    models = [("base", base), *((f"expert {name}", model) for name, model in experts.items())]
    rows: list[tuple[object, ...]] = [
        (role, m.name, m.revision or "none (a local folder)", m.digest[:16]) for role, m in models
    ]
    return ["role", "model", "revision", "weights (sha256)"], rows


def models_table(base: ModelId, experts: Mapping[str, ModelId]) -> list[str]:
    """`models_rows` in Markdown."""
    return table(*models_rows(base, experts))


def anchors_rows(scores: Mapping[str, ScoreFile]) -> Rows:
    """Anchors with their validity figures; whatever is not a recovery is said to be none."""
    rows: list[tuple[object, ...]] = []
    for label, file in scores.items():
        meta = file.metadata
        if (anchor := meta.anchor) is None:
            continue
        steering = "no verifier"
        if anchor.steering_base is not None and anchor.steering_steered is not None:
            steering = f"{anchor.steering_base:.2f} → {anchor.steering_steered:.2f}"
        scale = "recovery" if meta.scale == "recovery" and anchor.valid else "**not a recovery**"
        if meta.scale != "recovery":
            scale += " (raw differences)"
        valid = "yes" if anchor.valid else f"**no**: {'; '.join(anchor.reasons) or 'no reason stored'}"
        rows.append(
            (
                label,
                anchor.layer,
                valid,
                f"{anchor.separation:.2f}",
                f"{anchor.gap:.2f} ({anchor.gap_low:.2f})",
                anchor.stability_text or "not resampled",
                steering,
                f"{anchor.prompts} / {anchor.held_out}",
                scale,
            )
        )
    header = ["behaviour", "after layer", "valid", "separation (AUC)", "gap (95 % low)", "stability", "pass rate, steered"]
    return [*header, "prompts / held out", "scores are"], rows


def losses_rows(scores: Mapping[str, ScoreFile]) -> Rows:
    """What loss scores are measured on; no rows where there are none."""
    rows: list[tuple[object, ...]] = []
    for label, file in scores.items():
        loss, meta = file.metadata.loss, file.metadata
        if loss is not None:
            scale = "recovery" if meta.scale == "recovery" else f"**raw differences**: {'; '.join(meta.reasons)}"
            told = (f"{loss.base:.3f}", f"{loss.expert:.3f}", f"{loss.gap:.3f} ({loss.gap_low:.3f})")
            rows.append((label, *told, f"{loss.answers} of {loss.prompts}", scale))
    header = ["behaviour", "base, nats per token", "expert", "gap (95 % low)", "answers that pass"]
    return [*header, "scores are"], rows


def curves_rows(scores: Mapping[str, ScoreFile]) -> Rows:
    """What the set curves of every localization say; no rows where none has any."""
    rows: list[tuple[object, ...]] = []
    for label, file in scores.items():
        curves = file.metadata.curves
        if curves is None:
            continue
        unit = "recovery" if curves.scale == "recovery" and file.metadata.valid else "**not a recovery**"
        passes = (curves.base_pass_rate, curves.expert_pass_rate)
        seen = "unseen" if curves.unseen else "**those that ordered the components**"
        rows.append(
            (
                label,
                f"**{curves.doubt}**" if curves.doubt else "yes",
                _interval(curves.lift, curves.lift_low, curves.lift_high),
                _interval(curves.magnitude_lift, curves.magnitude_lift_low, curves.magnitude_lift_high),
                unit,
                *(
                    "–" if lift is None else _interval(lift.value, lift.low, lift.high)
                    for lift in (curves.kl_lift, curves.magnitude_kl_lift)
                ),
                f"{curves.prompts} ({curves.topics} topics), {seen}",
                "–" if curves.base_kl is None else f"{curves.base_kl:.3f}",
                "–" if None in passes else " → ".join(f"{rate:.2f}" for rate in passes),
            )
        )
    header = ["behaviour", "above its controls", "lift over random [95 %]", "lift over magnitude [95 %]", "units"]
    header += ["KL below random [95 %]", "KL below magnitude [95 %]", "prompts"]
    return [*header, "KL, expert to base", "pass rate, base → expert"], rows


def _interval(value: float, low: float, high: float) -> str:
    return f"{signed(value)} [{signed(low)}, {signed(high)}]"


class Ranked(NamedTuple):
    """One component in a ranking."""

    name: str
    patched: float
    """Weight patching; NaN where it was not patched."""
    stderr: float
    """Standard error of that over topics; NaN where it was not stored."""
    screen: float
    """First-order estimate; NaN where there is none."""
    screen_stderr: float = math.nan
    """Standard error of that; NaN where it was not stored."""
    necessity: float = math.nan
    """Knockout; NaN where it was not measured."""
    necessity_stderr: float = math.nan
    activation: float = math.nan
    """Activation patching; NaN where it was not measured."""
    activation_stderr: float = math.nan
    role: str = ""
    """Its role, as it is called where it is shown; empty where roles were not judged."""


def top_components(file: ScoreFile, kinds: Sequence[str], count: int) -> list[Ranked]:
    """The best components of some kinds: those really patched where there are any, else by first-order estimate.

    Components after the anchor are left out: their 0 is no result.
    """
    found = []
    for kind in kinds:
        measures = [f"{measure}{part}" for measure in RANKED for part in ("", ".stderr")]
        arrays = [file.arrays.get(f"{kind}.{measure}") for measure in measures]
        shape = next((a.shape for a in arrays if a is not None), None)
        if shape is None:
            continue
        filled = [np.full(shape, np.nan) if a is None else np.asarray(a, float) for a in arrays]
        roles = file.roles(kind)
        for layer, unit in np.ndindex(min(shape[0], file.depth), shape[1]):
            role = "" if roles is None else ROLE_NAMES[str(roles[layer, unit])].partition(":")[0]
            name, values = str(Component(layer, kind, unit)), [float(array[layer, unit]) for array in filled]
            found.append(Ranked._make((name, *values, role)))
    verified = [r for r in found if np.isfinite(r.patched)]
    if verified:
        return sorted(verified, key=lambda r: -r.patched)[:count]
    return sorted((r for r in found if np.isfinite(r.screen)), key=lambda r: -r.screen)[:count]


def components_rows(ranked: Sequence[Ranked]) -> Rows:
    """A header and one row for each component of a ranking."""

    def said(value: float, error: float) -> str:
        return small(value, error) if np.isfinite(value) else "–"

    columns: dict[str, list[object]] = {
        "component": [entry.name for entry in ranked],
        "weight patching ± standard error": [said(entry.patched, entry.stderr) for entry in ranked],
        "first-order estimate": [said(entry.screen, entry.screen_stderr) for entry in ranked],
        "knockout": [said(entry.necessity, entry.necessity_stderr) for entry in ranked],
        "activation patching": [said(entry.activation, entry.activation_stderr) for entry in ranked],
        "role": [entry.role for entry in ranked],
    }
    # What no component has is no column.
    optional = [name for name in ("knockout", "activation patching", "role") if set(columns[name]) <= {"–", ""}]
    kept = {name: values for name, values in columns.items() if name not in optional}
    return list(kept), list(zip(*kept.values(), strict=True))


def depth_shares(file: ScoreFile) -> dict[str, Array] | None:
    """Where the positive module scores lie: kind → share in each third of the model; None without module scores.

    The shares of attention and MLP together add up to 1 (to 0 where nothing is positive).
    """
    sums = {}
    for kind in ("attention", "mlp"):
        values = file.arrays.get(f"{kind}.sufficiency")
        if values is None:
            return None
        positive = np.clip(np.nan_to_num(values[:, 0]), 0, None)
        positive[file.depth :] = 0
        sums[kind] = np.array([part.sum() for part in np.array_split(positive, len(DEPTHS))])
    total = sum(float(values.sum()) for values in sums.values())
    return {kind: values / total if total > 0 else np.zeros(len(DEPTHS)) for kind, values in sums.items()}


def marked(label: str, file: ScoreFile) -> str:
    """A behaviour's label with what weakens its localization."""
    found = doubts(file.metadata)
    return f"⚠ {label} ({', '.join(found)})" if found else label


def depth_rows(scores: Mapping[str, ScoreFile]) -> Rows:
    """`depth_shares` of every behaviour that has module scores; no rows where none has."""
    rows: list[tuple[object, ...]] = []
    for label, file in scores.items():
        shares = depth_shares(file)
        if shares is not None:
            parts = (f"{100 * s:.0f} %" for kind in ("attention", "mlp") for s in shares[kind])
            rows.append((marked(label, file), *parts))
    return ["behaviour", *(f"{kind}, {depth}" for kind in ("attention", "mlp") for depth in DEPTHS)], rows
