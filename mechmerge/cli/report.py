"""`mechmerge report`."""

from __future__ import annotations

from pathlib import Path

import click

from mechmerge.cli.common import format_option


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@format_option
def command(run: Path, output: str) -> None:
    """Draw the heat maps of a run directory and write its summary: RUN/report.md and RUN/figures/*.png."""
    import json

    from mechmerge.report.files import find_run_files
    from mechmerge.report.summary import write_report

    files = find_run_files(run)
    path = write_report(
        files.scores,
        files.effects,
        files.recipes,
        files.evaluation,
        run,
        gate=files.gate,
        rounds=files.rounds,
        title=files.title,
        notes=files.notes,
    )
    click.echo(json.dumps({"report": str(path)}) if output == "json" else str(path))
