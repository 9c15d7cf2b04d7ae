"""`--verify auto`: components are really replaced until the best k are known at a stated confidence, and no longer.

The screen orders the components of one kind; replacing one (weight patching, arXiv 2604.13694 §III-C) is what costs. Each round
replaces the next best by the screen and an audit of the rest, which shows what the screen misses: half of it drawn evenly, half
with a chance of 1 / place in the screen's order, since a screen that errs by factors misses most not far below its best. The
stopping rule is ours. It ends when

    P(one that was not replaced would measure above the k-th best by more than the zone) ≤ (1 − confidence) / 2,

by the law of residuals (`residual_law`) fitted to the audited ones and to as many of those just above the screen's cut, and not
less than by the count of such in the even half: one outlier that it held stands for as many more as its share of the rest. The
*zone of indifference* is what the prompts leave open: with probability 1 − (1 − confidence) / 2 over the draw of prompts
(bootstrap over topics, expanded for their number) none that was replaced and left out is better by more than the zone than the
least of the k. Ties within it cannot be told apart by replacing more components, only by more prompts, and do not keep the loop
going.

What rests on the law is called modelled, and it can be wrong: a few components that do much and of which the screen says
nothing are most likely in no sample, so no law knows of them. Beside it stands a bound that rests on the even draw alone
(`missed_high`); `assured` makes the loop go on until that bound is met too, which takes nearly all components where it is 0.

Shapes: N components, m of them replaced, n prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from mechmerge.artifacts import Document
from mechmerge.errors import LocalizeError
from mechmerge.intervals import levels
from mechmerge.localize.residual_law import ResidualLaw, most_left

Array = np.ndarray
Measure = Callable[[list[int]], Array]
"""Flat indices into the screen → sufficiency on each prompt, [len, n]."""
RESAMPLES = 1000
LEAST_AUDIT = 24
"""Components drawn evenly below the cut that a law needs. The first round draws √N where that is more, and as many again in
the spread half: with 24 of 5000, one simulated search in five ended too early, with √N one in fifty.
"""
GROWTH = 4
"""A round replaces a quarter of what was replaced before, or a batch if that is more: few rounds, little overshoot."""


class VerificationRecord(Document):
    """How far the best k components of one kind are known."""

    k: int
    """Size of the set that was looked for."""
    confidence: float
    """Stated confidence, 0 … 1."""
    components: int
    """Components of the kind below the anchor."""
    measured: int
    """Of them, those that were really replaced."""
    audited: int
    """Of those, the ones that were drawn (the audit)."""
    rounds: int
    """Rounds of replacing."""
    stable: bool
    """Whether the best k are known at the stated confidence, up to the zone."""
    basis: Literal["all", "model", "none"]
    """What that rests on: `all` were replaced, the `model` of what the screen leaves open, or `none` where it is not stable."""
    reached: float
    """1 − the modelled probability that one not replaced belongs among the best k by more than the zone − half of
    (1 − confidence), which the zone takes; 0 … 1.
    """
    zone: float
    """Zone of indifference, in the units of the scores, ≥ 0: what none left out is better by than the least of the k."""
    contenders: int
    """Components replaced that lie within the zone of the boundary, on either side."""
    missed: float
    """Expected number of true best k that were not replaced, by the model, 0 … k."""
    missed_high: int
    """Upper bound of that number at the stated confidence by the even draw alone, 0 … k; needs no model."""
    recall: float
    """Share of the best k that the screen's own k best hold, 0 … 1."""
    recall_low: float
    """Lower end at the stated confidence: bootstrap over topics, less what the model says may have been missed."""
    recall_high: float
    """Upper end: bootstrap over topics."""
    recall_sure: float
    """The lower end by the even draw alone: bootstrap over topics, less `missed_high`; needs no model."""
    assured: int | None
    """What `missed_high` had to come down to; None where the model was enough."""
    prompts: int
    """Prompts that components were measured on."""
    topics: int
    """Topics of those prompts, which the bootstrap draws."""
    seed: int
    """Of the audit and the bootstrap."""

    @property
    def sentence(self) -> str:
        """What is known, in one line."""
        how = {
            "all": "all were replaced",
            "model": f"by the model of what the screen leaves open; by the draw alone, at most {self.missed_high} missed",
            "none": f"stopped at a confidence of {self.reached:.2f}, at most {self.missed_high} missed by the draw alone",
        }[self.basis]
        state = "stable" if self.stable else "NOT stable"
        return (
            f"best {self.k} {state} at {self.confidence:g} ({how}; {self.measured} of {self.components} replaced, "
            f"{self.contenders} within {self.zone:.2g} of the boundary); the screen's own best {self.k} hold "
            f"{100 * self.recall:.0f} % of them ({100 * self.recall_low:.0f} … {100 * self.recall_high:.0f} %; "
            f"by the draw alone ≥ {100 * self.recall_sure:.0f} %)"
        )


