"""`mechmerge inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from mechmerge.cli.common import format_option, show


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@format_option
def command(file: Path, output: str) -> None:
    """Print what a score file, effect file, recipe or evaluation holds, after checking it.

    With --format json: its kind, its whole document and the shapes of its tensors.
    """
    import json

    from mechmerge.report.inspection import inspect_file

    found = inspect_file(file)
    if output == "json":
        click.echo(json.dumps({"kind": found.kind, "document": found.document, "tensors": found.tensors}, ensure_ascii=False))
        return
    for title, rows in found.tables.items():
        show(rows, output, title)
