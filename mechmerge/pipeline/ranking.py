"""How merges are ranked where one is chosen, by `sweep` and `tune` alike: by the gate first, then by the headline metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from mechmerge.evaluate.gate import Gate, GateResult, check_gate
from mechmerge.evaluate.record import Evaluation
from mechmerge.models.references import ModelId


class Judged(NamedTuple):
    """A merge under a gate."""

    gate: GateResult
    metrics: dict[str, float]
    """Headline metrics by flat name."""

    @property
    def missing(self) -> float:
        """What is missing to the failed rules, together, in points of 1; a rule that could not be checked counts as 1."""
        return sum(1.0 if rule.short_by is None else rule.short_by for rule in self.gate.failed)

    @property
    def mean(self) -> float:
        """Mean of the headline metrics."""
        return sum(self.metrics.values()) / len(self.metrics)

    @property
    def quality(self) -> float:
        """One number to search by: the mean of the headline metrics, less what is missing to the gate's rules."""
        return self.mean - self.missing

    @property
    def order(self) -> tuple[int, float, float]:
        """Ascending, best first: rules failed, then what is missing, then the mean."""
        return len(self.gate.failed), self.missing, -self.mean


def judged(evaluation: Evaluation, gate: Gate, name: str, ids: Mapping[str, ModelId]) -> Judged:
    """Judges a model by every rule that names no model but the gate's own.

    Args:
        evaluation: what was measured.
        gate: the pipeline's.
        name: the merge.
        ids: the weights that are to be judged, by name.
    """
    rules = tuple(rule.model_copy(update={"model": None}) if rule.model == gate.model else rule for rule in gate.rules)
    known = evaluation.metrics(name)
    heads = {flat: known[flat].value for suite in evaluation.suites.values() for flat in suite.headlines if flat in known}
    return Judged(check_gate(evaluation, Gate(model=name, rules=rules), name, weights=ids), heads)
