"""Figures and summary: what is drawn where, what is said about it, and that the report holds together."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from mechmerge.errors import InputError
from mechmerge.localize.effect_file import read_effects
from mechmerge.localize.scores import ScoreFile
from mechmerge.models.components import UNIT_KINDS
from mechmerge.models.references import ModelId
from mechmerge.report import effect_tables, figures, style, tables
from mechmerge.report.curve_figure import curve_map, lines_of
from mechmerge.report.files import find_run_files
from mechmerge.report.inspection import inspect_file
from mechmerge.report.summary import write_report
from tests.curve_samples import set_curves
from tests.samples import EXPERTS, LAYERS, effect_file, measured_run, score_file


def report(run: Path, out: Path | None = None) -> str:
    files = find_run_files(run)
    path = write_report(files.scores, files.effects, files.recipes, files.evaluation, out or run)
    return path.read_text("utf-8")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return measured_run(tmp_path / "run")


# ----------------------------------------------------------------------------------------------------------------- drawing
def test_grid_separates_results_from_grey_and_unmeasured_cells() -> None:
    from matplotlib.figure import Figure

    values = np.array([[0.5, np.nan, 0.0], [-0.5, 0.25, 0.0]])
    grey = np.array([[False, False, True], [False, False, True]])
    axes = Figure().subplots()
    image = style.grid(axes, values, 0.5, grey)
    assert image.get_array().mask.tolist() == [[False, True, True], [False, False, True]]
    assert (image.norm.vmin, image.norm.vmax) == (-0.5, 0.5)
    hatched = [patch for patch in axes.patches if patch.get_hatch()]
    assert [(p.get_x(), p.get_y()) for p in hatched] == [(0.5, -0.5)]


def test_span_is_symmetric_and_not_set_by_a_single_outlier() -> None:
    assert style.span(np.array([0.1, -0.4, np.nan])) == pytest.approx(0.4)
    assert style.span(np.append(np.full(500, 0.1), 50.0)) == pytest.approx(0.1)
    assert style.span(np.zeros((2, 2))) == 1.0
    assert style.span(np.full((2, 2), np.nan)) == 1.0


def test_only_layers_after_the_anchor_are_grey() -> None:
    mask = figures.above_anchor(score_file(layer=4), (LAYERS, 3))
    assert mask[:, 0].tolist() == [False] * 4 + [True] * 2
    assert not figures.above_anchor(score_file(layer=LAYERS), (LAYERS, 3)).any()


def test_figures_are_png_files_of_1200_pixels_width(tmp_path: Path) -> None:
    scores = score_file()
    figures.head_map(scores, tmp_path / "heads.png")
    figures.head_map(scores, tmp_path / "patched.png", "sufficiency")
    figures.module_map({"title": scores, "raw": score_file("raw", scale="difference")}, tmp_path / "modules.png")
    figures.neuron_density(scores, tmp_path / "neurons.png")
    figures.effect_map(effect_file(), tmp_path / "effects.png")
    for name in ("heads", "patched", "modules", "neurons", "effects"):
        header = (tmp_path / f"{name}.png").read_bytes()[:24]
        assert header[:8] == b"\x89PNG\r\n\x1a\n", name
        assert int.from_bytes(header[16:20], "big") == 1200, name


def test_a_measure_that_the_file_lacks_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected the measure head\.activation"):
        figures.head_map(score_file(), tmp_path / "heads.png", "activation")
    with pytest.raises(InputError, match="at least one score file"):
        figures.module_map({}, tmp_path / "modules.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"valid": False, "reasons": ("too weak",)}, "anchor not valid (too weak): not a recovery"),
        ({"scale": "difference"}, "raw differences: not a recovery"),
    ],
)
def test_caveat_title_and_unit_agree(changes: dict[str, object], said: str) -> None:
    metadata = score_file("title", **changes).metadata
    assert style.caveat(metadata) == said
    title = style.title_of(metadata, "Heads")
    assert "title · expert formats · anchor after layer 4" in title
    assert ("not a recovery" in title) == ("not a recovery" in style.unit_of(metadata)) == bool(said)


# ------------------------------------------------------------------------------------------------------------------ tables
def test_top_components_are_the_patched_ones_below_the_anchor() -> None:
    ranked = tables.top_components(score_file(), UNIT_KINDS, 10)
    assert [r.name for r in ranked if r.patched == 0.25] == ["L1.head.0", "L1.neuron.0"]
    assert ranked == sorted(ranked, key=lambda r: -r.patched)
    assert all(int(r.name[1]) < 4 for r in ranked)
    assert [r.name for r in tables.top_components(score_file(), UNIT_KINDS, 1)] == [ranked[0].name]


def test_without_patches_the_first_order_estimate_ranks() -> None:
    scores = score_file()
    only = ScoreFile(scores.metadata, {"head.screen": scores.arrays["head.screen"]})
    ranked = tables.top_components(only, UNIT_KINDS, 3)
    best = np.unravel_index(np.argmax(scores.arrays["head.screen"][:4]), (4, 3))
    assert ranked[0].name == f"L{best[0]}.head.{best[1]}"
    assert np.isnan(ranked[0].patched)


def test_depth_shares_add_up_to_one_and_ignore_negative_scores() -> None:
    scores = score_file(layer=LAYERS)
    arrays = scores.arrays | {
        "attention.sufficiency": np.array([[1], [0], [1], [-9], [0], [0]], np.float32),
        "mlp.sufficiency": np.array([[0], [0], [0], [0], [0], [2]], np.float32),
    }
    shares = tables.depth_shares(ScoreFile(scores.metadata, arrays))
    assert shares is not None
    assert shares["attention"].tolist() == [0.25, 0.25, 0.0]
    assert shares["mlp"].tolist() == [0.0, 0.0, 0.5]
    assert tables.depth_shares(ScoreFile(scores.metadata, {})) is None


def test_effects_keep_the_order_of_experts_through_a_file(tmp_path: Path) -> None:
    effect_file().write(tmp_path / "effects.safetensors")
    read = read_effects(tmp_path / "effects.safetensors")
    assert list(read.metadata.experts) == list(EXPERTS) == ["formats", "arithmetic"]
    rows = effect_tables.effects_rows(read)[1]
    assert [row[:2] for row in rows][:2] == [("formats", "formats"), ("formats", "arithmetic")]
    assert rows[0][-1] == "0 %", "all effects of the formats expert on formats are positive"
    total = sum(float(a[0, 0].sum()) for name, a in read.arrays.items() if name.endswith(".effect"))
    assert rows[0][2] == f"+{total:.3f}"


def test_cells_cannot_break_a_table() -> None:
    line = tables.table(["a"], [["x | y\n<script>`[z](http://z)"]])[2]
    assert line.count("|") - line.count("\\|") == 2
    assert "<" not in line
    assert "\n" not in line


# ----------------------------------------------------------------------------------------------------------------- summary
def test_report_links_every_figure_that_it_draws(run: Path) -> None:
    text = report(run)
    linked = set(re.findall(r"\]\((figures/[^)]+)\)", text))
    assert linked == {f"figures/{path.name}" for path in (run / "figures").iterdir()}
    assert {"figures/effects.png", "figures/modules.png", "figures/formats-title-heads.png"} <= linked


def test_report_says_where_scores_are_no_recovery(run: Path) -> None:
    text = report(run)
    bad, good = text.split("### title")[1].split("### ")[0], text.split("### capitals")[1].split("### ")[0]
    assert "separation 0.55 is below 0.8" in bad
    images = [line for line in bad.splitlines() if line.startswith("![")]
    assert len(images) == 2
    assert all("not a recovery" in line for line in images)
    assert "not a recovery" not in good
    (modules,) = [line for line in text.splitlines() if "(figures/modules.png)" in line]
    assert "; ⚠ title (not a recovery)]" in modules
    assert "| ⚠ title (not a recovery) |" in text, "the table by depth"
    anchors = text.split("### Anchors")[1]
    assert "**no**: separation 0.55 is below 0.8" in anchors


def test_report_names_models_losses_and_limits_but_no_local_path(run: Path) -> None:
    text = report(run)
    assert EXPERTS["arithmetic"].digest[:16] in text
    assert "3.1 %" in text, "the completeness error"
    assert "2.125" in text
    assert "do not add up" in text
    assert str(run) not in text


def test_report_is_the_same_bytes_each_time(run: Path, tmp_path: Path) -> None:
    report(run, tmp_path / "a")
    report(run, tmp_path / "b")
    names = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(names) > 5
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_measurements_of_different_bases_are_refused(run: Path) -> None:
    other = ModelId(name="other", shards={"model.safetensors": "9" * 64})
    score_file("quotation", base=other).write(run / "scores" / "formats" / "quotation.safetensors")
    with pytest.raises(InputError, match="measurements of one base"):
        report(run)
    assert not (run / "report.md").exists()


def test_a_behaviour_of_two_experts_stands_twice(run: Path) -> None:
    score_file("title", "arithmetic").write(run / "scores" / "arithmetic" / "title.safetensors")
    text = report(run)
    assert "### title (formats)" in text
    assert "### title (arithmetic)" in text


def test_hostile_names_stay_in_the_figures_folder(run: Path) -> None:
    score_file("../../x|<b>").write(run / "scores" / "formats" / "odd.safetensors")
    text = report(run)
    assert sorted(p.name for p in run.parent.iterdir()) == ["run"]
    assert "<b>" not in text
    assert all(Path(link).parent == Path("figures") for link in re.findall(r"\]\((figures/[^)]+)\)", text))


def test_curves_are_drawn_and_what_is_not_above_its_controls_is_said_everywhere(run: Path) -> None:
    good, weak = set_curves(above=True), set_curves(above=False)
    score_file("capitals", seed=1, curves=good).write(run / "scores" / "formats" / "capitals.safetensors")
    path = run / "scores" / "arithmetic" / "arithmetic.safetensors"
    score_file("arithmetic", "arithmetic", seed=9, curves=weak).write(path)
    text = report(run)
    assert (run / "figures" / "curves.png").is_file()
    (image,) = [line for line in text.splitlines() if "(figures/curves.png)" in line]
    assert "⚠ arithmetic (not above its controls)" in image
    assert "capitals" not in image
    table = text.split("### Set curves")[1].split("![")[0]
    assert "| arithmetic | **not above its controls** | +0.190 \\[−0.100, +0.300] |" in table
    assert "| capitals | yes |" in table
    assert "| ⚠ arithmetic (not above its controls) |" in text, "the table by depth"
    own = text.split("### arithmetic")[1]
    assert own.count("not above its controls") >= 3, "the warning and both figures"
    assert "not above its controls" in style.title_of(score_file("x", curves=weak).metadata, "Heads")
    facts = {row["field"]: row["value"] for row in inspect_file(path).tables["scores"]}
    assert facts["set curves"].startswith("NOT ABOVE ITS CONTROLS: lift 0.190")
    assert facts["caveat"].startswith("not above its controls (lift 0.190")


def test_a_state_that_is_above_its_controls_while_the_output_is_not_is_said_everywhere(run: Path) -> None:
    label = "above its controls on the anchor's state only"
    fine, half = set_curves(above=True, kl_low=0.05), set_curves(above=True, kl_low=-0.05)
    score_file("capitals", seed=1, curves=fine).write(run / "scores" / "formats" / "capitals.safetensors")
    path = run / "scores" / "arithmetic" / "arithmetic.safetensors"
    score_file("arithmetic", "arithmetic", seed=9, curves=half).write(path)
    assert (fine.doubt, half.doubt) == (None, label)
    text = report(run)
    table = text.split("### Set curves")[1].split("![")[0]
    assert f"| arithmetic | **{label}** |" in table
    assert "| capitals | yes |" in table
    assert "+0.050 \\[−0.050, +0.150]" in table
    (image,) = [line for line in text.splitlines() if "(figures/curves.png)" in line]
    assert f"⚠ arithmetic ({label})" in image
    assert text.split("### arithmetic")[1].count(label) >= 3, "the warning and both figures"
    facts = {row["field"]: row["value"] for row in inspect_file(path).tables["scores"]}
    assert facts["caveat"].startswith(label)


def test_a_report_without_curves_has_no_section_on_them(run: Path) -> None:
    assert "Set curves" not in report(run)
    with pytest.raises(InputError, match="at least one score file with curves"):
        curve_map({"title": score_file()}, run / "curves.png")


def test_random_curves_are_drawn_by_mean_and_range_where_all_were_measured() -> None:
    curves = set_curves(above=True)
    found = {line.order: line for line in lines_of(curves, "recovery")}
    assert list(found) == ["score", "random", "magnitude"]
    assert found["random"].share.tolist() == [0.0, 0.5, 1.0]
    assert found["random"].value.tolist() == [0.0, 0.375, 1.0]
    assert (found["random"].low[1], found["random"].high[1]) == (0.25, 0.5)
    assert found["score"].low.tolist() == found["score"].value.tolist() == [0.0, 0.75, 1.0]
    assert lines_of(curves, "pass_rate") == []
    first, second = (curve for curve in curves.curves if curve.order == "random")
    short = curves.model_copy(update={"curves": (first.model_copy(update={"points": first.points[:2]}), second)})
    assert lines_of(short, "kl")[0].share.tolist() == [0.0, 0.5]


def test_small_numbers_keep_three_digits() -> None:
    assert [style.small(v) for v in (0.0, 1.25, -0.0123456, 0.000042)] == ["+0.000", "+1.250", "−0.0123", "+0.0000420"]
    assert style.small(0.00123, 0.000456) == "+0.00123 ± 0.00046"
    assert style.small(0.5, float("nan")) == "+0.500"


# ------------------------------------------------------------------------------------------------------------ run directory
def test_run_files_leave_anchors_out_and_follow_the_pipelines_order(run: Path) -> None:
    score_file().write(run / "scores" / "formats" / "anchors" / "title.safetensors")
    for name in ("conflict", "ties"):
        (run / "recipes" / name).mkdir(parents=True)
        (run / "recipes" / name / "recipe.yaml").write_text("x: 1\n")
    (run / "run.yaml").write_text("pipeline: {title: T, publish: conflict, license: mit, recipes: {ties: {}, conflict: {}}}\n")
    files = find_run_files(run)
    assert [p.parent.name for p in files.scores] == ["arithmetic", "formats", "formats"]
    assert list(files.recipes) == ["ties", "conflict"]
    assert (files.title, files.publish, files.license, files.evaluation) == ("T", "conflict", "mit", None)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of them"):
        find_run_files(tmp_path)
    with pytest.raises(InputError, match="expected a run directory"):
        find_run_files(tmp_path / "missing")
    with pytest.raises(InputError, match="found none"):
        write_report([], None, {}, None, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_run_without_a_finished_stage_says_so(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("pipeline: {title: begun, recipes: true}\n")
    with pytest.raises(InputError, match="it has finished no stage yet"):
        find_run_files(tmp_path)
