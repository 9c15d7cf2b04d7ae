"""Every family of the table: its components partition the parameters, and own what their names say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechmerge.errors import InputError, PairError
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.models.components import LEAF_KINDS, OUTSIDE, PARTS, UNIT_KINDS, Component, parse_component
from mechmerge.models.families import FAMILIES, architecture
from mechmerge.models.load import load_model
from tests.tiny import tiny_model

MODEL_TYPES = [model_type for family in FAMILIES for model_type in family.model_types]


@pytest.fixture(scope="module", params=MODEL_TYPES)
def untied(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return Checkpoint(tiny_model(tmp_path_factory.mktemp("family") / request.param, request.param, layers=1, tied=False))


@pytest.fixture(
    scope="module", params=[(t, tied) for t in MODEL_TYPES for tied in (True, False)], ids=lambda p: f"{p[0]}-{p[1]}"
)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    family, tied = request.param
    found = Checkpoint(tiny_model(tmp_path_factory.mktemp("family") / family, family, layers=2, tied=tied))
    found.check_complete()
    return found


def _mark(checkpoint: Checkpoint, component: Component, counts: dict[str, torch.Tensor]) -> None:
    for block, unit in checkpoint.layout.component_blocks(component):
        units = [unit] if unit is not None else list(range(block.units))
        for u in units:
            if block.dim is None:
                counts[block.tensor] += 1
            else:
                part = block.indices(u)
                counts[block.tensor].narrow(block.dim, part.start, part.stop - part.start).add_(1)


def _counts(checkpoint: Checkpoint, components: Iterator[Component]) -> dict[str, torch.Tensor]:
    counts = {name: torch.zeros(shape) for name, shape in checkpoint.shapes.items()}
    for component in components:
        _mark(checkpoint, component, counts)
    return counts


def _outside(checkpoint: Checkpoint) -> Iterator[Component]:
    for name in OUTSIDE:
        if name != "lm_head" or not checkpoint.arch.tied:
            yield Component(-1, name)


def test_the_finest_components_own_every_parameter_once(checkpoint: Checkpoint) -> None:
    def leaves() -> Iterator[Component]:
        yield from _outside(checkpoint)
        for layer in range(checkpoint.arch.layers):
            for kind in LEAF_KINDS:
                for unit in range(checkpoint.arch.units(kind)):
                    yield Component(layer, kind, unit)

    for name, count in _counts(checkpoint, leaves()).items():
        assert (count == 1).all(), name


@pytest.mark.parametrize("kinds", [("layer",), ("attention", "mlp", "norms")])
def test_each_coarse_level_owns_every_parameter_once(checkpoint: Checkpoint, kinds: tuple[str, ...]) -> None:
    def coarse() -> Iterator[Component]:
        yield from _outside(checkpoint)
        for layer in range(checkpoint.arch.layers):
            for kind in kinds:
                yield Component(layer, kind)

    for name, count in _counts(checkpoint, coarse()).items():
        assert (count == 1).all(), name


def test_attention_is_heads_kv_and_rest_and_mlp_neurons_and_rest(checkpoint: Checkpoint) -> None:
    layout, shapes, arch = checkpoint.layout, checkpoint.shapes, checkpoint.arch
    for kind, parts in PARTS.items():
        sizes = [layout.unit_parameters(1, part, shapes) * arch.units(part) for part in parts]
        assert layout.unit_parameters(1, kind, shapes) == sum(sizes), kind
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    outside = sum(
        torch.Size(shapes[block.tensor]).numel() for c in _outside(checkpoint) for block, _ in layout.component_blocks(c)
    )
    assert total == outside + sum(layout.unit_parameters(layer, "layer", shapes) for layer in range(arch.layers))


def _inputs_of(model: Any, module: str, tokens: torch.Tensor) -> torch.Tensor:
    seen = []
    hook = model.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        model(tokens)
    hook.remove()
    return seen[0][0]


@pytest.mark.parametrize("kind", UNIT_KINDS)
def test_a_unit_changes_its_own_activations_and_no_others(untied: Checkpoint, kind: str) -> None:
    """Negated rows of a head, KV group or neuron change only what that unit feeds into the output projection.

    Negated, because OLMo 2 normalises over the queries of all heads: their norm must stay.
    """
    arch, family, layer = untied.arch, untied.arch.family, 0
    readers = f"{family.layers}.{layer}." + (family.down if kind == "neuron" else family.output)
    model = load_model(untied.folder)
    tokens = torch.arange(5, 17)[None]
    before = _inputs_of(model, readers, tokens)
    for unit in (0, arch.units(kind) - 1):
        changed = load_model(untied.folder)
        for block, _ in untied.layout.component_blocks(Component(layer, kind, unit)):
            if block.tensor.startswith(readers):
                continue
            part = block.indices(unit)
            parameter = changed.get_parameter(block.tensor).data
            parameter.narrow(block.dim, part.start, part.stop - part.start).mul_(-1)
        after = _inputs_of(changed, readers, tokens)
        width = 1 if kind == "neuron" else arch.head_dim * (1 if kind == "head" else arch.heads // arch.kv_groups)
        own = slice(unit * width, (unit + 1) * width)
        moved = (after - before).abs().amax(0)
        assert (moved[own] > 0).all()
        moved[own] = 0
        assert (moved == 0).all()


@given(
    layer=st.integers(0, 200),
    part=st.sampled_from(["layer", *LEAF_KINDS, "attention", "mlp"]),
    unit=st.integers(0, 100_000),
)
def test_names_round_trip(layer: int, part: str, unit: int) -> None:
    component = Component(layer, part, unit if part in UNIT_KINDS else 0)
    assert parse_component(str(component)) == component


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_outside_the_layers_round_trip(name: str) -> None:
    assert str(parse_component(name)) == name


CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 100,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("L3", "a layer below 3"),
        ("L0.head.4", "a head below 4"),
        ("L2.kv.2", "a kv below 2"),
        ("L0.neuron.48", "a neuron below 48"),
        ("lm_head", "untied"),
        ("L0.heads.1", "L7.attention"),
        ("L0.head", "L7.attention"),
        ("L0.norms.1", "L7.attention"),
        ("", "L7.attention"),
        ("L-1", "L7.attention"),
        ("l0", "L7.attention"),
        ("L0.head.1\n", "L7.attention"),
    ],
)
def test_names_that_are_none_or_not_there(name: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        parse_component(name, architecture(CONFIG, "config.json"))


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(PairError, match="llama, mistral, qwen2") as caught:
        architecture(CONFIG | {"model_type": "mamba"}, "config.json")
    assert "'mamba'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [None, 0, -1, "3", 2.5])
def test_a_size_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(PairError, match="num_hidden_layers"):
        architecture(CONFIG | {"num_hidden_layers": value}, "config.json")


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        Checkpoint(tmp_path)
