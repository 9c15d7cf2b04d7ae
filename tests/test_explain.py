"""What recipes are said to take, and how they are said to differ, against counting by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mechmerge.cli.main import cli
from mechmerge.errors import InputError, MissingError
from mechmerge.localize.effect_file import EffectFile
from mechmerge.models.components import UNIT_KINDS
from mechmerge.recipe import explain
from mechmerge.recipe.compile import compile_recipe
from mechmerge.recipe.schema import Masks, Recipe, read_recipe, write_recipe
from mechmerge.recipe.sources import Sources, read_sources
from tests.measured import BASE, FIRST, LAYERS, PARAMETERS, SECOND, UNITS, effect_file, score_file
from tests.test_program import proven
from tests.test_recipe import recipe as by_hand


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two recipes, and the files they were made from."""
    proven(effect_file()).write(tmp_path / "effects.safetensors")
    for name, policy in (("a", "conflict"), ("b", "solve")):
        sources = read_sources([tmp_path / "effects.safetensors"])
        compiled = compile_recipe(policy, sources, parameters={"budget": 0.4} if policy == "solve" else {})
        write_recipe(tmp_path / name / "recipe.yaml", compiled.recipe, compiled.masks)
    return tmp_path


def call(*arguments: object) -> Any:
    done = CliRunner().invoke(cli, [*map(str, arguments)], standalone_mode=False)
    assert done.exception is None, done.exception
    return done.stdout


def tables(*arguments: object) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = json.loads(call("recipe", *arguments, "--format", "json"))
    return found


def test_a_recipe_says_what_it_takes_from_whom(folder: Path) -> None:
    said = tables("explain", folder / "a" / "recipe.yaml", "--effects", folder / "effects.safetensors")
    made, masks = read_recipe(folder / "a" / "recipe.yaml")
    assert made.parameters == PARAMETERS
    for row in said["recipe conflict"]:
        taken = sum(masks[f"{row['expert']}.{k}"].sum(dtype=np.float64) * PARAMETERS[k] for k in UNIT_KINDS)
        whole = LAYERS * sum(UNITS[k] * PARAMETERS[k] for k in UNIT_KINDS)
        assert row["parameters"] == f"{taken:,.0f} of {whole:,}"
    for row in said["by depth"]:
        layer = explain.DEPTHS.index(row["depth"])  # three layers, three thirds
        mine = {k: masks[f"{row['expert']}.{k}"][layer] for k in UNIT_KINDS}
        assert row["neurons"] == f"{100 * mine['neuron'].mean():.1f} %"
        assert row["parameters"] == sum(mine[k].sum() * PARAMETERS[k] for k in UNIT_KINDS)
    both = masks["first.neuron"] * masks["second.neuron"]
    assert said["components of several experts"][2]["of several experts"] == both.sum()
    effects = effect_file()
    for row in said["contested components"]:
        e, number, out = list(made.experts).index(row["expert"]), 0, 0
        for kind in UNIT_KINDS:
            for layer, unit in np.ndindex(LAYERS, UNITS[kind]):
                one, other = (float(effects.arrays[f"{kind}.effect"][b, e, layer, unit]) for b in (0, 1))
                verdict = "helps only" if one > 0 and other > 0 else "harms only" if one < 0 and other < 0 else "contested"
                if verdict == row["components"]:
                    number += 1
                    out += masks[f"{row['expert']}.{kind}"][layer, unit] == 0
        assert (row["number"], row["out"], row["in"]) == (number, out, number - out)
    (title,) = (name for name in said if name.startswith("against the base"))
    for row, gain in zip(said[title], (2.0, 0.5), strict=True):
        assert row["expected recovery"] == pytest.approx(-row["predicted change of loss"] / gain, abs=1e-3)


def test_the_recipe_command_prints_the_same(folder: Path, tmp_path: Path) -> None:
    made = tables(folder / "effects.safetensors", "--policy", "conflict", "--out", tmp_path / "c.yaml", "--quiet")
    assert made == tables("explain", folder / "a" / "recipe.yaml", "--effects", folder / "effects.safetensors")
    shown = call("recipe", "explain", folder / "a" / "recipe.yaml")
    assert "by depth" in shown
    assert "contested" not in shown, "that takes the effects"


