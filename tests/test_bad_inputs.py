"""What a user meets when something is wrong: one line on stderr, the right exit code, nothing written. The table of it all.

Every line is pinned word for word (`TMP` stands for the folder of the case, `BASE` for that of the base). What needs a Hub is
in `test_publish_refusals.py` and `test_hub_references.py`; the parameters of single policies are in `test_recipe.py`.
"""

# ruff: noqa: E501 - lines are pinned as they are

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mechmerge.cli.main import main
from mechmerge.models.pair import ALIGN, KEEP
from mechmerge.models.references import Model
from tests.samples import evaluation, recipe
from tests.tiny import tiny_adapter, tiny_model

PAIRS = [{"with": f"Shout {w}.", "without": f"Say {w}.", "topic": w} for w in ("tea", "rain", "sun", "sea", "bread", "snow")]
CONTAINS = {"name": "contains", "arguments": {"text": "e"}}
PROMPTS = [{"id": "a", "prompt": "Say tea.", "verifier": CONTAINS}, {"id": "b", "prompt": "Say rain.", "verifier": CONTAINS}]


@dataclass
class Place:
    """Where a case happens."""

    tmp: Path
    base: Path
    expert: Path
    """A copy of the expert, to be damaged."""

    def write(self, name: str, content: Any) -> str:
        """A file beneath `tmp`: text, bytes, or a document as YAML (JSON where its name says so)."""
        path = self.tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_text(content)
        else:
            # Through JSON: the same list twice would become an alias, which we refuse.
            content = json.loads(json.dumps(content))
            path.write_text(json.dumps(content) if path.suffix == ".json" else yaml.safe_dump(content))
        return str(path)

    def weights(self, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
        tensors = load_file(self.expert / "model.safetensors")
        change(tensors)
        save_file(tensors, self.expert / "model.safetensors", {"format": "pt"})

    def config(self, **changes: object) -> None:
        path = self.expert / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def other(self, **options: Any) -> None:
        """Another tiny model in the expert's place."""
        shutil.rmtree(self.expert)
        tiny_model(self.expert, **options)

    @property
    def out(self) -> str:
        return str(self.tmp / "out")

    def localize(self, expert: str | None = None, **behavior: Any) -> list[str]:
        file = self.write("shout.yaml", {"name": "shout", "pairs": PAIRS} | behavior)
        return ["localize", str(self.base), expert or str(self.expert), "--behavior", file, "--out", self.out,
                "--anchor-layer", "2", "--steering-prompts", "2", "--prompts", "2", "--quiet"]  # fmt: skip

    def evaluate(self, content: Any, *more: str, model: Path | None = None) -> list[str]:
        file = self.write("short.yaml", content)
        return ["evaluate", f"m={model or self.base}", "--suite", file, "--out", f"{self.out}/evaluation.json", "--quiet",
                "--dtype", "float32", *more]  # fmt: skip

    def gate(self, content: Any, *more: str) -> list[str]:
        measured = self.tmp / "evaluation.json"
        evaluation("base", "formats", "sum").write(measured)
        return ["gate", str(measured), self.write("gate.yaml", content), *more]

    def merge(self, content: Any, *more: str) -> list[str]:
        return ["merge", self.write("recipe.yaml", content), self.out, "--quiet", *more]

    def run(self, **changes: Any) -> list[str]:
        self.write("shout.yaml", {"name": "shout", "pairs": PAIRS})
        self.write("short.yaml", {"name": "short", "answer_tokens": 4, "prompts": PROMPTS})
        pipeline = {
            "title": "tiny", "license": "mit", "base": str(self.base), "experts": {"a": str(self.expert)},
            "behaviors": {"shout": {"expert": "a", "file": "shout.yaml"}}, "recipes": {"sum": {"policy": "task-arithmetic"}},
            "publish": "sum", "evaluate": {"suites": ["short.yaml"]},
            "gate": {"model": "sum", "rules": [{"metric": "short", "at_least": 0.0}]},
        }  # fmt: skip
        return ["run", self.write("pipeline.yaml", pipeline | changes), "--out", self.out, "--quiet"]


Build = Callable[[Place], list[str]]
RECIPE = json.loads(recipe().model_dump_json(exclude_none=True))
BOMB = "a: &a [x, x, x]\nb: &b [*a, *a, *a]\nc: [*b, *b, *b]\n"
INDEX = "model.safetensors.index.json"
CASES: dict[str, tuple[Build, int, str]] = {}
"""By name: how the case is built, the exit code, and the line."""


def case(name: str, line: str, code: int = 2) -> Callable[[Build], Build]:
    """Adds a case to the table."""

    def add(build: Build) -> Build:
        assert name not in CASES
        CASES[name] = (build, code, line)
        return build

    return add


def damaged(name: str, line: str, change: Callable[[Place], Any], code: int = 2) -> None:
    """A case of a damaged expert."""

    def build(place: Place) -> list[str]:
        change(place)
        return place.localize()

    case(name, line, code)(build)


# ---------------------------------------------------------------------------------------------------------------- models
PACKED = "name the unquantised model that it was made from: packed weights cannot be patched or added to"
SHARD = "TMP/expert/model.safetensors"
damaged(
    "a Git-LFS pointer",
    f"{SHARD}: expected a safetensors file; found a Git-LFS pointer; run `git lfs pull` in that folder",
    lambda p: p.write("expert/model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
)
damaged("truncated weights", f"{SHARD}: expected # bytes; found # (truncated); download it again",
        lambda p: os.truncate(p.expert / "model.safetensors", (p.expert / "model.safetensors").stat().st_size - 100))  # fmt: skip
damaged("weights with something behind them", f"{SHARD}: expected # bytes; found # (too long); download it again",
        lambda p: p.write("expert/model.safetensors", (p.expert / "model.safetensors").read_bytes() + b"x"))  # fmt: skip
damaged("no weights at all", f"{SHARD}: expected a safetensors file; found # bytes without a valid header",
        lambda p: p.write("expert/model.safetensors", b"no such thing"))  # fmt: skip
damaged("a pickle", "TMP/expert: expected model.safetensors; found the pickle pytorch_model.bin; pickles can run code and are "
        "refused; convert the model to safetensors, or use `mechmerge --allow-pickle`",
        lambda p: (p.expert / "model.safetensors").rename(p.expert / "pytorch_model.bin"))  # fmt: skip
damaged("NaN in a weight", "TMP/expert: model.norm.weight: expected finite weights; found NaN or infinite values",
        lambda p: p.weights(lambda t: t["model.norm.weight"].fill_(float("nan"))))  # fmt: skip
damaged("an infinite weight", "TMP/expert: model.norm.weight: expected finite weights; found NaN or infinite values",
        lambda p: p.weights(lambda t: t["model.norm.weight"].fill_(float("inf"))))  # fmt: skip
damaged("a missing tensor", "TMP/expert: model.layers.1.mlp.up_proj.weight: expected a tensor of this name; found none",
        lambda p: p.weights(lambda t: t.pop("model.layers.1.mlp.up_proj.weight")))  # fmt: skip
damaged("an extra tensor", "TMP/expert: model.layers.1.extra.weight: expected only tensors of this architecture; found an extra one",
        lambda p: p.weights(lambda t: t.update({"model.layers.1.extra.weight": torch.zeros(2)})))  # fmt: skip
damaged("a tensor of another shape",
        "TMP/expert: model.layers.1.mlp.up_proj.weight: expected [48, 32] as config.json says; found [47, 32]",
        lambda p: p.weights(lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(47, 32)})))  # fmt: skip
