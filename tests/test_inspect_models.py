"""`mechmerge inspect` of models, pairs of models, adapters, runs, verdicts and sweeps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from mechmerge.artifacts import write_json
from mechmerge.cli.main import cli
from mechmerge.errors import CheckpointError, InputError
from mechmerge.evaluate.gate import GateResult, RuleResult
from mechmerge.models.deltas import delta_by_depth
from mechmerge.models.load import load_model
from mechmerge.models.references import Model, resolve
from mechmerge.pipeline.inspection import describe, inspect_any
from mechmerge.pipeline.sweep import Ranked, Sweep, Variant
from tests.merged_run import merged_run
from tests.tiny import tiny_adapter, tiny_model


def facts(rows: list[dict[str, object]]) -> dict[str, object]:
    return {str(row["field"]): row["value"] for row in rows}


# ------------------------------------------------------------------------------------------------------------------ models
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen3"])
def test_parameters_by_component_are_all_parameters(tmp_path: Path, family: str) -> None:
    model = resolve(str(tiny_model(tmp_path / "model", family, tied=family == "gpt2")))
    known = describe(model)
    assert known["parameters"] == sum(p.numel() for p in load_model(model.path).parameters())
    assert sum(known["by_component"].values()) == known["parameters"]
    assert known["chat_template"] is True
    assert known["tokens"] == 320
    assert known["dtypes"] == {"F32": len(model.checkpoint().entries)}
    assert inspect_any(str(model.path)).kind == "model"


def test_a_model_in_words_and_in_json(base: Model) -> None:
    done = CliRunner().invoke(cli, ["inspect", str(base.path)])
    assert done.exit_code == 0
    for said in ("Llama", "tied to the embeddings", base.id.digest[:12], "neuron"):
        assert said in done.output
    found = json.loads(CliRunner().invoke(cli, ["inspect", str(base.path), "--format", "json"]).output)
    assert found["kind"] == "model"
    assert found["document"] == json.loads(json.dumps(describe(base)))
    assert found["tensors"]["model.embed_tokens.weight"] == [320, 32]


def test_an_adapter_says_how_to_use_it(tmp_path: Path, base: Model) -> None:
    adapter = tiny_adapter(base.path, tmp_path / "adapter")
    found = inspect_any(str(adapter))
    assert found.kind == "adapter"
    assert facts(found.tables["adapter"])["rank"] == 2
    assert facts(found.tables["adapter"])["use"] == f"name it as BASE+{adapter}"
    together = inspect_any(f"{base.path}+{adapter}")
    assert together.kind == "model"
    assert together.document["reference"] == f"{base.id.name}+{adapter.name}"


# ------------------------------------------------------------------------------------------------------------------- pairs
def test_deltas_by_depth_are_those_of_the_loaded_models(base: Model, expert: Model) -> None:
    rows = {row["where"]: row for row in delta_by_depth(base.checkpoint(), expert.checkpoint())}
    assert list(rows) == ["L0", "L1", "L2", "embed", "final_norm"]
    one, other = (dict(load_model(model.path).named_parameters()) for model in (base, expert))
    parts = {"attention": "self_attn", "mlp": "mlp", "norms": "layernorm"}
    for layer in range(3):
        for part, word in parts.items():
            names = [name for name in one if f".{layer}." in name and word in name]
            squares = [sum(float(t.double().square().sum()) for t in tensors) for tensors in
                       ([other[n].detach() - one[n].detach() for n in names], [one[n].detach() for n in names])]  # fmt: skip
            assert rows[f"L{layer}"][part] == pytest.approx(math.sqrt(squares[0] / squares[1]), rel=1e-6)
        assert rows[f"L{layer}"]["changed"] == rows[f"L{layer}"]["tensors"] == 9
    delta = other["model.norm.weight"].detach() - one["model.norm.weight"].detach()
    assert rows["final_norm"]["all"] == pytest.approx(float(torch.norm(delta) / torch.norm(one["model.norm.weight"].detach())))


def test_pairs_that_fit_and_pairs_that_do_not(tmp_path: Path, base: Model, expert: Model) -> None:
    good = inspect_any(str(base.path), str(expert.path))
    assert good.kind == "pair"
    assert good.document["compatible"] is True
    assert facts(good.tables["pair"])["compatible"] == "yes"
    same = inspect_any(str(base.path), str(base.path))
    assert facts(same.tables["pair"])["weights"] == "equal: nothing to merge"
    assert facts(same.tables["pair"])["tensors that differ"] == "0 of 29"
    deeper = tiny_model(tmp_path / "deeper", layers=4)
    bad = inspect_any(str(base.path), str(deeper))
    assert bad.document["compatible"] is False
    assert "expected 3 layers; found 4" in bad.document["reason"]
    assert list(bad.tables) == ["pair"], "no deltas of what cannot be compared"
    other = inspect_any(str(base.path), str(tiny_model(tmp_path / "gpt2", "gpt2")))
    assert other.document["compatible"] is False
    done = CliRunner().invoke(cli, ["inspect", str(base.path), str(deeper)])
    assert done.exit_code == 0, "it is an answer, not a failure"
    assert "NO: " in done.output


# -------------------------------------------------------------------------------------------------------------- other kinds
def test_a_run_file_by_file(tmp_path: Path, base: Model, expert: Model, second_expert: Model) -> None:
    run = merged_run(tmp_path / "run", base, {"formats": expert, "arithmetic": second_expert})
    write_json(run / "gate.json", GateResult(passed=False, rules=(RuleResult(rule="r", model="m", metric="x", passed=False),)))
    found = inspect_any(str(run))
    assert found.kind == "run"
    rows = {row["file"]: row for row in found.tables["files"]}
    assert rows["merged/conflict"]["holds"].startswith("complete, ")
    assert rows["recipes/conflict/recipe.yaml"]["holds"] == "conflict: formats, arithmetic"
    assert rows["effects.safetensors"]["holds"] == "2 experts, 2 behaviours"
    assert rows["gate.json"]["holds"] == "REFUSED: 1 of 1 rules failed"
    assert found.document["gate"] is False
    assert found.document["models"] == ["base", "formats", "arithmetic", "conflict"]
    json.dumps(found.document)
    shard = run / "merged" / "conflict" / "model.safetensors"
    shards = [shard] if shard.exists() else sorted((run / "merged" / "conflict").glob("*.safetensors"))
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        inspect_any(str(run))


def test_a_verdict_and_a_sweep(tmp_path: Path) -> None:
    rule = RuleResult(rule="formats of m ≥ 0.5", model="m", metric="formats", passed=True, found=0.6, bound=0.5, short_by=0.0)
    verdict = GateResult(passed=True, rules=(rule,))
    write_json(tmp_path / "gate.json", verdict)
    found = inspect_any(str(tmp_path / "gate.json"))
    assert (found.kind, found.document) == ("gate", verdict.model_dump(mode="json"))
    assert found.tables["gate: passed"][0]["found"] == "0.600"
    variant = Variant(name="top_budget-0.5", experts=("a",), policy="top", parameters={"budget": 0.5})
    sweep = Sweep(
        split="develop", ranking=(Ranked(rank=1, variant=variant, gate=verdict, metrics={"f": 0.25}, recipe="r.yaml"),)
    )
    write_json(tmp_path / "sweep.json", sweep)
    found = inspect_any(str(tmp_path / "sweep.json"))
    assert found.kind == "sweep"
    assert found.tables["sweep on the develop split"] == [
        {"rank": 1, "merge": "top_budget-0.5", "gate": "passed", "f": "0.250"}
    ]


@pytest.mark.parametrize("text", ["nothing-here", "./nothing.json", "/nothing/at/all"])
def test_nothing_there_is_one_line_without_the_network(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="nothing there"):
        inspect_any(text)
    with pytest.raises(InputError, match=r"run directory|none of them"):
        inspect_any(str(Path(__file__).parent / "hub"))