@pytest.mark.parametrize("name", ["L1.head.2", "L1.attention", "embed", "L2", "L0.norms"])
def test_one_component(folder: Path, name: str) -> None:
    said = tables("explain", folder / "a" / "recipe.yaml", "--component", name, "--effects", folder / "effects.safetensors")
    made, masks = read_recipe(folder / "a" / "recipe.yaml")
    rows = said[name]
    effects = next(rows for title, rows in said.items() if title.startswith("effects of"))
    file = effect_file()
    if name == "L1.head.2":
        assert [row["coefficient"] for row in rows] == [masks[f"{e}.head"][1, 2] for e in made.experts]
        assert rows[0]["decided by"] == "mask first.head"
        assert effects[1]["effect"] == pytest.approx(float(file.arrays["head.effect"][1, 0, 1, 2]), abs=1e-6)
        assert effects[1]["half 2"] == pytest.approx(float(file.arrays["head.half"][1, 1, 0, 1, 2]), abs=1e-6)
    elif name == "L1.attention":
        values = np.concatenate([masks["first.head"][1], masks["first.kv"][1], [1.0]])
        assert rows[0]["coefficient"] == pytest.approx(values.mean(), abs=1e-6)
        assert rows[0]["decided by"] == "mask first.head, mask first.kv, default 1"
        total = sum(file.arrays[f"{k}.effect"][0, 1, 1].sum(dtype=np.float64) for k in ("head", "kv", "attention.rest"))
        assert effects[2]["effect"] == pytest.approx(total, abs=1e-5)
        assert "stderr" not in effects[2], "standard errors of parts do not add up"
    elif name == "embed":
        assert rows[0] == {"expert": "first", "coefficient": 1.0, "decided by": "default 1"}


def test_rules_are_named(tmp_path: Path) -> None:
    made = by_hand(("L1", "first", 0.25), ("L1.head.2", "first", 0.5), ("L*.mlp", "second", 0.75))
    masks: Masks = {"second.head": np.ones((LAYERS, 4), np.float32)}
    shapes = {kind: (LAYERS, UNITS[kind]) for kind in UNIT_KINDS}
    found = explain.resolved(made, masks, shapes)
    first, second = explain.component_rows(made, masks, found, "L1.head.2")
    assert (first["coefficient"], first["decided by"]) == (0.5, "rule L1.head.2 = 0.5")
    assert (second["coefficient"], second["decided by"]) == (1.0, "mask second.head")
    assert explain.component_rows(made, masks, found, "L1.head.1")[0]["decided by"] == "rule L1 = 0.25"
    # A module's units are decided by themselves; where no rule reaches, the default does.
    decided = {
        name: explain.component_rows(made, masks, found, name)[0]["decided by"] for name in ("L1.attention", "L2.head.2")
    }
    assert decided == {"L1.attention": "rule L1 = 0.25, rule L1.head.2 = 0.5", "L2.head.2": "default 1"}
    assert explain.component_rows(made, masks, found, "L2.mlp")[1]["decided by"] == "rule L*.mlp = 0.75"
    write_recipe(tmp_path / "rules.yaml", made)
    with pytest.raises(MissingError, match="--effects"):
        explain.resolved(made, {}, {})
    baseline = compile_recipe("ties", Sources(BASE, {"first": FIRST, "second": SECOND})).recipe
    with pytest.raises(InputError, match="the baseline ties"):
        explain.resolved(baseline, {}, shapes)


def test_a_head_of_its_own_can_be_named(tmp_path: Path) -> None:
    masks: Masks = {f"first.{kind}": np.ones((LAYERS, UNITS[kind]), np.float32) for kind in UNIT_KINDS}
    write_recipe(tmp_path / "ruled.yaml", by_hand(("lm_head", "first", 0.25)), masks)
    write_recipe(tmp_path / "plain.yaml", by_hand(), masks)
    first, second = tables("explain", tmp_path / "ruled.yaml", "--component", "lm_head")["lm_head"]
    assert (first["coefficient"], second["coefficient"]) == (0.25, 0.0)
    assert first["decided by"].startswith("rule lm_head = 0.25")
    assert "by depth" in tables("explain", tmp_path / "ruled.yaml")
    differing = tables("diff", tmp_path / "ruled.yaml", tmp_path / "plain.yaml")["what differs"]
    assert differing == [{"field": "rules", "A": "lm_head of first = 0.25", "B": "none"}]


def test_what_the_effects_do_not_hold_is_a_dash(folder: Path) -> None:
    """With three behaviours, since a wrong dimension of two would pass for that of the halves."""
    file = effect_file()
    arrays = {}
    for name, array in file.arrays.items():
        if not name.startswith("lm_head"):
            axis = 1 if name.endswith(".half") else 0
            arrays[name] = np.take(array, [0, 1, 0], axis=axis)
    behaviors = (*file.metadata.behaviors, file.metadata.behaviors[0].model_copy(update={"name": "more"}))
    EffectFile(file.metadata.model_copy(update={"behaviors": behaviors}), arrays).write(folder / "three.safetensors")
    said = tables("explain", folder / "a" / "recipe.yaml", "--component", "lm_head", "--effects", folder / "three.safetensors")
    rows = next(rows for title, rows in said.items() if title.startswith("effects of"))
    assert [row["effect"] for row in rows] == ["–"] * 6


