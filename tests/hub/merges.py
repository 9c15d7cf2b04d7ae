"""What is published: two tiny merges that differ in weights, masks and recipe, and two measured runs; one older, one newer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mechmerge.merge.engine import merge
from mechmerge.models.references import Model, resolve
from mechmerge.recipe.schema import Policy, Recipe, RecipeExpert, write_recipe
from tests import measured
from tests.hub.ways import Name
from tests.tiny import tiny_expert, tiny_model

OPTIONS = ("--no-gate", "--license", "apache-2.0")
"""Of `mechmerge publish` for these merges."""
SCORE_OPTIONS = ("--license", "apache-2.0")
"""Of `mechmerge publish-scores` for these runs."""


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


def measured_runs(folder: Path) -> tuple[Path, Path]:
    """Runs with the same scores and other effects, the newer one with one score file more."""
    for seed, name in enumerate(("older", "newer")):
        measured.effect_file(seed).write(folder / name / "effects.safetensors")
        for number, expert in enumerate(("first", "second")[: seed + 1]):
            score = measured.score_file(number, (measured.FIRST, measured.SECOND)[number], expert)
            score.write(folder / name / "scores" / expert / f"{expert}.safetensors")
    return folder / "older", folder / "newer"


def sources(folder: Path, ways: Iterable[Name]) -> dict[Name, tuple[list[str], list[str]]]:
    """Way to publish → the arguments of its command for the older state and for the newer."""
    merges = [[str(path), *OPTIONS] for path in tiny_merges(folder / "merges")]
    runs = [[str(path), *SCORE_OPTIONS] for path in measured_runs(folder / "runs")]
    return {way: (older, newer) for way in ways for older, newer in [runs if way == "scores" else merges]}
