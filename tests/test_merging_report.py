"""What the merging benchmark chooses, reports and promises: settings, goals, what is missing, and which calls it rests on."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import common
from benchmarks.merging import arms, calls, steps
from benchmarks.merging.__main__ import main, part_of
from benchmarks.merging.arms import HEADLINE
from benchmarks.merging.families import FAMILIES
from benchmarks.merging.found import BY_MEAN, BY_MIN, TUNED, gather
from benchmarks.merging.gains import Figure, pooled, rate
from benchmarks.merging.goals import judged, standings
from benchmarks.merging.report import report, section
from benchmarks.merging.study import QUICK, Study
from benchmarks.merging.tables import by_group
from mechmerge.artifacts import read_document, write_json
from mechmerge.evaluate.assembly import assemble, suite_done, suite_record
from mechmerge.evaluate.record import EvaluateSettings, Evaluation
from mechmerge.evaluate.statistics import Interval
from mechmerge.models.references import ModelId

FIVE = replace(QUICK, shuffles=5)
LOW, HIGH = {"formats": 0.0, "arithmetic": 0.0}, {"formats": 1.0, "arithmetic": 1.0}
HALF = {"formats": 0.5, "arithmetic": 0.5}


def write(study: Study, name: str, split: str, rates: Mapping[str, float]) -> None:
    """An evaluation in which exactly these shares of every group of a suite pass."""
    settings, done, records = EvaluateSettings(resamples=100), {}, {}
    for suite in study.suites[split]:  # type: ignore[index]
        order: dict[str, list[int]] = {}
        for i, prompt in enumerate(suite.prompts):
            order.setdefault(prompt.group, []).append(i)
        passing = {i for places in order.values() for i in places[: round(rates[suite.name] * len(places))]}
        rows = [
            {"strict": [i in passing] * len(prompt.instructions), "tokens": 3, "finished": True}
            for i, prompt in enumerate(suite.prompts)
        ]
        done[suite.name] = suite_done(suite, rows, settings, template="none", key="k")
        records[suite.name] = suite_record(suite)
    out = study.evaluation_file(name, split)  # type: ignore[arg-type]
    assemble({out.stem: (ModelId(name=name), done)}, records, (), settings).write(out)


def first_wave(study: Study) -> None:
    """Everything but the controls: parents, a sweep and its best, the headline policy, and fine-tuning."""
    for split in ("develop", "test"):
        write(study, "base", split, LOW)
        write(study, "formats", split, LOW | {"formats": 1.0})
        write(study, "arithmetic", split, LOW | {"arithmetic": 1.0})
    write(study, "task-arithmetic_weight-0.5", "develop", HALF)
    write(study, "task-arithmetic_weight-1", "develop", {"formats": 0.0, "arithmetic": 1.0})
    for name in ("task-arithmetic_weight-0.5", "task-arithmetic_weight-1"):
        write(study, name, "test", LOW)
    write(study, HEADLINE, "test", HIGH)
    write(study, "tuned_rate-1e-05", "develop", HIGH)
    write(study, "tuned_rate-1e-05", "test", {"formats": 0.5, "arithmetic": 1.0})


def controls_of(policy: str) -> dict[str, list[str]]:
    made = arms.controls(arms.every()[policy], FIVE.shuffles)
    return {role: [arm.name for arm in drawn] for role, drawn in made.items()}


@pytest.fixture
def told(tmp_path: Path) -> Path:
    """A home of the real base's settings in which everything of the first wave is told, with known rates."""
    first_wave(Study("conflict", 0, tmp_path / "quick", QUICK))
    return tmp_path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with three seeds, the rival policy, and the controls of both."""
    home = tmp_path_factory.mktemp("merging") / "home"
    for seed in range(3):
        study = Study("conflict", seed, home, FIVE)
        first_wave(study)
        write(study, "conflict", "test", HALF)
        for policy in arms.TELLING:
            for name in (n for drawn in controls_of(policy).values() for n in drawn):
                write(study, name, "test", LOW)
    return home


@pytest.fixture
def whole(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may take from."""
    return Path(shutil.copytree(made, tmp_path / "home"))


def told_of(home: Path, seeds: tuple[int, ...] = (0, 1, 2)) -> str:
    return section(gather(home, FIVE, "conflict", seeds))


