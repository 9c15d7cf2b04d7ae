"""`mechmerge tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mechmerge.cli.common import (
    SEED,
    device_option,
    format_option,
    make_progress,
    quiet_option,
    set_threads,
    show,
    threads_option,
)

if TYPE_CHECKING:
    from mechmerge.pipeline.tuning import Tuning


@click.command()
@click.argument("pipeline", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="The search's folder.")
@click.option("--recipe", metavar="NAME", help="The recipe whose open parameters are searched (default: the published one).")
@click.option("--open", "opened", multiple=True, metavar="NAME[=LOW:HIGH|=A,B]",
              help="Search this parameter although the recipe sets it, or in another range; repeat.")  # fmt: skip
@click.option("--suite", "suites", multiple=True, metavar="NAME", help="Ask this suite in the place of the pipeline's; repeat.")
@click.option("--trials", type=click.IntRange(1), default=24, show_default=True, help="Most trials.")
@click.option(
    "--patience", type=click.IntRange(1), default=10, show_default=True, help="End after so many without a better one."
)
@click.option("--target", type=float, help="End at this quality.")
@click.option("--limit", type=click.IntRange(2), default=48, show_default=True, help="Development prompts a suite.")
@click.option("--chunk", type=click.IntRange(1), default=24, show_default=True,
              help="Prompts of a suite asked before a trial may be given up.")  # fmt: skip
@click.option("--prune/--no-prune", default=True, show_default=True, help="Give up trials that are worse than the best.")
@click.option("--seed", type=SEED, default=0, show_default=True)
@device_option
@threads_option
@quiet_option
@format_option
def command(
    pipeline: Path,
    out: Path,
    recipe: str | None,
    opened: tuple[str, ...],
    suites: tuple[str, ...],
    device: str,
    threads: int | None,
    quiet: bool,
    output: str,
    **options: Any,
) -> None:
    """Search what a recipe of PIPELINE leaves open: budget, strengths of the experts, overlap rule, weights of behaviours.

    Merges are tried in memory on prompts of the develop split; the test split is never asked (a suite from a file has no
    splits: its prompts are development prompts from then on). The first trial is the
    policy as it is; the next five are those that the effect matrix, where there is one, predicts to be best; then optuna's TPE
    chooses. A search that was interrupted goes on when it
    is called again, and --trials may be raised.
    """
    from mechmerge.pipeline.tune import tune
    from mechmerge.pipeline.tuning import TuneSettings

    set_threads(threads)
    settings = TuneSettings(**options)
    found = tune(
        pipeline,
        out,
        settings,
        recipe=recipe,
        opened=opened,
        suites=suites or None,
        progress=make_progress(quiet),
        device=device,
    )
    if output == "json":
        click.echo(found.model_dump_json(indent=1))
        return
    _show(found, out)


def _show(found: Tuning, out: Path) -> None:
    import yaml

    rows = [
        {"trial": trial.number, "from": trial.source}
        | {one.name: trial.parameters[one.name] for one in found.space}
        | {
            "predicted": "" if trial.predicted is None else f"{trial.predicted:.3f}",
            "asked": trial.prompts,
            **{name: f"{trial.metrics[name]:.3f}" if trial.metrics else "" for name in found.chosen.metrics},
            "quality": trial.state if trial.metrics == {} else f"{trial.quality:.3f}",
        }
        for trial in found.trials
    ]
    show(rows, "table", f"{found.asked}; quality: mean of the headlines less what the gate misses")
    ended = {"trials": "all trials were made", "patience": f"{found.settings.patience} trials brought none better",
             "target": f"quality {found.settings.target} was reached"}[found.stopped]  # fmt: skip
    click.echo(f"best: trial {found.best}, quality {found.chosen.quality:.3f}")
    click.echo(f"ended: {ended}. The best of {len(found.trials)} looks better than it is: judge it on the test split.")
    plan = {"policy": found.policy, "parameters": found.fixed | dict(found.chosen.parameters)}
    told = yaml.safe_dump({"tuned": plan}, default_flow_style=True, sort_keys=False, width=10_000).strip()[1:-1]
    click.echo(f"recipe: {out / 'recipe.yaml'}; as an entry of the pipeline's recipes:\n  {told}")
