"""Answers made elsewhere: how rows find their prompts, and that nothing is dropped."""

from __future__ import annotations

import json

import pytest

from mechmerge.artifacts import read_document
from mechmerge.cli.main import main
from mechmerge.errors import SchemaError
from mechmerge.evaluate.record import EvaluateSettings, Evaluation
from mechmerge.evaluate.responses import evaluate_responses, join
from mechmerge.evaluate.suites import Suite, load_suite
from tests.test_generation import Recorder

WORDINGS = {
    "a": "Write a short poem about the green tea of the north without commas.",
    "b": "Describe milk.",
    "c": "Say something about bread and butter to a friend of yours today.",
}


@pytest.fixture
def suite(tmp_path) -> Suite:
    rows = [{"id": key, "prompt": text, "verifier": "punctuation:no_comma"} for key, text in WORDINGS.items()]
    path = tmp_path / "own.yaml"
    path.write_text(json.dumps({"readings": ["strict", "loose"], "breakdown": "instruction", "prompts": rows}))
    return load_suite(path)


def written(folder, rows, name="answers.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_are_joined_by_key_or_by_the_very_words(suite, tmp_path):
    by_key = join(written(tmp_path, [{"key": "b", "response": "x"}, {"key": "a", "response": "y"}]), suite, loose=False)
    assert (by_key.answers, by_key.how, by_key.unmatched) == ({1: "x", 0: "y"}, "key", [])
    rows = [{"prompt": WORDINGS["c"], "response": "z"}, {"prompt": "Describe silk.", "response": "w"}]
    by_text = join(written(tmp_path, rows), suite, loose=False)
    assert (by_text.answers, by_text.how, by_text.unmatched) == ({2: "z"}, "prompt", [2])


def test_loose_joining_pairs_only_what_is_alike(suite, tmp_path):
    rows = [
        {"prompt": WORDINGS["a"].replace("short poem", "small poem"), "response": "1"},
        {"prompt": "What is the weather?", "response": "2"},
        {"prompt": WORDINGS["b"], "response": "3"},
    ]
    found = join(written(tmp_path, rows), suite, loose=True)
    assert (found.answers, found.how, found.unmatched, found.alike) == ({1: "3", 0: "1"}, "loose", [2], [(1, "a")])
    assert join(written(tmp_path, rows), suite, loose=False).unmatched == [1, 2]


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([{"key": "a", "response": "x"}, {"key": "a", "response": "y"}], "line 2.*second one to a"),
        ([{"response": "x"}], "line 1.*prompt"),
        (["x"], "line 1"),
        ([], "one answer a line"),
    ],
)
def test_bad_files(rows, found, suite, tmp_path):
    with pytest.raises(SchemaError, match=found):
        join(written(tmp_path, rows), suite, loose=False)


def test_what_is_missing_counts_as_failed_and_is_told(suite, tmp_path):
    rows = [{"key": "a", "response": "no comma"}, {"key": "b", "response": "one, two"}, {"key": "z", "response": "lost"}]
    recorder = Recorder()
    settings = EvaluateSettings(resamples=100)
    files = {"mine": written(tmp_path, rows)}
    evaluation = evaluate_responses(files, suite, tmp_path / "e.json", settings, progress=recorder)
    metric = evaluation.metric("mine", "own")
    assert (metric.n, metric.value) == (3, pytest.approx(1 / 3))
    assert evaluation.models["mine"].suites["own"].missing == 1
    what = evaluation.models["mine"].id
    assert (what.rows, what.unmatched, what.joined) == (3, 1, "key")
    assert any("1 of 3 prompts have no answer" in note for note in recorder.notes)
    assert any("lines 3" in note for note in recorder.notes)
    kept = [json.loads(line) for line in (tmp_path / "samples" / "mine.own.jsonl").read_text().splitlines()]
    assert [row["passed"] for row in kept] == [True, False, False]
    assert kept[2]["missing"] is True


def test_a_loose_reading_and_thoughts(suite, tmp_path):
    rows = [
        {"key": "a", "response": "Sure, here:\nno comma"},
        {"key": "b", "response": "<think>well, well</think>plain"},
        {"key": "c", "response": "<think>never, ended"},
    ]
    path = written(tmp_path, rows)

    def passed(thinking, metric):
        settings = EvaluateSettings(resamples=100, thinking=thinking)
        return evaluate_responses({"m": path}, suite, tmp_path / "e.json", settings).metric("m", metric).value

    assert passed("keep", "own") == 0
    assert passed("keep", "own.loose") == pytest.approx(1 / 3)
    assert passed("strip", "own") == pytest.approx(1 / 3), "a thought that never ends leaves an empty answer"
    assert passed("strip", "own.loose") == pytest.approx(2 / 3)


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


def test_commands(suite, tmp_path, capsys):
    good = written(tmp_path, [{"key": key, "response": "fine"} for key in WORDINGS], "good.jsonl")
    bad = written(tmp_path, [{"key": key, "response": "a, b"} for key in WORDINGS], "bad.jsonl")
    out, common = tmp_path / "e.json", ["--suite", tmp_path / "own.yaml", "--quiet"]
    assert run("evaluate", "--responses", bad, "--responses", f"top={good}", *common, "--out", out, "--format", "csv") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("model,suite,metric,value,low,high,n,clusters,against,difference,")
    assert any(line.startswith("top,own,own,1.0,") for line in lines)
    evaluation = read_document(Evaluation, out)
    assert (list(evaluation.models), evaluation.against) == (["bad", "top"], ("bad",))
    assert evaluation.pair("top", "bad", "own").difference == 1
    assert run("evaluate", *common, "--out", out) == 2
    assert run("evaluate", tmp_path, "--responses", good, *common) == 2
    capsys.readouterr()
    other = tmp_path / "other"
    other.mkdir()
    assert run("evaluate", "--responses", f"third={good}", *common, "--out", other / "evaluation.json") == 0
    chart = tmp_path / "chart.png"
    assert run("compare", out, other / "evaluation.json", "--against", "bad", "--chart", chart, "--format", "markdown") == 0
    printed = capsys.readouterr().out
    assert "| third | bad | own |" in printed
    assert chart.read_bytes()[:4] == b"\x89PNG"
    assert run("evaluate", "--responses", good, *common, "--thinking", "strip", "--out", other / "evaluation.json") == 0
    assert run("compare", out, other / "evaluation.json") == 2
    assert "thinking" in capsys.readouterr().err
    gate = tmp_path / "gate.yaml"
    gate.write_text("model: top\nrules: [{metric: own, difference_to: bad, at_least: 0.1}]\n")
    assert run("gate", out, gate) == 0
