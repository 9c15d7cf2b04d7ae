"""The search itself: which points of the space are tried, in which order, and when that ends; see pipeline/tune.py."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mechmerge.artifacts import Document, Units
from mechmerge.errors import CheckpointError, InputError, PairError
from mechmerge.evaluate.gate import GateResult
from mechmerge.localize.effect_file import EffectFile
from mechmerge.pipeline.examining import Examiner
from mechmerge.pipeline.schema import RecipePlan
from mechmerge.pipeline.space import Open, Value, parameters, spread, untouched
from mechmerge.pipeline.tuning import Source, Trial, TuneSettings, best_of, line_of
from mechmerge.progress import SILENT, Progress
from mechmerge.recipe.compile import Compiled, compile_recipe
from mechmerge.recipe.policies import predicted_change
from mechmerge.recipe.sources import Sources
from mechmerge.versions import versions

FIRST = 6
"""Trials that the prediction orders, the policy as it is among them; TPE chooses from there on."""
CANDIDATES = 64
"""Points of the Latin hypercube whose quality is predicted."""
PRUNE_BELOW = 0.1
"""p-value below which a trial is given up."""


class _Outcome(Document):
    """A finished trial as it is kept."""

    passed: dict[int, bool]
    metrics: dict[str, float]
    gate: GateResult | None
    quality: float | None


class Search:
    """A search of one recipe's open parameters.

    Args:
        plan: the recipe.
        space: what is searched.
        sources: the measured files.
        rules: vocabulary, positions and output dtype of the recipes.
        examiner: asks merges.
        settings: see `TuneSettings`.
        out: folder for finished trials.
        progress: told of every trial.
    """

    def __init__(
        self,
        plan: RecipePlan,
        space: Sequence[Open],
        sources: Sources,
        rules: Mapping[str, Any],
        examiner: Examiner,
        settings: TuneSettings,
        out: Path,
        progress: Progress = SILENT,
    ) -> None:
        self.plan, self.space, self.sources, self.rules = plan, list(space), sources, dict(rules)
        self.examiner, self.settings, self.progress = examiner, settings, progress
        inputs = {
            "plan": plan.model_dump(mode="json"),
            "space": [one.model_dump(mode="json") for one in space],
            "sources": [source.model_dump(mode="json") for source in sources.provenance],
            "rules": self.rules,
            "base": [examiner.base.id.shards, examiner.base.sides],
            "experts": [[name, model.shards] for name, model in sources.experts.items()],
            "suites": [suite.digest for suite in examiner.suites],
            "gate": examiner.gate.model_dump(mode="json"),
            "evaluation": examiner.settings.model_dump(mode="json"),
            "search": settings.model_dump(mode="json", exclude={"trials", "patience", "target"}),
            "versions": versions(),
        }
        self.units = Units(out / ".trials", inputs)

    def compiled(self, values: Mapping[str, Value]) -> Compiled:
        """The recipe at a point of the space.

        Raises:
            InputError: the policy does not take these values.
        """
        return compile_recipe(
            self.plan.policy, self.sources, parameters=parameters(self.plan, values), seed=self.plan.seed, **self.rules
        )

    def predicted(self, values: Mapping[str, Value]) -> float | None:
        """See `Trial.predicted`."""
        effects = self.sources.effects
        if effects is None:
            return None
        try:
            return kept_gain(effects, self.compiled(values))
        except InputError:
            return None

    def guesses(self) -> list[tuple[Source, dict[str, Value]]]:
        """The first trials: the policy as it is or what is nearest to it, then candidates as predicted, best first."""
        start, same = untouched(self.space, self.plan)
        candidates = [values for values in spread(self.space, CANDIDATES, self.settings.seed) if values != start]
        told = [self.predicted(values) for values in candidates]
        order = sorted(range(len(candidates)), key=lambda i: (told[i] is None, -(told[i] or 0.0), i))
        return [("untuned" if same else "nearest", start), *(("predicted", candidates[i]) for i in order[: FIRST - 1])]

    def run(self) -> tuple[list[Trial], Literal["trials", "patience", "target"]]:
        """All trials, and what ended the search. The same settings give the same trials, whatever is kept of earlier calls."""
        import optuna

        settings, guesses, trials = self.settings, self.guesses(), list[Trial]()
        with _quiet_optuna():
            study = optuna.create_study(
                direction="maximize",
                sampler=optuna.samplers.TPESampler(seed=settings.seed, n_startup_trials=len(guesses)),
                pruner=optuna.pruners.WilcoxonPruner(p_threshold=PRUNE_BELOW) if settings.prune else optuna.pruners.NopPruner(),
            )
            for _, values in guesses:
                study.enqueue_trial(values)
            while len(trials) < settings.trials:
                number = len(trials)
                trial = study.ask()
                values = {one.name: one.rounded(_suggest(trial, one)) for one in self.space}
                source = guesses[number][0] if number < len(guesses) else "tpe"
                trials.append(self._trial(study, trial, source, values))
                self.progress.note(line_of(trials[-1]))
                best = best_of(trials)
                if best is None:
                    continue
                if settings.target is not None and (trials[best].quality or 0.0) >= settings.target:
                    return trials, "target"
                if number - best >= settings.patience:
                    return trials, "patience"
        return trials, "trials"

    def _trial(self, study: Any, trial: Any, source: Source, values: dict[str, Value]) -> Trial:
        import optuna

        common: dict[str, Any] = {
            "number": trial.number, "source": source, "parameters": values, "predicted": self.predicted(values)
        }  # fmt: skip
        try:
            compiled = self.compiled(values)
        except InputError as error:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            return Trial(**common, state="refused", prompts=0, problem=str(error))
        told: set[int] = set()

        def report(passed: Mapping[int, bool]) -> None:
            for place in sorted(passed.keys() - told):
                trial.report(float(passed[place]), place)
                told.add(place)

        def stop(passed: Mapping[int, bool]) -> bool:
            report(passed)
            return bool(trial.should_prune())

        def ask() -> dict[str, Any]:
            found = self.examiner.examine(f"trial-{trial.number}", compiled.recipe, compiled.masks, stop)
            one = found.judged
            outcome = _Outcome(
                passed=found.passed, metrics=one.metrics if one else {}, gate=one.gate if one else None,
                quality=one.quality if one else None,
            )  # fmt: skip
            return outcome.model_dump(mode="json")

        try:
            outcome = _Outcome.model_validate(self.units.json(f"{trial.number:04}", ask))
        except (CheckpointError, PairError):
            raise  # of the parents: no trial would do better
        except InputError as error:  # weights or logits that are not finite
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            return Trial(**common, state="refused", prompts=0, problem=str(error))
        report(outcome.passed)
        rate = sum(outcome.passed.values()) / len(outcome.passed)
        quality = outcome.quality if outcome.quality is not None else self._estimate(study, outcome.passed, rate)
        study.tell(trial, quality)
        return Trial(
            **common,
            state="complete" if outcome.gate is not None else "given up",
            prompts=len(outcome.passed),
            passed=rate,
            quality=quality,
            metrics=outcome.metrics,
            gate=outcome.gate,
        )

    @staticmethod
    def _estimate(study: Any, passed: Mapping[int, bool], rate: float) -> float:
        """Quality of a trial that was given up: the best one's, plus the difference of the pass rates on the same prompts."""
        best = study.best_trial
        theirs = float(np.mean([best.intermediate_values[place] for place in passed]))
        return float(best.value) + min(rate - theirs, 0.0)


