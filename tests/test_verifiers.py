"""Verdicts: those of IFEval, reproducible, offline, and without heavy imports."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap

import pytest

from benchmarks.experts.data import in_format
from mechmerge.behaviors.prompts import material
from mechmerge.behaviors.schema import Verifier, load_behavior
from mechmerge.behaviors.verifiers import IFEVAL, NEED_PUNKT, check_arguments, check_verifier, verifier_names, verify
from mechmerge.errors import InputError, MissingError
from tests.nltk_home import without_punkt

ENGLISH = "the garden behind the old house is full of roses and the children like to play there every evening"
CASES = {
    # instruction id: (arguments, an answer that passes, one that fails)
    "change_case:english_capital": ({}, ENGLISH.upper(), ENGLISH),
    "change_case:english_lowercase": ({}, ENGLISH, ENGLISH.capitalize()),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say hi."}, "say hi. Hello!", "Hello!"),
    "combination:two_responses": ({}, "one ****** two", "one *** two"),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "[name] at [place]", "[name]"),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, "Bye.\nP.S. Write soon.", "Bye."),
    "detectable_format:constrained_response": ({}, "My answer is yes.", "Yes."),
    "detectable_format:json_format": ({}, '```json\n{"a": 1}\n```', "a: 1"),
    "detectable_format:multiple_sections": (
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nSECTION 2\nb",
        "SECTION 1\na",
    ),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* a\n* b", "* a"),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*a* and *b*", "*a* and b"),
    "detectable_format:title": ({}, "<<The sea>>\nIt is wide.", "The sea\nIt is wide."),
    "keywords:existence": ({"keywords": ["tea"]}, "I like tea.", "I like milk."),
    "keywords:forbidden_words": ({"forbidden_words": ["tea"]}, "I like milk.", "I like tea."),
    "keywords:frequency": ({"keyword": "tea", "frequency": 2, "relation": "at least"}, "tea and tea", "tea"),
    "keywords:letter_frequency": ({"letter": "z", "let_frequency": 2, "let_relation": "at least"}, "zz", "z"),
    "language:response_language": ({"language": "de"}, "Der alte Garten hinter dem Haus ist voller Rosen.", ENGLISH),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "First it rained.\n\nThen the sun came.",
        "First it rained.\n\nLater the sun came.",
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "a\n***\nb", "a"),
    "length_constraints:number_words": ({"num_words": 3, "relation": "at least"}, "one two three", "one two"),
    "punctuation:no_comma": ({}, "No comma here.", "A comma, here."),
    "startend:end_checker": ({"end_phrase": "Any other questions?"}, "Yes. Any other questions?", "Any other questions? Yes."),
    "startend:quotation": ({}, '"All of it."', '"Part" of it.'),
}


def test_every_checker_has_a_case():
    assert set(CASES) | NEED_PUNKT == set(IFEVAL)


def test_names_and_arguments_are_those_of_lm_eval():
    from mechmerge.behaviors.verifiers import _registry

    registry = _registry()
    assert set(registry) == set(IFEVAL)
    assert len(IFEVAL) == 25
    for name, checker in registry.items():
        assert set(checker(name).get_instruction_args_keys()) == set(IFEVAL[name])


@pytest.mark.parametrize("name", CASES)
def test_ifeval_verdicts(name):
    arguments, good, bad = CASES[name]
    verifier = Verifier(name=name, arguments=arguments)
    check_verifier(verifier)
    assert verify(verifier, "Say hi.", good, {})
    assert not verify(verifier, "Say hi.", bad, {})
    assert not verify(verifier, "Say hi.", " \n", {})


@pytest.mark.parametrize("name", CASES)
def test_verdicts_are_the_strict_ones_of_lm_eval(name):
    """The same through lm-eval's own `test_instruction_following_strict`, on the same checker classes."""
    from mechmerge.behaviors.verifiers import _registry

    arguments, *answers = CASES[name]
    for answer in answers:
        checker = _registry()[name](name)
        checker.build_description(**{k: v for k, v in arguments.items() if v})
        if (checker.get_instruction_args() or {}).get("prompt"):
            checker.build_description(prompt="Say hi.")
        official = bool(answer.strip() and checker.check_following(answer))
        assert verify(Verifier(name=name), "Say hi.", answer, arguments) == official


@pytest.mark.parametrize("name", list(material()["formats"]))
def test_training_answers_pass_their_formats_verifier(name):
    verifier = load_behavior(name).verifier
    answer = "The garden, behind the old house, is full of roses. The children like to play there every evening."
    assert verify(verifier, "", in_format(name, answer, "a garden"), {})
    assert not verify(verifier, "", answer, {})


