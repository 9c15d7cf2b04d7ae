"""Tuning: what is open, merges in memory that equal those on disk, trials that repeat after a kill, and no test prompt ever."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from pydantic import ValidationError

from mechmerge.artifacts import MOST_SEED, read_document
from mechmerge.cli.common import SEED
from mechmerge.cli.main import cli
from mechmerge.errors import CheckpointError, InputError
from mechmerge.evaluate.gate import Gate, Rule
from mechmerge.evaluate.record import EvaluateSettings
from mechmerge.evaluate.run import evaluate
from mechmerge.evaluate.suites import Suite, SuitePrompt, dealt, load_suite
from mechmerge.localize.effect_file import read_effects
from mechmerge.merge.engine import merge, open_models
from mechmerge.merge.in_memory import merge_id, merged_model
from mechmerge.models.load import load_model, load_tokenizer, quiet
from mechmerge.models.packed import load_packed
from mechmerge.models.references import Model, resolve
from mechmerge.pipeline.examining import Examiner, check_development
from mechmerge.pipeline.ranking import Judged
from mechmerge.pipeline.schema import RecipePlan
from mechmerge.pipeline.search import kept_gain
from mechmerge.pipeline.space import Open, space_of, spread, untouched
from mechmerge.pipeline.tune import measured, tune
from mechmerge.pipeline.tuning import TuneSettings, Tuning, best_of
from mechmerge.recipe.compile import BASELINES, compile_recipe
from mechmerge.recipe.schema import MergekitMethod, read_recipe
from mechmerge.recipe.sources import read_sources
from mechmerge.recipe.strengths import strengthened
from tests.test_components import MODEL_TYPES
from tests.test_generation import Recorder, lively
from tests.test_merge import random_masks, written
from tests.test_pipeline import write_pipeline
from tests.tiny import tiny_expert, tiny_model

WORDS = ("tea", "rain", "river", "moon", "forest", "bread", "stone", "salt", "wind", "snow", "fire", "dust")


# ------------------------------------------------------------------------------------------------------- merges in memory
@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_a_merge_in_memory_is_the_merge_on_disk(family: str, out_dtype: Any, tmp_path: Path) -> None:
    base = resolve(str(tiny_model(tmp_path / "base", family, layers=2, tied=family != "gpt_neox")))
    experts = {f"e{i}": resolve(str(tiny_expert(base.path, tmp_path / f"e{i}", seed=i))) for i in range(2)}
    file = written(tmp_path, base, experts, random_masks(base, experts), out_dtype=out_dtype)
    merge(file, tmp_path / "out")
    recipe, masks = read_recipe(file)
    opened, others = open_models(recipe, {})
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad():
        one = merged_model(recipe, masks, opened, others, "bfloat16", "cpu")(tokens).logits
        assert torch.equal(one, load_packed(tmp_path / "out", "bfloat16")(tokens).logits)
        assert not torch.equal(one, load_packed(base.path, "bfloat16")(tokens).logits)


def test_a_baseline_in_memory_goes_through_mergekit(base: Model, expert: Model, tmp_path: Path) -> None:
    method = MergekitMethod(method="ties", parameters={"normalize": True}, expert_parameters={"e": {"density": 0.5}})
    file = written(tmp_path, base, {"e": expert}, mergekit=method)
    merge(file, tmp_path / "out")
    recipe, masks = read_recipe(file)
    opened, others = open_models(recipe, {})
    tokens = torch.arange(3, 15)[None]
    with torch.no_grad():
        one = merged_model(recipe, masks, opened, others, "float32", "cpu")(tokens).logits
        assert torch.equal(one, load_packed(tmp_path / "out", "float32")(tokens).logits)


def test_a_merge_is_known_by_its_coefficients(base: Model, expert: Model, tmp_path: Path) -> None:
    ones = {
        f"e.{k}": np.ones_like(m) for k, m in ((n.rpartition(".")[2], m) for n, m in random_masks(base, {"e": expert}).items())
    }
    plain, _ = read_recipe(written(tmp_path / "a", base, {"e": expert}))
    masked, masks = read_recipe(written(tmp_path / "b", base, {"e": expert}, ones))
    opened = base.checkpoint()
    assert merge_id("x", plain, {}, opened).digest == merge_id("y", masked, masks, opened).digest
    masks["e.head"][0, 0] = 0.5
    assert merge_id("x", plain, {}, opened).digest != merge_id("y", masked, masks, opened).digest
    rounded = plain.model_copy(update={"out_dtype": "float32"})
    assert merge_id("x", plain, {}, opened).digest != merge_id("x", rounded, {}, opened).digest


# ------------------------------------------------------------------------------------------------------------------ space
def test_what_is_open() -> None:
    plan = RecipePlan(policy="top", parameters={"budget": 0.3})
    space = space_of(plan, ("a", "b"), ("x", "y"))
    assert [one.name for one in space] == ["overlap", "strength.a", "strength.b"], "what the recipe sets is closed"
    assert untouched(space, plan)[0] == {"overlap": "sum", "strength.a": 1.0, "strength.b": 1.0}
    opened = space_of(plan, ("a", "b"), ("x", "y"), ["budget=0.1:0.4", "overlap=sum,share"])
    assert [one.name for one in opened] == ["budget", "overlap", "strength.a", "strength.b"]
    assert (opened[0].low, opened[0].high, opened[1].choices) == (0.1, 0.4, ("sum", "share"))
    assert untouched(opened, plan)[0]["budget"] == 0.3
    conflict = space_of(RecipePlan(policy="conflict"), ("a",), ("x", "y", "z"))
    assert [one.name for one in conflict] == ["agreement", "certainty", "weight.y", "weight.z", "strength.a"]
    assert [one.name for one in space_of(RecipePlan(policy="ties"), ("a",), ("x",))] == ["density", "lambda"]
    with pytest.raises(InputError, match="nothing"):
        space_of(RecipePlan(policy="sce"), ("a",), ("x",))  # a strength would change nothing
    closed = RecipePlan(policy="task-arithmetic", parameters={"strength.a": 0.5})
    with pytest.raises(InputError, match="leaves open; found nothing"):
        space_of(closed, ("a",), ("x",))
    for bad in ("density", "budget=2:1", "budget=x:y", "overlap=sum", "=1"):
        with pytest.raises(InputError, match="--open"):
            space_of(plan, ("a",), ("x",), [bad])


def test_points_fill_the_space() -> None:
    space = [Open(name="w", low=0.25, high=4, log=True), Open(name="s", low=0, high=1), Open(name="o", choices=("a", "b"))]
    points = spread(space, 20, seed=3)
    assert points == spread(space, 20, seed=3) != spread(space, 20, seed=4)
    assert sorted(int(float(p["s"]) * 20 - 1e-9) for p in points) == list(range(20)), "one in each twentieth"
    assert sum(float(p["w"]) < 1 for p in points) == 10, "by ratios"
    assert sum(p["o"] == "a" for p in points) == 10


# -------------------------------------------------------------------------------------------------------------- strengths
def test_strengths_multiply_what_the_policy_chose(tuned: tuple[Path, Tuning], pipeline: Path) -> None:
    out, _ = tuned
    sources = read_sources([out / "effects.safetensors"])
    plain, changed = (compile_recipe("conflict", sources, parameters=p) for p in ({}, {"strength.a": 0.5, "agreement": True}))
    assert changed.recipe.policy.parameters == {"strength.a": 0.5, "agreement": True}
    assert [e.default for e in changed.recipe.experts.values()] == [0.5, 1.0]
    for name, mask in plain.masks.items():
        factor = 0.5 if name.startswith("a.") else 1.0
        assert np.array_equal(changed.masks[name], mask * np.float32(factor)), name
    assert changed.recipe.predicted is not None
    assert changed.recipe.predicted != plain.recipe.predicted
    assert read_sources([out / "effects.safetensors"]).effects is not None
    for bad in ({"strength.c": 1.0}, {"strength.a": "much"}, {"strength.a": True}, {"strength.a": 1e9}):
        with pytest.raises(InputError, match="strength"):
            compile_recipe("conflict", sources, parameters=bad)
    for policy in ("sce", "model-stock"):
        with pytest.raises(InputError, match=f"policy {policy}: expected no strengths"):
            compile_recipe(policy, sources, parameters={"strength.a": 0.5})
    ties = compile_recipe("ties", sources, parameters={"weight": 0.6, "strength.b": 0.5}).recipe
    assert [e.default for e in ties.experts.values()] == [0.6, 0.3]
    assert strengthened(plain.recipe, plain.masks, {}, None)[0].predicted is None, "no effects, no prediction"


def test_a_seed_that_the_sampler_would_not_take_is_refused() -> None:
    """numpy's older generators, which optuna and mergekit draw with, take 32 bits."""
    assert SEED.max == MOST_SEED
    TuneSettings(seed=MOST_SEED)
    for seed in (2**32, -1):
        with pytest.raises(ValidationError, match="seed"):
            TuneSettings(seed=seed)
    done = CliRunner().invoke(cli, ["tune", "pipeline.yaml", "--out", "out", "--seed", str(2**32)])
    assert done.exit_code == 2
    assert "is not in the range" in done.output


