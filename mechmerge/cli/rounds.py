"""`mechmerge rounds`."""

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
@click.option("--max-rounds", type=click.IntRange(1, 4), help="Most rounds (4).")
@click.option("--certainty", type=Finite(0, 100),
              help="Standard errors by which turning a component over must help (2).")  # fmt: skip
@click.option("--solve", "effects", type=click.Path(path_type=Path, dir_okay=False), metavar="EFFECTS",
              help="Instead of rounds: a linear program over this effect file, measured, and once more if off.")  # fmt: skip
@click.option("--budget", type=Finite(0, 1, min_open=True),
              help="solve: fraction of each expert's head + kv + neuron parameters (default: all).")  # fmt: skip
@click.option("--limit", "limits", multiple=True, metavar="NAME=NATS",
              help="solve: most rise of a behaviour's loss above the base's (protected ones: 0.1); repeat.")  # fmt: skip
@click.option("--agreement/--no-agreement", default=None, help="solve: the worst case is that of both halves of the prompts.")
@click.option("--tolerance", type=Finite(0, min_open=True),
              help="solve: share of its expert's gain by which a prediction may be off unmeasured (0.1).")  # fmt: skip
@click.option("--unproven", is_flag=True, help="solve: although predictions of the effects are not known to come true.")
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
    effects: Path | None,
    budget: float | None,
    limits: tuple[str, ...],
    max_rounds: int | None,
    certainty: float | None,
    agreement: bool | None,
    tolerance: float | None,
    unproven: bool,
    only_plan: bool,
    threads: int | None,
    quiet: bool,
    output: str,
    **options: Any,
) -> None:
    """Settle which components a merge takes, measuring where the decision is taken.

    Starts from the sum of the experts; each round turns components over whose effect at the current merge, and along the
    path to the change, helps on both halves of the calibration prompts and by --certainty standard errors on all of them;
    stops when the measured gain stops rising. Trains nothing.

    With --solve: the coefficients with the largest predicted worst case, the gain that the worst-off behaviour keeps of its own
    expert's, under a budget and limits of damage; measured, and solved once more where the prediction was off.
    """
    from mechmerge.cli.common import named_numbers
    from mechmerge.cli.models import behavior_rows, open_experts
    from mechmerge.errors import InputError
    from mechmerge.localize.calibration import rows_of
    from mechmerge.localize.effect_file import read_effects
    from mechmerge.localize.plan_steps import plan_effects
    from mechmerge.localize.rounds import RoundSettings, settle
    from mechmerge.localize.solving import SolveSettings, settle_solution
    from mechmerge.models.references import resolve
    from mechmerge.models.sides import note_differences

    given = {"budget": budget, "limits": named_numbers(limits, "--limit") or None, "agreement": agreement,
             "tolerance": tolerance, "unproven": unproven or None}  # fmt: skip
    told: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if effects is None and told:
        raise InputError("rounds", expected=f"--solve EFFECTS with what belongs to it ({', '.join(told)})", found="none")
    own = {"max_rounds": max_rounds, "certainty": certainty}
    asked_of_rounds = {name: value for name, value in own.items() if value is not None}
    if effects is not None and (only_plan or asked_of_rounds):
        found = "--plan" if only_plan else f"--{next(iter(asked_of_rounds)).replace('_', '-')}"
        raise InputError(
            "rounds --solve", expected="what belongs to a solution, which takes a few passes of losses", found=found
        )
    rows = behavior_rows(behaviors, weights, protect)
    set_threads(threads)
    progress = make_progress(quiet)
    models = open_experts(experts, progress)
    options |= asked_of_rounds
    if options["tokens"] is None:
        del options["tokens"]  # as rounds do, or as the effect file does
    given_tokens = "tokens" in options
    settings, model = RoundSettings(**options), resolve(base, progress=progress)
    note_differences(model.path, {name: expert.path for name, expert in models.items()}, progress)
    if only_plan:
        show_plan(plan_effects(model.checkpoint(), len(models), rows_of(rows), settings, timed=True), output)
        return
    with memory_guard():
        if effects is None:
            file = settle(model, models, rows, out, settings, progress)
        else:
            measured = read_effects(effects)
            common = settings.model_dump(exclude={*own}) | ({} if given_tokens else {"tokens": measured.metadata.tokens})
            asked = SolveSettings(**common, **told)
            file = settle_solution(model, models, rows, measured, out, asked, progress)
    show(
        [
            {
                "round" if effects is None else "solution": number,
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
        file.metadata.method,
    )
