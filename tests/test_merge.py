"""Merging: both engines equal the plain formula bit for bit, and OUT is complete or absent, and verified."""

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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mechmerge.artifacts import write_text
from mechmerge.cli.merge import command
from mechmerge.errors import CheckpointError, InputError, MechmergeError, MissingError, PairError, SchemaError
from mechmerge.merge.engine import Engine, merge, restrict
from mechmerge.merge.executor import execute
from mechmerge.merge.export import export_lora
from mechmerge.merge.reference import coefficient_tensor, direct_tensor, merged_tensor
from mechmerge.merge.verify import verify
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.models.components import UNIT_KINDS
from mechmerge.models.load import load_model, load_tokenizer
from mechmerge.models.references import Model, resolve
from mechmerge.publish.outbox import model_files
from mechmerge.recipe.coefficients import coefficients
from mechmerge.recipe.compile import BASELINES, compile_recipe
from mechmerge.recipe.emit import emit_baseline, emit_masked
from mechmerge.recipe.schema import KEPT, Masks, Policy, Recipe, RecipeExpert, Rule, read_recipe, write_recipe
from mechmerge.recipe.sources import Sources
from tests.test_components import MODEL_TYPES
from tests.test_emit import run_stock
from tests.tiny import tiny_adapter, tiny_expert, tiny_model


def written(
    folder: Path, base: Model, experts: dict[str, Model], masks: Masks | None = None, default: float = 1.0, **settings: Any
) -> Path:
    """Writes a recipe and returns its path."""
    made = Recipe(
        base=base.id,
        experts={name: RecipeExpert(model=model.id, default=default) for name, model in experts.items()},
        policy=Policy(name="by hand"),
        **settings,
    )
    write_recipe(folder / "recipe.yaml", made, masks)
    return folder / "recipe.yaml"


def random_masks(base: Model, experts: dict[str, Model], seed: int = 0) -> Masks:
    arch, generator = base.checkpoint().arch, np.random.default_rng(seed)
    values = np.float32([0, 1, 0.3, -0.7])
    return {f"{e}.{k}": generator.choice(values, size=(arch.layers, arch.units(k))) for e in experts for k in UNIT_KINDS}


def check_formula(
    recipe_file: Path, out: Path, base: Model, experts: dict[str, Model], dtype: torch.dtype, engine: Engine = "direct"
) -> None:
    recipe, masks = read_recipe(recipe_file)
    merged, one = Checkpoint(out), base.checkpoint()
    found, opened = coefficients(recipe, masks, one.arch), {name: model.checkpoint() for name, model in experts.items()}
    assert merged.shapes == one.shapes
    for name, tensor in merged.tensors():
        direct = engine == "direct"
        expected = (
            direct_tensor(name, one, opened, found, dtype) if direct else merged_tensor(name, one, opened, found).to(dtype)
        )
        assert tensor.dtype == dtype
        assert torch.equal(tensor.view(torch.uint8), expected.view(torch.uint8)), name


# ------------------------------------------------------------------------------------------------------------ the formula
@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16", "float16"])
def test_the_executor_equals_the_formula_bit_for_bit(
    base: Model, expert: Model, second_expert: Model, tmp_path: Path, out_dtype: Any
) -> None:
    experts = {"one": expert, "two": second_expert}
    rules = (Rule(component="L1.norms", expert="one", coefficient=0.5), Rule(component="embed", expert="two", coefficient=0.1))
    file = written(tmp_path, base, experts, random_masks(base, experts), 0.9, out_dtype=out_dtype, rules=rules)
    merge(file, tmp_path / "out", engine="mergekit")
    check_formula(file, tmp_path / "out", base, experts, getattr(torch, out_dtype), "mergekit")


