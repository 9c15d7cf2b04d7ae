"""A recipe as a LoRA adapter: exact where the rank allows, the stated error elsewhere, and peft and we read it alike."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mechmerge.artifacts import lock, read_document
from mechmerge.cli.main import cli
from mechmerge.errors import InputError, MechmergeError
from mechmerge.merge.engine import lock_of
from mechmerge.merge.export import Export, check_adapter, export_lora
from mechmerge.merge.lowrank import factorise
from mechmerge.merge.reference import merged_tensor
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.models.load import load_model, quiet
from mechmerge.models.references import Model, resolve
from mechmerge.recipe.coefficients import coefficients
from mechmerge.recipe.schema import KEPT, Masks, Rule, read_recipe
from tests.test_components import MODEL_TYPES
from tests.test_merge import random_masks, written
from tests.tiny import tiny_adapter, tiny_expert, tiny_model

FULL = 1000
"""A rank that no tiny matrix has."""


def direct_sum(recipe_file: Path, base: Model, experts: dict[str, Model]) -> dict[str, torch.Tensor]:
    """base + Σ c ⊙ δ in float32, by the plain formula."""
    recipe, masks = read_recipe(recipe_file)
    one = base.checkpoint()
    found, opened = coefficients(recipe, masks, one.arch), {name: model.checkpoint() for name, model in experts.items()}
    return {name: merged_tensor(name, one, opened, found) for name in one.entries}


def by_peft(base: Model, adapter: Path) -> tuple[Any, Any]:
    """The base with the adapter on it, and a second one with the adapter merged into it."""
    from peft import PeftModel

    with quiet():
        on, merged = (PeftModel.from_pretrained(load_model(base.path), adapter, torch_device="cpu") for _ in range(2))
        return on.eval(), merged.merge_and_unload().eval()


def check_equal(base: Model, adapter: Path, wanted: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    """peft's merge, our own BASE+ADAPTER and the direct sum are the same model, and so is the adapter left unmerged."""
    one = base.checkpoint()
    on, merged = by_peft(base, adapter)
    state, ours = merged.state_dict(), resolve(f"{base.path}+{adapter}").checkpoint()
    for name, tensor in wanted.items():
        assert torch.allclose(state[one.arch.family.loaded_name(name)], tensor, rtol=0, atol=tolerance), name
        assert torch.allclose(ours.tensor(name), tensor, rtol=0, atol=tolerance), name
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad():
        plain = load_model(base.path)
        plain.load_state_dict({one.arch.family.loaded_name(n): t for n, t in wanted.items()}, strict=False)
        expected = plain(tokens).logits
        assert torch.allclose(on(tokens).logits, expected, rtol=0, atol=1e-4)
        assert torch.allclose(merged(tokens).logits, expected, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ thin factors
@given(
    st.integers(0, 2**31),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 14),
    st.sampled_from([None, "rows", "columns"]),
)
@settings(max_examples=60, deadline=None)
def test_factors_are_the_nearest_of_their_rank(seed: int, o: int, i: int, rank: int, zeroed: str | None) -> None:
    generator = np.random.default_rng(seed)
    matrix = generator.standard_normal((o, i)).astype(np.float32)
    if zeroed == "rows":
        matrix[generator.permutation(o)[: o // 2]] = 0
    if zeroed == "columns":
        matrix[:, generator.permutation(i)[: i // 2]] = 0
    factors = factorise(torch.from_numpy(matrix), rank)
    product = factors.b.numpy() @ factors.a.numpy()
    assert factors.rank <= rank
    singular = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    missed = np.linalg.norm(matrix.astype(np.float64) - product)
    assert missed == pytest.approx(np.sqrt((singular[rank:] ** 2).sum()), rel=1e-4, abs=1e-5)
    assert factors.residual == pytest.approx(missed, rel=1e-3, abs=1e-5)
    if min((matrix != 0).any(0).sum(), (matrix != 0).any(1).sum()) <= rank:
        assert np.array_equal(product, matrix), "few rows or columns are exact, bit for bit"
        assert factors.residual == 0


def test_a_matrix_of_low_rank_takes_no_more_than_its_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(40, 3, generator=generator, dtype=torch.float64) @ torch.randn(3, 30, generator=generator).double()
    factors = factorise(matrix.float(), 10)
    assert (factors.rank, factors.how) == (3, "svd")
    assert factors.residual <= 1e-6 * float(matrix.norm())


# ------------------------------------------------------------------------------------------------------------ exact exports
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_every_family_is_the_direct_sum(family: str, tied: bool, tmp_path: Path) -> None:
    """Everything changes: linear layers at full rank, and norms, biases and embeddings whole."""
    base = resolve(str(tiny_model(tmp_path / "base", family, layers=2, tied=tied)))
    experts = {f"e{i}": resolve(str(tiny_expert(base.path, tmp_path / f"e{i}", seed=i))) for i in range(2)}
    file = written(tmp_path, base, experts, random_masks(base, experts), 0.8)
    export = export_lora(file, tmp_path / "adapter", FULL)
    assert {tensor.name for tensor in export.tensors} == set(base.checkpoint().entries)
    assert export.error < 1e-6
    check_equal(base, tmp_path / "adapter", direct_sum(file, base, experts))


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gpt_neox", "qwen2"])
def test_few_neurons_and_heads_are_exact_at_their_own_rank(family: str, tmp_path: Path) -> None:
    """Three neurons and one head of a full-rank delta: rank 8 (a head's width) carries them bit for bit, fused or not."""
    base = resolve(str(tiny_model(tmp_path / "base", family, layers=2)))
    expert = resolve(str(tiny_expert(base.path, tmp_path / "e")))
    arch = base.checkpoint().arch
    masks: Masks = {f"e.{kind}": np.zeros((2, arch.units(kind)), np.float32) for kind in ("head", "neuron")}
    masks["e.neuron"][1, [2, 7, 30]] = (1, 0.5, -2)
    masks["e.head"][0, 3] = 1
    file = written(tmp_path, base, {"e": expert}, masks, 0.0)
    export = export_lora(file, tmp_path / "adapter", 8)
    linear = [tensor for tensor in export.tensors if tensor.how != "whole"]
    assert {tensor.how for tensor in linear} == {"rows", "columns"}
    assert export.error == 0
    assert {tensor.rank for tensor in linear} <= {3, 6, 8}, "each module takes the rank that it needs"
    whole = {name.rpartition(".")[2] for name in export.whole}
    assert whole <= {"bias"}, "biases go with their rows; nothing else is carried whole"
    wanted = direct_sum(file, base, {"e": expert})
    assert {t.name for t in export.tensors} == {n for n, t in wanted.items() if not torch.equal(t, base.checkpoint().tensor(n))}
    check_equal(base, tmp_path / "adapter", wanted, tolerance=1e-7)


def test_adapters_go_in_and_come_out(base: Model, tmp_path: Path) -> None:
    """The masked sum of two rank-2 adapters has rank 4 at most, and no embeddings or norms."""
    experts = {f"e{i}": resolve(f"{base.path}+{tiny_adapter(base.path, tmp_path / f'lora{i}', seed=i)}") for i in range(2)}
    file = written(tmp_path, base, experts, random_masks(base, experts))
    export = export_lora(file, tmp_path / "adapter", 4)
    assert export.whole == ()
    assert export.error < 1e-4, "the materialised experts are rounded to float32"
    check_equal(base, tmp_path / "adapter", direct_sum(file, base, experts), tolerance=1e-5)
    assert export_lora(file, tmp_path / "less", 3).error > 1e-2
    assert export_lora(file, tmp_path / "adapter", 4) == export
    shutil.rmtree(tmp_path / "adapter" / "mechmerge")
    with pytest.raises(InputError, match="something else"):
        export_lora(file, tmp_path / "adapter", 4)


def test_one_expert_alone(base: Model, expert: Model, second_expert: Model, tmp_path: Path) -> None:
    experts = {"one": expert, "two": second_expert}
    file = written(tmp_path, base, experts, random_masks(base, experts), 0.0)
    export = export_lora(file, tmp_path / "adapter", FULL, expert="two")
    assert list(export.experts) == ["two"]
    alone = direct_sum(tmp_path / "adapter" / KEPT, base, {"two": second_expert})
    check_equal(base, tmp_path / "adapter", alone)


# ----------------------------------------------------------------------------------------------------------- stated errors
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_stated_error_is_numpys(family: str, tmp_path: Path) -> None:
    base = resolve(str(tiny_model(tmp_path / "base", family, layers=2)))
    experts = {f"e{i}": resolve(str(tiny_expert(base.path, tmp_path / f"e{i}", seed=i))) for i in range(2)}
    file = written(tmp_path, base, experts, random_masks(base, experts))
    export = export_lora(file, tmp_path / "adapter", 5)
    wanted, one = direct_sum(file, base, experts), base.checkpoint()
    missed = total = 0.0
    for tensor in export.tensors:
        delta = (wanted[tensor.name] - one.tensor(tensor.name)).double().numpy()
        total += (delta**2).sum()
        if tensor.how == "whole":
            assert tensor.error == 0
            continue
        singular = np.linalg.svd(delta, compute_uv=False)
        missed += (singular[5:] ** 2).sum()
        assert tensor.error == pytest.approx(np.sqrt((singular[5:] ** 2).sum() / (singular**2).sum()), rel=1e-4), tensor.name
        assert tensor.error > 0.1
        assert tensor.norm == pytest.approx(np.linalg.norm(delta), rel=1e-5)
    assert export.error == pytest.approx(np.sqrt(missed / total), rel=1e-4)
    _, merged = by_peft(base, tmp_path / "adapter")
    state = merged.state_dict()
    for tensor in export.tensors:
        delta = (wanted[tensor.name] - one.tensor(tensor.name)).double()
        left = wanted[tensor.name].double() - state[one.arch.family.loaded_name(tensor.name)].double()
        assert float(left.norm() / delta.norm()) == pytest.approx(tensor.error, rel=1e-3, abs=1e-5), tensor.name


# ------------------------------------------------------------------------------------------------------------------ files
def test_what_is_written(base: Model, expert: Model, tmp_path: Path) -> None:
    file = written(tmp_path, base, {"e": expert}, random_masks(base, {"e": expert}))
    export = export_lora(file, tmp_path / "adapter", 6)
    assert read_document(Export, tmp_path / "adapter" / "export.json") == export
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "export.json", "mechmerge"
    ]  # fmt: skip
    assert (tmp_path / "adapter" / KEPT).read_bytes() == file.read_bytes()
    for path in (tmp_path / "adapter").glob("*.json"):
        assert str(tmp_path) not in path.read_text(), "no local path is published"
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "adapter").iterdir()}
    assert export_lora(file, tmp_path / "adapter", 6) == export
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "adapter").iterdir()} == before
    with pytest.raises(InputError, match="this very recipe"):
        export_lora(file, tmp_path / "adapter", 7)


