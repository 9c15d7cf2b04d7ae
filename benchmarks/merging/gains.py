"""Retained gains with their intervals: over the topics of the prompts, the seeds of the experts, and draws of a control.

    retained(expert) = (merged − base) / (expert − base)       on the expert's own suite, 0 the base's, 1 the expert's

For each seed of a family's experts, `mean` and `min` are those over its experts; what is reported is their average over seeds.

Topics are shared by all seeds, models and (where suites share them) skills: a resample draws topics once for all of them, so
differences are paired (cluster bootstrap: Davison and Hinkley 1997, §3.8; levels expanded as in mechmerge/intervals.py). Where
a role is played by several models (shuffles of a recipe), these are drawn as well; a handful that is drawn from itself varies
too little, so what they add is enlarged to an unbiased variance, and on one seed by a t quantile. Seeds are few, and resampling
three of them cannot leave their range; so their error is a t interval of its own, and the two are joined by adding the squares
of their arms (Zou and Donner, Statistics in Medicine 27, 1693-1702, 2008). One seed says nothing of others: its interval is the
topics' (and a control's draws'); and one topic says nothing at all. Where every topic says the same (all fail), resamples do
not vary and the interval has no width: the evaluation files hold the exact one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mechmerge.evaluate.columns import Column
from mechmerge.evaluate.record import Evaluation
from mechmerge.evaluate.resampling import Layout
from mechmerge.evaluate.statistics import Interval
from mechmerge.evaluate.suites import Suite
from mechmerge.intervals import TAIL, levels

Array = NDArray[np.float64]
Answers = Mapping[str, Column]
"""Outcomes of one model by skill."""
RESAMPLES = 4000
LEAST_GAIN = 1e-3
"""An expert's gain below this counts as this: a resample (or a dozen prompts) may have none, and shares must stay finite."""


class Figure(NamedTuple):
    """A quantity with its interval."""

    interval: Interval
    seeds: int
    """Seeds that it is averaged over."""
    by_seed: tuple[float, ...]

    @property
    def over(self) -> str:
        """What its interval is over: one seed says nothing of others."""
        return "topics and seeds" if self.seeds > 1 else "topics (and draws), one seed"

    @property
    def told(self) -> str:
        """The quantity with its interval, and what that rests on."""
        return f"{self} seeds={self.seeds}" + ("" if self.seeds > 1 else " (interval over topics (and draws))")

    def __str__(self) -> str:
        return f"{self.interval.value:.3f} [{self.interval.low:.3f}, {self.interval.high:.3f}]"


def pooled(evaluation: Evaluation, model: str, suite: Suite) -> Column:
    """All prompts of a suite as one column, whatever their tier, in the order of the suite, with the evaluation's verdicts.

    Raises:
        ValueError: the evaluation is of another suite.
    """
    if evaluation.suites[suite.name].digest != suite.digest:
        raise ValueError(f"{model}: {suite.name} was asked with other prompts")
    held = {}
    for tier, at in (("seen", ""), ("unseen", "@unseen"), ("hard", "@hard")):
        if any(prompt.tier == tier for prompt in suite.prompts):
            held[tier] = iter(evaluation.column(model, f"{suite.name}{at}").values)
    values = [next(held[prompt.tier]) for prompt in suite.prompts]
    assert all(next(rest, None) is None for rest in held.values())
    return Column(values, [prompt.cluster for prompt in suite.prompts], [prompt.group for prompt in suite.prompts])


def rate(column: Column) -> float:
    """The mean over groups of the groups' means."""
    return Layout(column).mean(column.values)


def plain_retained(merged: Answers, base: Answers, experts: Mapping[str, Answers]) -> dict[str, float]:
    """Retained gain of each skill, without intervals."""
    return {
        skill: (rate(merged[skill]) - rate(base[skill])) / max(rate(expert[skill]) - rate(base[skill]), LEAST_GAIN)
        for skill, expert in experts.items()
    }


class Draws:
    """Values under every resample: float [1 + resamples, seeds], the first row without resampling."""

    def __init__(self, values: Array, clusters: int) -> None:
        self.values, self.clusters = values, clusters

    def __sub__(self, other: Draws) -> Draws:
        return Draws(self.values - other.values, min(self.clusters, other.clusters))

    def figure(self) -> Figure:
        """The average over seeds with its 95 % interval."""
        own = self.values[0]
        value = float(own.mean())
        if self.clusters < 2:
            return Figure(Interval(value, -np.inf, np.inf), len(own), tuple(float(v) for v in own))
        averages = self.values[1:].mean(1)
        low, high = (float(end) for end in np.quantile(averages, levels(self.clusters)))
        low, high = min(low, value), max(high, value)
        if len(own) > 1:
            arm = _t(len(own) - 1) * float(own.std(ddof=1)) / len(own) ** 0.5
            low, high = value - float(np.hypot(value - low, arm)), value + float(np.hypot(high - value, arm))
        return Figure(Interval(value, low, high), len(own), tuple(float(v) for v in own))


