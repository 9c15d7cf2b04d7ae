"""`mechmerge run`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

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
from mechmerge.errors import visible

if TYPE_CHECKING:
    from mechmerge.pipeline.run import RunResult


@click.command()
@click.argument("pipeline", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="The run directory (needed without --check).")
@click.option("--check", is_flag=True, help="Only check the file: schema, behaviours, suites and the form of references.")
@device_option
@threads_option
@quiet_option
@format_option
def command(pipeline: Path, out: Path | None, check: bool, device: str, threads: int | None, quiet: bool, output: str) -> int:
    """Carry out a PIPELINE file: localize, effects, recipes, merge, evaluate, gate, report and card.

    Every stage that is done already is skipped, so an interrupted run goes on when it is called again. Exit code 3: the gate
    refused the merge.
    """
    from mechmerge.pipeline.run import run_pipeline
    from mechmerge.pipeline.source import check_pipeline

    if check:
        check_pipeline(pipeline)
        click.echo(json.dumps({"valid": str(pipeline)}) if output == "json" else f"{pipeline}: valid")
        return 0
    if out is None:
        raise click.UsageError("Missing option '--out'.")
    set_threads(threads)
    result = run_pipeline(pipeline, out, make_progress(quiet), device)
    show_result(result, output)
    return 0 if result.gate.passed else 3


def show_result(result: RunResult, output: str) -> None:
    """Prints the evaluation's table, what the gate said, and where the report is."""
    if output == "json":
        facts = {
            "run": str(result.run),
            "gate": result.gate.model_dump(mode="json"),
            "evaluation": str(result.run / "evaluation.json"),
            "report": str(result.run / "report.html"),
            "card": str(result.run / "README.md"),
            "worked": list(result.worked),
        }
        click.echo(json.dumps(facts, ensure_ascii=False))
        return
    from mechmerge.evaluate.table import render_table

    console = wide_console()
    console.print(render_table(result.evaluation))
    for rule in result.gate.rules:
        console.print(visible(rule.line), markup=False, highlight=False)
    console.print("gate: passed" if result.gate.passed else "gate: REFUSED", markup=False, highlight=False)
    for title, name in (("report", "report.md"), ("heat maps", "figures"), ("model card", "README.md")):
        console.print(f"{title}: {result.run / name}", markup=False, highlight=False, soft_wrap=True)
    if not result.worked:
        console.print("nothing to do: everything was there already", markup=False, highlight=False)
