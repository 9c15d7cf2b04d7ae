"""`tune.json`: every trial of a search, what was asked, and which was best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from mechmerge.artifacts import MOST_SEED, Document
from mechmerge.evaluate.gate import GateResult
from mechmerge.evaluate.record import EvaluateSettings
from mechmerge.pipeline.ranking import Judged
from mechmerge.pipeline.space import Open, Value

Source = Literal["untuned", "nearest", "predicted", "tpe"]


class TuneSettings(Document):
    """How a search is made."""

    trials: int = Field(default=24, ge=1)
    """Most trials, those that are given up among them."""
    patience: int = Field(default=10, ge=1)
    """The search ends after so many trials without a better one."""
    target: float | None = None
    """The search ends at this quality."""
    limit: int = Field(default=48, ge=2)
    """Prompts a suite."""
    chunk: int = Field(default=24, ge=1)
    """Prompts of a suite that are asked before a trial may be given up."""
    seed: int = Field(default=0, ge=0, le=MOST_SEED)
    """Of the hypercube and of TPE."""
    prune: bool = True
    """Whether trials may be given up."""


class Trial(Document):
    """One trial."""

    number: int = Field(ge=0)
    source: Source
    """`untuned`: the policy as it is; `nearest`: the point of the space next to it, where `--open` leaves it outside;
    `predicted`: among the best by the effect matrix; `tpe`: chosen by the sampler.
    """
    parameters: dict[str, Value]
    """The open parameters' values."""
    predicted: float | None
    """Mean share of the experts' own gains that the effect matrix predicts to be kept, each at most 1; None without one."""
    state: Literal["complete", "given up", "refused"]
    """`given up`: worse than the best on the prompts asked; `refused`: the policy does not take these values."""
    prompts: int = Field(ge=0)
    """Prompts that were asked."""
    passed: float | None = None
    """Share of them that passed."""
    quality: float | None = None
    """Mean of the headline metrics, less what is missing to the gate's rules; an estimate where the trial was given up."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Headline metrics of a complete trial."""
    gate: GateResult | None = None
    """What the gate says of a complete trial, on development prompts."""
    problem: str | None = None
    """Why it was refused."""


class AskedSuite(Document):
    """What was asked."""

    digest: str
    split: str
    prompts: int


class Tuning(Document):
    """`tune.json`."""

    schema_version: Literal[1] = 1
    recipe: str
    """The pipeline's recipe whose open parameters were searched."""
    policy: str
    fixed: dict[str, Any]
    """Parameters that stayed as the recipe sets them."""
    space: tuple[Open, ...]
    settings: TuneSettings
    evaluation: EvaluateSettings
    suites: dict[str, AskedSuite]
    references: dict[str, dict[str, float]]
    """Headline metrics of the base and the experts on the same prompts."""
    trials: tuple[Trial, ...]
    best: int
    """Number of the best complete trial; it is the best of many, so expect less of it on test prompts."""
    stopped: Literal["trials", "patience", "target"]
    """What ended the search: all trials made, no better one for long, or the quality that was asked for."""
    versions: dict[str, str]

    @property
    def asked(self) -> str:
        """The suites on one line."""
        return ", ".join(f"{name}: {suite.prompts} prompts ({suite.split})" for name, suite in self.suites.items())

    @property
    def chosen(self) -> Trial:
        """The best trial."""
        return self.trials[self.best]


def best_of(trials: Sequence[Trial]) -> int | None:
    """Number of the best complete trial: fewest gate rules failed, then as `ranking.Judged.order`; the first of equals."""
    complete = [trial for trial in trials if trial.state == "complete" and trial.gate is not None]
    if not complete:
        return None
    return min(complete, key=lambda trial: (*Judged(trial.gate, trial.metrics).order, trial.number)).number  # type: ignore[arg-type]


def line_of(trial: Trial) -> str:
    """A trial on one line."""
    values = ", ".join(f"{name} {value}" for name, value in trial.parameters.items())
    if trial.quality is None:
        return f"trial {trial.number} ({trial.source}): {values}: refused, {trial.problem}"
    metrics = ", ".join(f"{name} {value:.3f}" for name, value in trial.metrics.items())
    told = f"{metrics}; quality {trial.quality:.3f}" if metrics else f"given up after {trial.prompts} prompts"
    return f"trial {trial.number} ({trial.source}): {values}: {told}"
