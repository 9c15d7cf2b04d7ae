"""`mechmerge inspect`."""

from __future__ import annotations

import click

from mechmerge.cli.common import format_option, make_progress, show


@click.command()
@click.argument("file")
@format_option
def command(file: str, output: str) -> None:
    """Print what a score file, effect file, recipe or evaluation holds, after checking it.

    FILE is a path, or a file on the Hub: hf://[datasets/]owner/name[@revision]/path.

    With --format json: its kind, its whole document and the shapes of its tensors.
    """
    import json

    from mechmerge.models.hub_files import local_file
    from mechmerge.report.inspection import inspect_file

    found = inspect_file(local_file(file, make_progress(quiet=False)))
    if output == "json":
        click.echo(json.dumps({"kind": found.kind, "document": found.document, "tensors": found.tensors}, ensure_ascii=False))
        return
    for title, rows in found.tables.items():
        show(rows, output, title)
