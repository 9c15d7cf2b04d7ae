"""The recipe's schema, its round trip through YAML, and how rules and masks become coefficients."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mechmerge.artifacts import parse_document, parse_yaml, sha256_file, to_yaml
from mechmerge.cli.main import cli
from mechmerge.cli.recipe import command
from mechmerge.errors import InputError, MechmergeError, SchemaError
from mechmerge.models.components import LEAF_KINDS, UNIT_KINDS, Component
from mechmerge.models.deltas import delta_norms
from mechmerge.models.families import architecture
from mechmerge.models.references import Model, ModelId, resolve
from mechmerge.recipe.coefficients import coefficients
from mechmerge.recipe.compile import POLICIES, compile_recipe
from mechmerge.recipe.explain import shares
from mechmerge.recipe.schema import MaskFile, Policy, Recipe, RecipeExpert, Rule, Source, read_recipe, write_recipe
from mechmerge.recipe.sources import expert_name, read_sources
from tests.measured import BASE, FIRST, LAYERS, SECOND, UNITS, effect_file, score_file
from tests.test_components import CONFIG
from tests.tiny import tiny_expert, tiny_model

ARCH = architecture(CONFIG, "config.json")
UNTIED = dataclasses.replace(ARCH, tied=False)


def recipe(*rules: tuple[str, str, float], defaults: tuple[float, float] = (1.0, 0.0)) -> Recipe:
    return Recipe(
        base=BASE,
        experts={
            "first": RecipeExpert(model=FIRST, default=defaults[0]),
            "second": RecipeExpert(model=SECOND, default=defaults[1]),
        },
        policy=Policy(name="by hand"),
        rules=tuple(Rule(component=c, expert=e, coefficient=v) for c, e, v in rules),
    )


# --------------------------------------------------------------------------------------------------------------- round trip
text = st.text(max_size=20)
number = st.floats(-1e6, 1e6, allow_nan=False)
revision = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_./+-]*", fullmatch=True)
identity = st.builds(ModelId, name=text, revision=st.none() | revision, shards=st.dictionaries(text, text, max_size=2))
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,10}", fullmatch=True).filter(lambda name: name != "base")
pattern = st.sampled_from(
    ["embed", "final_norm", "L*", "L3", "L*.attention", "L2.mlp.rest", "L7.head.3", "L*.kv.*", "L0.neuron.*"]
)
sha = st.from_regex("[0-9a-f]{64}", fullmatch=True)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    experts = draw(st.dictionaries(names, st.builds(RecipeExpert, model=identity, default=number), min_size=1, max_size=3))
    rule = st.builds(Rule, component=pattern, expert=st.sampled_from(sorted(experts)), coefficient=number)
    return Recipe(
        base=draw(identity),
        experts=experts,
        policy=draw(
            st.builds(Policy, name=text, parameters=st.dictionaries(text, number | text | st.booleans() | st.integers()))
        ),
        rules=tuple(draw(st.lists(rule, max_size=4))),
        masks=draw(st.none() | st.builds(MaskFile, file=st.just("masks.safetensors"), sha256=sha)),
        predicted=draw(st.none() | st.dictionaries(text, number, max_size=2)),
        provenance=tuple(draw(st.lists(st.builds(Source, file=text, kind=st.just("scores"), sha256=sha), max_size=2))),
    )


@given(recipes())
def test_a_recipe_survives_yaml_exactly(made: Recipe) -> None:
    written = to_yaml(made)
    read = parse_document(Recipe, parse_yaml(written, "recipe.yaml"), "recipe.yaml")
    assert read == made
    assert list(read.experts) == list(made.experts)
    assert to_yaml(read) == written


def test_a_recipe_with_masks_survives_the_disk(tmp_path: Path) -> None:
    masks = {
        f"{e}.{k}": np.random.default_rng(1).random((LAYERS, n)).astype(np.float32)
        for e in ("first", "second")
        for k, n in UNITS.items()
    }
    written = write_recipe(tmp_path / "recipe.yaml", recipe(("L1", "first", 0.25)), masks)
    read, found = read_recipe(tmp_path / "recipe.yaml")
    assert read == written
    assert found.keys() == masks.keys()
    assert all(np.array_equal(found[name], masks[name]) for name in masks)
    before = [(tmp_path / name).read_bytes() for name in ("recipe.yaml", "masks.safetensors")]
    write_recipe(tmp_path / "recipe.yaml", read, found)
    assert [(tmp_path / name).read_bytes() for name in ("recipe.yaml", "masks.safetensors")] == before


def test_masks_that_were_changed_afterwards_are_refused(tmp_path: Path) -> None:
    masks = {"first.head": np.ones((LAYERS, 4), np.float32)}
    written = write_recipe(tmp_path / "recipe.yaml", recipe(), masks)
    write_recipe(tmp_path / "other" / "recipe.yaml", recipe(), {"first.head": np.zeros((LAYERS, 4), np.float32)})
    (tmp_path / "other" / "masks.safetensors").rename(tmp_path / "masks.safetensors")
    assert written.masks is not None
    with pytest.raises(SchemaError, match="sha256"):
        read_recipe(tmp_path / "recipe.yaml")
    (tmp_path / "masks.safetensors").unlink()
    with pytest.raises(InputError, match="nothing there"):
        read_recipe(tmp_path / "recipe.yaml")


# ------------------------------------------------------------------------------------------------------------------- schema
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "surprise: unknown key"),
        ({"experts": {}}, "experts"),
        ({"schema_version": 2}, "schema_version"),
        ({"out_dtype": "int8"}, "out_dtype"),
        ({"rules": [{"component": "L1", "expert": "third", "coefficient": 1}]}, "expert 'third' is not among first, second"),
        ({"rules": [{"component": "L1.heads.*", "expert": "first", "coefficient": 1}]}, "not a component or a pattern"),
        ({"rules": [{"component": "L1*", "expert": "first", "coefficient": 1}]}, "not a component or a pattern"),
        ({"rules": [{"component": "L1", "expert": "first", "coefficient": 1e300}]}, "not a finite float32"),
        ({"rules": [{"component": "L1", "expert": "first", "coefficient": ".nan"}]}, "coefficient"),
        ({"rules": [{"component": "L1", "expert": "first"}]}, "coefficient"),
        ({"masks": {"file": "../masks.safetensors", "sha256": "0" * 64}}, "masks.file"),
        ({"mergekit": {"method": "slerp"}}, "mergekit.method"),
        (
            {"mergekit": {"method": "ties"}, "rules": [{"component": "L1", "expert": "first", "coefficient": 1}]},
            "exclude each other",
        ),
        ({"mergekit": {"method": "ties", "expert_parameters": {"third": {}}}}, "'third' is not among"),
    ],
)
def test_recipes_that_break_the_schema(change: dict[str, Any], message: str) -> None:
    document = parse_yaml(to_yaml(recipe()), "recipe.yaml") | change
    with pytest.raises(SchemaError) as caught:
        parse_document(Recipe, document, "recipe.yaml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["base", "a.b", "", "a/b", "ü"])
def test_names_that_no_expert_may_have(name: str) -> None:
    with pytest.raises(ValueError, match="plain name"):
        Recipe(base=BASE, experts={name: RecipeExpert(model=FIRST)}, policy=Policy(name="x"))


@pytest.mark.parametrize(
    "masks",
    [
        {"third.head": np.ones((3, 4), np.float32)},
        {"first.layer": np.ones((3, 1), np.float32)},
        {"first.head": np.ones((3, 4), np.float64)},
        {"first.head": np.ones(4, np.float32)},
        {"first.head": np.full((3, 4), np.nan, np.float32)},
    ],
)
def test_masks_that_break_the_schema(tmp_path: Path, masks: dict[str, Any]) -> None:
    with pytest.raises(SchemaError):
        write_recipe(tmp_path / "recipe.yaml", recipe(), masks)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------- coefficients
def test_defaults_cover_everything_that_no_rule_names() -> None:
    found = coefficients(recipe(defaults=(0.5, -2.0)), {}, ARCH)
    for expert, value in (("first", 0.5), ("second", -2.0)):
        for name in ("embed", "final_norm", "L0", "L1.attention", "L2.norms", "L2.head.3", "L0.mlp.rest", "L1.neuron.47"):
            assert found.of(expert, name) == value


def test_the_most_specific_rule_wins_whatever_the_order() -> None:
    rules = [("L*", 0.1), ("L1", 0.2), ("L1.attention", 0.3), ("L1.head.*", 0.4), ("L1.head.2", 0.5), ("embed", 0.6)]
    for order in (rules, rules[::-1]):
        found = coefficients(recipe(*((c, "first", v) for c, v in order)), {}, ARCH)
        expected = {
            "L0": 0.1,
            "L1.mlp": 0.2,
            "L1.kv.1": 0.3,
            "L1.attention.rest": 0.3,
            "L1.head.0": 0.4,
            "L1.head.2": 0.5,
            "embed": 0.6,
            "final_norm": 1.0,
        }
        for name, value in expected.items():
            assert found.of("first", name) == np.float32(value), name
        assert found.of("second", "L1.head.2") == 0


def test_equally_specific_rules_must_agree_or_be_decided() -> None:
    conflict = [("L1.attention", "first", 0.5), ("L*.head.2", "first", 0.25)]
    with pytest.raises(InputError, match=r"L1\.head\.2 of first.*L1\.attention = 0\.5 and L\*\.head\.2 = 0\.25"):
        coefficients(recipe(*conflict), {}, ARCH)
    decided = coefficients(recipe(*conflict, ("L1.head.2", "first", 0.125)), {}, ARCH)
    assert [decided.of("first", name) for name in ("L1.head.2", "L0.head.2", "L1.head.1")] == [0.125, 0.25, 0.5]
    agreeing = [("L1.attention", "first", 0.5), ("L*.head.2", "first", 0.5)]
    assert coefficients(recipe(*agreeing), {}, ARCH).of("first", "L1.head.2") == 0.5
    with pytest.raises(InputError, match="one most specific rule"):
        coefficients(recipe(("L1", "first", 0.5), ("L1", "first", 0.25)), {}, ARCH)
    coefficients(recipe(("L1", "first", 0.5), ("L1", "second", 0.25)), {}, ARCH)


@pytest.mark.parametrize("component", ["L3", "L*.head.4", "L0.neuron.48", "L9.neuron.*", "lm_head"])
def test_rules_on_what_is_not_there(component: str) -> None:
    with pytest.raises(InputError, match=r"expected .* below|untied"):
        coefficients(recipe((component, "first", 0.5)), {}, ARCH)


def test_a_tied_head_follows_the_embeddings_and_an_untied_one_does_not() -> None:
    made = recipe(("embed", "first", 0.25))
    assert coefficients(made, {}, ARCH).outside["first"]["lm_head"] == 0.25
    assert coefficients(made, {}, UNTIED).of("first", "lm_head") == 1.0


def test_masks_stand_above_modules_and_not_beside_units() -> None:
    mask = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    found = coefficients(recipe(("L1.attention", "first", 0.75)), {"first.head": mask}, ARCH)
    assert found.of("first", "L1.head.2") == mask[1, 2]
    assert found.of("first", "L1.kv.0") == 0.75
    with pytest.raises(InputError, match=r"no mask of the same units"):
        coefficients(recipe(("L1.head.2", "first", 0.75)), {"first.head": mask}, ARCH)
    with pytest.raises(InputError, match=r"\[3, 4\].*\[4, 3\]"):
        coefficients(recipe(), {"first.head": mask.T.copy()}, ARCH)
    with pytest.raises(InputError, match="one coefficient"):
        found.of("first", "L1.attention")


@given(
    rules=st.lists(
        st.tuples(
            st.sampled_from(
                ["L*", "L0", "L1", "L*.attention", "L1.mlp", "L*.head.*", "L1.head.*", "L*.head.1", "L0.head.1", "L*.norms"]
            ),
            st.sampled_from([0.0, 0.5, 1.0]),
        ),
        max_size=5,
    )
)
def test_coefficients_agree_with_a_plain_reading(rules: list[tuple[str, float]]) -> None:
    """Against sets: a rule is a set of leaves, and the strongest are those with no rule strictly inside them."""
    small = dataclasses.replace(ARCH, layers=2, neurons=2)
    leaves = [(layer, kind, unit) for layer in range(2) for kind in LEAF_KINDS for unit in range(small.units(kind))]
    attention, mlp = {"head", "kv", "attention.rest"}, {"neuron", "mlp.rest"}

    def members(text: str) -> frozenset[tuple[int, str, int]]:
        layer, _, rest = text.partition(".")
        kind, _, unit = rest.partition(".")
        kinds = {"": set(LEAF_KINDS), "attention": attention, "mlp": mlp}.get(kind, {kind})
        return frozenset(
            leaf for leaf in leaves if layer in ("L*", f"L{leaf[0]}") and leaf[1] in kinds and unit in ("", "*", str(leaf[2]))
        )

    # Sets must tell patterns apart; with two layers `L*` and a single layer never coincide.
    sets = [(members(text), value) for text, value in rules]
    expected: dict[tuple[int, str, int], float] = {}
    clash = False
    for leaf in leaves:
        meeting = [(s, v) for s, v in sets if leaf in s]
        top = {v for s, v in meeting if not any(other < s for other, _ in meeting)}
        clash |= len(top) > 1
        expected[leaf] = next(iter(top), 1.0)
    made = recipe(*((text, "first", value) for text, value in rules))
    if clash:
        with pytest.raises(InputError, match="most specific"):
            coefficients(made, {}, small)
    else:
        found = coefficients(made, {}, small)
        assert {leaf: found.of("first", Component(*leaf)) for leaf in leaves} == expected


# ------------------------------------------------------------------------------------------------------- sources and compile
def test_files_are_grouped_by_expert_and_base(tmp_path: Path) -> None:
    score_file(1).write(tmp_path / "a.safetensors")
    score_file(2, SECOND, "sums").write(tmp_path / "b.safetensors")
    effect_file().write(tmp_path / "effects.safetensors")
    files = [tmp_path / name for name in ("b.safetensors", "effects.safetensors", "a.safetensors")]
    found = read_sources(files)
    assert list(found.experts) == ["first", "second"]
    assert {name: [f.metadata.behavior for f in fs] for name, fs in found.scores.items()} == {
        "first": ["formats"],
        "second": ["sums"],
    }
    assert [source.file for source in found.provenance] == ["effects.safetensors", "a.safetensors", "b.safetensors"]
    renamed = read_sources(files, {"x": SECOND, "y": FIRST})
    assert renamed.effects is not None
    assert list(renamed.effects.metadata.experts) == ["y", "x"]
    assert [b.expert for b in renamed.effects.metadata.behaviors] == ["y", "x"]
    other = score_file(3, base=FIRST)
    other.write(tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="expected the base base"):
        read_sources([*files, tmp_path / "other.safetensors"])
    with pytest.raises(InputError, match="second"):
        read_sources([tmp_path / "effects.safetensors"] * 2)
    with pytest.raises(InputError, match="an expert among x"):
        read_sources([tmp_path / "b.safetensors"], {"x": FIRST})
    with pytest.raises(InputError, match="nothing there"):
        read_sources([tmp_path / "none.safetensors"])
    (tmp_path / "text.safetensors").write_text("no")
    with pytest.raises(SchemaError, match="text"):
        read_sources([tmp_path / "text.safetensors"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("demo:smollm2+formats", "formats"), ("owner/Model-1.5B", "Model-1-5B"), ("a b/ü", "expert"), ("x", "x")],
)
def test_experts_get_plain_names(name: str, expected: str) -> None:
    assert expert_name(ModelId(name=name)) == expected


@pytest.fixture
def measured(tmp_path: Path) -> list[Path]:
    score_file(1).write(tmp_path / "a.safetensors")
    score_file(2, SECOND, "sums").write(tmp_path / "b.safetensors")
    effect_file().write(tmp_path / "effects.safetensors")
    return [tmp_path / name for name in ("a.safetensors", "b.safetensors", "effects.safetensors")]


def test_every_policy_compiles_to_a_recipe_that_survives(measured: list[Path], tmp_path: Path) -> None:
    sources = read_sources(measured)
    like = compile_recipe("conflict", sources)
    for policy in (name for name in POLICIES if name != "rounds"):  # tests/test_rounds.py has a rounds file
        control = policy in ("random", "magnitude")
        parameters: dict[str, Any] = {"top": {"budget": 0.3}, "solve": {"unproven": True}}.get(policy, {})
        compiled = compile_recipe(policy, sources, parameters=parameters, like=(like.recipe, like.masks) if control else None)
        write_recipe(tmp_path / policy / "recipe.yaml", compiled.recipe, compiled.masks)
        read, masks = read_recipe(tmp_path / policy / "recipe.yaml")
        assert masks.keys() == compiled.masks.keys()
        assert (read.mergekit is None) == bool(masks)
        if masks:
            found = coefficients(read, masks, ARCH)
            values = np.unique(found.units["first"]["neuron"])
            assert set(values) <= {0.0, 1.0} if policy not in ("solve", "weighted") else ((values >= 0) & (values <= 1)).all()
            assert found.of("first", "embed") == (
                0.0 if policy in ("top", "weighted") else compiled.recipe.experts["first"].default
            )
        if control:
            assert shares(read, masks, {}) == shares(like.recipe, like.masks, {})


@pytest.mark.parametrize(
    ("policy", "parameters", "message"),
    [
        ("best", {}, "one of conflict, rounds, solve, top"),
        ("top", {}, "budget"),
        ("top", {"budget": 2}, "budget"),
        ("top", {"budget": "half"}, "budget"),
        ("top", {"budget": 0.5, "overlap": "max"}, "sum, share, winner"),
        ("top", {"budget": 0.5, "density": 0.5}, "'density'"),
        ("conflict", {"weighting": "own"}, "own-gain, equal"),
        ("conflict", {"budget": 0.5}, "'budget'"),
        ("conflict", {"weight.maths": 2.0}, "behaviours among formats, sums"),
        ("conflict", {"weight.sums": -1.0}, "positive"),
        ("conflict", {"weight.sums": "much"}, "weight.sums: expected a positive number"),
        ("random", {}, "like"),
        ("ties", {"density": 1.5}, "density"),
        ("task-arithmetic", {"density": 0.5}, "'density'"),
        ("linear", {"weight": True}, "weight"),
        ("linear", {"weight": 0}, "sum is not 0"),
        ("conflict", {"weights": {"formats": 2.0}}, "weight.NAME"),
    ],
)
def test_parameters_that_a_policy_refuses(measured: list[Path], policy: str, parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        compile_recipe(policy, read_sources(measured), parameters=parameters)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_controls_of_ties_within_a_recipe_foresee_nothing(measured: list[Path]) -> None:
    """Nor does what they are like: effects of components say nothing of what TIES does."""
    sources = read_sources(measured)
    inside = compile_recipe("conflict", sources)
    ties = compile_recipe("ties", sources, within=(inside.recipe, inside.masks))
    for policy in ("random", "magnitude"):
        made = compile_recipe(policy, sources, like=(ties.recipe, ties.masks))
        assert made.recipe.predicted is None, policy
        assert compile_recipe(policy, sources, like=(inside.recipe, inside.masks)).recipe.predicted, policy


@pytest.mark.parametrize(("policy", "name"), [("random", "per_layer"), ("random", "match_norms"), ("magnitude", "per_layer")])
def test_a_control_takes_no_word_for_a_truth_value(measured: list[Path], policy: str, name: str) -> None:
    sources = read_sources(measured)
    like = compile_recipe("conflict", sources)
    with pytest.raises(InputError, match=f"{name}: expected true or false; found 'no'"):
        compile_recipe(policy, sources, parameters={name: "no"}, like=(like.recipe, like.masks))


def test_what_copies_a_recipe_names_it(measured: list[Path], tmp_path: Path) -> None:
    """By the digest of its file: so it is known which recipe a control was the control of."""
    sources = read_sources(measured)
    made = compile_recipe("conflict", sources)
    write_recipe(tmp_path / "recipe.yaml", made.recipe, made.masks)
    like, digest = read_recipe(tmp_path / "recipe.yaml"), sha256_file(tmp_path / "recipe.yaml")
    for policy, how in (("random", "like"), ("magnitude", "like"), ("ties", "within")):
        recipe = compile_recipe(policy, sources, **{how: like}).recipe  # type: ignore[arg-type]
        assert [s.sha256 for s in recipe.provenance if s.kind == "recipe"] == [digest], policy
        assert [s for s in recipe.provenance if s.kind != "recipe"] == list(sources.provenance)
    assert all(source.kind != "recipe" for source in made.recipe.provenance)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors", "adapter_model.safetensors"])
def test_masks_do_not_bear_the_name_of_weights(name: str) -> None:
    with pytest.raises(ValidationError, match="name of a model's weights"):
        MaskFile(file=name, sha256="a" * 64)
    assert MaskFile(file="model.masks.safetensors", sha256="a" * 64).file == "model.masks.safetensors", "those of model.yaml"


def test_policies_say_which_files_they_lack(measured: list[Path]) -> None:
    with pytest.raises(InputError, match="mechmerge effects"):
        compile_recipe("conflict", read_sources(measured[:2]))
    with pytest.raises(InputError, match="score files of second"):
        compile_recipe("top", read_sources([measured[0], measured[2]]), parameters={"budget": 0.5})


# ---------------------------------------------------------------------------------------------------------------------- CLI
def run(*arguments: object) -> Any:
    return CliRunner().invoke(command, [str(a) for a in arguments], standalone_mode=False)


def test_the_command_writes_the_recipe_and_prints_shares(measured: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "made" / "recipe.yaml"
    done = run(*measured, "--policy", "conflict", "--weight", "sums=2", "--out", out, "--format", "json", "--quiet")
    assert done.exception is None, done.exception
    assert '"expert": "first"' in done.stdout
    made, masks = read_recipe(out)
    assert made.policy.parameters == {"weight.sums": 2.0}
    assert masks.keys() == {f"{e}.{k}" for e in ("first", "second") for k in UNIT_KINDS}
    again = run(
        *measured, "--policy", "random", "--like", out, "--seed", "3", "--per-layer", "--out", tmp_path / "r" / "recipe.yaml"
    )
    assert again.exception is None
    shuffled, drawn = read_recipe(tmp_path / "r" / "recipe.yaml")
    assert shuffled.policy == Policy(name="random like conflict", parameters={"per_layer": True}, seed=3)
    assert all(np.array_equal(drawn[n].sum(1), masks[n].sum(1)) for n in masks)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--policy", "top", "--out", "recipe.yaml"),
        ("--policy", "conflict", "--weight", "sums", "--out", "recipe.yaml"),
        ("--policy", "ties", "--weight", "a=b", "--out", "recipe.yaml"),
        ("--policy", "conflict", "--density", "0.5", "--out", "recipe.yaml"),
    ],
)
def test_the_command_refuses(
    measured: list[Path], tmp_path: Path, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*measured, *arguments)
    assert isinstance(done.exception, MechmergeError)
    assert done.exception.exit_code == 2
    assert not (tmp_path / "recipe.yaml").exists()


def test_the_command_emits_stock_yaml_of_baselines(base: Model, expert: Model, second_expert: Model, tmp_path: Path) -> None:
    experts = {"first": expert.id, "second": second_expert.id}
    effects = effect_file(experts=experts)
    effects = type(effects)(effects.metadata.model_copy(update={"base": base.id}), effects.arrays)
    effects.write(tmp_path / "effects.safetensors")
    out = tmp_path / "recipe.yaml"
    done = run(tmp_path / "effects.safetensors", "--policy", "ties", "--density", "0.3", "--emit", "stock", "--out", out)
    assert done.exception is None, done.exception
    emitted = parse_yaml((tmp_path / "mergekit.yaml").read_text(), "mergekit.yaml")
    assert emitted["merge_method"] == "ties"
    assert [entry["parameters"] for entry in emitted["models"]] == [{"weight": 1.0, "density": 0.3}] * 2
    assert str(base.path) not in out.read_text()
    refused = run(
        tmp_path / "effects.safetensors", "--policy", "conflict", "--emit", "stock", "--out", tmp_path / "c" / "recipe.yaml"
    )
    assert isinstance(refused.exception, InputError)
    assert "--emit masked" in str(refused.exception)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(("family", "tied", "said"), [
    ("llama", True, None), ("gpt2", True, None), ("phi3", False, None),
    ("phi3", True, "phi3 in mergekit 0.1.5: expected a tensor lm_head.weight"),
    ("gpt_neox", False, "gpt_neox in mergekit 0.1.5: expected a tensor gpt_neox.layers.0.attention"),
])  # fmt: skip
def test_a_recipe_is_emitted_later_where_a_plain_mergekit_can_run_it(
    tmp_path: Path, family: str, tied: bool, said: str | None
) -> None:
    base = resolve(str(tiny_model(tmp_path / "base", family, tied=tied)))
    expert = resolve(str(tiny_expert(base.path, tmp_path / "e", seed=1)))
    recipe = Recipe(
        base=base.id,
        experts={"e": RecipeExpert(model=expert.id, default=1.0)},
        policy=Policy(name="by hand"),
        rules=(Rule(component="L1.mlp", expert="e", coefficient=0.25),),
    )
    write_recipe(tmp_path / "half.yaml", recipe, {})
    done = run("emit", tmp_path / "half.yaml", "--as", "stock")
    if said is not None:
        assert said in str(done.exception)
        assert not (tmp_path / "half.mergekit.yaml").exists()
        return
    assert done.exception is None, done.exception
    emitted = parse_yaml((tmp_path / "half.mergekit.yaml").read_text(), "half.mergekit.yaml")
    assert emitted["merge_method"] == "task_arithmetic"
    assert "0.25" in (tmp_path / "half.mergekit.yaml").read_text()
    assert run("emit", tmp_path / "half.yaml", "--as", "masked", "--out", tmp_path / "m.yaml").exception is None
    assert parse_yaml((tmp_path / "m.yaml").read_text(), "m.yaml")["parameters"] == {"recipe": str(tmp_path / "half.yaml")}


@pytest.mark.parametrize("names", [None, ["LlamaForCausalLM", "AnotherForCausalLM"]])
def test_a_base_of_no_or_two_architectures_is_not_for_a_plain_mergekit(tmp_path: Path, names: list[str] | None) -> None:
    """We need only `model_type`; mergekit wants one name."""
    base = resolve(str(tiny_model(tmp_path / "base", seed=21)))
    config = json.loads((base.path / "config.json").read_text())
    (base.path / "config.json").write_text(json.dumps(config | {"architectures": names}))
    base = resolve(str(base.path))
    expert = resolve(str(tiny_expert(base.path, tmp_path / "e", seed=22)))
    made = Recipe(base=base.id, experts={"e": RecipeExpert(model=expert.id, default=1.0)}, policy=Policy(name="by hand"))
    write_recipe(tmp_path / "recipe.yaml", made, {})
    assert "expected one name in `architectures`" in str(run("emit", tmp_path / "recipe.yaml", "--as", "stock").exception)


def test_one_model_under_two_names_is_not_for_mergekit(tmp_path: Path) -> None:
    base = resolve(str(tiny_model(tmp_path / "base")))
    expert = resolve(str(tiny_expert(base.path, tmp_path / "e", seed=1)))
    experts = {name: RecipeExpert(model=expert.id, default=0.5) for name in ("one", "two")}
    write_recipe(tmp_path / "recipe.yaml", Recipe(base=base.id, experts=experts, policy=Policy(name="by hand")), {})
    assert "each model once" in str(run("emit", tmp_path / "recipe.yaml", "--as", "stock").exception)
    assert not (tmp_path / "mergekit.yaml").exists()


def test_nothing_is_written_beside_a_recipe_on_the_hub_or_in_a_model(tmp_path: Path) -> None:
    """The Hub's cache is the Hub's, and a run may make its model anew."""
    kept = tmp_path / "model" / "mechmerge" / "recipe.yaml"
    kept.parent.mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    for there in ("hf://datasets/owner/name/recipe.yaml", str(kept)):
        for called in (["recipe", "emit", there, "--as", "stock"], ["export", there, "--as", "lora", "--rank", "2"]):
            done = CliRunner().invoke(cli, called, standalone_mode=False)
            assert isinstance(done.exception, click.UsageError)
            assert "needs --out" in done.exception.message


def test_others_may_read_masks(tmp_path: Path) -> None:
    """As any new file."""
    before = os.umask(0o022)
    try:
        write_recipe(tmp_path / "recipe.yaml", recipe(), {"first.head": np.zeros((LAYERS, UNITS["head"]), np.float32)})
    finally:
        os.umask(before)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("recipe.yaml", "masks.safetensors")] == [0o644] * 2


def test_magnitude_reads_norms_from_the_models_where_no_file_tells(
    base: Model, expert: Model, second_expert: Model, tmp_path: Path
) -> None:
    effects = effect_file(experts={"first": expert.id, "second": second_expert.id})
    effects = type(effects)(effects.metadata.model_copy(update={"base": base.id}), effects.arrays)
    effects.write(tmp_path / "effects.safetensors")
    like, out = tmp_path / "like" / "recipe.yaml", tmp_path / "made" / "recipe.yaml"
    assert run(tmp_path / "effects.safetensors", "--policy", "conflict", "--out", like).exception is None
    done = run(tmp_path / "effects.safetensors", "--policy", "magnitude", "--like", like, "--out", out)
    assert done.exception is None, done.exception
    made, masks = read_recipe(out)
    assert made.policy.name == "magnitude like conflict"
    norms = delta_norms(base.checkpoint(), second_expert.checkpoint())["neuron"]
    kept = masks["second.neuron"] == 1
    assert kept.sum() == (read_recipe(like)[1]["second.neuron"] == 1).sum()
    assert norms[kept].min() >= norms[~kept].max()


def test_recipes_can_share_a_folder(tmp_path: Path) -> None:
    """Each keeps masks of its own: one recipe must not overwrite what another one names."""
    ones = {"first.head": np.ones((3, 4), np.float32)}
    zeros = {"first.head": np.zeros((3, 4), np.float32)}
    one = write_recipe(tmp_path / "one.yaml", recipe(), ones)
    other = write_recipe(tmp_path / "other.yaml", recipe(), zeros)
    assert one.masks is not None
    assert other.masks is not None
    assert one.masks.file != other.masks.file
    assert read_recipe(tmp_path / "one.yaml")[1]["first.head"].all()
    assert not read_recipe(tmp_path / "other.yaml")[1]["first.head"].any()
