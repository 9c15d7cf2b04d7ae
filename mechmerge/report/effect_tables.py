"""The tables of effects and of rounds."""

from __future__ import annotations

import numpy as np

from mechmerge.localize.effect_file import EFFECT_KINDS, MEASURED, EffectFile
from mechmerge.localize.rounds_file import RoundsFile
from mechmerge.models.components import LEAF_KINDS, UNIT_KINDS
from mechmerge.report.style import signed
from mechmerge.report.tables import DEPTHS, Rows


def losses_rows(effects: EffectFile) -> Rows:
    """What is known of each behaviour of an effect file."""
    meta = effects.metadata
    used = "answers used" if meta.metric == "loss" else meta.counted
    header = ["behaviour", "its expert", "weight", used]
    header += [f"{MEASURED[meta.metric]}, {where}" for where in ("path's start", "path's end", "its expert")]
    rows: list[tuple[object, ...]] = [
        (
            ("⚠ " if b.caveat else "") + (f"{b.name} ({', '.join(b.members)})" if b.members != (b.name,) else b.name),
            b.expert,
            f"{b.weight:g}",
            f"{b.answers} of {b.prompts}",
            *(f"{value:.3f}" for value in meta.shown(b).values()),
            f"{100 * b.completeness_error:.1f} %",
        )
        for b in meta.behaviors
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


def effect_depth_rows(effects: EffectFile) -> Rows:
    """Summed effects by behaviour, expert and kind in each third of the model; kinds whose effects are all 0 are left out."""
    rows: list[tuple[object, ...]] = []
    kinds = [kind for kind in LEAF_KINDS if np.any(effects.arrays.get(f"{kind}.effect", np.zeros(1)))]
    for b, behavior in enumerate(effects.metadata.behaviors):
        for e, expert in enumerate(effects.metadata.experts):
            for kind in kinds:
                by_layer = effects.arrays[f"{kind}.effect"][b, e].sum(axis=-1)
                thirds = (signed(float(part.sum())) for part in np.array_split(by_layer, len(DEPTHS)))
                rows.append((behavior.name, expert, kind, *thirds))
    return ["on", "of expert", "kind", *DEPTHS], rows


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