# ---------------------------------------------------------------------------------------------------------- the test split
def test_no_test_prompt_is_asked(pipeline: Path, tmp_path: Path) -> None:
    for suite in (load_suite("formats", "test"), load_suite("arithmetic", "test")):
        with pytest.raises(InputError, match="development prompts; found the split test"):
            check_development([suite])
        check_development([load_suite(suite.name, "develop")])
    with pytest.raises(InputError, match="a benchmark's task"):
        tune(pipeline, tmp_path / "out", suites=["lm_eval:arc_easy"])
    for split in ("official", "test", "lm-eval"):
        with pytest.raises(InputError, match=f"suite short: expected development prompts; found the split {split}"):
            check_development([small_suite(), small_suite().model_copy(update={"split": split})])
    assert not (tmp_path / "out").exists(), "it is refused before anything is measured"


def test_a_pipeline_for_the_test_split_is_tuned_on_the_develop_split(
    tmp_path: Path, base: Model, expert: Model, second_expert: Model
) -> None:
    evaluate_plan = {"suites": ["arithmetic"], "split": "test", "dtype": "float32", "batch": 4, "tiers": ["seen"]}
    gate = {"model": "conflict", "rules": [{"metric": "arithmetic", "at_least": 0.0}]}
    path = write_pipeline(tmp_path, base, {"a": expert, "b": second_expert}, evaluate=evaluate_plan, gate=gate)
    found = tune(path, tmp_path / "out", TuneSettings(trials=1, limit=4))
    assert found.suites["arithmetic"].split == "develop"
    asked = load_suite("arithmetic", "develop", 4, tiers=["seen"])
    assert found.suites["arithmetic"].digest == asked.digest
    assert not {p.prompt for p in asked.prompts} & {p.prompt for p in load_suite("arithmetic", "test").prompts}


