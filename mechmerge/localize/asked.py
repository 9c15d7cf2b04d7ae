"""Prompts of a behaviour as they are put to a model, and the verdicts on what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mechmerge.behaviors.chat import chat_template_of, render
from mechmerge.behaviors.generation import Answer, generate
from mechmerge.behaviors.schema import Behavior, Pair
from mechmerge.behaviors.verifiers import verify
from mechmerge.localize.bench import Bench


@dataclass(frozen=True)
class Asked:
    """Prompts that ask for a behaviour (x⁺), rendered."""

    behavior: Behavior
    pairs: tuple[Pair, ...]
    texts: tuple[str, ...]
    special_tokens: bool
    """Whether the tokenizer adds its own special tokens (right only without a chat template)."""

    @property
    def topics(self) -> tuple[str, ...]:
        """The topic of each prompt; a prompt that names none is one of its own."""
        return tuple(pair.topic or pair.with_ for pair in self.pairs)

    def first(self, count: int) -> Asked:
        """The first `count` prompts."""
        return Asked(self.behavior, self.pairs[:count], self.texts[:count], self.special_tokens)

    def prompts(self, bench: Bench) -> list[list[int]]:
        """Token ids of each prompt."""
        encoded: list[list[int]] = bench.tokenizer(list(self.texts), add_special_tokens=self.special_tokens).input_ids
        return encoded

    def answers(self, bench: Bench) -> list[Answer]:
        """Greedy answers of the model as it stands on the bench, made in one batch."""
        return generate(
            bench.module,
            bench.tokenizer,
            self.texts,
            max_new_tokens=self.behavior.answer_tokens,
            batch=len(self.texts),
            special_tokens=self.special_tokens,
        )

    def verdicts(self, answers: Sequence[Answer]) -> list[bool]:
        """Which answers the behaviour's verifier passes; empty without a verifier."""
        verifier = self.behavior.verifier
        if verifier is None:
            return []
        return [verify(verifier, p.with_, a.text, p.arguments) for a, p in zip(answers, self.pairs, strict=True)]


def ask(bench: Bench, behavior: Behavior, pairs: Sequence[Pair]) -> Asked:
    """Renders pairs' prompts with the behaviour's chat template."""
    template = chat_template_of(bench.tokenizer, behavior.chat_template)
    texts = tuple(render(bench.tokenizer, pair.with_, template) for pair in pairs)
    return Asked(behavior, tuple(pairs), texts, template is None)