def test_the_same_bytes_in_another_process(base: Model, expert: Model, tmp_path: Path) -> None:
    """peft keeps module names in sets, whose order hangs on the process."""
    file = written(tmp_path, base, {"e": expert}, random_masks(base, {"e": expert}))
    code = (
        "import sys, torch; from pathlib import Path; from mechmerge.merge.export import export_lora\n"
        "torch.set_num_threads(1); export_lora(Path(sys.argv[1]), Path(sys.argv[2]), 6)"
    )
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(file), str(tmp_path / seed)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=False,
        )
        assert done.returncode == 0
    made = [path.relative_to(tmp_path / "1") for path in (tmp_path / "1").rglob("*") if path.is_file()]
    assert len(made) > 3
    for path in made:
        assert (tmp_path / "1" / path).read_bytes() == (tmp_path / "2" / path).read_bytes(), path


def test_what_cannot_be_an_adapter(base: Model, expert: Model, tmp_path: Path) -> None:
    def nothing_written() -> None:
        assert not list(tmp_path.glob("*out*"))

    still = written(tmp_path / "still", base, {"e": expert}, default=0.0)
    with pytest.raises(InputError, match="at least one linear layer; found none"):
        export_lora(still, tmp_path / "out", 4)
    nothing_written()
    norms = written(
        tmp_path / "n", base, {"e": expert}, default=0.0, rules=(Rule(component="L*.norms", expert="e", coefficient=1),)
    )
    with pytest.raises(InputError, match="at least one linear layer"):
        export_lora(norms, tmp_path / "out", 4)
    nothing_written()
    from mechmerge.recipe.schema import MergekitMethod

    ties = written(tmp_path / "t", base, {"e": expert}, mergekit=MergekitMethod(method="ties"))
    with pytest.raises(InputError, match="found the baseline"):
        export_lora(ties, tmp_path / "out", 4)
    with pytest.raises(InputError, match="expert 'x'"):
        export_lora(still, tmp_path / "out", 4, expert="x")
    nothing_written()