damaged("other RoPE settings", f"TMP/expert against BASE: expected rope_theta = 10000.0; found 5000.0; {KEEP}",
        lambda p: p.config(rope_parameters={"rope_theta": 5000.0, "rope_type": "default"}))  # fmt: skip
damaged("another context", f"TMP/expert against BASE: expected context = 512; found 1024; {KEEP}", lambda p: p.config(max_position_embeddings=1024))  # fmt: skip
damaged("GPTQ", f"TMP/expert: expected full-precision weights; found quantised ones (gptq); {PACKED}",
        lambda p: p.config(quantization_config={"quant_method": "gptq", "bits": 4}))  # fmt: skip
damaged("AutoGPTQ's own file", f"TMP/expert: expected full-precision weights; found quantised ones (gptq); {PACKED}",
        lambda p: p.write("expert/quantize_config.json", {"bits": 4}))  # fmt: skip
damaged("AutoAWQ's own file", f"TMP/expert: expected full-precision weights; found quantised ones (awq); {PACKED}",
        lambda p: p.write("expert/quant_config.json", {"w_bit": 4}))  # fmt: skip
damaged("bitsandbytes", f"TMP/expert: expected full-precision weights; found quantised ones (bitsandbytes, 4 bits); {PACKED}",
        lambda p: p.config(quantization_config={"load_in_4bit": True}))  # fmt: skip