def kept_gain(effects: EffectFile, compiled: Compiled) -> float | None:
    """Mean over behaviours of the predicted change as a share of the own expert's gain, each at most 1, less the predicted
    damage to protected behaviours, of which a nat counts as much as so many whole gains as its weight says; None for a baseline
    that is no weighted sum, and where no behaviour has a gain.
    """
    recipe = compiled.recipe
    if recipe.mergekit is not None and recipe.mergekit.method != "task_arithmetic":
        return None
    change = predicted_change(effects, {name: e.default for name, e in recipe.experts.items()}, compiled.masks)
    sign = -1 if effects.metadata.metric == "loss" else 1
    behaviors = effects.metadata.behaviors
    shares = [min(sign * change[b.name] / b.own_gain, 1.0) for b in behaviors if b.own_gain > 0]
    damage = sum(b.weight * min(sign * change[b.name], 0.0) for b in behaviors if b.protected)
    return (float(np.sum(shares)) + damage) / len(shares) if shares else None


def _suggest(trial: Any, one: Open) -> Value:
    if one.choices is not None:
        chosen: Value = trial.suggest_categorical(one.name, one.choices)
        return chosen
    value: float = trial.suggest_float(one.name, one.low, one.high, log=one.log)
    return value


@contextlib.contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Keeps optuna's log and its notices of what is experimental off the terminal."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
