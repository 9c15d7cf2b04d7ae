"""The gate: rules that an evaluation must satisfy before a merge is accepted.

    model: conflict                                             # the default for rules that name none
    rules:
      - {metric: formats, at_least: {model: base, plus: 0.20}}
      - {metric: formats, difference_to: base, at_least: 0.05, use: low}         # on the paired interval
      - {metric: arithmetic, retained: {expert: arithmetic, base: base}, at_least: 0.8}   # share of the expert's gain
      - {metric: formats.min, at_least: 0.3}

A metric or model that the evaluation does not hold refuses: what was not measured was not shown. So does an evaluation of other
weights than those that are to be accepted (sha256 of the shards).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from mechmerge.artifacts import Document
from mechmerge.errors import InputError
from mechmerge.evaluate.record import Evaluation
from mechmerge.evaluate.statistics import Interval, paired, retained
from mechmerge.models.references import ModelId

TOLERANCE = 1e-9
"""Rounding that a comparison forgives, so that .27 + .20 is reached by .47."""


class Bound(Document):
    """A bound relative to another model: times × its value + plus."""

    model: str
    metric: str | None = None
    """The other model's metric (default: the rule's own)."""
    plus: float = 0.0
    """In points: 0.20 is twenty percentage points."""
    times: float = 1.0


class Gain(Document):
    """What one parent gained over another."""

    expert: str
    base: str = "base"


class Rule(Document):
    """One figure that must reach a bound."""

    metric: str
    """A flat name of the evaluation, such as `formats`, `formats.min` or `arithmetic@unseen`."""
    model: str | None = None
    """The model judged (default: the gate's)."""
    at_least: float | Bound
    """A number, or a bound relative to another model."""
    difference_to: str | None = None
    """Judge the difference to this model, over the same prompts, in place of the metric itself (−1 … 1)."""
    retained: Gain | None = None
    """Judge the share of this gain that the model keeps: (model − base) / (expert − base)."""
    use: Literal["value", "low"] = "value"
    """What must reach the bound: the value, or the lower end of its 95 % interval (`on` would be true in YAML)."""

    @model_validator(mode="after")
    def _one_kind(self) -> Rule:
        if self.difference_to is not None and self.retained is not None:
            raise ValueError("a rule has difference_to or retained, not both")
        plain = self.difference_to is None and self.retained is None
        if not plain and isinstance(self.at_least, Bound):
            raise ValueError("at_least: expected a number where the rule is about a difference or a retained share")
        if plain and not isinstance(self.at_least, Bound) and not 0 <= self.at_least <= 1:
            raise ValueError("at_least: expected a number in 0 … 1")
        return self

    @property
    def others(self) -> tuple[str, ...]:
        """Other models that the rule needs."""
        named = (self.at_least.model if isinstance(self.at_least, Bound) else None, self.difference_to)
        gain = (self.retained.expert, self.retained.base) if self.retained else ()
        return tuple(name for name in (*named, *gain) if name is not None)


class Gate(Document):
    """A gate file."""

    model: str | None = None
    """The model judged by rules that name none."""
    rules: tuple[Rule, ...] = Field(min_length=1)


class RuleResult(Document):
    """What became of one rule."""

    rule: str
    """The rule in words."""
    model: str
    metric: str
    passed: bool
    found: float | None = None
    """What the evaluation holds; None where it does not hold it."""
    bound: float | None = None
    """What was required."""
    short_by: float | None = None
    """By how much it failed (0 where it passed)."""
    n: int | None = None
    """Prompts or instructions that the figure rests on."""
    could_pass_at: int | None = None
    """For a lower end that fell short: the n at which it would reach the bound if the value stayed; None where it never would,
    since the value itself falls short."""
    problem: str | None = None
    """Why the rule could not be checked."""

    @property
    def line(self) -> str:
        """One line for the terminal."""
        if self.problem:
            return f"REFUSED {self.rule}: {self.problem}"
        numbers = f"found {self.found:.3f}, needed {self.bound:.3f}"
        if self.passed:
            return f"passed  {self.rule}: {numbers}"
        more = (
            f"could pass at n = {self.could_pass_at} (now {self.n})" if self.could_pass_at else "at no n while the value stays"
        )
        return f"FAILED  {self.rule}: {numbers}, short by {self.short_by:.3f}; {more}"


class GateResult(Document):
    """What a gate said about an evaluation."""

    schema_version: Literal[2] = 2
    passed: bool
    rules: tuple[RuleResult, ...]
    weights: dict[str, str] = Field(default_factory=dict)
    """By judged model, one sha256 over its shards, where the gate was bound to weights."""

    @property
    def failed(self) -> tuple[RuleResult, ...]:
        """The rules that refused."""
        return tuple(rule for rule in self.rules if not rule.passed)


def check_gate(
    evaluation: Evaluation, gate: Gate, model: str | None = None, *, weights: Mapping[str, ModelId] | None = None
) -> GateResult:
    """Checks every rule of a gate.

    Args:
        evaluation: what was measured.
        gate: the rules.
        model: the model judged by rules that name none (default: the gate's own).
        weights: the weights that are to be accepted, by name: a rule about one of them is refused where the evaluation is
            of others.

    Raises:
        InputError: a rule names no model, and neither the gate nor the caller does.
    """
    results = []
    for number, rule in enumerate(gate.rules):
        name = rule.model or model or gate.model
        if name is None:
            raise InputError(
                f"gate rule {number}", expected="a model", found="none", fix="name it in the gate file, or pass --model"
            )
        results.append(_check(evaluation, rule, name, weights or {}))
    bound = {result.model: weights[result.model].digest for result in results if weights and result.model in weights}
    return GateResult(passed=all(result.passed for result in results), rules=tuple(results), weights=bound)


def _check(evaluation: Evaluation, rule: Rule, model: str, weights: Mapping[str, ModelId]) -> RuleResult:
    words = _words(rule, model)
    try:
        _same_weights(evaluation, (model, *rule.others), weights)
        n = evaluation.metric(model, rule.metric).n
        figure, bound = _figure(evaluation, rule, model)
    except InputError as error:
        return RuleResult(rule=words, model=model, metric=rule.metric, passed=False, problem=str(error))
    found = figure.low if rule.use == "low" else figure.value
    short = 0.0 if found >= bound - TOLERANCE else bound - found
    return RuleResult(
        rule=words, model=model, metric=rule.metric, passed=short == 0.0, found=found, bound=bound, short_by=short, n=n,
        could_pass_at=_needed(figure, bound, n) if short and rule.use == "low" else None,
    )  # fmt: skip


def _same_weights(evaluation: Evaluation, models: tuple[str, ...], weights: Mapping[str, ModelId]) -> None:
    for name in models:
        if name not in weights:
            continue
        evaluation.metrics(name)  # an unknown name is said first
        held = evaluation.models[name].id
        if not isinstance(held, ModelId):
            raise InputError(f"model {name}", expected="an evaluation of its weights", found="answers made elsewhere")
        if held.shards != weights[name].shards:
            raise InputError(
                f"model {name}",
                expected=f"an evaluation of these weights ({weights[name].digest[:12]}…)",
                found=f"one of others ({held.digest[:12]}…)",
                fix="evaluate the model again",
            )


def _figure(evaluation: Evaluation, rule: Rule, model: str) -> tuple[Interval, float]:
    """What is judged, with its interval, and the bound.

    Raises:
        InputError: the evaluation does not hold it.
    """
    options = {"seed": evaluation.settings.seed, "resamples": evaluation.settings.resamples}
    if rule.difference_to is not None:
        mine, theirs = (evaluation.column(name, rule.metric) for name in (model, rule.difference_to))
        if mine.over == "min":
            raise InputError(f"metric {rule.metric}", expected="one that is a mean, for a difference", found="the worst group")
        return paired(mine, theirs, **options), float(rule.at_least)  # type: ignore[arg-type]
    if rule.retained is not None:
        names = (model, rule.retained.base, rule.retained.expert)
        kept, base, expert = (evaluation.column(name, rule.metric) for name in names)
        share = retained(kept, base, expert, **options)
        if share is None:
            raise InputError(
                f"gain of {names[2]} over {names[1]} in {rule.metric}",
                expected="a gain whose 95 % interval lies above 0",
                found="none, so that no share of it is defined",
            )
        return share, float(rule.at_least)  # type: ignore[arg-type]
    metric = evaluation.metric(model, rule.metric)
    bound = rule.at_least
    if isinstance(bound, Bound):
        bound = bound.times * evaluation.metric(bound.model, bound.metric or rule.metric).value + bound.plus
    return Interval(metric.value, metric.low, metric.high), bound


def _needed(figure: Interval, bound: float, n: int) -> int | None:
    """The n at which the lower end would reach the bound if the value stayed: intervals shrink as 1/√n."""
    if figure.value <= bound or not math.isfinite(figure.low):
        return None
    return math.ceil(n * ((figure.value - figure.low) / (figure.value - bound)) ** 2)


def _words(rule: Rule, model: str) -> str:
    subject = f"{rule.metric} of {model}"
    if rule.difference_to is not None:
        subject = f"{rule.metric}: {model} − {rule.difference_to}"
    elif rule.retained is not None:
        subject = f"{rule.metric}: share of {rule.retained.expert}'s gain over {rule.retained.base} kept by {model}"
    subject += " (lower end)" if rule.use == "low" else ""
    bound = rule.at_least
    if not isinstance(bound, Bound):
        return f"{subject} ≥ {bound:g}"
    other = f"{bound.model}" + (f"'s {bound.metric}" if bound.metric else "")
    times = f"{bound.times:g} × " if bound.times != 1 else ""
    plus = f" {'+' if bound.plus > 0 else '−'} {abs(bound.plus):g}" if bound.plus else ""
    return f"{subject} ≥ {times}{other}{plus}"
