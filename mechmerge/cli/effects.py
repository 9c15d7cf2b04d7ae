"""`mechmerge effects`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mechmerge.cli.common import (
    BehaviorCommand,
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
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The effect file.")
@click.option(
    "--tolerance",
    type=click.FloatRange(0, min_open=True),
    default=0.05,
    show_default=True,
    help="Completeness error at which no more nodes are added.",
)
@click.option("--max-nodes", type=click.IntRange(6), default=10, show_default=True, help="Most points of the path.")
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
    out: Path,
    only_plan: bool,
    threads: int | None,
    quiet: bool,
    output: str,
    **options: Any,
) -> None:
    """Measure what every component of every expert does to every behaviour.

    The path goes from BASE to the sum of the experts' deltas; an effect is a component's share of the drop in the negative
    log-likelihood of a behaviour's expert's own answers (nats per token; positive helps).
    """
    from mechmerge.cli.models import behavior_rows, open_experts
    from mechmerge.localize.calibration import rows_of
    from mechmerge.localize.effects import EffectSettings, measure_effects
    from mechmerge.localize.plan_steps import plan_effects
    from mechmerge.models.references import resolve

    rows = behavior_rows(behaviors, weights)
    set_threads(threads)
    progress = make_progress(quiet)
    models = open_experts(experts, progress)
    settings, model = EffectSettings(**options), resolve(base, progress=progress)
    if only_plan:
        show_plan(plan_effects(model.checkpoint(), len(models), rows_of(rows), settings, timed=True), output)
        return
    with memory_guard():
        file = measure_effects(model, models, rows, out, settings, progress)
    table = [
        {
            "behavior": b.name,
            "expert": b.expert,
            "answers": f"{b.answers} of {b.prompts}",
            "loss base": round(b.loss_start, 3),
            "loss sum": round(b.loss_end, 3),
            "loss own expert": round(b.loss_expert, 3),
            "completeness error": round(b.completeness_error, 3),
        }
        for b in file.metadata.behaviors
    ]
    show(table, output, "effects")
