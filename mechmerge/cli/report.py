"""`mechmerge report`."""

from __future__ import annotations

from pathlib import Path

import click

from mechmerge.cli.common import format_option


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@format_option
def command(run: Path, output: str) -> None:
    """Draw the figures of a run directory and write its report: RUN/report.md, RUN/report.html and RUN/figures/*.png.

    The HTML page is complete in itself: it can be moved and opened anywhere.
    """
    import json

    from mechmerge.publish.licenses import license_of
    from mechmerge.report.files import find_run_files
    from mechmerge.report.html import write_page
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
    page = write_page(files, run, license_of)
    click.echo(json.dumps({"report": str(path), "page": str(page)}) if output == "json" else f"{path}\n{page}")
