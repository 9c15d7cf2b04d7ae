"""Sweeps: what is combined with what, nothing measured or said twice, and a ranking that is the gate's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mechmerge.artifacts import read_document
from mechmerge.cli.main import cli
from mechmerge.errors import InputError
from mechmerge.evaluate.record import Evaluation
from mechmerge.models.references import Model, resolve
from mechmerge.pipeline.source import load_pipeline
from mechmerge.pipeline.sweep import Sweep, expert_sets, parse_vary, run_sweep, subset, variants
from tests.test_generation import Recorder
from tests.test_pipeline import write_pipeline
from tests.test_tune import small_suite
from tests.tiny import tiny_expert

GATE = {"model": "c", "rules": [{"metric": "short", "at_least": 0.0}]}


def test_what_is_varied():
    assert parse_vary(["policy=conflict,top,budget=0.1,0.5", "experts=a+b"]) == {
        "policy": ["conflict", "top"],
        "budget": [0.1, 0.5],
        "experts": ["a+b"],
    }
    for bad in ("policy", "=1", "policy=", "policy=a,,b", "budget=1,budget=2"):
        with pytest.raises(InputError, match="--vary"):
            parse_vary([bad])
    with pytest.raises(InputError, match="budget twice"):
        parse_vary(["budget=1", "budget=2"])


def test_sets_of_experts():
    names = ("x", "y", "z")
    assert expert_sets(names, ["all"]) == [names]
    assert expert_sets(names, ["pairs", "all"]) == [names, ("x", "y"), ("x", "z"), ("y", "z")]
    assert expert_sets(names, ["subsets"]) == expert_sets(names, ["all", "pairs", "x+y"])
    assert expert_sets(names, ["z+x", "y"]) == [("x", "z"), ("y",)]
    for bad in ("w", "x+x", "x+"):
        with pytest.raises(InputError, match="experts"):
            expert_sets(names, [bad])


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, base: Model, expert: Model, second_expert: Model) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    third = resolve(str(tiny_expert(base.path, folder / "third", seed=9, scale=0.05)))
    gate = {"model": "conflict", "rules": [{"metric": "short", "at_least": {"model": "a", "times": 0.5}}]}
    experts = {"a": expert, "b": second_expert, "c": third}
    return write_pipeline(folder, base, experts, gate=gate)


def test_combinations(pipeline):
    plan = load_pipeline(pipeline)
    made = variants(plan, parse_vary(["policy=random,top,ties,budget=0.1,0.5,density=0.5"]))
    assert [v.name for v in made] == [
        "top_budget-0.1",
        "top_budget-0.5",
        "ties_density-0.5",
        "random_like-top_budget-0.1",
        "random_like-top_budget-0.5",
    ]
    assert made[0].parameters == {"budget": 0.1}
    assert made[3].like == "top_budget-0.1"
    drawn = variants(plan, parse_vary(["policy=random,conflict,dare-ties", "seeds=5"]))
    assert [v.seed for v in drawn if v.policy == "random"] == [0, 1, 2, 3, 4]
    assert [v.name for v in drawn if v.policy == "dare-ties"][:2] == ["dare-ties_seed-0", "dare-ties_seed-1"]
    assert sum(v.policy == "conflict" for v in drawn) == 1, "nothing is drawn there"
    part, _ = subset(plan, tuple(plan.experts), parse_vary(["policy=random,conflict", "seeds=2"]))
    assert {n: p.seed for n, p in part.recipes.items()} == {
        "conflict": 0,
        "random_like-conflict_seed-0": 0,
        "random_like-conflict_seed-1": 1,
    }
    for wrong in ("seeds=0", "seeds=2,3", "seeds=many"):
        with pytest.raises(InputError, match="--vary seeds"):
            variants(plan, parse_vary(["policy=dare-ties", wrong]))
    own = variants(plan, {"weight": [0.3, 0.7]})
    assert {v.name for v in own if v.policy == "task-arithmetic"} == {"sum_weight-0.3", "sum_weight-0.7"}
    assert [v.parameters for v in own if v.policy == "top"] == [{"budget": 0.5}], "what is not varied stays as it is"
    assert "random" not in {v.policy for v in own}


def test_recipes_of_the_pipeline_stay_what_they_are(tmp_path, base, expert, second_expert) -> None:
    """Their seeds, what they work within, and names of experts that are not in a set."""
    recipes = {
        "c": {"policy": "conflict", "parameters": {"strength.a": 0.9, "weight.loud": 2.0}},
        "boxed": {"policy": "ties", "within": "c"},
        "dare": {"policy": "dare-ties", "seeds": 2, "seed": 3},
    }
    path = write_pipeline(tmp_path, base, {"a": expert, "b": second_expert}, recipes=recipes, publish="c", gate=GATE)
    plan = load_pipeline(path)
    part, made = subset(plan, ("a", "b"), parse_vary(["experts=all"]))
    assert [(v.name, v.seed, v.within) for v in made] == [
        ("c", 0, None), ("boxed", 0, "c"), ("dare-3", 3, None), ("dare-4", 4, None)
    ]  # fmt: skip
    assert {name: (r.within, r.seed) for name, r in part.recipes.items()} == {v.name: (v.within, v.seed) for v in made}
    varied = variants(plan, parse_vary(["strength.b=0.5,1"]))
    assert [(v.name, v.within) for v in varied if v.policy == "ties"] == [
        (f"boxed_strength.b-{s}_within-c_strength.b-{inner}", f"c_strength.b-{inner}") for inner in (0.5, 1) for s in (0.5, 1)
    ]
    alone, made = subset(plan, ("b",), parse_vary(["strength.a=0.5,1", "lambda=1,1.5"]))
    assert list(alone.experts) == ["b"]
    assert [v.parameters for v in made if v.policy == "conflict"] == [{}], "nothing of the expert that is not there"
    assert [v.parameters for v in made if v.policy == "ties"] == [{"lambda": 1}, {"lambda": 1.5}]
    for wrong in ("strength.nobody=0.5", "weight.quiet=2"):
        with pytest.raises(InputError, match="is not among"):
            subset(plan, ("a", "b"), parse_vary([wrong]))


@pytest.mark.parametrize("suite", ["ifeval", "lm_eval:arc_easy"])
def test_the_develop_split_has_no_test_suites(tmp_path, base, expert, second_expert, monkeypatch, suite) -> None:
    evaluation = {"suites": [suite], "dtype": "float32", "batch": 4}
    path = write_pipeline(tmp_path, base, {"a": expert, "b": second_expert}, recipes={"c": {"policy": "conflict"}},
                          publish="c", evaluate=evaluation, gate=GATE)  # fmt: skip
    official = small_suite().model_copy(update={"split": "official"})
    monkeypatch.setattr("mechmerge.pipeline.examining.suites_of", lambda *_: [official])
    with pytest.raises(InputError, match=r"expected development prompts; found .* choose with --split test"):
        run_sweep(path, parse_vary(["experts=all"]), tmp_path / "out")
    assert not (tmp_path / "out").exists(), "it is refused before anything is measured"


@pytest.mark.parametrize(
    ("vary", "found"),
    [
        ("policy=best", "found best"),
        ("policy=ties,budget=0.1", "none of them has"),
        ("policy=random", "beside the control"),
        ("policy=top", "needs a budget"),
    ],
)
def test_combinations_that_cannot_be(pipeline, vary, found):
    plan = load_pipeline(pipeline)
    with pytest.raises(InputError, match=found):
        subset(plan, tuple(plan.experts), parse_vary([vary]))


@pytest.fixture(scope="module")
def swept(pipeline, tmp_path_factory):
    out = tmp_path_factory.mktemp("swept") / "sweep"
    recorder = Recorder()
    sweep, _ = run_sweep(pipeline, parse_vary(["policy=task-arithmetic,conflict", "experts=all,a+b"]), out, progress=recorder)
    return out, sweep, recorder


def test_every_combination_is_there_and_ranked(swept):
    out, sweep, _ = swept
    names = [row.variant.name for row in sweep.ranking]
    parts = ("task-arithmetic", "conflict")
    assert sorted(names) == sorted(f"{experts}.{part}" for experts in ("a-b", "a-b-c") for part in parts)
    assert [row.rank for row in sweep.ranking] == [1, 2, 3, 4]
    evaluation = read_document(Evaluation, out / "evaluation.json")
    assert list(evaluation.models)[:4] == ["base", "a", "b", "c"]
    for row in sweep.ranking:
        assert row.metrics["short"] == evaluation.metric(row.variant.name, "short").value
        assert row.gate.rules[0].model == row.variant.name
        assert (out / row.recipe).is_file()
    order = [(len(row.gate.failed), sum(rule.short_by or 0 for rule in row.gate.failed)) for row in sweep.ranking]
    assert order == sorted(order)
    assert read_document(Sweep, out / "sweep.json") == sweep
    assert sweep.split == "develop"


def test_localization_is_made_once_for_each_expert(swept):
    out, _, recorder = swept
    done = [note for note in recorder.notes if "localize-" in note]
    assert sorted(done) == sorted([*(f"▶ localize-{n}" for n in "ab"), *(f"✓ localize-{n} (unchanged)" for n in "ab")]), done
    first, second = ((out / "sets" / label / "scores/a/loud.safetensors").read_bytes() for label in ("a+b", "a+b+c"))
    assert first == second
    assert sum("▶ effects" in note for note in recorder.notes) == 2, "effects depend on the sum"


def test_a_second_sweep_answers_only_what_is_new(swept, pipeline):
    out, sweep, _ = swept
    recorder = Recorder()
    vary = parse_vary(["policy=task-arithmetic,conflict", "experts=all,a+b"])
    assert run_sweep(pipeline, vary, out, progress=recorder)[0] == sweep
    assert not any(note.startswith("▶") for note in recorder.notes)
    more = parse_vary(["policy=task-arithmetic,conflict,linear", "experts=all,a+b"])
    recorder = Recorder()
    wider, _ = run_sweep(pipeline, more, out, progress=recorder)
    assert len(wider.ranking) == 6
    asked = [label for label, _ in recorder.started if label.endswith(": short")]
    assert len(asked) <= 2, "answers that are there are not made again"
    assert all("linear" in label for label in asked)


def test_command(pipeline, swept, tmp_path):
    out, sweep, _ = swept
    arguments = ["sweep", str(pipeline), "--vary", "policy=task-arithmetic,conflict", "--vary", "experts=all,a+b"]
    done = CliRunner().invoke(cli, [*arguments, "--out", str(out), "--quiet", "--format", "json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["ranking"][0]["variant"]["name"] == sweep.ranking[0].variant.name
    table = CliRunner().invoke(cli, [*arguments, "--out", str(out), "--quiet"]).stdout
    assert "a-b-c.task-arithmetic" in table
    assert "develop split" in table
    assert CliRunner().invoke(cli, [*arguments[:2], "--out", str(tmp_path)]).exit_code == 2
