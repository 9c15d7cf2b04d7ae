"""Suites: what is built in, and everything that can be wrong with a file."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from mechmerge.behaviors.prompts import material
from mechmerge.behaviors.schema import load_behavior
from mechmerge.behaviors.verifiers import verify
from mechmerge.errors import InputError, SchemaError
from mechmerge.evaluate.suites import Suite, SuitePrompt, load_suite

FORMATS = tuple(material()["formats"])
TEA = {"prompt": "Say tea.", "verifier": "contains", "arguments": {"text": "tea"}}


def written(tmp_path, value, name="own.yaml"):
    path = tmp_path / name
    path.write_text(json.dumps(value) if name.endswith("yaml") else "\n".join(json.dumps(row) for row in value))
    return path


def test_formats():
    suite = load_suite("formats")
    cells = Counter((p.tier, p.group) for p in suite.prompts)
    assert len(suite.groups) == 7
    assert cells.pop(("hard", "pairs")) == 48
    assert set(cells.values()) == {24, 12}
    assert sum(n for (tier, _), n in cells.items() if tier == "seen") == 144
    assert len({p.topic for p in suite.prompts}) == 24
    assert (suite.split, suite.answer_tokens, suite.chat_template, suite.limited) == ("test", 56, "model", False)


def test_arithmetic():
    suite = load_suite("arithmetic")
    cells = Counter((p.tier, p.group) for p in suite.prompts)
    assert cells == {
        ("seen", "addition"): 60,
        ("seen", "subtraction"): 60,
        ("unseen", "addition"): 30,
        ("unseen", "subtraction"): 30,
        ("hard", "addition"): 30,
        ("hard", "subtraction"): 30,
    }
    for prompt in suite.prompts:
        (instruction,) = prompt.instructions
        answer = instruction.arguments["answer"]
        assert verify(instruction.verifier, prompt.prompt, str(answer), instruction.arguments)
        assert not verify(instruction.verifier, prompt.prompt, str(answer + 1), instruction.arguments)
        assert all(len(number) == (3 if prompt.tier == "hard" else 2) for number in prompt.topic.split(","))


def test_the_hard_tier_of_formats_asks_for_two_at_once():
    hard = [p for p in load_suite("formats").prompts if p.tier == "hard"]
    asked = [tuple(i.verifier.name for i in p.instructions) for p in hard]
    assert all(len(set(names)) == 2 for names in asked)
    assert len(set(asked)) == 15, "all pairs of six formats"
    assert set(Counter(p.topic for p in hard).values()) == {2}
    capitals, no_comma = (load_behavior(name).verifier for name in ("capitals", "no_comma"))
    both = next(p for p in hard if p.id.startswith("capitals+no_comma"))
    assert [i.verifier for i in both.instructions] == [capitals, no_comma]


def test_tiers_can_be_chosen(tmp_path):
    suite = load_suite("arithmetic", tiers=("seen", "unseen"))
    assert {p.tier for p in suite.prompts} == {"seen", "unseen"}
    assert len(suite.prompts) == 180
    assert not suite.limited
    with pytest.raises(InputError, match="tiers hard"):
        load_suite(written(tmp_path, [TEA]), tiers=("hard",))


def test_digests_tell_suites_apart():
    digests = {load_suite(name, split).digest for name in ("formats", "arithmetic") for split in ("test", "develop")}
    assert len(digests) == 4
    assert load_suite("formats").digest in digests
    assert load_suite("formats", limit=30).digest not in digests


def test_a_limit_takes_the_same_share_of_every_group():
    suite = load_suite("formats", limit=39)
    assert len(suite.prompts) == 39
    assert suite.limited
    assert set(Counter((p.tier, p.group) for p in suite.prompts).values()) == {3}
    assert "hard" not in {p.tier for p in load_suite("formats", limit=6, tiers=("seen",)).prompts}
    six = load_suite("formats", limit=6)
    assert {(p.tier, p.group) for p in six.prompts} == {("seen", group) for group in FORMATS}
    assert not load_suite("formats", limit=10_000).limited


def test_a_yaml_file(tmp_path):
    path = tmp_path / "Good manners.yaml"
    path.write_text(
        "answer_tokens: 32\nchat_template: none\nverifier: {name: contains}\nprompts:\n"
        "  - {prompt: Thank the guard., arguments: {text: thank}, topic: guards, group: thanks}\n"
        "  - {id: 7, prompt: Greet her., verifier: punctuation:no_comma, tier: unseen}\n"
    )
    suite = load_suite(path)
    assert (suite.name, suite.split, suite.answer_tokens, suite.chat_template) == ("Good-manners", "file", 32, "none")
    assert [p.id for p in suite.prompts] == ["1", "7"]
    assert [p.instructions[0].verifier.name for p in suite.prompts] == ["contains", "punctuation:no_comma"]
    assert suite.groups == ("thanks", "all")


def test_a_prompt_of_several_instructions(tmp_path):
    both = [{"verifier": {"name": "contains"}, "arguments": {"text": word}} for word in ("tea", "milk")]
    suite = load_suite(written(tmp_path, [{"prompt": "Say tea and milk.", "instructions": both}]))
    assert [i.arguments["text"] for i in suite.prompts[0].instructions] == ["tea", "milk"]
    single = load_suite(written(tmp_path, [TEA]))
    assert len(single.prompts[0].instructions) == 1


def test_a_jsonl_file_and_a_plain_list_are_the_same_suite(tmp_path):
    rows = [TEA, TEA | {"id": "b"}]
    assert load_suite(written(tmp_path, rows, "own.jsonl")) == load_suite(written(tmp_path, rows))


@pytest.mark.parametrize(
    ("value", "error", "found"),
    [
        ([TEA | {"id": "a"}, TEA | {"id": "a"}], SchemaError, "'a' stands twice"),
        ([TEA | {"id": 2}, TEA], SchemaError, "'2' stands twice"),
        ([{"verifier": "contains"}], SchemaError, "prompt 1: expected a prompt"),
        ([TEA, TEA | {"prompt": ""}], SchemaError, "prompt 2: expected a prompt"),
        ([{"prompt": "Hi."}], SchemaError, "expected a verifier"),
        ([TEA | {"verifier": "contain"}], InputError, "prompt 1 .*unknown name"),
        ([TEA | {"verifier": {"name": "contains", "min": 3}}], SchemaError, "unknown key"),
        ([TEA | {"arguments": {}}], InputError, "the argument text"),
        ([TEA | {"arguments": {"text": "a", "case": True}}], InputError, "unknown 'case'"),
        ([TEA | {"weight": 2}], SchemaError, "unknown key"),
        ([TEA | {"group": "min"}], SchemaError, "worst group"),
        ([TEA | {"group": "loose"}], SchemaError, "loose reading"),
        ([TEA | {"instructions": []}], SchemaError, "both"),
        ([{"prompt": "Hi.", "instructions": []}], SchemaError, "instructions"),
        ([{"prompt": "Hi.", "instructions": [{"verifier": {"name": "contain"}}]}], InputError, "unknown name"),
        ({"prompts": [TEA], "readings": ["loose"]}, SchemaError, "strict"),
        ([TEA | {"tier": "third"}], SchemaError, "tier"),
        (
            [
                {
                    "prompt": "Hi.",
                    "verifier": "keywords:frequency",
                    "arguments": {"keyword": "a", "frequency": 2, "relation": "about"},
                }
            ],
            InputError,
            "about",
        ),
        ({"prompts": [TEA], "spilt": "test"}, SchemaError, "unknown key"),
        ({"prompts": [TEA], "split": "test"}, SchemaError, "no split"),
        ({"prompts": [TEA], "name": "a.b"}, SchemaError, "name"),
        ({"prompts": []}, SchemaError, "prompts"),
        ({"name": "a"}, SchemaError, "list of prompts"),
        ("text", SchemaError, "list of prompts"),
        (["text"], SchemaError, "prompt 1"),
    ],
)
def test_bad_files_are_errors_of_one_line(tmp_path, value, error, found):
    path = written(tmp_path, value)
    with pytest.raises(error, match=found) as caught:
        load_suite(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_broken_line_is_named(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps(TEA) + "\n\n{'prompt'\n")
    with pytest.raises(SchemaError, match="line 3"):
        load_suite(path)


def test_neither_built_in_nor_a_file():
    with pytest.raises(InputError, match="formats, arithmetic"):
        load_suite("format")


def test_a_suite_needs_prompts():
    prompt = SuitePrompt(id="a", prompt="Hi.", verifier={"name": "contains"}, arguments={"text": "a"})
    assert Suite(name="own", split="file", prompts=(prompt,)).groups == ("all",)
    with pytest.raises(ValueError, match="prompts"):
        Suite(name="own", split="file", prompts=())
