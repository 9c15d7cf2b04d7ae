"""The stages that make merges: localization, effects, rounds, recipes and merges, each keyed by what it depends on.

A stage's key holds nothing that its outputs do not depend on, so that a sweep can hand one run's files to another.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from mechmerge.artifacts import Document, parse_document, sha256_file
from mechmerge.behaviors.schema import Behavior
from mechmerge.localize.calibration import BASE, BehaviorRow, CalibrationSettings
from mechmerge.localize.effect_file import read_effects
from mechmerge.localize.effects import EffectSettings, measure_effects
from mechmerge.localize.rounds import RoundSettings, settle
from mechmerge.localize.settings import LocalizeSettings, score_file
from mechmerge.localize.solving import SolveSettings, settle_solution
from mechmerge.localize.stage import localize
from mechmerge.models.deltas import delta_norms
from mechmerge.models.references import Model, ModelId
from mechmerge.pipeline.schema import Pipeline, RecipePlan
from mechmerge.pipeline.source import Resolved
from mechmerge.pipeline.state import RunState
from mechmerge.progress import Progress
from mechmerge.recipe.compile import compile_recipe
from mechmerge.recipe.schema import KEPT, read_recipe, write_recipe
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


def run_record(source: Resolved) -> RunRecord:
    """The record of a resolved pipeline."""
    # Everything is checked already; a set of a sweep keeps the whole pipeline's gate, which may name recipes of the file alone.
    return RunRecord.model_construct(
        pipeline=source.pipeline,
        base=source.base,
        experts=source.experts,
        behaviors={name: {b.name: b.digest for b in members} for name, members in source.behaviors.items()}
        | {name: {one.name: one.digest} for name, one in source.protected.items()},
        versions=versions(),
    )


class Stages:
    """The stages of one run directory.

    Args:
        source: the resolved pipeline.
        run: the run directory.
        state: what is done already.
        progress: told of every step.
        device: torch device.
    """

    def __init__(self, source: Resolved, run: Path, state: RunState, progress: Progress, device: str) -> None:
        self.plan, self.folder, self.base, self.experts, self.behaviors, self.protected = source
        self.run, self.state, self.progress, self.device = run, state, progress, device
        self.record = run_record(source)
        self.common: dict[str, Any] = {
            "base": self.base.id.shards,
            "experts": [[name, model.id.shards] for name, model in self.experts.items()],
            "rules": [self.plan.vocabulary, self.plan.positions],
            "seed": self.plan.seed,
            "sides": [self.base.sides, *(model.sides for model in self.experts.values())],
            "versions": self.record.versions,
        }

    def make(self) -> None:
        """Measures, compiles and merges everything that the pipeline names."""
        self.localize()
        self.effects()
        self.rounds()
        self.solutions()
        self.recipes()
        self.merge()

    # ----------------------------------------------------------------------------------------------------------- measuring
    def localize(self) -> None:
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
                "sides": [self.base.sides, expert.sides],
                "expert": expert.id.shards,
                "behaviors": [b.digest for b in members],
                "settings": settings.model_dump(mode="json"),
                "versions": self.record.versions,
            }
            self.state.stage(
                f"localize-{name}",
                inputs,
                [out / score_file(b.name, source) for b in members for source in settings.sources],
                partial(self._localize_one, expert, members, out, settings),
            )

    def _localize_one(self, expert: Model, members: list[Behavior], out: Path, settings: LocalizeSettings) -> None:
        localize(self.base, expert, members, out, settings, self.progress)

    def effects(self) -> None:
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
            lambda: ignore(measure_effects(self.base, self.experts, rows, out, settings, self.progress)),
        )

    def rounds(self) -> None:
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
            "rounds", inputs, [out], lambda: ignore(settle(self.base, self.experts, rows, out, settings, self.progress))
        )

    def solutions(self) -> None:
        """A file of solutions that were measured, for each recipe of the policy `solve`."""
        for name, plan in self.plan.recipes.items():
            if plan.policy != "solve":
                continue
            asked = plan.parameters
            limits = {key.removeprefix("limit."): value for key, value in asked.items() if key.startswith("limit.")}
            common = {key: getattr(self.plan.rounds, key) for key in ("metric", "prompts", "batch", "dtype")}
            common["tokens"] = self.plan.effects.tokens
            settings = parse_document(
                SolveSettings,
                {**common, **{key: asked[key] for key in ("budget", "agreement", "unproven") if key in asked}, "limits": limits,
                 "device": self.device, "seed": self.plan.seed, "vocabulary": self.plan.vocabulary,
                 "positions": self.plan.positions},
                f"recipe {name}",
            )  # fmt: skip
            rows, out, effects = self._rows(), self.solution(name), self.run / "effects.safetensors"
            inputs = self._measured_on(rows, settings) | {"effects": sha256_file(effects)}
            self.state.stage(f"solve-{name}", inputs, [out], partial(self._solve, rows, out, settings))

    def _solve(self, rows: list[BehaviorRow], out: Path, settings: SolveSettings) -> None:
        effects = read_effects(self.run / "effects.safetensors")
        settle_solution(self.base, self.experts, rows, effects, out, settings, self.progress)

    def solution(self, name: str) -> Path:
        return self.run / "solutions" / f"{name}.safetensors"

    def _rows(self) -> list[BehaviorRow]:
        plans, kept = self.plan.behaviors, self.plan.protect
        rows = [BehaviorRow(name, group, plans[name].expert, plans[name].weight) for name, group in self.behaviors.items()]
        return rows + [BehaviorRow(name, (one,), BASE, kept[name].weight) for name, one in self.protected.items()]

    def _measured_on(self, rows: list[BehaviorRow], settings: CalibrationSettings) -> dict[str, Any]:
        return self.common | {
            "rows": [[row.name, row.expert, row.weight, [b.digest for b in row.members]] for row in rows],
            "settings": settings.model_dump(mode="json"),
        }

    # ------------------------------------------------------------------------------------------------------------- merging
    def measurements(self) -> list[Path]:
        """The files that this very pipeline measures: what an earlier one left in the run directory is not among them."""
        rounds = any(plan.policy == "rounds" for plan in self.plan.recipes.values())
        settled = [self.run / "rounds.safetensors"] if rounds else []
        return [*self.scores(), self.run / "effects.safetensors", *settled]

    def scores(self) -> list[Path]:
        plans = self.plan.behaviors
        owned = [(plans[name].expert, member.name) for name, group in self.behaviors.items() for member in group]
        sources = self.plan.localize.sources
        return sorted(
            self.run / "scores" / expert / score_file(member, source) for expert, member in owned for source in sources
        )

    def recipe(self, name: str) -> Path:
        return self.run / "recipes" / name / "recipe.yaml"

    def recipes(self) -> None:
        common = {str(p.relative_to(self.run)): sha256_file(p) for p in self.measurements()}
        for name, plan in self.plan.recipes.items():
            own = self.solution(name)
            measured = {str(own.relative_to(self.run)): sha256_file(own)} if plan.policy == "solve" else common
            like, within = (self.recipe(one) if one else None for one in (plan.like, plan.within))
            inputs = {
                "plan": plan.model_dump(mode="json"),
                "measured": measured,
                "like": sha256_file(like) if like else None,
                "within": sha256_file(within) if within else None,
                "rules": self.common["rules"],
                "out_dtype": self.plan.out_dtype,
            }
            folder = self.recipe(name).parent
            self.state.stage(f"recipe-{name}", inputs, [folder], partial(self._compile, name, plan))

    def _compile(self, name: str, plan: RecipePlan) -> None:
        files = [self.solution(name)] if plan.policy == "solve" else self.measurements()
        sources = read_sources(files, self._expert_ids())
        compiled = compile_recipe(
            plan.policy,
            sources,
            parameters=plan.parameters,
            seed=plan.seed,
            like=read_recipe(self.recipe(plan.like)) if plan.like else None,
            within=read_recipe(self.recipe(plan.within)) if plan.within else None,
            delta_norms=self._norms,
            out_dtype=self.plan.out_dtype,
            vocabulary=self.plan.vocabulary,
            positions=self.plan.positions,
        )
        for note in compiled.notes:
            self.progress.note(f"note: recipe {name}: {note}")
        write_recipe(self.recipe(name), compiled.recipe, compiled.masks)

    def _norms(self, expert: str) -> Mapping[str, Any]:
        """Delta norms of an expert that no score file tells of."""
        return delta_norms(self.base.checkpoint(), self.experts[expert].checkpoint())

    def _expert_ids(self) -> dict[str, ModelId]:
        return {name: model.id for name, model in self.experts.items()}

    def merged(self, name: str) -> Path:
        return self.run / "merged" / name

    def merge(self) -> None:
        from mechmerge.merge.engine import merge

        paths = {"base": self.base.path} | {name: model.path for name, model in self.experts.items()}
        for name in self.plan.recipes:
            recipe, out = self.recipe(name), self.merged(name)
            inputs = {
                "recipe": sha256_file(recipe),
                "sides": self.common["sides"],
                "recipe in": KEPT,
                "versions": self.record.versions | {"mergekit": metadata.version("mergekit")},
            }

            def work(recipe: Path = recipe, out: Path = out) -> None:
                shutil.rmtree(out, ignore_errors=True)
                merge(recipe, out, paths, self.progress)

            self.state.stage(f"merge-{name}", inputs, [out], work)


def ignore(_: object) -> None:
    """Drops a result where only the file written matters."""