@pytest.mark.parametrize("family", MODEL_TYPES)
def test_every_family_merges_and_loads(family: str, tmp_path: Path) -> None:
    base = resolve(str(tiny_model(tmp_path / "base", family, layers=2, dtype="bfloat16")))
    experts = {f"e{i}": resolve(str(tiny_expert(base.path, tmp_path / f"e{i}", seed=i))) for i in range(3)}
    file = written(tmp_path, base, experts, random_masks(base, experts))
    merge(file, tmp_path / "out")
    check_formula(file, tmp_path / "out", base, experts, torch.bfloat16)
    tokens = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert load_model(tmp_path / "out")(tokens).logits.isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_coefficient_0_everywhere_is_the_base(tmp_path: Path, dtype: Any) -> None:
    base = resolve(str(tiny_model(tmp_path / "base", dtype=dtype, tied=False)))
    experts = {f"e{i}": resolve(str(tiny_expert(base.path, tmp_path / f"e{i}", seed=i))) for i in range(2)}
    merge(written(tmp_path, base, experts, default=0.0, out_dtype=dtype), tmp_path / "out", engine="mergekit")
    merged = Checkpoint(tmp_path / "out")
    for name, tensor in base.checkpoint().tensors():
        assert torch.equal(merged.tensor(name), tensor), name


def test_one_expert_at_1_everywhere_is_base_plus_its_delta(base: Model, expert: Model, tmp_path: Path) -> None:
    merge(written(tmp_path, base, {"e": expert}, out_dtype="float32"), tmp_path / "out", engine="mergekit")
    merged, one, other = Checkpoint(tmp_path / "out"), base.checkpoint(), expert.checkpoint()
    for name, tensor in merged.tensors():
        assert torch.equal(tensor, one.tensor(name) + (other.tensor(name) - one.tensor(name))), name
        assert torch.allclose(tensor, other.tensor(name), atol=1e-7)


@given(seed=st.integers(0, 2**31), default=st.sampled_from([0.0, 1.0, -0.5]))
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_recipes_equal_the_formula(
    base: Model, expert: Model, second_expert: Model, tmp_path: Path, seed: int, default: float
) -> None:
    folder = tmp_path / f"{seed}-{default}"
    shutil.rmtree(folder, ignore_errors=True)
    experts = {"one": expert, "two": second_expert}
    file = written(folder, base, experts, random_masks(base, experts, seed), default)
    merge(file, folder / "out")
    check_formula(file, folder / "out", base, experts, torch.bfloat16)


def test_the_reference_writes_a_units_slices(base: Model, expert: Model, tmp_path: Path) -> None:
    """The reference itself, against slices written by hand."""
    masks = {"e.neuron": np.zeros((3, 48), np.float32), "e.kv": np.zeros((3, 2), np.float32)}
    masks["e.neuron"][1, 5] = 0.5
    masks["e.kv"][2, 1] = 0.25
    recipe, read = read_recipe(written(tmp_path, base, {"e": expert}, masks, 0.0))
    one = base.checkpoint()
    found = coefficients(recipe, read, one.arch)

    def where(name: str) -> list[tuple[int, int, float]]:
        tensor = coefficient_tensor(name, one, found, "e")
        rows, columns = tensor.nonzero(as_tuple=True)
        return sorted(
            {(int(rows.min()), int(rows.max()), float(tensor.max()))} | {(int(columns.min()), int(columns.max()), -1.0)}
        )

    assert where("model.layers.1.mlp.up_proj.weight") == [(0, 31, -1.0), (5, 5, 0.5)]
    assert where("model.layers.1.mlp.gate_proj.weight") == [(0, 31, -1.0), (5, 5, 0.5)]
    assert where("model.layers.1.mlp.down_proj.weight") == [(0, 31, 0.5), (5, 5, -1.0)]
    for matrix in "kv":
        assert where(f"model.layers.2.self_attn.{matrix}_proj.weight") == [(0, 31, -1.0), (8, 15, 0.25)]