def test_the_check_sees_what_is_wrong(base: Model, expert: Model, tmp_path: Path) -> None:
    file = written(tmp_path, base, {"e": expert})
    export_lora(file, tmp_path / "adapter", 3)
    check_adapter(tmp_path / "adapter", base.checkpoint())
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"

    def damaged(change: Any) -> str:
        changed = dict(tensors)
        change(changed)
        save_file(changed, weights, {"format": "pt"})
        with pytest.raises(MechmergeError) as caught:
            check_adapter(tmp_path / "adapter", base.checkpoint())
        return str(caught.value)

    assert name in damaged(lambda t: t.pop(name))
    assert "surprise" in damaged(lambda t: t.update({"base_model.model.surprise": torch.ones(1)}))
    assert name in damaged(lambda t: t.update({name: t[name][:2].clone()}))
    assert "model.norm" in damaged(lambda t: t.pop("base_model.model.model.norm.weight"))


# ---------------------------------------------------------------------------------------------------------------------- CLI
def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli, ["export", *map(str, arguments), "--quiet"])


def test_the_command(base: Model, expert: Model, tmp_path: Path) -> None:
    file = written(tmp_path / "made", base, {"e": expert}, random_masks(base, {"e": expert}))
    done = run(file, "--as", "lora", "--rank", 4, "--format", "json")
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert read_document(Export, tmp_path / "made" / "lora-4" / "export.json").model_dump(mode="json") == told
    table = run(file, "--as", "lora", "--rank", 4).stdout
    for tensor in told["tensors"]:
        assert tensor["name"] in table
        assert tensor["how"] == "whole" or f"{tensor['error']:.3g}" in table
    assert "carried whole" in table
    assert run(file, "--as", "lora").exit_code == 2
    assert run(file, "--as", "expert").exit_code == 2
    assert run(file, "--as", "expert", "--expert", "e", "--rank", 3).exit_code == 2


