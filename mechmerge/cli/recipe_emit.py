"""`mechmerge recipe emit`, and `--emit` of `mechmerge recipe`: a recipe as mergekit YAML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from mechmerge.cli.common import check_beside, format_option, make_progress, show

if TYPE_CHECKING:
    from mechmerge.progress import Progress
    from mechmerge.recipe.schema import Masks, Recipe

Form = Literal["stock", "masked"]
FORM = click.Choice(["stock", "masked"])


def yaml_beside(recipe_file: Path) -> Path:
    """Where a recipe's mergekit YAML goes unless told."""
    return recipe_file.with_name("mergekit.yaml" if recipe_file.name == "recipe.yaml" else f"{recipe_file.stem}.mergekit.yaml")


def emitted(
    form: Form, recipe: Recipe, masks: Masks, recipe_file: Path, folders: Mapping[str, Path], progress: Progress
) -> str:
    """A recipe as mergekit YAML.

    Args:
        form: `stock`, for any mergekit 0.1.5, or `masked`, for ours, which reads the recipe file.
        recipe: the recipe, or a baseline, which is stock in either form unless it works within a recipe.
        masks: its masks.
        recipe_file: where it lies, or will.
        folders: models by name, where they are not found by themselves.
        progress: told what running it takes.

    Raises:
        InputError: a tensor would have to be cut, or a plain mergekit cannot run the architecture.
    """
    from mechmerge.merge.engine import open_models, paths_for_mergekit
    from mechmerge.merge.tools import check_plain
    from mechmerge.recipe.coefficients import coefficients
    from mechmerge.recipe.emit import emit_baseline, emit_masked, emit_stock

    base, experts = open_models(recipe, folders)
    paths = paths_for_mergekit(base, experts)
    if recipe.mergekit is not None and recipe.policy.seed is not None:
        progress.note(f"mergekit draws anew unless told: mergekit-yaml --random-seed {recipe.policy.seed}")
    check_plain(base)
    if recipe.mergekit is not None and (form == "stock" or not recipe.mergekit.within):
        return emit_baseline(recipe, paths)
    if form == "masked":
        return emit_masked(recipe, recipe_file.resolve(), paths)
    return emit_stock(recipe, coefficients(recipe, masks, base.arch), base.layout, base.shapes, paths)


@click.command()
@click.argument("recipe")
@click.option("--as", "form", type=FORM, required=True,
              help="stock: for any mergekit 0.1.5; masked: for `mechmerge mergekit yaml`, with our method.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False),
              help="The YAML file (default: mergekit.yaml, or NAME.mergekit.yaml, beside the recipe NAME.yaml).")  # fmt: skip
@click.option("--model", "models", multiple=True, metavar="NAME=MODEL",
              help="Where a model lies: base, an expert's name or its reference (default: where it last was).")  # fmt: skip
@format_option
def emit(recipe: str, form: Form, out: Path | None, models: tuple[str, ...], output: str) -> None:
    """Write RECIPE, a path or a file on the Hub, as mergekit YAML.

    A recipe is stock where no tensor is cut: all heads, KV groups and neurons of a module have one coefficient.
    """
    if out is None:
        check_beside(recipe)
    from mechmerge.artifacts import write_text
    from mechmerge.cli.models import open_folders
    from mechmerge.models.hub_files import local_file
    from mechmerge.recipe.schema import read_recipe

    progress = make_progress(quiet=False)
    file = local_file(recipe, progress)
    target = yaml_beside(file) if out is None else out
    write_text(target, emitted(form, *read_recipe(file), file, open_folders(models), progress))
    run = "mergekit-yaml" if form == "stock" else "mechmerge mergekit yaml"
    show([{"yaml": str(target), "run": f"{run} {target.name} OUT"}], output, "mergekit YAML")