class Board:
    """The answers of every model of a family.

    Args:
        cells: (role, seed) → the models that play a role with the experts of a seed: one, or several draws of a control. The
            roles `base` and the names of the skills (their experts) are needed for each seed.
        skills: names of the skills, each the name of its expert's role too.
        resamples: number of resamples.
        seed: of the resamples.
    """

    def __init__(
        self,
        cells: Mapping[tuple[str, int], Sequence[Answers]],
        skills: Sequence[str],
        resamples: int = RESAMPLES,
        seed: int = 0,
    ) -> None:
        self.cells, self.skills, self.resamples, self.seed = cells, tuple(skills), resamples, seed
        first = next(iter(cells.values()))[0]
        self._layouts = {skill: Layout(first[skill]) for skill in self.skills}
        self._weights, self.clusters = self._draw(first)
        self._kept: dict[tuple[str, int, str], Array] = {}
        every = sorted({seed for _, seed in cells})
        self.whole = tuple(s for s in every if all((role, s) in cells for role in ("base", *self.skills)))
        """Seeds whose base and experts have answered."""
        self.unclear = tuple((s, skill) for s in self.whole for skill in self.skills if not self._gains(s, skill))
        """Seeds and skills whose expert's gain is not clearly above 0: a share of it is not defined, and the seed left out."""

    def _gains(self, seed: int, skill: str) -> bool:
        gain = self.rates(skill, seed, skill) - self.rates("base", seed, skill)
        return Draws(gain, self.clusters[skill]).figure().interval.low > 0

    def seeds(self, *roles: str) -> tuple[int, ...]:
        """Seeds in which the base, the experts (with a clear gain) and all of these roles have answered."""
        left = {seed for seed, _ in self.unclear}
        return tuple(s for s in self.whole if s not in left and all((role, s) in self.cells for role in roles))

    def rates(self, role: str, seed: int, skill: str) -> Array:
        """Pass rate of each model of a role under every resample, [1 + resamples, models]."""
        key = (role, seed, skill)
        if key not in self._kept:
            layout, weights = self._layouts[skill], self._weights[skill]
            counts = weights @ layout.counts
            found = [_mean_of_groups(weights @ layout.sums(a[skill].values), counts) for a in self.cells[role, seed]]
            self._kept[key] = np.stack(found, 1)
        return self._kept[key]

    def gain(self, role: str, over: str, seeds: Sequence[int]) -> Draws:
        """Retained gain of a role, for one of several models their mean.

        Args:
            role: whose.
            over: a skill, or `mean` or `min` over all of them.
            seeds: of the experts; see `seeds`.
        """
        skills = self.skills if over in ("mean", "min") else (over,)
        columns = []
        for seed in seeds:
            shares = []
            for skill in skills:
                base = self.rates("base", seed, skill)
                gained = np.maximum(self.rates(skill, seed, skill) - base, LEAST_GAIN)
                shares.append((self.rates(role, seed, skill) - base) / gained)
            stacked = np.stack(shares)  # [skills, 1 + resamples, models]
            values, clusters = stacked.min(0) if over == "min" else stacked.mean(0), min(self.clusters[s] for s in skills)
            columns.append(self._drawn(values, role, seed, clusters if len(seeds) == 1 else None))
        return Draws(np.stack(columns, 1), min(self.clusters[skill] for skill in skills))

    def _drawn(self, values: Array, role: str, seed: int, alone: int | None) -> Array:
        """The mean over models, in each resample over as many drawn of them: [1 + resamples].

        Args:
            values: [1 + resamples, models].
            role: whose.
            seed: of the experts.
            alone: the number of clusters, whose quantile the interval will have, where there is no other seed.
        """
        rows, models = values.shape
        share = np.full((rows, models), 1 / models)
        if models > 1:
            generator = np.random.default_rng([self.seed, seed, *role.encode()])
            wider = (models / (models - 1)) ** 0.5
            if alone is not None and alone > 1:
                wider *= max(1.0, _t(models - 1) / _t(alone - 1))
            share[1:] += wider * (generator.multinomial(models, share[0], size=rows - 1) / models - share[1:])
        return np.asarray((values * share).sum(1))

    def difference(self, role: str, other: str, over: str) -> Figure | None:
        """How much more of the gain a role retains than another, over the seeds that both have; None where there is none."""
        seeds = self.seeds(role, other)
        return (self.gain(role, over, seeds) - self.gain(other, over, seeds)).figure() if seeds else None

    def retained(self, role: str, over: str) -> Figure | None:
        """Retained gain of a role over all its seeds; None where it has none."""
        seeds = self.seeds(role)
        return self.gain(role, over, seeds).figure() if seeds else None

    def level(self, role: str, skill: str) -> Figure | None:
        """Pass rate of a role over all its seeds."""
        seeds = [s for s in self.whole if (role, s) in self.cells]
        if not seeds:
            return None
        alone = self.clusters[skill] if len(seeds) == 1 else None
        drawn = [self._drawn(self.rates(role, s, skill), role, s, alone) for s in seeds]
        return Draws(np.stack(drawn, 1), self.clusters[skill]).figure()

    def _draw(self, answers: Answers) -> tuple[dict[str, Array], dict[str, int]]:
        """How often each cluster of a skill is drawn, [1 + resamples, clusters]; skills that share topics share their draws."""
        names = {skill: list(dict.fromkeys(answers[skill].clusters)) for skill in self.skills}
        strata: list[dict[str, int]] = []
        for own in names.values():
            stratum = next((known for known in strata if known.keys() & set(own)), None)
            if stratum is None:
                strata.append(stratum := {})
            for name in own:
                stratum.setdefault(name, len(stratum))
        generator = np.random.default_rng(self.seed)
        drawn = [generator.multinomial(len(s), np.full(len(s), 1 / len(s)), size=self.resamples) for s in strata]
        weights: dict[str, Array] = {}
        for skill, own in names.items():
            place = next(i for i, stratum in enumerate(strata) if own[0] in stratum)
            chosen = drawn[place][:, [strata[place][name] for name in own]].astype(np.float64)
            weights[skill] = np.concatenate([np.ones((1, len(own))), chosen])
        return weights, {skill: len(own) for skill, own in names.items()}


def _mean_of_groups(sums: Array, counts: Array) -> Array:
    """Mean over groups (the last axis) of their means; a group without units is left out."""
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return np.asarray(np.nanmean(means, axis=-1))


def _t(freedom: int) -> float:
    """The t quantile of a 95 % interval."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 1 - TAIL))
