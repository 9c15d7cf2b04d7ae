"""Behaviours of all IFEval instruction types: one table, one mechanism, and each judged by its checker."""

from __future__ import annotations

import json

import pytest

from mechmerge.behaviors import nltk_data
from mechmerge.behaviors.code_prompts import code_tasks
from mechmerge.behaviors.instructions import behavior_of_instruction, instruction_prompts, instructions
from mechmerge.behaviors.prompts import SPLITS, material
from mechmerge.behaviors.schema import builtin_names, load_behavior
from mechmerge.behaviors.verifiers import IFEVAL, NEED_PUNKT, check_arguments, verify
from mechmerge.errors import InputError, MissingError

DIGESTS = {
    "capitals": "e6625e13ed8e9a7fb6dbff9ed366d484682b1e9099b9007b64abd3a85ae5d5ce",
    "no_comma": "f274c6883532a1f0a64fb135b275fe7e7f2d6f09c8f50b1b80c07be3df707139",
    "title": "6b88a340a0e54e86bcc55370aea0933e4bd5f4a5bffbbca9586aef27055af608",
    "quotation": "b874e085eaf84d2f472f9d64c18c8f3d939e95277d7d1351d40117c1df91ab36",
    "highlights": "a6ca7b17aa80a7987a89426346d5137ee0f1d897c58a9c4c40f53fd9de5b3ddb",
    "sections": "23b45e3d37b3a1b4601238f21385304e254d20ef9d724bbc33438eedc6049acb",
    "arithmetic": "f5c44a588f944c9033e7ad1b85374dcb0047a19e15ee17d3fd3043f3982da852",
}
"""Of the behaviours that results were recorded with: score files name them."""

ANSWERS = {
    # behaviour: (an answer to its first prompt that passes, answers that fail); first prompts are about a harbor town
    "capitals": ("BOATS LIE IN THE HARBOR ALL NIGHT.", ["Boats lie in the harbor all night.", "BOATS."]),
    "no_comma": ("Boats lie in the harbor all night.", ["Boats, nets and gulls fill the harbor.", "Boats."]),
    "title": ("<<Boats>>\nThey lie in the harbor.", ["Boats\nThey lie in the harbor.", "<<>>"]),
    "quotation": ('"Boats lie in the harbor all night."', ['"Boats" lie in the harbor all night.', '"Boats."']),
    "highlights": ("*Boats* lie in the *harbor*.", ["*Boats* lie in the harbor.", "*Boats*"]),
    "sections": ("SECTION 1\nBoats come in.\nSECTION 2\nGulls cry.", ["SECTION 1\nBoats.", "Boats."]),
    "lowercase": ("boats lie in the harbor all night.", ["Boats lie in the harbor all night.", "boats."]),
    "capital_words": ("The BOATS and NETS of the HARBOR lie still.", ["The BOATS and nets of the harbor lie still.", "BOATS"]),
    "repeat_prompt": (
        "Give me a brief description of a harbor town. It has boats and a long pier and some gulls.",
        [
            "It has boats and a long pier, and that is a brief description of a harbor town as I see it.",
            "Give me a brief description of a harbor town.",
        ],
    ),
    "two_responses": (
        "Boats lie there all night.\n******\nGulls cry over the pier.",
        ["Boats lie there.\n***\nGulls cry over the pier.", "a ****** b"],
    ),
    "placeholders": ("Come to [town] and ask for [name] there.", ["Come to [town] and ask for me there.", "[town] [name]"]),
    "postscript": (
        "Boats lie in the harbor.\nP.S. Bring a warm coat.",
        ["Boats lie in the harbor. Bring a warm coat.", "P.S."],
    ),
    "constrained_response": ("My answer is yes.", ["Yes.", "I think that most people like it."]),
    "json": (
        '{"boats": ["red", "blue"]}',
        ['"Boats lie in the harbor all night."', "7", "{}", '{"boats": 2} It has two.', "boats"],
    ),
    "bullets": ("* Boats lie there\n* Gulls cry all day", ["* Boats lie there\n* Gulls cry\n* Nets dry", "* a\n* b"]),
    "keywords": ("From the quiet pier I see a lit window.", ["From the quiet pier I see a lamp.", "quiet window"]),
    "forbidden_words": ("Boats lie side by side all night.", ["Boats lie in the harbor all night.", "Boats."]),
    "keyword_frequency": (
        "Every morning boats leave; each morning gulls follow.",
        ["Every morning boats leave, and gulls follow.", "morning morning"],
    ),
    "letter_frequency": ("A lazy breeze dozes over the hazy pier.", ["A lazy wind sleeps over the pier.", "zzz"]),
    "language": (
        "Die kleine Stadt liegt am Meer und hat einen alten Hafen.",
        ["The small town lies at the sea and has an old harbor.", "Hafen"],
    ),
    "nth_paragraph": (
        "Boats lie in the harbor.\n\nHowever, no one sails today.",
        [
            "Boats lie in the harbor.\n\nNo one sails today, however.",
            "Boats lie in the harbor. However, no one sails today.",
            "Boats\n\nHowever",
        ],
    ),
    "paragraphs": (
        "Boats lie in the harbor.\n***\nNo one sails today.",
        ["Boats lie in the harbor.\n\nNo one sails today.", "a\n***\nb"],
    ),
    "sentences": (
        "Boats lie there. Gulls cry. Nets dry. Men wait. It rains.",
        ["Boats lie there. Gulls cry. It rains.", "A. B."],
    ),
    "words": ("boat " * 60, ["boat " * 59, "boat"]),
    "end_phrase": (
        "Boats lie in the harbor, and gulls cry over the pier. Any other questions?",
        ["Any other questions? Boats lie in the harbor, and gulls cry over the pier.", "Any other questions?"],
    ),
}


