"""Greedy generation: a fixed plan of batches, and the answers of transformers itself."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechmerge.behaviors.chat import chat_template_of, render, template_digest
from mechmerge.behaviors.generation import MARGIN, Decoder, batches, end_tokens, generate, prompt_tokens
from mechmerge.behaviors.prompts import format_prompts
from mechmerge.errors import InputError
from mechmerge.models.load import load_model, load_tokenizer
from mechmerge.models.packed import load_packed
from mechmerge.models.references import resolve
from tests.conftest import REAL_CACHE
from tests.tiny import CHAT_TEMPLATE, tiny_model

PROMPTS = [
    "Describe tea.",
    "What is 23 plus 45?",
    "Write a title and a short text about the river, and the forest.",
    "River",
    "7 8",
]
FAMILIES = ["llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "gemma2", "gemma3_text", "olmo2", "phi3"]
SYSTEM = "{{ '<|im_start|>system\nYou are a river.<|im_end|>\n' }}" + CHAT_TEMPLATE


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


def rendered(tokenizer, prompts=PROMPTS, template=None):
    return [render(tokenizer, prompt, template or chat_template_of(tokenizer, "model")) for prompt in prompts]


def lively(model, seed=0):
    """A model as it was initialised says one token for ever; with larger matrices it wanders."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


@contextmanager
def saying(model, change):
    """Changes the logits [rows, 1, vocabulary] that a model gives."""
    hook = model.get_output_embeddings().register_forward_hook(lambda _module, _inputs, logits: change(logits.clone()))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def ending(model, ends):
    """Other end tokens for a model."""
    before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, ends
    try:
        yield
    finally:
        model.generation_config.eos_token_id = before


class Forwards:
    """Counts the tokens that a model is given, a row and a forward pass at a time."""

    def __init__(self, model):
        self.shapes = []
        self.hook = model.get_input_embeddings().register_forward_hook(lambda _m, inputs, _o: self.note(inputs[0]))

    def note(self, ids):
        self.shapes.append(tuple(ids.shape))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.hook.remove()

    @property
    def tokens(self):
        return sum(rows * width for rows, width in self.shapes)


@given(st.lists(st.integers(0, 50)), st.integers(1, 9))
def test_batches_partition_and_sort(lengths, batch):
    plan = batches(lengths, batch)
    flat = [i for rows in plan for i in rows]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[i] for i in flat] == sorted(lengths)
    assert all(len(rows) == batch for rows in plan[:-1])
    assert plan == batches(list(lengths), batch)


