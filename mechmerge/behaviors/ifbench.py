"""The 58 verifiable constraints of IFBench, judged by AllenAI's checkers.

Source: https://arxiv.org/abs/2507.02833 (https://github.com/allenai/IFBench, Apache-2.0). The checkers come from the PyPI
package if-verifiable (extra `ifbench`), which ships them unchanged but for their imports: on the 294 published prompts with the
benchmark's sample answers, in all eight readings of each, they gave the verdicts of AllenAI's own file. As with IFEval
(`verifiers`): importing them neither downloads anything nor loads datasets, their random defaults are never used, and they are
seeded. Three of NLTK's data sets are needed by few of them (`DATA`; nltk_data.py says where they come from).
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping
from typing import Any

from mechmerge.behaviors import nltk_data
from mechmerge.behaviors.checkers import checker_classes
from mechmerge.behaviors.readings import readings_of
from mechmerge.errors import InputError

PACKAGE = "if_verifiable"
KINDS = frozenset({"count", "custom", "format", "ratio", "repeat", "sentence", "words"})
"""What names of constraints begin with; IFEval has none of these."""
DATA: dict[str, tuple[nltk_data.Data, ...]] = {
    "format:title_case": ("punkt_tab",),
    "ratio:stop_words": ("stopwords",),
    "words:keywords_specific_position": ("punkt_tab",),
    "words:start_verb": ("punkt_tab", "averaged_perceptron_tagger_eng"),
    "words:words_position": ("punkt_tab",),
}
"""Constraints that need data of NLTK, and which."""


def is_constraint(name: str) -> bool:
    """Whether a verifier's name is one of IFBench's kinds; the constraint itself may not exist."""
    kind, colon, _ = name.partition(":")
    return bool(colon) and kind in KINDS


def ids() -> list[str]:
    """Names of all constraints.

    Raises:
        MissingError: the extra `ifbench` is not installed.
    """
    return sorted(_registry())


def check_constraint(name: str, arguments: Mapping[str, Any]) -> None:
    """The constraint exists, takes the arguments given (others may come with each prompt), and can run on this machine.

    Raises:
        InputError: an unknown constraint or argument.
        MissingError: the extra `ifbench` or data of NLTK is not installed.
    """
    keys = _class(name)(name).get_instruction_args_keys()
    unknown = sorted(set(arguments) - set(keys))
    if unknown:
        found = f"unknown {unknown[0]!r}"
        raise InputError(f"verifier {name}", expected=f"arguments {', '.join(keys) or '(none)'}", found=found)
    _ensure_data(name)


def check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """The constraint exists, its arguments are complete, and its data is on this machine.

    Raises:
        InputError: an unknown constraint, or a missing, unknown or refused argument.
        MissingError: the extra `ifbench` or data of NLTK is not installed.
    """
    _ensure_data(name)
    _checker(name, arguments, "")


def judge(
    name: str,
    arguments: Mapping[str, Any],
    prompt: str,
    answer: str,
    *,
    loose: bool = False,
    fits: Callable[[str], bool] = lambda text: bool(text.strip()),
) -> bool:
    """Whether an answer follows a constraint; an empty one never does.

    Args:
        name: the constraint, such as `words:palindrome`.
        arguments: all of its own; one that is None counts as not given (the published file writes them so).
        prompt: what was asked.
        answer: what the model said.
        loose: whether one of IFEval's eight readings is enough (without first line, last line, asterisks).
        fits: whether a reading can pass at all, such as by its length.

    Raises:
        InputError: an unknown constraint, or a missing, unknown or refused argument.
        MissingError: the extra `ifbench` or data of NLTK is not installed.
    """
    _ensure_data(name)
    state = random.getstate()
    try:
        random.seed(0)
        checker = _checker(name, arguments, prompt)
        for text in readings_of(answer, loose):
            random.seed(0)
            if fits(text) and checker.check_following(text):
                return True
    finally:
        random.setstate(state)
    return False


def _class(name: str) -> Any:
    known = _registry()
    if name not in known:
        raise InputError(f"verifier {name!r}", expected=f"one of {', '.join(sorted(known))}", found="an unknown name")
    return known[name]


def _checker(name: str, arguments: Mapping[str, Any], prompt: str) -> Any:
    """The checker, set up as IFBench's `test_instruction_following_strict` does it."""
    checker = _class(name)(name)
    given = {key: value for key, value in arguments.items() if value is not None}
    keys = checker.get_instruction_args_keys()
    wrong = sorted(set(keys) ^ set(given))
    if wrong:
        found = f"no {wrong[0]}" if wrong[0] in keys else f"unknown {wrong[0]!r}"
        raise InputError(f"verifier {name}", expected=f"arguments {', '.join(keys) or '(none)'}", found=found)
    try:
        checker.build_description(**given)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        raise InputError(f"verifier {name}", expected="arguments that the checker takes", found=str(error)) from None
    if "prompt" in (checker.get_instruction_args() or {}):
        checker.build_description(prompt=prompt)
    return checker


def _ensure_data(name: str) -> None:
    for data in DATA.get(name, ()):
        nltk_data.ensure(data, f"verifier {name}")


@functools.cache
def _registry() -> dict[str, Any]:
    """Constraint → checker class; the package's own entry would load datasets."""
    return checker_classes(
        PACKAGE,
        f"{PACKAGE}.ifbench.instructions_registry",
        "IFBench verifiers",
        package="if-verifiable",
        fix="pip install 'mechmerge[ifbench]'",
    )