def test_an_expert_as_a_checkpoint(base: Model, expert: Model, second_expert: Model, tmp_path: Path) -> None:
    experts = {"one": expert, "two": second_expert}
    file = written(tmp_path / "made", base, experts, random_masks(base, experts), out_dtype="float32")
    done = run(file, "--as", "expert", "--expert", "one", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    merged = Checkpoint(tmp_path / "out")
    for name, tensor in direct_sum(tmp_path / "out" / KEPT, base, {"one": expert}).items():
        assert torch.equal(merged.tensor(name), tensor), name


# ------------------------------------------------------------------------------------------------------- beside other calls
def test_weights_that_change_meanwhile_are_noticed(
    base: Model, expert: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mechmerge.merge import export as module

    folder = tmp_path / "expert"
    shutil.copytree(expert.path, folder)
    file = written(tmp_path, base, {"e": resolve(str(folder))})

    def changing(*given: Any) -> Any:
        found = putting(*given)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes())
        return found

    putting = module._put_together
    monkeypatch.setattr(module, "_put_together", changing)
    with pytest.raises(MechmergeError, match=r"model\.safetensors"):
        export_lora(file, tmp_path / "adapter", 4)
    assert not list(tmp_path.glob("*adapter*"))


def test_two_exports_do_not_work_on_one_folder(base: Model, expert: Model, tmp_path: Path) -> None:
    file, out = written(tmp_path, base, {"e": expert}), tmp_path / "adapter"
    with lock(lock_of(out), "another export"), pytest.raises(InputError, match="no other process"):
        export_lora(file, out, 4)
    assert not out.exists()
    export_lora(file, out, 4)
    assert [path.name for path in tmp_path.glob("*adapter*")] == ["adapter"]
