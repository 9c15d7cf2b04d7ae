"""The gate: rules that an evaluation must satisfy before a merge is accepted.

    model: conflict                                             # the default for rules that name none
    weights: {conflict: 4be1…}                                  # optional: sha256 over its shards, as evaluation.json holds it
    rules:
      - {metric: formats, at_least: {model: base, plus: 0.20}}
      - {metric: formats, difference_to: base, at_least: 0.05, use: low}         # on the paired interval
      - {metric: arithmetic, retained: {expert: arithmetic, base: base}, at_least: 0.8}   # share of the expert's gain
      - {metric: formats.min, at_least: 0.3}

With `use: low` the lower end of the 95 % interval must reach the bound; a bound relative to another model is then judged on the
paired difference to it, since that model was only measured as well. A metric or model that the evaluation does not hold
refuses: what was not measured was not shown. So does an evaluation of other weights than those to be accepted: those that
the gate file names by their sha256, or that the caller gives (`--weights FOLDER`; `run` and `publish` always do).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from mechmerge.artifacts import Document, Migration
from mechmerge.errors import InputError
from mechmerge.evaluate.columns import Column
from mechmerge.evaluate.record import Evaluation
from mechmerge.evaluate.statistics import Interval, apart, interval, paired, retained
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
    times: float = Field(default=1.0, ge=0)


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
    weights: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] = Field(default_factory=dict)
    """By model, the one sha256 over its shards that an evaluation must be of (`ModelId.digest`, which `gate` writes)."""
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
    """For a lower end that fell short: about the n at which it would reach the bound if prompts like these were added; None
    where it never would, since the value itself falls short."""
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
            f"could pass at n ≈ {self.could_pass_at} (now {self.n})" if self.could_pass_at else "at no n while the value stays"
        )
        return f"FAILED  {self.rule}: {numbers}, short by {self.short_by:.3f}; {more}"


class GateResult(Document):
    """What a gate said about an evaluation."""

    # Version 1 said neither n nor weights, which may be left out.
    MIGRATIONS: ClassVar[Mapping[int, Migration]] = {1: lambda old: old}

    schema_version: Literal[2] = 2
    passed: bool
    rules: tuple[RuleResult, ...]
    evaluation: str | None = None
    """sha256 of the evaluation file, where it was read from one."""
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
        InputError: a rule names no model, and neither the gate nor the caller does; the gate pins weights of a model that no
            rule is about.
    """
    check_asked("gate weights", gate.weights, gate, model)
    results = [
        _check(evaluation, rule, name, weights or {}, gate.weights)
        for name, rule in zip(judged_models(gate, model), gate.rules, strict=True)
    ]
    digests = gate.weights | {name: model.digest for name, model in (weights or {}).items()}
    bound = {result.model: digests[result.model] for result in results if result.model in digests}
    return GateResult(passed=all(result.passed for result in results), rules=tuple(results), weights=bound)


def judged_models(gate: Gate, model: str | None = None) -> list[str]:
    """The model that each rule judges.

    Args:
        gate: the rules.
        model: as for `check_gate`.

    Raises:
        InputError: a rule names no model, and neither the gate nor the caller does.
    """
    names = []
    for number, rule in enumerate(gate.rules):
        name = rule.model or model or gate.model
        if name is None:
            raise InputError(
                f"gate rule {number}", expected="a model", found="none", fix="name it in the gate file, or pass --model"
            )
        names.append(name)
    return names


def check_asked(what: str, names: Iterable[str], gate: Gate, model: str | None = None) -> None:
    """Checks that rules judge, or compare with, every one of some models: weights of another would bind nothing.

    Args:
        what: they are called in the error.
        names: of the models.
        gate: the rules.
        model: as for `check_gate`.

    Raises:
        InputError: no rule is about one of them, or a rule names no model.
    """
    asked = {*judged_models(gate, model), *(other for rule in gate.rules for other in rule.others)}
    for name in sorted(set(names) - asked):
        raise InputError(f"{what} of {name}", expected=f"one of {', '.join(sorted(asked))}", found="a model without a rule")


def _check(
    evaluation: Evaluation, rule: Rule, model: str, weights: Mapping[str, ModelId], pinned: Mapping[str, str]
) -> RuleResult:
    words = _words(rule, model)
    try:
        _same_weights(evaluation, (model, *rule.others), weights, pinned)
        metric = evaluation.metric(model, rule.metric)
        figure, bound = _figure(evaluation, rule, model)
    except InputError as error:
        return RuleResult(rule=words, model=model, metric=rule.metric, passed=False, problem=str(error))
    found = figure.low if rule.use == "low" else figure.value
    short = 0.0 if found >= bound - TOLERANCE else bound - found
    needed = None
    if short and rule.use == "low" and figure.value > bound:
        now = len(set(evaluation.column(model, rule.metric).clusters))
        clusters = _needed(lambda size: _figure(evaluation, rule, model, size)[0].low, figure, bound, now)
        needed = math.ceil(metric.n * clusters / now)
    return RuleResult(
        rule=words, model=model, metric=rule.metric, passed=short == 0.0, found=found, bound=bound, short_by=short,
        n=metric.n, could_pass_at=needed,
    )  # fmt: skip


