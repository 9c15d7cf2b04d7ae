"""Model references, adapters, checkpoints and pairs: what is right resolves, and what is wrong is said in one line."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mechmerge.errors import CheckpointError, InputError, MechmergeError, MissingError, PairError
from mechmerge.models.adapters import copy_side_files
from mechmerge.models.cache import cache_folder
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.models.deltas import delta_of
from mechmerge.models.families import FAMILIES
from mechmerge.models.load import empty_model, load_model, load_tokenizer, quiet
from mechmerge.models.pair import align, check_pair, token_ids
from mechmerge.models.positions import POSITIONS, positions_of
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


def _edited(adapter: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    save_file(edit(load_file(adapter / "adapter_model.safetensors")), adapter / "adapter_model.safetensors", {"format": "pt"})
    return adapter


TIED = {
    "low rank on the head": {"target_modules": ["q_proj", "lm_head"]},
    "low rank on the embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "another head": {"modules_to_save": ["lm_head"]},
    "other embeddings": {"modules_to_save": ["embed_tokens"]},
    "both, unlike": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("kind", TIED)
def test_an_adapter_that_unties_a_tied_base_is_refused(base: Model, tmp_path: Path, kind: str) -> None:
    """There is one matrix in its checkpoint: written as such, it would be another model than the one that peft runs."""

    def edit(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        first = next(name for name in weights if "embed_tokens" in name or "lm_head" in name)
        return weights | {first: weights[first] + 1}

    assert base.checkpoint().arch.tied
    adapter = _edited(tiny_adapter(base.path, tmp_path / "lora", **TIED[kind]), edit)
    with pytest.raises(PairError, match="head") as caught:
        resolve(f"{base.path}+{adapter}")
    one_line(caught)
    assert not list((cache_folder() / "materialised").glob(".*partial*"))
    open_base = tiny_model(tmp_path / "untied", tied=False)
    adapter = _edited(tiny_adapter(open_base, tmp_path / "open", **TIED[kind]), edit)
    check_as_peft_runs_it(open_base, adapter)


def test_equal_embeddings_and_head_of_a_tied_base_are_taken(base: Model, tmp_path: Path) -> None:
    adapter = tiny_adapter(base.path, tmp_path / "lora", modules_to_save=["embed_tokens", "lm_head"])
    whole = ("embed_tokens.weight", "lm_head.weight")
    _edited(adapter, lambda weights: {name: w * 1.5 if name.endswith(whole) else w for name, w in weights.items()})
    check_as_peft_runs_it(base.path, adapter)


def check_as_peft_runs_it(base: Path, adapter: Path) -> None:
    """BASE+ADAPTER answers as the base does with peft's adapter on it."""
    from peft import PeftModel

    prompt = torch.arange(3, 12)[None]
    with quiet(), torch.no_grad():
        on = PeftModel.from_pretrained(load_model(base), adapter, torch_device="cpu").eval()
        merged = load_model(resolve(f"{base}+{adapter}").path)
        torch.testing.assert_close(merged(prompt).logits, on(prompt).logits, atol=2e-5, rtol=2e-5)
        assert not torch.allclose(merged(prompt).logits, load_model(base)(prompt).logits, atol=1e-3)


@pytest.mark.parametrize("kind", ["lora", "ia3", "lokr"])
def test_adapters_are_applied_whole_or_not_at_all(base: Model, tmp_path: Path, kind: str) -> None:
    from peft import IA3Config, LoKrConfig, get_peft_model

    adapter = tmp_path / kind
    if kind == "lora":
        tiny_adapter(base.path, adapter)
    else:
        ia3 = IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
        config = ia3 if kind == "ia3" else LoKrConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
        with quiet():
            model = get_peft_model(load_model(base.path), config)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.2
            model.save_pretrained(adapter)
    check_as_peft_runs_it(base.path, adapter)
    whole = load_file(adapter / "adapter_model.safetensors")
    odd = {
        "no such tensor": {n: w for n, w in whole.items() if "layers.1." not in n},
        "other modules": {n.replace("layers.", "h."): w for n, w in whole.items()},
        r"other modules \(base_model.model.model.extra.weight": whole | {"base_model.model.model.extra.weight": torch.ones(3)},
    }
    for said, weights in odd.items():
        _edited(adapter, lambda _, weights=weights: weights)
        with pytest.raises(PairError, match=said) as caught:
            resolve(f"{base.path}+{adapter}")
        one_line(caught)


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


