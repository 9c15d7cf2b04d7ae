"""Model references, adapters, checkpoints and pairs: what is right resolves, and what is wrong is said in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mechmerge.errors import CheckpointError, InputError, MechmergeError, MissingError, PairError
from mechmerge.models.adapters import copy_side_files
from mechmerge.models.cache import cache_folder
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.models.load import empty_model, load_model, load_tokenizer
from mechmerge.models.pair import align, check_pair, token_ids
from mechmerge.models.references import Model, find, resolve
from tests.tiny import tiny_adapter, tiny_expert, tiny_model


def copied(model: Model, folder: Path) -> Path:
    shutil.copytree(model.path, folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def one_line(error: pytest.ExceptionInfo[MechmergeError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------------- references
def test_a_folder_resolves_to_a_portable_identity(base: Model) -> None:
    assert base.id.name == "base"
    assert base.id.revision is None
    assert str(base.path.parent) not in base.id.model_dump_json()
    assert list(base.id.shards) == ["model.safetensors"]


def test_relative_paths_are_read_from_the_file_that_names_them(base: Model) -> None:
    assert resolve("base", relative_to=base.path.parent).path == base.path


def test_sharded_and_single_checkpoints_hold_the_same(base: Model, tmp_path: Path) -> None:
    sharded = Checkpoint(tiny_model(tmp_path / "sharded", shard_size="40KB"))
    assert len(sharded.digests()) > 2
    single = base.checkpoint()
    assert sharded.shapes == single.shapes
    for name, tensor in sharded.tensors():
        assert torch.equal(tensor, single.tensor(name))


@pytest.mark.parametrize("text", ["", "no/such/folder/anywhere", "demo:", "demo:other", "base+", "a b"])
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(InputError) as caught:
        resolve(text)
    one_line(caught)


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="found a file"):
        resolve(str(tmp_path / "file"))


def test_find_goes_by_digest(base: Model, expert: Model, tmp_path: Path) -> None:
    assert find(base.id) == base.path
    assert find(base.id, {"base": base.path}) == base.path
    with pytest.raises(MissingError, match="other weights"):
        find(base.id, {"base": expert.path})
    moved = resolve(str(tiny_model(tmp_path / "moved", seed=7)))
    shutil.rmtree(moved.path)
    with pytest.raises(MissingError, match="--model moved=MODEL"):
        find(moved.id)


# --------------------------------------------------------------------------------------------------------------- adapters
def delta(weights: dict[str, torch.Tensor], module: str, scale: float) -> torch.Tensor:
    a, b = (weights[f"base_model.model.{module}.lora_{x}.weight"].float() for x in "AB")
    return scale * (b @ a)


def test_an_adapter_is_merged_once_and_by_the_formula(base: Model, tmp_path: Path) -> None:
    adapter = tiny_adapter(base.path, tmp_path / "lora")
    model = resolve(f"{base.path}+{adapter}")
    assert model.id.name == "base+lora"
    weights, one, other = load_file(adapter / "adapter_model.safetensors"), base.checkpoint(), model.checkpoint()
    for name, tensor in one.tensors():
        module = name.removesuffix(".weight")
        changed = f"base_model.model.{module}.lora_A.weight" in weights
        expected = tensor + delta(weights, module, 2.0) if changed else tensor
        assert torch.allclose(other.tensor(name), expected, atol=1e-7), name
        assert torch.equal(other.tensor(name), tensor) != changed
    assert model.path.is_relative_to(cache_folder())
    before = (model.path / "model.safetensors").stat().st_mtime_ns
    assert resolve(f"{base.path}+{adapter}") == model
    assert (model.path / "model.safetensors").stat().st_mtime_ns == before
    assert load_tokenizer(model.path).chat_template == load_tokenizer(base.path).chat_template


def test_a_changed_adapter_is_another_model(base: Model, tmp_path: Path) -> None:
    adapter = tiny_adapter(base.path, tmp_path / "lora", seed=1)
    first = resolve(f"{base.path}+{adapter}")
    shutil.rmtree(adapter)
    second = resolve(f"{base.path}+{tiny_adapter(base.path, adapter, seed=2)}")
    assert first.path != second.path
    assert first.id.digest != second.id.digest


def test_an_adapter_in_bf16_is_rounded_once(tmp_path: Path) -> None:
    base = resolve(str(tiny_model(tmp_path / "half", dtype="bfloat16")))
    adapter = tiny_adapter(base.path, tmp_path / "lora")
    weights, merged = load_file(adapter / "adapter_model.safetensors"), resolve(f"{base.path}+{adapter}").checkpoint()
    module = "model.layers.1.mlp.down_proj"
    exact = base.checkpoint().tensor(f"{module}.weight").float() + delta(weights, module, 2.0)
    assert torch.equal(merged.tensor(f"{module}.weight"), exact.bfloat16())


def test_rslora_has_its_own_scale(base: Model, tmp_path: Path) -> None:
    adapter = tiny_adapter(base.path, tmp_path / "lora", use_rslora=True)
    merged, weights = resolve(f"{base.path}+{adapter}").checkpoint(), load_file(adapter / "adapter_model.safetensors")
    module = "model.layers.0.self_attn.q_proj"
    expected = base.checkpoint().tensor(f"{module}.weight") + delta(weights, module, 4 / 2**0.5)
    assert torch.allclose(merged.tensor(f"{module}.weight"), expected, atol=1e-6)


def test_dora_has_magnitudes_of_its_own(base: Model, tmp_path: Path) -> None:
    """W' = m · (W + ΔW) / ‖W + ΔW‖ by rows (Liu et al. 2024, https://arxiv.org/abs/2402.09353)."""
    adapter = tiny_adapter(base.path, tmp_path / "dora", use_dora=True)
    weights = load_file(adapter / "adapter_model.safetensors")
    magnitudes = [name for name in weights if "lora_magnitude_vector" in name]
    assert magnitudes
    for name in magnitudes:
        weights[name] = weights[name] * torch.linspace(0.8, 1.2, len(weights[name]))
    save_file(weights, adapter / "adapter_model.safetensors", {"format": "pt"})
    merged = resolve(f"{base.path}+{adapter}").checkpoint()
    module = "model.layers.0.self_attn.q_proj"
    moved = base.checkpoint().tensor(f"{module}.weight") + delta(weights, module, 2.0)
    (magnitude,) = (weights[name] for name in magnitudes if module in name)
    expected = magnitude[:, None] * moved / moved.norm(dim=1, keepdim=True)
    assert torch.allclose(merged.tensor(f"{module}.weight"), expected, atol=1e-6)


