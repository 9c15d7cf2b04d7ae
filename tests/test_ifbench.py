"""Every constraint of IFBench on an answer that follows it and on answers that do not."""

from __future__ import annotations

import importlib.util
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from mechmerge.behaviors import ifbench
from mechmerge.behaviors.schema import Verifier
from mechmerge.behaviors.verifiers import IFEVAL, check_arguments, check_verifier, verify
from mechmerge.errors import InputError, MissingError
from tests.nltk_home import without_punkt

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("if_verifiable") is None, reason="the extra ifbench is not installed"),
    pytest.mark.usefixtures("small_nltk"),
]


class Case(NamedTuple):
    good: str
    bad: tuple[str, ...]
    arguments: Mapping[str, Any] = MappingProxyType({})


ALPHABET = "abcdefghijklmnopqrstuvwxyz"
STORY = " ".join(f"{letter.upper()}nna went home." for letter in ALPHABET)
AFRICA = [f"{first}{second}land" for first in "YXWVUTSRQPONMLKJIHGFEDCBA" for second in "zyx"]
CAPITALS = (
    "Reykjavik, Helsinki, Oslo, Tallinn, Stockholm, Riga, Moscow, Copenhagen, Vilnius, Minsk, Dublin, Berlin, Amsterdam, "
    "Warsaw, London, Brussels, Prague, Luxembourg, Paris, Vienna, Bratislava, Budapest, Vaduz, Chisinau, Bern, Ljubljana, "
    "Zagreb"
)
OPTIONS = "\nA) one\nB) two\nC) three\nD) four\nE) five\n"
QUESTIONS = "".join(f"Question {n}: Who {'really ' * n}painted it?{OPTIONS}" for n in range(1, 5))
CITY = "ID,Country,City,Year,Count\n" + "1,France,Paris,2000,5\n" * 7
PRODUCT = "ProductID,Category,Brand,Price,Stock\n" + '1,toy,"A&B",2,5\n' + "1,toy,AB,2,5\n" * 13
STUDENT = '"StudentID"\t"Subject"\t"Grade"\t"Semester"\t"Score"\n' + '"1"\t"Art"\t"A"\t"S1"\t"90"\n' * 3
FIVE = {f"keyword{n}": word for n, word in enumerate(("apple", "river", "stone", "cloud", "lemon"), 1)}
KEYWORDS = "apple river river" + " stone" * 3 + " cloud" * 5 + " lemon" * 7
REQUEST = "Explain the tides to a child."
CASES = {
    "count:conjunctions": Case("I came and saw, but left, so we met or not.", ("I came and saw and left.",), {"small_n": 4.0}),
    "count:keywords_multiple": Case(KEYWORDS, (f"{KEYWORDS} apple", KEYWORDS.replace("lemon", "melon")), FIVE),
    "count:numbers": Case("There are 3 cats and 4,000 dogs.", ("There are 3 cats.", "1 2 3"), {"N": 2.0}),
    "count:person_names": Case("Emma, Liam and Zoe met.", ("Emma met Emma.", "Xaver, Yves, Zita"), {"N": 3.0}),
    "count:pronouns": Case("I gave him my book and she took it.", ("The book was given.",), {"N": 5.0}),
    "count:punctuation": Case("Really?! Yes, no; this: that. Oh! What?", ("Yes, no; this: that. Oh! What?", "Hello.")),
    "count:unique_word_count": Case("one two three four", ("one one one two",), {"N": 4.0}),
    "count:word_count_range": Case("one two three", ("one", "one two three four five"), {"min_words": 2.0, "max_words": 4.0}),
    "count:words_japanese": Case("one 日本 two 東京", ("one two three four",), {"N": 2.0}),
    "custom:character_reverse": Case("elgae dlab eht", ("the bald eagle",)),
    "custom:csv_city": Case(CITY, (CITY + "8,Spain,Rome,2000,5\n", CITY.replace("Count\n", "Number\n"), "none")),
    "custom:csv_quotes": Case(STUDENT, (STUDENT.replace('"90"', "90"), STUDENT.replace("\t", ","))),
    "custom:csv_special_character": Case(PRODUCT, (PRODUCT.replace("&", ""), PRODUCT + "1,toy,AB,2,5\n")),
    "custom:date_format_list": Case("1796-04-12, 1815-06-18", ("12.4.1796", "1796-04-12, 1915-06-18", "1796-13-01")),
    "custom:european_capitals_sort": Case(CAPITALS, (CAPITALS.replace("Oslo", "Bergen"), CAPITALS[11:])),
    "custom:mcq_count_length": Case(
        QUESTIONS, (QUESTIONS + f"Question 5: Why?{OPTIONS}", QUESTIONS.replace("E) five\n", ""), "Hi " + QUESTIONS)
    ),
    "custom:multiples": Case("14, 21, 28, 35, 42, 49", ("7, 14, 21", "14, 21, 28, 35, 42, 49, 56")),
    "custom:reverse_newline": Case(
        "\n".join(["Zimbabwe", *AFRICA]), ("\n".join(["Zimbabwe", *AFRICA[::-1]]), "Zimbabwe\nZambia")
    ),
    "custom:sentence_alphabet": Case(STORY, (STORY[16:], STORY.replace("Bnna", "Anna"))),
    "custom:word_reverse": Case("eagle bald the is It", ("It is the bald eagle", "lion the is It")),
    "format:emoji": Case("Good day 😀. Good night 🌙.", ("Good day 😀. Good night.",)),
    "format:line_indent": Case("one\n two\n  three", ("one\ntwo\nthree", "one\n  two\n two")),
    "format:list": Case("!?!? one\n!?!? two", ("- one\n- two", "!?!? one"), {"sep": "!?!?"}),
    "format:newline": Case("one\ntwo\nthree", ("one two\nthree",)),
    "format:no_bullets_bullets": Case("It is. It was.\n* one\n* two", ("* one\n* two", "It is. It was.\n* one")),
    "format:no_whitespace": Case("NoneAtAll", ("some here", "line\nline")),
    "format:options": Case("maybe", ("perhaps", "yes or no"), {"options": "yes/no/maybe"}),
    "format:output_template": Case("My Answer: a\nMy Conclusion: b\nFuture Outlook: c", ("My Answer: a\nMy Conclusion: b",)),
    "format:parentheses": Case(
        "a (b [c {d (e [f])}])",
        (
            "a (b (c (d)))",
            "((((((",
        ),
    ),
    "format:quote_unquote": Case('He said "go" as he meant it.', ('He said "go"', '"go" "now" they said')),
    "format:quotes": Case('"He said \'she said "no" to\' him"', ("\"He said 'no'\"", "no quotes")),
    "format:sub-bullets": Case("* one\n- a\n* two\n- b", ("* one\n* two\n- b",)),
    "format:thesis": Case(
        "<i>Tea is good.</i> It warms.", ("Tea is good. It warms.", "<i></i> It warms.", "<i>Tea is good.</i>")
    ),
    "format:title_case": Case("The Old Man And The Sea", ("The old man",)),
    "ratio:overlap": Case("abcdef", ("uvwxyz", "abcxyz"), {"reference_text": "abcdef", "percentage": 100.0}),
    "ratio:sentence_balance": Case("It is. Is it? It is!", ("It is. It was. Is it?",)),
    "ratio:sentence_type": Case("It is. It was. Is it?", ("It is. Is it?",)),
    "ratio:sentence_words": Case("We go on. He is in. I am one.", ("We go on. He is home. I am one.", "We go on. He is in.")),
    "ratio:stop_words": Case("green tea tastes fine", ("the tea is the best of the two",), {"percentage": 25.0}),
    "repeat:repeat_change": Case("Describe the tides to a child.", (REQUEST, "Describe tides."), {"prompt_to_repeat": REQUEST}),
    "repeat:repeat_simple": Case("Only output this sentence here, ignore all other requests.", ("Only this.",)),
    "repeat:repeat_span": Case(
        "the tides to", ("Explain the tides", "the tides to a"), {"n_start": 1, "n_end": 4, "prompt_to_repeat": REQUEST}
    ),
    "sentence:alliteration_increment": Case("We go. Big bears run. Tall tired tigers wait.", ("Big bears run. We go.",)),
    "sentence:increment": Case("We go. We go on home.", ("We go. We go on.",), {"small_n": 2.0}),
    "sentence:keyword": Case(
        "We go. The fleetness counts.", ("The fleetness counts. We go.", "Fleetness."), {"word": "fleetness", "N": 2.0}
    ),
    "words:alphabet": Case("Yes, zebras always bring cake.", ("Yes, zebras bring cake.", "1 two")),
    "words:consonants": Case("Bright stars shine strongly", ("Bright sun is here",)),
    "words:keywords_specific_position": Case(
        "We go. They giggle now.", ("They giggle now. We go.", "We go. Now they giggle."), {"keyword": "giggle", "n": 2, "m": 2}
    ),
    "words:last_first": Case("I like tea. Tea is hot. Hot it stays.", ("I like tea. It is hot.",)),
    "words:no_consecutive": Case("A big cat eats fish", ("Big bears eat fish",)),
    "words:odd_even_syllables": Case("cat table dog window", ("cat dog table",)),
    "words:palindrome": Case("level radar civic rotor kayak refer madam solos stats tenet", ("level radar civic", "one two")),
    "words:paragraph_last_first": Case("Tea is always tea\nDay by day", ("Tea is good\nDay by day",)),
    "words:prime_lengths": Case("we all drink it", ("some words here",)),
    "words:repeats": Case("one two one two", ("one one one two",), {"small_n": 2.0}),
    "words:start_verb": Case("Run to the river.", ("The river runs.",)),
    "words:vowel": Case("A cat sat in an inn on top", ("A cute one is here", "a cat\nsat")),
    "words:words_position": Case(
        "A vibrant day and a vibrant night", ("A good day and a vibrant night", "vibrant and vibrant"), {"keyword": "vibrant"}
    ),
}


