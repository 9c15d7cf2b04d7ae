"""`mechmerge localize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mechmerge.cli.common import (
    SEED,
    BehaviorCommand,
    CountOrAuto,
    Finite,
    device_option,
    format_option,
    make_progress,
    memory_guard,
    memory_options,
    named_numbers,
    pair_options,
    quiet_option,
    set_threads,
    show,
    show_plan,
    threads_option,
)

if TYPE_CHECKING:
    from mechmerge.localize.curve_record import SetCurves
    from mechmerge.localize.scores import ScoreMetadata


@click.command(cls=BehaviorCommand)
@click.argument("base")
@click.argument("expert")
@click.option(
    "--behavior", "behaviors", multiple=True, required=True, metavar="NAME|FILE", help="A behaviour; repeat for more."
)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Folder of the score files.")
@click.option("--source", "sources", type=click.Choice(["anchor", "loss"]), multiple=True, default=("anchor",),
              show_default=True, help="Scores on an anchor, or on the loss of EXPERT's answers; repeat.")  # fmt: skip
@click.option("--anchor-layer", type=click.IntRange(1), help="Residual stream after this layer (default: chosen by validity).")
@click.option("--measure", "measures", type=click.Choice(["sufficiency", "necessity", "activation"]), multiple=True,
              default=("sufficiency", "necessity", "activation"), show_default=True,
              help="Weight patching (always), knockout, activation patching; repeat.")  # fmt: skip
@click.option("--verify", type=CountOrAuto(), default="16", show_default=True, metavar="N|auto",
              help="Best heads, KV groups and neurons (each) to replace; auto: until the --top best are known.")  # fmt: skip
@click.option("--top", type=click.IntRange(1), default=8, show_default=True,
              help="Heads, KV groups and neurons (each) that --verify auto looks for.")  # fmt: skip
@click.option("--confidence", type=Finite(0, 1, min_open=True, max_open=True), default=0.9, show_default=True,
              help="Confidence that --verify auto stops at.")  # fmt: skip
@click.option("--role-threshold", "thresholds", multiple=True, metavar="NAME=VALUE",
              help="What counts as high for a role: module, head, neuron or output (shares), low, errors; repeat.")  # fmt: skip
@click.option("--integrate", type=click.IntRange(0, 64), default=0, show_default=True, metavar="M",
              help="Screen along M steps of the path from base to expert, each a screen's cost (0: at the base).")  # fmt: skip
@click.option(
    "--prompts",
    type=click.IntRange(2),
    default=12,
    show_default=True,
    help="Topics that scores are measured on, and as many that make the anchor.",
)
@click.option(
    "--steering-prompts", type=click.IntRange(0), default=8, show_default=True, help="Prompts of the steering check (0: none)."
)
@click.option("--output-prompts", type=click.IntRange(0), default=6, show_default=True,
              help="Prompts on which modules after the anchor are judged by the output (0: none).")  # fmt: skip
@click.option("--curves/--no-curves", default=True, show_default=True,
              help="Move growing sets of the best components in, beside random and magnitude sets.")  # fmt: skip
@click.option("--curve-seeds", type=click.IntRange(2), default=3, show_default=True, help="Random orders of the set curves.")
@click.option("--curve-output-share", "curve_output_shares", type=click.Choice([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0]),
              multiple=True, default=(0.05, 0.2, 1.0),
              show_default=True, help="Share of the components at which KL and pass rates are measured; repeat.")  # fmt: skip
@click.option("--curve-pass-prompts", type=click.IntRange(0), default=8, show_default=True,
              help="Prompts that patched models answer for the curves' pass rates (0: none).")  # fmt: skip
@click.option("--invalid-anchor", type=click.Choice(["refuse", "report"]), default="refuse", show_default=True,
              help="What to do when an anchor fails its validity check.")  # fmt: skip
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--seed", type=SEED, default=0, show_default=True)
@memory_options
@pair_options
@device_option
@threads_option
@quiet_option
@format_option
def command(
    base: str,
    expert: str,
    behaviors: tuple[str, ...],
    out: Path,
    thresholds: tuple[str, ...],
    only_plan: bool,
    threads: int | None,
    quiet: bool,
    output: str,
    **options: Any,
) -> None:
    """Find which components of EXPERT carry a behaviour that BASE lacks.

    BASE and EXPERT are model references: a folder, owner/name[@revision], demo:NAME, each with +ADAPTER if need be.
    Writes OUT/BEHAVIOR.safetensors, a score file, for each behaviour (OUT/BEHAVIOR.loss.safetensors for scores on the loss),
    and the anchors under OUT/anchors. Set curves tell whether the scores mean anything: a localization that is not above its
    controls is labelled so.
    """
    from mechmerge.artifacts import parse_document
    from mechmerge.behaviors.schema import load_group
    from mechmerge.localize.plan_steps import plan_localize
    from mechmerge.localize.roles import RoleThresholds
    from mechmerge.localize.scores import read_scores
    from mechmerge.localize.settings import LocalizeSettings
    from mechmerge.localize.stage import localize, used
    from mechmerge.models.references import resolve
    from mechmerge.models.sides import note_differences

    loaded = [behavior for name in behaviors for behavior in load_group(name)]
    set_threads(threads)
    progress = make_progress(quiet)
    roles = parse_document(RoleThresholds, named_numbers(thresholds, "--role-threshold"), "--role-threshold")
    settings = LocalizeSettings(on_invalid=options.pop("invalid_anchor"), roles=roles, **options)
    models = resolve(base, progress=progress), resolve(expert, progress=progress)
    note_differences(models[0].path, {models[1].id.name: models[1].path}, progress)
    if only_plan:
        show_plan(plan_localize(models[0].checkpoint(), used(loaded, settings), settings, timed=True), output)
        return
    with memory_guard():
        paths = localize(*models, loaded, out, settings, progress)
    files = [(path, read_scores(path).metadata) for path in paths]
    rows = [_row(path, metadata, output) for path, metadata in files]
    show(rows, output, "anchors")
    if output == "table":
        for _, metadata in files:
            if metadata.roles is not None:
                click.echo(f"{metadata.label}: {metadata.roles.sentence}")
            for kind, record in metadata.verification.items():
                click.echo(f"{metadata.label}: {kind}s: {record.sentence}")
            if metadata.curves is not None:
                verdict = f"{metadata.label}: {metadata.curves.verdict}"
                show(_points(metadata.curves), output, f"set curves of {verdict}")


def _row(path: Path, metadata: ScoreMetadata, output: str) -> dict[str, Any]:
    anchor, curves = metadata.anchor, metadata.curves
    row: dict[str, Any] = {
        "behavior": metadata.behavior,
        "scores on": "loss" if anchor is None else f"layer {anchor.layer}",
        "valid": "yes" if metadata.valid else "NOT VALID: " + "; ".join(metadata.reasons),
        "separation": None if anchor is None else round(anchor.separation, 3),
        "gap": round(metadata.record.gap, 3),
        "scale": metadata.scale,
        "localization": "not compared with controls" if curves is None else curves.label,
        "file": str(path),
    }
    if output == "table":
        return row
    return row | {
        **{name: None if anchor is None else getattr(anchor, name) for name in ("stability", "stability_cosine")},
        "verdict": None if curves is None else curves.verdict,
        "roles": None if metadata.roles is None else metadata.roles.model_dump(mode="json"),
        "verification": {kind: record.model_dump(mode="json") for kind, record in metadata.verification.items()},
        "curves": None if curves is None else curves.model_dump(mode="json"),
    }


def _points(curves: SetCurves) -> list[dict[str, Any]]:
    """One row a share: R, KL and pass rate of the score order and its controls, – where not measured."""

    def cell(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    names = {"score": "score", "random": "random", "largest": "magnitude"}
    by_order = {short: [curve for curve in curves.curves if curve.order == order] for short, order in names.items()}
    rows = []
    for i, point in enumerate(by_order["score"][0].points):
        row = {"share": f"{100 * point.share:g} %", "moved": str(point.components)}
        for order, own in by_order.items():
            values = [curve.points[i].recovery for curve in own]
            row[f"R {order}"] = cell(sum(v or 0.0 for v in values) / len(values))
        for order, own in by_order.items():
            divergences = [kl for curve in own if (kl := curve.points[i].kl) is not None]
            row[f"KL {order}"] = cell(sum(divergences) / len(divergences) if divergences else None)
        for order in ("score", "random"):
            row[f"pass {order}"] = cell(by_order[order][0].points[i].pass_rate)
        rows.append(row)
    return rows
