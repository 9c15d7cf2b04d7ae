"""Evaluation: resumable to the byte, shared between equal models, and honest about what could not be judged."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import textwrap

import pytest

from mechmerge.artifacts import read_document
from mechmerge.cli.evaluate import parse_models, plain_name
from mechmerge.cli.main import main
from mechmerge.errors import InputError, MissingError, SchemaError
from mechmerge.evaluate.record import EvaluateSettings, Evaluation
from mechmerge.evaluate.run import evaluate
from mechmerge.evaluate.suites import Suite, SuitePrompt, load_suite
from mechmerge.evaluate.table import headlines, markdown_pairs, markdown_table, render_table
from mechmerge.models.load import load_model, load_tokenizer, quiet
from mechmerge.models.references import resolve
from tests.nltk_home import without_punkt
from tests.test_generation import Recorder, lively

SETTINGS = EvaluateSettings(dtype="float32", batch=4, resamples=200)


@pytest.fixture(scope="module")
def suites(tmp_path_factory):
    """Two small suites; what a random model says passes some checks and fails others."""
    folder = tmp_path_factory.mktemp("suites")
    rows = [
        {
            "prompt": f"Say number {i}.",
            "verifier": verifier,
            "arguments": arguments,
            "group": group,
            "topic": f"t{i % 3}",
            "tier": tier,
        }
        for i in range(4)
        for tier in ("seen", "unseen")
        for group, verifier, arguments in (
            ("plain", "punctuation:no_comma", {}),
            ("letter", "keywords:letter_frequency", {"letter": "ab"[i % 2], "let_frequency": 1, "let_relation": "at least"}),
            ("words", "length_constraints:number_words", {"num_words": i + 1, "relation": "at least"}),
        )
    ]
    (folder / "zoo.yaml").write_text(json.dumps({"answer_tokens": 6, "prompts": rows}))
    (folder / "ark.jsonl").write_text("\n".join(json.dumps(row | {"group": "all", "tier": "seen"}) for row in rows[:5]))
    return [load_suite(folder / "zoo.yaml"), load_suite(folder / "ark.jsonl")]


def files(folder):
    return {
        path.name: path.read_bytes() for path in [folder / "evaluation.json", *sorted((folder / "samples").glob("*.jsonl"))]
    }


@pytest.fixture(scope="module")
def trio(base, tmp_path_factory):
    """Three models that say more than one token for ever."""
    found = {}
    for seed, name in enumerate(("zebra", "merge", "ant")):
        folder = tmp_path_factory.mktemp("lively") / name
        with quiet():
            lively(load_model(base.path), seed).save_pretrained(folder)
            load_tokenizer(base.path).save_pretrained(folder)
        found[name] = resolve(str(folder))
    return found


@pytest.fixture(scope="module")
def zebra(trio):
    return trio["zebra"]


@pytest.fixture(scope="module")
def done(trio, suites, tmp_path_factory):
    """A finished evaluation and its folder."""
    out = tmp_path_factory.mktemp("done") / "evaluation.json"
    return evaluate(trio, suites, out, SETTINGS, against=["zebra", "ant"]), out.parent


def test_what_is_written(done, trio, suites):
    evaluation, folder = done
    assert sorted(files(folder)) == sorted(["evaluation.json", *(f"{m}.{s}.jsonl" for m in trio for s in ("zoo", "ark"))])
    for model in trio:
        rows = [json.loads(line) for line in (folder / "samples" / f"{model}.zoo.jsonl").read_text().splitlines()]
        assert [row["id"] for row in rows] == [prompt.id for prompt in suites[0].prompts]
        seen = [row["passed"] for row in rows if row["tier"] == "seen"]
        assert evaluation.metric(model, "zoo").value == pytest.approx(sum(seen) / len(seen))
        assert evaluation.metric(model, "zoo").n == 12
        assert evaluation.models[model].suites["zoo"].tokens == sum(row["tokens"] for row in rows)
        assert all(0 < row["tokens"] <= 6 for row in rows)
    assert 0 < evaluation.metric("zebra", "zoo").value < 1


def test_names_of_metrics(done):
    evaluation, _ = done
    tier = ["zoo", "zoo.min", "zoo.plain", "zoo.letter", "zoo.words"]
    assert list(evaluation.metrics("merge")) == [*tier, *(f"{name}@unseen" for name in tier), "ark"]
    parts = [evaluation.metric("merge", f"zoo.{group}") for group in ("plain", "letter", "words")]
    assert evaluation.metric("merge", "zoo").value == pytest.approx(sum(part.value for part in parts) / 3)
    assert evaluation.metric("merge", "zoo.min").value == min(part.value for part in parts)
    assert {part.clusters for part in parts} == {3}
    with pytest.raises(InputError, match=r"zoo\.min"):
        evaluation.metric("merge", "zoo.max")
    with pytest.raises(InputError, match="zebra"):
        evaluation.metric("nobody", "zoo")


def test_the_file_gives_back_the_evaluation_in_its_order(done, trio):
    evaluation, folder = done
    read = read_document(Evaluation, folder / "evaluation.json")
    assert read == evaluation
    assert list(read.models) == list(trio)
    assert headlines(read) == ["zoo", "zoo.min", "ark", "zoo@unseen"]
    assert markdown_table(read) == markdown_table(evaluation)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"merge": {', '"a|b": {'),
        ('"merge": {', '"[a](http://b)": {'),
        ('"zoo.plain": {', '"zoo.<b>": {'),
        ('"zoo.plain": {', '"zoo.[a](http://b)": {'),
        ('"zoo.plain": {', '"zoo.**a**": {'),
        ('"zoo": {', '"zoo|x": {'),
    ],
)
def test_names_that_would_break_out_of_tables_are_refused(old, new, done, tmp_path):
    text = (done[1] / "evaluation.json").read_text()
    assert old in text
    (tmp_path / "evaluation.json").write_text(text.replace(old, new))
    with pytest.raises(SchemaError, match="expected"):
        read_document(Evaluation, tmp_path / "evaluation.json")


def test_pairs(done):
    evaluation, _ = done
    names = [(p.model, p.against) for p in evaluation.pairs if p.headline]
    assert set(names) == {("merge", "zebra"), ("merge", "ant"), ("ant", "zebra")}
    assert len(names) == 3 * 3, "zoo, zoo@unseen and ark for each pair"
    test = evaluation.pair("merge", "zebra", "zoo")
    difference = evaluation.metric("merge", "zoo").value - evaluation.metric("zebra", "zoo").value
    assert test.difference == pytest.approx(difference)
    assert test.low <= test.difference <= test.high
    groups = {p.metric for p in evaluation.pairs if not p.headline}
    assert groups == {f"zoo.{group}{at}" for group in ("plain", "letter", "words") for at in ("", "@unseen")}
    assert (test.better - test.worse) / 12 == pytest.approx(difference)
    assert all(p.p <= p.p_holm <= 1 for p in evaluation.pairs)


def test_a_second_call_makes_nothing_and_gives_the_same_bytes(done, trio, suites):
    evaluation, folder = done
    before, times = files(folder), (folder / "timings.jsonl").read_text()
    recorder = Recorder()
    assert evaluate(trio, suites, folder / "evaluation.json", SETTINGS, recorder, against=["zebra", "ant"]) == evaluation
    assert recorder.started == []
    assert files(folder) == before
    assert (folder / "timings.jsonl").read_text() == times
    assert len(times.splitlines()) == 6


def test_no_time_in_digested_files(done):
    _, folder = done
    assert not any(b"seconds" in content or b"ended" in content for content in files(folder).values())


@pytest.mark.parametrize("change", ["weights", "dtype", "batch", "answer_tokens", "prompt", "template"])
def test_answers_of_something_else_are_not_reused(change, done, zebra, trio, suites, tmp_path):
    first = evaluate({"m": zebra}, suites[:1], tmp_path / "evaluation.json", SETTINGS)
    model, suite, settings = zebra, suites[0], SETTINGS
    match change:
        case "weights":
            model = trio["merge"]
        case "dtype" | "batch":
            settings = settings.model_copy(update={"dtype": "bfloat16"} if change == "dtype" else {"batch": 3})
        case "answer_tokens":
            suite = suite.model_copy(update={"answer_tokens": 5})
        case "prompt":
            changed = suite.prompts[0].model_copy(update={"prompt": "Say nothing."})
            suite = suite.model_copy(update={"prompts": (changed, *suite.prompts[1:])})
        case "template":
            suite = suite.model_copy(update={"chat_template": "none"})
    recorder = Recorder()
    before = files(tmp_path)
    with pytest.raises(InputError, match=r"samples of this model and these settings.*--overwrite"):
        evaluate({"m": model}, [suite], tmp_path / "evaluation.json", settings, recorder)
    assert (recorder.started, files(tmp_path)) == ([], before), "refused before anything is made or written"
    second = evaluate({"m": model}, [suite], tmp_path / "evaluation.json", settings, recorder, overwrite=True)
    assert recorder.started == [("m: zoo", len(suite.prompts))]
    assert second.models["m"].suites["zoo"].answers != first.models["m"].suites["zoo"].answers


def test_a_changed_verifier_judges_the_same_answers_anew(zebra, suites, tmp_path):
    first = evaluate({"m": zebra}, suites[:1], tmp_path / "evaluation.json", SETTINGS)
    dumped = suites[0].model_dump()
    for prompt in dumped["prompts"]:
        prompt["instructions"][0]["verifier"]["min_words"] = 99
    recorder = Recorder()
    changed = Suite.model_validate(dumped)
    second = evaluate({"m": zebra}, [changed], tmp_path / "evaluation.json", SETTINGS, recorder)
    assert recorder.started == []
    assert first.metric("m", "zoo").value > second.metric("m", "zoo").value == 0
    assert first.suites["zoo"].digest != second.suites["zoo"].digest


def test_equal_weights_answer_once(zebra, suites, tmp_path):
    recorder = Recorder()
    evaluation = evaluate(
        {"one": zebra, "two": zebra}, suites[1:], tmp_path / "evaluation.json", SETTINGS, recorder, against=["one"]
    )
    assert recorder.started == [("one: ark", 5)]
    one, two = ((tmp_path / "samples" / f"{name}.ark.jsonl").read_bytes() for name in ("one", "two"))
    assert one == two
    assert (evaluation.pairs[0].difference, evaluation.pairs[0].p) == (0, 1)


def test_killed_and_called_again_gives_the_same_bytes(done, trio, suites, tmp_path):
    """SIGKILL after the second batch: the finished batches are used as they are, and the result is the same."""
    program = f"""
        import os, signal, sys
        from pathlib import Path
        import torch
        from mechmerge.evaluate.record import EvaluateSettings
        from mechmerge.evaluate.run import evaluate
        from mechmerge.evaluate.suites import load_suite, Suite
        from mechmerge.models.references import Model
        from mechmerge.progress import NullProgress

        torch.set_num_threads(1)
        class Deadly(NullProgress):
            done = 0
            def advance(self, units=1):
                self.done += 1
                if self.done == 2:
                    os.kill(os.getpid(), signal.SIGKILL)

        folder = Path({str(tmp_path)!r})
        suites = [Suite.model_validate_json((folder / name).read_text()) for name in ("zoo", "ark")]
        trio = {{name: Model.model_validate_json((folder / f"model-{{name}}").read_text()) for name in {list(trio)!r}}}
        settings = EvaluateSettings.model_validate_json((folder / "settings").read_text())
        evaluate(trio, suites, folder / "evaluation.json", settings, Deadly(), against=["zebra", "ant"])
    """
    for suite in suites:
        (tmp_path / suite.name).write_text(suite.model_dump_json())
    for name, model in trio.items():
        (tmp_path / f"model-{name}").write_text(model.model_dump_json())
    (tmp_path / "settings").write_text(SETTINGS.model_dump_json())
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "evaluation.json").exists()
    units = sorted((tmp_path / "samples" / ".answers" / "units").glob("*/*.json"))
    assert len(units) == 2

    stamps = {unit: unit.stat().st_mtime_ns for unit in units}

    class Witness(Recorder):
        def advance(self, units=1):
            super().advance(units)
            kept.append(all(unit.exists() and unit.stat().st_mtime_ns == stamp for unit, stamp in stamps.items()))

    kept: list[bool] = []
    evaluate(trio, suites, tmp_path / "evaluation.json", SETTINGS, Witness(), against=["zebra", "ant"])
    assert kept[:6] == [True] * 6, "finished batches are not made again"
    assert files(tmp_path) == files(done[1])
    assert not (tmp_path / "samples" / ".answers" / "units").exists()
    assert not list(tmp_path.rglob("*partial*"))


def test_a_finished_batch_is_taken_as_it_is(zebra, suites, tmp_path):
    """The unit of the first batch, put there by hand, reaches the samples."""
    evaluate({"m": zebra}, suites[1:], tmp_path / "a" / "evaluation.json", SETTINGS)
    store = next((tmp_path / "a" / "samples" / ".answers").glob("*.json"))
    unit = tmp_path / "b" / "samples" / ".answers" / "units" / store.stem[:16] / "00000.json"
    unit.parent.mkdir(parents=True)
    unit.write_text(json.dumps([["from the unit", 3, True]] * 4))
    evaluate({"m": zebra}, suites[1:], tmp_path / "b" / "evaluation.json", SETTINGS)
    said = [json.loads(line)["answer"] for line in (tmp_path / "b" / "samples" / "m.ark.jsonl").read_text().splitlines()]
    assert said.count("from the unit") == 4


def broken_suite():
    bad = {"keyword": "tea", "frequency": 1, "relation": "about"}
    prompts = [
        SuitePrompt(id="bad", prompt="Say tea.", verifier={"name": "keywords:frequency"}, arguments=bad),
        SuitePrompt(id="good", prompt="Say it.", verifier={"name": "punctuation:no_comma"}),
    ]
    return Suite(name="broken", split="file", answer_tokens=4, prompts=tuple(prompts))


def test_a_verifier_that_raises_counts_as_not_passed_and_is_shown(zebra, tmp_path):
    recorder = Recorder()
    evaluation = evaluate({"m": zebra}, [broken_suite()], tmp_path / "evaluation.json", SETTINGS, recorder)
    rows = [json.loads(line) for line in (tmp_path / "samples" / "m.broken.jsonl").read_text().splitlines()]
    assert "about" in rows[0]["error"]
    assert rows[0]["passed"] is False
    assert "error" not in rows[1]
    assert evaluation.errors == evaluation.models["m"].suites["broken"].errors == 1
    assert evaluation.metric("m", "broken").value == 0.5
    assert any("1 of 2" in note for note in recorder.notes)
    assert "could not be judged" in markdown_table(evaluation)


def test_missing_data_stops_the_evaluation(zebra, tmp_path, monkeypatch):
    without_punkt(monkeypatch, tmp_path / "cache")
    arguments = {"num_sentences": 1, "relation": "at least"}
    prompt = SuitePrompt(id="a", prompt="Hi.", verifier={"name": "length_constraints:number_sentences"}, arguments=arguments)
    suite = Suite(name="s", split="file", answer_tokens=4, prompts=(prompt,))
    with pytest.raises(MissingError, match="punkt_tab"):
        evaluate({"m": zebra}, [suite], tmp_path / "evaluation.json", SETTINGS)
    assert not (tmp_path / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("names", "count", "against", "device", "found"),
    [
        ([], 1, [], "cpu", "0 and 1"),
        (["m"], 0, [], "cpu", "1 and 0"),
        (["a/b"], 1, [], "cpu", "a/b"),
        (["m"], 1, ["n"], "cpu", "found n"),
        (["m"], 2, [], "cpu", "ark twice"),
        (["m"], 1, [], "abacus", "abacus"),
    ],
)
def test_bad_input_writes_nothing(names, count, against, device, found, zebra, suites, tmp_path):
    settings = SETTINGS.model_copy(update={"device": device})
    with pytest.raises(InputError, match=found):
        evaluate(dict.fromkeys(names, zebra), [suites[1]] * count, tmp_path / "evaluation.json", settings, against=against)
    assert not list(tmp_path.iterdir())


def test_tables(done):
    from rich.console import Console

    evaluation, _ = done
    printed = io.StringIO()
    Console(file=printed, width=100).print(render_table(evaluation))
    text = printed.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    value = evaluation.metric("merge", "zoo").value
    row = next(line for line in text.splitlines() if line.strip().startswith("merge"))
    assert f"{value:.2f} ±" in row
    assert "n=12" in text
    lines = markdown_table(evaluation).splitlines()
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert f"| merge | {value:.2f} [" in lines[3]
    assert markdown_pairs(evaluation).count("\n| merge | zebra |") == 3


def run(*arguments):
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", *map(str, arguments)])
    return stop.value.code


def test_command(zebra, trio, suites, tmp_path, capsys):
    path = tmp_path / "ark.yaml"
    rows = [{"prompt": p.prompt, "instructions": [i.model_dump() for i in p.instructions]} for p in suites[1].prompts]
    path.write_text(json.dumps({"answer_tokens": 4, "prompts": rows}))
    out = tmp_path / "evaluation.json"
    common = ["--suite", path, "--out", out, "--dtype", "float32", "--quiet", "--limit", "3"]
    assert run(f"one={zebra.path}", trio["merge"].path, *common) == 0
    printed, talk = capsys.readouterr()
    assert talk == ""
    assert "one" in printed
    assert "--limit" in printed
    evaluation = read_document(Evaluation, out)
    assert list(evaluation.models) == ["one", "merge"]
    assert evaluation.against == ("one",)
    assert evaluation.metric("one", "ark").n == 3
    assert run(f"one={zebra.path}", trio["merge"].path, *common, "--against", "merge", "--format", "json") == 0
    assert json.loads(capsys.readouterr().out)["against"] == ["merge"]
    assert run(zebra.path, zebra.path, *common) == 2
    assert "NAME=" in capsys.readouterr().err
    assert run(zebra.path, "--suite", "nothing", "--out", out) == 2


def test_names_of_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    assert parse_models(("base=demo:x", "a=b", "owner/x@1", "./p=q")) == [
        ("base", "demo:x"),
        (None, "a=b"),
        (None, "owner/x@1"),
        (None, "./p=q"),
    ]
    assert [plain_name(text) for text in ("owner/x", "demo:smol-1", "demo:x+formats", "a b", "...")] == [
        "x",
        "smol-1",
        "formats",
        "a-b",
        "model",
    ]
