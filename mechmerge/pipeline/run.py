"""The `run` stage of everything: resolves a pipeline's models and carries out its stages in order, each resumable.

RUN/run.yaml                               the resolved pipeline: digests, revisions, versions (local paths stay here)
RUN/scores/EXPERT/BEHAVIOR.safetensors     localization        RUN/scores/EXPERT/anchors/…
RUN/effects.safetensors                    the effect matrix
RUN/rounds.safetensors                     coefficients settled in rounds, where a recipe asks for them
RUN/recipes/NAME/recipe.yaml [masks]       recipes             RUN/merged/NAME   the models
RUN/evaluation.json  samples/              evaluation          RUN/gate.json     what the gate said
RUN/report.md  figures/                    report              RUN/README.md     model card of the published recipe
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from mechmerge.artifacts import Document, lock, read_document, sha256_file, write_json, write_yaml
from mechmerge.behaviors.schema import Behavior, load_group
from mechmerge.evaluate.gate import GateResult, check_gate
from mechmerge.evaluate.record import EvaluateSettings, Evaluation
from mechmerge.evaluate.run import evaluate
from mechmerge.evaluate.suites import load_suite
from mechmerge.localize.calibration import BehaviorRow, CalibrationSettings
from mechmerge.localize.effects import EffectSettings, measure_effects
from mechmerge.localize.rounds import RoundSettings, settle
from mechmerge.localize.stage import LocalizeSettings, localize
from mechmerge.models.pair import align, check_pair
from mechmerge.models.references import Model, ModelId, check_reference, is_local, is_unpinned_hub, resolve
from mechmerge.pipeline.schema import Pipeline, RecipePlan
from mechmerge.pipeline.state import RunState
from mechmerge.progress import SILENT, Progress
from mechmerge.publish.licenses import license_of_merge
from mechmerge.recipe.compile import compile_recipe
from mechmerge.recipe.schema import read_recipe, write_recipe
from mechmerge.recipe.sources import read_sources
from mechmerge.versions import versions


class RunRecord(Document):
    """`run.yaml`: the pipeline as it was resolved. It names local paths and is never uploaded."""

    pipeline: Pipeline
    base: Model
    experts: dict[str, Model]
    behaviors: dict[str, dict[str, str]]
    """Digest of every behaviour file, by behaviour (or group) and member."""
    versions: dict[str, str]


D = TypeVar("D", bound=Document)


@dataclass(frozen=True)
class RunResult:
    """What a run ended with."""

    run: Path
    evaluation: Evaluation
    gate: GateResult
    worked: tuple[str, ...]
    """Stages that did work in this call; empty when everything was there."""


def load_pipeline(path: Path) -> Pipeline:
    """Reads a pipeline file and checks everything that can be checked without a model: schema, behaviours, suites.

    Raises:
        SchemaError, InputError: naming file, place, expected and found.
    """
    pipeline = read_document(Pipeline, path)
    _behaviors(pipeline, path.parent)
    for suite in pipeline.evaluate.suites:
        load_suite(_near(suite, path.parent))
    return pipeline


def check_pipeline(path: Path) -> Pipeline:
    """Checks a pipeline file without fetching or reading any model: the schema, behaviours, suites and the form of references.

    Raises:
        SchemaError, InputError: naming file, place, expected and found.
    """
    pipeline = load_pipeline(path)
    for reference in (pipeline.base, *pipeline.experts.values()):
        check_reference(_pinned(reference, pipeline.revision, path.parent), relative_to=path.parent)
    return pipeline


def _near(name: str, folder: Path) -> str:
    """A file named relative to the pipeline's folder, or the name of something built in."""
    return str(folder / name) if (folder / name).is_file() else name


def _behaviors(pipeline: Pipeline, folder: Path) -> dict[str, tuple[Behavior, ...]]:
    groups = {name: load_group(_near(plan.file or name, folder)) for name, plan in pipeline.behaviors.items()}
    return {name: tuple(_templated(member, pipeline) for member in members) for name, members in groups.items()}


