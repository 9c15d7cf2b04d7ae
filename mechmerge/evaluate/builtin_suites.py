"""The suites that the package makes itself: `formats`, `arithmetic` and `code`, with tiers of unseen wordings and of harder
prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from mechmerge.behaviors.code_prompts import code_tasks
from mechmerge.behaviors.prompts import Prompt, Tier, arithmetic_prompts, format_pairs, format_prompts, material
from mechmerge.behaviors.schema import Verifier, load_behavior
from mechmerge.errors import SchemaError
from mechmerge.evaluate.suites import Instruction, Suite, SuitePrompt

Split = Literal["test", "develop"]
CODE_TOKENS = 256
"""Longest answer of the code suite, in tokens."""
SUMS: dict[Tier, int] = {"seen": 120, "unseen": 60, "hard": 60}
"""Sums of the arithmetic suite, by tier."""


def _formats(split: Split) -> Suite:
    prompts: list[SuitePrompt] = []
    tokens = 0
    for name in material()["formats"]:
        verifier, longest = _judged(name)
        tokens = max(tokens, longest)
        unseen = format_prompts(name, split, "unseen")
        rows = format_prompts(name, split) + unseen[: len(unseen) // 2]
        prompts += [_builtin(row, f"{name}.{row.tier}.{row.topic}", name, verifier) for row in rows]
    for hard, pair in format_pairs(split):
        instructions = tuple(Instruction(verifier=_judged(name)[0]) for name in pair)
        prompts.append(
            SuitePrompt(
                id=f"{'+'.join(pair)}.hard.{hard.topic}", prompt=hard.text, instructions=instructions, group="pairs",
                tier="hard", topic=hard.topic,
            )
        )  # fmt: skip
    return Suite(name="formats", split=split, answer_tokens=tokens, prompts=tuple(prompts))


def _arithmetic(split: Split) -> Suite:
    verifier, tokens = _judged("arithmetic")
    prompts = []
    for row in [row for tier, n in SUMS.items() for row in arithmetic_prompts(split, n, tier)]:
        low, high = (int(operand) for operand in row.topic.split(","))
        group = "addition" if row.arguments["answer"] == low + high else "subtraction"
        prompts.append(_builtin(row, f"{group}.{row.tier}.{low}.{high}", group, verifier))
    return Suite(name="arithmetic", split=split, answer_tokens=tokens, prompts=tuple(prompts))


def _code(split: Split) -> Suite:
    prompts = []
    tiers: tuple[Literal["seen", "unseen"], ...] = ("seen", "unseen")
    for tier in tiers:
        for task in code_tasks(split, tier):
            instruction = Instruction(verifier=Verifier(name="python"), arguments=task.prompt.arguments)
            prompts.append(
                SuitePrompt(
                    id=f"{task.name}.{tier}", prompt=task.prompt.text, instructions=(instruction,), group=task.difficulty,
                    tier=tier, topic=task.prompt.topic,
                )
            )  # fmt: skip
    return Suite(name="code", split=split, answer_tokens=CODE_TOKENS, prompts=tuple(prompts))


def _judged(name: str) -> tuple[Verifier, int]:
    """The verifier of a built-in behaviour and its longest answer, in tokens."""
    behavior = load_behavior(name)
    if behavior.verifier is None:
        raise SchemaError(f"{name}.yaml", expected="a verifier", found="none")
    return behavior.verifier, behavior.answer_tokens


def _builtin(row: Prompt, name: str, group: str, verifier: Verifier) -> SuitePrompt:
    instruction = Instruction(verifier=verifier, arguments=row.arguments)
    return SuitePrompt(id=name, prompt=row.text, instructions=(instruction,), group=group, tier=row.tier, topic=row.topic)


SUITES: dict[str, Callable[[Split], Suite]] = {"formats": _formats, "arithmetic": _arithmetic, "code": _code}
"""Name → the suite of a split."""