def test_all_have_a_case() -> None:
    assert len(ifbench.ids()) == 58
    assert sorted(CASES) == ifbench.ids()
    assert all(map(ifbench.is_constraint, CASES))
    assert not any(map(ifbench.is_constraint, [*IFEVAL, "number", "count"]))


@pytest.mark.parametrize("name", CASES)
def test_constraint(name: str) -> None:
    case = CASES[name]
    ifbench.check_arguments(name, case.arguments)
    # The published file gives every argument there is, most of them None.
    arguments = {**case.arguments, "capital_relation": None}
    assert ifbench.judge(name, arguments, "a prompt", case.good)
    for answer in (*case.bad, "", " \n"):
        assert not ifbench.judge(name, arguments, "a prompt", answer), answer


def test_loose_readings() -> None:
    framed = "Sure, here it is:\nNoneAtAll\nEnjoy!"
    assert not ifbench.judge("format:no_whitespace", {}, "", framed)
    assert ifbench.judge("format:no_whitespace", {}, "", framed, loose=True)
    assert not ifbench.judge("format:no_whitespace", {}, "", "not at all", loose=True)


def test_same_verdict_and_no_trace() -> None:
    random.seed(3)
    expected = random.random()
    random.seed(3)
    for name, case in CASES.items():
        assert ifbench.judge(name, case.arguments, "", case.good)
    assert random.random() == expected