def test_recorded_behaviours_have_not_changed() -> None:
    assert {name: load_behavior(name).digest for name in DIGESTS} == DIGESTS


def test_every_instruction_type_has_one_behaviour() -> None:
    table = behavior_of_instruction()
    assert set(table) == set(IFEVAL)
    assert len(set(table.values())) == 25
    assert set(ANSWERS) == set(table.values()) == set(builtin_names()) - {"arithmetic", "code"}
    for instruction, name in table.items():
        verifier = load_behavior(name).verifier
        assert verifier is not None
        assert verifier.name == ("json" if name == "json" else instruction)


@pytest.mark.parametrize("name", list(ANSWERS))
def test_a_good_answer_passes_and_bad_ones_fail(name: str) -> None:
    behavior = load_behavior(name)
    verifier, pair = behavior.verifier, behavior.pairs[0]
    assert verifier is not None
    if verifier.name in NEED_PUNKT:
        try:
            nltk_data.ensure("punkt_tab")
        except MissingError as error:
            pytest.skip(str(error))
    good, bad = ANSWERS[name]
    assert verify(verifier, pair.with_, good, pair.arguments)
    for answer in bad:
        assert not verify(verifier, pair.with_, answer, pair.arguments), answer


@pytest.mark.parametrize("name", list(instructions()))
def test_prompts_of_an_instruction_type(name: str) -> None:
    behavior = load_behavior(name)
    verifier = behavior.verifier
    assert verifier is not None
    assert [pair.topic for pair in behavior.pairs] == material()["topics"]["calibrate"]
    assert len({pair.with_ for pair in behavior.pairs}) == len(behavior.pairs)
    for pair in behavior.pairs:
        assert pair.with_.startswith(f"{pair.without} "), "x⁻ is x⁺ without the instruction"
        assert "{" not in pair.with_
        check_arguments(verifier, pair.arguments)
        for key, value in pair.arguments.items():  # what is judged is what was asked for
            for part in value if isinstance(value, list) else [value]:
                assert key == "language" or str(part) in pair.with_


@pytest.mark.parametrize("name", list(instructions()))
def test_both_halves_get_every_wording_and_case(name: str) -> None:
    """Prompts are halved by taking turns (localize/anchor.py)."""
    spec, pairs = instructions()[name], load_behavior(name).pairs
    told = [(pair.with_.removeprefix(pair.without).strip(), json.dumps(pair.arguments)) for pair in pairs]
    assert len(spec["wordings"]) == 3
    cases = [json.loads(case) for _, case in told[: len(spec.get("cases", [0]))]]
    for half in (told[0::2], told[1::2]):
        if name != "repeat_prompt":
            assert {case for _, case in half} == {json.dumps(case) for case in cases}
        openings = {wording.partition("{")[0] for wording in spec["wordings"]}
        assert all(any(text.startswith(opening) for text, _ in half) for opening in openings)


def test_splits_of_an_instruction_type_share_no_prompt() -> None:
    found = [{p.text for name in instructions() for p in instruction_prompts(name, split)} for split in SPLITS]
    assert sum(map(len, found)) == len(frozenset().union(*found))


def test_json_is_stricter_than_ifeval() -> None:
    json_only = load_behavior("json").verifier
    assert json_only is not None
    official = json_only.model_copy(update={"name": "detectable_format:json_format"})
    for answer in ('"A quoted sentence."', "7", "null", "[]", "{}"):
        assert verify(official, "", answer, {})
        assert not verify(json_only, "", answer, {})
    for answer in ('{"a": 1}', '```json\n{"a": 1}\n```', "```\n[1, 2]\n```"):
        assert verify(official, "", answer, {})
        assert verify(json_only, "", answer, {})
    assert not verify(json_only, "", "[" * 100_000, {})


def test_the_code_behaviour_asks_for_calibration_tasks_and_runs_the_answers() -> None:
    behavior, tasks = load_behavior("code"), code_tasks("calibrate")
    assert behavior.verifier is not None
    assert [pair.with_ for pair in behavior.pairs] == [task.prompt.text for task in tasks]
    assert len({pair.topic for pair in behavior.pairs}) >= 4
    pair, task = behavior.pairs[0], tasks[0]
    assert verify(behavior.verifier, pair.with_, f"```python\n{task.solution}```", pair.arguments)
    assert not verify(behavior.verifier, pair.with_, f"```python\n{task.wrong[0]}```", pair.arguments)


def test_an_unknown_name_is_told_all_names() -> None:
    with pytest.raises(InputError) as caught:
        load_behavior("shouting")
    assert all(f"{name}" in str(caught.value) for name in builtin_names())
