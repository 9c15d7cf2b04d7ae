"""A whole pipeline: makes the merges, evaluates, gates and reports them, each stage resumable.

RUN/run.yaml                               the resolved pipeline: digests, revisions, versions (local paths stay here)
RUN/scores/EXPERT/BEHAVIOR.safetensors     localization        RUN/scores/EXPERT/anchors/…
RUN/effects.safetensors                    the effect matrix
RUN/rounds.safetensors                     coefficients settled in rounds, where a recipe asks for them
RUN/solutions/NAME.safetensors             coefficients solved for and measured, for each recipe of the policy `solve`
RUN/recipes/NAME/recipe.yaml [masks]       recipes             RUN/merged/NAME   the models
RUN/evaluation.json  samples/              evaluation          RUN/gate.json     what the gate said
RUN/report.md  report.html  figures/       report              RUN/README.md     model card of the published recipe
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mechmerge.artifacts import lock, read_document, sha256_file, write_json, write_yaml
from mechmerge.evaluate.gate import GateResult, check_gate
from mechmerge.evaluate.record import EvaluateSettings, Evaluation
from mechmerge.evaluate.run import evaluate
from mechmerge.evaluate.suites import Suite, is_task, load_suite
from mechmerge.models.references import Model, resolve
from mechmerge.pipeline.schema import Pipeline
from mechmerge.pipeline.source import near, resolve_pipeline, templated
from mechmerge.pipeline.stages import Stages, ignore, run_record
from mechmerge.pipeline.state import RunState
from mechmerge.progress import SILENT, Progress


@dataclass(frozen=True)
class RunResult:
    """What a run ended with."""

    run: Path
    evaluation: Evaluation
    gate: GateResult
    worked: tuple[str, ...]
    """Stages that did work in this call; empty when everything was there."""


def run_pipeline(path: Path, run: Path, progress: Progress = SILENT, device: str = "cpu") -> RunResult:
    """Carries out a pipeline into the folder `run`; calling it again goes on where it stopped.

    Raises:
        InputError: the pipeline or a model is not what it must be, or another process works on `run`.
        MissingError: a model, package or the Hub is needed and not there.
    """
    source = resolve_pipeline(path, progress)
    suites = suites_of(source.pipeline, source.folder)
    run.mkdir(parents=True, exist_ok=True)
    with lock(run / ".lock", f"run {run}"):
        state = RunState(run, progress)
        write_yaml(run / "run.yaml", run_record(source))
        stages = Stages(source, run, state, progress, device)
        stages.make()
        models = {"base": source.base} | source.experts | merged_models(stages)
        evaluation = evaluated(stages, models, suites)
        gate = check_gate(
            evaluation,
            stages.plan.gate,
            stages.plan.gate.model or stages.plan.publish,
            weights={name: model.id for name, model in models.items()},
        )
        write_json(run / "gate.json", gate)
        _report(stages)
    return RunResult(run, evaluation, gate, tuple(state.worked))


def suites_of(pipeline: Pipeline, folder: Path) -> list[Suite]:
    """The suites of a pipeline, in its split, limit and chat template."""
    plan = pipeline.evaluate
    data = folder / plan.ifeval_data if plan.ifeval_data else None
    loaded = [
        load_suite(near(name, folder), plan.split, plan.limit, tiers=plan.tiers, data=data if name == "ifeval" else None)
        for name in plan.suites
        if not is_task(name)
    ]
    return [templated(suite, pipeline) for suite in loaded]


def merged_models(stages: Stages) -> dict[str, Model]:
    """The merges of a run that are made."""
    return {name: resolve(str(stages.merged(name))) for name in stages.plan.recipes}


def evaluated(stages: Stages, models: Mapping[str, Model], suites: list[Suite]) -> Evaluation:
    """The `evaluate` stage: every model against the base and the experts."""
    plan, out = stages.plan, stages.run / "evaluation.json"
    settings = EvaluateSettings(
        dtype=plan.evaluate.dtype,
        batch=plan.evaluate.batch,
        exact=plan.evaluate.exact,
        thinking=plan.evaluate.thinking,
        device=stages.device,
        seed=plan.seed,
    )
    tasks = [name for name in plan.evaluate.suites if is_task(name)]
    inputs = {
        "models": [[name, model.id.shards] for name, model in models.items()],
        "sides": [model.sides for model in models.values()],
        "suites": [suite.digest for suite in suites],
        "tasks": [tasks, plan.evaluate.limit],
        "settings": settings.model_dump(mode="json"),
        "versions": stages.record.versions | {"lm_eval": metadata.version("lm_eval")},
    }
    against = ["base", *(name for name in models if name in stages.experts)]
    stages.state.stage(
        "evaluate",
        inputs,
        [out, stages.run / "samples"],
        # A changed recipe keeps its name, and its old samples give way.
        lambda: ignore(
            evaluate(
                models,
                suites,
                out,
                settings,
                stages.progress,
                against=against,
                overwrite=True,
                tasks=tasks,
                limit=plan.evaluate.limit,
            )
        ),
    )
    return read_document(Evaluation, out)


def _report(stages: Stages) -> None:
    from mechmerge.publish.card import write_card
    from mechmerge.publish.licenses import license_of
    from mechmerge.report.files import find_run_files
    from mechmerge.report.html import write_page
    from mechmerge.report.summary import write_report

    run, plan = stages.run, stages.plan
    recipes = {name: stages.recipe(name) for name in plan.recipes}
    evaluation, rounds = run / "evaluation.json", run / "rounds.safetensors"
    known = [*stages.measurements(), *recipes.values(), evaluation]
    inputs = {
        "files": {str(path.relative_to(run)): sha256_file(path) for path in [*known, run / "gate.json"]},
        "texts": [plan.title, plan.notes, plan.publish, plan.license],
        "versions": stages.record.versions,
    }

    def work() -> None:
        shutil.rmtree(run / "figures", ignore_errors=True)
        write_report(
            stages.scores(),
            run / "effects.safetensors",
            recipes,
            evaluation,
            run,
            gate=run / "gate.json",
            rounds=rounds if rounds in known else None,
            title=plan.title,
            notes=plan.notes,
        )
        write_page(find_run_files(run), run, license_of)
        write_card(run, plan.publish)

    outputs = [run / "report.md", run / "report.html", run / "figures", run / "README.md"]
    stages.state.stage("report", inputs, outputs, work)
