"""The bench: resumed forward passes equal whole ones, patches are undone to the bit."""

from __future__ import annotations

import pytest
import torch

from mechmerge.errors import LocalizeError
from mechmerge.localize.bench import Bench
from mechmerge.localize.measure import Anchor
from mechmerge.models.components import Component, parse_component
from mechmerge.models.references import Model
from tests.twins import patch_state

TEXTS = ["a small cat", "the dog runs over a very long road"]


@pytest.fixture(scope="module")
def bench(base: Model) -> Bench:
    return Bench(base)


def anchor_of(bench: Bench, layer: int) -> Anchor:
    v = torch.randn(bench.checkpoint.arch.hidden, generator=torch.Generator().manual_seed(1))
    return Anchor(layer, v / v.norm())


def test_resuming_equals_running_the_whole_model(bench: Bench) -> None:
    batch = bench.encode(TEXTS)
    trace = bench.trace(batch, bench.checkpoint.arch.layers)
    with torch.no_grad():
        whole = bench.module(
            input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, output_hidden_states=True
        ).hidden_states
    # transformers' last hidden state is after the final norm, so it is left out here.
    for layer in range(bench.checkpoint.arch.layers):
        assert torch.equal(trace.residual[layer], whole[layer])
        assert torch.equal(bench.resume(trace, layer), trace.residual[-1])


def test_padding_does_not_change_a_prompts_state(bench: Bench) -> None:
    anchor = anchor_of(bench, 2)
    together = anchor.state(bench.trace(bench.encode(TEXTS), 2).residual[-1])
    alone = torch.cat([anchor.state(bench.trace(bench.encode([text]), 2).residual[-1]) for text in TEXTS])
    assert torch.allclose(together, alone, atol=1e-5)


def test_patching_and_restoring_is_bit_identical(bench: Bench, expert: Model) -> None:
    before = {name: parameter.detach().clone() for name, parameter in bench.parameters.items()}
    source = expert.checkpoint().tensor
    for name in ("L0.head.1", "L1.kv.0", "L1.neuron.3", "L0.attention", "L1.mlp", "L0"):
        blocks = bench.checkpoint.layout.component_blocks(parse_component(name, bench.checkpoint.arch))
        with bench.patched(blocks, source):
            assert any(not torch.equal(before[n], p) for n, p in bench.parameters.items()), name
        assert all(torch.equal(before[n], p) for n, p in bench.parameters.items()), name


def test_a_patch_is_undone_when_the_measurement_fails(bench: Bench, expert: Model) -> None:
    before = {name: parameter.detach().clone() for name, parameter in bench.parameters.items()}
    blocks = list(bench.checkpoint.layout.component_blocks(parse_component("L0")))
    with pytest.raises(RuntimeError, match="interrupted"), bench.patched(blocks, expert.checkpoint().tensor):
        raise RuntimeError("interrupted")
    assert all(torch.equal(before[n], p) for n, p in bench.parameters.items())


def test_patching_equals_swapping_weights_in_the_whole_model(bench: Bench, expert: Model) -> None:
    """The resumed patch against its plain twin: another model with the weights swapped, run from its start."""
    anchor, batch = anchor_of(bench, 2), bench.encode(TEXTS)
    trace = bench.trace(batch, 2)
    theirs = expert.checkpoint()
    for name in ("L0.head.1", "L1.kv.0", "L1.neuron.3", "L0.attention", "L1.mlp", "L1"):
        component = parse_component(name, bench.checkpoint.arch)
        resumed = patch_state(bench, trace, anchor, component, theirs.tensor)
        twin = {name: parameter.detach().clone() for name, parameter in bench.parameters.items()}
        for block, unit in bench.checkpoint.layout.component_blocks(component):
            for u in range(block.units) if unit is None else (unit,):
                where = [slice(None)] * twin[block.tensor].dim()
                if block.dim is not None:
                    where[block.dim] = block.indices(u)
                twin[block.tensor][tuple(where)] = theirs.tensor(block.tensor)[tuple(where)]
        saved = {n: p.detach().clone() for n, p in bench.parameters.items()}
        bench.load(twin.__getitem__)
        with torch.no_grad():
            swapped = anchor.state(bench.run(batch, 2)).double().numpy()
        bench.load(saved.__getitem__)
        assert abs(resumed - swapped).max() < 1e-5, name


def test_the_base_patched_with_itself_changes_nothing(bench: Bench) -> None:
    """Recovery 0 for every component of every kind, one by one."""
    anchor, arch = anchor_of(bench, 2), bench.checkpoint.arch
    trace = bench.trace(bench.encode(TEXTS), 2)
    start = anchor.state(trace.residual[-1]).double().numpy()
    own = {name: parameter.detach().clone() for name, parameter in bench.parameters.items()}
    for kind in ("layer", "attention", "mlp", "norms", "head", "kv", "neuron"):
        for layer in range(2):
            for unit in range(arch.units(kind)):
                state = patch_state(bench, trace, anchor, Component(layer, kind, unit), own.__getitem__)
                assert (state == start).all(), (kind, layer, unit)


def test_a_prompt_longer_than_the_context_is_refused(bench: Bench) -> None:
    with pytest.raises(LocalizeError, match="the model's context"):
        bench.encode(["cat " * (bench.module.config.max_position_embeddings + 1)])
