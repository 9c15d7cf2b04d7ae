"""Answers through lm-eval: a double of its interface, and its own transformers class as the twin of ours."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest
import torch

from mechmerge.behaviors.generation import generate
from mechmerge.errors import InputError, MissingError
from mechmerge.evaluate.backends import VLLM, EngineDecoder
from mechmerge.models.load import load_model, load_tokenizer
from tests.test_generation import PROMPTS, SYSTEM, lively, rendered
from tests.tiny import tiny_model


class Double:
    """What `generate_until` of an lm-eval model does, without a model."""

    max_length = 512

    def __init__(self, answer=None):
        self.calls = []
        self.answer = answer or (lambda prompt: f"said to {prompt}"[:20])

    def generate_until(self, requests, disable_tqdm=False):
        assert disable_tqdm
        self.calls.append(requests)
        turns = [re.sub(r"(?s).*<\|im_start\|>user\n(.*?)<\|im_end\|>.*", r"\1", request.args[0]) for request in requests]
        return [self.answer(turn) for turn in turns]


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base.path)


def test_what_lm_eval_is_asked(tokenizer):
    double = Double()
    decoder = EngineDecoder(double, tokenizer, rendered(tokenizer), max_new_tokens=30, ends={2, 1})
    answers = decoder.answers([3, 0])
    (call,) = double.calls
    assert [request.request_type for request in call] == ["generate_until"] * 2
    assert [request.args[0] for request in call] == [rendered(tokenizer)[3], rendered(tokenizer)[0]]
    options = {"until": ["<|im_start|>", "<|im_end|>"], "max_gen_toks": 30, "do_sample": False, "temperature": 0.0}
    assert all(request.args[1] == options for request in call)
    assert [answer.text for answer in answers] == ["said to River", "said to Describe tea"]
    assert double.add_bos_token is False
    assert decoder.answers([]) == []
    assert len(double.calls) == 1


def test_tokens_are_counted_and_special_ones_are_left_out(tokenizer):
    texts = iter(["", "tea<|endoftext|>", "tea tea tea tea tea tea tea"])
    double = Double(lambda _: next(texts))
    answers = EngineDecoder(double, tokenizer, ["a", "b", "c"], max_new_tokens=4, ends={2}, special_tokens=True).answers(
        [0, 1, 2]
    )
    assert [(answer.text[:3], answer.finished) for answer in answers] == [("", True), ("tea", True), ("tea", False)]
    assert answers[1].text == "tea"
    assert [answer.tokens for answer in answers][::2] == [1, 4]
    assert double.add_bos_token is True


def test_prompts_that_lm_eval_would_cut_are_refused(tokenizer):
    with pytest.raises(InputError, match="prompt 2: expected at most 512 tokens with the answer"):
        EngineDecoder(Double(), tokenizer, ["tea", "tea " * 300], max_new_tokens=100, ends={2})
    with pytest.raises(InputError, match="named: expected at least one token"):
        EngineDecoder(Double(), tokenizer, [""], max_new_tokens=100, ends={2}, names=["named"])


def test_vllm_is_an_extra(base):
    with pytest.raises(MissingError, match=r"backend vllm: .*pip install 'mechmerge\[vllm\]'") as caught:
        VLLM.load(base.path, "float32")
    assert caught.value.exit_code == 4
    with pytest.raises(MissingError, match="backend vllm"):
        VLLM.version()
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    assert {"vllm", "ifbench"} <= project["optional-dependencies"].keys(), "what errors name can be installed"


@pytest.mark.parametrize("batch", [1, 3])
def test_lm_evals_own_class_says_what_we_say(batch, tmp_path):
    """The code that drives vLLM, with the class of lm-eval that runs on a CPU; the model often ends by itself."""
    from lm_eval.models.huggingface import HFLM

    folder = tiny_model(tmp_path, "llama", tied=False)
    model, tokenizer = lively(load_model(folder)), load_tokenizer(folder)
    with torch.no_grad():
        model.lm_head.weight[1:3] *= 1.5
    model.save_pretrained(folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, 1], "pad_token_id": 0}))
    texts = rendered(tokenizer, [f"{prompt} {word}" for prompt in PROMPTS for word in ("tea", "7")], SYSTEM)
    ours = generate(load_model(folder), tokenizer, texts, max_new_tokens=12, share_prefix=True)
    assert {answer.finished for answer in ours} == {True, False}
    assert sum(answer.tokens > 3 for answer in ours) > 5
    lm = HFLM(pretrained=str(folder), dtype="float32", batch_size=batch, device="cpu", add_bos_token=False)
    theirs = EngineDecoder(lm, tokenizer, texts, max_new_tokens=12, ends={2, 1}).answers(range(len(texts)))
    assert [answer.text for answer in theirs] == [answer.text for answer in ours]