# --------------------------------------------------------------------------------------------------------- what is written
def test_the_folder_is_a_whole_model(base: Model, expert: Model, tmp_path: Path) -> None:
    file = written(tmp_path / "made", base, {"e": expert}, random_masks(base, {"e": expert}))
    out = tmp_path / "out"
    merge(file, out)
    expected = {"model.safetensors", "config.json", "mechmerge"}
    side = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert {path.name for path in out.iterdir()} == expected | side
    for name in side:
        assert (out / name).read_bytes() == (base.path / name).read_bytes()
    assert sorted(path.name for path in (out / "mechmerge").iterdir()) == ["masks.safetensors", "recipe.yaml"]
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"], "other loaders take all for weights"
    for name in ("recipe.yaml", "masks.safetensors"):
        assert (out / "mechmerge" / name).read_bytes() == (file.parent / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    theirs = json.loads((base.path / "config.json").read_text())
    assert config.pop("dtype") == "bfloat16"
    theirs.pop("dtype")
    assert config == theirs
    for path in (path for path in out.rglob("*") if path.is_file()):
        assert str(tmp_path).encode() not in path.read_bytes(), path
        assert str(base.path.parent).encode() not in path.read_bytes(), path
    assert load_tokenizer(out).chat_template == load_tokenizer(base.path).chat_template
    assert load_model(out).generation_config.max_new_tokens == 7
    assert not list(tmp_path.glob(".*partial*"))


def of_its_own(folder: Path) -> tuple[Path, Model]:
    """A base with weights that no other test has, whose folder may change, and an expert of it: where the weights of a model
    were last resolved, there they are looked for.
    """
    base = tiny_model(folder / "base", seed=7)
    return base, resolve(str(tiny_expert(base, folder / "expert", seed=8)))


ODD_SETTINGS: list[dict[str, Any]] = [
    {"return_dict_in_generate": True},
    {"stop_strings": ["<|im_end|>"]},
    {"num_return_sequences": 2, "do_sample": True},
    {"max_time": 0.0},
    {"num_beams": 4},
]


@pytest.mark.parametrize("settings", ODD_SETTINGS, ids=lambda settings: next(iter(settings)))
def test_generation_settings_of_the_base_do_not_stop_a_merge(tmp_path: Path, settings: dict[str, Any]) -> None:
    """They are kept, and the merge is tried without them."""
    folder, expert = of_its_own(tmp_path)
    told = json.loads((folder / "generation_config.json").read_text()) | settings
    (folder / "generation_config.json").write_text(json.dumps(told))
    merge(written(tmp_path, resolve(str(folder)), {"e": expert}, {}), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == told


def test_chat_templates_in_a_folder_of_their_own_are_kept(tmp_path: Path) -> None:
    folder, expert = of_its_own(tmp_path)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (folder / "tokenizer").mkdir()  # a folder is no side file, whatever its name
    (folder / "tokenizer" / "note.txt").write_text("not ours")
    file = written(tmp_path, resolve(str(folder)), {"e": expert}, {})
    merge(file, tmp_path / "out")
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ tools }}"
    assert not (tmp_path / "out" / "tokenizer").exists()
    assert set(load_tokenizer(tmp_path / "out").chat_template) == {"default", "tool_use"}
    (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").unlink()
    with pytest.raises(InputError, match="the base's additional_chat_templates/tool_use"):
        merge(file, tmp_path / "out")
    goes, _ = model_files(folder, ["model.safetensors"])
    assert "additional_chat_templates/tool_use.jinja" in goes
    assert "tokenizer/note.txt" not in goes


@pytest.mark.parametrize("policy", ["dare-ties", "della", "model-stock"])
def test_mergekits_methods_write_the_same_bytes_on_any_number_of_threads(tmp_path: Path, policy: str) -> None:
    """On tensors that are large enough to be shared among threads."""
    base = resolve(str(tiny_model(tmp_path / "base", layers=1, dtype="bfloat16", vocabulary=[f"<{i}>" for i in range(4000)])))
    experts = {f"e{i}": resolve(str(tiny_expert(base.path, tmp_path / f"e{i}", seed=i))) for i in (1, 2)}
    ids = {name: model.id for name, model in experts.items()}
    made = compile_recipe(policy, Sources(base.id, ids), out_dtype="float32")
    file = tmp_path / "recipe.yaml"
    write_recipe(file, made.recipe, made.masks)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            merge(file, tmp_path / str(threads))
            assert torch.get_num_threads() == threads
            found.append((tmp_path / str(threads) / "model.safetensors").read_bytes())
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_out_is_no_link_to_an_empty_place(base: Model, expert: Model, tmp_path: Path) -> None:
    file, link = written(tmp_path, base, {"e": expert}, {}), tmp_path / "link"
    (tmp_path / "real").mkdir()
    for target in ("real", "nowhere"):
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / target)
        with pytest.raises(InputError, match="expected a new folder; found a link"):
            merge(file, link)


