"""The `run` stage of everything: resolves a pipeline's models and carries out its stages in order, each resumable.

    RUN/run.yaml                               the resolved pipeline: digests, revisions, versions (local paths stay here)
    RUN/scores/EXPERT/BEHAVIOR.safetensors     localization        RUN/scores/EXPERT/anchors/…
    RUN/effects.safetensors                    the effect matrix
    RUN/recipes/NAME/recipe.yaml [masks]       recipes             RUN/merged/NAME   the models
    RUN/evaluation.json  samples/              evaluation          RUN/gate.json     what the gate said
    RUN/report.md  figures/                    report              RUN/README.md     model card of the published recipe
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechmerge.artifacts import Document, lock, read_document, write_json, write_yaml
from mechmerge.behaviors.schema import Behavior, load_group
from mechmerge.errors import InputError
from mechmerge.models.references import Model, resolve
from mechmerge.pipeline.schema import Pipeline, RecipePlan
from mechmerge.pipeline.state import RunState
from mechmerge.progress import SILENT, Progress
from mechmerge.versions import versions


class RunRecord(Document):
    """`run.yaml`: the pipeline as it was resolved. It names local paths and is never uploaded."""

    pipeline: Pipeline
    base: Model
    experts: dict[str, Model]
    behaviors: dict[str, dict[str, str]]
    """Digest of every behaviour file, by behaviour (or group) and member."""
    versions: dict[str, str]


@dataclass(frozen=True)
class RunResult:
    """What a run ended with."""

    run: Path
    gate_passed: bool
    worked: tuple[str, ...]
    """Stages that did work in this call; empty when everything was there."""


def load_pipeline(path: Path) -> Pipeline:
    """Reads a pipeline file and checks everything that can be checked without a model: schema, behaviours, suites.

    Raises:
        SchemaError, InputError: naming file, place, expected and found.
    """
    from mechmerge.evaluate.suites import load_suite

    pipeline = read_document(Pipeline, path)
    _behaviors(pipeline, path.parent)
    for suite in pipeline.evaluate.suites:
        load_suite(_near(suite, path.parent))
    return pipeline


def _near(name: str, folder: Path) -> str:
    """A file named relative to the pipeline's folder, or the name of something built in."""
    return str(folder / name) if (folder / name).is_file() else name


def _behaviors(pipeline: Pipeline, folder: Path) -> dict[str, tuple[Behavior, ...]]:
    return {name: load_group(_near(plan.file or name, folder)) for name, plan in pipeline.behaviors.items()}


def _pinned(reference: str, revision: str | None, folder: Path) -> str:
    """A Hub reference with the pipeline's revision added where it names none."""
    first, plus, rest = reference.partition("+")
    is_hub = "/" in first and "@" not in first and not first.startswith((".", "/", "demo:")) and not (folder / first).exists()
    return f"{first}@{revision}{plus}{rest}" if revision and is_hub else reference


