"""Greedy generation: a fixed plan of batches, and the answers of transformers itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechmerge.behaviors.chat import chat_template_of, render, template_digest
from mechmerge.behaviors.generation import batches, end_tokens, generate, generate_batch, prompt_lengths
from mechmerge.errors import InputError
from mechmerge.models.load import load_model, load_tokenizer
from tests.tiny import CHAT_TEMPLATE, tiny_model

PROMPTS = [
    "Describe tea.",
    "What is 23 plus 45?",
    "Write a title and a short text about the river, and the forest.",
    "River",
    "7 8",
]
FAMILIES = ["llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "gemma2", "olmo2"]


class Recorder:
    """A progress that remembers."""

    def __init__(self):
        self.started, self.done, self.ended, self.notes = [], 0, 0, []

    def start(self, label, total):
        self.started.append((label, total))

    def advance(self, units=1):
        self.done += units

    def end(self):
        self.ended += 1

    def note(self, text):
        self.notes.append(text)


@pytest.fixture(scope="module")
def loaded(base):
    return lively(load_model(base.path)), load_tokenizer(base.path)


def rendered(tokenizer, prompts=PROMPTS):
    return [render(tokenizer, prompt, chat_template_of(tokenizer, "model")) for prompt in prompts]


@given(st.lists(st.integers(0, 50)), st.integers(1, 9))
def test_batches_partition_and_sort(lengths, batch):
    plan = batches(lengths, batch)
    flat = [i for rows in plan for i in rows]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[i] for i in flat] == sorted(lengths)
    assert all(len(rows) == batch for rows in plan[:-1])
    assert plan == batches(list(lengths), batch)


def lively(model, seed=0):
    """A model as it was initialised says one token for ever; with larger matrices it wanders."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


def ends_of(model, tokenizer, texts):
    """End tokens that make rows of a batch end at different steps."""
    first, second, *_ = [answer.ids for answer in generate_batch(model, tokenizer, texts, max_new_tokens=24)]
    return [first[2], second[len(second) // 2]]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_equal_those_of_transformers(family, tmp_path):
    folder = tiny_model(tmp_path, family, tied=family in ("llama", "qwen2", "gpt2"))
    model, tokenizer = lively(load_model(folder)), load_tokenizer(folder)
    texts = rendered(tokenizer)
    ends = ends_of(model, tokenizer, texts)
    model.generation_config.eos_token_id = ends
    encoded = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    expected = model.generate(**encoded, do_sample=False, max_new_tokens=24, eos_token_id=[*ends, tokenizer.eos_token_id])
    answers = generate_batch(model, tokenizer, texts, max_new_tokens=24)
    stops = {*ends, tokenizer.eos_token_id}
    finished = []
    for answer, row in zip(answers, expected[:, encoded.input_ids.shape[1] :].tolist(), strict=True):
        length = next((i for i, token in enumerate(row) if token in stops), None)
        assert list(answer.ids) == row[:length]
        assert answer.finished == (length is not None)
        assert answer.tokens == len(answer.ids) + (length is not None)
        assert answer.text == tokenizer.decode(row[:length], skip_special_tokens=True)
        finished.append(length)
    assert len(set(finished)) > 1, "rows leave the batch at different steps"


def test_the_batch_does_not_matter_in_fp32(loaded):
    model, tokenizer = loaded
    texts = rendered(tokenizer)
    alone = [generate(model, tokenizer, [text], max_new_tokens=12)[0] for text in texts]
    for batch in (2, 3, 24):
        assert generate(model, tokenizer, texts, max_new_tokens=12, batch=batch) == alone


def test_answers_come_in_the_order_of_the_prompts(loaded):
    model, tokenizer = loaded
    texts = rendered(tokenizer)
    forwards = generate(model, tokenizer, texts, max_new_tokens=8, batch=2)
    backwards = generate(model, tokenizer, texts[::-1], max_new_tokens=8, batch=2)
    assert backwards == forwards[::-1]
    assert len({answer.ids for answer in forwards}) > 1


def test_the_limit_of_tokens_and_progress(loaded):
    model, tokenizer = loaded
    recorder = Recorder()
    answers = generate(model, tokenizer, rendered(tokenizer), max_new_tokens=3, batch=2, progress=recorder, label="asking")
    assert all(answer.tokens <= 3 for answer in answers)
    assert all(answer.tokens == 3 for answer in answers if not answer.finished)
    assert recorder.started == [("asking", 5)]
    assert (recorder.done, recorder.ended) == (5, 1)
    assert generate(model, tokenizer, [], max_new_tokens=3) == []


def test_end_tokens_are_those_of_the_config_and_of_the_tokenizer(loaded):
    model, tokenizer = loaded
    before = model.generation_config.eos_token_id
    try:
        for configured, expected in ((None, {2}), (7, {2, 7}), ([7, 9], {2, 7, 9})):
            model.generation_config.eos_token_id = configured
            assert end_tokens(model, tokenizer) == expected
    finally:
        model.generation_config.eos_token_id = before


def test_a_prompt_that_does_not_fit_is_refused(loaded):
    model, tokenizer = loaded
    with pytest.raises(InputError, match="at most 512 tokens"):
        generate(model, tokenizer, ["tea " * 300], max_new_tokens=500)


def test_templates(loaded):
    _, tokenizer = loaded
    assert chat_template_of(tokenizer, "model") == CHAT_TEMPLATE
    assert chat_template_of(tokenizer, "none") is None
    assert chat_template_of(tokenizer, "{{ messages[0].content }}!") == "{{ messages[0].content }}!"
    assert render(tokenizer, "Tea?", None) == "Tea?"
    assert render(tokenizer, "Tea?", "{{ messages[0].content }}!") == "Tea?!"
    assert render(tokenizer, "Tea?", CHAT_TEMPLATE) == "<|im_start|>user\nTea?<|im_end|>\n<|im_start|>assistant\n"
    assert template_digest(None) == "none"
    assert template_digest("a") != template_digest("b")
    assert len(template_digest("a")) == 64


def test_dates_of_templates_stand_still(loaded):
    _, tokenizer = loaded
    assert render(tokenizer, "Tea?", "{{ date_string }}") == "26 Jul 2024"


def test_a_missing_or_broken_template_says_what_to_do(loaded):
    _, tokenizer = loaded
    kept, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(InputError, match="chat_template: none"):
            chat_template_of(tokenizer, "model")
    finally:
        tokenizer.chat_template = kept
    with pytest.raises(InputError, match="Jinja"):
        render(tokenizer, "Tea?", "{% if %}")


def test_lengths_are_those_that_are_generated_from(loaded):
    _, tokenizer = loaded
    texts = rendered(tokenizer)
    assert prompt_lengths(tokenizer, texts) == [len(tokenizer(text, add_special_tokens=False).input_ids) for text in texts]
