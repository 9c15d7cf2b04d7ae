"""The gate: rules that an evaluation must satisfy before a merge is accepted.

    model: conflict                                             # the default for rules that name none
    rules:
      - {metric: formats, at_least: {model: base, plus: 0.20}}
      - {metric: arithmetic, at_least: {model: arithmetic, times: 0.8}, use: low}
      - {metric: formats.min, at_least: 0.3}

A metric or model that the evaluation does not hold refuses: what was not measured was not shown.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mechmerge.artifacts import Document
from mechmerge.errors import InputError
from mechmerge.evaluate.record import Evaluation

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


class Rule(Document):
    """One metric that must reach a bound."""

    metric: str
    """A flat name of the evaluation, such as `formats`, `formats.min` or `arithmetic@unseen`."""
    model: str | None = None
    """The model judged (default: the gate's)."""
    at_least: Annotated[float, Field(ge=0, le=1)] | Bound
    use: Literal["value", "low"] = "value"
    """What must reach the bound: the value, or the lower end of its 95 % interval (`on` would be true in YAML)."""


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
    problem: str | None = None
    """Why the rule could not be checked."""

    @property
    def line(self) -> str:
        """One line for the terminal."""
        if self.problem:
            return f"REFUSED {self.rule}: {self.problem}"
        numbers = f"found {self.found:.3f}, needed {self.bound:.3f}"
        return (
            f"passed  {self.rule}: {numbers}"
            if self.passed
            else f"FAILED  {self.rule}: {numbers}, short by {self.short_by:.3f}"
        )


class GateResult(Document):
    """What a gate said about an evaluation."""

    schema_version: Literal[1] = 1
    passed: bool
    rules: tuple[RuleResult, ...]

    @property
    def failed(self) -> tuple[RuleResult, ...]:
        """The rules that refused."""
        return tuple(rule for rule in self.rules if not rule.passed)


def check_gate(evaluation: Evaluation, gate: Gate, model: str | None = None) -> GateResult:
    """Checks every rule of a gate.

    Args:
        evaluation: what was measured.
        gate: the rules.
        model: the model judged by rules that name none (default: the gate's own).

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
        results.append(_check(evaluation, rule, name))
    return GateResult(passed=all(result.passed for result in results), rules=tuple(results))


def _check(evaluation: Evaluation, rule: Rule, model: str) -> RuleResult:
    words = _words(rule, model)
    try:
        metric = evaluation.metric(model, rule.metric)
        bound = rule.at_least
        if isinstance(bound, Bound):
            bound = bound.times * evaluation.metric(bound.model, bound.metric or rule.metric).value + bound.plus
    except InputError as error:
        return RuleResult(rule=words, model=model, metric=rule.metric, passed=False, problem=str(error))
    found = metric.low if rule.use == "low" else metric.value
    short = 0.0 if found >= bound - TOLERANCE else bound - found
    return RuleResult(
        rule=words, model=model, metric=rule.metric, passed=short == 0.0, found=found, bound=bound, short_by=short
    )


def _words(rule: Rule, model: str) -> str:
    subject = f"{rule.metric} of {model}" + (" (lower end)" if rule.use == "low" else "")
    bound = rule.at_least
    if not isinstance(bound, Bound):
        return f"{subject} ≥ {bound:g}"
    other = f"{bound.model}" + (f"'s {bound.metric}" if bound.metric else "")
    times = f"{bound.times:g} × " if bound.times != 1 else ""
    plus = f" {'+' if bound.plus > 0 else '−'} {abs(bound.plus):g}" if bound.plus else ""
    return f"{subject} ≥ {times}{other}{plus}"
