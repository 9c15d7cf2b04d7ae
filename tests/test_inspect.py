"""`mechmerge inspect`, and the commands `report` and `card` from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mechmerge.artifacts import read_document, write_arrays
from mechmerge.cli.main import main
from mechmerge.errors import InputError, SchemaError
from mechmerge.localize.effect_file import read_effects
from mechmerge.localize.scores import read_scores
from mechmerge.recipe.schema import MaskMetadata, Recipe
from mechmerge.report.inspection import inspect_file
from tests.samples import LAYERS, whole_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return whole_run(tmp_path_factory.mktemp("inspect") / "run")


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    return int(stop.value.code or 0)


FILES = {
    "scores": "scores/formats/title.safetensors",
    "effects": "effects.safetensors",
    "recipe": "recipes/conflict/recipe.yaml",
    "evaluation": "evaluation.json",
}


@pytest.mark.parametrize("kind", FILES)
def test_the_kind_is_told_by_content_not_by_name(run: Path, tmp_path: Path, kind: str) -> None:
    source = run / FILES[kind]
    copy = tmp_path / "file.bin"
    copy.write_bytes(source.read_bytes())
    masks = source.with_name("masks.safetensors")
    if masks.exists():
        (tmp_path / masks.name).write_bytes(masks.read_bytes())
    assert inspect_file(copy).kind == kind


def test_documents_are_whole(run: Path) -> None:
    found = {kind: inspect_file(run / name) for kind, name in FILES.items()}
    assert found["scores"].document == read_scores(run / FILES["scores"]).metadata.model_dump(mode="json")
    assert found["effects"].document == read_effects(run / FILES["effects"]).metadata.model_dump(mode="json")
    assert found["recipe"].document == read_document(Recipe, run / FILES["recipe"]).model_dump(mode="json")
    assert found["scores"].tensors["head.screen"] == [LAYERS, 3]
    assert found["effects"].tensors["head.effect"] == [2, 2, LAYERS, 3]
    assert found["recipe"].tensors["formats.neuron"] == [LAYERS, 20]
    assert found["evaluation"].tables["evaluation"][0]["95 % interval"] == "0.410 – 0.590"


def test_an_invalid_anchor_is_said_to_be_one(run: Path) -> None:
    facts = {row["field"]: row["value"] for row in inspect_file(run / FILES["scores"]).tables["scores"]}
    assert facts["valid"] == "NO"
    assert facts["caveat"] == "anchor not valid (separation 0.55 is below 0.8): not a recovery"
    good = {row["field"] for row in inspect_file(run / "scores/formats/capitals.safetensors").tables["scores"]}
    assert "caveat" not in good


@pytest.mark.parametrize("kind", FILES)
def test_json_on_stdout(run: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("inspect", str(run / FILES[kind]), "--format", "json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["kind"] == kind
    assert printed["document"] == inspect_file(run / FILES[kind]).document


@pytest.mark.parametrize(
    ("kind", "said"), [("scores", "L1.head.0"), ("effects", "arithmetic"), ("recipe", "conflict"), ("evaluation", "0.500")]
)
def test_tables_on_stdout(run: Path, kind: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("inspect", str(run / FILES[kind])) == 0
    captured = capsys.readouterr()
    assert said in captured.out
    assert captured.err == ""


def test_what_is_no_file_of_ours_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    foreign, masks = tmp_path / "model.safetensors", tmp_path / "masks.safetensors"
    save_file({"w": np.zeros(2, np.float32)}, foreign)
    write_arrays(masks, {"e.head": np.zeros((2, 2), np.float32)}, MaskMetadata())
    texts = {"a.yaml": "x: 1\n", "b.json": "{", "c.yaml": "- 1\n", "d.bin": "\x00\x01", "e.yaml": ""}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(foreign.read_bytes()[:20])
    for path in (foreign, masks, truncated, *(tmp_path / name for name in texts)):
        with pytest.raises(SchemaError):
            inspect_file(path)
        assert call("inspect", str(path)) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.count("\n") == 1
    with pytest.raises(InputError, match="a folder"):
        inspect_file(tmp_path)
    with pytest.raises(InputError, match="nothing there"):
        inspect_file(tmp_path / "missing")


def test_report_and_card_commands(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("report", str(run)) == 0
    path, page = map(Path, capsys.readouterr().out.split())
    text = path.read_text("utf-8")
    assert (path, page) == (run / "report.md", run / "report.html")
    assert "<title>Two experts" in page.read_text("utf-8")
    assert text.startswith("# Two experts\n\nTried once.\n")
    assert text.index("| sum | linear |") < text.index("| conflict | conflict |"), "the pipeline's order"
    assert "| conflict | −0.125 | +0.250 |" in text
    assert "| conflict | 0.50 [0.41, 0.59] |" in text
    assert call("card", str(run), "--format", "json") == 0
    card = Path(json.loads(capsys.readouterr().out)["card"])
    assert "](figures/modules.png)" in card.read_text("utf-8")
    assert call("card", str(run), "--model", "nonsense") == 2
    assert "found no such recipe" in capsys.readouterr().err
