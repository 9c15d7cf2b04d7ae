"""The texts that a verdict on an answer is about: the answer itself, or IFEval's loose readings of it."""

from __future__ import annotations


def readings_of(answer: str, loose: bool) -> list[str]:
    """The texts of which one must pass, each once: the answer, or IFEval's eight loose ones in lm-eval's order."""
    if not loose:
        return [answer]
    lines = answer.split("\n")
    cut = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    return list(dict.fromkeys([answer, answer.replace("*", ""), *cut, *(text.replace("*", "") for text in cut)]))
