"""Older files of ours: read where they can be, refused in one line where they cannot."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
from pydantic import ConfigDict

from mechmerge.artifacts import Document, Migration, parse_document, parse_json, read_document, write_arrays
from mechmerge.errors import InputError, SchemaError
from mechmerge.evaluate.gate import Gate, GateResult, check_gate
from mechmerge.evaluate.record import Evaluation
from mechmerge.evaluate.table import markdown_table
from mechmerge.localize.scores import read_scores
from mechmerge.pipeline.inspection import inspect_any

RESULTS = Path(__file__).parent.parent / "benchmarks/results/demo-2026-11-22"
"""A run of 22 November 2026: its evaluation and its gate's verdict are of schema version 1."""


class Third(Document):
    """A format in its third version: `length` in feet became `length_m`, and `name` was split."""

    MIGRATIONS: ClassVar[Mapping[int, Migration]] = {
        1: lambda old: {"length_m": old.pop("length") * 0.3048} | old,
        2: lambda old: (
            {"first": old["name"].split()[0], "last": old["name"].split()[1]} | {k: v for k, v in old.items() if k != "name"}
        ),
    }
    schema_version: Literal[3] = 3
    length_m: float
    first: str
    last: str


def test_versions_are_migrated_one_after_the_other() -> None:
    wanted = Third(length_m=3.048, first="A", last="B")
    first = {"schema_version": 1, "length": 10, "name": "A B"}
    kept = copy.deepcopy(first)
    assert parse_document(Third, first, "x") == wanted
    assert first == kept, "what is given is not changed"
    assert parse_document(Third, {"schema_version": 2, "length_m": 3.048, "name": "A B"}, "x") == wanted
    assert parse_document(Third, wanted.model_dump(mode="json"), "x") == wanted
    # A file that says no version is one of today's.
    assert parse_document(Third, {"length_m": 3.048, "first": "A", "last": "B"}, "x") == wanted


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"schema_version": 4}, "expected at most 3; found 4, of a newer mechmerge; upgrade mechmerge"),
        ({"schema_version": 0}, "expected 3; found 0, which is read no more"),
        ({"schema_version": -1}, "read no more"),
        ({"schema_version": "2"}, "schema_version"),
        ({"schema_version": True}, "schema_version"),
        ({"schema_version": 1, "name": "A B"}, "a Third of schema version 1"),
        ({"schema_version": 1, "length": None, "name": "A B"}, "schema version 1"),
        ({"schema_version": 2, "name": "A"}, "schema version 2"),
        ({"schema_version": 1, "length": 1, "name": "A B", "extra": 1}, "extra: unknown key"),
    ],
)
def test_what_cannot_be_migrated_is_one_line(value: dict[str, Any], said: str) -> None:
    with pytest.raises(SchemaError, match=said) as caught:
        parse_document(Third, value, "file.json")
    assert str(caught.value).startswith("file.json")
    assert "\n" not in str(caught.value)


def documents() -> list[type[Document]]:
    """Every record of the package with a version."""
    import mechmerge.behaviors.schema
    import mechmerge.evaluate.suite_files
    import mechmerge.localize.effect_file
    import mechmerge.localize.rounds_file
    import mechmerge.pipeline.sweep
    import mechmerge.recipe.schema  # noqa: F401

    found, queue = [], list(Document.__subclasses__())
    while queue:
        kind = queue.pop()
        queue += kind.__subclasses__()
        if kind.__module__.startswith("mechmerge.") and "schema_version" in kind.model_fields:
            found.append(kind)
    return found


def test_every_older_version_is_migrated_or_refused_on_purpose() -> None:
    kinds = documents()
    assert {Evaluation, GateResult} <= set(kinds)
    for kind in kinds:
        version = kind.model_fields["schema_version"].default
        assert sorted(kind.MIGRATIONS) == list(range(1, version)), f"{kind.__name__} says nothing of an older version"


