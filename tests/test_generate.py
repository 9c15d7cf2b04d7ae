"""`mechmerge generate`, and what it is made of: drawing tokens, telling pieces, one prompt at a time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from mechmerge.behaviors.chat import render
from mechmerge.behaviors.generation import Decoder, generate, prompt_tokens
from mechmerge.behaviors.sampling import Sampler
from mechmerge.behaviors.trial import Pieces, Trial
from mechmerge.cli.common import lines
from mechmerge.cli.main import cli
from mechmerge.errors import InputError
from mechmerge.models.load import load_model, load_tokenizer
from mechmerge.models.references import Model
from tests.merged_run import merged_run
from tests.tiny import tiny_model


# --------------------------------------------------------------------------------------------------------------- sampling
def test_tokens_are_drawn_in_the_shares_of_the_softmax() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0, 1.0, -30.0]])
    for temperature in (0.5, 1.0, 3.0):
        sampler = Sampler(temperature, seed=1)
        drawn = [int(sampler.tokens(logits, [0])[0, 0]) for _ in range(4000)]
        expected = torch.softmax(logits[0].double() / temperature, -1).numpy()
        counts = np.bincount(drawn, minlength=5) / len(drawn)
        # Four standard errors of a share.
        assert (np.abs(counts - expected) <= 4 * np.sqrt(expected * (1 - expected) / len(drawn)) + 1e-9).all()


def test_near_zero_it_is_the_argmax() -> None:
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(1e-3)
    assert sampler.tokens(logits, range(50)).tolist() == logits.argmax(-1, keepdim=True).tolist()


def test_a_token_of_no_share_is_never_drawn() -> None:
    sampler = Sampler(1.0)
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    assert {int(sampler.tokens(logits, [0])[0, 0]) for _ in range(200)} == {1, 3}


def test_draws_belong_to_the_prompts_number_not_to_its_company() -> None:
    logits = torch.zeros(3, 1000)
    together = Sampler(1.0, seed=5).tokens(logits, [0, 1, 2])[:, 0].tolist()
    alone = [int(Sampler(1.0, seed=5).tokens(logits[:1], [number])[0, 0]) for number in range(3)]
    assert together == alone
    assert len(set(together)) == 3
    assert Sampler(1.0, seed=6).tokens(logits, [0, 1, 2])[:, 0].tolist() != together


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("inf"), float("nan")])
def test_a_temperature_is_a_positive_number(temperature: float) -> None:
    with pytest.raises(InputError, match="temperature"):
        Sampler(temperature)


# ------------------------------------------------------------------------------------------------------------------ trials
def test_a_greedy_trial_is_the_evaluations_own_answer(base: Model) -> None:
    prompts = ["Write about tea.", "Say it.", "What is 23 plus 45?"]
    tokenizer = load_tokenizer(base.path)
    trial = Trial(base.path, dtype="float32")
    texts = [render(tokenizer, prompt, trial.template) for prompt in prompts]
    wanted = generate(load_model(base.path), tokenizer, texts, max_new_tokens=9, batch=3, exact=True)
    assert [trial.answer(prompt, max_tokens=9) for prompt in prompts] == wanted


def test_drawn_answers_depend_on_seed_and_place(base: Model) -> None:
    trial = Trial(base.path, dtype="float32")

    def said(**options: int) -> tuple[int, ...]:
        return trial.answer("Write.", max_tokens=12, temperature=2.0, **options).ids

    assert said(seed=1) == said(seed=1)
    assert len({said(seed=1), said(seed=2), said(seed=1, number=1)}) == 3
    # The plain twin: a batch of two prompts through the decoder says what each says alone.
    texts = [render(trial.tokenizer, "Write.", trial.template)] * 2
    tokens = prompt_tokens(trial.tokenizer, texts)
    decoder = Decoder(load_model(base.path), trial.tokenizer, tokens, max_new_tokens=12, sampler=Sampler(2.0, 1))
    assert [answer.ids for answer in decoder.answers([0, 1])] == [said(seed=1), said(seed=1, number=1)]


def test_pieces_together_are_the_answer(base: Model) -> None:
    trial = Trial(base.path, dtype="float32")
    for number in range(6):
        pieces: list[str] = []
        answer = trial.answer("Write.", max_tokens=40, temperature=3.0, number=number, told=pieces.append)
        assert "".join(pieces) == answer.text
        assert len(pieces) > 3


def test_half_a_character_waits_for_its_other_half(base: Model) -> None:
    tokenizer = load_tokenizer(base.path)
    text = "né 😀 ok"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    pieces: list[str] = []
    told = Pieces(tokenizer, pieces.append)
    for token in ids:
        told.add(token)
    told.end(text)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert len(ids) > len(pieces)


# ----------------------------------------------------------------------------------------------------------------- command
def call(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(cli, ["generate", *arguments, "--quiet", "--dtype", "float32", "--max-tokens", "8"], input=stdin)


def test_answers_as_text_and_as_json(tmp_path: Path, base: Model) -> None:
    other = str(tiny_model(tmp_path / "other", seed=5, tied=False))
    answer = Trial(base.path, dtype="float32").answer("Say tea.", max_tokens=8)
    shown = lines(answer.text) + ("" if answer.finished else " […]") + "\n"
    assert call(str(base.path), "Say tea.").output == shown
    assert call(str(base.path), "-", stdin="Say tea.\n").output == shown
    assert call(str(base.path), stdin="\nSay tea.\n \nSay tea.\n").output == 2 * shown, "a line each, empty ones left out"
    done = call(str(base.path), "Say tea.", "--compare", other, "--format", "json")
    row = json.loads(done.output)["generate"][0]
    assert row["prompt"] == "Say tea."
    assert row["answers"][0] == {
        "model": str(base.path), "text": answer.text, "tokens": answer.tokens, "finished": answer.finished,
    }  # fmt: skip
    assert row["answers"][1]["model"] == other
    assert row["answers"][1]["text"] != answer.text
    beside = call(str(base.path), "Say tea.", "--compare", other).output
    assert beside.count("│") + beside.count("┃") >= 6


def test_greedy_goes_before_a_temperature(base: Model) -> None:
    greedy, drawn = call(str(base.path), "Say.").output, call(str(base.path), "Say.", "--temperature", "3").output
    assert call(str(base.path), "Say.", "--temperature", "3", "--greedy").output == greedy != drawn
    assert call(str(base.path), "Say.", "--temperature", "3").output == drawn
    assert call(str(base.path), "Say.", "--temperature", "3", "--seed", "9").output != drawn


def test_the_merge_of_a_run(tmp_path: Path, base: Model, expert: Model, second_expert: Model) -> None:
    run = merged_run(tmp_path / "run", base, {"formats": expert, "arithmetic": second_expert})
    direct = call(str(run / "merged" / "conflict"), "Say tea.")
    assert direct.exit_code == 0
    assert call(str(run), "Say tea.").output == direct.output
    assert call(str(run), "Say tea.", "--recipe", "conflict").output == direct.output
    wrong = call(str(run), "Say tea.", "--recipe", "nonsense")
    assert isinstance(wrong.exception, InputError)


def test_templates(tmp_path: Path, base: Model) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages[0]['content'] }}!")
    own = call(str(base.path), "Say tea.", "--chat-template", str(file))
    assert (
        own.output
        == call(str(base.path), "Say tea.!", "--chat-template", "none").output
        != call(str(base.path), "Say tea.").output
    )
    assert isinstance(call(str(base.path), "Say tea.", "--chat-template", str(tmp_path / "none.jinja")).exception, InputError)


def test_control_characters_are_shown_not_obeyed() -> None:
    assert lines("a\x1b[2Jb\tc\nd\u202ee\x9b é 😀") == "a\\x1b[2Jb\\tc\nd\\u202ee\\x9b é 😀"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-", "-"], "once"),
        (["Say.", "--device", "nonsense"], "device"),
        (["x " * 600], "512 tokens"),
        (["Say.", "--seed", "-1"], "--seed"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused(base: Model, arguments: list[str], said: str) -> None:
    done = call(str(base.path), *arguments, stdin="x")
    assert done.exit_code in (1, 2)
    assert said in (str(done.exception) if isinstance(done.exception, InputError) else done.output)
