"""Judging answers: the official IFEval checkers, strict and loose, IFBench's (ifbench.py), and our own `contains`, `json`,
`number` and `python`.

IFEval: https://arxiv.org/abs/2311.07911; its checkers come from lm-eval (lm_eval/tasks/ifeval), with the verdicts of its
`test_instruction_following_strict` and `…_loose`. What is changed,
so that a verdict depends on the answer alone and no network is needed:
- importing them reaches for no network and imports neither torch nor datasets (checkers.py);
- language detection and the checkers' random defaults are seeded, and a missing argument is an error, not a random one;
- `keywords:letter_frequency` counts the character that was asked for, letter or not (lm-eval draws a random letter instead).
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import random
import re
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from mechmerge.behaviors import ifbench, nltk_data
from mechmerge.behaviors.checkers import checker_classes
from mechmerge.behaviors.readings import readings_of
from mechmerge.behaviors.schema import Verifier
from mechmerge.errors import InputError

IFEVAL: dict[str, tuple[str, ...]] = {
    # instruction id: the arguments that it needs
    "change_case:capital_word_frequency": ("capital_frequency", "capital_relation"),
    "change_case:english_capital": (),
    "change_case:english_lowercase": (),
    "combination:repeat_prompt": ("prompt_to_repeat",),
    "combination:two_responses": (),
    "detectable_content:number_placeholders": ("num_placeholders",),
    "detectable_content:postscript": ("postscript_marker",),
    "detectable_format:constrained_response": (),
    "detectable_format:json_format": (),
    "detectable_format:multiple_sections": ("section_spliter", "num_sections"),
    "detectable_format:number_bullet_lists": ("num_bullets",),
    "detectable_format:number_highlighted_sections": ("num_highlights",),
    "detectable_format:title": (),
    "keywords:existence": ("keywords",),
    "keywords:forbidden_words": ("forbidden_words",),
    "keywords:frequency": ("keyword", "frequency", "relation"),
    "keywords:letter_frequency": ("letter", "let_frequency", "let_relation"),
    "language:response_language": ("language",),
    "length_constraints:nth_paragraph_first_word": ("num_paragraphs", "nth_paragraph", "first_word"),
    "length_constraints:number_paragraphs": ("num_paragraphs",),
    "length_constraints:number_sentences": ("num_sentences", "relation"),
    "length_constraints:number_words": ("num_words", "relation"),
    "punctuation:no_comma": (),
    "startend:end_checker": ("end_phrase",),
    "startend:quotation": (),
}
OWN: dict[str, tuple[str, ...]] = {"contains": ("text",), "json": (), "number": ("answer",), "python": ("tests", "entry")}
"""`contains`: the answer holds `text`; `json`: it is an object or an array with something in it; `number`: its last number is
`answer`; `python`: its code passes `tests`.
"""
LETTER = "keywords:letter_frequency"
NEED_PUNKT = frozenset({"change_case:capital_word_frequency", "length_constraints:number_sentences"})
"""Checkers that split text with NLTK's sentence model, which no package ships."""
_LISTS = frozenset({"forbidden_words", "keywords"})
_COUNTS = frozenset({
    "capital_frequency", "frequency", "let_frequency", "nth_paragraph", "num_bullets", "num_highlights", "num_paragraphs",
    "num_placeholders", "num_sections", "num_sentences", "num_words",
})  # fmt: skip
"""Arguments of IFEval that are lists of words, and those that are numbers; all others are texts."""
_NUMBER = re.compile(r"(?:(?<![\w.])[-−])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


def verifier_names() -> list[str]:
    """Names of all verifiers but IFBench's (`ifbench.ids`), which an extra brings."""
    return sorted(IFEVAL) + sorted(OWN)


def check_verifier(verifier: Verifier) -> None:
    """The verifier exists, takes the arguments given (others may come with each prompt), and can run on this machine.

    Raises:
        InputError: an unknown name or argument.
        MissingError: the checker needs data of NLTK that is neither installed nor to be fetched, or the extra `ifbench`.
    """
    if ifbench.is_constraint(verifier.name):
        ifbench.check_constraint(verifier.name, verifier.arguments)
        return
    _keys(verifier.name, verifier.arguments)
    if verifier.name in NEED_PUNKT:
        nltk_data.ensure("punkt_tab")


def check_arguments(verifier: Verifier, arguments: Mapping[str, Any]) -> None:
    """The arguments of one prompt, over the verifier's own, are complete.

    Raises:
        InputError: a missing or unknown argument, or one that the checker does not accept.
    """
    if ifbench.is_constraint(verifier.name):
        ifbench.check_arguments(verifier.name, {**verifier.arguments, **arguments})
        return
    merged = _arguments(verifier, arguments)
    if verifier.name in IFEVAL:
        with _seeded():
            _checker(verifier.name, "", merged)


def verify(verifier: Verifier, prompt: str, answer: str, arguments: Mapping[str, Any], *, loose: bool = False) -> bool:
    """Whether an answer passes; an empty one never does.

    Args:
        verifier: the checker, its arguments, and the least number of words that an answer must have.
        prompt: what was asked.
        answer: what the model said.
        arguments: arguments of this prompt alone; they stand above the verifier's own.
        loose: whether it is enough that the answer passes without its first line, its last line or both, or without asterisks.

    Raises:
        InputError: an unknown verifier, or a missing, unknown or refused argument.
        MissingError: the checker needs data of NLTK that is neither installed nor to be fetched, or the extra `ifbench`.
    """
    if ifbench.is_constraint(verifier.name):
        merged = {**verifier.arguments, **arguments}
        return ifbench.judge(verifier.name, merged, prompt, answer, loose=loose, fits=lambda text: _long_enough(verifier, text))
    merged = _arguments(verifier, arguments)
    if verifier.name in NEED_PUNKT:
        nltk_data.ensure("punkt_tab")
    if verifier.name in OWN:
        return any(_long_enough(verifier, text) and _own(verifier.name, text, merged) for text in readings_of(answer, loose))
    with _seeded() as reseed:
        checker = _checker(verifier.name, prompt, merged)
        for text in readings_of(answer, loose):
            # Every text is judged as if it were the first: a verdict depends on nothing that was judged before.
            reseed()
            if _long_enough(verifier, text) and checker.check_following(text):
                return True
    return False


def _long_enough(verifier: Verifier, text: str) -> bool:
    return bool(text.strip()) and (not verifier.min_words or len(re.findall(r"\S*\w\S*", text)) >= verifier.min_words)


def _own(name: str, answer: str, arguments: Mapping[str, Any]) -> bool:
    if name == "contains":
        return str(arguments["text"]) in answer
    if name == "json":
        return _json(answer)
    if name == "python":
        from mechmerge.behaviors.sandbox import judge

        return judge(answer, arguments)
    found = _NUMBER.findall(answer)
    return bool(found) and _decimal(found[-1]) == _decimal(arguments["answer"])


def _json(answer: str) -> bool:
    """Stricter than IFEval's `json_format`, which passes any JSON value: a sentence in double quotes is one, and so is `7`."""
    text = answer.strip()
    for opening in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(opening)
    try:
        value = json.loads(text.removesuffix("```"))
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict | list) and bool(value)