def test_an_adapter_of_another_model_is_refused(base: Model, tmp_path: Path) -> None:
    adapter = tiny_adapter(tiny_model(tmp_path / "deep", layers=4), tmp_path / "lora")
    with pytest.raises(PairError, match="lora") as caught:
        resolve(f"{base.path}+{adapter}")
    one_line(caught)
    assert not list((cache_folder() / "materialised").glob(".*partial*"))


def test_an_adapter_alone_is_no_model(base: Model, tmp_path: Path) -> None:
    adapter = tiny_adapter(base.path, tmp_path / "lora")
    with pytest.raises(CheckpointError, match="name it as BASE"):
        resolve(str(adapter))


@pytest.mark.parametrize("damage", ["pickle", "truncated", "not an adapter"])
def test_broken_adapters(base: Model, tmp_path: Path, damage: str) -> None:
    adapter = tiny_adapter(base.path, tmp_path / "lora")
    weights = adapter / "adapter_model.safetensors"
    match damage:
        case "pickle":
            weights.rename(adapter / "adapter_model.bin")
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-10])
        case "not an adapter":
            (adapter / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=damage.replace("not an adapter", "peft adapter")) as caught:
        resolve(f"{base.path}+{adapter}")
    one_line(caught)


# -------------------------------------------------------------------------------------------------------------- checkpoints
def test_damaged_checkpoints(base: Model, tmp_path: Path) -> None:
    def damaged(name: str, damage: Callable[[Path], object]) -> str:
        folder = copied(base, tmp_path / name)
        damage(folder)
        with pytest.raises(CheckpointError) as caught:
            resolve(str(folder))
        message = one_line(caught)
        assert str(folder) in message
        return message

    def weights(folder: Path) -> Path:
        return folder / "model.safetensors"

    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 10\n"
    assert "truncated" in damaged("cut", lambda f: weights(f).write_bytes(weights(f).read_bytes()[:-4]))
    assert "too long" in damaged("long", lambda f: weights(f).write_bytes(weights(f).read_bytes() + b"xx"))
    assert "git lfs pull" in damaged("pointer", lambda f: weights(f).write_text(pointer))
    assert "header" in damaged("noise", lambda f: weights(f).write_bytes(b"\x00" * 300))
    assert "header" in damaged("empty", lambda f: weights(f).write_bytes(b""))
    assert "pickles can run code" in damaged("pickle", lambda f: weights(f).rename(f / "pytorch_model.bin"))
    assert "neither" in damaged("none", lambda f: weights(f).unlink())
    assert "extra" in damaged("extra", lambda f: edit_tensors(f, lambda t: t.update({"model.odd.weight": torch.ones(2)})))
    missing = damaged("missing", lambda f: edit_tensors(f, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")))
    assert "model.layers.1.mlp.up_proj.weight" in missing
    assert "found I64" in damaged(
        "integers", lambda f: edit_tensors(f, lambda t: t.update({"model.norm.weight": torch.ones(32).long()}))
    )
    assert "valid JSON" in damaged("config", lambda f: (f / "config.json").write_text("{"))
    assert "JSON object" in damaged("list", lambda f: (f / "config.json").write_text("[]"))
    assert "quantised" in damaged("quantised", lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}))