def ends_of(model, tokenizer, texts):
    """End tokens that make rows of a batch end at different steps."""
    first, second, *_ = [answer.ids for answer in generate(model, tokenizer, texts, max_new_tokens=24)]
    return [first[2], second[len(second) // 2]]


# ------------------------------------------------------------------------------------------------------- same as elsewhere
@pytest.mark.parametrize("share_prefix", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_equal_those_of_transformers(family, share_prefix, tmp_path):
    folder = tiny_model(tmp_path, family, tied=family in ("llama", "qwen2", "gpt2"))
    model, tokenizer = lively(load_model(folder)), load_tokenizer(folder)
    texts = rendered(tokenizer, template=SYSTEM)
    ends = ends_of(model, tokenizer, texts)
    with ending(model, ends):
        encoded = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        stops = {*ends, tokenizer.eos_token_id}
        expected = model.generate(**encoded, do_sample=False, max_new_tokens=24, eos_token_id=list(stops))
        answers = generate(model, tokenizer, texts, max_new_tokens=24, share_prefix=share_prefix)
    finished = []
    for answer, row in zip(answers, expected[:, encoded.input_ids.shape[1] :].tolist(), strict=True):
        length = next((i for i, token in enumerate(row) if token in stops), None)
        assert list(answer.ids) == row[:length]
        assert answer.finished == (length is not None)
        assert answer.end == (None if length is None else row[length])
        assert answer.tokens == len(answer.ids) + (length is not None)
        assert answer.text == tokenizer.decode(row[:length], skip_special_tokens=True)
        finished.append(length)
    assert len(set(finished)) > 1, "rows leave the batch at different steps"


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma3_text"])
def test_packed_models_say_the_same(family, tmp_path):
    """Weights of a size that a trained model has, on disk, so that both loaders read them."""
    folder = tiny_model(tmp_path, family, tied=False)
    lively(load_model(folder)).save_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    texts = rendered(tokenizer, template=SYSTEM)
    plain, packed = (
        generate(load(folder), tokenizer, texts, max_new_tokens=24, share_prefix=True) for load in (load_model, load_packed)
    )
    assert packed == plain
    assert len({answer.ids for answer in plain}) > 1


# ------------------------------------------------------------------------------------------------------------ shared prefix
def test_the_prefix_is_computed_once(loaded):
    model, tokenizer = loaded
    texts = rendered(tokenizer, template=SYSTEM)
    lengths = [len(ids) for ids in prompt_tokens(tokenizer, texts)]
    decoder = Decoder(model, tokenizer, prompt_tokens(tokenizer, texts), max_new_tokens=1, share_prefix=True)
    assert 10 < decoder.shared < min(lengths)
    with Forwards(model) as forwards:
        generate(model, tokenizer, texts, max_new_tokens=1, batch=2, share_prefix=True)
    widths = [max(lengths[i] for i in rows) - decoder.shared for rows in batches(lengths, 2)]
    assert forwards.shapes == [(1, decoder.shared), (2, widths[0]), (2, widths[1]), (1, widths[2])]


def test_a_prefix_leaves_a_token_of_every_prompt(loaded):
    """One prompt begins another, and equal prompts."""
    model, tokenizer = loaded
    long = rendered(tokenizer, ["river and forest and tea"])[0]
    for texts in ([long[:-9], long, long], [long, long]):
        alone = [generate(model, tokenizer, [text], max_new_tokens=9)[0] for text in texts]
        assert generate(model, tokenizer, texts, max_new_tokens=9, share_prefix=True) == alone


@pytest.mark.parametrize("prompts", [["River"], ["tea", "River"], []])
def test_no_prefix_is_shared_where_there_is_none(loaded, prompts):
    model, tokenizer = loaded
    decoder = Decoder(model, tokenizer, prompt_tokens(tokenizer, prompts), max_new_tokens=4, share_prefix=True)
    assert decoder.shared == 0


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_texts_longer_than_a_sliding_window_share_nothing(family, tmp_path):
    folder = tiny_model(tmp_path, family, tied=False)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": 16}))
    model, tokenizer = lively(load_model(folder)), load_tokenizer(folder)
    texts = rendered(tokenizer, template=SYSTEM)
    decoder = Decoder(model, tokenizer, prompt_tokens(tokenizer, texts), max_new_tokens=12, share_prefix=True)
    assert decoder.shared == 0
    encoded = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    expected = model.generate(**encoded, do_sample=False, max_new_tokens=12, eos_token_id=[319])
    with ending(model, 319):
        answers = generate(model, tokenizer, texts, max_new_tokens=12, share_prefix=True)
    for answer, row in zip(answers, expected[:, encoded.input_ids.shape[1] :].tolist(), strict=True):
        assert list(answer.ids) == row[: len(answer.ids)]


# ------------------------------------------------------------------------------------------------------------------- exact
@pytest.mark.parametrize("seed", range(4))
def test_the_batch_does_not_matter_when_exact(base, seed):
    model, tokenizer = lively(load_model(base.path), seed), load_tokenizer(base.path)
    texts = rendered(tokenizer, [f"{prompt} {word}" for prompt in PROMPTS for word in ("tea", "7", "of the river")])
    one, *others = [
        generate(model, tokenizer, texts, max_new_tokens=12, batch=batch, exact=True, share_prefix=share)
        for batch, share in ((1, False), (3, True), (7, False), (24, True))
    ]
    assert others == [one] * 3
    assert len({answer.ids for answer in one}) > 4


@pytest.mark.slow
def test_the_batch_does_not_matter_for_the_real_model_when_exact(monkeypatch):
    """SmolLM2 with packed layers, prompts of the formats suite."""
    monkeypatch.setenv("MECHMERGE_CACHE", REAL_CACHE or str(Path.home() / ".cache" / "mechmerge"))
    folder = resolve("demo:smollm2-135m-instruct").path
    model, tokenizer = load_packed(folder), load_tokenizer(folder)
    texts = rendered(tokenizer, [prompt.text for prompt in format_prompts("sections", "develop")[:12]])
    one, *others = [
        generate(model, tokenizer, texts, max_new_tokens=24, batch=batch, exact=True, share_prefix=share)
        for batch, share in ((1, False), (3, True), (7, True), (24, False))
    ]
    assert others == [one] * 3
    assert sum(answer.tokens for answer in one) > 100


def tied_in_pairs(noise):
    """Logits of which tokens 2k and 2k + 1 are equal but for a noise (relative to the largest) that depends on the batch."""

    def change(logits):
        logits[..., 1::2] = logits[..., ::2]
        logits[..., 1::2] += (noise if len(logits) > 1 else -noise) * logits.abs().max()
        return logits

    return change


def test_exact_settles_what_rounding_would_decide(loaded):
    """A noise as small as rounding turns every answer over with the batch; with `exact` none."""
    model, tokenizer = loaded
    texts = rendered(tokenizer)
    said = {}
    with saying(model, tied_in_pairs(MARGIN / 8)):
        for exact in (False, True):
            for batch in (1, 4):  # the fifth prompt is alone in both plans
                said[exact, batch] = generate(model, tokenizer, texts, max_new_tokens=4, batch=batch, exact=exact)
    assert said[True, 1] == said[True, 4] == said[False, 1]
    assert said[False, 1] != said[False, 4]


def test_exact_refuses_a_model_that_batching_moves_too_far(loaded):
    model, tokenizer = loaded
    with (
        saying(model, tied_in_pairs(MARGIN * 0.4)),
        pytest.raises(InputError, match=r"prompt .*: expected logits that batching moves by at most"),
    ):
        generate(model, tokenizer, rendered(tokenizer), max_new_tokens=4, exact=True)


def test_only_near_ties_are_computed_again(loaded):
    model, tokenizer = loaded
    texts = rendered(tokenizer)
    with Forwards(model) as plain:
        generate(model, tokenizer, texts, max_new_tokens=6)
    with Forwards(model) as exact:
        generate(model, tokenizer, texts, max_new_tokens=6, exact=True)
    assert exact.shapes == plain.shapes
    with saying(model, tied_in_pairs(0.0)), Forwards(model) as ties:
        answers = generate(model, tokenizer, texts, max_new_tokens=6, exact=True)
    assert sum(width > 1 for _, width in ties.shapes[1:]) == sum(answer.tokens for answer in answers)


def test_exact_needs_float32(base):
    model, tokenizer = load_model(base.path, "bfloat16"), load_tokenizer(base.path)
    with pytest.raises(InputError, match="exact: expected a model in float32; found bfloat16"):
        generate(model, tokenizer, ["tea"], max_new_tokens=2, exact=True)


# ------------------------------------------------------------------------------------------------------- order and limits
def test_answers_come_in_the_order_of_the_prompts(loaded):
    model, tokenizer = loaded
    texts = rendered(tokenizer)
    forwards = generate(model, tokenizer, texts, max_new_tokens=8, batch=2)
    backwards = generate(model, tokenizer, texts[::-1], max_new_tokens=8, batch=2)
    assert backwards == forwards[::-1]
    assert len({answer.ids for answer in forwards}) > 1


def test_rows_that_are_done_leave(loaded):
    model, tokenizer = loaded
    texts = rendered(tokenizer)
    with ending(model, ends_of(model, tokenizer, texts)), Forwards(model) as forwards:
        answers = generate(model, tokenizer, texts, max_new_tokens=24)
    steps = [rows for rows, _ in forwards.shapes]
    assert sum(steps) == sum(answer.tokens for answer in answers)
    assert steps == sorted(steps, reverse=True)
    assert len(set(steps)) > 1


def test_the_limit_of_tokens_and_progress(loaded):
    model, tokenizer = loaded
    recorder = Recorder()
    answers = generate(model, tokenizer, rendered(tokenizer), max_new_tokens=3, batch=2, progress=recorder, label="asking")
    assert all(answer.tokens <= 3 for answer in answers)
    assert all(answer.tokens == 3 for answer in answers if not answer.finished)
    assert recorder.started == [("asking", 5)]
    assert (recorder.done, recorder.ended) == (5, 1)


def test_small_things(loaded):
    """No prompt, prompts of one token, an answer of one token."""
    model, tokenizer = loaded
    assert generate(model, tokenizer, [], max_new_tokens=3) == []
    assert Decoder(model, tokenizer, [[5], [6]], max_new_tokens=3).answers([]) == []
    assert prompt_tokens(tokenizer, ["7", "8"]) == [[one] for (one,) in prompt_tokens(tokenizer, ["7", "8"])]
    short = generate(model, tokenizer, ["7", "8"], max_new_tokens=5, share_prefix=True)
    assert short == [generate(model, tokenizer, [text], max_new_tokens=5)[0] for text in ("7", "8")]
    ones = generate(model, tokenizer, rendered(tokenizer), max_new_tokens=1)
    full = generate(model, tokenizer, rendered(tokenizer), max_new_tokens=8)
    assert [answer.ids for answer in ones] == [answer.ids[:1] for answer in full]


def test_end_tokens_are_those_of_the_config_and_of_the_tokenizer(loaded):
    model, tokenizer = loaded
    for configured, expected in ((None, {2}), (7, {2, 7}), ([7, 9], {2, 7, 9})):
        with ending(model, configured):
            assert end_tokens(model, tokenizer) == expected


def test_any_end_token_of_the_config_ends_an_answer(loaded):
    model, tokenizer = loaded
    free = generate(model, tokenizer, rendered(tokenizer), max_new_tokens=6)[0]
    with ending(model, [318, free.ids[3]]):
        answer = generate(model, tokenizer, rendered(tokenizer), max_new_tokens=6)[0]
    first = free.ids.index(free.ids[3])
    assert (answer.ids, answer.finished, answer.end) == (free.ids[:first], True, free.ids[3])


# ---------------------------------------------------------------------------------------------------------------- bad input
def only(token):
    def change(logits):
        logits[..., token] = logits.max() + 1
        return logits

    return change


@pytest.mark.parametrize("token", [0, 1])
def test_a_model_that_only_says_padding_or_special_tokens(loaded, token):
    """Nothing to read, every token counted, cut at the limit."""
    model, tokenizer = loaded
    with saying(model, only(token)):
        answers = generate(model, tokenizer, rendered(tokenizer), max_new_tokens=5)
    assert [(answer.text, answer.tokens, answer.finished) for answer in answers] == [("", 5, False)] * 5


def test_a_model_that_ends_at_once(loaded):
    model, tokenizer = loaded
    with saying(model, only(2)), Forwards(model) as forwards:
        answers = generate(model, tokenizer, rendered(tokenizer), max_new_tokens=5)
    assert [(answer.text, answer.tokens, answer.finished) for answer in answers] == [("", 1, True)] * 5
    assert len(forwards.shapes) == 1


def test_a_tokenizer_without_a_padding_token(loaded):
    model, tokenizer = loaded
    expected = generate(model, tokenizer, rendered(tokenizer), max_new_tokens=6)
    before, tokenizer.pad_token = tokenizer.pad_token, None
    try:
        assert generate(model, tokenizer, rendered(tokenizer), max_new_tokens=6) == expected
    finally:
        tokenizer.pad_token = before


def test_a_prompt_that_does_not_fit_is_refused_before_any_answer(loaded):
    model, tokenizer = loaded
    with (
        Forwards(model) as forwards,
        pytest.raises(InputError, match=r"prompt 2: expected at most 512 tokens .*; found \d+ \(\d+ of the prompt, 500 of"),
    ):
        generate(model, tokenizer, ["tea", "tea " * 300], max_new_tokens=500, batch=1)
    assert forwards.shapes == []
    longest = Decoder(model, tokenizer, [[5] * 500], max_new_tokens=12)
    assert longest.answers([0])[0].tokens <= 12
    with pytest.raises(InputError, match="my own name: "):
        Decoder(model, tokenizer, [[5] * 501], max_new_tokens=12, names=["my own name"])


def test_a_prompt_without_tokens_is_refused(loaded):
    model, tokenizer = loaded
    with pytest.raises(InputError, match="prompt 2: expected at least one token"):
        generate(model, tokenizer, ["tea", ""], max_new_tokens=5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_name_the_prompt(loaded, value):
    """An embedding that only one prompt meets, the shorter one of its batch."""
    model, tokenizer = loaded
    marked = prompt_tokens(tokenizer, ["z"])[0][0]
    texts = rendered(tokenizer)
    texts[3] += "z"

    def broken(_module, inputs, states):
        return states.masked_fill((inputs[0] == marked)[..., None], value)

    hook = model.get_input_embeddings().register_forward_hook(broken)
    try:
        with pytest.raises(InputError, match="prompt 4: expected finite logits; found nan at token 1 of the answer"):
            generate(model, tokenizer, texts, max_new_tokens=5)
    finally:
        hook.remove()


# ---------------------------------------------------------------------------------------------------------------- templates
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


def test_prompts_are_tokenized_as_they_are_rendered(loaded):
    _, tokenizer = loaded
    texts = rendered(tokenizer)
    assert prompt_tokens(tokenizer, texts) == [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    assert prompt_tokens(tokenizer, []) == []
