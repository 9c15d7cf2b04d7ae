"""Losses on the tokens that are contested: the plain weighting, sums that still add up, and files that say so."""

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
from mechmerge.progress import NullProgress
from tests.test_effects import SETTINGS, behavior, rows

CONTESTED = SETTINGS.model_copy(update={"tokens": "contested"})


@pytest.fixture(scope="module")
def measured(base: Model, expert: Model, second_expert: Model, tmp_path_factory: pytest.TempPathFactory) -> EffectFile:
    out = tmp_path_factory.mktemp("tokens") / "effects.safetensors"
    measure_effects(base, {"a": expert, "b": second_expert}, rows(), out, CONTESTED)
    return read_effects(out)


def per_token(model: Model, prompt: list[int], answer: list[int]) -> np.ndarray:
    with torch.no_grad():
        logits = load_model(model.path)(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="none").numpy()


def test_a_loss_is_weighted_by_what_is_contested(
    measured: EffectFile, base: Model, expert: Model, second_expert: Model
) -> None:
    """Anew with transformers alone, answer by answer: the worse of the base and the other expert against its own."""
    record, tokenizer = measured.metadata.behaviors[1], load_tokenizer(base.path)
    template = chat_template_of(tokenizer, "model")
    texts = [render(tokenizer, pair.with_, template) for pair in behavior("three").pairs]
    start, end = [], []
    for text, said in zip(texts, generate(load_model(second_expert.path), tokenizer, texts, max_new_tokens=5), strict=True):
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        answer = [*said.ids, *([] if said.end is None else [said.end])]
        before, other, after = (per_token(model, prompt, answer) for model in (base, expert, second_expert))
        stake = np.maximum(np.maximum(before, other) - after, 0)
        start.append((before * stake).sum() / stake.sum())
        end.append((after * stake).sum() / stake.sum())
    assert record.loss_start == pytest.approx(np.mean(start), abs=1e-4)
    assert record.loss_expert == pytest.approx(np.mean(end), abs=1e-4)
    assert measured.metadata.unit == "nats per answer token, each by how much it is contested"


def test_effects_still_add_up(measured: EffectFile) -> None:
    for r, record in enumerate(measured.metadata.behaviors):
        total = sum(float(measured.arrays[f"{k}.effect"][r].sum()) for k in EFFECT_KINDS if f"{k}.effect" in measured.arrays)
        change = record.loss_start - record.loss_end
        assert abs(total - change) / max(abs(change), 0.05) == pytest.approx(record.completeness_error, abs=1e-4)
        assert record.completeness_error <= SETTINGS.tolerance


def test_the_bases_own_answers_are_contested_by_experts(
    base: Model, expert: Model, second_expert: Model, tmp_path: Path
) -> None:
    """Base and expert change places here: the tiny base says what every model makes likelier."""
    both = [BehaviorRow("first", (behavior("one"),), "a"), BehaviorRow("kept", (behavior("two"),), BASE)]
    settings = RoundSettings(prompts=4, dtype="float32", batch=3, tokens="contested")
    known = Calibration(expert, {"a": base, "b": second_expert}, both, tmp_path / "units", settings)
    shares = known.token_shares
    assert shares is not None
    assert all(share.sum() == pytest.approx(1, abs=1e-5) for share in shares)
    seen = set()
    for example, share in zip(known.examples, shares, strict=True):
        own, other = (base, expert) if example.row == 0 else (expert, base)
        others = (other, second_expert)
        mine, *theirs = (per_token(model, list(example.prompt), list(example.answer)) for model in (own, *others))
        stake = np.maximum(np.maximum(*theirs) - mine, 0)
        expected = stake / stake.sum() if stake.sum() > 0 else np.full(len(share), 1 / len(share))
        assert share == pytest.approx(expected, abs=2e-3)
        seen.add((example.row, bool(stake.sum() > 0)))
    assert (1, True) in seen


def test_files_say_which_tokens_and_solutions_want_the_same(
    measured: EffectFile, base: Model, expert: Model, second_expert: Model, tmp_path: Path
) -> None:
    models = {"a": expert, "b": second_expert}
    settings = RoundSettings(prompts=4, dtype="float32", batch=3, max_rounds=1, tokens="contested")
    file = settle(base, models, rows(), tmp_path / "r.safetensors", settings)
    assert (file.metadata.tokens, measured.metadata.tokens) == ("contested", "contested")
    assert file.metadata.behaviors[1].loss_base == pytest.approx(measured.metadata.behaviors[1].loss_start, abs=1e-4)
    other = SolveSettings(prompts=4, dtype="float32", batch=3, unproven=True)
    with pytest.raises(InputError, match="losses over all tokens; found over contested; ask for tokens contested"):
        settle_solution(base, models, rows(), measured, tmp_path / "s.safetensors", other)
    anchored = EffectSettings(prompts=4, metric="anchor", tokens="contested")
    with pytest.raises(InputError, match="states along anchors have no answers"):
        measure_effects(base, models, rows(), tmp_path / "e.safetensors", anchored)


class Flat(NullProgress):
    """Refuses a step within a step."""

    def __init__(self) -> None:
        self.open, self.labels = False, list[str]()

    def start(self, label: str, total: int) -> None:
        assert not self.open, f"{label} within {self.labels[-1]}"
        self.open = True
        self.labels.append(label)

    def end(self) -> None:
        self.open = False


def test_steps_of_progress_do_not_nest(base: Model, expert: Model, second_expert: Model, tmp_path: Path) -> None:
    seen = Flat()
    settings = RoundSettings(prompts=4, dtype="float32", batch=3, max_rounds=1)
    settle(base, {"a": expert, "b": second_expert}, rows(), tmp_path / "r.safetensors", settings, seen)
    assert settings.tokens == "contested"
    tokens = [label for label in seen.labels if label.startswith("tokens")]
    assert len(tokens) == 3, "each model's tokens once"


def test_solutions_follow_the_effect_file(
    measured: EffectFile, base: Model, expert: Model, second_expert: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From Python too, where no settings are given."""
    from mechmerge.localize import solving

    asked: list[str] = []

    def stop(_calibration: Calibration, _effects: EffectFile, settings: SolveSettings, *_: object) -> None:
        asked.append(settings.tokens)
        raise KeyboardInterrupt

    monkeypatch.setattr(solving, "_solutions", stop)
    monkeypatch.setattr(solving, "check_proven", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        settle_solution(base, {"a": expert, "b": second_expert}, rows(), measured, tmp_path / "s.safetensors")
    assert asked == ["contested"]
