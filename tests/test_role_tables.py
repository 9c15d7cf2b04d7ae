"""Roles, depths and verification wherever a localization is shown: inspect, report.md, report.html, model card."""

from __future__ import annotations

from pathlib import Path

import pytest

from mechmerge.localize.roles import NO_ROLES, RoleThresholds
from mechmerge.localize.scores import ScoreFile
from mechmerge.publish.card import write_card
from mechmerge.report import role_tables
from mechmerge.report.files import find_run_files
from mechmerge.report.html import write_page
from mechmerge.report.inspection import inspect_file
from mechmerge.report.markup import escaped
from mechmerge.report.summary import write_report
from mechmerge.report.tables import components_rows, top_components
from tests.samples import judged_file, score_file, whole_run

CAPITALS = "scores/formats/capitals.safetensors"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one judged localization, one of raw differences and one from before roles."""
    run = whole_run(tmp_path_factory.mktemp("roles") / "run")
    judged_file("capitals").write(run / CAPITALS)
    score_file("arithmetic", "arithmetic", scale="difference").write(run / "scores" / "arithmetic" / "arithmetic.safetensors")
    return run


def judged() -> ScoreFile:
    return judged_file("capitals")


def sentences() -> tuple[str, str]:
    meta = judged().metadata
    assert meta.roles is not None
    return meta.roles.sentence, meta.verification["head"].sentence


def test_inspect_tells_roles_depths_errors_and_verification(run: Path) -> None:
    shown = inspect_file(run / CAPITALS).tables
    facts = {row["field"]: row["value"] for row in shown["scores"]}
    assert (facts["roles"], facts["best heads"]) == sentences()
    assert {"components": "MLP", "source carrier": 2, "execution": 1, "inert": 3}.items() <= shown["roles"][1].items()
    assert [row["depth"] for row in shown["depth"]] == [
        "first third (layers 0–1)",
        "middle third (layer 2)",
        "last third (layer 3)",
    ]
    assert shown["depth"][0]["weight patching, MLP"] == "+0.600"
    assert shown["modules"][0] == {
        "component": "L0.mlp",
        "weight patching": "+0.4000 ± 0.0200",
        "first-order": "–",
        "knockout": "+0.2000 ± 0.0100",
        "activation": "+0.4000 ± 0.0200",
        "role": "source carrier",
    }
    best = shown["heads, kv groups, neurons"][0]
    assert (best["component"], best["role"]) == ("L1.head.0", "source carrier")
    assert best["first-order"].endswith("± 0.0300")


def test_inspect_says_why_there_are_none_and_shows_files_from_before(run: Path) -> None:
    shown = inspect_file(run / "scores/arithmetic/arithmetic.safetensors").tables
    assert {row["field"]: row["value"] for row in shown["scores"]}["roles"] == NO_ROLES
    assert "depth" not in shown
    old = inspect_file(run / "scores/formats/title.safetensors").tables
    assert not {"roles", "depth"} & (old.keys() | {row["field"] for row in old["scores"]})
    assert list(old["modules"][0]) == ["component", "weight patching", "first-order"]


def test_the_report_tells_them(run: Path) -> None:
    files = find_run_files(run)
    text = write_report(files.scores, files.effects, files.recipes, files.evaluation, run).read_text("utf-8")
    own = text.split("### capitals")[1].split("\n### ")[0]
    roles, known = sentences()
    assert f"Roles: {roles}." in own
    assert f"- heads: {known}" in own
    assert "| MLP | 2 | 0 | 1 | 3 | 0 |" in own
    assert "| first third (layers 0–1) | +0.020 | +0.600 | +0.020 | +0.750 |" in own
    assert "| L3.attention | +0.000 ± 0.010 | – | +0.000 ± 0.010 | +0.600 ± 0.020 | aggregator / router |" in own
    assert "0.05 (modules), 0.02 (heads, KV groups), 0.005 (neurons)" in own
    assert f"Roles: {NO_ROLES}." in text.split("### arithmetic")[1].split("\n### ")[0]
    assert "oles" not in text.split("### title")[1].split("\n### ")[0]


def test_the_page_tells_them_without_scripts(run: Path, tmp_path: Path) -> None:
    text = write_page(find_run_files(run), tmp_path).read_text("utf-8")
    main = text.split('id="data"')[0]
    roles, known = sentences()
    assert f"{roles[0].upper()}{roles[1:]}." in main
    assert f"<li>{escaped(f'heads: {known}')}</li>" in main
    assert main.count("<h4>Roles</h4>") == 2, "the judged one and the one that says why it has none"
    assert f"N{NO_ROLES[1:]}." in main
    assert "capitals: positive scores by layer" in main


def test_the_card_tells_them_with_what_weakens_them(run: Path) -> None:
    def said() -> str:
        return write_card(run, "conflict").read_text("utf-8").split("## Where the behaviours lie")[1].split("\n## ")[0]

    roles, known = sentences()
    assert f"- capitals: {roles}" in said()
    assert f"- capitals, heads: {known}" in said()
    assert f"- ⚠ arithmetic (not a recovery): {NO_ROLES}" in said()
    weak = judged_file("capitals", valid=False, reasons=("too few",))
    weak.write(run / CAPITALS)
    assert f"- ⚠ capitals (not a recovery): {roles}" in said()
    judged().write(run / CAPITALS)


def test_rankings_have_only_columns_that_hold_something() -> None:
    header, _ = components_rows(top_components(score_file(), ("attention", "mlp"), 3))
    assert header == ["component", "weight patching ± standard error", "first-order estimate"]
    header, rows = components_rows(top_components(judged(), ("attention", "mlp"), 3))
    assert header[3:] == ["knockout", "activation patching", "role"]
    assert all(len(row) == 6 for row in rows)


def test_stated_thresholds_are_the_stored_ones() -> None:
    file = judged()
    assert file.metadata.roles is not None
    rule = RoleThresholds(module=0.07, output=0.3, low=0.25, errors=3)
    changed = file.metadata.model_copy(update={"roles": file.metadata.roles.model_copy(update={"thresholds": rule})})
    said = role_tables.thresholds_said(changed)
    assert all(part in said for part in ("0.07 (modules)", "0.3 (output)", "3 standard errors above 0", "below 25 % of the"))
    assert role_tables.thresholds_said(score_file().metadata) == ""
    assert role_tables.depth_rows(score_file())[1] == role_tables.role_rows(score_file())[1] == []