def test_masks_of_some_kinds_leave_out_what_they_cannot_tell(tmp_path: Path) -> None:
    for name, value in (("a", 0.5), ("b", 1.0)):
        write_recipe(tmp_path / f"{name}.yaml", by_hand(), {"first.neuron": np.full((LAYERS, 48), value, np.float32)})
    (rows,) = tables("explain", tmp_path / "a.yaml").values()
    assert rows[0]["neuron"] == "50.0 %"
    said = tables("diff", tmp_path / "a.yaml", tmp_path / "b.yaml")
    assert [row["field"] for row in said["what differs"]] == ["masks"]
    assert "the same recipe" in call("recipe", "diff", tmp_path / "a.yaml", tmp_path / "a.yaml")


# ------------------------------------------------------------------------------------------------------------- differences
def test_differences_are_counted(folder: Path) -> None:
    said = tables("diff", folder / "a" / "recipe.yaml", folder / "b" / "recipe.yaml")
    assert said["what differs"][0] == {"field": "policy", "A": "conflict", "B": "solve (budget 0.4)"}
    (a, a_masks), (b, b_masks) = (read_recipe(folder / name / "recipe.yaml") for name in ("a", "b"))
    for row in said["components"]:
        kind = next(k for k, name in explain.NAMES.items() if name == row["kind"])
        one, other = (masks[f"{row['expert']}.{kind}"] for masks in (a_masks, b_masks))
        assert row["differ"] == (one != other).sum()
        assert row["in A alone"] == ((one != 0) & (other == 0)).sum()
        assert sum(row[f"differ, {depth}"] for depth in explain.DEPTHS) == row["differ"]
    changes = {row["behavior"]: row for row in said["against the base"]}
    assert a.predicted is not None
    assert b.predicted is not None
    assert changes["sums"]["A: loss, predicted"] == pytest.approx(a.predicted["sums"], abs=1e-4)
    assert changes["sums"]["B: loss, predicted"] == pytest.approx(b.predicted["sums"], abs=1e-4)
    assert "the same recipe" in call("recipe", "diff", folder / "a" / "recipe.yaml", folder / "a" / "recipe.yaml")


@pytest.mark.parametrize(
    ("change", "field"),
    [({"out_dtype": "float32"}, "out_dtype"), ({"base": FIRST}, "base"), ({"vocabulary": "base"}, "vocabulary")],
)
def test_every_setting_that_differs_is_named(change: dict[str, Any], field: str) -> None:
    one: Recipe = by_hand(("L1", "first", 0.5))
    assert explain.differing_fields(one, one) == []
    assert [row["field"] for row in explain.differing_fields(one, one.model_copy(update=change))] == [field]


def test_recipes_of_other_sizes_cannot_be_compared() -> None:
    shapes = {kind: (LAYERS, UNITS[kind]) for kind in UNIT_KINDS}
    one, other = (explain.resolved(by_hand(), {}, s) for s in (shapes, shapes | {"neuron": (LAYERS, 7)}))
    with pytest.raises(InputError, match=r"first.neuron: expected \[3, 48\]"):
        explain.difference_rows({"first": (one, other)})


def test_other_sizes_are_told_beside_what_differs(tmp_path: Path) -> None:
    for name, width in (("a", 48), ("b", 7)):
        masks = {f"first.{kind}": np.ones((LAYERS, UNITS[kind]), np.float32) for kind in UNIT_KINDS}
        write_recipe(tmp_path / f"{name}.yaml", by_hand(), masks | {"first.neuron": np.ones((LAYERS, width), np.float32)})
    said = tables("diff", tmp_path / "a.yaml", tmp_path / "b.yaml")
    assert {"field": "neurons, by layer", "A": "3 layers × 48", "B": "3 layers × 7"} in said["what differs"]
    assert "components" not in said


def test_files_of_one_expert_are_compared_with_rules(tmp_path: Path) -> None:
    """A recipe of masks against one of rules: the masks' sizes serve both."""
    score_file(1).write(tmp_path / "scores.safetensors")
    compiled = compile_recipe(
        "top", read_sources([tmp_path / "scores.safetensors"], {"first": FIRST}), parameters={"budget": 0.5}
    )
    write_recipe(tmp_path / "top.yaml", compiled.recipe, compiled.masks)
    write_recipe(tmp_path / "rules.yaml", by_hand(("L1", "first", 0.5)))
    rows = tables("diff", tmp_path / "top.yaml", tmp_path / "rules.yaml")["components"]
    assert {row["expert"] for row in rows} == {"first"}
    assert all(row["share B"] == "83.3 %" for row in rows)
