"""What recipes are said to take, and how they are said to differ, against counting by hand."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mechmerge.artifacts import sha256_file
from mechmerge.cli.main import cli
from mechmerge.cli.recipe_explain import summary
from mechmerge.errors import InputError, MechmergeError, MissingError
from mechmerge.localize.effect_file import EffectFile
from mechmerge.localize.rounds_file import RoundRecord, RoundsFile, RoundsMetadata, SettledBehavior
from mechmerge.models.components import UNIT_KINDS
from mechmerge.models.references import ModelId, resolve
from mechmerge.recipe import conflicts, differences, explain, one_component
from mechmerge.recipe.compile import OF_BASELINES, compile_recipe, expected_change
from mechmerge.recipe.explain import shares
from mechmerge.recipe.policies import top, weighted
from mechmerge.recipe.schema import Masks, Policy, Recipe, RecipeExpert, Rule, read_recipe, write_recipe
from mechmerge.recipe.sources import Sources, read_again, read_sources
from mechmerge.report.loading import Measurements
from mechmerge.report.recipes import kept_of, recipe_rows
from tests.measured import BASE, FIRST, LAYERS, PARAMETERS, SECOND, UNITS, effect_file, score_file
from tests.test_program import proven
from tests.test_recipe import recipe as by_hand
from tests.tiny import tiny_expert, tiny_model


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
    first, second = one_component.component_rows(made, masks, found, "L1.head.2")
    assert (first["coefficient"], first["decided by"]) == (0.5, "rule L1.head.2 = 0.5")
    assert (second["coefficient"], second["decided by"]) == (1.0, "mask second.head")
    assert one_component.component_rows(made, masks, found, "L1.head.1")[0]["decided by"] == "rule L1 = 0.25"
    # A module's units are decided by themselves; where no rule reaches, the default does.
    decided = {
        name: one_component.component_rows(made, masks, found, name)[0]["decided by"] for name in ("L1.attention", "L2.head.2")
    }
    assert decided == {"L1.attention": "rule L1 = 0.25, rule L1.head.2 = 0.5", "L2.head.2": "default 1"}
    assert one_component.component_rows(made, masks, found, "L2.mlp")[1]["decided by"] == "rule L*.mlp = 0.75"
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


def test_rules_are_told_and_sizes_found_where_the_base_is(tmp_path: Path) -> None:
    base = resolve(str(tiny_model(tmp_path / "base", seed=7)))  # weights of its own: the folder is removed below
    expert = resolve(str(tiny_expert(base.path, tmp_path / "e", seed=1)))
    made = Recipe(
        base=base.id,
        experts={"e": RecipeExpert(model=expert.id, default=1.0)},
        policy=Policy(name="hand"),
        rules=(Rule(component="L1.mlp", expert="e", coefficient=0.25), Rule(component="embed", expert="e", coefficient=0.0)),
    )
    write_recipe(tmp_path / "r.yaml", made, {})
    said = tables("explain", tmp_path / "r.yaml")
    assert [list(row.values()) for row in said["rules (the most specific decides)"]] == [
        ["L1.mlp", "e", "0.25"],
        ["embed", "e", "0"],
    ]
    assert "by depth" in said
    for component, value in (("L1.neuron.3", 0.25), ("L1.head.2", 1.0), ("embed", 0.0)):
        (row,) = tables("explain", tmp_path / "r.yaml", "--component", component)[component]
        assert float(row["coefficient"]) == value
    shutil.rmtree(base.path)
    assert "by depth" not in tables("explain", tmp_path / "r.yaml")


def test_the_same_recipe_is_the_same_to_the_last_digit(tmp_path: Path) -> None:
    plain = by_hand(("L0.mlp", "first", 0.12345671))
    for name, recipe in {
        "a": plain,
        "b": by_hand(("L0.mlp", "first", 0.12345674)),
        "c": plain.model_copy(update={"predicted": {"formats": -1.0}}),
        "d": plain.model_copy(update={"predicted": {"formats": -2.0}}),
    }.items():
        write_recipe(tmp_path / f"{name}.yaml", recipe, {})
    (row,) = tables("diff", tmp_path / "a.yaml", tmp_path / "b.yaml")["what differs"]
    assert (row["field"], row["A"] != row["B"]) == ("rules", True)
    assert "the same recipe" not in call("recipe", "diff", tmp_path / "a.yaml", tmp_path / "b.yaml")
    said = call("recipe", "diff", tmp_path / "c.yaml", tmp_path / "d.yaml")
    assert "the same merge; what they record of it differs" in said
    assert "the same recipe" in call("recipe", "diff", tmp_path / "d.yaml", tmp_path / "d.yaml")


# ------------------------------------------------------------------------------------------------------------ whose files
OTHER = ModelId(name="some/other", shards={"model.safetensors": "9" * 64})


def changed(file: EffectFile, **changes: Any) -> EffectFile:
    """The effect file with other metadata."""
    return EffectFile(file.metadata.model_copy(update=changes), file.arrays)


def narrow(file: EffectFile) -> EffectFile:
    """Effects on models of 7 neurons."""
    arrays = {name: array[..., :7] if name.startswith("neuron") else array for name, array in file.arrays.items()}
    return EffectFile(file.metadata, arrays)


@pytest.mark.parametrize("component", [(), ("--component", "L1.neuron.9")])
@pytest.mark.parametrize(
    ("file", "said"),
    [
        (changed(effect_file(), base=OTHER), r"expected the recipe's base base \(\w{12}\); found some/other \(\w{12}\)"),
        (changed(narrow(effect_file()), base=OTHER), "expected the recipe's base"),
        (
            effect_file(experts={"first": FIRST, "second": OTHER}),
            r"expected the recipe's experts first \(\w{12}\), second \(\w{12}\); found first \(\w{12}\), second \(\w{12}\)",
        ),
        (narrow(effect_file()), "neuron: expected 3 layers × 48, as the recipe's masks have; found 3 layers × 7"),
    ],
)
def test_effects_of_other_models_are_refused(folder: Path, file: EffectFile, said: str, component: tuple[str, ...]) -> None:
    file.write(folder / "other.safetensors")
    arguments = ("recipe", "explain", str(folder / "a" / "recipe.yaml"), "--effects", str(folder / "other.safetensors"))
    done = CliRunner().invoke(cli, [*arguments, *component], standalone_mode=False)
    assert isinstance(done.exception, InputError)
    digest = sha256_file(folder / "effects.safetensors")[:12]
    assert str(done.exception).startswith(str(folder / "other.safetensors"))
    assert str(done.exception).endswith(f"give what it was made from: effects.safetensors (sha256 {digest})")
    with pytest.raises(InputError, match=said):
        raise done.exception


def test_other_effects_of_the_same_models_are_told_of(folder: Path) -> None:
    """Measured again, under other names and in another order."""
    again = changed(effect_file(seed=5, experts={"x": SECOND, "y": FIRST}))
    again.write(folder / "again.safetensors")
    done = CliRunner().invoke(
        cli, ["recipe", "explain", str(folder / "a" / "recipe.yaml"), "--effects", str(folder / "again.safetensors")]
    )
    assert done.exit_code == 0
    assert "again.safetensors: of the recipe's models, but not among the effects that it was made from" in done.stderr
    made, masks = read_recipe(folder / "a" / "recipe.yaml")
    sources, notes = read_again(made, masks, folder / "again.safetensors")
    assert len(notes) == 1
    assert sources.effects is not None
    assert list(sources.effects.metadata.experts) == ["second", "first"]
    counts = conflicts.counts_of(made, sources.effects)
    assert not isinstance(counts, str)
    found = explain.resolved(made, masks, explain.mask_shapes(masks))
    by_expert = {r["expert"]: r for r in one_component.weighted_rows(made, found, sources.effects, counts, "L1.head.2")}
    assert by_expert["first"]["on formats"] == pytest.approx(again.arrays["head.effect"][0, 1, 1, 2] / 2, rel=5e-3)
    assert read_again(made, masks, folder / "effects.safetensors")[1] == ()


def test_a_control_has_the_names_of_what_it_is_like(folder: Path) -> None:
    """Which need not be those of the files that it is made from, nor of the same experts."""
    for name, experts in (("named", {"x": FIRST, "y": SECOND}), ("others", {"x": FIRST, "y": OTHER})):
        compiled = compile_recipe("conflict", Sources(BASE, experts, effect_file(experts=experts)))
        write_recipe(folder / f"{name}.yaml", compiled.recipe, compiled.masks)
        arguments = ("--policy", "random", "--like", folder / f"{name}.yaml", "--out", folder / "drawn.yaml", "--quiet")
        said = tables(folder / "effects.safetensors", *arguments)
        assert ("contested components" in said) == (name == "named")
        if name == "named":
            assert {row["expert"] for row in named(said)[1]} <= {"x", "y"}
            assert {row["decided"] for row in named(said)[1]} <= {"in: drawn", "out: drawn"}


def test_score_and_rounds_files_are_held_against_the_recipe_too(folder: Path, rounds_recipe: Path) -> None:
    made, masks = read_recipe(rounds_recipe)
    score_file(1).write(folder / "s.safetensors")
    with pytest.raises(InputError, match="expected those of first, second; found none of second"):
        read_again(made, masks, scores=[folder / "s.safetensors"])
    score_file(1, OTHER).write(folder / "s.safetensors")
    with pytest.raises(InputError, match=r"expected the recipe's experts .*; found other"):
        read_again(made, masks, scores=[folder / "s.safetensors"])
    file = rounds_file()
    RoundsFile(file.metadata.model_copy(update={"base": OTHER}), file.arrays).write(folder / "r.safetensors")
    with pytest.raises(InputError, match=r"give what it was made from: rounds\.safetensors"):
        read_again(made, masks, rounds=folder / "r.safetensors")
    _, notes = read_again(*read_recipe(folder / "a" / "recipe.yaml"), rounds=folder / "rounds.safetensors")
    assert notes[0].endswith("not among the rounds that it was made from: none")
    with pytest.raises(MechmergeError, match="Input should be 'effects'"):
        read_again(made, masks, effects=folder / "r.safetensors")


def test_recovery_is_not_had_by_dividing_nats_by_states(folder: Path) -> None:
    """A recipe that predicts losses and tells no gains, beside effects on the anchor."""
    made, masks = read_recipe(folder / "a" / "recipe.yaml")
    older = made.model_copy(update={"provenance": tuple(s.model_copy(update={"gains": {}}) for s in made.provenance)})
    anchor = changed(effect_file(), metric="anchor")
    said = summary(older, masks, anchor)
    (rows,) = (rows for title, rows in said.items() if title.startswith("against the base"))
    assert "expected recovery" not in rows[0]
    why = "the recipe predicts a change of loss, and the effect file tells of recovery"
    assert {"what": "expected recovery", "why": why} in said["not known"]
    (kept,) = (rows for title, rows in summary(made, masks, anchor).items() if title.startswith("against the base"))
    assert kept[0]["expected recovery"] == pytest.approx(-kept[0]["predicted change of loss"] / 2, abs=1e-3)


# -------------------------------------------------------------------------------------------------------------- baselines
@pytest.mark.parametrize("policy", OF_BASELINES)
def test_shares_are_not_said_where_a_method_decides(policy: str, tmp_path: Path) -> None:
    """In the table, by depth, and in the report in the same words."""
    parameters = {"weight": 0.6} if "weight" in OF_BASELINES[policy] else {}
    sources = Sources(BASE, {"first": FIRST, "second": SECOND}, effect_file())
    recipe = compile_recipe(policy, sources, parameters=parameters).recipe
    rows, said = shares(recipe, {}, PARAMETERS), summary(recipe, {}, effect_file())
    assert said[f"recipe {policy}"][0].items() >= rows[0].items()
    word = {"linear": "whole model", "model-stock": "whole model", "task-arithmetic": "60.0 %"}.get(policy, "by weight")
    columns = ("head", "kv", "neuron", "head + kv + neuron")
    assert {row[column] for row in rows for column in columns} == {word}
    assert {row[name] for row in said["by depth"] for name in explain.NAMES.values()} == {word}
    if policy == "task-arithmetic":
        assert rows[0]["everything else"] == "0.6"
        return
    assert rows[0]["weight"] == ("0.6" if parameters else "–")
    assert "conflicts" not in " ".join(said)
    assert said["not known"][0]["why"].startswith(word)
    assert kept_of(recipe, {}, Measurements({}, effect_file(), None, BASE, {}, {}, None, None)).instead == word
    write_recipe(tmp_path / "recipe.yaml", recipe)
    assert recipe_rows({"it": tmp_path / "recipe.yaml"})[1][0][-1] == word


def test_shares_within_are_told_as_such(folder: Path) -> None:
    within = read_recipe(folder / "a" / "recipe.yaml")
    sources = read_sources([folder / "effects.safetensors"])
    compiled = compile_recipe("ties", sources, within=within)
    plain, ours = (shares(recipe, within[1], PARAMETERS)[0] for recipe in (within[0], compiled.recipe))
    for column in ("head", "kv", "neuron", "head + kv + neuron"):
        assert ours[column] == f"within {plain[column]}"
    said = summary(compiled.recipe, compiled.masks, sources.effects)
    assert said["by depth"][0]["heads"].startswith("within ")
    assert not any(title.startswith("against the base") for title in said)


# --------------------------------------------------------------------------------------------------------------- conflicts
def named(said: dict[str, list[dict[str, Any]]]) -> tuple[str, list[dict[str, Any]]]:
    """The title and rows of the conflicts."""
    ((title, rows),) = ((title, rows) for title, rows in said.items() if title.startswith("conflicts"))
    return title, rows


def test_conflicts_are_named_strongest_first(folder: Path) -> None:
    """Against going through all components by hand."""
    files = (folder / "a" / "recipe.yaml", "--effects", folder / "effects.safetensors")
    title, rows = named(tables("explain", *files, "--all-conflicts"))
    short_title, short = named(tables("explain", *files))
    effects, (made, masks) = effect_file(), read_recipe(folder / "a" / "recipe.yaml")
    by_hand = {}
    for e, expert in enumerate(made.experts):
        for kind in UNIT_KINDS:
            for layer, unit in np.ndindex(LAYERS, UNITS[kind]):
                on = effects.arrays[f"{kind}.effect"][:, e, layer, unit] * np.array([1 / 2.0, 1 / 0.5])
                if on.min() < 0 < on.max():
                    by_hand[f"L{layer}.{kind}.{unit}", expert] = (
                        min(on.max(), -on.min()),
                        on,
                        masks[f"{expert}.{kind}"][layer, unit],
                    )
    assert title == "conflicts, strongest first"
    assert short_title == f"conflicts, the 10 strongest of {len(by_hand)}"
    assert rows[:10] == short
    assert {(row["component"], row["expert"]) for row in rows} == by_hand.keys()
    strength = [by_hand[row["component"], row["expert"]][0] for row in rows]
    assert strength == sorted(strength, reverse=True)
    for row in rows:
        _, on, coefficient = by_hand[row["component"], row["expert"]]
        first, second = "formats (first)", "sums (second)"
        wanted_in, wanted_out = (first, second) if on[0] > 0 else (second, first)
        assert row["wanted in by"].startswith(f"{wanted_in} +")
        assert row["wanted out by"].startswith(f"{wanted_out} −")
        assert row["sum"] == pytest.approx(on.sum(), rel=5e-3)
        assert row["decided"].split(":")[0] == ("in" if coefficient else "out")
        assert (row["decided"] == "out: < 0 on both halves") == (row["half 1"] < 0 and row["half 2"] < 0) == (coefficient == 0)


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"certainty": 3.0},
        {"agreement": False},
        {"weighting": "equal", "weight.sums": 3.0},
        {"weight.formats": 2.0, "strength.second": 0.5},
    ],
)
def test_the_decision_on_a_component_can_be_made_again(parameters: dict[str, Any]) -> None:
    """From what is said of it: the effects times what they count, summed, on all prompts or on both halves."""
    sources = Sources(BASE, {"first": FIRST, "second": SECOND}, effect_file())
    compiled = compile_recipe("conflict", sources, parameters=parameters)
    effects, recipe = effect_file(), compiled.recipe
    counts = conflicts.counts_of(recipe, effects)
    assert not isinstance(counts, str)
    gains = (1.0, 1.0) if "weighting" in parameters else (2.0, 0.5)
    column = "weight" if "weighting" in parameters else "weight / own gain"
    told = [row[column] for row in conflicts.weight_rows(recipe, effects, counts)]
    assert told == [parameters.get(f"weight.{name}", 1.0) / gain for name, gain in zip(("formats", "sums"), gains, strict=True)]
    found = explain.resolved(recipe, compiled.masks, explain.mask_shapes(compiled.masks))
    decided = set()
    for kind, layer, unit in [
        ("head", 1, 2),
        ("kv", 0, 1),
        *(("neuron", layer, unit) for layer in range(3) for unit in range(48)),
    ]:
        rows = one_component.weighted_rows(recipe, found, effects, counts, f"L{layer}.{kind}.{unit}")
        for e, (row, expert) in enumerate(zip(rows, recipe.experts, strict=True)):
            harms = row["sum"] < 0 if "agreement" in parameters else row["half 1"] < 0 and row["half 2"] < 0
            effect, errors = (effects.arrays[f"{kind}.{m}"][:, e, layer, unit].astype(float) for m in ("effect", "stderr"))
            error = float(np.hypot(*(told * errors)))
            assert row["standard error"] == pytest.approx(error, rel=5e-3)
            kept = compiled.masks[f"{expert}.{kind}"][layer, unit]
            assert (kept == 0) == (harms and -float(np.dot(told, effect)) > parameters.get("certainty", 0.0) * error)
            assert row["on sums"] == pytest.approx(told[1] * effect[1], rel=5e-3)
            assert row["sum"] == pytest.approx(float(np.dot(told, effect)), rel=5e-3, abs=1e-6)
            got = "out" if kept == 0 else "in" if kept == 1 else f"at {kept:g}"
            assert row["decided"].startswith(f"{got}: ")
            assert "not by these" not in row["decided"]
            decided.add(row["decided"].split(": ")[1])
    where = "all prompts" if "agreement" in parameters else "both halves"
    expected = {f"< 0 on {where}", f"≥ 0 on {where}"} | (set() if "agreement" in parameters else {"< 0 on one half"})
    if least := parameters.get("certainty"):
        expected.add(f"< 0 on {where}, by less than {least:g} standard errors")
    assert decided == expected
    rest = one_component.weighted_rows(recipe, found, effects, counts, "embed")[0]
    assert rest["decided"] == "at 1: not decided on"
    layer = one_component.weighted_rows(recipe, found, effects, counts, "L1")[0]
    inside = sum(int((compiled.masks[f"first.{kind}"][1] != 0).sum()) for kind in UNIT_KINDS)
    assert layer["decided"] == f"{inside} of 54 parts in, each decided by itself"


def test_a_decision_that_the_effects_do_not_explain_is_told() -> None:
    sources = Sources(BASE, {"first": FIRST, "second": SECOND}, effect_file())
    compiled = compile_recipe("conflict", sources)
    masks = {name: 1 - mask for name, mask in compiled.masks.items()}
    found = explain.resolved(compiled.recipe, masks, explain.mask_shapes(masks))
    counts = conflicts.counts_of(compiled.recipe, effect_file())
    assert not isinstance(counts, str)
    rows = one_component.weighted_rows(compiled.recipe, found, effect_file(), counts, "L1.head.2")
    assert [row["decided"] for row in rows] == [
        "in: < 0 on both halves, so not by these effects", "out: ≥ 0 on both halves, so not by these effects",
    ]  # fmt: skip


def test_effects_that_cannot_be_weighed_are_told() -> None:
    flat = effect_file(gains=(2.0, 0.0))
    recipe = compile_recipe("task-arithmetic", Sources(BASE, {"first": FIRST, "second": SECOND}, flat)).recipe
    said = summary(recipe, {}, flat)
    assert not any(title.startswith("conflicts") for title in said)
    assert said["not known"][-1]["what"] == "weighted effects"
    assert said["not known"][-1]["why"].startswith("behaviour sums: expected its own expert second to lower its loss")


@pytest.mark.parametrize("policy", ["top", "weighted"])
@pytest.mark.parametrize("overlap", ["sum", "share", "winner"])
def test_what_several_experts_want_is_named_with_what_became_of_it(tmp_path: Path, policy: str, overlap: str) -> None:
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    score_file(1).write(files[0])
    score_file(2, SECOND, "sums").write(files[1])
    models = {"first": FIRST, "second": SECOND}
    compiled = compile_recipe(policy, read_sources(files, models), parameters={"budget": 0.5, "overlap": overlap})
    write_recipe(tmp_path / "recipe.yaml", compiled.recipe, compiled.masks)
    given = [part for file in files for part in ("--scores", file)]
    said = tables("explain", tmp_path / "recipe.yaml", *given, "--all-conflicts")
    _, rows = named(said)
    scores = {"first": [score_file(1)], "second": [score_file(2, SECOND, "sums")]}
    wants = (top if policy == "top" else weighted)(scores, budget=0.5).masks
    wanted = {
        f"L{layer}.{kind}.{unit}"
        for kind in UNIT_KINDS
        for layer, unit in np.argwhere((wants[f"first.{kind}"] != 0) & (wants[f"second.{kind}"] != 0))
    }
    assert {row["component"] for row in rows} == wanted
    assert all(row["decided"] == f"overlap {overlap}: {conflicts.OVERLAPS[policy, overlap]}" for row in rows)
    weaker = [min(float(part.split("(score ")[1].split(")")[0]) for part in row["wanted by"].split(", ")) for row in rows]
    assert weaker == sorted(weaker, reverse=True)
    layer, kind, unit = rows[0]["component"].removeprefix("L").split(".")
    at = (int(layer), int(unit))
    gets = [compiled.masks[f"{name}.{kind}"][at] for name in models]
    assert rows[0]["gets"] == f"first {gets[0]:.3g}, second {gets[1]:.3g}"
    one = tables("explain", tmp_path / "recipe.yaml", *given, "--component", rows[0]["component"])
    for row, name, got in zip(one[f"scores of {rows[0]['component']}"], models, gets, strict=True):
        file = scores[name][0]
        assert row["score"] == pytest.approx(file.arrays[f"{kind}.screen"][at], rel=5e-3)
        rivals = [file.score(k)[:2].ravel() for k in (UNIT_KINDS if policy == "top" else (kind,))]
        rank = 1 + int((np.concatenate(rivals) > file.score(kind)[at]).sum())
        assert row["rank"] == f"{rank} of {np.concatenate(rivals).size}"
        assert (row["wanted"], row["gets"]) == (
            pytest.approx(wants[f"{name}.{kind}"][at], abs=1e-6),
            pytest.approx(got, abs=1e-6),
        )
    without = tables("explain", tmp_path / "recipe.yaml")
    why = "needs the score files (--scores)" + (", since winner keeps one of them" if overlap == "winner" else "")
    assert {"what": "what each expert wanted", "why": why} in without["not known"]
    assert any(title.startswith("conflicts") for title in without) == (overlap != "winner")


# ------------------------------------------------------------------------------------------------- rounds, and what to expect
def rounds_file() -> RoundsFile:
    """One round that was accepted, of two behaviours and a protected one."""
    draw = np.random.default_rng(0)
    arrays = {f"{k}.coefficient": (draw.random((2, LAYERS, UNITS[k])) > 0.2).astype(np.float32) for k in UNIT_KINDS}
    behaviors = tuple(
        SettledBehavior(
            name=name, expert=expert, weight=weight, members=(name,), digests={name: "d" * 64}, answers=8,
            loss_base=3.0, loss_expert=3.0 - gain, loss_sum=2.25, loss_merge=2.0,
        )
        for name, expert, weight, gain in
        (("formats", "first", 3.0, 2.0), ("sums", "second", 1.0, 0.5), ("chat", "base", 1.0, 0.0))
    )  # fmt: skip
    change = {"formats": -0.25, "sums": -0.5, "chat": 0.125}
    record = RoundRecord(
        proposed=40, changed=33, predicted=change, realised=dict.fromkeys(change, -0.25), gain=1.5, accepted=True
    )
    metadata = RoundsMetadata(
        base=BASE, experts={"first": FIRST, "second": SECOND}, behaviors=behaviors, rounds=(record,), parameters=PARAMETERS,
        dtype="float32", seed=0, versions={},
    )  # fmt: skip
    return RoundsFile(metadata, arrays)


@pytest.fixture
def rounds_recipe(folder: Path) -> Path:
    """A recipe of rounds, its file beside it."""
    rounds_file().write(folder / "rounds.safetensors")
    compiled = compile_recipe("rounds", read_sources([folder / "rounds.safetensors"]))
    write_recipe(folder / "r" / "recipe.yaml", compiled.recipe, compiled.masks)
    return folder / "r" / "recipe.yaml"


def test_a_recipe_of_rounds_tells_recoveries_by_itself(folder: Path, rounds_recipe: Path) -> None:
    made = read_recipe(rounds_recipe)[0]
    assert made.provenance[0].gains == {"formats": 2.0, "sums": 0.5}
    assert made.provenance[0].metric == "loss"
    rows = tables("explain", rounds_recipe)["against the base, nats per answer token"]
    shown = [(row["expected recovery"], row["measured recovery"]) for row in rows]
    assert shown == [(0.5, 0.5), (2.5, 2.0), ("–", "–")], "(.75 + what was predicted on top) / gain, and 1 / gain"
    with_effects = tables("explain", rounds_recipe, "--effects", folder / "effects.safetensors")
    assert [row["its expert"] for row in with_effects["against the base, nats per answer token"]] == ["first", "second", "–"]


def test_gains_are_those_of_the_file_that_the_prediction_is_from(folder: Path, rounds_recipe: Path) -> None:
    """Among several sources: of the same metric, and of the rounds where the merge itself was measured."""
    for metric in ("loss", "anchor"):
        changed(effect_file(gains=(1.0, 1.0)), metric=metric).write(folder / "both.safetensors")
        sources = read_sources([folder / "both.safetensors", folder / "rounds.safetensors"])
        assert sources.provenance[0].gains == {"formats": 1.0, "sums": 1.0}
        settled = compile_recipe("rounds", sources).recipe
        assert explain.own_gains(settled, "loss", sources.effects, sources.rounds) == {"formats": 2.0, "sums": 0.5}
        decided = compile_recipe("conflict", sources).recipe
        found = explain.own_gains(decided, decided.predicted_on, sources.effects, sources.rounds)
        assert found == {"formats": 1.0, "sums": 1.0}
        foreign = decided.model_copy(update={"predicted_on": "anchor"})
        assert bool(explain.own_gains(foreign, "anchor", sources.effects, sources.rounds)) == (metric == "anchor")
    made = read_recipe(folder / "a" / "recipe.yaml")[0]
    counts = conflicts.counts_of(made, effect_file(), rounds_file())
    assert not isinstance(counts, str)
    assert counts.tolist() == [0.5, 2.0], "weights of rounds are not those of the policy conflict"


def test_an_older_recipe_needs_a_file_for_recoveries(folder: Path, rounds_recipe: Path) -> None:
    made, masks = read_recipe(rounds_recipe)
    older = tuple(s.model_copy(update={"gains": {}, "metric": None}) for s in made.provenance)
    write_recipe(rounds_recipe, made.model_copy(update={"provenance": older}), masks)
    said = tables("explain", rounds_recipe)
    assert "expected recovery" not in said["against the base, nats per answer token"][0]
    assert "expected recovery" in [row["what"] for row in said["not known"]]
    said = tables("explain", rounds_recipe, "--rounds", folder / "rounds.safetensors")
    assert [row["measured recovery"] for row in said["against the base, nats per answer token"]] == [0.5, 2.0, "–"]
    assert said["rounds"] == [
        {"rounds": 1, "proposed": 40, "changed": 33, "formats: predicted, found": "−0.25, −0.25",
         "sums: predicted, found": "−0.5, −0.25", "chat: predicted, found": "+0.125, −0.25",
         "weighted gain": 1.5, "stayed": "yes"}
    ]  # fmt: skip


def test_rounds_say_what_they_decided_as_far_as_it_is_known(folder: Path, rounds_recipe: Path) -> None:
    said = tables("explain", rounds_recipe, "--component", "L1.neuron.3")
    assert said["not known"] == [{"what": "what was decided on", "why": "needs the effect file (--effects)"}]
    files = ("--effects", folder / "effects.safetensors", "--rounds", folder / "rounds.safetensors")
    said = tables("explain", rounds_recipe, "--component", "L1.neuron.3", *files)
    counted = [row["weight / own gain"] for row in said["what an effect counts"]]
    assert counted == [1.5, 2.0], "the weights of the rounds"
    masks = read_recipe(rounds_recipe)[1]
    for row in said["weighted effects of L1.neuron.3 (effect × what it counts)"]:
        kept = masks[f"{row['expert']}.neuron"][1, 3] != 0
        assert row["decided"] == ("in: as in the sum" if kept else "out: turned over in rounds")
    assert "along base→sum" in said["not known"][0]["why"]
    _, rows = named(tables("explain", rounds_recipe, *files))
    assert {row["decided"] for row in rows} <= {"in: as in the sum", "out: turned over in rounds"}


@pytest.mark.parametrize(
    ("policy", "parameters"),
    [
        ("top", {"budget": 0.5}),
        ("weighted", {"overlap": "share"}),
        ("task-arithmetic", {"weight": 0.6}),
        ("task-arithmetic", {"strength.first": 0.5}),
    ],
)
def test_effects_predict_what_a_recipe_does_not(tmp_path: Path, policy: str, parameters: dict[str, Any]) -> None:
    files = [tmp_path / name for name in ("one.safetensors", "two.safetensors", "effects.safetensors")]
    score_file(1).write(files[0])
    score_file(2, SECOND, "sums").write(files[1])
    effect_file().write(files[2])
    sources = read_sources(files)
    compiled = compile_recipe(policy, sources, parameters=parameters)
    made = compiled.recipe.model_copy(update={"predicted": None})
    written = write_recipe(tmp_path / "recipe.yaml", made, compiled.masks)
    expected = expected_change(sources, written, compiled.masks)
    assert expected is not None
    (rows,) = (
        rows
        for title, rows in tables("explain", tmp_path / "recipe.yaml", "--effects", files[2]).items()
        if title == "against the base, nats per answer token"
    )
    for row, gain in zip(rows, (2.0, 0.5), strict=True):
        assert row["predicted change of loss"] == pytest.approx(expected[row["behavior"]], abs=1e-4)
        assert row["expected recovery"] == pytest.approx(-expected[row["behavior"]] / gain, abs=2e-3)
    without = tables("explain", tmp_path / "recipe.yaml")
    assert without["not known"][0] == {"what": "expected change", "why": "needs an effect file of these models (--effects)"}


def test_rules_count_in_the_prediction() -> None:
    """As masks of the same coefficients do."""
    file = effect_file()
    ruled = by_hand(("L1.neuron.*", "first", 0.25), ("embed", "first", 0.5), ("L2.norms", "second", 0.75))
    found = explain.resolved(ruled, {}, conflicts.effect_shapes(file))
    predicted = explain.predicted_by(ruled, found, file)
    assert predicted is not None
    for b, name in enumerate(("formats", "sums")):
        gain = 0.0
        for kind, array in ((k.removesuffix(".effect"), v) for k, v in file.arrays.items() if k.endswith(".effect")):
            one, other = np.ones(array.shape[-2:]), np.zeros(array.shape[-2:])
            if kind == "neuron":
                one[1] = 0.25
            if kind == "embed":
                one[:] = 0.5
            if kind == "norms":
                other[2] = 0.75
            gain += float((array[b, 0] * one + array[b, 1] * other).sum(dtype=np.float64))
        assert predicted[0][name] == pytest.approx(-gain, abs=1e-4)


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
    assert differences.differing_fields(one, one) == []
    assert [row["field"] for row in differences.differing_fields(one, one.model_copy(update=change))] == [field]


def test_recipes_of_other_sizes_cannot_be_compared() -> None:
    shapes = {kind: (LAYERS, UNITS[kind]) for kind in UNIT_KINDS}
    one, other = (explain.resolved(by_hand(), {}, s) for s in (shapes, shapes | {"neuron": (LAYERS, 7)}))
    with pytest.raises(InputError, match=r"first.neuron: expected \[3, 48\]"):
        differences.difference_rows({"first": (one, other)})


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


# ----------------------------------------------------------------------------------------------------- what rounds go with
def measured_twice(folder: Path, metric: str = "loss") -> Sources:
    """Effects and rounds of the same experts."""
    file = effect_file()
    EffectFile(file.metadata.model_copy(update={"metric": metric}), file.arrays).write(folder / "effects.safetensors")
    rounds_file().write(folder / "rounds.safetensors")
    return read_sources([folder / "effects.safetensors", folder / "rounds.safetensors"])


def test_a_prediction_says_what_it_is_of(tmp_path: Path) -> None:
    """Strengths are foreseen by the effects at hand, whatever the recipe's own prediction was of."""
    for metric in ("loss", "anchor"):
        made = compile_recipe("rounds", measured_twice(tmp_path, metric), parameters={"strength.first": 0.5})
        assert made.recipe.predicted is not None
        assert made.recipe.predicted_on == metric


def test_rounds_of_other_experts_are_refused(tmp_path: Path) -> None:
    sources = measured_twice(tmp_path)
    more = dataclasses.replace(sources, experts=sources.experts | {"third": OTHER})
    with pytest.raises(InputError, match="policy rounds: expected a rounds file with third; found one of first, second"):
        compile_recipe("rounds", more)