damaged("packed tensors", f"TMP/expert: model.layers.1.mlp.up_proj.weight: expected floating-point weights; found U8; {PACKED}",
        lambda p: p.weights(lambda t: t.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(48, 32, dtype=torch.uint8)})))  # fmt: skip
damaged("GGUF", f"TMP/expert: expected model.safetensors; found the quantised file m.Q4_K_M.gguf (GGUF); {PACKED}",
        lambda p: (p.expert / "model.safetensors").rename(p.expert / "m.Q4_K_M.gguf"))  # fmt: skip
damaged("another architecture", "TMP/expert against BASE: expected the architecture llama; found qwen2",
        lambda p: p.other(family="qwen2"))  # fmt: skip
damaged("other layers", "TMP/expert against BASE: expected 3 layers; found 2", lambda p: p.other(layers=2))
damaged("another vocabulary", f"TMP/expert against BASE: expected a vocabulary of 320; found 321; {ALIGN}", lambda p: p.other(vocabulary=["<extra>"]))  # fmt: skip
damaged("an architecture that is not in the table", "TMP/expert/config.json: expected a model_type of llama, mistral, qwen2, qwen3, "
        "gemma2, gemma3_text, olmo2, phi3, gpt2, gpt_neox; found 'mamba'; this architecture is not supported",
        lambda p: p.config(model_type="mamba"))  # fmt: skip
damaged("a billion layers", "TMP/expert: config.json: expected no more layers than tensors (29); found 1000000000",
        lambda p: p.config(num_hidden_layers=10**9))  # fmt: skip
damaged("the base itself", "expert against base: expected another model than the base; found equal weights",
        lambda p: (shutil.rmtree(p.expert), shutil.copytree(p.base, p.expert)))  # fmt: skip
damaged("no config", "TMP/expert: expected a model folder with config.json; found none",
        lambda p: (p.expert / "config.json").unlink())  # fmt: skip
damaged("a config that is no JSON", "TMP/expert/config.json: expected valid JSON; found Expecting property name enclosed in double "
        "quotes: line 1 column 2 (char 1)", lambda p: p.write("expert/config.json", "{"))  # fmt: skip
damaged("a config that is a list", "TMP/expert/config.json: expected a JSON object; found list",
        lambda p: p.write("expert/config.json", "[]"))  # fmt: skip


@case("an index that leads out of the folder",
      f"TMP/expert/{INDEX}: expected names of safetensors files beside it; found '../base/model.safetensors'")  # fmt: skip
def _index(place: Place) -> list[str]:
    (place.expert / "model.safetensors").unlink()
    place.write(f"expert/{INDEX}", {"weight_map": {"model.norm.weight": "../base/model.safetensors"}})
    return place.localize()