LINEAR = {"type": "linear", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"type": "yarn", "factor": 4.0}
FACTORS = [1.0 + i for i in range(3)]
LONG = {"short_factor": FACTORS, "long_factor": [2 * factor for factor in FACTORS]}
GEMMA3 = {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000, "rope_scaling": None, "sliding_window_pattern": 6}
QWEN = {"sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 2}
OLD_SPELLINGS: list[tuple[str, dict[str, Any]]] = [
    *((model_type, {}) for model_type in POSITIONS),
    ("llama", {"rope_theta": 500_000, "rope_scaling": None}),
    ("llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 1024}}),
    ("llama", {"rope_scaling": LLAMA3, "original_max_position_embeddings": 1024}),
    ("llama", {"rope_scaling": LINEAR}),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 4096}),
    ("llama", {"rope_scaling": YARN | {"beta_fast": 32, "beta_slow": 1}}),
    ("mistral", {"rope_theta": 1e6, "sliding_window": None}),
    ("mistral", {"sliding_window": 4096, "max_position_embeddings": 32768}),
    *(
        (model_type, settings)
        for model_type in ("qwen2", "qwen3")
        for settings in (
            {"rope_theta": 1e6} | QWEN,
            {"rope_theta": 1e6} | QWEN | {"use_sliding_window": True},
            {"use_sliding_window": True, "sliding_window": 64},
            {"use_sliding_window": True, "max_window_layers": 0},
            {"rope_scaling": YARN | {"original_max_position_embeddings": 8192}, "max_position_embeddings": 32768},
        )
    ),
    ("gemma2", {"rope_theta": 10000.0, "sliding_window": 4096, "cache_implementation": "hybrid"}),
    ("gemma2", {"rope_scaling": LINEAR, "sliding_window": None}),
    ("gemma3_text", GEMMA3 | {"sliding_window": 512, "max_position_embeddings": 32768}),
    ("gemma3_text", GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 3}),
    ("gemma3_text", {"rope_theta": 5e5, "rope_local_base_freq": 5e3, "rope_scaling": LINEAR}),
    ("gemma3_text", {"rope_theta": 1e4, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}),
    ("olmo2", {"rope_theta": 500000, "rope_scaling": None, "max_position_embeddings": 4096}),
    ("phi3", {"rope_theta": 10000.0, "rope_scaling": None, "sliding_window": 2047}),
    ("phi3", {"partial_rotary_factor": 0.75, "rope_scaling": {"type": "longrope"} | LONG, "max_position_embeddings": 131072}),
    ("phi3", {"partial_rotary_factor": 0.75, "rope_scaling": {"type": "yarn"} | LONG}),
    (
        "phi3",
        {"partial_rotary_factor": 0.75, "rope_scaling": {"type": "longrope"} | LONG, "original_max_position_embeddings": 512},
    ),
    ("gpt2", {"n_positions": 512, "n_ctx": 512}),
    ("gpt2", {"max_position_embeddings": 256}),
    ("gpt_neox", {"rotary_pct": 0.25, "rotary_emb_base": 10000}),
    ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 25000, "rope_theta": 3.0, "partial_rotary_factor": 0.1}),
    ("gpt_neox", {"rotary_pct": 1.0, "rope_scaling": LINEAR}),
]
"""Position settings as configs of the Hub say them, by `model_type`."""
SIZES = {"hidden_size": 32, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
LAYERED = ("qwen2", "qwen3", "gemma2", "gemma3_text")
"""Whose models ask `layer_types` whether a layer has the sliding window."""


def transformers_reads(config: Any) -> dict[str, Any]:
    """The position settings of transformers' own config object, as its models use them."""
    found = {"rope_theta": None, "partial_rotary_factor": None, "rope_scaling": None}
    if config.model_type != "gpt2":
        config.standardize_rope_params()  # as RoPE's own functions do
        kinds = [kind for kind in ("full_attention", "sliding_attention") if kind in config.rope_parameters]
        ropes = {kind: config.rope_parameters[kind] for kind in kinds} or {"": config.rope_parameters}
        ignored = ("rope_theta", "partial_rotary_factor", "type")
        defaults = [("beta_fast", 32), ("beta_slow", 1)]
        rest = {
            kind: {k: v for k, v in rope.items() if k not in ignored and (k, v) not in defaults} for kind, rope in ropes.items()
        }
        columns: dict[str, dict[str, Any]] = {
            "rope_theta": {kind: rope["rope_theta"] for kind, rope in ropes.items()},
            "partial_rotary_factor": {kind: rope.get("partial_rotary_factor", 1.0) for kind, rope in ropes.items()},
            "rope_scaling": {kind: None if value["rope_type"] == "default" else value for kind, value in rest.items()},
        }
        for key, column in columns.items():
            values = list(column.values())
            found[key] = values[0] if all(value == values[0] for value in values) else column
    window, layers = getattr(config, "sliding_window", None), "all"
    if config.model_type in LAYERED:
        layers = [layer for layer, kind in enumerate(config.layer_types) if kind == "sliding_attention"]
    window = window if layers else None
    context = {"context": config.max_position_embeddings}
    return found | context | {"sliding_window": window, "sliding_layers": None if window is None else layers}


@pytest.mark.parametrize(("model_type", "settings"), OLD_SPELLINGS)
def test_positions_are_what_transformers_makes_of_them(model_type: str, settings: dict[str, Any]) -> None:
    """The old spelling, the one that transformers saves, and the config object itself say the same."""
    sizes = {} if model_type == "gpt2" else SIZES
    config = transformers.AutoConfig.for_model(model_type, **copy.deepcopy(sizes | settings))
    saved = json.loads(config.to_json_string())
    found = positions_of({"model_type": model_type} | sizes | settings)
    assert found == positions_of(saved)
    assert found == transformers_reads(config)


def test_every_model_type_has_its_positions() -> None:
    assert set(POSITIONS) == {model_type for family in FAMILIES for model_type in family.model_types}


@pytest.mark.parametrize("model_type", [name for name in POSITIONS if name != "gpt2"])
def test_every_rope_setting_counts(model_type: str) -> None:
    """Also those that stand beside `rope_type: default`, and those of one kind of layers."""
    saved = json.loads(transformers.AutoConfig.for_model(model_type, **SIZES).to_json_string())
    kinds = [kind for kind in ("full_attention", "sliding_attention") if kind in saved["rope_parameters"]]
    for change in ({"rope_theta": 123.0}, {"partial_rotary_factor": 0.5}, {"rope_type": "linear", "factor": 2.0}):
        for kind in kinds or [None]:
            other = copy.deepcopy(saved)
            (other["rope_parameters"] if kind is None else other["rope_parameters"][kind]).update(change)
            assert positions_of(other) != positions_of(saved)
            assert positions_of(other) == positions_of(copy.deepcopy(other))


def test_a_layer_with_another_window_counts() -> None:
    saved = json.loads(transformers.AutoConfig.for_model("gemma3_text", **SIZES).to_json_string())
    types = [*saved["layer_types"][1:], "full_attention"]
    assert positions_of(saved | {"layer_types": types})["sliding_layers"] != positions_of(saved)["sliding_layers"]


@pytest.mark.parametrize(
    "odd",
    [
        {"rope_parameters": ["a"]},
        {"rope_scaling": "yarn", "rope_parameters": 3},
        {"rope_parameters": {"full_attention": 7, "rope_type": ["x"]}},
        {"sliding_window": "wide", "sliding_window_pattern": 0, "use_sliding_window": 1, "max_window_layers": "two"},
        {"layer_types": "all", "num_hidden_layers": 10**12, "use_sliding_window": True},
        {"layer_types": [1, None, {}], "use_sliding_window": True},
    ],
)
@pytest.mark.parametrize("model_type", POSITIONS)
def test_odd_positions_are_compared_all_the_same(model_type: str, odd: dict[str, Any]) -> None:
    assert positions_of({"model_type": model_type} | odd) == positions_of(copy.deepcopy({"model_type": model_type} | odd))


def test_another_part_of_the_head_is_refused(tmp_path: Path) -> None:
    base = Checkpoint(tiny_model(tmp_path / "base", "gpt_neox", tied=False))
    rope = base.config["rope_parameters"]
    assert rope["rope_type"] == "default"
    other = edit_config(shutil.copytree(base.folder, tmp_path / "other"), rope_parameters=rope | {"partial_rotary_factor": 0.5})
    with pytest.raises(PairError, match=r"partial_rotary_factor = 0\.25; found 0\.5; use --positions base"):
        check_pair(base, Checkpoint(other))
    hub = edit_config(
        shutil.copytree(base.folder, tmp_path / "hub"), rope_parameters=None, rotary_pct=0.25, rotary_emb_base=10000
    )
    check_pair(base, Checkpoint(hub))


def test_the_same_size_with_other_tokens_is_refused(base: Model, tmp_path: Path) -> None:
    one = Checkpoint(tiny_model(tmp_path / "one", vocabulary=["<a>"]))
    other = Checkpoint(tiny_model(tmp_path / "other", vocabulary=["<b>"]))
    with pytest.raises(PairError, match=r"<[ab]>"):
        check_pair(one, other)


def test_a_vocabulary_in_files_of_its_own_is_read_and_compared(tmp_path: Path) -> None:
    """As GPT-2's: tokens in vocab.json, added ones beside it, in either of two places."""
    folders = {name: tiny_model(tmp_path / name, vocabulary=["<a>", "<b>"]) for name in ("whole", "apart", "other")}
    ids = token_ids(folders["whole"])
    assert ids is not None
    for name, added in (("apart", "<b>"), ("other", "<c>")):
        folder = folders[name]
        (folder / "tokenizer.json").unlink()
        assert token_ids(folder) is None
        (folder / "vocab.json").write_text(json.dumps({t: i for t, i in ids.items() if t not in ("<a>", "<b>")}))
        settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"added_tokens_decoder": None}
        if name == "apart":
            (folder / "added_tokens.json").write_text(json.dumps({"<a>": ids["<a>"], added: ids["<b>"]}))
        else:  # what stands here is not looked at, as transformers does not
            (folder / "added_tokens.json").write_text(json.dumps({"<stale>": 7}))
            settings["added_tokens_decoder"] = {str(ids["<a>"]): {"content": "<a>"}, str(ids["<b>"]): {"content": added}}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert token_ids(folders["apart"]) == ids
    whole, apart, other = (Checkpoint(folder) for folder in folders.values())
    check_pair(whole, apart)
    with pytest.raises(PairError, match=r"<[bc]>"):
        check_pair(whole, other)
    assert "<stale>" not in (token_ids(folders["other"]) or {})
    (folders["other"] / "tokenizer_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"other/tokenizer_config\.json"):
        check_pair(whole, other)
    (folders["apart"] / "vocab.json").write_text('{"!": "three"}')
    with pytest.raises(CheckpointError, match=r"apart/vocab\.json"):
        check_pair(whole, apart)


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


@pytest.mark.parametrize(("one", "other"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")])
def test_rows_that_are_kept_are_no_change(tmp_path: Path, one: str, other: str) -> None:
    """Whatever the dtypes: a row of the base's own is the base's to the last bit, and a matched one the expert's."""
    base = resolve(str(tiny_model(tmp_path / "base", vocabulary=["<mine>", "<both>"], tied=False, dtype=one)))
    expert = resolve(str(tiny_model(tmp_path / "expert", vocabulary=["<both>", "<theirs>"], tied=False, seed=5, dtype=other)))
    aligned, mine, theirs = align(base, expert, "base").checkpoint(), token_ids(base.path), token_ids(expert.path)
    assert mine is not None
    assert theirs is not None
    check_pair(base.checkpoint(), aligned)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        delta = delta_of(base.checkpoint(), aligned, name)
        assert delta is not None
        assert not delta[mine["<mine>"]].any()
        assert delta[mine["<both>"]].any()
        row = expert.checkpoint().tensor(name)[theirs["<both>"]]
        assert torch.equal(aligned.tensor(name)[mine["<both>"]].float(), row.float())


def test_vocabularies_without_a_common_token_keep_the_base(tmp_path: Path) -> None:
    base = resolve(str(tiny_model(tmp_path / "base")))
    other = tiny_model(tmp_path / "other", seed=5, extra_rows=2)
    parsed = json.loads((other / "tokenizer.json").read_text())
    parsed["model"]["vocab"], parsed["added_tokens"] = {"strange": 0}, []
    (other / "tokenizer.json").write_text(json.dumps(parsed))
    aligned = align(base, resolve(str(other)), "base").checkpoint()
    assert delta_of(base.checkpoint(), aligned, "model.embed_tokens.weight") is None


@pytest.mark.parametrize("vocabulary", [[], ["<x>"]])
@pytest.mark.parametrize("bare", ["base", "expert"])
def test_alignment_needs_both_tokenizers(tmp_path: Path, vocabulary: list[str], bare: str) -> None:
    """Also where the sizes are equal: without tokens nothing says that a row means the same."""
    folders = {"base": tiny_model(tmp_path / "base"), "expert": tiny_model(tmp_path / "expert", vocabulary=vocabulary)}
    (folders[bare] / "tokenizer.json").unlink()
    base, expert = (resolve(str(folder)) for folder in folders.values())
    with pytest.raises(PairError, match=rf"{bare}: expected tokenizer\.json or vocab\.json in both models.*--vocabulary same"):
        align(base, expert, "base")
    assert align(base, expert, "same") == expert
    if not vocabulary:
        check_pair(base.checkpoint(), expert.checkpoint())


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