# ------------------------------------------------------------------------------------------------------------------ choosing
def test_settings_are_chosen_on_develop_alone(told: Path) -> None:
    study = Study("conflict", 0, told / "quick", QUICK)
    assert study.sweep_done()
    assert study.best() == {
        "best task-arithmetic": "task-arithmetic_weight-0.5",
        "best baseline by mean": "task-arithmetic_weight-0.5",
        "best baseline by min": "task-arithmetic_weight-0.5",
    }
    for name in ("task-arithmetic_weight-0.5", "task-arithmetic_weight-1"):
        study.evaluation_file(name, "test").unlink()
    assert study.best()["best baseline by mean"] == "task-arithmetic_weight-0.5"
    assert study.tuned() == "tuned_rate-1e-05"
    study.evaluation_file("task-arithmetic_weight-1", "develop").unlink()
    assert study.best() == {}, "nothing is chosen from part of a sweep"


def test_nothing_is_chosen_where_every_setting_is_refused(told: Path) -> None:
    study = Study("conflict", 0, told / "quick", QUICK)
    for name in ("task-arithmetic_weight-0.5", "task-arithmetic_weight-1"):
        study.evaluation_file(name, "develop").unlink()
        write_json(study.folder / "recipes" / name / "refused.json", "no")
    assert study.choosable()
    assert study.best() == {}
    assert steps.finished(study, "baselines") == (0, 0), "nothing is left to do"
    steps.baselines(study)


def test_without_the_parents_on_develop_nothing_is_chosen_and_nothing_fails(told: Path) -> None:
    study = Study("conflict", 0, told / "quick", QUICK)
    study.evaluation_file("formats", "develop").unlink()
    assert study.sweep_done()
    assert (study.best(), study.swept(), study.tuned()) == ({}, {}, None)
    assert steps.finished(study, "baselines") == (0, 2)
    for asked in (["--plan"], ["--only", "baselines"], ["--report"]):
        done = CliRunner().invoke(main, ["--quick", *asked, "--folder", str(told)])
        assert done.exit_code == (asked == ["--report"]), done.output
        assert isinstance(done.exception, SystemExit | None), asked
    text = (told / "quick" / "report" / "report.md").read_text()
    assert f"not measured yet: {BY_MEAN}" in text


def test_pooled_columns_are_the_official_verdicts_in_the_order_of_the_suite(told: Path) -> None:
    study = Study("conflict", 0, told / "quick", QUICK)
    column = study.answers("task-arithmetic_weight-0.5", "develop")["formats"]
    suite = study.suites["develop"][0]
    assert column.clusters == [prompt.topic for prompt in suite.prompts]
    assert column.groups == [prompt.group for prompt in suite.prompts]
    assert rate(column) == pytest.approx(np.mean(list(by_group(column).values())))
    path = study.evaluation_file(HEADLINE, "test")
    with pytest.raises(ValueError, match="other prompts"):
        pooled(read_document(Evaluation, path), path.stem, suite)


def test_an_evaluation_that_is_made_again_is_read_again(told: Path) -> None:
    study = Study("conflict", 0, told / "quick", QUICK)
    assert rate(study.answers(HEADLINE, "test")["formats"]) == 1
    write(study, HEADLINE, "test", LOW)
    assert rate(study.answers(HEADLINE, "test")["formats"]) == 0


# --------------------------------------------------------------------------------------------------------------------- goals
def test_figures_and_goals(whole: Path) -> None:
    figures, goals = judged(gather(whole, FIVE, "conflict", (0, 1, 2)))
    assert figures["conflict: rounds retains on average"] == pytest.approx(1)
    assert figures["conflict: rounds above best baseline by mean"] == pytest.approx(1)
    assert figures["conflict: rounds above fine-tuned, lower end"] > 0
    reached = [name for name in goals if name in figures]
    assert len(reached) == 6
    assert all(goals[name].met(figures[name]) and figures[f"{name}, seeds"] == 3 for name in reached)
    assert {
        f"conflict: top_budget-{b} above each control, lower end" for b in (0.1, 0.25, 0.5)
    } <= goals.keys() - figures.keys()


def test_a_goal_needs_three_seeds(whole: Path) -> None:
    """All bounds are kept on two seeds, and all goals are missed: no figure stands under a goal's name."""
    found = gather(whole, FIVE, "conflict", (0, 1))
    figures, goals = judged(found)
    assert not goals.keys() & figures.keys()
    assert figures["conflict: rounds retains on average, withheld"] == "1.000 seeds=2 (too few seeds: 2 of 3)"
    stand = standings(found)["conflict: rounds retains on average"]
    assert (stand.value, stand.met, stand.state) == (pytest.approx(1), False, "not measured yet")
    assert "| rounds retains on average | ≥ 0.9 | 1.000 | 2 | too few seeds: 2 of 3 |" in told_of(whole, (0, 1))


