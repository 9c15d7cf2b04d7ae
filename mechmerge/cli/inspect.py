"""`mechmerge inspect`."""

from __future__ import annotations

import click

from mechmerge.cli.common import format_option, make_progress, quiet_option, show


@click.command()
@click.argument("what", metavar="FILE|RUN|MODEL")
@click.argument("other", metavar="[MODEL]", required=False)
@quiet_option
@format_option
def command(what: str, other: str | None, quiet: bool, output: str) -> None:
    """Print what a file, a run or a model holds, after checking it; with a second MODEL, how the two compare.

    A file: scores, effects, rounds, a recipe, an evaluation, a gate's verdict, a sweep; a path, or
    hf://[datasets/]owner/name[@revision]/path. A run: its directory. A model: a reference, as everywhere. Two models: whether
    they can be merged, and by how much their weights differ at every depth.

    With --format json: its kind, its whole document and the shapes of its tensors.
    """
    import json

    from mechmerge.pipeline.inspection import inspect_any

    found = inspect_any(what, other, make_progress(quiet))
    if output == "json":
        click.echo(json.dumps({"kind": found.kind, "document": found.document, "tensors": found.tensors}, ensure_ascii=False))
        return
    for title, rows in found.tables.items():
        show(rows, output, title)