def test_leftovers_beside_a_name_with_glob_signs_go(base: Model, expert: Model, tmp_path: Path) -> None:
    left = tmp_path / ".out[1].partial-999999"
    left.mkdir()
    merge(written(tmp_path, base, {"e": expert}, {}), tmp_path / "out[1]")
    assert not left.exists()


def test_one_model_under_two_names(base: Model, expert: Model, tmp_path: Path) -> None:
    """The direct writer sums it twice; mergekit takes each model once."""
    file = written(tmp_path, base, {"one": expert, "two": expert}, {}, 0.5)
    merge(file, tmp_path / "out")
    with pytest.raises(InputError, match="experts one and two: expected each model once"):
        merge(file, tmp_path / "other", engine="mergekit")


def test_advice_names_the_expert_and_not_its_model(base: Model, tmp_path: Path) -> None:
    """Models may have the same name, `checkpoint-500` say."""
    folder = tiny_expert(base.path, tmp_path / "checkpoint-500", seed=9)
    file = written(tmp_path, base, {"mine": resolve(str(folder))}, {})
    folder.rename(tmp_path / "moved")
    with pytest.raises(MissingError, match="pass --model mine=MODEL"):
        merge(file, tmp_path / "out")
    merge(file, tmp_path / "out", {"mine": tmp_path / "moved"})


def test_mergekits_shards_are_written_with_their_index(base: Model, expert: Model, tmp_path: Path) -> None:
    file = written(tmp_path, base, {"e": expert}, random_masks(base, {"e": expert}))
    out, one, other = tmp_path / "out", base.checkpoint(), expert.checkpoint()
    out.mkdir()
    text = emit_masked(read_recipe(file)[0], file, {"base": base.path, "e": expert.path})
    execute(text, one, [other], out, shard_bytes=30_000)
    shutil.copyfile(base.path / "config.json", out / "config.json")
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    check_formula(file, out, base, {"e": expert}, torch.bfloat16, "mergekit")
    load_model(out)


