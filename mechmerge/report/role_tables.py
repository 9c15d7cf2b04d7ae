"""What is shown of roles and of verification: one line each, roles by kind, and scores by depth."""

from __future__ import annotations

from mechmerge.localize.roles import MODULES, NO_ROLES, ROLE_NAMES, ROLES, THIRDS, Depth
from mechmerge.localize.scores import ScoreFile, ScoreMetadata
from mechmerge.report.style import signed
from mechmerge.report.tables import Rows

KIND_NAMES = {
    "layer": "layers",
    "attention": "attention",
    "mlp": "MLP",
    "head": "heads",
    "kv": "KV groups",
    "neuron": "neurons",
}
DEPTH_SAID = (
    "Summed positive scores of the modules below the anchor. Weight patching shows whose parameters hold the behaviour, "
    "activation patching where its signal passes, whoever made it:"
)
COLUMNS = {"sufficiency": "weight patching", "activation": "activation patching"}


def roles_said(metadata: ScoreMetadata) -> str | None:
    """Which depth holds sources and which routes, or why there are no roles; None where none were judged."""
    if metadata.scale != "recovery":
        return NO_ROLES
    return None if metadata.roles is None else metadata.roles.sentence


def verification_said(metadata: ScoreMetadata) -> dict[str, str]:
    """kind → how far its best components are known, for kinds that were verified until they were."""
    return {KIND_NAMES.get(kind, kind): record.sentence for kind, record in metadata.verification.items()}


def thresholds_said(metadata: ScoreMetadata) -> str:
    """The thresholds that roles were given by; empty without roles."""
    if metadata.roles is None:
        return ""
    rule = metadata.roles.thresholds
    return (
        f"High: at least {rule.module:g} (modules), {rule.head:g} (heads, KV groups), {rule.neuron:g} (neurons), "
        f"{rule.output:g} (output), and {rule.errors:g} standard errors above 0. Low: below {100 * rule.low:g} % of the "
        f"threshold, and {rule.errors:g} standard errors below it. A router's weight patching is not high and, with as many "
        f"standard errors, at most {100 * rule.low:g} % of its activation patching. What is neither high nor low is unclear."
    )


def role_rows(file: ScoreFile) -> Rows:
    """How many components of each kind play which part; roles that none has are left out. No rows without roles."""
    summary = file.metadata.roles
    counts = {} if summary is None else summary.counts
    there = [role for role in ROLES if any(counts[kind].get(role) for kind in counts)]
    rows: list[tuple[object, ...]] = [
        (KIND_NAMES.get(kind, kind), *(counted.get(role, 0) for role in there)) for kind, counted in counts.items()
    ]
    return ["components", *(ROLE_NAMES[role].partition(":")[0] for role in there)], rows


def depth_rows(file: ScoreFile, *, by_layer: bool = False) -> Rows:
    """Positive scores of attention and MLP in each third of the layers below the anchor, or in each layer.

    No rows without roles or without module scores.
    """
    summary = file.metadata.roles
    depths = () if summary is None else summary.layers if by_layer else summary.thirds
    columns = [
        (measure, kind)
        for measure in COLUMNS
        for kind in MODULES
        if any(getattr(depth, measure)[kind] is not None for depth in depths)
    ]
    if not columns:
        return [], []
    rows: list[tuple[object, ...]] = []
    for number, depth in enumerate(depths):
        named = f"{THIRDS[number]} third ({_span(depth)})" if not by_layer and len(depths) == len(THIRDS) else _span(depth)
        values = (getattr(depth, measure)[kind] for measure, kind in columns)
        rows.append((named, *("–" if value is None else signed(value) for value in values)))
    return ["depth", *(f"{COLUMNS[measure]}, {KIND_NAMES[kind]}" for measure, kind in columns)], rows


def _span(depth: Depth) -> str:
    return f"layer {depth.first}" if depth.first == depth.last else f"layers {depth.first}–{depth.last}"
