"""The tables of the summary: anchors, top components, where scores lie by depth, and effects."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from mechmerge.localize.effect_file import EFFECT_KINDS, EffectFile
from mechmerge.localize.rounds_file import RoundsFile
from mechmerge.localize.scores import ScoreFile
from mechmerge.models.components import UNIT_KINDS, Component
from mechmerge.models.references import ModelId
from mechmerge.report.style import Array, caveat, signed

DEPTHS = ("first third", "middle third", "last third")
"""Parts of the whole model, by layer."""


def cell(value: object) -> str:
    """A value as one Markdown table cell: names come from files that others wrote."""
    text = " ".join(str(value).split()).replace("\\", "\\\\").replace("|", "\\|").replace("`", "'")
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("[", "\\[")


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table."""
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return [*lines, *(f"| {' | '.join(cell(value) for value in row)} |" for row in rows), ""]


def slug(name: str) -> str:
    """A name as part of a file name: no separators, no leading dot."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip(".-") or "unnamed"


def models_table(base: ModelId, experts: dict[str, ModelId]) -> list[str]:
    """Base and experts with revision and the digest of their weights."""
    rows = [("base", base), *((f"expert {name}", model) for name, model in experts.items())]
    return table(
        ["role", "model", "revision", "weights (sha256)"],
        [(role, m.name, m.revision or "none (a local folder)", m.digest[:16]) for role, m in rows],
    )


def anchors_table(scores: dict[str, ScoreFile]) -> list[str]:
    """Anchors with their validity figures; whatever is not a recovery is said to be none."""
    rows = []
    for label, file in scores.items():
        anchor, meta = file.metadata.anchor, file.metadata
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
                steering,
                f"{anchor.prompts} / {anchor.held_out}",
                scale,
            )
        )
    header = ["behaviour", "after layer", "valid", "separation (AUC)", "gap (95 % low)", "pass rate, steered"]
    return table([*header, "prompts / held out", "scores are"], rows)


class Ranked(NamedTuple):
    """One component in a ranking."""

    name: str
    patched: float
    """Weight patching; NaN where it was not patched."""
    stderr: float
    """Standard error of that over prompts; NaN where it was not stored."""
    screen: float
    """First-order estimate; NaN where there is none."""


def top_components(file: ScoreFile, kinds: Sequence[str], count: int) -> list[Ranked]:
    """The best components of some kinds: those really patched where there are any, else by first-order estimate.

    Components after the anchor are left out: their 0 is no result.
    """
    found = []
    for kind in kinds:
        arrays = [file.arrays.get(f"{kind}.{measure}") for measure in ("sufficiency", "sufficiency.stderr", "screen")]
        shape = next((a.shape for a in arrays if a is not None), None)
        if shape is None:
            continue
        filled = [np.full(shape, np.nan) if a is None else np.asarray(a, float) for a in arrays]
        for layer, unit in np.ndindex(min(shape[0], file.metadata.anchor.layer), shape[1]):
            patched, stderr, screen = (float(a[layer, unit]) for a in filled)
            found.append(Ranked(str(Component(layer, kind, unit)), patched, stderr, screen))
    verified = [r for r in found if np.isfinite(r.patched)]
    if verified:
        return sorted(verified, key=lambda r: -r.patched)[:count]
    return sorted((r for r in found if np.isfinite(r.screen)), key=lambda r: -r.screen)[:count]


def components_table(ranked: Sequence[Ranked]) -> list[str]:
    """A ranking as a table."""

    def number(value: float) -> str:
        return signed(value) if np.isfinite(value) else "–"

    rows = []
    for entry in ranked:
        error = f" ± {entry.stderr:.3f}" if np.isfinite(entry.stderr) else ""
        rows.append((entry.name, number(entry.patched) + error, number(entry.screen)))
    return table(["component", "weight patching ± standard error", "first-order estimate"], rows)


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
        positive[file.metadata.anchor.layer :] = 0
        sums[kind] = np.array([part.sum() for part in np.array_split(positive, len(DEPTHS))])
    total = sum(float(values.sum()) for values in sums.values())
    return {kind: values / total if total > 0 else np.zeros(len(DEPTHS)) for kind, values in sums.items()}


def depth_table(scores: dict[str, ScoreFile]) -> list[str]:
    """`depth_shares` of every behaviour that has module scores."""
    rows = []
    for label, file in scores.items():
        shares = depth_shares(file)
        if shares is not None:
            marked = f"⚠ {label} (not a recovery)" if caveat(file.metadata) else label
            rows.append((marked, *(f"{100 * s:.0f} %" for kind in ("attention", "mlp") for s in shares[kind])))
    if not rows:
        return []
    return table(["behaviour", *(f"{kind}, {depth}" for kind in ("attention", "mlp") for depth in DEPTHS)], rows)


Rows = tuple[list[str], list[tuple[object, ...]]]
"""A header and rows as long as it."""


def losses_rows(effects: EffectFile) -> Rows:
    """What is known of each behaviour of an effect file."""
    header = ["behaviour", "its expert", "weight", "answers used", "loss, path's start", "loss, path's end", "loss, its expert"]
    rows: list[tuple[object, ...]] = [
        (
            f"{b.name} ({', '.join(b.members)})" if b.members != (b.name,) else b.name,
            b.expert,
            f"{b.weight:g}",
            f"{b.answers} of {b.prompts}",
            f"{b.loss_start:.3f}",
            f"{b.loss_end:.3f}",
            f"{b.loss_expert:.3f}",
            f"{100 * b.completeness_error:.1f} %",
        )
        for b in effects.metadata.behaviors
    ]
    return [*header, "completeness error"], rows


def effects_rows(effects: EffectFile) -> Rows:
    """Summed effects by behaviour and expert, and how many heads, KV groups and neurons hurt (effect below 0)."""
    rows: list[tuple[object, ...]] = []
    kinds = [kind for kind in EFFECT_KINDS if f"{kind}.effect" in effects.arrays]
    for b, behavior in enumerate(effects.metadata.behaviors):
        for e, expert in enumerate(effects.metadata.experts):
            sums = {kind: float(effects.arrays[f"{kind}.effect"][b, e].sum()) for kind in kinds}
            rest = sum(value for kind, value in sums.items() if kind not in UNIT_KINDS)
            units = np.concatenate(
                [np.zeros(0), *(effects.arrays[f"{k}.effect"][b, e].ravel() for k in UNIT_KINDS if k in sums)]
            )
            by_kind = [signed(sums[kind]) if kind in sums else "–" for kind in UNIT_KINDS]
            hurt = f"{100 * (units < 0).mean():.0f} %" if units.size else "–"
            rows.append((behavior.name, expert, signed(sum(sums.values())), *by_kind, signed(rest), hurt))
    return ["on", "of expert", "total", "heads", "kv groups", "neurons", "rest, norms, embeddings", "units that hurt"], rows


def rounds_rows(file: RoundsFile) -> Rows:
    """A header and one row for each round."""
    names = [behavior.name for behavior in file.metadata.behaviors]
    header = ["round", "proposed", "changed", "weighted gain", "kept", *(f"{name}: predicted, measured" for name in names)]
    rows: list[tuple[object, ...]] = [
        (
            number,
            record.proposed,
            record.changed,
            f"{record.gain:.3f}",
            "yes" if record.accepted else "no",
            *(f"{signed(record.predicted[name])}, {signed(record.realised[name])}" for name in names),
        )
        for number, record in enumerate(file.metadata.rounds, 1)
    ]
    return header, rows


def settled_rows(file: RoundsFile) -> Rows:
    """A header and one row for each behaviour: its losses at the base, its expert, the sum and the settled merge."""
    header = ["behaviour", "its expert", "weight", "answers used", "loss, base", "loss, its expert", "loss, sum", "loss, merge"]
    rows: list[tuple[object, ...]] = [
        (
            behavior.name,
            behavior.expert,
            f"{behavior.weight:g}",
            behavior.answers,
            *(f"{v:.3f}" for v in (behavior.loss_base, behavior.loss_expert, behavior.loss_sum, behavior.loss_merge)),
        )
        for behavior in file.metadata.behaviors
    ]
    return header, rows