# ----------------------------------------------------------------------------------------------------------- real old files
def test_an_evaluation_of_schema_1_is_read() -> None:
    path = RESULTS / "evaluation.json"
    old = parse_json(path.read_text("utf-8"), str(path))
    assert old["schema_version"] == 1, "the file of this test is an old one"
    new = read_document(Evaluation, path)
    assert new.schema_version == 2
    for name, model in old["models"].items():
        for suite, result in model["suites"].items():
            held = new.models[name].suites[suite].metrics
            assert {flat: metric.model_dump() for flat, metric in held.items()} == result["metrics"]
    assert [pair.model_dump(mode="json")["difference"] for pair in new.pairs] == [pair["difference"] for pair in old["pairs"]]
    assert new.suites["formats"].headlines[:1] == ("formats",)
    assert set(new.suites["formats"].headlines) == {f for f in new.metrics("base") if f.split("@")[0] == "formats"}
    assert "| base |" in markdown_table(new)
    assert inspect_any(str(path)).tables["evaluation"][0]["model"] == "base"
    # What it does not hold is refused, not made up.
    with pytest.raises(InputError, match="evaluate again"):
        new.column("base", "formats")
    rules = [{"metric": "formats", "at_least": 0.0}, {"metric": "formats", "difference_to": "base", "at_least": 0.0}]
    plain, paired = check_gate(new, Gate.model_validate({"model": "conflict", "rules": rules})).rules
    assert plain.passed
    assert "evaluate again" in str(paired.problem)
    assert not paired.passed
    # Written again it is a file of today.
    assert Evaluation.model_validate(json.loads(new.model_dump_json())) == new


def test_a_verdict_of_schema_1_is_read() -> None:
    path = RESULTS / "gate.json"
    old = json.loads(path.read_text("utf-8"))
    assert old["schema_version"] == 1
    new = read_document(GateResult, path)
    assert (new.passed, len(new.rules)) == (old["passed"], len(old["rules"]))
    assert [rule.found for rule in new.rules] == [rule["found"] for rule in old["rules"]]


class FirstScores(Document):
    """The metadata of score files as the first version wrote it, field by field."""

    KEPT: ClassVar[dict[str, Any]] = {
        "schema_version": 1,
        "kind": "scores",
        "base": {"name": "b", "revision": None, "shards": {"model.safetensors": "a" * 64}},
        "expert": {"name": "e", "revision": None, "shards": {"model.safetensors": "b" * 64}},
        "behavior": "title",
        "behavior_digest": "c" * 64,
        "chat_template": "none",
        "anchor": {
            "layer": 2, "valid": True, "reasons": [], "separation": 0.9, "gap": 1.0, "gap_low": 0.5, "steering_base": None,
            "steering_steered": None, "prompts": 8, "held_out": 8,
        },
        "scale": "recovery",
        "state_base": 0.0,
        "state_expert": 1.0,
        "identity_control": 0.0,
        "dtype": "float32",
        "seed": 0,
        "verified": {"head": 1},
        "versions": {"torch": "2.13.0"},
    }  # fmt: skip


def test_a_score_file_of_the_first_days_is_read(tmp_path: Path) -> None:
    """Its version never changed: every field that came later has a default that says `not measured`."""

    class Written(Document):
        model_config = ConfigDict(extra="allow")

    scores = {"head.screen": np.zeros((3, 4), np.float32), "head.sufficiency": np.full((3, 4), np.nan, np.float32)}
    write_arrays(tmp_path / "title.safetensors", scores, Written(**FirstScores.KEPT))
    file = read_scores(tmp_path / "title.safetensors")
    assert file.metadata.source == "anchor"
    assert file.metadata.curves is file.metadata.roles is None
    assert file.metadata.anchor is not None
    assert file.metadata.anchor.stability is None
    assert inspect_any(str(tmp_path / "title.safetensors")).kind == "scores"
