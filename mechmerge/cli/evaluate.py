"""`mechmerge evaluate`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from mechmerge.cli.common import (
    device_option,
    format_option,
    make_progress,
    quiet_option,
    set_threads,
    threads_option,
    wide_console,
)


def parse_models(texts: tuple[str, ...]) -> list[tuple[str | None, str]]:
    """(name or None, reference) of every `[NAME=]MODEL`; a path that exists is a path, even with a `=` in it."""
    parsed: list[tuple[str | None, str]] = []
    for text in texts:
        name, sign, reference = text.partition("=")
        is_named = sign and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name) and not Path(text).exists()
        parsed.append((name, reference) if is_named else (None, text))
    return parsed


def plain_name(text: str) -> str:
    """The name of a model that was given none: the last part of its portable one (`owner/x` → `x`, `x+adapter` → `adapter`)."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", re.split(r"[/:+]", text)[-1]).strip("-_.") or "model"


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="[NAME=]MODEL...")
@click.option(
    "--suite", "suites", multiple=True, required=True, metavar="formats|arithmetic|FILE", help="What to ask; repeat for more."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="The evaluation file; answers go to samples/ beside it.",
)
@click.option(
    "--against", multiple=True, metavar="NAME", help="A model to compare the others with; repeat (default: the first model)."
)
@click.option(
    "--split", type=click.Choice(["test", "develop"]), default="test", show_default=True, help="Prompts of the built-in suites."
)
@click.option("--limit", type=click.IntRange(1), help="At most this many prompts a suite, for trying out.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="bfloat16", show_default=True)
@click.option("--batch", type=click.IntRange(1), default=24, show_default=True, help="Prompts a batch.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the bootstrap.")
@device_option
@threads_option
@quiet_option
@format_option
def command(
    models: tuple[str, ...],
    suites: tuple[str, ...],
    out: Path,
    against: tuple[str, ...],
    split: Any,
    limit: int | None,
    threads: int | None,
    quiet: bool,
    output: str,
    **options: Any,
) -> None:
    """Generate each MODEL's greedy answers to the suites and judge them.

    MODEL is a model reference: a folder, owner/name[@revision], demo:NAME, each with +ADAPTER if need be. The table shows pass
    rates with 95 % intervals; the evaluation file also holds every group of prompts and the paired tests.
    """
    from mechmerge.errors import InputError
    from mechmerge.evaluate.record import EvaluateSettings
    from mechmerge.evaluate.run import evaluate
    from mechmerge.evaluate.suites import load_suite
    from mechmerge.models.references import Model, resolve

    loaded = [load_suite(name, split, limit) for name in suites]
    set_threads(threads)
    progress = make_progress(quiet)
    resolved: dict[str, Model] = {}
    for given, reference in parse_models(models):
        model = resolve(reference, progress=progress)
        name = given or plain_name(model.id.name)
        if name in resolved:
            raise InputError("models", expected="each name once", found=f"{name} twice", fix=f"write NAME={reference}")
        resolved[name] = model
    chosen = against or (tuple(resolved)[:1] if len(resolved) > 1 else ())
    evaluation = evaluate(resolved, loaded, out, EvaluateSettings(**options), progress, against=chosen)
    if output == "json":
        click.echo(evaluation.model_dump_json(indent=1))
        return
    from mechmerge.evaluate.table import render_table

    wide_console().print(render_table(evaluation))
