"""Screening along a path: complete as the steps grow, the plain screen without any, and the base is as before."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mechmerge.localize.bench import Bench
from mechmerge.localize.measure import Anchor, screen
from mechmerge.localize.path import Source, along_path
from mechmerge.models.references import Model, resolve
from tests.tiny import tiny_expert, tiny_model

TEXTS = ["a small cat", "the dog runs"]
ANCHOR = 2


@pytest.fixture(scope="module")
def far(base: Model, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """An expert far from the base in its layers, with the base's embeddings, of which a screen tells nothing."""
    return _inside_only(base, resolve(str(tiny_expert(base.path, tmp_path_factory.mktemp("far") / "all", seed=3, scale=0.1))))


def _inside_only(base: Model, expert: Model) -> Model:
    folder = expert.path.parent / "inside"
    shutil.copytree(expert.path, folder)
    tensors = load_file(folder / "model.safetensors")
    outside = [name for name in tensors if not name.startswith("model.layers.")]
    assert outside
    save_file(
        tensors | {name: base.checkpoint().tensor(name) for name in outside}, folder / "model.safetensors", {"format": "pt"}
    )
    return resolve(str(folder))


def along(bench: Bench, base: Model, expert: Model, steps: int) -> dict[str, np.ndarray]:
    """[n, L, U] by kind."""
    v = torch.ones(bench.checkpoint.arch.hidden) / bench.checkpoint.arch.hidden**0.5
    batches, theirs = [bench.encode([text]) for text in TEXTS], expert.checkpoint().tensor

    def measure(origin: Source | None) -> dict[str, np.ndarray]:
        return screen(bench, batches, [Anchor(ANCHOR, v)] * len(batches), theirs, origin)

    return along_path(bench, base.checkpoint().tensor, theirs, steps, measure)


def true_change(bench: Bench, base: Model, expert: Model) -> np.ndarray:
    """s(expert) − s(base) of every prompt, [n]."""
    anchor = Anchor(ANCHOR, torch.ones(bench.checkpoint.arch.hidden) / bench.checkpoint.arch.hidden**0.5)
    states = []
    for source in (expert.checkpoint(), base.checkpoint()):
        bench.load(source)
        with torch.no_grad():
            states.append(np.array([float(anchor.state(bench.run(bench.encode([text]), ANCHOR))[0]) for text in TEXTS]))
    return states[0] - states[1]


def test_the_scores_add_up_to_the_change_of_state_as_steps_grow(base: Model, far: Model) -> None:
    """Leaf components alone: heads, KV groups, neurons, and what layers have beside them (norms; a Llama has no rest)."""
    bench = Bench(base)
    change = true_change(bench, base, far)
    errors = {}
    for steps in (0, 1, 4, 16):
        scores = along(bench, base, far, steps)
        parts = sum(scores[kind].sum((1, 2)) for kind in ("head", "kv", "neuron"))
        norms = (scores["layer"] - scores["attention"] - scores["mlp"]).sum((1, 2))
        assert np.allclose(parts + norms, scores["layer"].sum((1, 2)), atol=1e-6)
        errors[steps] = float(np.abs(parts + norms - change).max() / np.abs(change).max())
    assert errors[0] > 0.05, "an expert so near that the first order is all there is would prove nothing"
    assert errors[4] < errors[1] < errors[0]
    assert errors[16] < 1e-3


def test_no_steps_are_the_screen_at_the_base(base: Model, far: Model) -> None:
    bench = Bench(base)
    v = torch.ones(bench.checkpoint.arch.hidden) / bench.checkpoint.arch.hidden**0.5
    plain = screen(bench, [bench.encode([text]) for text in TEXTS], [Anchor(ANCHOR, v)] * len(TEXTS), far.checkpoint().tensor)
    none = along(bench, base, far, 0)
    assert all(np.array_equal(plain[kind], none[kind]) for kind in plain)


def test_a_step_is_the_screen_half_way(base: Model, far: Model, tmp_path: Path) -> None:
    """Its twin: the model half way as a model of its own, and the difference to the expert from there, twice."""
    half = tmp_path / "half"
    shutil.copytree(base.path, half)
    ends = [load_file(model.path / "model.safetensors") for model in (base, far)]
    save_file({name: (ends[0][name] + ends[1][name]) / 2 for name in ends[0]}, half / "model.safetensors", {"format": "pt"})
    middle = Bench(resolve(str(half)))
    v = torch.ones(middle.checkpoint.arch.hidden) / middle.checkpoint.arch.hidden**0.5
    twin = screen(middle, [middle.encode([text]) for text in TEXTS], [Anchor(ANCHOR, v)] * len(TEXTS), far.checkpoint().tensor)
    one = along(Bench(base), base, far, 1)
    for kind, values in one.items():
        assert np.allclose(values, 2 * twin[kind], atol=1e-5 * np.abs(values).max()), kind
        assert np.abs(values).max() > 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_base_is_put_back_bit_for_bit(base: Model, far: Model, dtype: str) -> None:
    bench = Bench(base, dtype)
    before = {name: parameter.detach().clone() for name, parameter in bench.parameters.items()}
    moved: list[bool] = []

    def stops(origin: Source | None) -> dict[str, np.ndarray]:
        moved.append(any(not torch.equal(before[name], bench.weight(name)) for name in before))
        if len(moved) == 5:
            raise KeyboardInterrupt
        return {"head": np.zeros(1)}

    for steps in (2, 3):  # the second is interrupted
        try:
            along_path(bench, base.checkpoint().tensor, far.checkpoint().tensor, steps, stops)
        except KeyboardInterrupt:
            assert steps == 3
        assert all(torch.equal(before[name], parameter) for name, parameter in bench.parameters.items())
    assert moved == [True] * 5


def test_integrated_scores_of_fused_layouts(tmp_path: Path) -> None:
    """Phi-3's query, key and value rows stand in one tensor."""
    base = resolve(str(tiny_model(tmp_path / "base", family="phi3", layers=2)))
    expert = _inside_only(base, resolve(str(tiny_expert(base.path, tmp_path / "expert", seed=1, scale=0.1))))
    bench = Bench(base)
    change = true_change(bench, base, expert)
    total = along(bench, base, expert, 16)["layer"].sum((1, 2))
    assert np.abs(total - change).max() < 2e-3 * np.abs(change).max()
