"""`mechmerge effects`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mechmerge.cli.common import (
    BehaviorCommand,
    Finite,
    calibration_options,
    device_option,
    format_option,
    make_progress,
    memory_guard,
    memory_options,
    pair_options,
    quiet_option,
    set_threads,
    show,
    show_plan,
    threads_option,
)


@click.command(cls=BehaviorCommand)
@click.argument("base")
@click.argument("experts", nargs=-1, required=True, metavar="[NAME=]EXPERT...")
@calibration_options
@click.option(
    "--metric",
    type=click.Choice(["loss", "anchor"]),
    default="loss",
    show_default=True,
    help="loss: of the expert's own answers; anchor: recovery of its state along the anchor (components below it alone).",
)
@click.option("--steering-prompts", type=click.IntRange(0), default=8, show_default=True,
              help="Prompts of the anchors' steering check (0: none).")  # fmt: skip
@click.option("--invalid-anchor", type=click.Choice(["refuse", "report"]), default="refuse", show_default=True,
              help="What to do when an anchor fails its validity check.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The effect file.")
@click.option(
    "--tolerance",
    type=Finite(0, min_open=True),
    default=0.05,
    show_default=True,
    help="Completeness error at which no more nodes are added.",
)
@click.option(
    "--max-nodes",
    type=click.IntRange(6),
    default=10,
    show_default=True,
    help="Most points of the path that are kept; an interval that is halved has its own taken anew.",
)
@click.option("--from", "origin", type=click.Choice(["base", "sum"]), default="base", show_default=True,
              help="base: along the path to the sum; sum: from there to what a round would leave of it.")  # fmt: skip
@click.option("--check", type=click.IntRange(4), metavar="N",
              help="Hold predictions against measured changes on N masks (`solve` needs 100).")  # fmt: skip
@memory_options
@pair_options
@device_option
@threads_option
@quiet_option
@format_option
def command(
    base: str,
    experts: tuple[str, ...],
    behaviors: tuple[str, ...],
    weights: tuple[str, ...],
    protect: tuple[str, ...],
    out: Path,
    only_plan: bool,
    threads: int | None,
    quiet: bool,
    output: str,
    **options: Any,
) -> None:
    """Measure what every component of every expert does to every behaviour.

    The path goes from BASE to the sum of the experts' deltas (or, with --from sum, on from there); an effect is a component's
    share of what a behaviour gains along it: of the drop in the negative log-likelihood of its expert's own answers (nats
    per answer token), or of the recovery of its expert's state along the anchor (0: the base's, 1: the expert's). Positive
    helps.
    """
    from mechmerge.cli.models import behavior_rows, open_experts
    from mechmerge.localize.effect_file import MEASURED
    from mechmerge.localize.effects import EffectSettings, measure_effects, plan_matrix
    from mechmerge.models.references import resolve
    from mechmerge.models.sides import note_differences

    rows = behavior_rows(behaviors, weights, protect)
    set_threads(threads)
    progress = make_progress(quiet)
    models = open_experts(experts, progress)
    if options["tokens"] is None:
        del options["tokens"]
    settings = EffectSettings(on_invalid=options.pop("invalid_anchor"), check=options.pop("check") or 0, **options)
    model = resolve(base, progress=progress)
    note_differences(model.path, {name: expert.path for name, expert in models.items()}, progress)
    if only_plan:
        show_plan(plan_matrix(model.checkpoint(), len(models), rows, settings), output)
        return
    with memory_guard():
        file = measure_effects(model, models, rows, out, settings, progress)
    metadata, table = file.metadata, []
    for b in metadata.behaviors:
        at = zip((*metadata.path.split("→"), "own expert"), metadata.shown(b).values(), strict=True)
        row: dict[str, Any] = {"behavior": b.name, "expert": b.expert, metadata.counted: f"{b.answers} of {b.prompts}"}
        row |= {f"{MEASURED[metadata.metric]} {where}": round(value, 3) for where, value in at}
        table.append(row | {"completeness error": round(b.completeness_error, 3)})
    for name, caveat in metadata.caveats.items():
        progress.note(f"note: {name}: {caveat}")
    show(table, output, "effects")
    if metadata.linearity is not None:
        lines = [
            {"behavior": name, "slope": round(line.slope, 3), "R2": round(line.r2, 3), "holds": "yes" if line.holds else "NO"}
            for name, line in metadata.linearity.lines.items()
        ]
        show(lines, output, f"measured on predicted changes around the sum, {metadata.linearity.masks} masks")
