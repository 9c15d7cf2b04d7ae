"""IFEval: our verdicts are lm-eval's own, on prompts of ours always and on the published answers where they are at hand."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from mechmerge.behaviors.schema import Verifier
from mechmerge.behaviors.verifiers import IFEVAL, verify
from mechmerge.errors import SchemaError
from mechmerge.evaluate.ifeval import FILE_SHA256, load
from mechmerge.evaluate.record import EvaluateSettings
from mechmerge.evaluate.responses import evaluate_responses
from mechmerge.evaluate.suites import load_suite

PUBLISHED = Path(__file__).parents[2] / "shared" / "data" / "ifeval"
ANSWERS = [
    "",
    "   ",
    "Tea is warm. It is good, and it is cheap.",
    "TEA IS WARM AND IT IS GOOD.",
    "tea is warm and it is good",
    "<<Tea>>\n\nSECTION 1\nTea is *warm* and *good*.\n\nSECTION 2\nTea is tea.",
    "Sure!\n* one point\n* two points\nHope that helps, bye.",
    '"Tea, said the guest."',
    'Here you are:\n{"tea": 1}',
    '```json\n{"tea": 1}\n```',
    "Tea for [name] at [place].\n\nP.S. milk",
    "Tea.\n\n***\n\nMilk and tea.\n\n***\n\nWater.",
    "My answer is yes.",
    "Write about tea.\nTea is warm.",
    "Tea is good.\n******\nMilk is good.",
    "El t\u00e9 es bueno y caliente y todos lo toman por la ma\u00f1ana.",
    "first\n\nsecond words\n\nthird",
]
ARGUMENTS: dict[str, list[dict[str, object]]] = {
    "change_case:capital_word_frequency": [{"capital_frequency": 2, "capital_relation": "at least"}],
    "combination:repeat_prompt": [{"prompt_to_repeat": "Write about tea."}],
    "detectable_content:number_placeholders": [{"num_placeholders": 2}],
    "detectable_content:postscript": [{"postscript_marker": "P.S."}],
    "detectable_format:multiple_sections": [{"section_spliter": "SECTION", "num_sections": 2}],
    "detectable_format:number_bullet_lists": [{"num_bullets": 2}],
    "detectable_format:number_highlighted_sections": [{"num_highlights": 2}],
    "keywords:existence": [{"keywords": ["tea", "warm"]}],
    "keywords:forbidden_words": [{"forbidden_words": ["milk"]}],
    "keywords:frequency": [{"keyword": "tea", "frequency": 2, "relation": "at least"}],
    "keywords:letter_frequency": [{"letter": "t", "let_frequency": 3, "let_relation": "at least"}],
    "language:response_language": [{"language": "es"}, {"language": "en"}],
    "length_constraints:nth_paragraph_first_word": [{"num_paragraphs": 3, "nth_paragraph": 2, "first_word": "second"}],
    "length_constraints:number_paragraphs": [{"num_paragraphs": 3}],
    "length_constraints:number_sentences": [{"num_sentences": 2, "relation": "less than"}],
    "length_constraints:number_words": [{"num_words": 6, "relation": "at least"}],
    "startend:end_checker": [{"end_phrase": "bye."}],
}
ROWS = [
    {"key": i, "prompt": "Write about tea.", "instruction_id_list": [name], "kwargs": [arguments]}
    for i, (name, arguments) in enumerate((n, a) for n in IFEVAL for a in ARGUMENTS.get(n, [{}]))
]
BOTH = {
    "key": 900,
    "prompt": "Write about tea.",
    "instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"],
    "kwargs": [{}, {"unused": None}],
}


@pytest.fixture
def theirs():
    """lm-eval's own verdicts on a row and an answer; langdetect is seeded, as we do."""
    from langdetect import DetectorFactory

    from mechmerge.behaviors import nltk_data

    nltk_data.ensure("punkt_tab")
    from lm_eval.tasks.ifeval import utils

    def judge(row, answer):
        DetectorFactory.seed = 0
        return utils.process_results(row, [answer])

    yield judge
    DetectorFactory.seed = None