def test_every_difference_of_a_goal_needs_three_seeds(whole: Path) -> None:
    """The magnitude control of one seed is missing: what rests on it is withheld, and nothing else."""
    study = Study("conflict", 2, whole, FIVE)
    study.evaluation_file(f"magnitude.like.{HEADLINE}", "test").unlink()
    figures, goals = judged(gather(whole, FIVE, "conflict", (0, 1, 2)))
    lost = f"conflict: {HEADLINE} above each control, lower end"
    assert lost in goals
    assert lost not in figures
    assert "seeds=2" in figures[f"{lost}, withheld"]
    assert f"conflict: {HEADLINE} above its shuffles, lower end" in figures


def test_every_difference_tells_its_seeds(whole: Path) -> None:
    for seeds in ((0, 1, 2), (0,)):
        found = gather(whole, FIVE, "conflict", seeds)
        figures, _ = judged(found)
        told = [value for name, value in figures.items() if " less " in name or ", retained " in name]
        assert len(told) > 20
        for value in told:
            assert re.search(rf"\] seeds={len(seeds)}\b", value)
            assert ("(interval over topics (and draws))" in value) == (len(seeds) == 1)


def test_what_an_interval_is_over_is_told() -> None:
    one, three = (Figure(Interval(0.5, 0.4, 0.6), seeds, (0.5,) * seeds) for seeds in (1, 3))
    assert (one.over, three.over) == ("topics (and draws), one seed", "topics and seeds")
    assert one.told == "0.500 [0.400, 0.600] seeds=1 (interval over topics (and draws))"
    assert three.told == "0.500 [0.400, 0.600] seeds=3"


def test_tables_say_where_an_interval_is_of_one_seed(whole: Path) -> None:
    assert "topics (and draws)" not in told_of(whole)
    alone = told_of(whole, (1,))
    assert "topics and seeds" not in alone
    assert f"| {HEADLINE} | {TUNED} | 1 | topics (and draws), one seed |" in alone
    Study("conflict", 1, whole, FIVE).evaluation_file("conflict", "test").unlink()
    Study("conflict", 2, whole, FIVE).evaluation_file("conflict", "test").unlink()
    mixed = told_of(whole)
    assert "| conflict | 1 | 1 | topics (and draws), one seed |" in mixed
    assert f"| {HEADLINE} | 1 | 3 | topics and seeds |" in mixed


def test_draws_that_are_refused_are_told_and_no_goal_is_met_with_the_rest(whole: Path) -> None:
    study = Study("conflict", 1, whole, FIVE)
    for name in controls_of(HEADLINE)[f"norm-matched of {HEADLINE}"][3:]:
        study.evaluation_file(name, "test").unlink()
        write_json(study.folder / "recipes" / name / "refused.json", "no draw of such norms")
    figures, goals = judged(gather(whole, FIVE, "conflict", (0, 1, 2)))
    text, goal = told_of(whole), f"conflict: {HEADLINE} above each control, lower end"
    assert f"Seed 1, refused: `norm-4.like.{HEADLINE}`, `norm-5.like.{HEADLINE}`, because: no draw of such norms" in text
    assert f"Seed 1, draws that are left: norm-matched of {HEADLINE} 3 of 5, 2 refused." in text
    assert f"| norm-matched of {HEADLINE} | 5 / 3 of 5, 2 refused / 5 | 3 |" in text
    assert goal in goals.keys() - figures.keys()
    assert figures[f"{goal}, withheld"].endswith(f"(missed: draws of norm-matched of {HEADLINE} were refused)")


def test_a_policy_that_refuses_everywhere_has_missed_its_goals(whole: Path) -> None:
    for seed in range(3):
        study = Study("conflict", seed, whole, FIVE)
        write_json(study.folder / "recipes" / "top_budget-0.1" / "refused.json", "no scores")
    stand = standings(gather(whole, FIVE, "conflict", (0, 1, 2)))["conflict: top_budget-0.1 above each control, lower end"]
    assert (stand.state, stand.verdict) == ("missed", "missed: top_budget-0.1 was refused")


