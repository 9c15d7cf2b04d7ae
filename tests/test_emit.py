"""What recipes are emitted as, and that mergekit reads it as it was meant."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mechmerge.errors import InputError
from mechmerge.merge.reference import merged_tensor
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.models.references import Model, resolve
from mechmerge.recipe.coefficients import coefficients, owners_of, tensor_coefficient
from mechmerge.recipe.emit import emit_baseline, emit_masked, emit_stock
from mechmerge.recipe.schema import MergekitMethod, Policy, Recipe, RecipeExpert, Rule
from tests.tiny import tiny_expert, tiny_model

Rules = list[tuple[str, str, float]]


def recipe(base: Model, experts: dict[str, Model], rules: Rules, default: float = 0.0, **settings: Any) -> Recipe:
    return Recipe(
        base=base.id,
        experts={name: RecipeExpert(model=model.id, default=default) for name, model in experts.items()},
        policy=Policy(name="by hand"),
        rules=tuple(Rule(component=c, expert=e, coefficient=v) for c, e, v in rules),
        **settings,
    )


def stock(made: Recipe, base: Model, paths: dict[str, Path | str]) -> str:
    opened = base.checkpoint()
    return emit_stock(made, coefficients(made, {}, opened.arch), opened.layout, opened.shapes, paths)


def run_stock(text: str, out: Path, seed: int | None = None) -> None:
    """The emitted YAML through mergekit's own `run_merge`, with nothing of ours."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    logging.getLogger("mergekit").setLevel(logging.ERROR)
    options = MergeOptions(quiet=True, write_model_card=False, random_seed=seed, device="cpu")
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(out), options, config_source=text)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, dict[str, Model]]:
    """Twelve layers, so that layer 1 is a prefix of 10 and 11; three experts; an untied head; Qwen2's biases."""
    folder = tmp_path_factory.mktemp("deep")
    base = resolve(str(tiny_model(folder / "base", "qwen2", layers=12, tied=False)))
    experts = {f"e{i}": resolve(str(tiny_expert(base.path, folder / f"e{i}", seed=i))) for i in range(3)}
    return base, experts


RULES: Rules = [
    ("L1", "e0", 0.5),
    ("L*.attention", "e1", 0.75),
    ("L10.mlp", "e1", -1.5),
    ("L11.norms", "e2", 1.0),
    ("L2.mlp", "e0", 0.3),
    ("embed", "e2", 0.25),
    ("lm_head", "e1", 1.0),
    ("final_norm", "e0", 2.0),
]


@pytest.mark.parametrize("default", [0.0, 1.0, 0.1])
def test_stock_yaml_is_run_unchanged_by_mergekit(deep: tuple[Model, dict[str, Model]], tmp_path: Path, default: float) -> None:
    base, experts = deep
    made = recipe(base, experts, RULES, default, out_dtype="float32")
    text = stock(made, base, {"base": base.path} | {name: m.path for name, m in experts.items()})
    run_stock(text, tmp_path / "out")
    merged, one = Checkpoint(tmp_path / "out"), base.checkpoint()
    found, opened = coefficients(made, {}, one.arch), {name: model.checkpoint() for name, model in experts.items()}
    assert merged.shapes == one.shapes
    for name, tensor in merged.tensors():
        assert torch.equal(tensor, merged_tensor(name, one, opened, found)), name
    assert not torch.equal(merged.tensor("model.norm.weight"), one.tensor("model.norm.weight"))


def test_stock_yaml_says_what_it_must(deep: tuple[Model, dict[str, Model]]) -> None:
    base, experts = deep
    paths: dict[str, Path | str] = {"base": "owner/base@rev"} | {name: f"owner/{name}@rev" for name in experts}
    document = yaml.safe_load(stock(recipe(base, experts, RULES), base, paths))
    assert document["merge_method"] == "task_arithmetic"
    assert document["dtype"] == "float32"
    assert document["out_dtype"] == "bfloat16"
    assert document["base_model"] == "owner/base@rev"
    assert document["parameters"] == {"normalize": False}
    assert [entry["model"] for entry in document["models"]] == ["owner/e0@rev", "owner/e1@rev", "owner/e2@rev"]
    tensors = owners_of(base.checkpoint().layout)
    for entry in document["models"]:
        *filters, last = entry["parameters"]["weight"]
        assert last == {"value": 0.0}
        for item in filters:
            assert item["filter"].endswith(".") or item["filter"] in tensors
    first = document["models"][0]["parameters"]["weight"]
    assert {"filter": "model.layers.1.", "value": 0.5} in first


def test_a_recipe_without_rules_is_one_number(deep: tuple[Model, dict[str, Model]]) -> None:
    base, experts = deep
    text = stock(recipe(base, experts, [], 0.25), base, {"base": "b"} | dict.fromkeys(experts, "e"))
    assert [entry["parameters"]["weight"] for entry in yaml.safe_load(text)["models"]] == [0.25] * 3