# --------------------------------------------------------------------------------------------------------------- arguments
def _keys(name: str, arguments: Mapping[str, Any]) -> tuple[str, ...]:
    keys = IFEVAL.get(name, OWN.get(name))
    if keys is None:
        known = f"one of {', '.join(verifier_names())}, or a constraint of IFBench"
        raise InputError(f"verifier {name!r}", expected=known, found="an unknown name")
    unknown = sorted(set(arguments) - set(keys))
    if unknown:
        raise InputError(
            f"verifier {name}", expected=f"arguments {', '.join(keys) or '(none)'}", found=f"unknown {unknown[0]!r}"
        )
    return keys


def _arguments(verifier: Verifier, own: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments, complete; as in lm-eval, an IFEval argument that is empty or 0 counts as not given."""
    merged = {**verifier.arguments, **own}
    keys = _keys(verifier.name, merged)
    given = {k: v for k, v in merged.items() if (v is not None if verifier.name in OWN else v)}
    missing = [key for key in keys if key not in given]
    if missing:
        raise InputError(f"verifier {verifier.name}", expected=f"the argument {missing[0]}", found="none, or an empty one")
    for key in keys if verifier.name in IFEVAL else ():
        wanted = _unfit(key, given[key])
        if wanted:
            raise InputError(f"verifier {verifier.name}", expected=f"{wanted} as {key}", found=repr(given[key]))
    if verifier.name == LETTER and len(str(given["letter"])) != 1:
        raise InputError(f"verifier {LETTER}", expected="one character as letter", found=repr(given["letter"]))
    if (
        verifier.name == "length_constraints:nth_paragraph_first_word"
        and not 1 <= given["nth_paragraph"] <= given["num_paragraphs"]
    ):
        raise InputError(
            f"verifier {verifier.name}", expected="nth_paragraph in 1 … num_paragraphs", found=str(given["nth_paragraph"])
        )
    if verifier.name == "number" and _decimal(given["answer"]) is None:
        raise InputError("verifier number", expected="a number as answer", found=repr(given["answer"]))
    return given


def _unfit(key: str, value: Any) -> str | None:
    """What an argument should be, where it is something else: lm-eval takes a text for its letters, a negative for random."""
    if key in _LISTS:
        fits = isinstance(value, list | tuple) and all(isinstance(word, str) and word for word in value)
        return None if fits else "a list of words"
    if key in _COUNTS:
        return None if isinstance(value, int | float) and not isinstance(value, bool) and value > 0 else "a number above 0"
    return None if isinstance(value, str) else "a text"


def _decimal(value: Any) -> Decimal | None:
    if isinstance(value, bool):
        return None
    try:
        return Decimal(str(value).replace(",", "").replace("−", "-"))
    except InvalidOperation:
        return None


# ------------------------------------------------------------------------------------------------------------------ IFEval
def _checker(name: str, prompt: str, arguments: Mapping[str, Any]) -> Any:
    """The IFEval checker, set up as lm-eval's strict verdict does it."""
    checker = _registry()[name](name)
    try:
        checker.build_description(**arguments)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"verifier {name}", expected="arguments that the checker takes", found=str(error)) from None
    given = checker.get_instruction_args()
    if given and "prompt" in given:
        checker.build_description(prompt=prompt)
    if name == LETTER:
        checker._letter = str(arguments["letter"]).lower()
    return checker


@functools.cache
def _registry() -> dict[str, Any]:
    """IFEval's instruction id → checker class; `lm_eval.tasks` itself would import the whole task manager."""
    found = checker_classes(
        "lm_eval.tasks",
        "lm_eval.tasks.ifeval.instructions_registry",
        "IFEval verifiers",
        package="lm-eval",
        fix="pip install 'lm-eval[ifeval]'",
    )
    # The checkers log every text whose language cannot be told; without a handler that would land on stderr.
    logging.getLogger("lm_eval.tasks.ifeval.instructions").addHandler(logging.NullHandler())
    return found


@contextlib.contextmanager
def _seeded() -> Iterator[Callable[[], None]]:
    """Fixed seeds of langdetect and of `random`, put back afterwards; what is given sets them anew."""
    from langdetect import DetectorFactory

    state, seed = random.getstate(), DetectorFactory.seed

    def reseed() -> None:
        random.seed(0)
        DetectorFactory.seed = 0

    reseed()
    try:
        yield reseed
    finally:
        random.setstate(state)
        DetectorFactory.seed = seed
