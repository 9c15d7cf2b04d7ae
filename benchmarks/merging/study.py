"""One family with the experts of one seed: training, measuring, merging and evaluating, each unit kept when it is done.

HOME/settings.json                        what every unit here depends on: other settings are refused
HOME/calls.jsonl                          the calls that worked here, with their commits (calls.py)
HOME/experts/TRAINING-SEED/               adapters, with their logs beside them
HOME/FAMILY/seed-N/                       effects, rounds, scores, and recipes/ARM/ with notes and refusals
HOME/evaluations/SPLIT/NAME.json          one model each, NAME = FAMILY.SEED.ARM; samples/ beside them
HOME/scratch/                             merges while they are evaluated

Evaluations are the product's own (mechmerge/evaluate/run.py): a call that was killed goes on at the batch where it stopped,
and models of equal weights share their answers, in whichever family they stand. A recipe that is there is what was
evaluated and is never made again: policies that have changed since need a new folder.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from benchmarks.experts.training import REFERENCE, train
from benchmarks.merging import arms as catalogue
from benchmarks.merging.arms import Arm
from benchmarks.merging.families import FAMILIES, EvaluatedSplit, committed, members, prompts_of, reference, rows, suites
from benchmarks.merging.gains import Answers, plain_retained, pooled
from benchmarks.merging.tuning import Cost, Sample, cost_of_effects, cost_of_rounds, steps_of, tune
from mechmerge.artifacts import lock, read_document, write_json
from mechmerge.errors import InputError, MechmergeError
from mechmerge.evaluate.record import EvaluateSettings, Evaluation
from mechmerge.evaluate.run import evaluate
from mechmerge.evaluate.suites import Suite
from mechmerge.localize.calibration import BehaviorRow, Calibration
from mechmerge.localize.effect_file import read_effects
from mechmerge.localize.effects import EffectSettings, measure_effects
from mechmerge.localize.rounds import RoundSettings, settle
from mechmerge.localize.rounds_file import read_rounds
from mechmerge.localize.settings import LocalizeSettings, score_file
from mechmerge.localize.stage import localize
from mechmerge.merge.engine import merge
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.models.deltas import delta_norms
from mechmerge.models.references import Model, ModelId, resolve
from mechmerge.progress import SILENT, Progress
from mechmerge.recipe.compile import Compiled, compile_recipe
from mechmerge.recipe.schema import read_recipe, write_recipe
from mechmerge.recipe.sources import Sources, read_sources

SETTINGS = EvaluateSettings()
RATES = (3e-6, 1e-5, 3e-5, 1e-4)
"""Step sizes of fine-tuning that are tried on the develop split."""


class Paused(Exception):
    """The time that a call was given is over; what is done is kept."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    prompts: int = 48
    """Calibration prompts a skill."""
    max_rounds: int = 4
    max_nodes: int = 10
    limit: int | None = None
    """Prompts a suite; None asks them all."""
    shuffles: int = catalogue.SHUFFLES
    rates: tuple[float, ...] = RATES
    few: bool = False
    """The short sweep."""
    steps: int | None = None
    """Steps of the experts' training; None takes their recipes'."""


FULL = Sizes()
QUICK = Sizes(prompts=36, max_rounds=1, max_nodes=6, limit=24, shuffles=1, rates=(1e-5,), few=True)