def test_every_policy_is_compared_with_the_best_baselines_and_with_equal_information(whole: Path) -> None:
    for seed in range(3):
        write(Study("conflict", seed, whole, FIVE), "top_budget-0.25", "test", HALF)
    found = gather(whole, FIVE, "conflict", (0, 1, 2))
    figures, text = judged(found)[0], told_of(whole)
    for policy in (HEADLINE, "conflict", "top_budget-0.25"):
        for other in (BY_MEAN, BY_MIN, TUNED):
            assert {f"conflict: {policy} less {other}, {over}" for over in ("mean", "min")} <= figures.keys()
            assert f"| {policy} | {other} | 3 |" in text
    compared = set(found.pairs())
    policies = {arm.name for arm in (*arms.telling(), *arms.others())}
    assert {(policy, other) for policy in policies for other in (BY_MEAN, BY_MIN, TUNED)} <= compared


# -------------------------------------------------------------------------------------------------------------------- report
def test_the_report_is_made_of_what_is_finished(told: Path) -> None:
    done = CliRunner().invoke(main, ["--quick", "--report", "--folder", str(told)])
    assert done.exit_code == 1, "goals that have no figure yet are missed"
    record = json.loads(done.output.strip().splitlines()[-1])
    assert record["name"] == "merging"
    assert record["met"] is False
    text = (told / "quick" / "report" / "report.md").read_text()
    assert f"| {HEADLINE} | 1 | 1 | topics (and draws), one seed | 1.000" in text
    assert "task-arithmetic_weight-0.5 | 0.500 | 0.500 | 0.500 | 0.500 | best task-arithmetic, best baseline by mean" in text
    assert (told / "quick" / "report" / "conflict.png").stat().st_size > 5000


def test_the_report_lists_what_is_missing(whole: Path) -> None:
    study = Study("conflict", 1, whole, FIVE)
    for name in controls_of("conflict")["shuffles of conflict"][3:]:
        study.evaluation_file(name, "test").unlink()
    study.evaluation_file(HEADLINE, "test").unlink()
    study.evaluation_file("task-arithmetic_weight-1", "develop").unlink()
    text = told_of(whole)
    row = next(line for line in text.splitlines() if line.startswith("| 1 | ") and "/" in line)
    cells = dict(zip(("seed", *steps.STEPS), (cell.strip() for cell in row.strip("|").split("|")), strict=True))
    assert cells["parents"] == "6/6"
    assert cells["policies"] == "**1/2**"
    assert cells["shuffles"] == "**8/10**"
    assert cells["sweep"] == "**1/2**"
    assert cells["baselines"] == "**0/2**"
    assert "Seed 1, begun and not in the tables yet: shuffles of conflict 3 of 5." in text
    assert "The sweep is not whole (1 of 2): nothing is chosen from it yet." in text
    assert "Nothing is evaluated yet" not in text


def test_goals_are_met_missed_or_not_measured_yet_in_the_report(whole: Path) -> None:
    for seed in range(3):
        write(Study("conflict", seed, whole, FIVE), HEADLINE, "test", HALF)
    report(whole, FIVE, ("conflict", "mild"), (0, 1, 2), save=False, quick=False)
    text = (whole / "report" / "report.md").read_text()
    assert f"| {HEADLINE} retains on average | ≥ 0.9 | 0.500 | 3 | MISSED |" in text
    assert re.search(rf"\| {HEADLINE} above its shuffles, lower end \| ≥ 0.1 \| 0\.\d+ \| 3 \| met \|", text)
    assert "| top_budget-0.1 above each control, lower end | > 0 |  |  | not measured yet: top_budget-0.1 |" in text
    assert "Goals of all families: 4 met, 2 missed, 22 not measured yet." in text
    conflict, _, mild = text.partition("## mild")
    assert "Nothing is evaluated yet." in mild
    assert f"None is measured yet: {HEADLINE} above best baseline by mean, lower end;" in mild
    assert "Nothing is evaluated yet." not in conflict


def test_one_evaluation_is_not_nothing(tmp_path: Path) -> None:
    study = Study("conflict", 0, tmp_path, FIVE)
    assert "Nothing is evaluated yet." in told_of(tmp_path, (0,))
    write(study, "base", "test", LOW)
    text = told_of(tmp_path, (0,))
    assert "Nothing is evaluated yet." not in text
    assert "No seed has the base and all of its experts on the test split yet" in text
    assert "**1/6**" in text


