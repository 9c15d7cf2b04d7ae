"""TIES and DARE-TIES inside a mask: mergekit's own where the mask is everything, a plain formula elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechmerge.cli.recipe import command
from mechmerge.errors import InputError
from mechmerge.merge.engine import merge, restrict
from mechmerge.merge.reference import coefficient_tensor
from mechmerge.merge.within import merge_within
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.models.references import Model
from mechmerge.recipe.coefficients import coefficients
from mechmerge.recipe.compile import compile_recipe
from mechmerge.recipe.emit import emit_baseline, emit_masked
from mechmerge.recipe.schema import MergekitMethod, read_recipe, write_recipe
from mechmerge.recipe.sources import Sources
from tests.test_merge import random_masks, written
from tests.test_recipe import run


def twin(deltas: Any, weights: Any, densities: Any, draws: Any, normalize: bool) -> np.ndarray:
    """The formula element by element (`draws`: what DARE keeps; None for TIES)."""
    shape, parts = deltas[0].shape, []
    for e, (delta, weight, density) in enumerate(zip(deltas, weights, densities, strict=True)):
        inside = [i for i in np.ndindex(shape) if weight[i] != 0]
        if draws is None:
            count = len(inside) if density >= 1 else 0 if density <= 0 or not inside else max(1, int(density * len(inside)))
            kept = sorted(inside, key=lambda i: -abs(delta[i]))[:count]
            scale = 1.0
        else:
            kept = [i for i in inside if draws[e][i]]
            before, after = sum(abs(delta[i]) for i in inside), sum(abs(delta[i]) for i in kept)
            scale = before / after if before > 1e-7 and after > 1e-7 else 1.0
        part = np.zeros(shape)
        for i in kept:
            part[i] = weight[i] * delta[i] * scale
        parts.append(part)
    merged = np.zeros(shape)
    for i in np.ndindex(shape):
        sign = 1 if sum(part[i] for part in parts) >= 0 else -1
        agree = [e for e, part in enumerate(parts) if np.sign(part[i]) == sign]
        divisor = sum(weights[e][i] for e in agree) if normalize else 1.0
        merged[i] = sum(parts[e][i] for e in agree) / (divisor or 1.0)
    return merged


@given(seed=st.integers(0, 10_000), density=st.sampled_from([0.0, 0.2, 0.5, 1.0]), drawn=st.booleans(), normalize=st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_formula(seed: int, density: float, drawn: bool, normalize: bool) -> None:
    draw = np.random.default_rng(seed)
    deltas = [draw.normal(size=(5, 6)).astype(np.float32) for _ in range(3)]
    weights = [draw.choice(np.float32([0, 0, 1, 0.5]), size=(5, 1)) for _ in range(3)]
    whole = [np.broadcast_to(weight, (5, 6)) for weight in weights]
    torch.manual_seed(seed)
    draws = [torch.bernoulli(torch.full((5, 6), density)).numpy() for _ in range(3)] if drawn and density < 1 else None
    if drawn and draws is None:
        draws = [np.ones((5, 6))] * 3
    torch.manual_seed(seed)
    found = merge_within(
        [torch.from_numpy(d) for d in deltas], [torch.from_numpy(w) for w in weights], [density] * 3, drawn=drawn,
        normalize=normalize,
    )  # fmt: skip
    assert found.numpy() == pytest.approx(twin(deltas, whole, [density] * 3, draws, normalize), abs=1e-5)


def compiled(folder: Path, policy: str, selection: Path, base: Model, experts: dict[str, Model], **parameters: float) -> Path:
    sources = Sources(base.id, {name: model.id for name, model in experts.items()})
    made = compile_recipe(policy, sources, parameters=parameters, seed=7, within=read_recipe(selection), out_dtype="float32")
    write_recipe(folder / "recipe.yaml", made.recipe, made.masks)
    return folder / "recipe.yaml"


@pytest.mark.parametrize("policy", ["ties", "dare-ties"])
def test_inside_everything_it_is_mergekits_own(
    base: Model, expert: Model, second_expert: Model, tmp_path: Path, policy: str
) -> None:
    experts = {"one": expert, "two": second_expert}
    selection = written(tmp_path / "all", base, experts, out_dtype="float32")
    parameters = {"density": 0.4, "weight": 0.7} | ({"lambda": 1.3} if policy == "ties" else {})
    merge(compiled(tmp_path / "w", policy, selection, base, experts, **parameters), tmp_path / "within")
    sources = Sources(base.id, {name: model.id for name, model in experts.items()})
    plain = compile_recipe(policy, sources, parameters=parameters, seed=7, out_dtype="float32")
    write_recipe(tmp_path / "plain.yaml", plain.recipe)
    merge(tmp_path / "plain.yaml", tmp_path / "theirs")
    theirs = Checkpoint(tmp_path / "theirs")
    for name, tensor in Checkpoint(tmp_path / "within").tensors():
        assert torch.equal(tensor, theirs.tensor(name)), name


def test_inside_a_mask_it_is_the_formula(base: Model, expert: Model, second_expert: Model, tmp_path: Path) -> None:
    experts = {"one": expert, "two": second_expert}
    selection = written(tmp_path / "some", base, experts, random_masks(base, experts), 0.0)
    made = compiled(tmp_path / "w", "ties", selection, base, experts, density=0.3)
    merge(made, tmp_path / "out")
    recipe, masks = read_recipe(made)
    assert recipe.policy.name == "ties within by hand"
    one = base.checkpoint()
    found = coefficients(recipe, masks, one.arch)
    merged, untouched = Checkpoint(tmp_path / "out"), 0
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"):
        deltas = [(m.checkpoint().tensor(name) - one.tensor(name)).numpy() for m in experts.values()]
        weights = [coefficient_tensor(name, one, found, e).numpy() for e in experts]
        expected = one.tensor(name).numpy() + twin(deltas, weights, [0.3, 0.3], None, normalize=True)
        assert merged.tensor(name).numpy() == pytest.approx(expected, abs=1e-5), name
        outside = (weights[0] == 0) & (weights[1] == 0)
        assert np.array_equal(merged.tensor(name).numpy()[outside], one.tensor(name).numpy()[outside])
        untouched += int(outside.sum())
    assert untouched > 0


def test_it_says_where_fractions_count_as_one(base: Model, expert: Model, second_expert: Model, tmp_path: Path) -> None:
    experts = {"one": expert, "two": second_expert}
    sources = Sources(base.id, {name: model.id for name, model in experts.items()})
    for value, policy, said in ((0.3, "ties", True), (0.3, "dare-ties", False), (1.0, "ties", False)):
        masks = {f"{name}.neuron": np.full((3, 48), value, np.float32) for name in experts}
        inside = read_recipe(written(tmp_path / f"{value}-{policy}", base, experts, masks))
        assert any("counts as 1" in note for note in compile_recipe(policy, sources, within=inside).notes) == said


def test_what_it_refuses(base: Model, expert: Model, second_expert: Model, tmp_path: Path) -> None:
    experts = {"one": expert, "two": second_expert}
    selection = written(tmp_path / "some", base, experts, random_masks(base, experts))
    sources = Sources(base.id, {name: model.id for name, model in experts.items()})
    with pytest.raises(InputError, match="--within belongs to ties and dare-ties"):
        compile_recipe("della", sources, within=read_recipe(selection))
    made = read_recipe(compiled(tmp_path / "w", "ties", selection, base, experts))
    with pytest.raises(InputError, match="a recipe of coefficients to work within"):
        compile_recipe("ties", sources, within=made)
    with pytest.raises(InputError, match="a recipe of the base"):
        compile_recipe("ties", Sources(expert.id, sources.experts), within=read_recipe(selection))
    with pytest.raises(InputError, match="--emit masked"):
        emit_baseline(made[0], {"base": "b", "one": "x", "two": "y"})
    assert "merge_method: mechmerge_within" in emit_masked(made[0], "r.yaml", {"base": "b", "one": "x", "two": "y"})
    with pytest.raises(InputError, match="the baseline"):
        restrict(*made, "one")
    with pytest.raises(ValueError, match="only ties and dare_ties"):
        made[0].model_validate(made[0].model_dump() | {"mergekit": MergekitMethod(method="della", within=True).model_dump()})


@pytest.mark.parametrize(
    ("policy", "parameters", "message"),
    [
        ("della", {"density": 0.1, "epsilon": 0.15}, "density ± epsilon"),
        ("breadcrumbs", {"gamma": 2}, "gamma"),
        ("sce", {"weight": 1.0}, "one of topk"),
        ("model-stock", {"filter_wise": 1}, "true or false"),
        ("ties", {"gamma": 0.1}, "'gamma'"),
    ],
)
def test_parameters_of_baselines(base: Model, expert: Model, policy: str, parameters: dict[str, Any], message: str) -> None:
    sources = Sources(base.id, {"e": expert.id, "f": base.id})
    with pytest.raises(InputError, match=message):
        compile_recipe(policy, sources, parameters=parameters)


def test_model_stock_needs_two(base: Model, expert: Model) -> None:
    with pytest.raises(InputError, match="two experts or more; found 1"):
        compile_recipe("model-stock", Sources(base.id, {"e": expert.id}))


def test_the_command(base: Model, expert: Model, second_expert: Model, tmp_path: Path) -> None:
    from tests.measured import effect_file

    effects = effect_file(experts={"one": expert.id, "two": second_expert.id})
    effects = type(effects)(effects.metadata.model_copy(update={"base": base.id}), effects.arrays)
    effects.write(tmp_path / "effects.safetensors")
    chosen, out = tmp_path / "chosen" / "recipe.yaml", tmp_path / "within" / "recipe.yaml"
    assert run(tmp_path / "effects.safetensors", "--policy", "conflict", "--out", chosen).exception is None
    done = run(
        tmp_path / "effects.safetensors", "--policy", "ties", "--within", chosen, "--density", "0.3", "--emit", "masked",
        "--out", out,
    )  # fmt: skip
    assert done.exception is None, done.exception
    assert "by depth" in done.stdout
    assert "mechmerge_within" in (out.parent / "mergekit.yaml").read_text()
    made, masks = read_recipe(out)
    assert made.mergekit == MergekitMethod(
        method="ties", parameters={"normalize": True, "lambda": 1.0}, within=True,
        expert_parameters={n: {"density": 0.3, "weight": 1.0} for n in made.experts},
    )  # fmt: skip
    assert masks.keys() == read_recipe(chosen)[1].keys()
    assert command.name == "command"