def _templated(document: D, pipeline: Pipeline) -> D:
    """A behaviour or suite with the pipeline's chat template in the place of `model`."""
    if pipeline.chat_template is None or getattr(document, "chat_template", None) != "model":
        return document
    return document.model_copy(update={"chat_template": pipeline.chat_template})


def _pinned(reference: str, revision: str | None, folder: Path) -> str:
    """A Hub reference with the pipeline's revision added where it names none."""
    if revision is None:
        return reference
    parts = (f"{part}@{revision}" if is_unpinned_hub(part, folder) else part for part in reference.split("+"))
    return reference if is_local(reference, folder) else "+".join(parts)


def run_pipeline(path: Path, run: Path, progress: Progress = SILENT, device: str = "cpu") -> RunResult:
    """Carries out a pipeline into the folder `run`; calling it again goes on where it stopped.

    Raises:
        InputError: the pipeline or a model is not what it must be, or another process works on `run`.
        MissingError: a model, package or the Hub is needed and not there.
    """
    pipeline, folder = load_pipeline(path), path.parent
    base = resolve(_pinned(pipeline.base, pipeline.revision, folder), relative_to=folder, progress=progress)
    experts = {
        name: resolve(_pinned(reference, pipeline.revision, folder), relative_to=folder, progress=progress)
        for name, reference in pipeline.experts.items()
    }
    behaviors = _behaviors(pipeline, folder)
    # What would stop the run in a late stage stops it here, before anything is written. Whether weights are finite is left
    # to the stages, which read them anyway.
    license_of_merge([base.id, *(model.id for model in experts.values())], pipeline.license)
    for expert in experts.values():
        aligned = align(base, expert, pipeline.vocabulary)
        check_pair(base.checkpoint(), aligned.checkpoint(), positions=pipeline.positions, finite=False)
    run.mkdir(parents=True, exist_ok=True)
    with lock(run / ".lock", f"run {run}"):
        record = RunRecord(
            pipeline=pipeline,
            base=base,
            experts=experts,
            behaviors={name: {b.name: b.digest for b in members} for name, members in behaviors.items()},
            versions=versions(),
        )
        state = RunState(run, progress)
        write_yaml(run / "run.yaml", record)
        evaluation, gate = _Run(record, behaviors, folder, run, state, progress, device).all()
    return RunResult(run, evaluation, gate, tuple(state.worked))