def _same_weights(
    evaluation: Evaluation, models: tuple[str, ...], weights: Mapping[str, ModelId], pinned: Mapping[str, str]
) -> None:
    for name in models:
        if name not in weights and name not in pinned:
            continue
        evaluation.metrics(name)  # an unknown name is said first
        held = evaluation.models[name].id
        if not isinstance(held, ModelId):
            raise InputError(f"model {name}", expected="an evaluation of its weights", found="answers made elsewhere")
        wanted = {pinned[name]} if name in pinned else set()
        wanted |= {weights[name].digest} if name in weights else set()
        if wanted != {held.digest}:
            others = ", ".join(f"{one[:12]}…" for one in sorted(wanted))
            raise InputError(
                f"model {name}",
                expected=f"an evaluation of these weights ({others})",
                found=f"one of others ({held.digest[:12]}…)",
                fix="evaluate the model again",
            )


def _figure(evaluation: Evaluation, rule: Rule, model: str, clusters: int | None = None) -> tuple[Interval, float]:
    """What is judged, with its interval (as it would be with so many clusters, where they are given), and the bound.

    Raises:
        InputError: the evaluation does not hold it.
    """
    options: dict[str, Any] = {
        "seed": evaluation.settings.seed,
        "resamples": evaluation.settings.resamples,
        "clusters": clusters,
    }
    bound = rule.at_least

    def mine() -> Column:  # where it is needed: files of schema 1 hold none, and plain values need none
        return evaluation.column(model, rule.metric)

    least = bound.plus if isinstance(bound, Bound) else bound
    if rule.retained is not None:
        names = (rule.retained.base, rule.retained.expert)
        base, expert = (evaluation.column(name, rule.metric) for name in names)
        own = mine()
        share = None if own.over == "min" else retained(own, base, expert, **options)
        if share is None:
            raise InputError(
                f"gain of {names[1]} over {names[0]} in {rule.metric}",
                expected="a gain in a mean whose 95 % interval lies above 0",
                found="none, so that no share of it is defined",
            )
        return share, least
    if rule.difference_to is not None:
        return _difference(mine(), evaluation.column(rule.difference_to, rule.metric), 1.0, options), least
    if isinstance(bound, Bound):
        name = bound.metric or rule.metric
        if rule.use == "low":
            return _difference(mine(), evaluation.column(bound.model, name), bound.times, options), least
        bound = bound.times * evaluation.metric(bound.model, name).value + bound.plus
    metric = evaluation.metric(model, rule.metric)
    return interval(mine(), **options) if clusters else Interval(metric.value, metric.low, metric.high), bound


def _difference(mine: Column, other: Column, times: float, options: dict[str, Any]) -> Interval:
    same_units = (mine.clusters, mine.groups) == (other.clusters, other.groups)
    if same_units and "min" not in (mine.over, other.over):
        return paired(mine, other, times=times, **options)
    return apart(interval(mine, **options), interval(other, **options), times)


def _needed(low: Callable[[int], float], figure: Interval, bound: float, clusters: int) -> int:
    """About how many clusters like these lift the lower end to the bound; the first guess is that intervals shrink as 1/√n."""
    guess = math.ceil(clusters * ((figure.value - figure.low) / (figure.value - bound)) ** 2)
    if guess > 1000 * clusters:
        return guess
    few, many = clusters, guess
    while low(many) < bound - TOLERANCE:
        few, many = many, 2 * many
    while many - few > max(1, many // 100):
        middle = (few + many) // 2
        few, many = (few, middle) if low(middle) >= bound - TOLERANCE else (middle, many)
    return many


def _words(rule: Rule, model: str) -> str:
    bound, low = rule.at_least, " (lower end)" if rule.use == "low" else ""
    if rule.retained is not None:
        return (
            f"{rule.metric}: share of {rule.retained.expert}'s gain over {rule.retained.base} kept by {model}{low} ≥ {bound:g}"
        )
    if rule.difference_to is not None:
        return f"{rule.metric}: {model} − {rule.difference_to}{low} ≥ {bound:g}"
    subject = f"{rule.metric} of {model}"
    if not isinstance(bound, Bound):
        return f"{subject}{low} ≥ {bound:g}"
    times = f"{bound.times:g} × " if bound.times != 1 else ""
    other = f"{times}{bound.model}" + (f"'s {bound.metric}" if bound.metric else "")
    if low:
        return f"{rule.metric}: {model} − {other}{low} ≥ {bound.plus:g}"
    plus = f" {'+' if bound.plus > 0 else '−'} {abs(bound.plus):g}" if bound.plus else ""
    return f"{subject} ≥ {other}{plus}"
