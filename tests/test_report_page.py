"""The HTML page: what stands in it, that nothing in it runs that is not ours, and how it behaves in a browser."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from playwright.sync_api import Browser

from mechmerge.cli.main import main
from mechmerge.evaluate.record import Evaluation, PairTest
from mechmerge.models.references import ModelId
from mechmerge.recipe.schema import MergekitMethod, Policy, Rule, write_recipe
from mechmerge.report import evaluation_tables, tables
from mechmerge.report.files import find_run_files
from mechmerge.report.html import write_page
from mechmerge.report.loading import read_run
from mechmerge.report.pack import pack, script_json
from mechmerge.report.page_data import BIN_NAMES, page_data
from mechmerge.report.recipes import coefficient_arrays, depth_kept_rows
from tests.browser import at_rest, headless, open_all, opened
from tests.curve_samples import set_curves
from tests.samples import EXPERTS, HEADS, LAYERS, NEURONS, evaluation, judged_file, recipe, score_file, whole_run

HOSTILE = '</script><img src=x onerror="window.pwned=1"><!--\x1b[31m\u202e\'`${alert(1)}'
SEEN = '</script><img src=x onerror="window.pwned=1"><!--\\x1b[31m\\u202e\'`${alert(1)}'


def pair(metric: str, against: str, difference: float, p: float, *, headline: bool = True) -> PairTest:
    low, high = difference - 0.05, difference + 0.05
    return PairTest(
        model="conflict",
        against=against,
        metric=metric,
        headline=headline,
        difference=difference,
        low=low,
        high=high,
        better=9,
        worse=9,
        p=p,
        p_holm=p,
    )


def judged(*models: str) -> Evaluation:
    """An evaluation in which the merge beats the base, loses to one expert, and lost one group to it."""
    record = evaluation(*models)
    suites = record.suites
    results = {}
    for name, result in record.models.items():
        suite = result.suites["formats"]
        value = {"base": 0.2, "formats": 0.8, "conflict": 0.5}.get(name, 0.5)
        one = suite.metrics["formats"].model_copy(update={"value": value, "low": value - 0.1, "high": value + 0.1})
        found = suite.model_copy(update={"metrics": {"formats": one, "formats.title": one.model_copy(update={"n": 30})}})
        results[name] = result.model_copy(update={"suites": {"formats": found}})
    pairs = (
        pair("formats", "base", 0.3, 0.001),
        pair("formats", "formats", -0.3, 0.001),
        pair("formats", "arithmetic", 0.01, 1.0),
        pair("formats.title", "formats", -0.3, 0.01, headline=False),
    )
    against = tuple(name for name in ("base", "formats", "arithmetic") if name in models)
    return record.model_copy(update={"suites": suites, "models": results, "against": against, "pairs": pairs})


def page_run(run: Path) -> Path:
    """A whole run with curves (one localization above its controls, one not), a judged evaluation and a baseline."""
    whole_run(run)
    score_file("capitals", seed=1, curves=set_curves(above=True)).write(run / "scores" / "formats" / "capitals.safetensors")
    weak = score_file("arithmetic", "arithmetic", seed=9, curves=set_curves(above=False))
    weak.write(run / "scores" / "arithmetic" / "arithmetic.safetensors")
    write_recipe(
        run / "recipes" / "ties" / "recipe.yaml", recipe(policy=Policy(name="ties"), mergekit=MergekitMethod(method="ties"))
    )
    judged("base", "formats", "arithmetic", "conflict").write(run / "evaluation.json")
    return run


def write(run: Path, **options: Any) -> Path:
    return write_page(find_run_files(run), run, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page_run(tmp_path_factory.mktemp("page") / "somebody" / "run")


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    return write(run, license_of=lambda model: "mit" if "+" not in model.name else None)


def hostile_run(run: Path) -> Path:
    """A run whose every text is made to break out of where it stands."""
    whole_run(run)
    bad = ModelId(name=HOSTILE, shards={HOSTILE: "1" * 64})
    for path in (run / "scores").rglob("*.safetensors"):
        path.unlink()
    (run / "effects.safetensors").unlink()
    score_file(HOSTILE, expert="formats", valid=False, reasons=(HOSTILE,)).write(run / "scores" / "x" / "a.safetensors")
    changed = score_file("plain", seed=1)
    changed.__class__(changed.metadata.model_copy(update={"expert": bad}), changed.arrays).write(
        run / "scores" / "x" / "b.safetensors"
    )
    record = judged("base", "formats", "conflict")
    models = {name: result.model_copy(update={"id": bad}) for name, result in record.models.items()}
    known = tuple(test for test in record.pairs if test.against in models)
    record.model_copy(update={"models": models, "pairs": known}).write(run / "evaluation.json")
    plain = json.dumps({"title": HOSTILE, "notes": HOSTILE, "publish": "conflict", "license": HOSTILE})
    (run / "run.yaml").write_text(f"pipeline: {plain}\n")
    (run / "gate.json").write_text(
        json.dumps(
            {
                "passed": False,
                "rules": [{"rule": HOSTILE, "model": HOSTILE, "metric": "x", "passed": False, "problem": HOSTILE}],
            }
        )
    )
    return run


class Elements(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text += data


# ------------------------------------------------------------------------------------------------------------------ packing
def unpacked(packed: dict[str, Any]) -> np.ndarray:
    size, data = packed["n"], packed["d"]
    count = int(np.prod(size))
    match packed["t"]:
        case "const":
            return np.full(size, data, np.float32)
        case "few":
            found = np.full(count, np.nan, np.float32)
            for index, value in data:
                found[index] = value
            return found.reshape(size)
        case "bits":
            return np.unpackbits(np.frombuffer(base64.b64decode(data), np.uint8), bitorder="little")[:count].reshape(size)
        case kind:
            width = {"f32": 4, "f24": 3, "b16": 2}[kind]
            raw = np.zeros((count, 4), np.uint8)
            raw[:, 4 - width :] = np.frombuffer(base64.b64decode(data), np.uint8).reshape(-1, width)
            return raw.view("<f4").reshape(size)


@given(
    arrays.arrays(
        np.float32, (3, 7), elements=st.floats(-(2.0**90), 2.0**90, width=32, allow_subnormal=False) | st.just(np.nan)
    )
)
def test_packed_arrays_keep_four_digits_and_what_was_not_measured(values: np.ndarray) -> None:
    found = unpacked(pack(values))
    assert np.array_equal(np.isnan(found), np.isnan(values))
    there = np.isfinite(values)
    assert np.allclose(found[there], values[there], rtol=5e-4, atol=0)
    assert np.array_equal(unpacked(pack(values, "f32"))[there], values[there]) or pack(values)["t"] in ("few", "const")
    again = unpacked(pack(values, "b16"))
    assert np.allclose(again[there], values[there], rtol=5e-3, atol=0)


def test_arrays_take_the_shortest_form() -> None:
    spread = np.linspace(-1, 1, 64, dtype=np.float32).reshape(8, 8)
    few = np.full((8, 8), np.nan, np.float32)
    few[1, 2] = 0.123456
    kinds = [pack(a)["t"] for a in (np.ones((8, 8)), np.eye(8), few, spread)]
    assert kinds == ["const", "bits", "few", "f24"]
    assert pack(few)["d"] == [[10, 0.1235]]
    assert len(pack(spread)["d"]) == 64 * 4
    assert np.array_equal(unpacked(pack(np.eye(8))), np.eye(8))


@given(st.text())
def test_no_text_can_leave_the_data_element(text: str) -> None:
    said = script_json({text: [text]})
    assert not set(said) & set("<>&\u2028\u2029")
    assert json.loads(said) == {tables.printable(text): [tables.printable(text)]}
    said.encode()


# --------------------------------------------------------------------------------------------------------------- the document
def test_the_page_is_complete_in_itself_and_its_policy_names_exactly_what_it_holds(page: Path) -> None:
    text = page.read_text("utf-8")
    elements = Elements(text).found
    assert not [tag for tag, _ in elements if tag in {"link", "img", "iframe", "object", "embed", "base", "form"}]
    for _, attributes in elements:
        assert not {"src", "srcset", "style", "action"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
        assert attributes.get("href", "#").startswith("#")
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.S)
    assert "url(" not in style
    assert "@import" not in style
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.S)
    (policy,) = [a["content"] for tag, a in elements if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    for kind, content in (("script", script), ("style", style)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_tables_hold_what_charts_show(page: Path) -> None:
    text = Elements(page.read_text("utf-8")).text
    for said in (
        EXPERTS["formats"].digest[:16],
        "not known",
        "separation 0.55 is below 0.8",
        "0.50 [0.40, 0.60]",
        "▼ regression",
        "+0.300 [+0.250, +0.350]",
        "▼ regression −0.300 (0.80)",
        "not above its controls",
        "+0.190 [−0.100, +0.300]",
        "L1.head.0",
        "by weight",
        "do not add up",
        "3.1 %",
        "Tried once.",
        "mechmerge merge RUN/recipes/NAME/recipe.yaml OUT",
    ):
        assert said in text, said
    assert "1 regression " not in text.split("Against each parent")[0]
    assert "2 regressions" in text


def test_a_ranking_says_what_each_recipe_takes(page: Path) -> None:
    rows = re.findall(r'<tr><th scope="row">L1\.head\.0</th>(.*?)</tr>', page.read_text("utf-8"))
    # sum takes everything; conflict's mask drops every head of formats and none of arithmetic
    ends = {tuple(re.findall(r"<td[^>]*>([^<]*)</td>", row)[-2:]) for row in rows}
    assert ends == {("1", "0"), ("1", "1")}


def test_the_page_names_no_path_and_no_user(page: Path, run: Path) -> None:
    assert str(run) in (run / "run.yaml").read_text("utf-8"), "the run's own record names its folder"
    text = page.read_text("utf-8")
    assert str(run.parents[1]) not in text
    assert "somebody" not in text


def test_the_page_is_the_same_bytes_each_time(page: Path, run: Path, tmp_path: Path) -> None:
    license_of = {"demo:smollm2-135m-instruct": "mit"}
    again = write_page(find_run_files(run), tmp_path, lambda model: license_of.get(model.name))
    assert again.read_bytes() == page.read_bytes()


def test_hostile_texts_become_text(tmp_path: Path) -> None:
    text = write(hostile_run(tmp_path / "run")).read_text("utf-8")
    parsed = Elements(text)
    assert [tag for tag, _ in parsed.found].count("script") == 2
    assert not [tag for tag, _ in parsed.found if tag == "img"]
    assert not [name for _, attributes in parsed.found for name in attributes if name.startswith("on")]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    # a heading, the title, notes, a behaviour, a model, a reason, a metric's model and the gate's rule
    assert parsed.text.count(SEEN) > 12
    data = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[0])
    assert SEEN in [score["label"] for score in data["scores"]]


@pytest.mark.parametrize("kept", ["scores", "effects.safetensors", "recipes", "evaluation.json"])
def test_every_part_may_be_absent(run: Path, tmp_path: Path, kept: str) -> None:
    alone = tmp_path / "run"
    alone.mkdir()
    source = run / kept
    for path in [source] if source.is_file() else source.rglob("*"):
        if path.is_file():
            target = alone / path.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    text = write(alone).read_text("utf-8")
    links = re.findall(r'<a href="#(\w+)">', text)
    assert set(links) - {"main"} == set(re.findall(r'<section id="(\w+)"', text))
    assert "limits" in links


# ----------------------------------------------------------------------------------------------------------------- the data
def test_coefficients_come_from_defaults_rules_and_masks(run: Path, tmp_path: Path) -> None:
    measured = read_run(find_run_files(run))
    kept = {name: coefficient_arrays(path, measured) for name, path in measured.recipes.items()}
    assert kept["ties"].instead == "by weight"
    assert kept["ties"].of("formats", "head") is None
    heads = kept["conflict"].of("formats", "head")
    assert heads is not None
    assert not heads.any()
    assert kept["sum"].units(EXPERTS["formats"], "neuron", (LAYERS, NEURONS)) is not None
    assert kept["sum"].units(EXPERTS["formats"], "neuron", (1, 1)) is None
    rule = Rule(component="L1.head.2", expert="formats", coefficient=0.5)
    write_recipe(tmp_path / "recipe.yaml", recipe(rules=(rule,)))
    ruled = coefficient_arrays(tmp_path / "recipe.yaml", measured).of("formats", "head")
    assert ruled is not None
    assert ruled[1].tolist() == [1.0, 1.0, 0.5]
    assert (ruled != 1).sum() == 1
    header, rows = depth_kept_rows(kept)
    (row,) = [row for row in rows if row[:2] == ("conflict", "formats")]
    assert dict(zip(header, row, strict=True))["heads, first third"] == "0 %"
    assert dict(zip(header, row, strict=True))["neurons, last third"] == "95 %"


def test_bins_hold_every_neuron_once_from_best_to_worst(run: Path) -> None:
    measured = read_run(find_run_files(run))
    kept = {name: coefficient_arrays(path, measured) for name, path in measured.recipes.items()}
    (score,) = [s for s in page_data(measured, None, kept)["scores"] if s["label"] == "capitals"]
    bins = score["kinds"]["neuron"]["bins"]
    assert sum(bins["sizes"]) == NEURONS
    mean = unpacked(bins["mean"])
    assert mean.shape == (len(BIN_NAMES), LAYERS)
    filled = mean[np.array(bins["sizes"]) > 0][:, :4]
    assert (np.diff(filled, axis=0) <= 0).all()
    assert np.isnan(mean[:, 4:]).all(), "after the anchor"
    for name in ("screen", "patched", "patched_se"):
        assert np.isnan(unpacked(score["kinds"]["neuron"][name])[4:]).all(), "0 by construction is no result"
    weights = np.array(bins["sizes"])[:, None]
    values = measured.scores["capitals"].score("neuron")[:4]
    assert np.allclose(np.nansum(mean[:, :4] * weights, axis=0), values.sum(axis=1), rtol=1e-3)
    taken = unpacked(bins["taken"]["conflict"])
    assert np.allclose(np.nansum(taken * weights, axis=0), NEURONS - 1, rtol=1e-2)


def test_many_neurons_are_held_by_layer_best_first(run: Path) -> None:
    measured = read_run(find_run_files(run))
    every, best = (page_data(measured, None, {}, limit) for limit in (10**6, 0))
    neurons = best["scores"][0]["kinds"]["neuron"]
    assert "unit" not in every["scores"][0]["kinds"]["neuron"]
    assert "effect" in every["effects"]["kinds"]["neuron"]
    assert "effect" not in best["effects"]["kinds"]["neuron"]
    label = best["scores"][0]["label"]
    score = measured.scores[label].score("neuron")
    order = unpacked(neurons["unit"]).astype(int)
    assert order[0, 0] == score[0].argmax()
    assert np.nanmin(unpacked(neurons["rank"])) == 1


@pytest.mark.parametrize(
    ("difference", "p", "said"),
    [
        (-0.3, 0.01, evaluation_tables.WORSE),
        (-0.3, 0.2, evaluation_tables.UNCLEAR),
        (0.3, 0.01, evaluation_tables.BETTER),
        (0.3, 0.2, evaluation_tables.UNCLEAR),
        (0.01, 0.01, evaluation_tables.UNCLEAR),
        (-0.01, 0.01, evaluation_tables.UNCLEAR),
    ],
)
def test_a_difference_is_clear_only_by_interval_and_by_test(difference: float, p: float, said: str) -> None:
    assert evaluation_tables.verdict(pair("formats", "base", difference, p)) == said


def test_the_command_writes_both(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = page_run(tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        main(["report", str(copy), "--format", "json"])
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(copy / "report.md"), "page": str(copy / "report.html")}
    assert "apache-2.0" in (copy / "report.html").read_text("utf-8"), "the base's licence is known"


# --------------------------------------------------------------------------------------------------------------- in a browser
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with headless() as found:
        yield found


HEADS_OF = '[data-chart=units][data-kind=head][data-score="{number}"]'


def number_of(run: Path, label: str) -> int:
    return list(read_run(find_run_files(run)).scores).index(label)


@pytest.mark.parametrize("width", ["desktop", "phone"])
def test_everything_is_drawn_quietly_and_nothing_is_fetched(browser: Browser, page: Path, width: str) -> None:
    with opened(browser, page, width) as shown:
        open_all(shown.page)
        assert shown.requests == [page.as_uri()]
        assert shown.complaints == []
        assert shown.page.evaluate("document.documentElement.scrollWidth") == shown.page.evaluate("innerWidth")
        empty = "[...document.querySelectorAll('.heat canvas')].filter((one) => !one.width || !one.height).length"
        assert shown.page.evaluate(empty) == 0


def test_hovering_a_cell_tells_its_component_value_and_coefficients(browser: Browser, page: Path, run: Path) -> None:
    number = number_of(run, "capitals")
    scores = read_run(find_run_files(run)).scores["capitals"]
    value, below = scores.arrays["head.screen"][3, 2], scores.score("head")[:4]
    rank = 1 + int((below > below[3, 2]).sum())
    assert 2 * rank != below.size + 1, "another order gives another rank"
    with opened(browser, page) as shown:
        open_all(shown.page)
        surface = shown.page.locator(f"{HEADS_OF.format(number=number)} .heat")
        surface.scroll_into_view_if_needed()
        at_rest(shown.page)
        box = surface.bounding_box()
        assert box is not None
        tip = shown.page.locator("#tip")
        assert not tip.is_visible()
        # Six columns of at most 40 px end at the surface's right edge; rows are 18 px high.
        cell = min(40.0, (box["width"] - 2) / LAYERS)
        right = box["x"] + box["width"] - 2
        shown.page.mouse.move(right - (LAYERS - 3.5) * cell, box["y"] + 2.5 * 18)
        assert tip.is_visible()
        said = tip.inner_text()
        assert said.startswith("L3.head.2\n")
        assert f"{abs(value):.3g}" in said
        assert "not patched" in said
        assert re.search(rf"rank\s+{rank} of 12 heads", said)
        assert re.search(r"conflict takes\s+× 0", said)
        assert re.search(r"sum takes\s+× 1", said)
        assert re.search(r"ties takes\s+by weight", said)
        shown.page.keyboard.press("Escape")
        assert not tip.is_visible()
        shown.page.mouse.move(5, 5)
        assert not tip.is_visible()


def test_hovering_tells_every_measure_with_its_error_and_the_role(browser: Browser, tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run")
    judged_file("capitals").write(run / "scores" / "formats" / "capitals.safetensors")
    number = number_of(run, "capitals")
    with opened(browser, write(run)) as shown:
        open_all(shown.page)
        said = {}
        for kind in ("attention", "mlp", "head"):
            chart = shown.page.locator(f'[data-chart=units][data-kind={kind}][data-score="{number}"]')
            chart.locator(".heat").focus()
            for layer in range(LAYERS):
                shown.page.keyboard.press("ArrowRight" if layer else "Home")
                said[kind, layer] = chart.locator(".readout").inner_text()
        assert said["mlp", 0].startswith(
            "L0.mlp: weight patching +0.4 ± 0.02; knockout +0.2 ± 0.01; activation patching +0.4 ± 0.02; rank 1 of 4 MLP; "
            "role source carrier; "
        )
        assert "activation patching +0.6 ± 0.02" in said["attention", 3]
        assert "role aggregator / router" in said["attention", 3]
        assert said["mlp", 5].startswith(
            "L5.mlp: score 0 by construction: after the anchor; output: divergence taken away +0.5 ± 0.05; role execution"
        )
        assert "output" not in said["attention", 5]
        assert "role unknown: not measured" in said["attention", 5]
        assert "role unknown: not measured" in said["head", 0]
        assert shown.complaints == []


def test_the_keyboard_reaches_every_cell_and_a_live_text_follows(browser: Browser, page: Path, run: Path) -> None:
    number = number_of(run, "capitals")
    with opened(browser, page) as shown:
        open_all(shown.page)
        chart = shown.page.locator(HEADS_OF.format(number=number))
        readout = chart.locator(".readout")
        assert readout.get_attribute("aria-live") == "polite"
        chart.locator(".heat").focus()
        shown.page.keyboard.press("End")
        assert readout.inner_text().startswith("L5.head.0: score 0 by construction")
        shown.page.keyboard.press("Home")
        shown.page.keyboard.press("ArrowRight")
        assert readout.inner_text().startswith("L1.head.0: weight patching +0.25 ± 0.025")
        for _ in range(HEADS + 2):
            shown.page.keyboard.press("ArrowDown")
        assert readout.inner_text().startswith(f"L1.head.{HEADS - 1}:")
        assert shown.page.locator("#tip").inner_text().startswith(f"L1.head.{HEADS - 1}\n")


def test_a_tap_tells_as_much_as_hovering(browser: Browser, page: Path) -> None:
    with opened(browser, page, "phone") as shown:
        open_all(shown.page)
        surface = shown.page.locator("[data-chart=modules] .heat").first
        surface.scroll_into_view_if_needed()
        at_rest(shown.page)
        box = surface.bounding_box()
        assert box is not None
        shown.page.touchscreen.tap(box["x"] + box["width"] - 5, box["y"] + 9)
        said = shown.page.locator("#tip").inner_text()
        assert re.match(r"\w+: L5\.attention\n", said)
        assert "after the anchor" in said


def test_a_layer_opens_its_neurons_and_a_recipe_its_shares(browser: Browser, page: Path, run: Path) -> None:
    number = number_of(run, "capitals")
    with opened(browser, page) as shown:
        open_all(shown.page)
        chart = shown.page.locator(f'[data-chart=neurons][data-score="{number}"]')
        chart.locator(".heat").first.focus()
        for key in ("Home", "ArrowRight", "ArrowRight", "Enter"):
            shown.page.keyboard.press(key)
        assert chart.locator("caption").inner_text() == "The best ten of layer 2"
        chart.locator("select").select_option("1")
        assert chart.locator("caption").inner_text() == "The best ten of layer 1"
        best = read_run(find_run_files(run)).scores["capitals"].score("neuron")[1].argmax()
        assert chart.locator("tbody th").first.inner_text() == f"L1.neuron.{best}"
        recipes = shown.page.locator("[data-chart=recipes]")
        assert "conflict: what it takes of formats" in recipes.inner_text(), "the published one comes first"
        recipes.locator(".heat").first.focus()
        at_rest(shown.page)
        assert "0 of 3 (0 %)" in recipes.locator(".readout").first.inner_text()
        recipes.locator("select").select_option(label="sum")
        assert "sum: what it takes of arithmetic" in recipes.inner_text()
        effects = shown.page.locator("[data-chart=effects]")
        effects.locator(".heat").first.focus()
        at_rest(shown.page)
        shown.page.keyboard.press("Enter")
        assert "heads of layer 0: effect on formats, of formats" in effects.inner_text()


def test_a_page_of_a_large_model_opens_the_best_neurons(browser: Browser, run: Path, tmp_path: Path) -> None:
    path = write_page(find_run_files(run), tmp_path, most_neurons=0)
    number = number_of(run, "capitals")
    best = read_run(find_run_files(run)).scores["capitals"].score("neuron")[1].argmax()
    with opened(browser, path) as shown:
        open_all(shown.page)
        chart = shown.page.locator(f'[data-chart=neurons][data-score="{number}"]')
        chart.locator("select").select_option("1")
        chart.locator(".heat").nth(1).focus()
        at_rest(shown.page)
        assert chart.locator(".readout").nth(1).inner_text().startswith(f"L1.neuron.{best}:")
        assert shown.complaints == []


def test_curves_and_forests_tell_their_values(browser: Browser, page: Path, run: Path) -> None:
    number = number_of(run, "capitals")
    with opened(browser, page) as shown:
        open_all(shown.page)
        chart = shown.page.locator(f'[data-chart=curves][data-score="{number}"]')
        assert chart.locator(".panel").count() == 2, "no panel for pass rates that nobody measured"
        chart.locator(".curve").first.focus()
        shown.page.keyboard.press("ArrowRight")
        said = chart.locator(".readout").first.inner_text()
        assert said == "50 % of the components: by score +0.75; random sets +0.375 (+0.25 … +0.5); largest deltas +0.625"
        differences = shown.page.locator('[data-chart=differences][data-model="conflict"]')
        assert differences.locator(".panel").count() == 3
        differences.locator(".forest").nth(1).focus()
        assert "verdict ▼ regression" in differences.locator(".readout").nth(1).inner_text()
        assert differences.locator("polygon.worse").count() == 1
        assert differences.locator("polygon.better").count() == 1


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", ["desktop", "phone"])
def test_no_serious_barrier(browser: Browser, page: Path, width: str, theme: str) -> None:
    with opened(browser, page, width, theme) as shown:
        open_all(shown.page)
        found = Axe().run(shown.page).response["violations"]
        serious = [(v["id"], v["nodes"][0]["html"]) for v in found if v["impact"] in ("serious", "critical")]
        assert serious == []
        assert shown.complaints == []


def test_the_theme_can_be_turned_and_charts_follow(browser: Browser, page: Path) -> None:
    with opened(browser, page, theme="dark") as shown:
        open_all(shown.page)
        background = "getComputedStyle(document.body).backgroundColor"
        pixels = "document.querySelector('.heat canvas').toDataURL()"
        dark, drawn = shown.page.evaluate(background), shown.page.evaluate(pixels)
        button = shown.page.locator("#theme")
        assert button.inner_text() == "Light theme"
        button.click()
        assert shown.page.evaluate(background) == "rgb(255, 255, 255)" != dark
        assert shown.page.evaluate(pixels) != drawn
        assert button.inner_text() == "Dark theme"
        shown.page.reload()
        assert shown.page.evaluate(background) == "rgb(255, 255, 255)", "the choice is remembered"


def test_the_skip_link_comes_first_and_motion_is_left_out(browser: Browser, page: Path) -> None:
    with opened(browser, page) as shown:
        shown.page.keyboard.press("Tab")
        assert shown.page.evaluate("document.activeElement.className") == "skip"
        shown.page.keyboard.press("Enter")
        assert shown.page.evaluate("document.activeElement.id") == "main"
        assert shown.page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"


def test_without_scripts_tables_and_texts_remain(browser: Browser, page: Path) -> None:
    with opened(browser, page, "phone", java_script_enabled=False) as shown:
        assert shown.page.get_by_text("Charts need JavaScript").is_visible()
        assert shown.page.get_by_text("Headline metrics with 95 % intervals").is_visible()
        assert shown.page.locator("[data-chart]:visible").count() == 0
        assert not shown.page.locator("#theme").is_visible()
        assert shown.page.locator("table").count() > 10


@pytest.mark.parametrize("width", ["desktop", "phone"])
def test_no_script_runs_from_data(browser: Browser, tmp_path: Path, width: str) -> None:
    path = write(hostile_run(tmp_path / "run"))
    with opened(browser, path, width) as shown:
        open_all(shown.page)
        for surface in shown.page.locator(".heat, .forest").all():
            surface.focus()
            shown.page.keyboard.press("ArrowDown")
        assert shown.page.evaluate("window.pwned") is None
        assert shown.page.locator("img").count() == 0
        assert shown.complaints == []
        assert shown.requests == [path.as_uri()]
        assert SEEN in shown.page.locator("h1").inner_text()
        assert shown.page.evaluate("document.documentElement.scrollWidth") == shown.page.evaluate("innerWidth")
