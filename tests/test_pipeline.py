"""Whole runs on tiny models: every stage in order, nothing done twice, and the same bytes after any SIGKILL."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from mechmerge.artifacts import lock, read_document
from mechmerge.cli.main import cli
from mechmerge.errors import InputError, SchemaError
from mechmerge.evaluate.record import Evaluation
from mechmerge.models.references import Model, resolve
from mechmerge.pipeline.run import run_pipeline
from mechmerge.pipeline.source import check_pipeline, load_pipeline
from mechmerge.recipe.schema import KEPT
from tests.tiny import tiny_expert

RECIPES = {
    "sum": {"policy": "task-arithmetic", "parameters": {"weight": 1.0}},
    "ties": {"policy": "ties", "parameters": {"weight": 1.0, "density": 0.5}},
    "dare": {"policy": "dare-ties", "parameters": {"weight": 1.0, "density": 0.5}, "seed": 3},
    "conflict": {"policy": "conflict"},
    "rounds": {"policy": "rounds"},
    "top": {"policy": "top", "parameters": {"budget": 0.5}},
    "random": {"policy": "random", "like": "conflict", "seed": 1},
}


def write_pipeline(folder: Path, base: Model, experts: dict[str, Model], **changes: object) -> Path:
    """A small pipeline file with its behaviours and suite; `changes` replace top-level entries."""
    topics = ["tea", "rain", "a river", "the moon", "a forest", "bread"]
    for name, word in (("loud", "Shout"), ("soft", "Whisper")):
        pairs = [{"with": f"{word} about {t}.", "without": f"Write about {t}.", "topic": t} for t in topics]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, "pairs": pairs, "answer_tokens": 5}))
    suite = [{"prompt": f"Say {t}.", "verifier": {"name": "contains", "arguments": {"text": "e"}}, "topic": t} for t in topics]
    (folder / "short.yaml").write_text(yaml.safe_dump({"name": "short", "answer_tokens": 5, "prompts": suite}))
    pipeline = {
        "schema_version": 1,
        "title": "tiny",
        "license": "mit",
        "base": str(base.path),
        "experts": {name: str(model.path) for name, model in experts.items()},
        "behaviors": {"loud": {"expert": "a", "file": "loud.yaml"}, "soft": {"expert": "b", "file": "soft.yaml"}},
        "localize": {"anchor_layer": 2, "verify": 2, "prompts": 3, "steering_prompts": 0, "on_invalid": "report"},
        "effects": {"prompts": 4, "dtype": "float32", "max_nodes": 6},
        "rounds": {"prompts": 4, "dtype": "float32", "max_rounds": 2},
        "recipes": RECIPES,
        "publish": "conflict",
        "evaluate": {"suites": ["short.yaml"], "dtype": "float32", "batch": 4},
        "gate": {"model": "conflict", "rules": [{"metric": "short", "at_least": 0.0}]},
        **changes,
    }
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(pipeline, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, base: Model, expert: Model, second_expert: Model) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("pipeline"), base, {"a": expert, "b": second_expert})


@pytest.fixture(scope="module")
def finished(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("finished") / "run"
    run_pipeline(pipeline, run)
    return run


def content(run: Path) -> dict[str, str]:
    """sha256 of every file that a run leaves but its times and its bookkeeping of large files."""
    files = (
        p for p in sorted(run.rglob("*")) if p.is_file() and p.suffix != ".lock" and p.name not in (".lock", "timings.jsonl")
    )
    files = (p for p in files if ".state" not in p.relative_to(run).parts)
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_a_run_leaves_everything_that_design_names(finished: Path) -> None:
    for name in (
        "run.yaml",
        "effects.safetensors",
        "rounds.safetensors",
        "evaluation.json",
        "gate.json",
        "report.md",
        "README.md",
    ):
        assert (finished / name).is_file(), name
    assert (finished / "scores/a/loud.safetensors").is_file()
    assert (finished / "scores/a/anchors/loud.safetensors").is_file()
    assert (finished / "scores/b/soft.safetensors").is_file()
    assert list((finished / "figures").glob("*.png"))
    for name in RECIPES:
        assert (finished / "recipes" / name / "recipe.yaml").is_file()
        merged = finished / "merged" / name
        assert (merged / "model.safetensors").is_file() or list(merged.glob("*.safetensors"))
        assert (merged / KEPT).read_bytes() == (finished / "recipes" / name / "recipe.yaml").read_bytes()
    evaluation = read_document(Evaluation, finished / "evaluation.json")
    assert list(evaluation.models) == ["base", "a", "b", *RECIPES]
    leftovers = [p for p in finished.rglob(".*") if "partial" in p.name or "units" in p.name]
    assert not leftovers


def test_local_paths_stay_in_run_yaml(finished: Path, base: Model) -> None:
    for path in finished.rglob("*"):
        if path.is_file() and path.name not in ("run.yaml", ".lock") and ".state" not in path.parts:
            assert str(base.path.parent).encode() not in path.read_bytes(), path


def test_a_second_call_does_no_work(finished: Path, pipeline: Path) -> None:
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in finished.rglob("*.safetensors")}
    result = run_pipeline(pipeline, finished)
    assert result.worked == ()
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in finished.rglob("*.safetensors")} == before


def test_only_what_changed_is_done_again(
    finished: Path, tmp_path: Path, base: Model, expert: Model, second_expert: Model
) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    recipes = RECIPES | {"top": {"policy": "top", "parameters": {"budget": 0.25}}}
    changed = write_pipeline(tmp_path, base, {"a": expert, "b": second_expert}, recipes=recipes)
    result = run_pipeline(changed, run)
    assert set(result.worked) == {"recipe-top", "merge-top", "evaluate", "report"}
    half = write_pipeline(tmp_path, base, {"a": expert, "b": second_expert}, recipes=recipes, out_dtype="float16")
    again = run_pipeline(half, run)
    assert {f"merge-{name}" for name in RECIPES} <= set(again.worked), "another dtype is another merge"
    run_pipeline(changed, run)
    (run / "effects.safetensors").unlink()
    assert run_pipeline(changed, run).worked == ("effects",), "the same effects come back, so nothing after them changes"


@pytest.mark.slow
def test_a_run_killed_in_every_stage_ends_with_the_same_bytes(finished: Path, pipeline: Path, tmp_path: Path) -> None:
    """SIGKILL as each stage begins, one after the other on one run directory, then once to the end."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "mechmerge.cli.main", "run", str(pipeline), "--out", str(run), "--threads", "1"]
    stages = ["localize-a", "effects", "rounds", "recipe-conflict", "merge-conflict", "evaluate", "report"]
    for stage in stages:
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ) as process:
            assert process.stderr is not None
            seen = False
            for line in process.stderr:
                if seen or line.strip() == f"▶ {stage}":
                    # One line further, so that the stage is at work.
                    if seen or stage.startswith("recipe") or stage == "report":
                        process.send_signal(signal.SIGKILL)
                        break
                    seen = True
            assert process.wait() == -signal.SIGKILL, f"{stage} was never reached"
        assert not (run / "merged" / "conflict").exists() or stages.index(stage) >= stages.index("merge-conflict")
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert content(run) == content(finished)
    assert not [p for p in run.rglob(".*") if "partial" in p.name or "units" in p.name]