@pytest.mark.parametrize("component", ["L1.head.2", "L1.kv.0", "L3.neuron.*", "L1.attention.rest"])
def test_rules_that_cut_a_tensor_need_masks(deep: tuple[Model, dict[str, Model]], component: str) -> None:
    base, experts = deep
    made = recipe(base, experts, [(component, "e0", 0.5)])
    paths: dict[str, Path | str] = {"base": "b"} | dict.fromkeys(experts, "e")
    if component in ("L1.attention.rest", "L3.neuron.*"):  # whole tensors, or none in Qwen2
        assert stock(made, base, paths)
        return
    with pytest.raises(InputError, match=r"e0, model\.layers\.1\.self_attn.*--emit masked"):
        stock(made, base, paths)


def test_a_tied_head_goes_with_the_embeddings(base: Model, expert: Model, tmp_path: Path) -> None:
    """A stored copy of the tied head must come out as the merged embeddings, under mergekit too."""
    made = recipe(base, {"e": expert}, [("embed", "e", 0.5)], out_dtype="float32")
    text = stock(made, base, {"base": base.path, "e": expert.path})
    filters = {item.get("filter"): item["value"] for item in yaml.safe_load(text)["models"][0]["parameters"]["weight"]}
    assert filters == {"model.embed_tokens.weight": 0.5, "lm_head.weight": 0.5, None: 0.0}
    run_stock(text, tmp_path / "out")
    assert Checkpoint(tmp_path / "out").shapes == base.checkpoint().shapes


def test_paths_with_mergekits_own_signs_are_quoted(base: Model, expert: Model, tmp_path: Path) -> None:
    from mergekit.config import MergeConfiguration

    paths: dict[str, Path | str] = {"base": tmp_path / "a@b", "e": tmp_path / "x+y"}
    for text in (
        stock(recipe(base, {"e": expert}, []), base, paths),
        emit_masked(recipe(base, {"e": expert}, []), "r.yaml", paths),
    ):
        read = MergeConfiguration.model_validate(yaml.safe_load(text))
        assert read.base_model is not None
        assert read.base_model.model.path == str(tmp_path / "a@b")
        assert read.models is not None
        assert (read.models[0].model.model.path, read.models[0].model.lora) == (str(tmp_path / "x+y"), None)


def test_masked_yaml_names_our_method(base: Model, expert: Model) -> None:
    document = yaml.safe_load(emit_masked(recipe(base, {"e": expert}, []), "/some/recipe.yaml", {"base": "b", "e": "x"}))
    assert document["merge_method"] == "mechmerge_masked"
    assert document["parameters"] == {"recipe": "/some/recipe.yaml"}
    assert document["models"] == [{"model": "x", "parameters": {"expert": "e"}}]


def test_baselines_and_recipes_are_not_mixed_up(base: Model, expert: Model) -> None:
    paths: dict[str, Path | str] = {"base": "b", "e": "x"}
    baseline = recipe(base, {"e": expert}, [], mergekit=MergekitMethod(method="ties"))
    with pytest.raises(InputError, match="ties"):
        stock(baseline, base, paths)
    with pytest.raises(InputError, match="ties"):
        emit_masked(baseline, "r.yaml", paths)
    with pytest.raises(InputError, match="by hand"):
        emit_baseline(recipe(base, {"e": expert}, []), paths)


def test_linear_gives_the_base_no_weight(base: Model, expert: Model) -> None:
    made = recipe(base, {"e": expert}, [], 1.0, mergekit=MergekitMethod(method="linear", parameters={"normalize": True}))
    document = yaml.safe_load(emit_baseline(made, {"base": "b", "e": "x"}))
    assert document["models"] == [{"model": "x", "parameters": {"weight": 1.0}}, {"model": "b", "parameters": {"weight": 0.0}}]


def test_a_tensors_coefficients_are_those_of_its_rows(base: Model, expert: Model) -> None:
    made, one = recipe(base, {"e": expert}, [("L1.head.2", "e", 0.5), ("L1.norms", "e", 0.25)]), base.checkpoint()
    found, owners = coefficients(made, {}, one.arch), owners_of(one.layout)

    def values(name: str) -> tuple[int | None, list[float]]:
        dim, array = tensor_coefficient(name, one.shapes[name], owners[name], found, "e")
        return dim, array.tolist()

    head = [0.0] * 16 + [0.5] * 8 + [0.0] * 8
    assert values("model.layers.1.self_attn.q_proj.weight") == (0, head)
    assert values("model.layers.1.self_attn.o_proj.weight") == (1, head)
    assert values("model.layers.1.self_attn.k_proj.weight") == (None, [0.0])
    assert values("model.layers.1.input_layernorm.weight") == (None, [0.25])