@pytest.mark.parametrize(
    ("answer", "passes"),
    [
        ("33", True),
        ("33.", True),
        ("The answer is 33!", True),
        ("45 - 12 = 33", True),
        ("45-12=33", True),
        ("It is 33.0", True),
        ("33, or perhaps 34", False),
        ("-33", False),
        ("It is 1,033", False),
        ("333", False),
        ("thirty-three", False),
        ("", False),
    ],
)
def test_number(answer, passes):
    assert verify(Verifier(name="number"), "", answer, {"answer": 33}) is passes


@pytest.mark.parametrize(
    ("answer", "number"), [("It is 12,345.", 12345), ("10 - 15 = -5", -5), ("10 - 15 = −5", -5), ("0", 0), ("It is 0.5", "0.5")]
)
def test_other_numbers(answer, number):
    assert verify(Verifier(name="number"), "", answer, {"answer": number})


def test_contains_and_the_floor_of_words():
    assert verify(Verifier(name="contains", arguments={"text": "tea"}), "", "green tea", {})
    assert not verify(Verifier(name="contains", arguments={"text": "tea"}), "", "green Tea", {})
    floor = Verifier(name="punctuation:no_comma", min_words=5)
    assert verify(floor, "", "one two three four five", {})
    assert not verify(floor, "", "one two three four - !", {})


def test_arguments_of_the_prompt_stand_above_the_verifiers():
    verifier = Verifier(name="contains", arguments={"text": "tea"})
    assert verify(verifier, "", "milk", {"text": "milk"})


def test_letter_frequency_counts_the_character_itself():
    arguments = {"letter": "!", "let_frequency": 3, "let_relation": "at least"}
    verifier = Verifier(name="keywords:letter_frequency", arguments=arguments)
    assert all(verify(verifier, "", "a! b! c!", {}) for _ in range(20))
    assert not any(verify(verifier, "", "a! b! " + "abcdefghijklmnopqrstuvwxyz" * 3, {}) for _ in range(20))


def test_language_detection_is_seeded_and_leaves_random_alone():
    verifier = Verifier(name="change_case:english_capital")
    texts = ["TEA TIME NOW", "A SMALL NOTE ON THE SEA", "HOLA AMIGO HELLO"]
    random.seed(5)
    before = random.getstate()
    seen = {tuple(verify(verifier, "", text, {}) for text in texts) for _ in range(15)}
    assert len(seen) == 1
    assert random.getstate() == before


@pytest.mark.parametrize(
    ("name", "arguments", "found"),
    [
        ("keywords:nothing", {}, "unknown name"),
        ("detectable_format:title", {"num": 1}, "'num'"),
        ("detectable_format:number_highlighted_sections", {}, "num_highlights"),
        ("detectable_format:number_highlighted_sections", {"num_highlights": 0}, "num_highlights"),
        ("keywords:letter_frequency", {"letter": "ab", "let_frequency": 1, "let_relation": "at least"}, "'ab'"),
        ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 3, "first_word": "a"}, "3"),
        ("keywords:frequency", {"keyword": "tea", "frequency": 2, "relation": "about"}, "about"),
        ("language:response_language", {"language": "klingon"}, "klingon"),
        ("number", {}, "argument answer"),
        ("number", {"answer": "many"}, "'many'"),
    ],
)
def test_wrong_arguments_are_errors_of_one_line(name, arguments, found):
    with pytest.raises(InputError, match=found) as caught:
        verify(Verifier(name=name), "", "An answer.", arguments)
    assert "\n" not in str(caught.value)


def test_unknown_names_list_the_known_ones():
    with pytest.raises(InputError, match=r"punctuation:no_comma.*number"):
        check_verifier(Verifier(name="no_comma"))
    assert "contains" in verifier_names()
    with pytest.raises(InputError, match="unknown 'length'"):
        check_verifier(Verifier(name="contains", arguments={"length": 1}))
    with pytest.raises(InputError, match="the argument text"):
        check_arguments(Verifier(name="contains"), {})


@pytest.mark.parametrize("name", sorted(NEED_PUNKT))
def test_sentence_counting_says_where_its_data_comes_from(name, monkeypatch, tmp_path):
    without_punkt(monkeypatch, tmp_path)
    with pytest.raises(MissingError, match=r"punkt_tab.*nltk\.downloader"):
        check_verifier(Verifier(name=name))


def test_importing_the_checkers_is_light_offline_and_leaves_nothing_behind():
    program = """
        import socket, sys
        def refuse(*_, **__): raise RuntimeError("the network was tried")
        socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
        from mechmerge.behaviors.schema import Verifier
        from mechmerge.behaviors.verifiers import verify
        assert "nltk" not in sys.modules and "lm_eval" not in sys.modules
        assert verify(Verifier(name="punctuation:no_comma"), "", "no comma", {})
        heavy = {"torch", "datasets", "transformers"} & set(sys.modules)
        assert not heavy, heavy
        assert not [name for name in sys.modules if name.startswith("lm_eval.tasks")]
        import lm_eval, nltk
        assert not hasattr(lm_eval, "tasks")
        assert nltk.download.__self__ is not None and nltk.data.find.__module__ == "nltk.data"
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == ""
