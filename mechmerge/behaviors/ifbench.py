"""The 58 verifiable constraints of IFBench, judged by AllenAI's checkers.

Source: https://arxiv.org/abs/2507.02833 (https://github.com/allenai/IFBench, Apache-2.0). The checkers come from the PyPI
package if-verifiable (extra `ifbench`), which ships them unchanged but for their imports: on the 294 published prompts with the
benchmark's sample answers, in all eight readings of each, they gave the verdicts of AllenAI's own file. As with IFEval
(`verifiers`): importing them neither downloads anything nor loads datasets, their random defaults are never used, and they are
seeded. Three of NLTK's data sets are needed by few of them; `DATA` says which.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping
from typing import Any

from mechmerge.behaviors.checkers import checker_classes
from mechmerge.behaviors.punkt import ensure_punkt
from mechmerge.behaviors.verifiers import readings_of
from mechmerge.errors import InputError, MissingError

PACKAGE = "if_verifiable"
DATA: dict[str, tuple[str, ...]] = {
    "format:title_case": ("punkt_tab",),
    "ratio:stop_words": ("stopwords",),
    "words:keywords_specific_position": ("punkt_tab",),
    "words:start_verb": ("punkt_tab", "averaged_perceptron_tagger_eng"),
    "words:words_position": ("punkt_tab",),
}
"""Constraints that need data of NLTK, and which. `punkt_tab` is fetched where it is missing, the others are not."""
_PLACES = {"stopwords": "corpora/stopwords", "averaged_perceptron_tagger_eng": "taggers/averaged_perceptron_tagger_eng"}


def ids() -> list[str]:
    """Names of all constraints.

    Raises:
        MissingError: the extra `ifbench` is not installed.
    """
    return sorted(_registry())


def check_arguments(name: str, arguments: Mapping[str, Any]) -> None:
    """The constraint exists, its arguments are complete, and its data is on this machine.

    Raises:
        InputError: an unknown constraint, or a missing, unknown or refused argument.
        MissingError: the extra `ifbench` or data of NLTK is not installed.
    """
    _ensure_data(name)
    _checker(name, arguments, "")


def judge(name: str, arguments: Mapping[str, Any], prompt: str, answer: str, *, loose: bool = False) -> bool:
    """Whether an answer follows a constraint; an empty one never does.

    Args:
        name: the constraint, such as `words:palindrome`.
        arguments: all of its own; one that is None counts as not given (the published file writes them so).
        prompt: what was asked.
        answer: what the model said.
        loose: whether one of IFEval's eight readings is enough (without first line, last line, asterisks).

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
            if text.strip() and checker.check_following(text):
                return True
    finally:
        random.setstate(state)
    return False


def _checker(name: str, arguments: Mapping[str, Any], prompt: str) -> Any:
    """The checker, set up as IFBench's `test_instruction_following_strict` does it."""
    known = _registry()
    if name not in known:
        raise InputError(f"verifier {name!r}", expected=f"one of {', '.join(sorted(known))}", found="an unknown name")
    checker = known[name](name)
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
    import nltk

    for data in DATA.get(name, ()):
        if data == "punkt_tab":
            ensure_punkt()
            continue
        try:
            nltk.data.find(f"{_PLACES[data]}.zip")
        except LookupError:
            try:
                nltk.data.find(f"{_PLACES[data]}/")
            except LookupError:
                raise MissingError(
                    f"verifier {name}",
                    expected=f"NLTK's {data}",
                    found="none",
                    fix=f"run `python -m nltk.downloader {data}`, where there is a network, and copy nltk_data here",
                ) from None


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