class _Run:
    """One call of `run_pipeline`, after everything is resolved."""

    def __init__(
        self,
        record: RunRecord,
        behaviors: dict[str, tuple[Behavior, ...]],
        folder: Path,
        run: Path,
        state: RunState,
        progress: Progress,
        device: str,
    ) -> None:
        self.device = device
        self.record, self.plan, self.behaviors = record, record.pipeline, behaviors
        self.folder, self.run, self.state, self.progress = folder, run, state, progress
        self.base, self.experts = record.base, record.experts
        self.common: dict[str, Any] = {
            "base": self.base.id.shards,
            "experts": [[name, model.id.shards] for name, model in self.experts.items()],
            "rules": [self.plan.vocabulary, self.plan.positions],
            "seed": self.plan.seed,
            "sides": [self.base.sides, *(model.sides for model in self.experts.values())],
            "versions": record.versions,
        }

    def all(self) -> tuple[Evaluation, GateResult]:
        self._localize()
        self._effects()
        self._rounds()
        self._recipes()
        self._merge()
        evaluation = self._evaluate()
        gate = self._gate(evaluation)
        self._report()
        return evaluation, gate

    # ----------------------------------------------------------------------------------------------------------- measuring
    def _localize(self) -> None:
        settings = LocalizeSettings(
            **self.plan.localize.model_dump(),
            device=self.device,
            seed=self.plan.seed,
            vocabulary=self.plan.vocabulary,
            positions=self.plan.positions,
        )
        for name, expert in self.experts.items():
            members = [b for key, group in self.behaviors.items() if self.plan.behaviors[key].expert == name for b in group]
            if not members:
                continue  # an expert that answers for no behaviour still takes part in effects and merges
            out = self.run / "scores" / name
            inputs = {
                "base": self.base.id.shards,
                "sides": self.common["sides"],
                "expert": expert.id.shards,
                "behaviors": [b.digest for b in members],
                "settings": settings.model_dump(mode="json"),
                "versions": self.record.versions,
            }
            self.state.stage(
                f"localize-{name}",
                inputs,
                [out / f"{b.name}.safetensors" for b in members],
                partial(self._localize_one, expert, members, out, settings),
            )

    def _localize_one(self, expert: Model, members: list[Behavior], out: Path, settings: LocalizeSettings) -> None:
        localize(self.base, expert, members, out, settings, self.progress)

    def _effects(self) -> None:
        settings = EffectSettings(
            **self.plan.effects.model_dump(),
            device=self.device,
            seed=self.plan.seed,
            vocabulary=self.plan.vocabulary,
            positions=self.plan.positions,
        )
        rows, out = self._rows(), self.run / "effects.safetensors"
        inputs = self._measured_on(rows, settings)
        self.state.stage(
            "effects",
            inputs,
            [out],
            lambda: _ignore(measure_effects(self.base, self.experts, rows, out, settings, self.progress)),
        )

    def _rounds(self) -> None:
        if not any(plan.policy == "rounds" for plan in self.plan.recipes.values()):
            return
        settings = RoundSettings(
            **self.plan.rounds.model_dump(),
            device=self.device,
            seed=self.plan.seed,
            vocabulary=self.plan.vocabulary,
            positions=self.plan.positions,
        )
        rows, out = self._rows(), self.run / "rounds.safetensors"
        inputs = self._measured_on(rows, settings)
        self.state.stage(
            "rounds", inputs, [out], lambda: _ignore(settle(self.base, self.experts, rows, out, settings, self.progress))
        )

    def _rows(self) -> list[BehaviorRow]:
        plans = self.plan.behaviors
        return [BehaviorRow(name, group, plans[name].expert, plans[name].weight) for name, group in self.behaviors.items()]

    def _measured_on(self, rows: list[BehaviorRow], settings: CalibrationSettings) -> dict[str, Any]:
        return self.common | {
            "rows": [[row.name, row.expert, row.weight, [b.digest for b in row.members]] for row in rows],
            "settings": settings.model_dump(mode="json"),
        }

    # ------------------------------------------------------------------------------------------------------------- merging
    def _measurements(self) -> list[Path]:
        """The files that this very pipeline measures: what an earlier one left in the run directory is not among them."""
        rounds = any(plan.policy == "rounds" for plan in self.plan.recipes.values())
        settled = [self.run / "rounds.safetensors"] if rounds else []
        return [*self._scores(), self.run / "effects.safetensors", *settled]

    def _scores(self) -> list[Path]:
        plans = self.plan.behaviors
        owned = [(plans[name].expert, member.name) for name, group in self.behaviors.items() for member in group]
        return sorted(self.run / "scores" / expert / f"{member}.safetensors" for expert, member in owned)

    def _recipe(self, name: str) -> Path:
        return self.run / "recipes" / name / "recipe.yaml"

    def _recipes(self) -> None:
        measured = {str(p.relative_to(self.run)): sha256_file(p) for p in self._measurements()}
        for name, plan in self.plan.recipes.items():
            like = self._recipe(plan.like) if plan.like else None
            inputs = {
                "plan": plan.model_dump(mode="json"),
                "measured": measured,
                "like": sha256_file(like) if like else None,
                "rules": self.common["rules"],
                "out_dtype": self.plan.out_dtype,
            }
            folder = self._recipe(name).parent
            self.state.stage(f"recipe-{name}", inputs, [folder], partial(self._compile, name, plan))

    def _compile(self, name: str, plan: RecipePlan) -> None:
        sources = read_sources(self._measurements(), self._expert_ids())
        compiled = compile_recipe(
            plan.policy,
            sources,
            parameters=plan.parameters,
            seed=plan.seed,
            like=read_recipe(self._recipe(plan.like)) if plan.like else None,
            out_dtype=self.plan.out_dtype,
            vocabulary=self.plan.vocabulary,
            positions=self.plan.positions,
        )
        for note in compiled.notes:
            self.progress.note(f"note: recipe {name}: {note}")
        write_recipe(self._recipe(name), compiled.recipe, compiled.masks)

    def _expert_ids(self) -> dict[str, ModelId]:
        return {name: model.id for name, model in self.experts.items()}

    def _merged(self, name: str) -> Path:
        return self.run / "merged" / name

    def _merge(self) -> None:
        from mechmerge.merge.engine import merge

        paths = {"base": self.base.path} | {name: model.path for name, model in self.experts.items()}
        for name in self.plan.recipes:
            recipe, out = self._recipe(name), self._merged(name)
            inputs = {
                "recipe": sha256_file(recipe),
                "sides": self.common["sides"],
                "versions": self.record.versions | {"mergekit": metadata.version("mergekit")},
            }

            def work(recipe: Path = recipe, out: Path = out) -> None:
                shutil.rmtree(out, ignore_errors=True)
                merge(recipe, out, paths, self.progress)

            self.state.stage(f"merge-{name}", inputs, [out], work)

    # ---------------------------------------------------------------------------------------------------------- evaluating
    def _evaluate(self) -> Evaluation:
        plan, out = self.plan.evaluate, self.run / "evaluation.json"
        suites = [_templated(load_suite(_near(suite, self.folder), limit=plan.limit), self.plan) for suite in plan.suites]
        models = {"base": self.base} | self.experts | {name: resolve(str(self._merged(name))) for name in self.plan.recipes}
        settings = EvaluateSettings(dtype=plan.dtype, batch=plan.batch, device=self.device, seed=self.plan.seed)
        inputs = {
            "models": [[name, model.id.shards] for name, model in models.items()],
            "sides": [model.sides for model in models.values()],
            "suites": [suite.digest for suite in suites],
            "settings": settings.model_dump(mode="json"),
            "versions": self.record.versions | {"lm_eval": metadata.version("lm_eval")},
        }
        against = ["base", *self.experts]
        self.state.stage(
            "evaluate",
            inputs,
            [out, self.run / "samples"],
            lambda: _ignore(evaluate(models, suites, out, settings, self.progress, against=against)),
        )
        return read_document(Evaluation, out)

    def _gate(self, evaluation: Evaluation) -> GateResult:
        result = check_gate(evaluation, self.plan.gate, self.plan.gate.model or self.plan.publish)
        write_json(self.run / "gate.json", result)
        return result

    def _report(self) -> None:
        from mechmerge.publish.card import write_card
        from mechmerge.report.summary import write_report

        recipes = {name: self._recipe(name) for name in self.plan.recipes}
        evaluation, rounds = self.run / "evaluation.json", self.run / "rounds.safetensors"
        known = [*self._measurements(), *recipes.values(), evaluation]
        inputs = {
            "files": {str(path.relative_to(self.run)): sha256_file(path) for path in [*known, self.run / "gate.json"]},
            "texts": [self.plan.title, self.plan.notes, self.plan.publish, self.plan.license],
            "versions": self.record.versions,
        }

        def work() -> None:
            shutil.rmtree(self.run / "figures", ignore_errors=True)
            write_report(
                self._scores(),
                self.run / "effects.safetensors",
                recipes,
                evaluation,
                self.run,
                gate=self.run / "gate.json",
                rounds=rounds if rounds in known else None,
                title=self.plan.title,
                notes=self.plan.notes,
            )
            write_card(self.run, self.plan.publish)

        self.state.stage("report", inputs, [self.run / "report.md", self.run / "figures", self.run / "README.md"], work)


def _ignore(_: object) -> None:
    """Drops a result where only the file written matters."""