@pytest.mark.slow
def test_verdicts_are_lm_evals_for_every_type(theirs):
    assert {row["instruction_id_list"][0] for row in ROWS} == set(IFEVAL)
    seen = {name: set() for name in IFEVAL}
    loosely = 0
    for row in ROWS:
        name, arguments = row["instruction_id_list"][0], row["kwargs"][0]
        for answer in ANSWERS:
            expected = theirs(row, answer)
            strict = verify(Verifier(name=name), row["prompt"], answer, arguments)
            loose = verify(Verifier(name=name), row["prompt"], answer, arguments, loose=True)
            assert strict == expected["prompt_level_strict_acc"], (name, answer)
            assert loose == expected["prompt_level_loose_acc"], (name, answer)
            seen[name].add(strict)
            loosely += loose and not strict
    assert all(verdicts == {True, False} for verdicts in seen.values()), seen
    assert loosely >= 5, "answers that only the loose reading passes"


def written(folder, rows):
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_local_file_of_the_format(tmp_path):
    suite = load(written(tmp_path, [ROWS[0], BOTH]))
    assert (suite.split, suite.readings, suite.breakdown) == ("file", ("strict", "loose"), "instruction")
    assert [len(p.instructions) for p in suite.prompts] == [1, 2]
    assert suite.prompts[1].instructions[1].arguments == {}, "empty arguments are left out"
    own = load_suite(written(tmp_path, [BOTH]))
    assert [i.verifier.name for i in own.prompts[0].instructions] == BOTH["instruction_id_list"]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"key": None}, "expected a key"),
        ({"prompt": ""}, "expected a prompt"),
        ({"instruction_id_list": []}, "at least one id"),
        ({"instruction_id_list": ["punctuation:none", "punctuation:no_comma"]}, "unknown name"),
        ({"kwargs": [{}]}, "1 for 2 ids"),
        ({"kwargs": [{}, 3]}, "kwargs of mappings"),
    ],
)
def test_bad_rows_name_their_line(change, found, tmp_path):
    with pytest.raises(SchemaError, match=rf"line 2.*{found}"):
        load(written(tmp_path, [ROWS[0], BOTH | change]))


def test_a_key_that_stands_twice(tmp_path):
    with pytest.raises(SchemaError, match="line 2: expected each key once; found 900, as in line 1"):
        load(written(tmp_path, [BOTH, BOTH]))


def test_a_character_that_is_no_letter_is_counted_itself():
    check = Verifier(name="keywords:letter_frequency")
    arguments = {"letter": "!", "let_frequency": 2, "let_relation": "at least"}
    for _ in range(5):
        assert verify(check, "", "wow! yes!", arguments)
        assert not verify(check, "", "wow! yes.", arguments)


@pytest.mark.slow
@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published answers are not at hand (they are not ours to ship)")
def test_the_published_answers_of_gpt_4(tmp_path, theirs):
    data, said = PUBLISHED / "input_data.jsonl", PUBLISHED / "input_response_data_gpt4_20231107_145030.jsonl"
    suite = load(data)
    assert (suite.split, len(suite.prompts), sum(len(p.instructions) for p in suite.prompts)) == ("official", 541, 834)
    settings = EvaluateSettings(resamples=100)
    evaluation = evaluate_responses({"gpt-4": said}, suite, tmp_path / "evaluation.json", settings, loose_join=True)
    # The Hub's file has one prompt worded as in these answers, and no last line break: its digest is the pinned one.
    asked, said_there = b"also contain at least 3 placeholders (an", b"also contain at least one placeholder (an"
    worded = data.read_bytes().rstrip(b"\n").replace(asked, said_there)
    assert hashlib.sha256(worded).hexdigest() == FILE_SHA256
    (tmp_path / "hub.jsonl").write_bytes(worded)
    assert load(tmp_path / "hub.jsonl").split == "official"
    names = ("ifeval", "ifeval.instruction", "ifeval.loose", "ifeval.loose-instruction")
    counts = [round(m.value * m.n) for m in (evaluation.metric("gpt-4", name) for name in names)]
    assert counts == [417, 698, 431, 714]
    rows = {str(row["key"]): row for row in map(json.loads, data.read_text().splitlines())}
    for mine in map(json.loads, (tmp_path / "samples" / "gpt-4.ifeval.jsonl").read_text().splitlines()):
        if mine["id"] in ("1122", "1129"):  # lm-eval counts a random letter there
            continue
        expected = theirs(rows[mine["id"]], mine["answer"])
        assert mine["strict"] == expected["inst_level_strict_acc"], mine["id"]
        assert mine["loose"] == expected["inst_level_loose_acc"], mine["id"]
