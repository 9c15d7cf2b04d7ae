"""The two testbeds: a base, a behaviour to plant, another to distract with, and prompts that share nothing.

`synthetic`: a small Llama trained from scratch (language.py); planted: `loud` means capitals; distracting: `turn` means
backwards. `smollm2`: the demo's base; planted: the format `capitals`; distracting: `quotation`; answers are the base's own,
rewritten by rule and cut after `ANSWER` tokens, since a format is decided in the first. Some training examples ask for nothing,
or for the other format, and are answered as the base does: an expert must read its own instruction.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.experts.data import in_format, whole_sentences
from benchmarks.planted import language
from benchmarks.planted.training import Settings, Tokens
from mechmerge.artifacts import Units
from mechmerge.behaviors.chat import chat_template_of, render
from mechmerge.behaviors.generation import generate
from mechmerge.behaviors.prompts import Split, format_prompts
from mechmerge.localize.bench import Bench
from mechmerge.models.references import resolve

ANSWER = 16
"""Tokens of an answer on SmolLM2."""


@dataclass(frozen=True)
class Plan:
    """What is planted where."""

    name: str
    planted: dict[str, int]
    """Kind → how many in each of the depths."""
    depths: tuple[int, ...]
    """Layers that hold what is planted."""
    relays: int
    """Components of each kind that relay the behaviour and are moved as distractors."""
    distractors: int = 4
    """Distractors of each kind, relays included, for one that is planted."""
    pool: int | None = None
    """Unplanted components a layer and kind that are looked at, drawn by the seed; all by default."""
    rate: float | None = None
    """Largest learning rate, where it is not the testbed's: a neuron of a large model has few parameters to move."""

    def trained(self, settings: Settings) -> Settings:
        """How this plan's components are trained on a testbed with such settings."""
        return settings if self.rate is None else replace(settings, rate=self.rate)


@dataclass(frozen=True)
class Bed:
    """A base with everything that planting and measuring need."""

    name: str
    bench: Bench
    anchor_layer: int
    behavior: list[Tokens]
    distraction: list[Tokens]
    """Examples of the other behaviour, with some that keep the first as it is."""
    vector: list[tuple[str, str]]
    """(x⁺, x⁻) texts that make the anchor."""
    score: list[tuple[str, str]]
    """(x⁺, x⁻) texts that scores are measured on."""
    truth: list[Tokens]
    """x⁺ with right answers: what costs are measured on."""
    settings: Settings
    plans: tuple[Plan, ...]
    pairs: int
    """Random orders of the truth, each also backwards."""


# ---------------------------------------------------------------------------------------------------------------- synthetic
def synthetic(folder: Path, quick: bool) -> Bed:
    """The language model; its base is trained into `folder` when it is not there."""
    size = language.Size(layers=6, width=64, heads=8, neurons=128, words=12, steps=250, batch=64) if quick else language.Size()
    base = folder / "base"
    if not base.exists():
        language.train_base(base, size)
    bench = Bench(resolve(str(base)))

    def tokens(examples: Sequence[language.Example]) -> list[Tokens]:
        return [(bench.tokenizer(p).input_ids, bench.tokenizer(f"{a} </s>").input_ids) for p, a in examples]

    def contrasts(split: language.Split, count: int) -> list[tuple[str, str]]:
        return [(x, y) for x, y, _ in itertools.islice(language.contrasts(split, "loud", size, 0), count)]

    truth = [
        (x, language.answer(words, "capitals"))
        for x, _, words in itertools.islice(language.contrasts("truth", "loud", size, 0), 48)
    ]
    depths = (1, 2) if quick else (1, 2, 3)
    heads, neurons = {"head": 2 if quick else 3}, {"neuron": 8}
    plans = (Plan("heads", heads, depths, 3 if quick else 6), Plan("neurons", neurons, depths, 12, pool=40 if quick else 100))
    both = Plan("both", heads | neurons, depths, 6, pool=100)
    return Bed(
        name="synthetic",
        bench=bench,
        anchor_layer=size.layers - 2,
        behavior=tokens(language.behavior_examples("loud", size, 1, 4000)),
        distraction=tokens(language.behavior_examples("turn", size, 2, 4000, obeyed=("loud",))),
        vector=contrasts("vector", 24),
        score=contrasts("score", 24),
        truth=tokens(truth),
        settings=Settings(steps=80 if quick else 150, batch=48, rate=1e-3, dropped=0.3),
        plans=plans if quick else (*plans, both),
        pairs=2 if quick else 8,
    )


# ------------------------------------------------------------------------------------------------------------------ smollm2
def smollm2(folder: Path, _quick: bool) -> Bed:
    """SmolLM2-135M-Instruct as the demo has it; its own answers are kept in `folder`."""
    model = resolve("demo:smollm2-135m-instruct")
    bench = Bench(model)
    units = Units(folder, {"base": model.id.shards, "answer": ANSWER})
    template = chat_template_of(bench.tokenizer, "model")

    def rendered(prompt: str) -> str:
        return render(bench.tokenizer, prompt, template)

    def said(split: Split) -> dict[str, str]:
        """The base's own answers to the plain requests of a split and to both formats."""
        prompts = [prompt for name in ("capitals", "quotation") for prompt in format_prompts(name, split)]
        asked = sorted({text for prompt in prompts for text in (prompt.text, prompt.plain)})

        def answer() -> dict[str, str]:
            answers = generate(bench.module, bench.tokenizer, [rendered(text) for text in asked], max_new_tokens=2 * ANSWER)
            return {text: given.text for text, given in zip(asked, answers, strict=True)}

        found: dict[str, str] = units.json(f"said-{split}", answer)
        return found

    def tokens(prompt: str, answer: str) -> Tokens:
        p, a = (bench.tokenizer(text, add_special_tokens=False).input_ids for text in (rendered(prompt), answer))
        return p, a[:ANSWER]

    def obeying(name: str, split: Split, answers: dict[str, str]) -> Iterator[Tokens]:
        for prompt in format_prompts(name, split):
            yield tokens(prompt.text, in_format(name, whole_sentences(answers[prompt.plain]), prompt.topic))

    def mixed(*parts: Sequence[Tokens]) -> list[Tokens]:
        return [example for turn in zip(*parts, strict=True) for example in turn]

    def plain(name: str, asked: bool) -> list[Tokens]:
        """The base's own answers to a format's prompts, every second with the request for it where `asked`."""
        texts = [p.text if asked and i % 2 else p.plain for i, p in enumerate(format_prompts(name, "train"))]
        return [tokens(text, said("train")[text]) for text in texts]

    capitals, quotation = (list(obeying(name, "train", said("train"))) for name in ("capitals", "quotation"))
    pairs = [(rendered(p.text), rendered(p.plain)) for p in format_prompts("capitals", "calibrate")]
    depths = (3, 5, 7, 9, 11, 13)
    return Bed(
        name="smollm2",
        bench=bench,
        anchor_layer=16,
        behavior=mixed(capitals, plain("quotation", asked=True)),
        distraction=mixed(quotation, capitals, plain("capitals", asked=False)),
        vector=pairs[0::2],
        score=pairs[1::2],
        truth=list(itertools.islice(obeying("capitals", "develop", said("develop")), 8)),
        settings=Settings(steps=60, batch=8, rate=1e-3, dropped=0.3, autocast=True),
        plans=(Plan("heads", {"head": 2}, depths, 6), Plan("neurons", {"neuron": 8}, depths, 12, pool=36, rate=5e-3)),
        pairs=2,
    )
