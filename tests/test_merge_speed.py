"""The benchmark of merging speed measures what it says: recipes of 10 %, real merges, memory of its own process."""

from __future__ import annotations

import pytest
import torch

from benchmarks.merge_job import run
from benchmarks.merge_speed import Trio
from benchmarks.synthetic import Shape
from mechmerge.merge.reference import direct_tensor
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.recipe.coefficients import coefficients
from mechmerge.recipe.schema import read_recipe

SHAPE = Shape(32, 6, 4, 2, 480, 64)


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    return Trio(SHAPE, tmp_path_factory.mktemp("speed") / "trio")


def test_recipes_take_a_tenth(trio: Trio) -> None:
    attention, neuron = 6 * 32 * 2 * 8 * (4 + 2), 3 * 32
    for name, layers in (("spread", 6), ("gathered", 2)):
        _, masks = read_recipe(trio.folder / f"{name}.yaml")
        assert set(masks) == {"one.neuron", "two.neuron"}
        for mask in masks.values():
            taken = (mask != 0).sum() * neuron / (attention + 6 * 480 * neuron)
            assert 0.095 < taken <= 0.1
            assert (mask.any(1)).sum() == layers
    recipe, masks = read_recipe(trio.folder / "dense.yaml")
    assert not masks
    assert [expert.default for expert in recipe.experts.values()] == [0.5, 0.5]


def test_a_job_is_a_real_merge_in_another_process(trio: Trio) -> None:
    seconds, peak = run(trio.job("direct", "spread", cold=True), sample=True)
    assert 0 < seconds < 60
    assert peak > 50e6, "torch alone takes more"
    merged, base = Checkpoint(trio.folder / "out"), Checkpoint(trio.folder / "base")
    experts = {name: Checkpoint(trio.folder / name) for name in ("one", "two")}
    found = coefficients(*read_recipe(trio.folder / "spread.yaml"), base.arch)
    changed = 0
    for name, tensor in merged.tensors():
        assert torch.equal(tensor, direct_tensor(name, base, experts, found, torch.bfloat16)), name
        changed += not torch.equal(tensor, base.tensor(name))
    assert changed == 6 * 3


def test_a_copy_is_a_copy(trio: Trio) -> None:
    assert trio.timed("cp") > 0
    for file in (trio.folder / "base").iterdir():
        assert (trio.folder / "out" / file.name).read_bytes() == file.read_bytes()


def test_a_failing_job_is_an_error(trio: Trio) -> None:
    with pytest.raises(RuntimeError, match=r"nowhere\.yaml"):
        run(trio.job("direct", "nowhere"))