@case(
    "a shard that is not there",
    "TMP/expert: expected the shard model-00001-of-00002.safetensors; found none; download it again",
)
def _shard(place: Place) -> list[str]:
    (place.expert / "model.safetensors").unlink()
    place.write(f"expert/{INDEX}", {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}})
    return place.localize()


@case("a file for a folder", f"model reference 'TMP/m.gguf': expected a model folder; found a file; {PACKED}")
def _gguf(place: Place) -> list[str]:
    return place.localize(place.write("m.gguf", b"GGUF"))


@case(
    "nothing there",
    "model reference '/no/such/model': expected a folder, owner/name[@revision] or demo:NAME; found nothing there",
)
def _nothing(place: Place) -> list[str]:
    return place.localize("/no/such/model")


@case("another demo", "demo:other: expected demo:smollm2-135m-instruct; found demo:other")
def _demo(place: Place) -> list[str]:
    return place.localize("demo:other")


@case("an adapter without its base", "TMP/adapter: expected a model; found an adapter; name it as BASE+TMP/adapter")
def _alone(place: Place) -> list[str]:
    return place.localize(str(tiny_adapter(place.base, place.tmp / "adapter")))


@case("a pickled adapter", "TMP/adapter: expected adapter_model.safetensors; found the pickle adapter_model.bin; save the adapter as "
      "safetensors")  # fmt: skip
def _pickled(place: Place) -> list[str]:
    place.write("adapter/adapter_config.json", {"peft_type": "LORA", "r": 2})
    place.write("adapter/adapter_model.bin", b"")
    return place.localize(f"{place.base}+{place.tmp / 'adapter'}")


