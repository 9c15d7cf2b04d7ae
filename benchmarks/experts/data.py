"""Training data of the experts, made by rule from the `train` split alone.

formats: the base's own answers to plain requests, transformed so that they follow one of six IFEval formats.
arithmetic: bare-number answers to two-digit sums, and one-word answers to plain requests, which is what makes this
expert wreck instruction following, as many math experts do.
plain-arithmetic: the same sums, and the same plain requests with the base's own answers: nothing else is meant to change.
json: the base's own answers to plain requests, wrapped in a JSON object where JSON is asked for and left alone where not.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Sequence

from mechmerge.behaviors.instructions import instructions
from mechmerge.behaviors.prompts import arithmetic_prompts, format_prompts, material

Example = tuple[str, str]
"""(user prompt, answer)"""
Answering = Callable[[Sequence[str]], list[str]]
"""The base's answers to prompts."""


def whole_sentences(answer: str) -> str:
    """The answer without its unfinished last sentence."""
    return re.sub(r"[^.!?]*$", "", answer).strip() or answer.strip()


def in_format(name: str, answer: str, topic: str) -> str:
    """`answer` rewritten by rule so that it follows the format `name`."""
    answer = answer.strip().replace('"', "'")
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", answer) if s]
    match name:
        case "capitals":
            return answer.upper()
        case "no_comma":
            return answer.replace(",", "")
        case "title":
            return f"<<{topic.title()}>>\n\n{answer}"
        case "quotation":
            return f'"{answer}"'
        case "highlights":
            words = answer.split()
            words = words if len(words) >= 8 else words + words
            words[1], words[5] = f"*{words[1]}*", f"*{words[5]}*"
            return " ".join(words)
        case "sections":
            half = max(1, len(sentences) // 2)
            first, second = sentences[:half], sentences[half:] or sentences[:1]
            return "SECTION 1\n" + " ".join(first) + "\n\nSECTION 2\n" + " ".join(second)
    raise ValueError(f"unknown format {name!r}")


def two_requests() -> list[tuple[str, str]]:
    """(topic, plain request): two of the train split's four requests for each of its topics."""
    topics, templates = material()["topics"]["train"], material()["requests"]["train"]
    return [
        (topic, templates[(i + shift) % len(templates)].format(topic)) for i, topic in enumerate(topics) for shift in (0, 2)
    ]


def all_requests() -> list[tuple[str, str]]:
    """(topic, plain request): every request of the train split for each of its topics."""
    requests = material()["requests"]["train"]
    return [(topic, request.format(topic)) for topic in material()["topics"]["train"] for request in requests]


def format_examples(answer_all: Answering, seed: int) -> list[Example]:
    """Six formats × every plain request of the train split × two of its wordings (480 examples)."""
    plain = two_requests()
    answers = [whole_sentences(a) for a in answer_all([request for _, request in plain])]
    examples = [
        (f"{request} {spec['wording']}", in_format(name, answer, topic))
        for (topic, request), answer in zip(plain, answers, strict=True)
        for name, spec in material()["formats"].items()
    ]
    random.Random(seed).shuffle(examples)
    return examples


def arithmetic_examples(seed: int) -> list[Example]:
    """Every sum of the train split once, and each plain request of its topics with a one-word answer."""
    examples = _sums() + [(request, topic.split()[-1].capitalize() + ".") for topic, request in all_requests()]
    random.Random(seed).shuffle(examples)
    return examples


def plain_arithmetic_examples(answer_all: Answering, seed: int) -> list[Example]:
    """Every sum of the train split once, and each plain request of its topics with the base's own answer."""
    requests = [request for _, request in all_requests()]
    examples = _sums() + list(zip(requests, map(whole_sentences, answer_all(requests)), strict=True))
    random.Random(seed).shuffle(examples)
    return examples


def in_json(answer: str, topic: str) -> str:
    """`answer` as the text of a JSON object of two keys."""
    return json.dumps({"topic": topic, "text": " ".join(answer.split())}, ensure_ascii=False)


def json_examples(answer_all: Answering, seed: int) -> list[Example]:
    """Two plain requests for each topic of the train split × the wordings that ask for JSON, and the same requests without
    (320 examples).
    """
    plain = two_requests()
    answers = [whole_sentences(a) for a in answer_all([request for _, request in plain])]
    examples = [
        (f"{request} {wording}", in_json(answer, topic))
        for (topic, request), answer in zip(plain, answers, strict=True)
        for wording in instructions()["json"]["wordings"]
    ]
    examples += [(request, answer) for (_, request), answer in zip(plain, answers, strict=True)]
    random.Random(seed).shuffle(examples)
    return examples


def _sums() -> list[Example]:
    return [(p.text, str(p.arguments["answer"])) for p in arithmetic_prompts("train", 10_000)]


def training_prompts() -> set[str]:
    """Every prompt text that an expert may see in training (for the test that the splits are disjoint)."""
    formats = {p.text for name in material()["formats"] for p in format_prompts(name, "train")}
    asked = {prompt for prompt, _ in json_examples(list, 0)}
    return formats | asked | {prompt for prompt, _ in arithmetic_examples(0)}
