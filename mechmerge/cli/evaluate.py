"""`mechmerge evaluate`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mechmerge.cli.common import (
    SEED,
    device_option,
    make_progress,
    quiet_option,
    set_threads,
    threads_option,
    wide_console,
)

if TYPE_CHECKING:
    from mechmerge.evaluate.record import Evaluation
    from mechmerge.evaluate.suites import Suite
    from mechmerge.models.references import Model
    from mechmerge.progress import Progress


def parse_models(texts: tuple[str, ...]) -> list[tuple[str | None, str]]:
    """(name or None, reference) of every `[NAME=]MODEL`; a path that exists is a path, even with a `=` in it."""
    from mechmerge.evaluate.record import NAME

    parsed: list[tuple[str | None, str]] = []
    for text in texts:
        name, sign, reference = text.partition("=")
        is_named = sign and re.fullmatch(NAME, name) and not Path(text).exists()
        parsed.append((name, reference) if is_named else (None, text))
    return parsed


def plain_name(text: str) -> str:
    """The name of a model that was given none: the last part of its portable one (`owner/x` → `x`, `x+adapter` → `adapter`)."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", re.split(r"[/:+]", text)[-1]).strip("-_.") or "model"


def table_options(function: Any) -> Any:
    """`--format` with all that an evaluation can be printed as, and `--chart`."""
    choice = click.Choice(["table", "json", "markdown", "csv"])
    chart = click.option("--chart", type=click.Path(path_type=Path, dir_okay=False), help="Also draw a PNG of the results.")
    shape = click.option("--format", "output", type=choice, default="table", show_default=True, help="How results are printed.")
    return shape(chart(function))


@click.command()
@click.argument("models", nargs=-1, metavar="[NAME=]MODEL...")
@click.option(
    "--suite", "suites", multiple=True, required=True, metavar="formats|arithmetic|code|ifeval|ifbench|lm_eval:TASK|FILE",
    help="What to ask; repeat for more.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("evaluation.json"), show_default=True,
    help="The evaluation file; answers are kept in samples/ beside it.",
)  # fmt: skip
@click.option(
    "--against", multiple=True, metavar="NAME", help="Compare the others with this model; repeat (default: the first model)."
)
@click.option(
    "--responses", multiple=True, metavar="[NAME=]FILE.jsonl",
    help="Score answers made elsewhere (prompt, response, key a line) in the place of models; repeat.",
)  # fmt: skip
@click.option("--join-loose", is_flag=True, help="Also pair responses whose prompt is worded a little differently.")
@click.option("--data", type=click.Path(path_type=Path, dir_okay=False),
              help="The prompts of ifeval or ifbench (default: the official ones).")  # fmt: skip