def adapter(place: Place, **changes: Any) -> list[str]:
    folder = tiny_adapter(place.base, place.tmp / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    place.write("adapter/adapter_config.json", config)
    return place.localize(f"{place.base}+{folder}")


case("an adapter of a rank that it does not have",
     "TMP/adapter/adapter_config.json: expected a rank of 1 … 48, as its weights have; found 2147483648")(
    lambda place: adapter(place, r=2**31))  # fmt: skip
case("an adapter that doubles layers", "TMP/adapter/adapter_config.json: expected an adapter of the base's own layers; found "
     "layer_replication; merge it with its own tool")(lambda place: adapter(place, layer_replication=[[0, 2], [1, 3]]))  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ behaviours
def behaviour(name: str, line: str, /, **changes: Any) -> None:
    case(name, line)(lambda place: place.localize(**changes))


KEYS = "known keys: name, description, chat_template, verifier, pairs, builtin, answer_tokens"
behaviour("behaviour: an unknown key", f"TMP/shout.yaml: colour: unknown key: {KEYS}", colour=1)
behaviour("behaviour: no contrast", "behaviour shout, pair 6: expected a contrast; found the same prompt twice",
          pairs=[*PAIRS, {"with": "Say tea.", "without": "Say tea."}])  # fmt: skip
behaviour("behaviour: too few pairs", "behaviour shout: expected at least 4 pairs; found 2", pairs=PAIRS[:2])
behaviour("behaviour: a name that leads elsewhere", "TMP/shout.yaml: name: String should match pattern "
          f"'^[A-Za-z0-9][A-Za-z0-9_.-]*$' (found '../x'): {KEYS}", name="../x")  # fmt: skip
behaviour("behaviour: an escape sequence in a key", f"TMP/shout.yaml: \\x1b[31mred: unknown key: {KEYS}", **{"\x1b[31mred": 1})
behaviour("behaviour: an anchor that is not valid", "behaviour shout: the anchor at layer 2 is not valid: *: use --invalid-anchor "
          "report to measure all the same", answer_tokens=4,
          verifier={"name": "contains", "arguments": {"text": "xyzzy plugh"}})  # fmt: skip
behaviour(
    "behaviour: a verifier that is not there",
    "verifier 'shouting': expected one of change_case:*",
    verifier={"name": "shouting"},
)
behaviour("behaviour: a template that is no Jinja", "chat_template: expected a Jinja template that takes one user turn; found *",
          chat_template="{% for %}")  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ text files
def text(name: str, line: str, content: str | bytes) -> None:
    def build(place: Place) -> list[str]:
        arguments = place.localize()
        place.write("shout.yaml", content)
        return arguments

    case(name, line)(build)


text("YAML: a bomb of aliases", "TMP/shout.yaml: expected valid YAML; found aliases are not allowed", BOMB)
text("YAML: a key twice", "TMP/shout.yaml: expected valid YAML; found key 'name' stands twice", "name: a\nname: b\n")
text("YAML: none", "TMP/shout.yaml: expected valid YAML; found *", "name: [")
text("YAML: an object of Python", "TMP/shout.yaml: expected valid YAML; found could not determine a constructor for the tag *",
     "name: !!python/object/apply:os.system [ls]\n")  # fmt: skip
text("YAML: too deep", "TMP/shout.yaml: expected valid YAML; found maximum recursion depth exceeded*", "[" * 20_000)
text("YAML: too long", "TMP/shout.yaml: expected at most 16000000 characters of YAML; found 16000001", "#" * 16_000_001)
text("YAML: binary", "TMP/shout.yaml: expected a readable UTF-8 text file; found *", b"\xff\xfe\x00name")
text("YAML: a list", "TMP/shout.yaml: expected a mapping (Behavior); found list", "[1, 2]")


@case("a file that is not there", "behaviour nowhere.yaml: expected a file, or one of *; found neither")
def _nowhere(place: Place) -> list[str]:
    return ["localize", str(place.base), str(place.expert), "--behavior", "nowhere.yaml", "--out", place.out, "--quiet"]


# ---------------------------------------------------------------------------------------------------------------- suites
def suite(name: str, line: str, /, *more: str, **changes: Any) -> None:
    case(name, line)(lambda place: place.evaluate({"answer_tokens": 4, "prompts": PROMPTS} | changes, *more))


suite("suite: an unknown key", "TMP/short.yaml: colour: unknown key: known keys: name, split, answer_tokens, chat_template, readings, "
      "breakdown, prompts, limited", colour=1)  # fmt: skip
suite(
    "suite: an id twice",
    "TMP/short.yaml: top level: prompt id 'a' stands twice: known keys: *",
    prompts=[PROMPTS[0], PROMPTS[0]],
)
suite("suite: no prompt", "TMP/short.yaml: prompt 1: expected a prompt; found none", prompts=[{"id": "a"}])
suite("suite: no verifier", "TMP/short.yaml: prompt 1: expected a verifier; found none; give the prompt or the file one",
      prompts=[{"prompt": "Say tea."}])  # fmt: skip
suite("suite: an unknown verifier", "TMP/short.yaml: prompt 1 (1): verifier 'shouting': expected one of change_case:*",
      prompts=[{"prompt": "Say tea.", "verifier": "shouting"}])  # fmt: skip
suite("suite: an argument that a verifier does not take", "TMP/short.yaml: prompt 1 (1): *",
      prompts=[{"prompt": "Say tea.", "verifier": CONTAINS, "arguments": {"colour": 1}}])  # fmt: skip
suite("suite: longer than the context", "m: short: prompt 1: *",
      prompts=[{"prompt": "tea " * 600, "verifier": CONTAINS}])  # fmt: skip
suite("evaluate: an unknown reference", "against: expected one of m; found nobody", "--against", "nobody")


@case("evaluate: a model without a chat template", "chat_template: model (*): expected a tokenizer with a chat template; found none; "
      "use `chat_template: none`, or give a Jinja template there")  # fmt: skip
def _untemplated(place: Place) -> list[str]:
    (place.expert / "chat_template.jinja").unlink()
    return place.evaluate({"answer_tokens": 4, "prompts": PROMPTS}, model=place.expert)


@case("evaluate: samples of something else", "TMP/out/samples/m.short.jsonl: expected samples of this model and these settings; found "
      "those of another model, suite or decoding (k…); choose another --out, or pass --overwrite")  # fmt: skip
def _samples(place: Place) -> list[str]:
    place.write("out/samples/m.short.jsonl", '{"answers": "k"}\n')
    return place.evaluate({"answer_tokens": 4, "prompts": PROMPTS})


# ----------------------------------------------------------------------------------------------------------------- gates
case("gate: an unknown key", "TMP/gate.yaml: colour: unknown key: known keys: model, weights, rules")(
    lambda place: place.gate({"colour": 1, "rules": [{"metric": "formats", "at_least": 0.1}]})
)
case("gate: no rules", "TMP/gate.yaml: rules: Tuple should have at least 1 item after validation, not 0 (found '[]'): known keys: "
     "model, weights, rules")(lambda place: place.gate({"rules": []}))  # fmt: skip
case("gate: what was not measured", "gate TMP/gate.yaml: 1 of 1 rules failed: expected *; found *", 3)(
    lambda place: place.gate({"model": "sum", "rules": [{"metric": "chess", "at_least": 0.1}]})
)
case("gate: a rule that fails", "gate TMP/gate.yaml: 1 of 1 rules failed: expected *; found 0.500, short by 0.400", 3)(
    lambda place: place.gate({"model": "sum", "rules": [{"metric": "formats", "at_least": 0.9}]})
)
case("gate: other weights", "gate TMP/gate.yaml: 1 of 1 rules failed: expected *; found *weights*", 3)(
    lambda place: place.gate({"model": "sum", "weights": {"sum": "a" * 64}, "rules": [{"metric": "formats", "at_least": 0.1}]})
)


# -------------------------------------------------------------------------------------------------------------- recipes
case("recipe: an unknown key", "TMP/recipe.yaml: colour: unknown key: known keys: *")(
    lambda place: place.merge(RECIPE | {"colour": 1})
)
case("recipe: an expert's name with a line break",
     "TMP/recipe.yaml: top level: experts: 'a\\n' is not a plain name (letters, digits, _ and -; not 'base'): known keys: *")(
    lambda place: place.merge(RECIPE | {"experts": {"a\n": RECIPE["experts"]["formats"]}}))  # fmt: skip
case("recipe: a mask from elsewhere", "TMP/recipe.yaml: masks.file: String should match pattern *")(
    lambda place: place.merge(RECIPE | {"masks": {"file": "../masks.safetensors", "sha256": "a" * 64}})
)
case("recipe: masks that are not there", "TMP/masks.safetensors: expected a file; found nothing there")(
    lambda place: place.merge(RECIPE | {"masks": {"file": "masks.safetensors", "sha256": "a" * 64}})
)
case("recipe: a revision with markup", "TMP/recipe.yaml: base.revision: String should match pattern *")(
    lambda place: place.merge(RECIPE | {"base": RECIPE["base"] | {"revision": "x`\n[evil](https://x)"}})
)
case("merge: models that are not on this machine", "model demo:smollm2-135m-instruct: expected weights #; found none on this machine; "
     "pass --model base=MODEL", 4)(lambda place: place.merge(RECIPE))  # fmt: skip
case("merge: other weights than the recipe's", "model demo:smollm2-135m-instruct: expected weights #; found other weights in BASE; pass "
     "--model base=MODEL", 4)(
    lambda place: place.merge(RECIPE, "--model", f"base={place.base}"))  # fmt: skip
case("merge: no recipe", "TMP/nowhere.yaml: expected a file; found nothing there")(
    lambda place: ["merge", str(place.tmp / "nowhere.yaml"), place.out]
)
case("merge: a model that nobody asked for", "model 'nobody': expected base, arithmetic, formats or the name of one of their models; "
     "found none of them")(lambda place: place.merge(RECIPE, "--model", f"nobody={place.base}"))  # fmt: skip


@case("merge: something else in its place", "TMP/out: expected a new folder, or the model of this very recipe; found something else; "
      "name another")  # fmt: skip
def _occupied(place: Place) -> list[str]:
    place.write("out/notes.txt", "mine")
    return place.merge(RECIPE)


@case("recipe: a file of another kind", "*/model.safetensors: expected a score, effect or rounds file; found kind None")
def _kind(place: Place) -> list[str]:
    return ["recipe", str(place.base / "model.safetensors"), "--policy", "conflict", "--out", f"{place.out}/recipe.yaml"]


# ------------------------------------------------------------------------------------------------------------ pipelines
case("pipeline: an unknown key", "TMP/pipeline.yaml: colour: unknown key: known keys: *")(lambda place: place.run(colour=1))
case("pipeline: a recipe's name with a line break",
     "TMP/pipeline.yaml: top level: 'sum\\n' is not a plain name (letters, digits, _ . and -): known keys: *")(
    lambda place: place.run(recipes={"sum\n": {"policy": "task-arithmetic"}}, publish="sum\n"))  # fmt: skip
case("pipeline: no licence", "*licen*")(lambda place: place.run(license=None))


@case("pipeline: an expert without a chat template", "expert a (expert): expected a chat template, in which the pipeline asks it; found "
      "none; set `chat_template` in the pipeline: `none` for prompts as they are, or a Jinja template for all models")  # fmt: skip
def _untemplated_expert(place: Place) -> list[str]:
    (place.expert / "chat_template.jinja").unlink()
    return place.run()


# ---------------------------------------------------------------------------------------------------------------- tests
@pytest.fixture
def place(base: Model, expert: Model, tmp_path: Path) -> Place:
    return Place(tmp_path, base.path, Path(shutil.copytree(expert.path, tmp_path / "expert")))


@pytest.mark.parametrize("name", CASES)
def test_the_table(name: str, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    build, code, line = CASES[name]
    arguments = build(place)
    before = set(files(place.tmp))
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    said = capsys.readouterr()
    assert stop.value.code == code, said.err
    assert code == 3 or said.out == ""
    lines = said.err.strip("\n").split("\n")
    assert len(lines) == 1, said.err
    found = lines[0].removeprefix("mechmerge: ").replace(str(place.tmp), "TMP").replace(str(place.base), "BASE")
    assert re.fullmatch(pattern(line), found), f"{name!r} says\n{found}\nand not\n{line}"
    written = set(files(place.tmp)) - before
    # An anchor that was measured and refused leaves its units, so that measuring all the same goes on from them.
    assert all(".units" in path or "/.answers/" in path for path in written), written


def pattern(line: str) -> str:
    """`*` stands for anything, `#` for a number or digest."""
    return re.escape(line).replace(r"\*", ".*").replace(r"\#", "[0-9a-f]+")


def files(folder: Path) -> Iterator[str]:
    return (str(path) for path in folder.rglob("*") if path.is_file())


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


def test_remote_code_never_runs(place: Place) -> None:
    """A model folder that brings its own classes is loaded with transformers' classes of the family."""
    from mechmerge.localize.bench import Bench
    from mechmerge.models.references import resolve

    place.write(
        "expert/clever.py",
        f"open({str(place.tmp / 'ran')!r}, 'w').write('code ran')\nclass Model: pass\nclass Config: pass\n",
    )
    place.config(auto_map={"AutoConfig": "clever.Config", "AutoModelForCausalLM": "clever.Model"})
    tokenizer = place.expert / "tokenizer_config.json"
    tokenizer.write_text(
        json.dumps(json.loads(tokenizer.read_text()) | {"auto_map": {"AutoTokenizer": ["clever.Model", None]}})
    )
    bench = Bench(resolve(str(place.expert)))
    assert type(bench.module).__module__.startswith("transformers.models.llama")
    assert not (place.tmp / "ran").exists()
