"""The prompts of the built-in behaviours and suites, by split.

Splits share neither a topic, nor a plain request, nor an unordered pair of operands; the IFEval wording of an
instruction is the same everywhere. Wordings that no training saw are a tier of their own ("unseen"; those of develop are not
those of test), and so is what is harder than anything that was trained ("hard"): two formats at once, and sums of three digits.
Instructions are worded as in IFEval (https://arxiv.org/abs/2311.07911, table 4).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

Split = Literal["train", "calibrate", "develop", "test"]
Tier = Literal["seen", "unseen", "hard"]
TIERS: tuple[Tier, ...] = ("seen", "unseen", "hard")
SPLITS: tuple[Split, ...] = ("train", "calibrate", "develop", "test")


@dataclass(frozen=True)
class Prompt:
    """One prompt with what is needed to judge its answer."""

    text: str
    """What the user says."""
    plain: str
    """The same request without the instruction (the x⁻ of a contrast)."""
    behavior: str
    """The behaviour that the instruction asks for."""
    tier: Tier
    """`seen`: worded as the demo's experts were trained on; `unseen`: worded otherwise; `hard`: more than was trained."""
    topic: str
    """What the prompt is about; prompts of one topic are one cluster in statistics."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of the verifier that belong to this prompt alone (the answer of a sum)."""


@functools.cache
def material() -> dict[str, Any]:
    """The parsed `data/prompts.yaml`."""
    text = importlib.resources.files("mechmerge.behaviors").joinpath("data/prompts.yaml").read_text("utf-8")
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def requests(split: Split) -> list[tuple[str, str]]:
    """Plain requests of a split as (topic, request), one for each topic; requests take turns."""
    templates = material()["requests"][split]
    return [(topic, templates[i % len(templates)].format(topic)) for i, topic in enumerate(material()["topics"][split])]


def format_prompts(name: str, split: Split, tier: Literal["seen", "unseen"] = "seen") -> list[Prompt]:
    """The prompts of one format (`capitals`, `no_comma`, ...), one a topic of the split; `unseen` of develop and test alone."""
    spec = material()["formats"][name]
    wordings = [spec["wording"]] if tier == "seen" else spec["unseen"][split]
    return [
        Prompt(f"{plain} {wordings[i % len(wordings)]}", plain, name, tier, topic)
        for i, (topic, plain) in enumerate(requests(split))
    ]


def format_pairs(split: Split) -> list[tuple[Prompt, tuple[str, str]]]:
    """The hard tier of the formats: two formats at once, two prompts a topic of the split; all pairs of formats take turns."""
    formats = material()["formats"]
    pairs = list(itertools.combinations(formats, 2))
    made = []
    for i, (topic, plain) in enumerate(requests(split)):
        for turn in (2 * i, 2 * i + 1):
            first, second = pairs[turn % len(pairs)]
            text = f"{plain} {formats[first]['wording']} {formats[second]['wording']}"
            made.append((Prompt(text, plain, "formats", "hard", topic), (first, second)))
    return made


def operands_split(a: int, b: int) -> Split:
    """The split that the unordered pair {a, b} belongs to, by hash: 60 % train, 20 % calibrate, 10 % develop, 10 % test."""
    low, high = sorted((a, b))
    bucket = hashlib.sha256(f"{low},{high}".encode()).digest()[0] % 10
    return "train" if bucket < 6 else "calibrate" if bucket < 8 else "develop" if bucket == 8 else "test"


def operand_pairs(split: Split, hard: bool = False) -> Iterator[tuple[int, int]]:
    """Unordered pairs of operands of a split as (low, high), in an order fixed by hash: all of two digits or, where `hard`,
    some of three.
    """
    if hard:  # a grid that is coarse enough to be sorted at once; both steps are primes, so that all last digits occur
        pairs = [(a, b) for a in range(101, 1000, 13) for b in range(a + 7, 1000, 17) if operands_split(a, b) == split]
    else:
        pairs = [(a, b) for a in range(10, 100) for b in range(a, 100) if operands_split(a, b) == split]
    return iter(sorted(pairs, key=lambda p: hashlib.sha256(f"order {p[0]},{p[1]}".encode()).digest()))


def arithmetic_prompts(split: Split, n: int, tier: Tier = "seen") -> list[Prompt]:
    """`n` additions and subtractions (taking turns; the larger operand first in a subtraction), of two digits or, in the tier
    `hard`, of three.
    """
    spec = material()["arithmetic"]
    wordings = spec["unseen"][split] if tier == "unseen" else [spec["wording"]]
    plain = requests("calibrate" if split == "calibrate" else split)
    pairs = list(operand_pairs(split, hard=tier == "hard"))
    if tier == "unseen":
        pairs.reverse()
    prompts = []
    for i, (low, high) in enumerate(pairs[:n]):
        first, sign, second, answer = (low, "+", high, low + high) if i % 2 == 0 else (high, "-", low, high - low)
        topic = plain[i % len(plain)][0]
        prompts.append(
            Prompt(
                text=wordings[(i // 2) % len(wordings)].format(first, sign, second),
                plain=spec["plain"][0].format(topic),
                behavior="arithmetic",
                tier=tier,
                topic=f"{low},{high}",
                arguments={"answer": answer},
            )
        )
    return prompts