def test_a_shape_that_the_config_does_not_say(base: Model, tmp_path: Path) -> None:
    for name, shape in {"model.layers.0.mlp.up_proj.weight": (40, 32), "model.embed_tokens.weight": (7, 32)}.items():
        folder = edit_tensors(copied(base, tmp_path / name), lambda t, n=name, s=shape: t.update({n: torch.ones(s)}))  # type: ignore[misc]
        with pytest.raises(CheckpointError, match=name) as caught:
            resolve(str(folder))
        one_line(caught)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(base: Model, expert: Model, tmp_path: Path, value: float) -> None:
    name = "model.layers.2.self_attn.o_proj.weight"
    folder = edit_tensors(copied(expert, tmp_path / "nan"), lambda t: t[name][3, 4].fill_(value))
    with pytest.raises(CheckpointError, match=f"{name}.*NaN or infinite"):
        check_pair(base.checkpoint(), Checkpoint(folder))


def test_broken_indices(tmp_path: Path) -> None:
    source = tiny_model(tmp_path / "sharded", shard_size="40KB")
    index = json.loads((source / "model.safetensors.index.json").read_text())
    shard = sorted(set(index["weight_map"].values()))[1]

    def broken(name: str, change: Callable[[Path], object]) -> str:
        folder = shutil.copytree(source, tmp_path / name)
        change(folder)
        with pytest.raises(CheckpointError) as caught:
            Checkpoint(folder)
        return one_line(caught)

    def write(folder: Path, weight_map: Any) -> None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    assert shard in broken("gone", lambda f: (f / shard).unlink())
    assert "weight_map" in broken("no map", lambda f: write(f, {}))
    assert "beside it" in broken("outside", lambda f: write(f, {"x": "../model-00001.safetensors"}))
    fewer = {name: file for name, file in index["weight_map"].items() if name != "model.norm.weight"}
    assert "model.norm.weight" in broken("unlisted", lambda f: write(f, fewer))
    assert "ghost" in broken("listed", lambda f: write(f, index["weight_map"] | {"ghost": shard}))


def test_a_stored_tied_head_must_be_the_embeddings(base: Model, tmp_path: Path) -> None:
    def add_head(tensors: dict[str, torch.Tensor], offset: float) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + offset

    equal = Checkpoint(edit_tensors(copied(base, tmp_path / "equal"), lambda t: add_head(t, 0.0)))
    assert equal.shapes == base.checkpoint().shapes
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        Checkpoint(edit_tensors(copied(base, tmp_path / "other"), lambda t: add_head(t, 1.0)))


def test_gpt2_names_without_their_prefix(tmp_path: Path) -> None:
    whole = Checkpoint(tiny_model(tmp_path / "whole", "gpt2"))
    bare = shutil.copytree(whole.folder, tmp_path / "bare")
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(bare / "model.safetensors").items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(tensors, bare / "model.safetensors", {"format": "pt"})
    found = Checkpoint(bare)
    found.check_complete()
    assert found.shapes == whole.shapes
    assert torch.equal(found.tensor("transformer.wte.weight"), whole.tensor("transformer.wte.weight"))


# --------------------------------------------------------------------------------------------------------------------- pairs
def test_a_pair_that_fits(base: Model, expert: Model) -> None:
    check_pair(base.checkpoint(), expert.checkpoint())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"family": "qwen2"}, "expected the architecture llama; found qwen2"),
        ({"family": "mistral"}, "expected the architecture llama; found mistral"),
        ({"layers": 2}, "expected 3 layers; found 2"),
        ({"tied": False}, "tied"),
        ({"vocabulary": ["<new>"]}, "--vocabulary base"),
        ({"extra_rows": 3}, "--vocabulary base"),
    ],
)
def test_pairs_that_do_not_fit(base: Model, tmp_path: Path, settings: dict[str, Any], expected: str) -> None:
    other = Checkpoint(tiny_model(tmp_path / "other", **settings))
    with pytest.raises(PairError) as caught:
        check_pair(base.checkpoint(), other)
    assert expected in one_line(caught)


