"""Texts that someone else wrote, on their way to a terminal, a card and a page: shown as they are, never obeyed."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from rich.console import Console

from mechmerge.cli.common import BarProgress, LineProgress, lines, show
from mechmerge.cli.main import cli
from mechmerge.errors import InputError
from mechmerge.publish.card import write_card
from mechmerge.report.files import find_run_files
from mechmerge.report.html import write_page
from tests.samples import recipe, whole_run

HOSTILE = "\x1b[31m\x9b2J\x07[bold red]<script>alert(1)</script>`x`|\u202egpj.exe ![](http://x/y.png)"
"""An escape sequence, its one-byte form, a bell, rich's and HTML's markup, a cell's end, a turned direction, and an image."""
HARMFUL = ("\x1b", "\x9b", "\x07", "\u202e")


def harmless(text: str) -> bool:
    return not any(character in text for character in HARMFUL)


def test_tables_show_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    show([{HOSTILE[:24]: HOSTILE, "n": 1}], "table", HOSTILE)
    out = capsys.readouterr().out
    assert harmless(out)
    assert "\\x1b[31m" in out
    assert "[bold" in out.replace("\n", "").replace(" ", "")


def test_progress_shows_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    plain = LineProgress()
    plain.note(HOSTILE)
    plain.start(HOSTILE, 2)
    plain.end()
    err = capsys.readouterr().err
    assert harmless(err)
    assert err.count("[bold red]") == 3
    bars = BarProgress()
    bars._console = Console(file=io.StringIO(), force_terminal=True, width=200)
    bars.note(HOSTILE)
    bars.start("[bold red]" + HOSTILE, 2)
    bars.end()
    bars.start("[/nothing] that was opened", 1)
    bars.end()
    written = bars._console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x9b" not in written
    assert "\x07" not in written
    assert "\u202e" not in written
    assert "\\x1b[31m" in written
    assert "[bold red]" in written


def test_errors_show_what_is_there() -> None:
    error = InputError(HOSTILE, expected=HOSTILE, found=f"{HOSTILE}\nsecond line" + "x" * 100_000, fix=HOSTILE)
    assert harmless(str(error))
    assert "\n" not in str(error)
    assert len(str(error)) < 8_000


def test_lines_of_a_text_stay_lines() -> None:
    assert lines("a\nb\x1b") == "a\nb\\x1b"


def test_a_gate_and_a_recipe_from_elsewhere(tmp_path: Path) -> None:
    run = tmp_path / "run"
    whole_run(run)
    gate = tmp_path / "gate.yaml"
    gate.write_text(yaml.safe_dump({"model": "sum", "rules": [{"metric": HOSTILE, "at_least": 0.1}]}))
    result = CliRunner().invoke(cli, ["gate", str(run / "evaluation.json"), str(gate)], standalone_mode=False)
    assert harmless(result.output)
    assert harmless(str(result.exception))
    strange = recipe().model_copy(update={"predicted": {HOSTILE: 0.5}})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(strange.model_dump(mode="json")))
    shown = CliRunner().invoke(cli, ["inspect", str(path)], standalone_mode=False)
    assert shown.exception is None
    assert harmless(shown.output)


def test_a_card_and_a_page_of_a_run_from_elsewhere(tmp_path: Path) -> None:
    run = tmp_path / "run"
    whole_run(run)
    record = {
        "pipeline": {"title": HOSTILE, "notes": HOSTILE, "publish": "conflict", "license": "mit", "recipes": {"conflict": {}}}
    }
    (run / "run.yaml").write_text(yaml.safe_dump(record))
    card = write_card(run, "conflict").read_text()
    assert harmless(card)
    assert "<script>" not in card
    assert "![](http" not in card
    write_page(find_run_files(run), run, lambda *_: "mit")
    page = (run / "report.html").read_text()
    assert harmless(page)
    assert "<script>alert" not in page
    assert "<img" not in page.partition("gpj.exe")[2][:80]
