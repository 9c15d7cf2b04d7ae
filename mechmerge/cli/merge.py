"""`mechmerge merge`."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import click

from mechmerge.cli.common import format_option, make_progress, quiet_option, set_threads, show, threads_option


@click.command()
@click.argument("recipe")
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--model", "models", multiple=True, metavar="NAME=MODEL",
              help="Where a model lies: base, an expert's name or its reference (default: where it last was).")  # fmt: skip
@click.option("--expert", metavar="NAME", help="Write only this expert of the recipe, masked, as a model of its own.")
@click.option("--engine", type=click.Choice(["auto", "direct", "mergekit"]), default="auto", show_default=True,
              help="Our direct writer (recipes of coefficients), mergekit (any recipe), or direct where possible.")  # fmt: skip
@click.option("--verify/--no-verify", "check", default=True,
              help="Verify the written model before it appears: every tensor (of mergekit's own methods: that it is"
                   " there and finite), its files, and that it generates.")  # fmt: skip
@threads_option
@quiet_option
@format_option
def command(
    recipe: str,
    out: Path,
    models: tuple[str, ...],
    expert: str | None,
    engine: str,
    check: bool,
    threads: int | None,
    quiet: bool,
    output: str,
) -> None:
    """Carry out RECIPE (recipe.yaml) and write the merged model to the new folder OUT.

    RECIPE is a path, or a file on the Hub: hf://owner/name[@revision]/mechmerge/recipe.yaml.
    OUT appears complete and verified, or not at all; where it already holds the model of this recipe it is only verified.
    """
    from mechmerge.cli.models import open_folders

    folders = open_folders(models)
    from mechmerge.merge.engine import Engine, merge
    from mechmerge.models.hub_files import local_file
    from mechmerge.recipe.schema import KEPT, read_recipe

    set_threads(threads)
    progress = make_progress(quiet)
    merge(local_file(recipe, progress), out, folders, progress, expert, engine=cast(Engine, engine), check=check)
    written, _ = read_recipe(out / KEPT)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors")) / 1e6
    row = {"model": str(out), "policy": written.policy.name, "experts": ", ".join(written.experts), "dtype": written.out_dtype}
    show([row | {"MB": round(size, 1)}], output, "merged")