def run_pipeline(path: Path, run: Path, progress: Progress = SILENT) -> RunResult:
    """Carries out a pipeline into the folder `run`; calling it again goes on where it stopped.

    Raises:
        InputError: the pipeline or a model is not what it must be, or another process works on `run`.
        MissingError: a model, package or the Hub is needed and not there.
    """
    pipeline, folder = load_pipeline(path), path.parent
    run.mkdir(parents=True, exist_ok=True)
    with lock(run / ".lock", f"run {run}"):
        base = resolve(_pinned(pipeline.base, pipeline.revision, folder), relative_to=folder, progress=progress)
        experts = {
            name: resolve(_pinned(reference, pipeline.revision, folder), relative_to=folder, progress=progress)
            for name, reference in pipeline.experts.items()
        }
        behaviors = _behaviors(pipeline, folder)
        record = RunRecord(
            pipeline=pipeline,
            base=base,
            experts=experts,
            behaviors={name: {b.name: b.digest for b in members} for name, members in behaviors.items()},
            versions=versions(),
        )
        state = RunState(run, progress)
        write_yaml(run / "run.yaml", record)
        passed = _Run(record, behaviors, folder, run, state, progress).all()
    return RunResult(run, passed, tuple(state.worked))


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
    ) -> None:
        self.record, self.plan, self.behaviors = record, record.pipeline, behaviors
        self.folder, self.run, self.state, self.progress = folder, run, state, progress
        self.base, self.experts = record.base, record.experts
        self.common: dict[str, Any] = {
            "base": self.base.id.shards,
            "experts": {name: model.id.shards for name, model in self.experts.items()},
            "rules": [self.plan.vocabulary, self.plan.positions],
            "seed": self.plan.seed,
            "versions": record.versions,
        }

    def all(self) -> bool:
        self._localize()
        self._effects()
        self._recipes()
        self._merge()
        evaluation = self._evaluate()
        passed = self._gate(evaluation)
        self._report()
        return passed

    # ----------------------------------------------------------------------------------------------------------- measuring
    def _localize(self) -> None:
        from mechmerge.localize.stage import LocalizeSettings, localize

        settings = LocalizeSettings(
            **self.plan.localize.model_dump(),
            seed=self.plan.seed,
            vocabulary=self.plan.vocabulary,
            positions=self.plan.positions,
        )
        for name, expert in self.experts.items():
            members = [b for key, group in self.behaviors.items() if self.plan.behaviors[key].expert == name for b in group]
            out = self.run / "scores" / name
            inputs = {
                "base": self.base.id.shards,
                "expert": expert.id.shards,
                "behaviors": [b.digest for b in members],
                "settings": settings.model_dump(mode="json"),
                "versions": self.record.versions,
            }
            self.state.stage(
                f"localize-{name}",
                inputs,
                [out / f"{b.name}.safetensors" for b in members],
                lambda expert=expert, members=members, out=out: localize(  # type: ignore[misc]
                    self.base, expert, members, out, settings, self.progress
                ),
            )

    def _effects(self) -> None:
        from mechmerge.localize.effects import BehaviorRow, EffectSettings, measure_effects

        settings = EffectSettings(
            **self.plan.effects.model_dump(),
            seed=self.plan.seed,
            vocabulary=self.plan.vocabulary,
            positions=self.plan.positions,
        )
        rows = [
            BehaviorRow(name, members, self.plan.behaviors[name].expert, self.plan.behaviors[name].weight)
            for name, members in self.behaviors.items()
        ]
        out = self.run / "effects.safetensors"
        inputs = self.common | {
            "rows": [[row.name, row.expert, row.weight, [b.digest for b in row.members]] for row in rows],
            "settings": settings.model_dump(mode="json"),
        }
        self.state.stage(
            "effects", inputs, [out], lambda: _ignore(measure_effects(self.base, self.experts, rows, out, settings, self.progress))
        )

    # ------------------------------------------------------------------------------------------------------------- merging
    def _scores(self) -> list[Path]:
        return sorted((self.run / "scores").glob("*/*.safetensors"))

    def _recipe(self, name: str) -> Path:
        return self.run / "recipes" / name / "recipe.yaml"

    def _recipes(self) -> None:
        from mechmerge.artifacts import sha256_file

        measured = {str(p.relative_to(self.run)): sha256_file(p) for p in [*self._scores(), self.run / "effects.safetensors"]}
        for name, plan in self.plan.recipes.items():
            like = self._recipe(plan.like) if plan.like else None
            inputs = {
                "plan": plan.model_dump(mode="json"),
                "measured": measured,
                "like": sha256_file(like) if like else None,
                "rules": self.common["rules"],
            }
            folder = self._recipe(name).parent
            self.state.stage(f"recipe-{name}", inputs, [folder], lambda name=name, plan=plan: self._compile(name, plan))  # type: ignore[misc]

    def _compile(self, name: str, plan: RecipePlan) -> None:
        raise NotImplementedError

    def _merge(self) -> None:
        raise NotImplementedError

    # ---------------------------------------------------------------------------------------------------------- evaluating
    def _evaluate(self) -> Any:
        raise NotImplementedError

    def _gate(self, evaluation: Any) -> bool:
        raise NotImplementedError

    def _report(self) -> None:
        raise NotImplementedError


def _ignore(_: Any) -> None:
    """Drops a result where only the file written matters."""


__all__ = ["Callable", "InputError", "shutil", "write_json"]
