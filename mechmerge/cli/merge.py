"""`mechmerge merge`."""

from __future__ import annotations

from pathlib import Path

import click

from mechmerge.cli.common import format_option, make_progress, quiet_option, set_threads, show, threads_option


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path, dir_okay=False))
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--model", "models", multiple=True, metavar="NAME=MODEL",
              help="Where a model lies: base, an expert's name or its reference (default: where it last was).")  # fmt: skip
@click.option("--expert", metavar="NAME", help="Write only this expert of the recipe, masked, as a model of its own.")
@threads_option
@quiet_option
@format_option
def command(
    recipe: Path, out: Path, models: tuple[str, ...], expert: str | None, threads: int | None, quiet: bool, output: str
) -> None:
    """Carry out RECIPE (recipe.yaml) and write the merged model to the new folder OUT.

    OUT appears complete and verified, or not at all; where it already holds the model of this recipe nothing is done.
    """
    from mechmerge.cli.models import open_folders

    folders = open_folders(models)
    from mechmerge.merge.engine import merge
    from mechmerge.recipe.schema import read_recipe

    set_threads(threads)
    merge(recipe, out, folders, make_progress(quiet), expert)
    written, _ = read_recipe(out / "recipe.yaml")
    size = sum(file.stat().st_size for file in out.glob("*.safetensors")) / 1e6
    row = {"model": str(out), "policy": written.policy.name, "experts": ", ".join(written.experts), "dtype": written.out_dtype}
    show([row | {"MB": round(size, 1)}], output, "merged")