class Study:
    """A family with the experts of one seed.

    Args:
        family: one of `FAMILIES`.
        seed: of the experts' training, and of every draw of a baseline.
        home: where everything is kept.
        sizes: how much is measured.
        progress: told of every step.
        deadline: `time.monotonic()` after which nothing new is begun (`Paused` is raised instead).
        base: reference of the base model.

    Raises:
        InputError: `home` holds units of other settings.
    """

    def __init__(
        self,
        family: str,
        seed: int,
        home: Path,
        sizes: Sizes = FULL,
        progress: Progress = SILENT,
        deadline: float | None = None,
        base: str = REFERENCE,
    ) -> None:
        self.family, self.seed, self.home, self.sizes = family, seed, home, sizes
        self.progress, self.deadline, self.base_reference = progress, deadline, base
        self.skills = tuple(FAMILIES[family])
        self.folder = home / family / f"seed-{seed}"
        self.suites: dict[EvaluatedSplit, list[Suite]] = {
            "develop": suites(family, "develop", sizes.limit),
            "test": suites(family, "test", sizes.limit),
        }
        self._answers: dict[tuple[Path, int], Answers] = {}
        self._check_settings()

    def _check_settings(self) -> None:
        """Whatever lies in the folder was made with these very settings, prompts and base."""
        wanted: dict[str, Any] = {"sizes": json.loads(json.dumps(asdict(self.sizes))), "base": self.base_reference}
        wanted["evaluation"] = SETTINGS.model_dump(mode="json")
        wanted["suites"] = prompts_of(self.sizes.limit)
        wanted |= {"rounds": self._of_rounds.model_dump(mode="json"), "effects": self._of_effects.model_dump(mode="json")}
        path = self.home / "settings.json"
        if not path.exists():
            write_json(path, wanted)
        found = json.loads(path.read_text("utf-8"))
        if differing := sorted(key for key in wanted if wanted[key] != found.get(key)):
            raise InputError(str(path), expected="the settings of this call", found=f"other {', '.join(differing)}",
                             fix="name another --folder")  # fmt: skip

    def _begin(self) -> None:
        if self.deadline is not None and time.monotonic() > self.deadline:
            raise Paused

    # -------------------------------------------------------------------------------------------------------------- models
    @cached_property
    def base(self) -> Model:
        return resolve(self.base_reference, progress=self.progress)

    @cached_property
    def experts(self) -> dict[str, Model]:
        """The experts by skill, trained where they are not there yet."""
        if self.base_reference == REFERENCE:
            return {skill: resolve(reference(self.adapter(skill)), progress=self.progress) for skill in self.skills}
        return {skill: resolve(f"{self.base_reference}+{self.adapter(skill)}") for skill in self.skills}

    def trained(self, skill: str) -> bool:
        """Whether the adapter of a skill is there."""
        training = FAMILIES[self.family][skill]
        own = committed(training, self.seed) if self.base_reference == REFERENCE else None
        return own is not None or (self.home / "experts" / f"{training}-{self.seed}").exists()

    def adapter(self, skill: str) -> Path:
        """The adapter of a skill: the repository's own, or one that is trained here."""
        training = FAMILIES[self.family][skill]
        if self.base_reference == REFERENCE and (own := committed(training, self.seed)) is not None:
            return own
        folder = self.home / "experts" / f"{training}-{self.seed}"
        with lock(folder.with_suffix(".lock"), f"training of {folder.name}"):
            if not folder.exists():
                self._begin()
                self.progress.note(f"training {folder.name}")
                record = train(training, self.base.path, folder, self.seed, self.sizes.steps, judged=False)
                write_json(folder.with_name(f"{folder.name}.log.json"), record)
        return folder

    @property
    def paths(self) -> dict[str, Path]:
        return {"base": self.base.path} | {name: model.path for name, model in self.experts.items()}

    # ----------------------------------------------------------------------------------------------------------- measuring
    def rows(self) -> list[BehaviorRow]:
        """What effects, rounds and fine-tuning are measured on."""
        return rows(self.family)

    @property
    def _of_effects(self) -> EffectSettings:
        return EffectSettings(prompts=self.sizes.prompts, max_nodes=self.sizes.max_nodes)

    @property
    def _of_rounds(self) -> RoundSettings:
        return RoundSettings(prompts=self.sizes.prompts, max_rounds=self.sizes.max_rounds)

    def effects(self) -> Path:
        """The effect matrix, measured where it is not there yet."""
        out = self.folder / "effects.safetensors"
        if not out.exists():
            self._begin()
            measure_effects(self.base, self.experts, self.rows(), out, self._of_effects, self.progress)
        return out

    def rounds(self) -> Path:
        """The coefficients settled in rounds, measured where they are not there yet."""
        out = self.folder / "rounds.safetensors"
        if not out.exists():
            self._begin()
            settle(self.base, self.experts, self.rows(), out, self._of_rounds, self.progress)
        return out

    def scores(self) -> list[Path]:
        """The score files of every expert on its own behaviours, as the demo measures them."""
        files = []
        settings = LocalizeSettings(
            verify=4, prompts=8, steering_prompts=8, output_prompts=4, measures=("sufficiency", "activation"),
            on_invalid="report", curve_pass_prompts=0,
        )  # fmt: skip
        for skill, expert in self.experts.items():
            out, behaviors = self.folder / "scores" / skill, members(skill)
            found = [out / score_file(behavior.name, source) for behavior in behaviors for source in settings.sources]
            if not all(file.exists() for file in found):
                self._begin()
                localize(self.base, expert, behaviors, out, settings, self.progress)
            files += found
        return files

    def solution(self, arm: Arm) -> Path:
        """The coefficients that `solve` finds at a budget from effects at the sum, measured there and once more if need be.

        Whether those effects predict is not checked here (benchmarks/effects.py does), so it is told that they are unproven.
        """
        from mechmerge.localize.solving import SolveSettings, settle_solution

        effects, out = self.folder / "effects-at-sum.safetensors", self.solution_file(arm)
        if not out.exists():
            self._begin()
            if not effects.exists():
                around = EffectSettings(prompts=self.sizes.prompts, max_nodes=self.sizes.max_nodes, origin="sum")
                measure_effects(self.base, self.experts, self.rows(), effects, around, self.progress)
            settings = SolveSettings(prompts=self.sizes.prompts, budget=arm.parameters["budget"], unproven=True)
            measured = read_effects(effects)
            settle_solution(self.base, self.experts, self.rows(), measured, out, settings, self.progress)
        return out

    def solution_file(self, arm: Arm) -> Path:
        return self.folder / "solutions" / f"{arm.name}.safetensors"

    def sources(self, arm: Arm) -> Sources:
        """What the recipe of an arm is made from; where nothing is measured, the models' identities alone."""
        match arm.measured:
            case "effects":
                files = [self.effects()]
            case "rounds":
                files = [self.rounds()]
            case "solution":
                files = [self.solution(arm)]
            case "scores":
                files = self.scores()
            case None:
                files = []
        ids = {name: model.id for name, model in self.experts.items()}
        return read_sources(files, ids) if files else Sources(self.base.id, ids)

    def cost(self) -> Cost:
        """The dearer of the two measurements of the telling policies."""
        effects, rounds = read_effects(self.effects()).metadata, read_rounds(self.rounds()).metadata
        measured = cost_of_effects(effects), cost_of_rounds(rounds, self.sizes.max_rounds)
        return max(measured, key=lambda cost: cost.forward)

    # ------------------------------------------------------------------------------------------------------------- recipes
    def recipe(self, arm: Arm) -> Path:
        """The recipe of an arm, made where it is not there yet.

        Raises:
            MechmergeError: the policy refuses; the reason is kept beside the place of the recipe.
        """
        out = self.folder / "recipes" / arm.name / "recipe.yaml"
        if not out.exists():
            refused = out.with_name("refused.json")
            try:
                compiled = self._compiled(arm)
            except MechmergeError as error:
                write_json(refused, str(error))
                raise
            refused.unlink(missing_ok=True)
            if compiled.notes:
                write_json(out.with_name("notes.json"), compiled.notes)
            write_recipe(out, compiled.recipe, compiled.masks)
        return out

    def _compiled(self, arm: Arm) -> Compiled:
        like, within = (read_recipe(self.recipe(catalogue.every()[n])) if n else None for n in (arm.like, arm.within))
        compiled = compile_recipe(
            arm.policy,
            self.sources(arm),
            parameters=arm.parameters,
            seed=arm.seed,
            like=like,
            delta_norms=None if like is None else self._norms,
            within=within,
        )
        recipe = compiled.recipe
        if arm.weights:
            experts = {n: e.model_copy(update={"default": arm.weights.get(n, e.default)}) for n, e in recipe.experts.items()}
            recipe = recipe.model_copy(update={"experts": experts})
        if arm.whole:
            assert recipe.mergekit is not None
            method = recipe.mergekit.model_copy(update={"parameters": recipe.mergekit.parameters | dict(arm.whole)})
            recipe = recipe.model_copy(update={"mergekit": method})
        return Compiled(recipe, compiled.masks, compiled.notes)

    def _norms(self, expert: str) -> dict[str, Any]:
        return delta_norms(self.base.checkpoint(), self.experts[expert].checkpoint())

    # ---------------------------------------------------------------------------------------------------------- evaluating
    def evaluation_file(self, name: str, split: EvaluatedSplit) -> Path:
        return self.home / "evaluations" / split / f"{self.family}.{self.seed}.{name}.json"

    def done(self, name: str, split: EvaluatedSplit) -> bool:
        """Whether a model (`base`, a skill's expert or an arm) has been evaluated."""
        return self.evaluation_file(name, split).exists()

    def parents_done(self, split: EvaluatedSplit) -> bool:
        """Whether the base and the experts have been evaluated: without them no gain is known."""
        return all(self.done(name, split) for name in ("base", *self.skills))

    def answers(self, name: str, split: EvaluatedSplit) -> Answers:
        """The outcomes of a model that has been evaluated, by skill; a file is read once."""
        path = self.evaluation_file(name, split)
        key = path, path.stat().st_mtime_ns
        if key not in self._answers:
            evaluation = read_document(Evaluation, path)
            self._answers[key] = {suite.name: pooled(evaluation, path.stem, suite) for suite in self.suites[split]}
        return self._answers[key]

    def evaluate(self, name: str, split: EvaluatedSplit, model: Callable[[], Model] | Model) -> None:
        """Evaluates a model unless it has been."""
        out = self.evaluation_file(name, split)
        if out.exists():
            return
        self._begin()
        found = model if isinstance(model, Model) else model()
        evaluate({out.stem: found}, self.suites[split], out, SETTINGS, self.progress)

    def parents(self) -> None:
        """Evaluates the base and the experts on both splits."""
        splits: tuple[EvaluatedSplit, ...] = ("develop", "test")
        for split in splits:
            for name, model in ({"base": self.base} | self.experts).items():
                self.evaluate(name, split, model)

    def evaluate_arm(self, arm: Arm, split: EvaluatedSplit) -> bool:
        """Merges and evaluates an arm unless that is done; False where its policy refuses."""
        if self.done(arm.name, split):
            return True
        self._begin()
        try:
            recipe = self.recipe(arm)
        except MechmergeError as error:
            self.progress.note(f"{self.family}, seed {self.seed}: {arm.name} is left out: {error}")
            return False
        with self._scratch(arm.name) as folder:
            merge(recipe, folder, self.paths, self.progress)
            self.evaluate(arm.name, split, _model(arm.name, folder))
        return True

    @contextmanager
    def _scratch(self, name: str) -> Iterator[Path]:
        """A place for a merge that is removed when it has been evaluated."""
        folder = self.home / "scratch" / f"{self.family}.{self.seed}.{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):
                folder.parent.rmdir()

    # ------------------------------------------------------------------------------------------------------------ choosing
    def retained(self, name: str, split: EvaluatedSplit) -> dict[str, float]:
        """Retained gain of each skill."""
        experts = {skill: self.answers(skill, split) for skill in self.skills}
        return plain_retained(self.answers(name, split), self.answers("base", split), experts)

    def swept(self) -> dict[str, dict[str, float]]:
        """Retained gains on develop of every setting of a baseline that has been evaluated; none before the parents."""
        if not self.parents_done("develop"):
            return {}
        named = [arm.name for arm in catalogue.sweep(self.skills, self.seed, self.sizes.few)]
        return {name: self.retained(name, "develop") for name in named if self.done(name, "develop")}

    def sweep_done(self) -> bool:
        """Whether the whole sweep has been evaluated."""
        whole = catalogue.sweep(self.skills, self.seed, self.sizes.few)
        return all(self.done(arm.name, "develop") or self.refused(arm.name) is not None for arm in whole)

    def choosable(self) -> bool:
        """Whether the best settings can be told: the sweep is whole, and the parents have answered on develop."""
        return self.sweep_done() and self.parents_done("develop")

    def refused(self, name: str) -> str | None:
        """Why a policy refused, where it did."""
        path = self.folder / "recipes" / name / "refused.json"
        return str(json.loads(path.read_text("utf-8"))) if path.exists() else None

    def best(self) -> dict[str, str]:
        """Role → the setting that plays it, chosen on the develop split once the sweep is whole: the best setting of each
        baseline by the mean of the retained gains, the best of all by the mean, and the best of all by the minimum. None where
        every setting is refused.
        """
        found = self.swept() if self.choosable() else {}
        if not found:
            return {}
        policy = {arm.name: arm.policy for arm in catalogue.sweep(self.skills, self.seed, self.sizes.few)}
        chosen = {f"best {p}": best_of({n: g for n, g in found.items() if policy[n] == p}, "mean")
                  for p in dict.fromkeys(policy[name] for name in found)}  # fmt: skip
        return chosen | {"best baseline by mean": best_of(found, "mean"), "best baseline by min": best_of(found, "min")}

    # -------------------------------------------------------------------------------------------------------- equal information
    def tuned_name(self, rate: float) -> str:
        return f"tuned_rate-{rate:g}"

    def tuned(self) -> str | None:
        """The fine-tuning whose step size was best on the develop split, once all are evaluated."""
        names = [self.tuned_name(rate) for rate in self.sizes.rates]
        if not self.parents_done("develop") or not all(self.done(name, "develop") for name in names):
            return None
        return best_of({name: self.retained(name, "develop") for name in names}, "mean")

    def samples(self) -> list[Sample]:
        """The experts' verified answers to the calibration prompts, weighted as rounds weigh them and their tokens."""
        kept = self.folder / ".answers.units"
        calibration = Calibration(self.base, self.experts, self.rows(), kept, self._of_rounds, self.progress)
        gains = {b.name: b.weight / (b.loss_base - b.loss_expert) for b in read_rounds(self.rounds()).metadata.behaviors}
        examples, shares = calibration.examples, calibration.weights()
        weights = [gains[calibration.rows[e.row].name] * float(shares[e.row, i]) for i, e in enumerate(examples)]
        mean = sum(weights) / len(weights)
        told = calibration.token_shares
        tokens = [None] * len(examples) if told is None else [share.tolist() for share in told]
        return [Sample(e.prompt, e.answer, w / mean, t) for e, w, t in zip(examples, weights, tokens, strict=True)]

    def equal_information(self) -> None:
        """Fine-tunes the sum with every step size, evaluates on develop, and the best of them on test."""
        for rate in self.sizes.rates:
            self._evaluate_tuned(rate, "develop")
        chosen = self.tuned()
        for rate in self.sizes.rates:
            if self.tuned_name(rate) == chosen:
                self._evaluate_tuned(rate, "test")

    def _evaluate_tuned(self, rate: float, split: EvaluatedSplit) -> None:
        name = self.tuned_name(rate)
        if self.done(name, split):
            return
        folder = self.folder / "tuned" / name
        if not folder.exists():
            self._begin()
            steps = steps_of(self.cost())
            whole = Arm("task-arithmetic_weight-1", "baseline", "task-arithmetic", {"weight": 1.0}, self.seed)
            with self._scratch(f"sum-of-{name}") as start:
                merge(self.recipe(whole), start, self.paths, self.progress)
                record = tune(start, self.base.path, self.samples(), folder, steps=steps, rate=rate, seed=self.seed,
                              progress=self.progress)  # fmt: skip
            write_json(folder.with_name(f"{folder.name}.log.json"), record | {"cost": self.cost()._asdict()})
        self.evaluate(name, split, lambda: _model(name, folder))
        # Only the one that is chosen is needed again: it is kept until it has been tested.
        if split == "test":
            for other in self.folder.glob("tuned/*/"):
                shutil.rmtree(other)


def best_of(found: Mapping[str, Mapping[str, float]], over: Literal["mean", "min"]) -> str:
    """The name with the largest mean (or least) retained gain; ties go by the other one, then to the first."""

    def rank(name: str) -> tuple[float, float]:
        shares = list(found[name].values())
        both = (sum(shares) / len(shares), min(shares))
        return both if over == "mean" else both[::-1]

    return max(found, key=rank)


def _model(name: str, folder: Path) -> Model:
    """A model that is not remembered anywhere."""
    return Model(id=ModelId(name=name, shards=Checkpoint(folder).digests()), path=folder)
