"""Losses on the tokens that an expert gained: the plain weighting, sums that still add up, and files that say so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mechmerge.behaviors.chat import chat_template_of, render
from mechmerge.behaviors.generation import generate
from mechmerge.errors import InputError
from mechmerge.localize.calibration import BASE, BehaviorRow, Calibration
from mechmerge.localize.effect_file import EFFECT_KINDS, EffectFile, read_effects
from mechmerge.localize.effects import EffectSettings, measure_effects
from mechmerge.localize.rounds import RoundSettings, settle
from mechmerge.localize.solving import SolveSettings, settle_solution
from mechmerge.models.load import load_model, load_tokenizer
from mechmerge.models.references import Model
from tests.test_effects import SETTINGS, behavior, rows

GAINED = SETTINGS.model_copy(update={"tokens": "gained"})


@pytest.fixture(scope="module")
def measured(base: Model, expert: Model, second_expert: Model, tmp_path_factory: pytest.TempPathFactory) -> EffectFile:
    out = tmp_path_factory.mktemp("tokens") / "effects.safetensors"
    measure_effects(base, {"a": expert, "b": second_expert}, rows(), out, GAINED)
    return read_effects(out)


def per_token(model: Model, prompt: list[int], answer: list[int]) -> np.ndarray:
    with torch.no_grad():
        logits = load_model(model.path)(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none").numpy()


def test_a_loss_is_weighted_by_what_the_expert_gained(measured: EffectFile, base: Model, second_expert: Model) -> None:
    """Anew with transformers alone, answer by answer."""
    record, tokenizer = measured.metadata.behaviors[1], load_tokenizer(base.path)
    template = chat_template_of(tokenizer, "model")
    texts = [render(tokenizer, pair.with_, template) for pair in behavior("three").pairs]
    start, end = [], []
    for text, said in zip(texts, generate(load_model(second_expert.path), tokenizer, texts, max_new_tokens=5), strict=True):
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        answer = [*said.ids, *([] if said.end is None else [said.end])]
        before, after = (per_token(model, prompt, answer) for model in (base, second_expert))
        gained = np.maximum(before - after, 0)
        start.append((before * gained).sum() / gained.sum())
        end.append((after * gained).sum() / gained.sum())
    assert record.loss_start == pytest.approx(np.mean(start), abs=1e-4)
    assert record.loss_expert == pytest.approx(np.mean(end), abs=1e-4)
    assert measured.metadata.unit == "nats per answer token, each by what its expert gained"


def test_effects_still_add_up(measured: EffectFile) -> None:
    for r, record in enumerate(measured.metadata.behaviors):
        total = sum(float(measured.arrays[f"{k}.effect"][r].sum()) for k in EFFECT_KINDS if f"{k}.effect" in measured.arrays)
        change = record.loss_start - record.loss_end
        assert abs(total - change) / max(abs(change), 0.05) == pytest.approx(record.completeness_error, abs=1e-4)
        assert record.completeness_error <= SETTINGS.tolerance


def test_the_bases_own_answers_count_alike(base: Model, expert: Model, tmp_path: Path) -> None:
    both = [BehaviorRow("first", (behavior("one"),), "a"), BehaviorRow("kept", (behavior("two"),), BASE)]
    settings = RoundSettings(prompts=4, dtype="float32", batch=3, tokens="gained")
    shares = Calibration(base, {"a": expert}, both, tmp_path / "units", settings).token_shares
    assert shares is not None
    assert all(share.sum() == pytest.approx(1, abs=1e-5) for share in shares)
    assert any(np.ptp(share) > 0.01 for share in shares[:4])
    assert all(share == pytest.approx(1 / len(share)) for share in shares[4:])


def test_files_say_which_tokens_and_solutions_want_the_same(
    measured: EffectFile, base: Model, expert: Model, second_expert: Model, tmp_path: Path
) -> None:
    models = {"a": expert, "b": second_expert}
    settings = RoundSettings(prompts=4, dtype="float32", batch=3, max_rounds=1, tokens="gained")
    file = settle(base, models, rows(), tmp_path / "r.safetensors", settings)
    assert (file.metadata.tokens, measured.metadata.tokens) == ("gained", "gained")
    assert file.metadata.behaviors[1].loss_base == pytest.approx(measured.metadata.behaviors[1].loss_start, abs=1e-4)
    other = SolveSettings(prompts=4, dtype="float32", batch=3, unproven=True)
    with pytest.raises(InputError, match="effects on all tokens; found on those of gained; --tokens gained"):
        settle_solution(base, models, rows(), measured, tmp_path / "s.safetensors", other)
    anchored = EffectSettings(prompts=4, metric="anchor", tokens="gained")
    with pytest.raises(InputError, match="states along anchors have no answers"):
        measure_effects(base, models, rows(), tmp_path / "e.safetensors", anchored)
