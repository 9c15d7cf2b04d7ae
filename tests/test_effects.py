"""The effect matrix on tiny models: it adds up to the change of loss, and its parts mean what they say."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mechmerge.behaviors.schema import Behavior, Pair, Verifier
from mechmerge.errors import InputError, LocalizeError, SchemaError
from mechmerge.localize.bench import Bench
from mechmerge.localize.calibration import BehaviorRow
from mechmerge.localize.effect_file import EFFECT_KINDS, EffectFile, read_effects
from mechmerge.localize.effects import EffectSettings, measure_effects, statistics
from mechmerge.models.references import Model

SETTINGS = EffectSettings(prompts=4, dtype="float32", batch=3)


def behavior(name: str, verifier: Verifier | None = None) -> Behavior:
    topics = ["tea", "rain", "a river", "the moon"]
    pairs = tuple(Pair(**{"with": f"{name}: {t}", "without": f"Say {t}.", "topic": t}) for t in topics)
    return Behavior(name=name, pairs=pairs, verifier=verifier, answer_tokens=5)


def rows() -> list[BehaviorRow]:
    return [
        BehaviorRow("first", (behavior("one"), behavior("two")), "a"),
        BehaviorRow("second", (behavior("three"),), "b", weight=2.0),
    ]


@pytest.fixture(scope="module")
def measured(base: Model, expert: Model, second_expert: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("effects") / "effects.safetensors"
    measure_effects(base, {"a": expert, "b": second_expert}, rows(), out, SETTINGS)
    return out


def test_effects_add_up_to_the_change_of_loss(measured: Path) -> None:
    file = read_effects(measured)
    for r, record in enumerate(file.metadata.behaviors):
        total = sum(float(file.arrays[f"{kind}.effect"][r].sum()) for kind in EFFECT_KINDS if f"{kind}.effect" in file.arrays)
        change = record.loss_start - record.loss_end
        assert abs(total - change) / max(abs(change), 0.05) == pytest.approx(record.completeness_error, abs=1e-4)
        assert record.completeness_error <= SETTINGS.tolerance


def test_losses_are_those_of_the_models(measured: Path, base: Model, expert: Model, second_expert: Model) -> None:
    """The recorded losses against a plain computation, answer by answer, with transformers alone."""
    from mechmerge.behaviors.chat import chat_template_of, render
    from mechmerge.behaviors.generation import generate
    from mechmerge.models.load import load_model, load_tokenizer

    record = read_effects(measured).metadata.behaviors[1]
    tokenizer = load_tokenizer(base.path)
    template = chat_template_of(tokenizer, "model")
    texts = [render(tokenizer, pair.with_, template) for pair in behavior("three").pairs]
    said = generate(load_model(second_expert.path), tokenizer, texts, max_new_tokens=5)

    def loss(folder: Path) -> float:
        model, values = load_model(folder), []
        for text, answer in zip(texts, said, strict=True):
            prompt = tokenizer(text, add_special_tokens=False).input_ids
            tokens = [*answer.ids, *([tokenizer.eos_token_id] if answer.finished else [])]
            labels = torch.tensor([[-100] * len(prompt) + tokens])
            with torch.no_grad():
                values.append(model(input_ids=torch.tensor([prompt + tokens]), labels=labels).loss.item())
        return sum(values) / len(values)

    assert record.loss_start == pytest.approx(loss(base.path), abs=1e-4)
    assert record.loss_expert == pytest.approx(loss(second_expert.path), abs=1e-4)
    assert record.own_gain == pytest.approx(loss(base.path) - loss(second_expert.path), abs=2e-4)


def test_halves_average_to_the_whole(measured: Path) -> None:
    """Every member has as many examples in one half as in the other here, so the whole is the mean of the halves."""
    arrays = read_effects(measured).arrays
    for kind in ("head", "neuron", "norms"):
        assert np.allclose(arrays[f"{kind}.half"].mean(0), arrays[f"{kind}.effect"], atol=1e-6)
        assert (arrays[f"{kind}.stderr"] > 0).any()


def test_prompts_of_one_topic_are_no_independent_ones() -> None:
    """Written out: √(k/(k − 1) · Σ over topics of (Σ of weighted deviations)²); without topics the usual error."""
    draw = np.random.default_rng(0)
    values = draw.normal(size=(2, 6, 3, 4)).astype(np.float32)
    weights = np.array([[1 / 4, 1 / 4, 1 / 4, 1 / 4, 0, 0], [0, 0, 0, 0, 1 / 2, 1 / 2]])
    for topics in (["tea", "rain", "tea", "rain", "tea", "bread"], [""] * 6):
        known: Any = SimpleNamespace(
            weights=lambda half=None: weights,
            examples=[SimpleNamespace(topic=topic, member=0) for topic in topics],
            checkpoint=SimpleNamespace(arch=SimpleNamespace(tied=True)),
        )
        found = statistics(known, {"neuron": values})["neuron.stderr"]
        for r in range(2):
            mean = np.einsum("n,enlu->elu", weights[r], values)
            groups: dict[str, Any] = {}
            for i in np.flatnonzero(weights[r]):
                key = topics[i] or str(i)
                groups[key] = groups.get(key, 0) + weights[r, i] * (values[:, i] - mean)
            k = len(groups)
            assert found[r] == pytest.approx(np.sqrt(k / (k - 1) * sum(g**2 for g in groups.values())), abs=1e-5)
    assert found[0] == pytest.approx(values[:, :4].std(1, ddof=1) / 2, abs=1e-5)


def test_file_says_what_was_measured(measured: Path, base: Model, expert: Model) -> None:
    metadata = read_effects(measured).metadata
    first, second = metadata.behaviors
    assert (first.members, first.expert, first.prompts, first.answers) == (("one", "two"), "a", 4, 4)
    assert (second.weight, second.expert) == (2.0, "b")
    assert list(metadata.experts) == ["a", "b"]
    assert metadata.experts["a"] == expert.id
    assert 4 <= len(metadata.nodes) <= SETTINGS.max_nodes
    assert str(base.path) not in measured.read_bytes().decode("latin1"), "an effect file is shared: no local paths"


def test_an_expert_that_changes_nothing_has_no_effect(base: Model, expert: Model, tmp_path: Path) -> None:
    row = [BehaviorRow("first", (behavior("one"),), "a")]
    file = measure_effects(base, {"a": expert, "idle": base}, row, tmp_path / "e.safetensors", SETTINGS)
    assert all((array[..., 1, :, :] == 0).all() for name, array in file.arrays.items() if name.endswith(".effect"))
    assert any((array[:, 0] != 0).any() for name, array in file.arrays.items() if name.endswith(".effect"))


def test_an_interrupted_call_goes_on_and_ends_with_the_same_bytes(
    measured: Path, base: Model, expert: Model, second_expert: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, calls = tmp_path / "effects.safetensors", []
    loss = Bench.answer_losses

    def stops(self: Bench, *batch: Any) -> torch.Tensor:
        calls.append(batch)
        if len(calls) == 30:
            raise KeyboardInterrupt
        return loss(self, *batch)

    monkeypatch.setattr(Bench, "answer_losses", stops)
    with pytest.raises(KeyboardInterrupt):
        measure_effects(base, {"a": expert, "b": second_expert}, rows(), out, SETTINGS)
    assert not out.exists()
    assert len(list((tmp_path / ".effects.units").glob("*/node-*.safetensors"))) > 0, "nodes done are kept"
    measure_effects(base, {"a": expert, "b": second_expert}, rows(), out, SETTINGS)
    assert out.read_bytes() == measured.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["effects.safetensors"], "no leftovers"


def test_no_answer_that_passes_is_said(base: Model, expert: Model, tmp_path: Path) -> None:
    never = behavior("one", Verifier(name="contains", arguments={"text": "xyzzy plugh"}))
    with pytest.raises(
        LocalizeError, match="answers of a to one that pass, in both halves of the prompts; found 0 of 2 in half 1"
    ):
        measure_effects(base, {"a": expert}, [BehaviorRow("first", (never,), "a")], tmp_path / "e.safetensors", SETTINGS)
    assert not (tmp_path / "e.safetensors").exists()


def test_wrong_usage(base: Model, expert: Model, measured: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at least one behaviour"):
        measure_effects(base, {"a": expert}, [], tmp_path / "e.safetensors")
    with pytest.raises(InputError, match="an expert of a; found b"):
        measure_effects(base, {"a": expert}, [BehaviorRow("x", (behavior("one"),), "b")], tmp_path / "e.safetensors")
    file = read_effects(measured)
    with pytest.raises(SchemaError, match="float32"):
        EffectFile(file.metadata, {"head.effect": np.zeros((1, 2, 3, 4), np.float32)}).write(tmp_path / "e.safetensors")
    short = {name: array for name, array in file.arrays.items() if name != "neuron.effect"}
    with pytest.raises(SchemaError, match=r"expected neuron\.effect of neuron"):
        EffectFile(file.metadata, short).write(tmp_path / "e.safetensors")
    with pytest.raises(SchemaError, match=r"expected kv.effect of kv.half's \[layers, units\]"):
        EffectFile(file.metadata, file.arrays | {"kv.half": file.arrays["kv.half"][..., :1]}).write(tmp_path / "e.safetensors")
    shallow = {name: array[..., :1, :] if name.startswith("head.") else array for name, array in file.arrays.items()}
    with pytest.raises(SchemaError, match="expected one number of layers; found 1, "):
        EffectFile(file.metadata, shallow).write(tmp_path / "e.safetensors")
    with pytest.raises(SchemaError, match="parameters of one unit of head, kv, neuron"):
        EffectFile(file.metadata.model_copy(update={"parameters": {"head": 3}}), file.arrays).write(tmp_path / "e.safetensors")
    with pytest.raises(SchemaError, match="finite effects"):
        EffectFile(file.metadata, {"head.effect": np.full((2, 2, 3, 4), np.nan, np.float32)}).write(tmp_path / "e.safetensors")