def test_other_positions_are_refused_unless_the_base_rules(base: Model, expert: Model, tmp_path: Path) -> None:
    rope = edit_config(copied(expert, tmp_path / "rope"), rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    long = edit_config(copied(expert, tmp_path / "long"), max_position_embeddings=4096)
    scaled = {"rope_theta": 1e4, "rope_type": "yarn", "factor": 2.0}
    yarn = edit_config(copied(expert, tmp_path / "yarn"), rope_parameters=scaled)
    for folder, field in ((rope, "rope_theta"), (long, "context"), (yarn, "rope_scaling")):
        with pytest.raises(PairError, match=rf"{field}.*--positions base"):
            check_pair(base.checkpoint(), Checkpoint(folder))
        check_pair(base.checkpoint(), Checkpoint(folder), positions="base")


def test_the_same_rope_in_the_old_and_the_new_spelling(base: Model, expert: Model, tmp_path: Path) -> None:
    old = edit_config(copied(expert, tmp_path / "old"), rope_parameters=None, rope_theta=10000.0)
    check_pair(base.checkpoint(), Checkpoint(old))


def test_the_same_size_with_other_tokens_is_refused(base: Model, tmp_path: Path) -> None:
    one = Checkpoint(tiny_model(tmp_path / "one", vocabulary=["<a>"]))
    other = Checkpoint(tiny_model(tmp_path / "other", vocabulary=["<b>"]))
    with pytest.raises(PairError, match=r"<[ab]>"):
        check_pair(one, other)


def test_extra_rows_are_aligned_by_token(base: Model, tmp_path: Path) -> None:
    """The expert has a token of its own in the base's place of another, and more rows."""
    first = resolve(str(tiny_model(tmp_path / "base", vocabulary=["<mine>", "<both>"], tied=False)))
    second = resolve(str(tiny_model(tmp_path / "expert", vocabulary=["<both>", "<theirs>", "<more>"], tied=False, seed=5)))
    assert align(first, second, "same") == second
    aligned = align(first, second, "base")
    one, other, found = first.checkpoint(), second.checkpoint(), aligned.checkpoint()
    check_pair(one, found)
    mine, theirs = token_ids(first.path), token_ids(second.path)
    assert mine is not None
    assert theirs is not None
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(found.tensor(name)[mine["<both>"]], other.tensor(name)[theirs["<both>"]])
        assert torch.equal(found.tensor(name)[mine["<mine>"]], one.tensor(name)[mine["<mine>"]])
        assert torch.equal(found.tensor(name)[:300], other.tensor(name)[:300])
    assert torch.equal(found.tensor("model.norm.weight"), other.tensor("model.norm.weight"))
    assert load_tokenizer(aligned.path).get_vocab() == load_tokenizer(first.path).get_vocab()
    assert load_model(aligned.path).config.vocab_size == one.arch.vocabulary
    assert align(first, second, "base").path == aligned.path


def test_alignment_needs_both_tokenizers(base: Model, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other", vocabulary=["<x>"])
    (other / "tokenizer.json").unlink()
    with pytest.raises(PairError, match=r"tokenizer\.json"):
        align(base, resolve(str(other)), "base")


def test_side_files_are_those_of_the_source(base: Model, tmp_path: Path) -> None:
    copy_side_files(base.path, tmp_path)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}


def test_an_expert_differs_everywhere(base: Model, tmp_path: Path) -> None:
    one, other = base.checkpoint(), Checkpoint(tiny_expert(base.path, tmp_path / "e", seed=9))
    assert all(not torch.equal(one.tensor(name), tensor) for name, tensor in other.tensors())


@pytest.mark.parametrize("make", [load_model, empty_model])
def test_the_head_is_handed_contiguous_states(base: Model, make: Callable[[Path], Any]) -> None:
    """torch copies the head's weight for every row of a slice that is not contiguous."""
    model = make(base.path)
    seen: list[torch.Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    ids = torch.arange(3 * 8).reshape(3, 8)
    with torch.no_grad():
        kept = model(input_ids=ids, logits_to_keep=2).logits
        whole = model(input_ids=ids).logits
    assert seen[0].shape[:2] == (3, 2)
    assert all(states.is_contiguous() for states in seen)
    torch.testing.assert_close(kept, whole[:, -2:], equal_nan=True)
