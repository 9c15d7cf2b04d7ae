"""`mechmerge rounds`."""

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


def loss_alone(_context: click.Context, _parameter: click.Parameter, value: str) -> None:
    """Refuses any metric but the loss, with the reason."""
    from mechmerge.localize.settings import loss_of_rounds

    try:
        loss_of_rounds(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@click.command(cls=BehaviorCommand)
@click.argument("base")
@click.argument("experts", nargs=-1, required=True, metavar="[NAME=]EXPERT...")
@calibration_options
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The rounds file.")
@click.option("--metric", default="loss", show_default=True, expose_value=False, callback=loss_alone,
              help="Rounds are measured on the loss alone.")  # fmt: skip
@click.option("--max-rounds", type=click.IntRange(1, 4), default=4, show_default=True, help="Most rounds.")
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
    """Settle which components a merge takes, measuring where the decision is taken.

    Starts from the sum of the experts; each round turns components over whose effect at the current merge, and along the
    path to the change, agrees on both halves of the calibration prompts; stops when the measured gain stops rising.
    Trains nothing.
    """
    from mechmerge.cli.models import behavior_rows, open_experts
    from mechmerge.localize.calibration import rows_of
    from mechmerge.localize.plan_steps import plan_effects
    from mechmerge.localize.rounds import RoundSettings, settle
    from mechmerge.models.references import resolve
    from mechmerge.models.sides import note_differences

    rows = behavior_rows(behaviors, weights)
    set_threads(threads)
    progress = make_progress(quiet)
    models = open_experts(experts, progress)
    settings, model = RoundSettings(**options), resolve(base, progress=progress)
    note_differences(model.path, {name: expert.path for name, expert in models.items()}, progress)
    if only_plan:
        show_plan(plan_effects(model.checkpoint(), len(models), rows_of(rows), settings, timed=True), output)
        return
    with memory_guard():
        file = settle(model, models, rows, out, settings, progress)
    show(
        [
            {
                "round": number,
                "proposed": record.proposed,
                "changed": record.changed,
                "weighted gain": round(record.gain, 3),
                "accepted": "yes" if record.accepted else "no",
                **{f"{name}: predicted": round(value, 3) for name, value in record.predicted.items()},
                **{f"{name}: realised": round(value, 3) for name, value in record.realised.items()},
            }
            for number, record in enumerate(file.metadata.rounds, 1)
        ],
        output,
        "rounds",
    )