class Verified(NamedTuple):
    """What was replaced, and what is known by it."""

    indices: Array
    """Flat indices into the screen, [m], in the order of replacing."""
    values: Array
    """Sufficiency of each on each prompt, [m, n]."""
    best: Array
    """Flat indices of the best k, [k], best first."""
    record: VerificationRecord


def verify(
    screen: Array,
    measure: Measure,
    k: int,
    *,
    confidence: float = 0.95,
    batch: int = 32,
    limit: int | None = None,
    assured: int | None = None,
    topics: Sequence[str] | None = None,
    seed: int = 0,
) -> Verified:
    """Replaces components until the best k are known.

    Args:
        screen: the screen's mean scores, [layers below the anchor, units] or any shape; indices are flat ones.
        measure: replaces components; called with each index once.
        k: how many best ones are looked for; all where there are no more.
        confidence: between 0 and 1.
        batch: least number of components a round, half of them by the screen and half drawn.
        limit: most components to replace; None: all of them.
        assured: most of the true best k that may be missed whatever the law of residuals is, at the stated confidence; None:
            the law is relied on. Small kinds can afford it.
        topics: topic of each prompt; None: each prompt is its own.
        seed: of the audit and the bootstrap. The same seed and the same values give the same result.

    Raises:
        LocalizeError: fewer than two topics, or a measurement that is not a number or not [len, n].
        ValueError: a setting out of its range.
    """
    flat = np.asarray(screen, float).ravel()
    if not (0 < confidence < 1 and k >= 1 and batch >= 2 and flat.size and (limit is None or limit >= 1)):
        raise ValueError("verify: 0 < confidence < 1, k ≥ 1, batch ≥ 2, limit ≥ 1 and at least one component are needed")
    if assured is not None and assured < 0:
        raise ValueError("verify: assured ≥ 0 is needed")
    if not np.isfinite(flat).all():
        raise LocalizeError("verification", expected="a finite screen", found="NaN", fix="try --dtype float32")
    search = _Search(flat, measure, min(k, flat.size), confidence, assured, seed, topics)
    most = flat.size if limit is None else min(limit, flat.size)
    # The screen's own best are always replaced: its recall is counted on them.
    first = max(2 * search.k, batch // 2)
    search.round(min(first, most), min(2 * search.least, max(0, most - first)))
    while len(search.order) < most and not search.settled():
        size = min(max(batch, len(search.order) // GROWTH), most - len(search.order))
        search.round(size - size // 2, size // 2)
    return search.result()


class _Search:
    """The state of one verification."""

    def __init__(
        self,
        screen: Array,
        measure: Measure,
        k: int,
        confidence: float,
        assured: int | None,
        seed: int,
        topics: Sequence[str] | None,
    ) -> None:
        self.screen, self.measure, self.k, self.confidence, self.seed = screen, measure, k, confidence, seed
        self.assured, self.topics = assured, topics
        self.ranked = np.argsort(-screen, kind="stable")
        draw = np.random.default_rng([seed, 1])
        self.even = draw.permutation(screen.size)
        """All components in the order in which they are drawn evenly."""
        self.least = max(LEAST_AUDIT, round(screen.size**0.5))
        self.drawn = 0
        """How many of `even` have been gone through; all of them are replaced."""
        self.spread = draw.random(screen.size)
        self.order: list[int] = []
        self.rows: list[Array] = []
        self.open = np.ones(screen.size, bool)
        self.audited = np.zeros(screen.size, bool)
        self.rounds = 0

    # -------------------------------------------------------------------------------------------------------------- rounds
    def round(self, by_screen: int, by_draw: int) -> None:
        """Replaces the next best by the screen and then some of the rest at random."""
        best = self.ranked[self.open[self.ranked]][:by_screen].tolist()
        self.open[best] = False
        drawn: list[int] = []
        while len(drawn) < by_draw - by_draw // 2 and self.drawn < self.screen.size:
            i = int(self.even[self.drawn])
            self.drawn += 1
            if self.open[i]:
                self.open[i] = False
                drawn.append(i)
        rest = self.ranked[self.open[self.ranked]]
        # The largest of u^(1 / weight) are a weighted draw without replacement (Efraimidis and Spirakis, 2006).
        places = np.arange(1, len(rest) + 1)
        drawn += rest[np.argsort(np.log(self.spread[rest]) * places, kind="stable")[::-1][: by_draw // 2]].tolist()
        self.open[drawn] = False
        self.audited[drawn] = True
        chosen = best + drawn
        values = np.asarray(self.measure(chosen), float)
        if values.ndim != 2 or len(values) != len(chosen) or not np.isfinite(values).all():
            found = f"shape {list(values.shape)}" if values.ndim != 2 or len(values) != len(chosen) else "NaN"
            raise LocalizeError("verification", expected=f"finite scores [{len(chosen)}, prompts]", found=found)
        if len(self._groups(values.shape[1])[1]) < 2:
            raise LocalizeError("verification", expected="prompts on at least 2 topics", found="one")
        self.order += chosen
        self.rows.append(values)
        self.rounds += 1

    def settled(self) -> bool:
        """Whether nothing that was not replaced belongs among the best k, at the stated confidence."""
        return self._sure() and self._beaten(self._level() + self._zone()) <= (1 - self.confidence) / 2

    def _sure(self) -> bool:
        """Whether the even draw alone leaves few enough missed; True where nothing was asked of it."""
        return len(self.order) >= self.k and (self.assured is None or self._missed_high() <= self.assured)

    # ---------------------------------------------------------------------------------------------------------- components
    def _means(self) -> Array:
        return np.concatenate([values.mean(1) for values in self.rows])

    def _best(self, means: Array) -> Array:
        return np.argsort(-means, kind="stable")[: self.k]

    def _level(self) -> float:
        """The k-th best mean."""
        means = self._means()
        return float(means[self._best(means)[-1]])

    def _law(self) -> ResidualLaw | None:
        """The law for those not replaced; None where too few were audited for one."""
        cut = self._below()
        order = np.array(self.order)
        if len(self._sample()) < LEAST_AUDIT:
            return None
        sample = np.flatnonzero(cut[order])
        near = [place for place, i in enumerate(order) if not cut[i]]
        near = sorted(near, key=lambda place: self.screen[order[place]])[: len(sample)]
        used = np.concatenate([sample, np.array(near, int)])
        return ResidualLaw(self.screen[order[used]], self._means()[used])

    def _below(self) -> Array:
        """Whether each component comes after all that the screen's order has reached."""
        place = np.empty(self.screen.size, int)
        place[self.ranked] = np.arange(self.screen.size)
        reached = [place[i] for i in self.order if not self.audited[i]]
        return place > max(reached, default=-1)

    def _beaten(self, level: float) -> float:
        """Probability that one not replaced would measure above a level."""
        if not self.open.any():
            return 0.0
        law, sample = self._law(), self._sample()
        if law is None:
            return 1.0
        # A law of most may take an outlier for a freak of its tail; a plain sample that held some says how many are left.
        found = (self._means()[np.isin(np.array(self.order), sample)] > level).sum()
        counted = float(found) / len(sample) * int(self.open.sum())
        return max(law.any_above(self.screen[self.open], level), float(-np.expm1(-counted)))

    def _sample(self) -> Array:
        """What came up first in the even order, below the cut: a plain random sample of all there."""
        first = self.even[: self.drawn]
        return np.asarray(first[self._below()[first]])

    # ------------------------------------------------------------------------------------------------------------- prompts
    def _groups(self, n: int) -> tuple[Array, list[str]]:
        names = [str(i) for i in range(n)] if self.topics is None else list(self.topics)
        if len(names) != n:
            raise LocalizeError("verification", expected=f"a topic for each of {n} prompts", found=str(len(names)))
        known = list(dict.fromkeys(names))
        return np.array([known.index(name) for name in names]), known

    def _resampled(self) -> Array:
        """Means of the components replaced over resamples of the topics, [RESAMPLES, m]."""
        values = np.concatenate(self.rows)
        group, known = self._groups(values.shape[1])
        member = np.eye(len(known))[group]
        times = np.random.default_rng([self.seed, 2]).multinomial(
            len(known), np.full(len(known), 1 / len(known)), size=RESAMPLES
        )
        return np.asarray(times @ (values @ member).T / (times @ member.sum(0))[:, None])

    def _tail(self, tail: float) -> float:
        """A quantile's level, expanded for the number of topics."""
        return levels(len(self._groups(self.rows[0].shape[1])[1]), tail)[0]

    def _zone(self) -> float:
        means = self._means()
        best = self._best(means)
        others = np.setdiff1d(np.arange(len(means)), best)
        if not others.size:
            return 0.0
        drawn = self._resampled()
        ahead = drawn[:, others].max(1) - drawn[:, best].min(1)
        return max(0.0, float(np.quantile(ahead, 1 - self._tail((1 - self.confidence) / 2))))

    # -------------------------------------------------------------------------------------------------------------- result
    def _missed_high(self) -> int:
        """Most of the true best k that were not replaced, by the even draw alone."""
        if not self.open.any():
            return 0
        cut, sample = self._below(), self._sample()
        # A true one in the sample is among the best k of those replaced, so no fewer than the true ones are counted.
        found = int(np.isin(np.array(self.order)[self._best(self._means())], sample).sum())
        return min(self.k, most_left(found, len(sample), int(cut.sum()) - len(sample), 1 - self.confidence))

    def _missed(self, level: float) -> tuple[float, int]:
        """True best k that were not replaced, by the law: expected, and most."""
        left = int(self.open.sum())
        law = self._law() if left else None
        if law is None:
            return float(min(self.k, left)), min(self.k, left)
        expected, weight = law.exceeding(self.screen[self.open], level)
        most = law.most_above(self.screen[self.open], level, (1 - self.confidence) / 2)
        return float(weight @ np.minimum(expected, self.k)), min(self.k, most)

    def result(self) -> Verified:
        """The result as it stands."""
        order, means = np.array(self.order), self._means()
        best, level, zone = self._best(means), self._level(), self._zone()
        half = (1 - self.confidence) / 2
        beaten, bound = self._beaten(level + zone), self._missed_high()
        stable = self._sure() and beaten <= half
        basis: Literal["all", "model", "none"] = "none" if not stable else "model" if self.open.any() else "all"
        missed, modelled = self._missed(level)
        own = np.isin(order, self.ranked[: self.k])
        recall = float(own[best].sum() / self.k)
        shares = np.array([own[self._best(row)].sum() / self.k for row in self._resampled()])
        tail = self._tail(half)
        low, high = (float(np.quantile(shares, at)) for at in (tail, 1 - tail))
        low, high = min(low, recall), max(high, recall)
        topics = len(self._groups(self.rows[0].shape[1])[1])
        record = VerificationRecord(
            k=self.k,
            confidence=self.confidence,
            components=self.screen.size,
            measured=len(order),
            audited=int(self.audited.sum()),
            rounds=self.rounds,
            stable=stable,
            basis=basis,
            reached=min(1.0, max(0.0, 1 - half - beaten)),
            zone=zone,
            contenders=int((np.abs(means - level) <= zone).sum()),
            missed=missed,
            missed_high=bound,
            recall=recall,
            recall_low=max(0.0, low - modelled / self.k),
            recall_high=high,
            recall_sure=max(0.0, low - bound / self.k),
            assured=self.assured,
            prompts=self.rows[0].shape[1],
            topics=topics,
            seed=self.seed,
        )
        return Verified(order, np.concatenate(self.rows), order[best], record)