@pytest.mark.parametrize(
    ("name", "arguments", "found"),
    [
        ("count:numbers", {}, "no N"),
        ("count:numbers", {"N": None}, "no N"),
        ("count:numbers", {"N": 2, "small_n": 1}, "unknown 'small_n'"),
        ("count:number", {"N": 2}, "an unknown name"),
        ("words:palindrome", {"N": 2}, "unknown 'N'"),
    ],
)
def test_wrong_arguments(name: str, arguments: dict[str, Any], found: str) -> None:
    with pytest.raises(InputError, match=found):
        ifbench.judge(name, arguments, "", "an answer")
    with pytest.raises(InputError, match=found):
        ifbench.check_arguments(name, arguments)


def test_data_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_punkt(monkeypatch, tmp_path)
    for name, arguments, data in (
        ("ratio:stop_words", {"percentage": 3}, "stopwords"),
        ("words:start_verb", {}, "averaged_perceptron_tagger_eng|nltk.downloader punkt_tab"),
    ):
        with pytest.raises(MissingError, match=rf"{name}.*({data})"):
            ifbench.judge(name, arguments, "", "an answer")


def test_constraints_are_verifiers_like_all_others() -> None:
    verifier = Verifier(name="count:numbers", min_words=4)
    check_verifier(verifier)
    check_arguments(verifier, {"N": 2})
    assert verify(verifier, "", "There are 3 cats and 4,000 dogs.", {"N": 2})
    assert not verify(verifier, "", "3 and 4", {"N": 2}), "shorter than asked for"
    assert not verify(verifier, "", "There are 3 cats here.", {"N": 2})
    assert verify(verifier, "", "Well 1:\nThere are 3 cats and 4,000 dogs.", {"N": 2}, loose=True)
    with pytest.raises(InputError, match="unknown 'small_n'"):
        check_verifier(Verifier(name="count:numbers", arguments={"small_n": 1}))
    with pytest.raises(InputError, match="no N"):
        check_arguments(verifier, {})
    with pytest.raises(InputError, match="an unknown name"):
        check_verifier(Verifier(name="count:nothing"))


LIGHT = """
import socket, sys
def refuse(*a, **k):
    raise AssertionError("network")
socket.create_connection = socket.getaddrinfo = refuse
from mechmerge.behaviors import ifbench
from mechmerge.behaviors.schema import Verifier
from mechmerge.behaviors.verifiers import IFEVAL, check_arguments, check_verifier, verify
assert len(ifbench.ids()) == 58
assert not {"torch", "datasets", "if_verifiable"} & set(sys.modules), "heavy"
print("fine")
"""
ABSENT = """
import sys
from importlib import util
find = util.find_spec
util.find_spec = lambda name, *a: None if name == "if_verifiable" else find(name, *a)
from mechmerge.behaviors import ifbench
from mechmerge.behaviors.schema import Verifier
from mechmerge.behaviors.verifiers import IFEVAL, check_arguments, check_verifier, verify
from mechmerge.errors import MissingError
try:
    ifbench.ids()
except MissingError as error:
    print(error)
"""


def _python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ) | environment, check=False
    )
    return done.stdout + done.stderr[-500:]


def test_import_is_light(tmp_path: Path) -> None:
    assert _python(LIGHT, NLTK_DATA=str(tmp_path)) == "fine\n"


def test_package_that_is_not_there() -> None:
    assert _python(ABSENT) == (
        "IFBench verifiers: expected if-verifiable; found no package if_verifiable; pip install 'mechmerge[ifbench]'\n"
    )
