"""Several evaluation files side by side: what may be compared, which models are one, and what is said of the rest."""

from __future__ import annotations

import json

import pytest

from mechmerge.errors import InputError
from mechmerge.evaluate.compare import compare
from mechmerge.evaluate.record import EvaluateSettings, Evaluation
from mechmerge.evaluate.responses import evaluate_responses
from mechmerge.evaluate.suites import load_suite
from mechmerge.evaluate.table import breakdowns, csv_table, markdown_breakdown, render_breakdown, render_pairs, render_table
from tests.test_generation import Recorder

GROUPS = ("plain", "quoted", "loud")


def suite_file(folder, name="own", word="tea"):
    checks = {"plain": "punctuation:no_comma", "quoted": "startend:quotation", "loud": "change_case:english_capital"}
    rows = [
        {"id": f"{group}{i}", "prompt": f"Say {word} {i}.", "group": group, "verifier": checks[group], "topic": f"t{i}"}
        for group in GROUPS
        for i in range(12)
    ]
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps({"name": name, "prompts": rows}))
    return load_suite(path)


def said(folder, suite, name, good):
    """Answers that pass the first prompts of each group, `good` of twelve."""
    passing = {"plain": "no comma", "quoted": '"quoted"', "loud": "THIS IS WHAT I SAY TO YOU"}
    rows = []
    for prompt in suite.prompts:
        number = int(prompt.id.removeprefix(prompt.group))
        rows.append({"key": prompt.id, "response": passing[prompt.group] if number < good[prompt.group] else "no, sir"})
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluated(folder, suite, models, settings=None) -> Evaluation:
    folder.mkdir(exist_ok=True)
    files = {name: said(folder, suite, name, dict(zip(GROUPS, good, strict=True))) for name, good in models.items()}
    return evaluate_responses(files, suite, folder / "e.json", settings or EvaluateSettings(resamples=200))


@pytest.fixture
def two(tmp_path):
    """Two files that share a parent; each has a model `merge`, and they differ."""
    suite = suite_file(tmp_path)
    one = evaluated(tmp_path / "one", suite, {"base": (6, 6, 6), "merge": (12, 12, 12)})
    other = evaluated(tmp_path / "other", suite, {"base": (6, 6, 6), "merge": (12, 6, 0)})
    return {"one": one, "other": other}


def test_a_model_that_both_hold_stands_once_and_another_of_its_name_is_told_apart(two):
    both = compare(two)
    assert list(both.models) == ["base", "merge", "other.merge"]
    assert {(p.model, p.against) for p in both.pairs} == {
        ("merge", "base"),
        ("other.merge", "base"),
        ("other.merge", "merge"),
    }, "every pair, once"
    for name, metric in two["other"].metrics("merge").items():
        assert both.metric("other.merge", name) == metric
    assert both.pair("other.merge", "merge", "own").difference == pytest.approx(-0.5)
    assert both.column("other.merge", "own").values == two["other"].column("merge", "own").values
    third = compare(two | {"third": two["other"]}, ["merge"])
    assert list(third.models) == ["base", "merge", "other.merge", "third.merge"]
    assert {p.against for p in third.pairs} == {"merge"}


def test_corrections_are_made_over_all_tests_of_the_comparison(two):
    alone = two["other"].pair("merge", "base", "own.loud")
    assert alone is None, "nothing was compared in a file without --against"
    both = compare(two)
    heads = [p for p in both.pairs if p.headline]
    assert len(heads) == 3
    assert all(p.p_holm >= p.p for p in both.pairs)
    worse = both.pair("other.merge", "merge", "own.loud")
    assert worse.regression
    assert (worse.better, worse.worse) == (0, 12)
    assert not any(p.metric.endswith(".min") for p in both.pairs)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"thinking": "strip"}, "other: thinking: expected keep, as in one; found strip"),
        ({}, r"the same prompts in every file; found others in own \(one and other\)"),
    ],
)
def test_what_cannot_be_compared(two, tmp_path, change, found):
    word = "tea" if change else "milk"
    settings = EvaluateSettings(resamples=200, **change)
    two["other"] = evaluated(tmp_path / "third", suite_file(tmp_path, word=word), {"merge": (1, 2, 3)}, settings)
    with pytest.raises(InputError, match=found):
        compare(two)


def test_settings_of_decoding_matter_only_where_something_was_decoded(two, tmp_path):
    suite = suite_file(tmp_path)
    settings = EvaluateSettings(resamples=200, batch=8)
    answers = evaluated(tmp_path / "third", suite, {"merge": (1, 2, 3)}, settings)
    assert "third.merge" in compare(two | {"third": answers}).models


def test_unknown_names_and_single_models(two):
    with pytest.raises(InputError, match="--against"):
        compare(two, ["nobody"])
    single = two["one"].model_copy(update={"models": {"base": two["one"].models["base"]}})
    with pytest.raises(InputError, match="two models"):
        compare({"one": single})


def test_suites_that_not_all_have_are_left_out_and_said(two, tmp_path):
    recorder = Recorder()
    other = evaluated(tmp_path / "third", suite_file(tmp_path, "more"), {"x": (1, 2, 3)})
    with pytest.raises(InputError, match="a suite that all of them have"):
        compare(two | {"third": other}, progress=recorder)
    merged = two["one"].model_copy(
        update={
            "suites": two["one"].suites | other.suites,
            "models": {
                name: model.model_copy(update={"suites": model.suites | other.models["x"].suites})
                for name, model in two["one"].models.items()
            },
        }
    )
    both = compare({"one": merged, "other": two["other"]}, progress=recorder)
    assert list(both.suites) == ["own"]
    assert any("more" in note for note in recorder.notes)


def test_tables(two):
    import io

    from rich.console import Console

    both = compare(two, ["base"])
    printed = io.StringIO()
    console = Console(file=printed, width=100)
    for part in (render_table(both), render_pairs(both), render_breakdown(both)):
        console.print(part)
    text = printed.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    (table,) = breakdowns(both)
    assert (table.against, table.header) == ("base", ["own", "n", "base", "merge", "other.merge"])
    assert table.rows == [
        ["plain", "12", "0.50", "+0.50", "+0.50"],
        ["quoted", "12", "0.50", "+0.50", "+0.00"],
        ["loud", "12", "0.50", "+0.50", "-0.50"],
    ]
    assert "| loud | 12 | 0.50 |" in markdown_breakdown(both)
    lines = csv_table(both).splitlines()
    assert len(lines) == 1 + 3 * 5, "three models, five metrics; base without a comparison, the others with one"