# --------------------------------------------------------------------------------------------------------------- examining
def small_suite(name: str = "short", n: int = 12, text: str = "e") -> Suite:
    prompts = tuple(
        SuitePrompt.model_validate(
            {
                "id": w,
                "prompt": f"Say {w}.",
                "verifier": {"name": "contains", "arguments": {"text": text}},
                "group": "even" if i % 2 else "odd",
            }
        )
        for i, w in enumerate(WORDS[:n])
    )
    return Suite(name=name, split="develop", answer_tokens=5, prompts=prompts)


def examiner(
    base: Model, experts: dict[str, Model], out: Path, suites: list[Suite], chunk: int, gate: Gate | None = None
) -> Examiner:
    settings = EvaluateSettings(dtype="float32", batch=24, exact=True)
    gate = gate or Gate(model="m", rules=(Rule(metric="short", at_least=0.0),))
    return Examiner(base, experts, suites, gate, settings, out, like={}, chunk=chunk)


def test_chunks_are_fair_parts(base: Model, expert: Model, tmp_path: Path) -> None:
    one = examiner(base, {"e": expert}, tmp_path, [small_suite(), small_suite("other", 5)], 4)
    assert len(one.chunks) == 3
    places = [place for parts in one.chunks for part in parts for place in part.places]
    assert sorted(places) == list(range(17))
    for parts in one.chunks:
        assert [part.suite.name for part in parts] == ["short", "other"]
        groups = [prompt.group for prompt in parts[0].suite.prompts]
        assert groups.count("even") == groups.count("odd") == 2
    assert sorted(dealt(small_suite())) == list(range(12))


