"""Two tiny merges to publish: an older state and a newer one, that differ in weights, masks and recipe."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mechmerge.merge.engine import merge
from mechmerge.models.references import Model, resolve
from mechmerge.recipe.schema import Policy, Recipe, RecipeExpert, write_recipe
from tests.tiny import tiny_expert, tiny_model

OPTIONS = ("--no-gate", "--license", "apache-2.0")
"""Of `mechmerge publish` for these merges."""


def tiny_merge(folder: Path, base: Model, expert: Model, coefficient: float, *, masked: bool) -> Path:
    """Merges the expert into the base by one coefficient (and a mask on one kind of unit), and returns the model folder."""
    arch = base.checkpoint().arch
    masks = {"one.head": np.full((arch.layers, arch.units("head")), coefficient / 2, np.float32)} if masked else None
    recipe = Recipe(
        base=base.id,
        experts={"one": RecipeExpert(model=expert.id, default=coefficient)},
        policy=Policy(name="by hand"),
    )
    write_recipe(folder / "recipe" / "recipe.yaml", recipe, masks)
    merge(folder / "recipe" / "recipe.yaml", folder / "model")
    return folder / "model"


def tiny_merges(folder: Path) -> tuple[Path, Path]:
    """Model folders of an older and a newer merge of the same two tiny models."""
    base = resolve(str(tiny_model(folder / "base")))
    expert = resolve(str(tiny_expert(base.path, folder / "expert")))
    older = tiny_merge(folder / "older", base, expert, 0.5, masked=False)
    return older, tiny_merge(folder / "newer", base, expert, 0.9, masked=True)
