"""What a metric is computed from: one outcome a unit (a prompt, or one of its instructions), with its cluster and group."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Column(NamedTuple):
    """The outcomes of one metric, in an order that is the same for every model; all lists have one length."""

    values: list[float]
    """0 … 1; 1.0 and 0.0 where a unit passes or fails."""
    clusters: list[str]
    """What is resampled: units of one cluster (a topic, or a prompt with several instructions) are not independent."""
    groups: list[str]
    """The metric is the mean over groups of the groups' means; one group makes it a plain mean."""
    over: Literal["mean", "min"] = "mean"
    """How groups are combined; `min` is the worst group."""
    headline: bool = False
    """Whether tables and paired tests show it among the first."""