SCRIPT = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from mechmerge.merge.engine import merge
merge(Path(sys.argv[1]), Path(sys.argv[2]), engine=sys.argv[3])
"""


@pytest.mark.parametrize(("policy", "engine"), [("by hand", "direct"), ("by hand", "mergekit"), ("dare-ties", "mergekit")])
def test_the_same_recipe_gives_the_same_bytes(
    base: Model, expert: Model, second_expert: Model, tmp_path: Path, policy: str, engine: str
) -> None:
    """In other processes, whose hashes are seeded otherwise: mergekit orders its tasks by sets and maps."""
    experts = {"one": expert, "two": second_expert}
    file = tmp_path / "recipe.yaml"
    if policy == "dare-ties":
        sources = Sources(base.id, {name: model.id for name, model in experts.items()})
        write_recipe(file, compile_recipe(policy, sources, seed=3).recipe)
    else:
        written(tmp_path, base, experts, random_masks(base, experts))
    contents = []
    for seed in ("1", "2"):
        out = tmp_path / f"out{seed}"
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, file, out, engine],
            env=dict(os.environ) | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        assert done.stderr == "", "nothing of mergekit's reaches the terminal"
        contents.append({path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()})
    assert contents[0].keys() == contents[1].keys()
    assert [name for name in contents[0] if contents[0][name] != contents[1][name]] == []


# ---------------------------------------------------------------------------------------------------------------- baselines
@pytest.mark.parametrize("policy", BASELINES)
def test_baselines_are_mergekits_own(base: Model, expert: Model, second_expert: Model, tmp_path: Path, policy: str) -> None:
    experts = {"one": expert, "two": second_expert}
    sources = Sources(base.id, {name: model.id for name, model in experts.items()})
    made = write_recipe(tmp_path / "recipe.yaml", compile_recipe(policy, sources, seed=5, out_dtype="float32").recipe)
    merge(tmp_path / "recipe.yaml", tmp_path / "out")
    text = emit_baseline(made, {"base": base.path} | {name: model.path for name, model in experts.items()})
    run_stock(text, tmp_path / "stock", seed=made.policy.seed)
    ours, theirs = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "stock")
    one, deltas = base.checkpoint(), [model.checkpoint() for model in experts.values()]
    for name, tensor in ours.tensors():
        assert torch.equal(tensor, theirs.tensor(name)), name
        sums = torch.stack([expert.tensor(name) - one.tensor(name) for expert in deltas])
        match policy:
            case "task-arithmetic":
                assert torch.allclose(tensor, one.tensor(name) + sums.sum(0), atol=1e-6)
            case "linear":
                assert torch.allclose(tensor, one.tensor(name) + sums.mean(0), atol=1e-6)
            case "dare-ties" if tensor.dim() > 1:
                unmoved = (tensor == one.tensor(name)).float().mean()
                assert 0.15 < unmoved < 0.35, "about a quarter of the elements lose both deltas"
            case "breadcrumbs" if tensor.dim() > 1:
                assert 0.005 < (tensor == one.tensor(name)).float().mean() < 0.05, "a tenth of each delta is left out"
            case "model-stock":
                assert torch.allclose(tensor, _model_stock(one.tensor(name), deltas, name), atol=1e-5)
            case "sce":
                agree = sums.sign() == torch.where(sums.sum(0) >= 0, 1.0, -1.0)
                weight = sums.square().flatten(1).mean(1).reshape(-1, *[1] * (sums.dim() - 1)) * agree
                assert torch.allclose(tensor, one.tensor(name) + (sums * weight).sum(0) / weight.sum(0), atol=1e-5)
            case "ties" | "della" if tensor.dim() > 1:
                assert 0.05 < (tensor == one.tensor(name)).float().mean() < 0.5
    load_model(tmp_path / "out")


def _model_stock(start: torch.Tensor, experts: list[Checkpoint], name: str) -> torch.Tensor:
    """Two experts: t = 2 cos / (1 + cos) of the way from the base to their mean."""
    one, other = ((expert.tensor(name) - start).flatten() for expert in experts)
    cosine = torch.nn.functional.cosine_similarity(one, other, dim=0)
    return start + 2 * cosine / (1 + cosine) * ((one + other) / 2).reshape(start.shape)


def test_seeds_of_dare_differ(base: Model, expert: Model, tmp_path: Path) -> None:
    outs = []
    state = torch.random.get_rng_state()
    for seed in (1, 2):
        sources = Sources(base.id, {"e": expert.id})
        write_recipe(tmp_path / f"{seed}.yaml", compile_recipe("dare-ties", sources, seed=seed).recipe)
        merge(tmp_path / f"{seed}.yaml", tmp_path / str(seed))
        outs.append(Checkpoint(tmp_path / str(seed)).tensor("model.layers.0.mlp.up_proj.weight"))
    assert not torch.equal(*outs)
    assert torch.equal(torch.random.get_rng_state(), state), "the caller's generator is left alone"


# --------------------------------------------------------------------------------------------------------- again, and one alone
def test_a_second_call_does_nothing_and_another_recipe_is_refused(base: Model, expert: Model, tmp_path: Path) -> None:
    file = written(tmp_path, base, {"e": expert}, random_masks(base, {"e": expert}))
    merge(file, tmp_path / "out")
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    left = tmp_path / ".out.lock"  # by a process that was killed when all was done
    left.touch()
    merge(file, tmp_path / "out")
    assert not left.exists()
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times
    other = written(tmp_path / "other", base, {"e": expert}, default=0.5)
    with pytest.raises(InputError, match="something else"):
        merge(other, tmp_path / "out")
    with pytest.raises(InputError, match="something else"):
        merge(other, base.path)
    (tmp_path / "empty").mkdir()
    merge(file, tmp_path / "empty")
    assert (tmp_path / "empty" / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", [".", ".."])
def test_a_model_does_not_appear_as_the_folder_one_stands_in(
    name: str, base: Model, expert: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "recipe", base, {"e": expert})
    (tmp_path / "new" / "empty").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "new" / "empty")
    for make in (lambda: merge(file, Path(name)), lambda: export_lora(file, Path(name), 4)):
        with pytest.raises(InputError, match="a folder by its name"):
            make()
    assert [path.name for path in (tmp_path / "new").rglob("*")] == ["empty"]


def test_one_masked_expert_as_a_model(base: Model, expert: Model, second_expert: Model, tmp_path: Path) -> None:
    experts = {"one": expert, "two": second_expert}
    file = written(tmp_path, base, experts, random_masks(base, experts), 0.5)
    merge(file, tmp_path / "out", expert="two")
    recipe, masks = read_recipe(tmp_path / "out" / KEPT)
    assert list(recipe.experts) == ["two"]
    assert masks.keys() == {"two.head", "two.kv", "two.neuron"}
    check_formula(tmp_path / "out" / KEPT, tmp_path / "out", base, {"two": second_expert}, torch.bfloat16)
    merge(file, tmp_path / "out", expert="two")
    with pytest.raises(InputError, match="something else"):
        merge(file, tmp_path / "out", expert="one")
    with pytest.raises(InputError, match="one of one, two"):
        restrict(*read_recipe(file), "three")


def test_an_adapter_is_an_expert(base: Model, second_expert: Model, tmp_path: Path) -> None:
    adapted = resolve(f"{base.path}+{tiny_adapter(base.path, tmp_path / 'lora')}")
    experts = {"lora": adapted, "two": second_expert}
    file = written(tmp_path, base, experts, random_masks(base, experts))
    merge(file, tmp_path / "out")
    check_formula(file, tmp_path / "out", base, experts, torch.bfloat16)
    assert "base+lora" in (tmp_path / "out" / KEPT).read_text()


def test_paths_with_mergekits_own_signs(base: Model, expert: Model, tmp_path: Path) -> None:
    odd = {"base": tmp_path / "a+b@c" / "base", "e": tmp_path / "a+b@c" / "x@y+z@w"}
    shutil.copytree(base.path, odd["base"])
    shutil.copytree(expert.path, odd["e"])
    file = written(tmp_path / "a+b@c" / "made", base, {"e": expert}, random_masks(base, {"e": expert}))
    merge(file, tmp_path / "a+b@c" / "out", odd)
    check_formula(file, tmp_path / "a+b@c" / "out", base, {"e": expert}, torch.bfloat16)


def test_a_folder_replaced_between_two_merges_is_read_anew(
    base: Model, expert: Model, second_expert: Model, tmp_path: Path
) -> None:
    """mergekit caches its loaders by path for the life of the process."""
    for number, model in enumerate((expert, second_expert)):
        shutil.rmtree(tmp_path / "expert", ignore_errors=True)
        shutil.copytree(model.path, tmp_path / "expert")
        file = written(tmp_path / str(number), base, {"e": model})
        merge(file, tmp_path / f"out{number}", {"e": tmp_path / "expert"})
        check_formula(file, tmp_path / f"out{number}", base, {"e": model}, torch.bfloat16)


# -------------------------------------------------------------------------------------------------------- vocabulary, positions
def test_extra_rows_are_merged_by_token(tmp_path: Path) -> None:
    base = resolve(str(tiny_model(tmp_path / "base", vocabulary=["<mine>", "<both>"])))
    expert = resolve(str(tiny_model(tmp_path / "expert", vocabulary=["<both>", "<theirs>", "<more>"], seed=3)))
    refused = written(tmp_path / "refused", base, {"e": expert}, default=0.5)
    with pytest.raises(PairError, match="--vocabulary base"):
        merge(refused, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    merge(
        written(tmp_path / "made", base, {"e": expert}, default=0.5, vocabulary="base", out_dtype="float32"), tmp_path / "out"
    )
    merged = Checkpoint(tmp_path / "out").tensor("model.embed_tokens.weight")
    one, other = (model.checkpoint().tensor("model.embed_tokens.weight") for model in (base, expert))
    mine, theirs = (load_tokenizer(model.path).get_vocab() for model in (base, expert))
    assert merged.shape == one.shape
    assert torch.equal(merged[mine["<mine>"]], one[mine["<mine>"]])
    row = one[mine["<both>"]]
    assert torch.equal(merged[mine["<both>"]], row + 0.5 * (other[theirs["<both>"]] - row))


def test_other_positions_need_a_rule(base: Model, expert: Model, tmp_path: Path) -> None:
    folder = tmp_path / "long"
    shutil.copytree(expert.path, folder)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(PairError, match="--positions base"):
        merge(written(tmp_path / "a", base, {"e": expert}), tmp_path / "out", {"e": folder})
    merge(written(tmp_path / "b", base, {"e": expert}, positions="base"), tmp_path / "out", {"e": folder})
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 512


# ----------------------------------------------------------------------------------------------------------------- failing
def test_nothing_is_left_when_something_fails(
    base: Model, expert: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing_under(out: Path) -> None:
        assert not out.exists()
        assert not list(out.parent.glob(f".{out.name}*"))

    out = tmp_path / "made" / "out"
    file = written(tmp_path, base, {"e": expert}, random_masks(base, {"e": expert}))
    with monkeypatch.context() as patch:
        patch.setattr("mechmerge.merge.engine.verify", lambda *a, **k: (_ for _ in ()).throw(MechmergeError("no")))
        with pytest.raises(MechmergeError, match="no"):
            merge(file, out)
    nothing_under(out)
    other = resolve(str(tiny_model(tmp_path / "deep", layers=4)))
    with pytest.raises(PairError, match="3 layers; found 4"):
        merge(written(tmp_path / "a", base, {"e": other}), out)
    nothing_under(out)
    rules = (Rule(component="L3", expert="e", coefficient=1.0),)
    with pytest.raises(InputError, match="a layer below 3"):
        merge(written(tmp_path / "b", base, {"e": expert}, rules=rules), out)
    with pytest.raises(InputError, match=r"\[3, 4\]"):
        merge(written(tmp_path / "c", base, {"e": expert}, {"e.head": np.ones((3, 5), np.float32)}), out)
    nothing_under(out)
    with pytest.raises(MechmergeError, match=r"finite weights.*coefficient"):
        merge(written(tmp_path / "d", base, {"e": expert}, default=1e8, out_dtype="float16"), out)
    nothing_under(out)
    broken = tmp_path / "nan"
    shutil.copytree(expert.path, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        merge(written(tmp_path / "e", base, {"e": resolve(str(broken))}), out)
    nothing_under(out)
    write_text(tmp_path / "f" / "recipe.yaml", file.read_text() + "surprise: 1\n")
    with pytest.raises(SchemaError, match="unknown key"):
        merge(tmp_path / "f" / "recipe.yaml", out)
    nothing_under(out)


def test_models_that_are_not_there(base: Model, expert: Model, second_expert: Model, tmp_path: Path) -> None:
    file = written(tmp_path, base, {"e": expert})
    with pytest.raises(MissingError, match="other weights"):
        merge(file, tmp_path / "out", {"e": second_expert.path})
    with pytest.raises(InputError, match="model 'x'"):
        merge(file, tmp_path / "out", {"x": expert.path})


# ------------------------------------------------------------------------------------------------------------ verification
def test_verification_sees_what_is_wrong(base: Model, expert: Model, tmp_path: Path) -> None:
    rules = (Rule(component="L1", expert="e", coefficient=0.0), Rule(component="L2.head.1", expert="e", coefficient=1.0))
    file = written(tmp_path, base, {"e": expert}, default=0.5, rules=rules)
    merge(file, tmp_path / "good")
    recipe, masks = read_recipe(file)
    one, experts = base.checkpoint(), {"e": expert.checkpoint()}
    found = coefficients(recipe, masks, one.arch)
    layers = "model.layers."
    equal, changed = verify(tmp_path / "good", one, "bfloat16", experts, found, direct=True)
    assert (equal, changed) == (9, len(one.entries) - 9)

    def damaged(name: str, tensors: Any = None, files: Any = None) -> str:
        folder = tmp_path / name
        shutil.copytree(tmp_path / "good", folder)
        state = load_file(folder / "model.safetensors")
        if tensors:
            tensors(state)
            save_file(state, folder / "model.safetensors", {"format": "pt"})
        if files:
            files(folder)
        with pytest.raises(MechmergeError) as caught:
            verify(folder, one, "bfloat16", experts, found, direct=True)
        return str(caught.value)

    norm = "model.norm.weight"
    assert norm in damaged("missing", lambda t: t.pop(norm))
    assert "extra" in damaged("extra", lambda t: t.update({"model.x.weight": torch.ones(1)}))
    assert "bfloat16" in damaged("dtype", lambda t: t.update({norm: t[norm].float()}))
    assert "finite" in damaged("nan", lambda t: t[norm].fill_(float("nan")))
    assert "formula" in damaged("value", lambda t: t[norm][0].add_(1))
    assert "formula" in damaged("first layer", lambda t: t["model.layers.0.mlp.down_proj.weight"][0, 0].add_(1))
    rows = "model.embed_tokens.weight"
    assert "formula" in damaged("one value between", lambda t: t[rows][7, 3].add_(1))
    assert "formula" in damaged("left as it was", lambda t: t[rows].copy_(one.tensor(rows)))
    assert "the base's values" in damaged("untouched", lambda t: t[f"{layers}1.mlp.up_proj.weight"][3, 4].add_(1))
    assert "expert e's values" in damaged("copied", lambda t: t[f"{layers}2.self_attn.o_proj.weight"][5, 9].add_(1))
    assert "tokenizer.json" in damaged("tokenizer", files=lambda f: (f / "tokenizer.json").unlink())
    assert "chat_template" in damaged("template", files=lambda f: (f / "chat_template.jinja").write_text("other"))
    assert "generation_config" in damaged("generation", files=lambda f: (f / "generation_config.json").unlink())
    config = json.loads((tmp_path / "good" / "config.json").read_text())

    def other_context(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))

    assert "context = 512" in damaged("context", files=other_context)


def test_what_is_there_already_is_verified_too(
    base: Model, expert: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OUT may have been written without verification, by another engine, or have been damaged since."""
    file = written(tmp_path, base, {"e": expert}, random_masks(base, {"e": expert}))
    out = tmp_path / "out"
    merge(file, out, check=False)
    state = load_file(out / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] += 1
    save_file(state, out / "model.safetensors", {"format": "pt"})
    merge(file, out, check=False)
    with pytest.raises(InputError, match=r"the model of this very recipe; found .*up_proj.*; remove it, or name another"):
        merge(file, out)
    assert out.exists(), "it may be somebody's"
    with monkeypatch.context() as patch:
        fault = CheckpointError("a parent", expected="finite weights", found="NaN")
        patch.setattr("mechmerge.merge.engine.verify", lambda *a, **k: (_ for _ in ()).throw(fault))
        with pytest.raises(CheckpointError, match="a parent"):
            merge(file, out)  # the fault is the parent's, not OUT's
    whole = tmp_path / "whole"
    merge(written(whole, base, {"e": expert}), whole / "out", engine="mergekit")
    merge(whole / "recipe.yaml", whole / "out", engine="mergekit")
    merge(whole / "recipe.yaml", whole / "out")  # either engine's will do
    changed = load_file(whole / "out" / "model.safetensors")
    changed["model.layers.1.mlp.up_proj.weight"][3, 4] += 1
    save_file(changed, whole / "out" / "model.safetensors", {"format": "pt"})
    for engine in ("auto", "mergekit", "direct"):
        with pytest.raises(InputError, match="up_proj"):
            merge(whole / "recipe.yaml", whole / "out", engine=engine)


def test_a_tokenizer_with_tokens_without_a_row(base: Model, expert: Model, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(base.path, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(tokenizer["added_tokens"][0] | {"id": 5000, "content": "<far>"})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    other = tmp_path / "expert"
    shutil.copytree(expert.path, other)
    shutil.copyfile(folder / "tokenizer.json", other / "tokenizer.json")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: expected ids below the 320 rows; found 5000"):
        merge(written(tmp_path, base, {"e": expert}), tmp_path / "out", {"base": folder, "e": other})
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------- CLI
def test_the_command(base: Model, expert: Model, tmp_path: Path) -> None:
    file = written(tmp_path, base, {"e": expert})
    arguments = [str(file), str(tmp_path / "out"), "--model", f"e={expert.path}", "--format", "json", "--quiet"]
    done = CliRunner().invoke(command, arguments, standalone_mode=False)
    assert done.exception is None, done.exception
    assert json.loads(done.stdout)["merged"][0]["experts"] == "e"
    assert done.stderr == ""
    check_formula(file, tmp_path / "out", base, {"e": expert}, torch.bfloat16)
