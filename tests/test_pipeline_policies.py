"""A pipeline with protected behaviours, a solution that is measured, a baseline inside a mask and several seeds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mechmerge.localize.effect_file import read_effects
from mechmerge.localize.rounds_file import read_rounds
from mechmerge.models.references import Model
from mechmerge.pipeline.source import Resolved, resolve_pipeline
from mechmerge.pipeline.stages import Stages
from mechmerge.pipeline.state import RunState
from mechmerge.progress import SILENT
from mechmerge.recipe.schema import read_recipe
from tests.test_pipeline import write_pipeline

RECIPES = {
    "conflict": {"policy": "conflict"},
    "solve": {"policy": "solve", "parameters": {"budget": 0.5, "limit.chat": 3.0, "unproven": True}},
    "inside": {"policy": "ties", "within": "conflict", "parameters": {"density": 0.5}},
    "shuffle": {"policy": "random", "like": "solve", "seeds": 2, "parameters": {"per_layer": True}},
}


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, base: Model, expert: Model, second_expert: Model) -> Stages:
    folder = tmp_path_factory.mktemp("policies")
    path = write_pipeline(
        folder, base, {"a": expert, "b": second_expert}, recipes=RECIPES, protect={"chat": {"weight": 0.5}},
        effects={"prompts": 4, "dtype": "float32", "origin": "sum"},
    )  # fmt: skip
    run = folder / "run"
    run.mkdir()
    made = Stages(resolve_pipeline(path, SILENT), run, RunState(run, SILENT), SILENT, "cpu")
    made.make()
    return made


def source_of(stages: Stages) -> Resolved:
    return Resolved(stages.plan, stages.folder, stages.base, stages.experts, stages.behaviors, stages.protected)


def test_everything_is_made(stages: Stages) -> None:
    effects = read_effects(stages.run / "effects.safetensors").metadata
    assert [(b.name, b.expert, b.weight) for b in effects.behaviors] == [
        ("loud", "a", 1),
        ("soft", "b", 1),
        ("chat", "base", 0.5),
    ]
    assert effects.path == "sum→proposal"
    solved = read_rounds(stages.solution("solve")).metadata
    assert solved.solve is not None
    assert (solved.solve.budget, solved.solve.limits) == (0.5, {"chat": 3.0})
    recipe, masks = read_recipe(stages.recipe("solve"))
    assert recipe.realised is not None
    assert recipe.policy.parameters == {"budget": 0.5, "limit.chat": 3.0, "unproven": True}
    assert [source.kind for source in recipe.provenance] == ["rounds"]
    draws = [read_recipe(stages.recipe(f"shuffle-{seed}")) for seed in (0, 1)]
    assert [drawn.policy.seed for drawn, _ in draws] == [0, 1]
    for _, drawn in draws:
        assert all((drawn[name].sum(1).round(4) == masks[name].sum(1).round(4)).all() for name in masks)
    inside, _ = read_recipe(stages.recipe("inside"))
    assert inside.mergekit is not None
    assert inside.mergekit.within
    for name in stages.plan.recipes:
        assert (stages.merged(name) / "config.json").is_file()


def test_nothing_is_made_twice(stages: Stages) -> None:
    again = RunState(stages.run, SILENT)
    Stages(source_of(stages), stages.run, again, SILENT, "cpu").make()
    assert again.worked == []


def test_another_budget_solves_anew_over_the_same_effects(stages: Stages, tmp_path: Path) -> None:
    shutil.copytree(stages.run, tmp_path / "run")
    state = RunState(tmp_path / "run", SILENT)
    recipes = stages.plan.recipes | {"solve": stages.plan.recipes["solve"].model_copy(update={"parameters": {
        "budget": 0.25, "limit.chat": 3.0, "unproven": True}})}  # fmt: skip
    source = source_of(stages)._replace(pipeline=stages.plan.model_copy(update={"recipes": recipes}))
    Stages(source, tmp_path / "run", state, SILENT, "cpu").make()
    assert {name for name in state.worked if not name.startswith("merge-")} == {
        "solve-solve", "recipe-solve", "recipe-shuffle-0", "recipe-shuffle-1",
    }  # fmt: skip