def test_an_examination_is_the_evaluation_of_the_written_merge(base: Model, tmp_path: Path) -> None:
    """In float32 and exactly, where answers do not depend on the chunks: the metrics that `evaluate` gives the checkpoint."""
    with quiet():
        lively(load_model(base.path)).save_pretrained(tmp_path / "talker")
        load_tokenizer(base.path).save_pretrained(tmp_path / "talker")
    talker = resolve(str(tmp_path / "talker"))
    noisy = {name: tiny_expert(talker.path, tmp_path / name, seed, 0.05) for seed, name in enumerate("ab", 1)}
    experts = {name: resolve(str(path)) for name, path in noisy.items()}
    file = written(tmp_path, talker, experts, random_masks(talker, experts), 0.6, out_dtype="float32")
    merge(file, tmp_path / "merged")
    suite = small_suite(text="0")
    models = {"base": talker, **experts, "m": resolve(str(tmp_path / "merged"))}
    plain = evaluate(models, [suite], tmp_path / "plain" / "evaluation.json", EvaluateSettings(dtype="float32", exact=True))
    one = examiner(talker, experts, tmp_path / "examined", [suite], 4)
    found = one.examine("m", *read_recipe(file))
    assert found.judged is not None
    assert found.judged.metrics["short"] == plain.metric("m", "short").value
    outcomes = plain.column("m", "short").values
    assert [found.passed[i] for i in range(12)] == [bool(value) for value in outcomes]
    for name in ("base", "a", "b"):
        assert one.reference(name).metrics["short"] == plain.metric(name, "short").value
    assert 0 < sum(found.passed.values()) < 12, "all or none would be the same in any order"
    assert len({tuple(plain.column(name, "short").values) for name in models}) == 4, "no two models pass the same prompts"


def test_a_merge_is_given_up_between_chunks(base: Model, expert: Model, tmp_path: Path) -> None:
    file = written(tmp_path, base, {"e": expert})
    one = examiner(base, {"e": expert}, tmp_path / "out", [small_suite()], 4)
    seen: list[int] = []

    def stop(passed: Any) -> bool:
        seen.append(len(passed))
        return len(passed) >= 8

    found = one.examine("m", *read_recipe(file), stop)
    assert seen == [4, 8]
    assert (len(found.passed), found.judged) == (8, None)


def test_quality_takes_off_what_the_gate_misses(base: Model, expert: Model, tmp_path: Path) -> None:
    gate = Gate(model="m", rules=(Rule(metric="short", at_least=1.0),))
    one = examiner(base, {"e": expert}, tmp_path / "out", [small_suite()], 12, gate)
    found = one.examine("m", *read_recipe(written(tmp_path, base, {"e": expert}))).judged
    assert found is not None
    assert found.quality == pytest.approx(found.mean - (1.0 - found.metrics["short"]))
    assert found.order[0] == (found.metrics["short"] < 1.0)


# ------------------------------------------------------------------------------------------------------------- the search
@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, base: Model, expert: Model, second_expert: Model) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    return write_pipeline(folder, base, {"a": expert, "b": second_expert})


SETTINGS = TuneSettings(trials=9, limit=6, chunk=3, patience=20)


@pytest.fixture(scope="module")
def tuned(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tuning]:
    out = tmp_path_factory.mktemp("tuned") / "out"
    return out, tune(pipeline, out, SETTINGS)


