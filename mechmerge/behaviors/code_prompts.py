"""The prompts of the built-in suite `code`: small Python functions, judged by running them (`sandbox`).

The tasks are original to this package (`data/code_tasks.yaml`): families of one task each in several sizes. Splits never
share a family. As in `prompts`, develop and test have `unseen` wordings, each its own. An answer is compared with a right
solution on the example that the prompt shows and on inputs that it does not; the solution is part of the tests and runs in the
judge's process, where no answer sees it.
"""

from __future__ import annotations

import functools
import importlib.resources
import textwrap
from string import Template
from typing import Any, Literal, NamedTuple

import yaml

from mechmerge.behaviors.prompts import Prompt, Split

Difficulty = Literal["easy", "medium"]


class CodeTask(NamedTuple):
    """One task: a function to write."""

    prompt: Prompt
    """Its topic is the family; its arguments are those of the verifier `python`, `entry` and `tests`."""
    name: str
    """Family and number of the variant: the same in all wordings."""
    difficulty: Difficulty
    """`easy`: a line; `medium`: a loop, a recursion, or a condition with an exception."""
    solution: str
    """A right solution."""
    wrong: tuple[str, ...]
    """Wrong ones, each of which fails a test."""


@functools.cache
def _material() -> dict[str, Any]:
    text = importlib.resources.files("mechmerge.behaviors").joinpath("data/code_tasks.yaml").read_text("utf-8")
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def code_tasks(split: Split, tier: Literal["seen", "unseen"] = "seen") -> list[CodeTask]:
    """The tasks of a split, family by family; wordings take turns.

    Args:
        split: whose families are taken.
        tier: `seen` gives every variant of a family, `unseen` the first, worded otherwise (none in train and calibrate).
    """
    found = _material()["wordings"][tier]
    wordings = found if tier == "seen" else found.get(split)
    if wordings is None:
        return []
    tasks: list[CodeTask] = []
    for family in _material()["families"]:
        if family["split"] == split:
            for number, values in enumerate(family["variants"][: None if tier == "seen" else 1], 1):
                tasks.append(_task(family, number, values, wordings[len(tasks) % len(wordings)], tier))
    return tasks


def _task(
    family: dict[str, Any], number: int, values: dict[str, Any], wording: str, tier: Literal["seen", "unseen"]
) -> CodeTask:
    def filled(text: str) -> str:
        return Template(text).substitute(values)

    signature, task = family["signature"], filled(family["task"])
    entry = signature.partition("(")[0]
    example = filled(family["example"])
    solution = _function(signature, filled(family["body"]))
    calls = ", ".join(f"({filled(given)},)" for given in [family["example"], *family["inputs"]])
    # The solution under another name: the tests' own `entry` is the answer's function.
    tests = (
        f"def solution():\n{textwrap.indent(solution, '    ')}    return {entry}\n"
        f"expected = solution()\n"
        f"for arguments in [{calls}]:\n"
        f"    assert {entry}(*arguments) == expected(*arguments), arguments\n"
    )
    shown = {
        "signature": signature,
        "entry": entry,
        "task": task,
        "call": f"{entry}({example})",
        "result": _result(solution, entry, example),
    }
    prompt = Prompt(
        text=wording.format(**shown),
        plain=f"Say in one sentence, without any code, what a function is good for that {task}.",
        behavior="code",
        tier=tier,
        topic=family["family"],
        arguments={"entry": entry, "tests": tests},
    )
    wrong = tuple(_function(signature, filled(body)) for body in family["wrong"])
    return CodeTask(prompt, f"{family['family']}-{number}", family["difficulty"], solution, wrong)


def _function(signature: str, body: str) -> str:
    return f"def {signature}:\n{textwrap.indent(body, '    ')}\n"


def _result(solution: str, entry: str, example: str) -> str:
    """What the package's own solution returns for the example."""
    space: dict[str, Any] = {}
    exec(solution, space)  # noqa: S102 - data of this package
    return repr(eval(f"{entry}({example})", space))  # noqa: S307 - data of this package
