"""Whoever shows or uses effects names the unit of the file's own metric, and says which anchors are not valid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError
from safetensors.numpy import load_file, save_file

from mechmerge.artifacts import METADATA_KEY
from mechmerge.errors import InputError
from mechmerge.localize.effect_file import UNITS, EffectFile, read_effects
from mechmerge.localize.rounds import RoundSettings
from mechmerge.localize.scores import AnchorRecord
from mechmerge.localize.settings import ScoreSource
from mechmerge.models.references import Model
from mechmerge.pipeline.schema import EffectPlan, RoundsPlan
from mechmerge.publish.card import write_card
from mechmerge.recipe.compile import compile_recipe
from mechmerge.recipe.policies import behavior_weights, conflict, predicted_change
from mechmerge.recipe.schema import read_recipe, write_recipe
from mechmerge.recipe.sources import read_sources
from mechmerge.report import effect_tables
from mechmerge.report.files import find_run_files
from mechmerge.report.inspection import inspect_file
from mechmerge.report.loading import read_measurements
from mechmerge.report.page_data import page_data
from mechmerge.report.summary import effects_said
from tests import measured, samples
from tests.test_inspect import call

RECORD = {"layer": 3, "separation": 0.97, "gap": 2.0, "gap_low": 1.0, "prompts": 12, "held_out": 12}
ANCHORS = {
    "capitals": AnchorRecord.model_validate(RECORD | {"valid": True}),
    "title": AnchorRecord.model_validate(RECORD | {"valid": False, "reasons": ("unstable: passes in 0.80",)}),
}
CAVEAT = "anchor not valid: title (unstable: passes in 0.80)"


def on_anchors(file: EffectFile) -> EffectFile:
    """The same numbers, told to be of anchors, one of which is not valid."""
    first, *others = file.metadata.behaviors
    behaviors = (first.model_copy(update={"anchors": ANCHORS}), *others)
    return EffectFile(file.metadata.model_copy(update={"metric": "anchor", "behaviors": behaviors}), file.arrays)


@pytest.fixture
def anchored(tmp_path: Path) -> Path:
    run = samples.measured_run(tmp_path / "run")
    on_anchors(samples.effect_file()).write(run / "effects.safetensors")
    return run


# --------------------------------------------------------------------------------------------------------------------- file
def test_files_without_a_metric_are_of_the_loss(tmp_path: Path) -> None:
    path, plain = tmp_path / "effects.safetensors", samples.effect_file()
    document = plain.metadata.model_dump(mode="json")
    del document["metric"]
    for behavior in document["behaviors"]:
        del behavior["anchors"]
    save_file(plain.arrays, path, {METADATA_KEY: json.dumps(document)})
    assert load_file(path).keys() == plain.arrays.keys()
    read = read_effects(path).metadata
    assert (read.metric, read.unit, read.caveats) == ("loss", "nats per answer token", {})
    assert read == plain.metadata


def test_recoveries_rise_from_the_base() -> None:
    loss, anchor = samples.effect_file().metadata, on_anchors(samples.effect_file()).metadata
    assert loss.shown(loss.behaviors[0]) == {"path's start": 2.125, "path's end": 1.25, "its expert": 0.75}
    assert anchor.shown(anchor.behaviors[0]) == {"path's start": 0, "path's end": 0.875, "its expert": 1.375}
    from_sum = anchor.behaviors[0].model_copy(update={"loss_base": 3.0})
    assert anchor.shown(from_sum) == {"path's start": 0.875, "path's end": 1.75, "its expert": 2.25}, "0 is the base's state"


# ------------------------------------------------------------------------------------------------------------------ policies
def test_conflict_takes_the_same_components_and_predicts_recovery() -> None:
    loss = measured.effect_file()
    anchor = on_anchors(loss)
    one, other = conflict(loss), conflict(anchor)
    assert all((one.masks[name] == other.masks[name]).all() for name in one.masks)
    assert one.predicted is not None
    assert other.predicted == {name: -value for name, value in one.predicted.items()}
    assert (one.metric, other.metric) == ("loss", "anchor")
    assert other.notes == (f"effects on formats: {CAVEAT}",)
    assert one.notes == ()
    assert predicted_change(anchor, other.defaults, other.masks) == other.predicted


@pytest.mark.parametrize(("metric", "said"), [("loss", "nats per token"), ("anchor", "of recovery")])
def test_an_expert_without_gain_is_said_in_the_metrics_unit(metric: ScoreSource, said: str) -> None:
    file = measured.effect_file(gains=(2.0, -0.5))
    with pytest.raises(InputError, match=f"a gain of -0.500 {said}"):
        behavior_weights(file.metadata.behaviors, metric=metric)


@pytest.mark.parametrize("metric", ["loss", "anchor"])
def test_recipes_say_what_they_predict(metric: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, path = measured.effect_file(), tmp_path / "effects.safetensors"
    (file if metric == "loss" else on_anchors(file)).write(path)
    compiled = compile_recipe("conflict", read_sources([path]))
    assert compiled.recipe.predicted_on == metric
    write_recipe(tmp_path / "one" / "recipe.yaml", compiled.recipe, compiled.masks)
    read = read_recipe(tmp_path / "one" / "recipe.yaml")
    assert read[0].predicted_on == metric
    random = compile_recipe("random", read_sources([path]), like=read)
    assert (random.recipe.predicted_on, random.recipe.predicted is None) == (metric, False)
    assert call("recipe", str(path), "--policy", "conflict", "--out", str(tmp_path / "recipe.yaml")) == 0
    captured = capsys.readouterr()
    assert ("nats" in captured.out) == (metric == "loss")
    assert f"change of {'loss' if metric == 'loss' else 'recovery'}" in " ".join(captured.out.split())
    assert (CAVEAT in captured.err) == (metric == "anchor")


# -------------------------------------------------------------------------------------------------------------------- reports
def test_tables_and_texts_name_the_unit(anchored: Path) -> None:
    file = read_effects(anchored / "effects.safetensors")
    header, rows = effect_tables.losses_rows(file)
    assert header[3:7] == ["prompts measured", "recovery, path's start", "recovery, path's end", "recovery, its expert"]
    assert rows[0][0] == "⚠ formats (capitals, title)"
    assert rows[0][4:7] == ("0.000", "0.875", "1.375")
    said = effects_said(file.metadata)
    assert "recovery" in said
    assert "nats" not in said
    assert f"⚠ formats: {CAVEAT}." in said
    assert "nats per answer token" in effects_said(samples.effect_file().metadata)


def test_report_page_inspection_and_card_name_the_unit(anchored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("report", str(anchored)) == 0
    capsys.readouterr()
    text = (anchored / "report.md").read_text("utf-8")
    section = text[text.index("## Effects") :].split("\n## ")[0]
    assert "recovery" in section
    assert "nats" not in section
    assert CAVEAT in section
    page = (anchored / "report.html").read_text("utf-8")
    assert CAVEAT in page
    files = find_run_files(anchored)
    run = read_measurements(files.scores, files.effects, files.recipes, files.evaluation)
    effects = page_data(run, None, {})["effects"]
    assert effects["unit"] == UNITS["anchor"]
    assert [behavior["doubtful"] for behavior in effects["behaviors"]] == [True, False]
    shown = inspect_file(anchored / "effects.safetensors").tables
    facts = {row["field"]: row["value"] for row in shown["effects"]}
    assert facts["metric"] == f"anchor ({UNITS['anchor']})"
    assert facts["caveat formats"] == CAVEAT


def test_the_card_says_which_effects_are_doubtful(run: Path) -> None:
    assert CAVEAT not in write_card(run).read_text("utf-8")
    file = read_effects(run / "effects.safetensors")
    on_anchors(file).write(run / "effects.safetensors")
    assert f"⚠ effects on {file.metadata.behaviors[0].name}: {CAVEAT}" in write_card(run).read_text("utf-8")


# ------------------------------------------------------------------------------------------------------------ command, pipeline
def behavior_file(tmp_path: Path) -> Path:
    topics = ["tea", "rain", "a river", "the moon", "a forest", "bread", "chess", "a boat"]
    pairs = [{"with": f"Describe {t}. Use capital letters only.", "without": f"Describe {t}.", "topic": t} for t in topics]
    path = tmp_path / "loud.yaml"
    path.write_text(json.dumps({"name": "loud", "answer_tokens": 4, "pairs": pairs}))
    return path


def test_the_command_measures_on_anchors(
    base: Model, expert: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "effects.safetensors"
    arguments = ["effects", str(base.path), f"a={expert.path}", "--behavior", f"{behavior_file(tmp_path)}=a", "--out", str(out)]
    arguments += ["--metric", "anchor", "--invalid-anchor", "report", "--dtype=float32", "--prompts=4", "--format=json"]
    assert call(*arguments, "--plan") == 0
    steps = [step["step"] for step in json.loads(capsys.readouterr().out)["plan"]["steps"]]
    assert steps == ["loud of a: states of base and expert", "states along the path", "effects at 14 nodes"]
    assert call(*arguments) == 0
    (row,) = json.loads(capsys.readouterr().out)["effects"]
    assert row["prompts measured"] == "4 of 8"
    assert row["recovery base"] == 0
    assert row["recovery sum"] == row["recovery own expert"] == pytest.approx(1, abs=0.01)
    assert read_effects(out).metadata.metric == "anchor"


def test_rounds_stay_on_the_loss(base: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "rounds.safetensors")
    assert call("rounds", str(base.path), str(base.path), "--behavior", "title=base", "--metric", "anchor", "--out", out) == 2
    assert "rounds are measured on the loss alone" in " ".join(capsys.readouterr().err.replace("│", "").split())
    for settings in (RoundsPlan, RoundSettings):
        assert settings.model_validate({"metric": "loss"}).metric == "loss"
        with pytest.raises(ValidationError, match="rounds are measured on the loss alone"):
            settings.model_validate({"metric": "anchor"})
    plan = EffectPlan.model_validate({"metric": "anchor", "on_invalid": "report", "steering_prompts": 0})
    assert plan.metric == "anchor"
