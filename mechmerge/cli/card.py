"""`mechmerge card`."""

from __future__ import annotations

from pathlib import Path

import click

from mechmerge.cli.common import format_option


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--model", metavar="NAME", help="The recipe to describe (default: the one that the pipeline publishes).")
@click.option(
    "--license", "license_", metavar="NAME", help="Licence of the merge, as the Hub writes it (apache-2.0, llama3.2, ...)."
)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="The file to write (default: RUN/README.md).")
@format_option
def command(run: Path, model: str | None, license_: str | None, out: Path | None, output: str) -> None:
    """Write the model card of a run: parents, recipe, evaluation, heat maps, how to make it again, limits."""
    import json

    from mechmerge.publish.card import write_card

    path = write_card(run, model, out, license=license_)
    click.echo(json.dumps({"card": str(path)}) if output == "json" else str(path))
