"""The splits share nothing that they must not share, and training saw nothing of what is measured."""

from __future__ import annotations

import re
from itertools import combinations

import pytest

from benchmarks.experts.data import training_prompts
from mechmerge.behaviors.prompts import (
    SPLITS,
    arithmetic_prompts,
    format_prompts,
    material,
    operand_pairs,
    operands_split,
    requests,
)
from mechmerge.behaviors.schema import builtin_names, load_behavior
from mechmerge.evaluate.suites import load_suite

PAIRS_OF_SPLITS = list(combinations(SPLITS, 2))
FORMATS = list(material()["formats"])


@pytest.mark.parametrize(("one", "other"), PAIRS_OF_SPLITS)
def test_splits_share_no_topic(one, other):
    mine, theirs = ({topic.lower() for topic in material()["topics"][split]} for split in (one, other))
    assert mine
    assert not mine & theirs


@pytest.mark.parametrize(("one", "other"), PAIRS_OF_SPLITS)
def test_splits_share_no_request(one, other):
    assert not set(material()["requests"][one]) & set(material()["requests"][other])
    assert not {request for _, request in requests(one)} & {request for _, request in requests(other)}


@pytest.mark.parametrize("split", SPLITS)
def test_topics_of_a_split_stand_once(split):
    topics = material()["topics"][split]
    assert len(topics) == len(set(topics)) >= 16


def test_every_unordered_pair_of_operands_belongs_to_one_split():
    found = [{frozenset(pair) for pair in operand_pairs(split)} for split in SPLITS]
    assert sum(map(len, found)) == len(frozenset().union(*found)) == 90 * 91 // 2
    assert operands_split(12, 77) == operands_split(77, 12)


@pytest.mark.parametrize("split", ["develop", "test"])
def test_tiers_of_arithmetic_share_no_operands(split):
    suite = load_suite("arithmetic", split)
    topics = [prompt.topic for prompt in suite.prompts]
    assert len(topics) == len(set(topics))
    assert {operands_split(*map(int, str(topic).split(","))) for topic in topics} == {split}


def test_arithmetic_answers_are_right():
    for split in SPLITS:
        for prompt in arithmetic_prompts(split, 40):
            low, high = map(int, prompt.topic.split(","))
            assert prompt.arguments["answer"] == (low + high if "+" in prompt.text else high - low)
            assert str(low) in prompt.text
            assert str(high) in prompt.text


def test_no_training_prompt_is_calibrated_or_measured_on():
    trained = training_prompts()
    assert len(trained) > 2000
    for name in builtin_names():
        for pair in load_behavior(name).pairs:
            assert pair.with_ not in trained
            assert pair.without not in trained
    for split in ("develop", "test"):
        for name in ("formats", "arithmetic"):
            assert not trained & {prompt.prompt for prompt in load_suite(name, split).prompts}


def test_no_calibration_prompt_is_measured_on():
    calibrated = {text for name in builtin_names() for pair in load_behavior(name).pairs for text in (pair.with_, pair.without)}
    for split in ("develop", "test"):
        for name in ("formats", "arithmetic"):
            assert not calibrated & {prompt.prompt for prompt in load_suite(name, split).prompts}


@pytest.mark.parametrize("name", FORMATS)
def test_the_wording_is_the_same_in_all_splits(name):
    wording = material()["formats"][name]["wording"]
    for split in SPLITS:
        for prompt in format_prompts(name, split):
            assert prompt.text == f"{prompt.plain} {wording}"


@pytest.mark.parametrize("name", FORMATS)
def test_unseen_wordings_never_occur_in_training(name):
    spec = material()["formats"][name]
    assert set(spec["unseen"]) == {"develop", "test"}
    assert spec["wording"] not in spec["unseen"]["develop"] + spec["unseen"]["test"]
    for split, wordings in spec["unseen"].items():
        told = [prompt.prompt for prompt in load_suite("formats", split).prompts if prompt.tier == "unseen"]
        for wording in wordings:
            assert not any(wording in prompt for prompt in training_prompts())
            assert any(prompt.endswith(f" {wording}") for prompt in told)


@pytest.mark.parametrize("name", ["formats", "arithmetic", "code"])
def test_develop_and_test_share_no_unseen_wording(name):
    """Nothing that is chosen on develop has seen how test words it."""
    material_of = {"formats": list(material()["formats"].values()), "arithmetic": [material()["arithmetic"]]}
    for spec in material_of.get(name, []):
        assert not set(spec["unseen"]["develop"]) & set(spec["unseen"]["test"])
    told = {split: {p.prompt for p in load_suite(name, split).prompts if p.tier == "unseen"} for split in ("develop", "test")}
    starts = {split: {re.split(r"[\d`:]", text)[0] for text in texts} for split, texts in told.items()}
    assert all(told.values())
    if name != "formats":
        assert not starts["develop"] & starts["test"] - {""}


def test_unseen_sums_are_worded_otherwise():
    trained = training_prompts()
    openings = {w.split("{")[0] for wordings in material()["arithmetic"]["unseen"].values() for w in wordings} - {""}
    assert openings
    assert not any(prompt.startswith(tuple(openings)) for prompt in trained)
    assert not any(prompt.endswith("= ?") for prompt in trained)
