"""What a user meets when something is wrong: one line on stderr, the right exit code, nothing written. Messages are pinned."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mechmerge.cli.main import main
from mechmerge.models.references import Model
from tests.tiny import tiny_model

PAIRS = [{"with": f"Shout {w}.", "without": f"Say {w}.", "topic": w} for w in ("tea", "rain", "sun", "sea", "bread", "snow")]


def weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def broken(kind: str, base: Model, expert: Path) -> None:
    """Damages the copy of the expert in one way."""
    shard = expert / "model.safetensors"
    match kind:
        case "lfs":
            shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        case "truncated":
            shard.write_bytes(shard.read_bytes()[:-100])
        case "pickle":
            shard.rename(expert / "pytorch_model.bin")
        case "nan":
            weights(expert, lambda t: t["model.norm.weight"].fill_(float("nan")))
        case "missing":
            weights(expert, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
        case "extra":
            weights(expert, lambda t: t.update({"model.layers.1.extra.weight": torch.zeros(2)}))
        case "rope":
            config(expert, rope_parameters={"rope_theta": 5000.0, "rope_type": "default"})
        case "quantised":
            config(expert, quantization_config={"quant_method": "gptq"})
        case "architecture":
            shutil.rmtree(expert)
            tiny_model(expert, family="qwen2")
        case "layers":
            shutil.rmtree(expert)
            tiny_model(expert, layers=2)
        case "vocabulary":
            shutil.rmtree(expert)
            tiny_model(expert, vocabulary=["<extra>"])
        case "unknown family":
            config(expert, model_type="mamba")
        case "same":
            shutil.rmtree(expert)
            shutil.copytree(base.path, expert)


CASES = {
    "lfs": "expected a safetensors file; found a Git-LFS pointer; run `git lfs pull` in that folder",
    "truncated": "(truncated); download it again",
    "pickle": "found the pickle pytorch_model.bin; pickles can run code and are refused; convert the model to safetensors",
    "nan": "model.norm.weight: expected finite weights; found NaN or infinite values",
    "missing": "model.layers.1.mlp.up_proj.weight: expected a tensor of this name; found none",
    "extra": "model.layers.1.extra.weight: expected only tensors of this architecture; found an extra one",
    "rope": "found 5000.0; use --positions base to keep the base's config",
    "quantised": "expected full-precision weights; found quantised ones (gptq); name the unquantised model",
    "architecture": "expected the architecture llama; found qwen2",
    "layers": "expected 3 layers; found 2",
    "vocabulary": "use --vocabulary base to align the rows by token",
    "unknown family": "found 'mamba'; this architecture is not supported",
    "same": "expected another model than the base; found equal weights",
}


@pytest.mark.parametrize("kind", CASES)
def test_experts_that_are_refused(
    kind: str, base: Model, expert: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "expert"
    shutil.copytree(expert.path, copy)
    broken(kind, base, copy)
    behavior = tmp_path / "shout.yaml"
    behavior.write_text(yaml.safe_dump({"name": "shout", "pairs": PAIRS}))
    out = tmp_path / "out"
    refused(
        ["localize", str(base.path), str(copy), "--behavior", str(behavior), "--out", str(out), "--quiet"], CASES[kind], capsys
    )
    assert not out.exists() or not list(out.rglob("*.safetensors"))


BEHAVIORS = {
    "unknown key": ({"name": "shout", "pairs": PAIRS, "colour": 1}, "colour: unknown key"),
    "no contrast": (
        {"name": "shout", "pairs": [*PAIRS, {"with": "Say tea.", "without": "Say tea."}]},
        "pair 6: expected a contrast; found the same prompt twice",
    ),
    "too few": ({"name": "shout", "pairs": PAIRS[:2]}, "expected at least 4 pairs; found 2"),
    "no verifier of that name": (
        {"name": "shout", "pairs": PAIRS, "verifier": {"name": "shouting"}},
        "shouting",
    ),
    "anchor not valid": (
        {
            "name": "shout",
            "pairs": PAIRS,
            "answer_tokens": 4,
            "verifier": {"name": "contains", "arguments": {"text": "xyzzy plugh"}},
        },
        "is not valid",
    ),
}


@pytest.mark.parametrize("case", BEHAVIORS)
def test_behaviours_that_are_refused(
    case: str, base: Model, expert: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, message = BEHAVIORS[case]
    behavior = tmp_path / "shout.yaml"
    behavior.write_text(yaml.safe_dump(content))
    out = tmp_path / "out"
    arguments = ["localize", str(base.path), str(expert.path), "--behavior", str(behavior), "--out", str(out), "--quiet"]
    refused([*arguments, "--anchor-layer", "2", "--steering-prompts", "2"], message, capsys)
    assert not list(out.glob("*.safetensors"))


def refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command exits 2 with one line that holds `message`."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr()
    assert stop.value.code == 2, said.err
    assert said.out == ""
    lines = said.err.strip().splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("mechmerge: ")
    assert message in lines[0]


def test_no_network_is_exit_code_4(tmp_path: Path) -> None:
    """A Hub that nobody answers for, in a process of its own (huggingface_hub reads its endpoint once)."""
    environment = os.environ | {
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_ETAG_TIMEOUT": "2",
    }
    command = ["localize", "some/model", "other/model", "--behavior", "capitals", "--out", str(tmp_path / "out"), "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "mechmerge.cli.main", *command], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 4, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert "model reference 'some/model': expected a local folder, or the Hub within reach" in lines[0]
    assert not (tmp_path / "out").exists()


def test_remote_code_never_runs(base: Model, tmp_path: Path) -> None:
    """A model folder that brings its own classes is loaded with transformers' classes of the family."""
    from mechmerge.localize.bench import Bench
    from mechmerge.models.references import resolve

    folder = tmp_path / "clever"
    shutil.copytree(base.path, folder)
    (folder / "clever.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').write('code ran')\nclass Model: pass\nclass Config: pass\n"
    )
    config(folder, auto_map={"AutoConfig": "clever.Config", "AutoModelForCausalLM": "clever.Model"})
    tokenizer = folder / "tokenizer_config.json"
    tokenizer.write_text(
        json.dumps(json.loads(tokenizer.read_text()) | {"auto_map": {"AutoTokenizer": ["clever.Model", None]}})
    )
    bench = Bench(resolve(str(folder)))
    assert type(bench.module).__module__.startswith("transformers.models.llama")
    assert not (tmp_path / "ran").exists()