def test_every_trial_is_reported(tuned: tuple[Path, Tuning]) -> None:
    out, found = tuned
    assert read_document(Tuning, out / "tune.json") == found
    assert [trial.number for trial in found.trials] == list(range(9))
    assert [trial.source for trial in found.trials] == ["untuned", *["predicted"] * 5, *["tpe"] * 3]
    assert found.trials[0].parameters == {
        "agreement": True,
        "certainty": 0.0,
        "weight.soft": 1.0,
        "strength.a": 1.0,
        "strength.b": 1.0,
    }
    assert found.best == best_of(found.trials)
    for trial in found.trials:
        assert trial.state == "given up" or (trial.prompts == 6 and trial.metrics and trial.gate)
        for one in found.space:
            value = trial.parameters[one.name]
            assert value in one.choices if one.choices else one.low <= value <= one.high
    assert list(found.references) == ["base", "a", "b"]
    assert not list(out.glob("merged")), "nothing is written but the best recipe"


def test_the_best_recipe_is_written_and_runs_as_an_entry_of_the_pipeline(tuned: tuple[Path, Tuning]) -> None:
    out, found = tuned
    recipe, masks = read_recipe(out / "recipe.yaml")
    plan = RecipePlan(policy=found.policy, parameters=found.fixed | found.chosen.parameters)  # type: ignore[arg-type]
    again = compile_recipe(plan.policy, read_sources([out / "effects.safetensors"]), parameters=plan.parameters)
    assert again.recipe.experts == recipe.experts
    assert {n: m.tobytes() for n, m in again.masks.items()} == {n: m.tobytes() for n, m in masks.items()}


def test_predictions_order_the_first_trials(tuned: tuple[Path, Tuning]) -> None:
    """The plain twin: base loss minus Σ coefficient × effect, as a share of each behaviour's own gain."""
    out, found = tuned
    told = [trial.predicted for trial in found.trials if trial.source == "predicted"]
    assert told == sorted(told, reverse=True)
    effects = read_effects(out / "effects.safetensors")
    for trial in found.trials[:6]:
        compiled = compile_recipe("conflict", read_sources([out / "effects.safetensors"]), parameters=trial.parameters)
        shares = []
        for b, behavior in enumerate(effects.metadata.behaviors):
            gain = 0.0
            for key, values in effects.arrays.items():
                kind, _, measure = key.rpartition(".")
                if measure == "effect":
                    for e, name in enumerate(effects.metadata.experts):
                        c = compiled.masks.get(f"{name}.{kind}", compiled.recipe.experts[name].default)
                        gain += float((values[b, e].astype(np.float64) * c).sum())
            if behavior.own_gain > 0:
                shares.append(min(gain / behavior.own_gain, 1.0))
        assert shares, "an expert that gains on its behaviour, or there is nothing to predict"
        assert trial.predicted == pytest.approx(np.mean(shares), abs=1e-5)
        assert kept_gain(effects, compiled) == trial.predicted


def test_a_second_call_asks_nothing_and_more_trials_go_on(tuned: tuple[Path, Tuning], pipeline: Path) -> None:
    out, found = tuned
    before = (out / "tune.json").read_bytes()
    recorder = Recorder()
    assert tune(pipeline, out, SETTINGS, progress=recorder) == found
    assert (out / "tune.json").read_bytes() == before
    assert not any(label.startswith("trial-") for label, _ in recorder.started)
    more = tune(pipeline, out, SETTINGS.model_copy(update={"trials": 11}))
    assert more.trials[:9] == found.trials
    assert len(more.trials) == 11
    assert tune(pipeline, out, SETTINGS) == found


SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
from mechmerge.pipeline.tune import tune
from mechmerge.pipeline.tuning import TuneSettings
from mechmerge.progress import NullProgress