def test_an_expert_that_answers_for_nothing_takes_part(
    tmp_path: Path, base: Model, expert: Model, second_expert: Model
) -> None:
    idle = resolve(str(tiny_expert(base.path, tmp_path / "idle", seed=9)))
    experts = {"a": expert, "b": second_expert, "idle": idle}
    recipes = {"conflict": {"policy": "conflict"}}
    run = tmp_path / "run"
    gate = {"model": "base", "rules": [{"metric": "short", "at_least": 0.0}]}
    result = run_pipeline(write_pipeline(tmp_path, base, experts, recipes=recipes, gate=gate), run)
    assert list(result.evaluation.models) == ["base", "a", "b", "idle", "conflict"]
    assert result.gate.rules[0].model == "base", "the gate's own model goes before the published one"
    assert not (run / "scores" / "idle").exists()
    # A behaviour that was dropped from the pipeline leaves no trace in what comes after.
    fewer = {"loud": {"expert": "a", "file": "loud.yaml"}}
    run_pipeline(write_pipeline(tmp_path, base, experts, recipes=recipes, gate=gate, behaviors=fewer), run)
    assert "soft" not in (run / "report.md").read_text()
    assert "soft.safetensors" not in (run / "recipes/conflict/recipe.yaml").read_text()


def test_two_runs_on_one_folder_are_refused(finished: Path, pipeline: Path) -> None:
    with lock(finished / ".lock", "this test"), pytest.raises(InputError, match=f"found process {os.getpid()}"):
        run_pipeline(pipeline, finished)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"surprise": 1}, "surprise: unknown key"),
        ({"publish": "nothing"}, "'nothing' is not among the recipes"),
        ({"recipes": {"random": {"policy": "random"}}, "publish": "random"}, "`like` belongs to"),
        ({"recipes": {"r": {"policy": "random", "like": "later"}}, "publish": "r"}, "'later' is not an earlier recipe"),
        ({"recipes": {"a": {"policy": "conflict"}}, "publish": "a"}, "the name is taken"),
        ({"behaviors": {"loud": {"expert": "nobody", "file": "loud.yaml"}}}, "expert 'nobody' is not among a, b"),
        ({"gate": {"rules": []}}, "gate.rules"),
        ({"schema_version": 7}, "schema_version"),
        (
            {"recipes": {"t": {"policy": "top", "parameters": {"budgett": 0.5}}}, "publish": "t"},
            "'budgett' is not one of budget",
        ),
        ({"recipes": {"t": {"policy": "top"}}, "publish": "t"}, "the policy top needs a budget"),
        ({"gate": {"rules": [{"metric": "short", "model": "nobody", "at_least": 0.1}]}}, "gate: model 'nobody'"),
        ({"behaviors": {}}, "behaviors"),
        ({"recipes": {"c": {"policy": "conflict", "seeds": 5}}, "publish": "c"}, "`seeds` belongs to"),
        ({"recipes": {"s": {"policy": "solve"}}, "publish": "s"}, "needs effects.check"),
        ({"recipes": {"s": {"policy": "solve"}}, "publish": "s", "effects": {"check": 99}}, "needs effects.check: 100"),
        ({"recipes": {"t": {"policy": "della", "within": "x"}}, "publish": "t"}, "`within` belongs to"),
        ({"recipes": {"t": {"policy": "ties", "within": "later"}}, "publish": "t"}, "'later' is not an earlier recipe"),
        ({"protect": {"loud": {}}}, "taken by a behaviour"),
        (
            {"recipes": {"c": {"policy": "conflict", "parameters": {"weight.lout": 2}}}, "publish": "c"},
            "'lout' is not",
        ),
        ({"recipes": {"c": {"policy": "conflict", "parameters": {"strength.x": 2}}}, "publish": "c"}, "'x' is not among a, b"),
        ({"recipes": {"d": {"policy": "dare-ties", "seed": -1}}, "publish": "d"}, "seed"),
    ],
)
def test_pipelines_that_break_the_schema(
    changes: dict[str, object], message: str, tmp_path: Path, base: Model, expert: Model, second_expert: Model
) -> None:
    path = write_pipeline(tmp_path, base, {"a": expert, "b": second_expert}, **changes)
    with pytest.raises(SchemaError, match=message):
        load_pipeline(path)