@click.option(
    "--split",
    type=click.Choice(["test", "develop"]),
    default="test",
    show_default=True,
    help="Prompts of formats, arithmetic and code (others have no splits).",
)
@click.option(
    "--tier", "tiers", multiple=True, type=click.Choice(["seen", "unseen", "hard"]), help="Only prompts of this tier; repeat."
)
@click.option("--limit", type=click.IntRange(1), help="At most this many prompts a suite, for trying out.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="bfloat16", show_default=True)
@click.option("--exact", is_flag=True, help="float32, and answers that do not depend on --batch (slower).")
@click.option("--batch", type=click.IntRange(1), default=24, show_default=True, help="Prompts a batch; part of the result.")
@click.option("--backend", type=click.Choice(["transformers", "vllm"]), default="transformers", show_default=True)
@click.option(
    "--thinking", type=click.Choice(["keep", "strip"]), default="keep", show_default=True,
    help="Whether <think>…</think> is part of the answer that is judged.",
)  # fmt: skip
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the bootstrap.")
@click.option("--overwrite", is_flag=True, help="Replace samples of another model or of other settings.")
@device_option
@threads_option
@quiet_option
@table_options
def command(
    models: tuple[str, ...],
    suites: tuple[str, ...],
    out: Path,
    against: tuple[str, ...],
    responses: tuple[str, ...],
    join_loose: bool,
    data: Path | None,
    split: Any,
    tiers: Any,
    limit: int | None,
    exact: bool,
    overwrite: bool,
    threads: int | None,
    quiet: bool,
    output: str,
    chart: Path | None,
    **options: Any,
) -> None:
    """Generate each MODEL's greedy answers to the suites and judge them.

    MODEL is a model reference: a folder, owner/name[@revision], demo:NAME, each with +ADAPTER if need be. The table shows pass
    rates with 95 % intervals; the evaluation file also holds every group of prompts and the paired tests. `--against` a parent
    to see what changed, type by type, with the regressions marked.
    """
    from mechmerge.errors import InputError
    from mechmerge.evaluate.record import EvaluateSettings
    from mechmerge.evaluate.suites import PUBLISHED, is_task, load_suite

    if bool(models) == bool(responses):
        raise click.UsageError("Give models, or --responses.")
    if join_loose and not responses:
        raise click.UsageError("--join-loose belongs to --responses.")
    if data is not None and len(set(suites) & set(PUBLISHED)) != 1:
        wanted = f"one suite that it belongs to, {' or '.join(PUBLISHED)}"
        raise InputError("--data", expected=wanted, found=", ".join(suites))
    if exact:
        options["dtype"] = "float32"
    settings = EvaluateSettings(exact=exact, **options)
    progress = make_progress(quiet)
    loaded = [
        load_suite(name, split, limit, tiers=tiers or None, data=data if name in PUBLISHED else None)
        for name in suites
        if not is_task(name)
    ]
    if responses:
        evaluation = _responses(responses, suites, loaded, out, settings, join_loose, against, progress)
    else:
        from mechmerge.evaluate.run import evaluate

        set_threads(threads)
        resolved = _resolved(models, progress)
        chosen = against or (tuple(resolved)[:1] if len(resolved) > 1 else ())
        tasks = [name for name in suites if is_task(name)]
        evaluation = evaluate(
            resolved, loaded, out, settings, progress, against=chosen, overwrite=overwrite, tasks=tasks, limit=limit
        )
    print_evaluation(evaluation, output, chart)


def print_evaluation(evaluation: Evaluation, output: str, chart: Path | None) -> None:
    """Prints an evaluation in one of the formats of `table_options`, and draws it if asked to."""
    from mechmerge.evaluate import table

    if chart is not None:
        from mechmerge.report.comparison import draw_chart

        draw_chart(evaluation, chart)
    if output == "json":
        click.echo(evaluation.model_dump_json(indent=1))
    elif output == "markdown":
        parts = (table.markdown_table(evaluation), table.markdown_pairs(evaluation), table.markdown_breakdown(evaluation))
        click.echo("\n".join(part for part in parts if part))
    elif output == "csv":
        click.echo(table.csv_table(evaluation), nl=False)
    else:
        console = wide_console()
        console.print(table.render_table(evaluation))
        if evaluation.pairs:
            console.print(table.render_pairs(evaluation))
            console.print(table.render_breakdown(evaluation))


def _resolved(models: tuple[str, ...], progress: Progress) -> dict[str, Model]:
    from mechmerge.errors import InputError
    from mechmerge.models.references import resolve

    resolved: dict[str, Model] = {}
    for given, reference in parse_models(models):
        model = resolve(reference, progress=progress)
        name = given or plain_name(model.id.name)
        if name in resolved:
            raise InputError("models", expected="each name once", found=f"{name} twice", fix=f"write NAME={reference}")
        resolved[name] = model
    return resolved


def _responses(
    responses: tuple[str, ...],
    suites: tuple[str, ...],
    loaded: list[Suite],
    out: Path,
    settings: Any,
    join_loose: bool,
    against: tuple[str, ...],
    progress: Progress,
) -> Evaluation:
    from mechmerge.errors import InputError
    from mechmerge.evaluate.responses import evaluate_responses

    if len(suites) != 1 or not loaded:
        raise InputError("--responses", expected="one suite that is no task of lm-eval", found=", ".join(suites))
    files: dict[str, Path] = {}
    for given, path in parse_models(responses):
        name = given or plain_name(Path(path).stem)
        if name in files:
            raise InputError("--responses", expected="each name once", found=f"{name} twice", fix=f"write NAME={path}")
        files[name] = Path(path)
    chosen = against or (tuple(files)[:1] if len(files) > 1 else ())
    return evaluate_responses(files, loaded[0], out, settings, loose_join=join_loose, against=chosen, progress=progress)