class Struck(NullProgress):
    def note(self, text):
        if text.startswith(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
settings = TuneSettings(trials=9, limit=6, chunk=3, patience=20)
tune(Path(sys.argv[1]), Path(sys.argv[2]), settings, progress=Struck())
"""


def test_a_killed_search_ends_in_the_same_bytes(tuned: tuple[Path, Tuning], pipeline: Path, tmp_path: Path) -> None:
    out, _ = tuned
    for number, upto in enumerate(("trial 0 ", "trial 5 ", "never")):
        command = [sys.executable, "-c", SCRIPT, str(pipeline), str(tmp_path / "out"), upto]
        ended = subprocess.run(command, check=False, env={**os.environ, "PYTHONHASHSEED": str(number)}).returncode
        assert ended == (0 if upto == "never" else -signal.SIGKILL)
        assert (tmp_path / "out" / "tune.json").exists() == (upto == "never")
    for name in ("tune.json", "recipe.yaml", "masks.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (out / name).read_bytes(), name


def test_patience_and_target_end_a_search(pipeline: Path, tuned: tuple[Path, Tuning]) -> None:
    out, found = tuned
    impatient = tune(pipeline, out, SETTINGS.model_copy(update={"patience": 2}))
    assert impatient.trials == found.trials[: len(impatient.trials)]
    assert len(impatient.trials) < 9, "trials are left when it ends"
    assert impatient.stopped == "patience"
    assert len(impatient.trials) - 1 - impatient.best == 2
    easy = tune(pipeline, out, SETTINGS.model_copy(update={"target": found.trials[0].quality}))
    assert (easy.stopped, len(easy.trials)) == ("target", 1)
    assert tune(pipeline, out, SETTINGS) == found


def test_a_worse_trial_is_given_up(base: Model, tmp_path: Path) -> None:
    """A merge that fails all prompts against one that passes all: a Wilcoxon test on the first chunk is enough."""
    from mechmerge.pipeline.search import Search

    class Known(Examiner):
        """Answers by the strength alone: above 0.8 everything passes, below nothing does."""

        def __init__(self) -> None:
            self.base, self.suites, self.settings = base, (small_suite(),), EvaluateSettings()
            self.gate = Gate(model="m", rules=(Rule(metric="short", at_least=0.0),))
            self.asked: list[tuple[float, int]] = []

        def examine(self, name: str, recipe: Any, masks: Any, stop: Any = None) -> Any:
            from mechmerge.evaluate.gate import GateResult
            from mechmerge.pipeline.examining import Examined

            strength = recipe.experts["a"].default
            passed: dict[int, bool] = {}
            for start in range(0, 48, 12):
                if start and stop(passed):
                    self.asked.append((strength, start))
                    return Examined(passed, None)
                passed |= dict.fromkeys(range(start, start + 12), strength > 0.8)
            self.asked.append((strength, 48))
            return Examined(passed, Judged(GateResult(passed=True, rules=()), {"short": float(strength > 0.8)}))

    from mechmerge.recipe.sources import Sources

    sources = Sources(base.id, {"a": base.id})
    plan, space = RecipePlan(policy="task-arithmetic"), [Open(name="strength.a", low=0.25, high=1.25)]
    settings = TuneSettings(trials=12, patience=12)
    known = Known()
    trials, stopped = Search(plan, space, sources, {}, known, settings, tmp_path / "a").run()
    assert stopped == "trials"
    assert known.asked[0] == (1.0, 48), "the policy as it is comes first"
    for trial, (strength, asked) in zip(trials, known.asked, strict=True):
        assert (trial.state, trial.prompts) == (("complete", 48) if strength > 0.8 else ("given up", 12))
        assert trial.quality == (1.0 if strength > 0.8 else 0.0), "the estimate is the best less the difference in pass rates"
        assert trial.prompts == asked
    assert any(trial.state == "given up" for trial in trials)
    patient = Known()
    whole, _ = Search(plan, space, sources, {}, patient, settings.model_copy(update={"prune": False}), tmp_path / "b").run()
    assert {asked for _, asked in patient.asked} == {48}
    assert len(whole) == 12


def test_what_the_policy_refuses_is_said(pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"weight\.soft: expected a positive number; found -1"):
        tune(pipeline, tmp_path / "out", TuneSettings(trials=7, limit=4), opened=["weight.soft=-1:0.01"])
    told = yaml.safe_load(pipeline.read_text())
    told["recipes"]["drawn"] = {"policy": "della"}
    drawn = pipeline.with_name("drawn.yaml")
    drawn.write_text(yaml.safe_dump(told, sort_keys=False))
    # Either end of each is right beside the other's default, both together are not.
    found = tune(drawn, tmp_path / "drawn", TuneSettings(trials=7, limit=4), recipe="drawn",
                 opened=["density=0.2:0.8", "epsilon=0.05:0.4"])  # fmt: skip
    refused = [trial for trial in found.trials if trial.state == "refused"]
    assert refused
    assert all("density ± epsilon" in str(trial.problem) and trial.prompts == 0 for trial in refused)
    with pytest.raises(InputError, match="one of"):
        tune(pipeline, tmp_path / "out", recipe="nothing")
    with pytest.raises(InputError, match="the control random"):
        tune(pipeline, tmp_path / "out", recipe="random")
    told = yaml.safe_load(pipeline.read_text())
    told["recipes"]["inside"] = {"policy": "ties", "within": "conflict"}
    inside = pipeline.with_name("inside.yaml")
    inside.write_text(yaml.safe_dump(told, sort_keys=False))
    with pytest.raises(InputError, match="found ties within conflict"):
        tune(inside, tmp_path / "out", recipe="inside")


@pytest.mark.parametrize("policy", ["conflict", *BASELINES])
def test_what_needs_effects_alone_or_nothing_measures_nothing_else(policy: Any, tmp_path: Path) -> None:
    class Known:
        """Stages that say what was asked of them."""

        run, asked = tmp_path, list[str]()

        def __getattr__(self, name: str) -> Any:
            return lambda: self.asked.append(name)

    known: Any = Known()
    foreseen = policy in ("conflict", "task-arithmetic")  # what other baselines do no effects of components foresee
    assert measured(known, RecipePlan(policy=policy)) == ([tmp_path / "effects.safetensors"] if foreseen else [])
    assert known.asked == (["effects"] if foreseen else [])


def test_a_policy_of_scores_localizes_first(pipeline: Path, tmp_path: Path) -> None:
    found = tune(pipeline, tmp_path / "out", TuneSettings(trials=2, limit=4), recipe="top", opened=["budget"])
    assert (tmp_path / "out" / "scores" / "a" / "loud.safetensors").is_file()
    assert {one.name for one in found.space} == {"budget", "overlap", "strength.a", "strength.b"}
    assert found.trials[0].parameters["budget"] == 0.5, "what the recipe sets is where the search starts"
    assert found.trials[0].predicted is not None


# ------------------------------------------------------------------------------------------------------------------ CLI
def test_the_command(tuned: tuple[Path, Tuning], pipeline: Path) -> None:
    out, found = tuned
    options = [
        "tune",
        str(pipeline),
        "--out",
        str(out),
        "--trials",
        "9",
        "--limit",
        "6",
        "--chunk",
        "3",
        "--patience",
        "20",
        "--quiet",
    ]
    done = CliRunner().invoke(cli, [*options, "--format", "json"])
    assert done.exit_code == 0, done.output
    assert Tuning.model_validate(json.loads(done.stdout)) == found
    table = CliRunner().invoke(cli, options).stdout
    assert f"best: trial {found.best}, quality" in table
    assert "all trials were made" in table
    entry = yaml.safe_load(table[table.index("tuned:") :])
    assert entry["tuned"] == {"policy": "conflict", "parameters": found.chosen.parameters}


# ---------------------------------------------------------------------------------------------------------------- endings
def test_a_trial_that_cannot_be_asked_is_refused_and_the_search_goes_on(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits that are not finite are that merge's own affair; a parent that cannot be read is everybody's."""
    examine, faults = Examiner.examine, [InputError("merge", expected="finite logits", found="nan")]

    def faulty(self: Examiner, name: str, *given: Any, **options: Any) -> Any:
        if name == "trial-1":
            raise faults[0]
        return examine(self, name, *given, **options)

    monkeypatch.setattr(Examiner, "examine", faulty)
    found = tune(pipeline, tmp_path / "out", TuneSettings(trials=3, limit=4, patience=9))
    assert [trial.state == "refused" for trial in found.trials] == [False, True, False]
    assert found.trials[1].problem == "merge: expected finite logits; found nan"
    faults[0] = CheckpointError("parent", expected="finite weights", found="NaN")
    with pytest.raises(CheckpointError, match="parent"):
        tune(pipeline, tmp_path / "other", TuneSettings(trials=3, limit=4, patience=9))