def test_the_report_tells_what_was_known_and_what_differs(whole: Path) -> None:
    write(Study("conflict", 2, whole, FIVE), "solve_budget-0.1", "test", LOW)
    report(whole, FIVE, tuple(FAMILIES), (0, 1, 2), save=False, quick=False)
    text = (whole / "report" / "report.md").read_text()
    plain = " ".join(text.split())
    assert "after its results on the test split with the experts of `conflict`, seed 0, had been seen in the demo" in plain
    assert "as much as the dearer of the measurements of `effects` and `rounds`" in plain
    parts = dict(zip(FAMILIES, text.split("\n## ")[1:], strict=True))
    assert "Seed 0's formats and arithmetic adapters are the demo's, from an older training script" in parts["conflict"]
    assert "Seed 0's formats adapter is the demo's" in parts["mild"]
    assert "`solve` ran with unproven=True (seeds 2)" in parts["conflict"]
    assert "unproven" not in parts["mild"]
    assert "Seed 0's" not in told_of(whole, (1, 2))


def test_the_plan_counts_what_is_left(told: Path) -> None:
    done = CliRunner().invoke(main, ["--quick", "--plan", "--folder", str(told)])
    assert done.exit_code == 0
    rows = {line.split()[2]: line for line in done.output.splitlines() if line.startswith("conflict")}
    assert set(rows) == set(steps.STEPS)
    assert "6/   6" in rows["parents"]
    assert "2/   2" in rows["sweep"]
    assert "0/   2" in rows["shuffles"]


# --------------------------------------------------------------------------------------------------------------------- calls
def test_calls_that_work_are_recorded_and_reported(told: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations belong to the commit of the call that made them; those before any record to none; looking makes no record."""
    home = told / "quick"
    study, before = Study("conflict", 0, home, QUICK), len(list(home.glob("evaluations/*/*.json")))

    def call(at: str, *asked: str) -> str:
        monkeypatch.setattr(calls, "commit", lambda: at)
        done = CliRunner().invoke(main, ["--quick", "--folder", str(told), *asked])
        assert isinstance(done.exception, SystemExit | None), done.output
        return done.output

    call("aaa", "--plan")
    call("aaa", "--report")
    assert not (home / "calls.jsonl").exists()
    call("aaa", "--only", "baselines")
    write(study, "conflict", "test", HALF)
    call("bbb", "--only", "baselines", "--minutes", "5")
    for i in range(2):
        write(study, f"norm-{i + 1}.like.conflict", "test", LOW)
    found = calls.worked(home)
    assert [(one.commit, one.calls, one.evaluations) for one in found] == [
        (calls.UNKNOWN, 0, before), ("aaa", 1, 1), ("bbb", 1, 2),
    ]  # fmt: skip
    line = json.loads((home / "calls.jsonl").read_text().splitlines()[1])
    assert line["arguments"] == {"families": ["conflict"], "seeds": [0], "only": ["baselines"], "minutes": 5}
    assert {"torch", "mechmerge"} <= line["versions"].keys()
    figures = json.loads(call("ccc", "--report").strip().splitlines()[-1])["figures"]
    assert figures["evaluations in the folder, commit bbb"] == 2
    assert figures[f"evaluations in the folder, commit {calls.UNKNOWN}"] == before
    assert "| bbb | 1 |" in (home / "report" / "report.md").read_text()
    assert set(json.loads((home / "settings.json").read_text())) == {
        "sizes", "base", "evaluation", "suites", "effects", "rounds",
    }  # fmt: skip


def test_a_call_with_other_settings_is_not_recorded(told: Path) -> None:
    path = told / "quick" / "settings.json"
    write_json(path, json.loads(path.read_text()) | {"base": "another"})
    done = CliRunner().invoke(main, ["--quick", "--folder", str(told), "--only", "baselines"])
    assert "other base" in str(done.exception)
    assert not (told / "quick" / "calls.jsonl").exists()


def test_saves_are_named_after_the_part_that_they_report(told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert part_of(tuple(FAMILIES), (0, 1, 2), False) == ""
    assert part_of(("three-way", "conflict"), (2, 1, 0), False) == "conflict-three-way"
    assert part_of(tuple(FAMILIES), (0,), False) == "seed-0"
    assert part_of(("mild",), (2, 0), False) == "mild-seeds-0-2"
    assert part_of(("conflict",), (0,), True) == ""
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    for family in ("conflict", "mild"):
        CliRunner().invoke(main, ["--quick", "--report", "--save", "--family", family, "--folder", str(told)])
    names = {re.sub(r"-\d{4}-\d\d-\d\d", "", path.name) for path in (tmp_path / "results").iterdir()}
    assert names == {"merging-quick", "merging-quick.json", "merging-mild-quick", "merging-mild-quick.json"}
    assert {path.name for path in next((tmp_path / "results").glob("merging-quick-*/")).iterdir()} == {
        "report.md", "conflict.png",
    }  # fmt: skip