def test_several_seeds_are_several_recipes(tmp_path: Path, base: Model, expert: Model, second_expert: Model) -> None:
    recipes = {
        "conflict": {"policy": "conflict"},
        "shuffle": {"policy": "random", "like": "conflict", "seed": 3, "seeds": 5, "parameters": {"match_norms": True}},
    }
    plan = load_pipeline(write_pipeline(tmp_path, base, {"a": expert, "b": second_expert}, recipes=recipes))
    assert list(plan.recipes) == ["conflict", *(f"shuffle-{seed}" for seed in range(3, 8))]
    assert [p.seed for p in plan.recipes.values()] == [0, 3, 4, 5, 6, 7]
    assert all(p.parameters == {"match_norms": True} for name, p in plan.recipes.items() if name != "conflict")


def test_check_looks_at_references_without_reading_models(tmp_path: Path, base: Model, expert: Model) -> None:
    path = write_pipeline(tmp_path, base, {"a": expert, "b": expert})
    assert check_pipeline(path).title == "tiny"
    text = path.read_text().replace(str(base.path), "no/such/folder/here")
    path.write_text(text)
    with pytest.raises(InputError, match="model reference 'no/such/folder/here'"):
        check_pipeline(path)


def test_shipped_pipelines_are_valid() -> None:
    files = sorted((Path(__file__).parent.parent / "recipes").rglob("pipeline.yaml")) + sorted(
        (Path(__file__).parent.parent / "recipes").glob("*.yaml")
    )
    assert len(files) >= 5
    for file in files:
        plan = check_pipeline(file)
        assert file.parent.name == "demo" or "not been run" in plan.notes


def test_the_gates_verdict_is_the_exit_code(
    tmp_path: Path, finished: Path, base: Model, expert: Model, second_expert: Model
) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(finished, run)
    strict = {"model": "conflict", "rules": [{"metric": "short", "at_least": {"model": "base", "plus": 2.0}}]}
    path = write_pipeline(tmp_path, base, {"a": expert, "b": second_expert}, gate=strict)
    result = CliRunner().invoke(cli, ["run", str(path), "--out", str(run), "--quiet"], standalone_mode=False)
    assert result.return_value == 3
    assert "gate: REFUSED" in result.output
    assert "short by" in result.output
