"""`mechmerge effects`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mechmerge.cli.common import (
    device_option,
    format_option,
    make_progress,
    named,
    pair_options,
    quiet_option,
    set_threads,
    show,
    threads_option,
)


@click.command()
@click.argument("base")
@click.argument("experts", nargs=-1, required=True, metavar="[NAME=]EXPERT...")
@click.option("--behavior", "behaviors", multiple=True, required=True, metavar="NAME=EXPERT",
              help="A behaviour (name, file, or the group `formats`) and the expert that answers for it; repeat.")  # fmt: skip
@click.option("--weight", "weights", multiple=True, metavar="NAME=NUMBER", help="Weight of a behaviour (default 1).")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The effect file.")
@click.option("--prompts", type=click.IntRange(4), default=48, show_default=True, help="Calibration prompts a behaviour.")
@click.option(
    "--tolerance", type=float, default=0.05, show_default=True, help="Completeness error at which no more nodes are added."
)
@click.option("--max-nodes", type=click.IntRange(4), default=10, show_default=True, help="Most points of the path.")
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True, help="Examples a forward pass.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="bfloat16", show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
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
    threads: int | None,
    quiet: bool,
    output: str,
    **options: Any,
) -> None:
    """Measure what every component of every expert does to every behaviour.

    The path goes from BASE to the sum of the experts' deltas; an effect is a component's share of the drop in the negative
    log-likelihood of a behaviour's expert's own answers (nats per token; positive helps).
    """
    from mechmerge.behaviors.schema import load_group
    from mechmerge.errors import InputError
    from mechmerge.localize.calibration import BehaviorRow
    from mechmerge.localize.effects import EffectSettings, measure_effects
    from mechmerge.models.references import resolve
    from mechmerge.recipe.sources import expert_name

    owners = named(behaviors, "--behavior")
    given = named(weights, "--weight")
    try:
        numbers = {name: float(value) for name, value in given.items()}
    except ValueError:
        raise InputError("--weight", expected="NAME=NUMBER", found=" ".join(weights)) from None
    if unknown := numbers.keys() - owners.keys():
        raise InputError("--weight", expected=f"one of {', '.join(owners)}", found=", ".join(sorted(unknown)))
    rows = [BehaviorRow(Path(n).stem, load_group(n), expert, numbers.get(n, 1.0)) for n, expert in owners.items()]
    set_threads(threads)
    progress = make_progress(quiet)
    models = {}
    for text in experts:
        name, sign, reference = text.partition("=")
        model = resolve(reference if sign else text, progress=progress)
        name = name if sign else expert_name(model.id)
        if name in models:
            raise InputError("EXPERT", expected="each name once", found=f"{name} twice", fix="write NAME=EXPERT")
        models[name] = model
    file = measure_effects(resolve(base, progress=progress), models, rows, out, EffectSettings(**options), progress)
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
