"""The gradient probe: per prompt and component, it equals a finite difference of the loss or state, on every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mechmerge.localize.bench import Bench
from mechmerge.localize.gradients import DeltaProbe
from mechmerge.localize.measure import Anchor, screen
from mechmerge.models.components import LEAF_KINDS, OUTSIDE, Component
from mechmerge.models.references import resolve
from tests.tiny import tiny_expert, tiny_model

FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2", "phi3", "gpt2", "gpt_neox"]
TEXTS = ["a small cat", "the dog runs"]


@pytest.mark.parametrize("family", FAMILIES)
def test_probe_equals_finite_differences(family: str, tmp_path: Path) -> None:
    """⟨∂f/∂θ_c, δ_c⟩ for every leaf component against a central difference in float64, to 1e-3 of the largest."""
    base = resolve(str(tiny_model(tmp_path / "base", family=family, layers=2)))
    expert = resolve(str(tiny_expert(base.path, tmp_path / "expert", seed=1, scale=0.05)))
    bench = Bench(base)
    bench.module.double()
    theirs = expert.checkpoint()
    origin = {name: parameter.detach().clone() for name, parameter in bench.parameters.items()}
    delta = {name: theirs.tensor(name).double() - origin[name] for name in origin}
    # Gemma 2's eager attention overflows on fully masked (padding) rows in float64, which nothing but this test uses.
    batch = bench.encode(TEXTS[:1] if family == "gemma2" else TEXTS)

    def outcome() -> torch.Tensor:
        logits = bench.module(
            input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
        ).logits
        return logits[:, -1].double().log_softmax(-1)[:, 3]

    with DeltaProbe(bench, lambda name: [delta[name]], 1, below=2) as probe:
        probe.turn(0)
        outcome().sum().backward()
        scores = probe.take(0)
    arch = bench.checkpoint.arch
    leaves = [(layer, kind) for layer in range(2) for kind in LEAF_KINDS] + [(-1, kind) for kind in OUTSIDE]
    checked = 0
    for layer, kind in leaves:
        if (kind == "lm_head" and arch.tied) or not bench.checkpoint.layout.blocks(layer, kind):
            continue
        for unit in range(min(3, arch.units(kind)) if layer >= 0 else 1):
            blocks = list(bench.checkpoint.layout.component_blocks(Component(layer, kind, unit)))
            ends = []
            for sign in (1, -1):
                with bench.patched(blocks, lambda name, sign=sign: origin[name] + sign * 1e-3 * delta[name]), torch.no_grad():
                    ends.append(outcome())
            difference = (ends[0] - ends[1]) / 2e-3
            got = scores[layer, kind][0, :, unit]
            tolerance = 1e-3 * max(float(s.abs().max()) for s in scores.values())
            assert torch.allclose(got.double(), difference, atol=tolerance), (layer, kind, unit, got, difference)
            checked += 1
    assert checked >= 2 * 3 + 2


def test_screening_adds_up_by_kind_and_is_zero_above_the_anchor(base, expert) -> None:  # type: ignore[no-untyped-def]
    bench = Bench(base)
    v = torch.ones(bench.checkpoint.arch.hidden) / bench.checkpoint.arch.hidden**0.5
    scores = screen(bench, [bench.encode(TEXTS[:1]), bench.encode(TEXTS[1:])], [Anchor(2, v)] * 2, expert.checkpoint().tensor)
    assert scores["head"].shape == (2, bench.checkpoint.arch.layers, bench.checkpoint.arch.heads)
    for values in scores.values():
        assert (values[:, 2:] == 0).all()
        assert (values[:, :2] != 0).any()
    # A Llama without output biases has no attention.rest.
    coarse = scores["attention"][..., 0] - scores["head"].sum(-1) - scores["kv"].sum(-1)
    assert abs(coarse).max() < 1e-9


def test_an_expert_equal_to_the_base_screens_to_zero(base) -> None:  # type: ignore[no-untyped-def]
    bench = Bench(base)
    v = torch.ones(bench.checkpoint.arch.hidden)
    scores = screen(bench, [bench.encode(TEXTS)], [Anchor(2, v)], base.checkpoint().tensor)
    assert all((values == 0).all() for values in scores.values())
