"""Set curves: growing sets of the expert's components in the base, beside random and magnitude sets of the same size.

Weight patching of sets (arXiv 2604.13694 §III-C, IV-C) with the checks that stand beside recovery: the KL divergence of the
next-token distribution from the expert's over the expert's own greedy answers, and the verifier's pass rate. Every set is
really written into the base and undone to the bit. Recovery is measured at every point; what runs the whole model is measured
at some shares alone (ours; 5, 20 and 100 % unless told otherwise): KL of every order, pass rates of the score order and of one
random order.

The prompts are of topics that neither made the anchor nor scored the components, where the behaviour has enough of them; else
those that scored the components. Points are units of their own, so an interrupted call goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mechmerge.errors import LocalizeError
from mechmerge.localize.anchor import mean_low
from mechmerge.localize.curve_bench import CurveBench, Point, rate
from mechmerge.localize.curve_record import MIN_TOPICS, CurvePoint, Lift, SetCurve, SetCurves
from mechmerge.localize.curve_sets import SHARES, Order, Sets, advantage, area, counts, set_orders
from mechmerge.localize.scores import ScoreFile
from mechmerge.progress import Progress

Array = np.ndarray


def fresh_prompts(topics: Sequence[str], used: int, count: int) -> list[int]:
    """Prompts that neither made the anchor nor scored components; none where they are of too few topics for a verdict.

    Args:
        topics: topic of each prompt of the behaviour.
        used: how many topics, from the first, the anchor and the scores have taken.
        count: most topics to take.
    """
    fresh = list(dict.fromkeys(topics))[used : used + count]
    return [i for i, topic in enumerate(topics) if topic in fresh] if len(fresh) >= min(count, MIN_TOPICS) else []


def measure_curves(
    bench: CurveBench,
    file: ScoreFile,
    seeds: Sequence[int],
    output_shares: Sequence[float],
    unseen: bool,
    seed: int,
    progress: Progress,
) -> SetCurves:
    """Measures the set curves of a score file.

    Args:
        bench: the base, the expert and the prompts.
        file: the scores that order the components.
        seeds: one random order each, at least two.
        output_shares: those of `SHARES` at which KL and pass rates are measured.
        unseen: whether the scores have not seen the bench's prompts.
        seed: of the bootstrap.
        progress: told of every point.

    Raises:
        LocalizeError: a state or a divergence is not a number.
    """
    name = f"behaviour {file.metadata.behavior}: set curves"
    orders = set_orders(file, seeds)
    progress.start(f"{file.metadata.behavior}: set curves beside their controls", 2 + (len(SHARES) - 1) * len(orders))
    try:
        expert = bench.expert_state  # first: it needs the bench's weights for itself
        base = bench.point("base", kl=True, answers=True, reach=lambda: None)
        progress.advance()
        measured: dict[Order, list[Point]] = {}
        for order, sets in orders.items():
            label = "-".join(str(part) for part in order if part is not None)
            answers = order in (("score", None), ("random", seeds[0]))
            wanted = [(share in output_shares, answers and share in output_shares) for share in SHARES]
            # All orders end with the same set, which the score order, the first, measures.
            end = measured["score", None][-1:] if measured else []
            points = bench.walk(label, sets, wanted[: len(SHARES) - len(end)], progress.advance)
            measured[order] = [base, *points, *end]
    finally:
        progress.end()
    found = [
        value for points in measured.values() for point in points for value in (point.state, point.kl) if value is not None
    ]
    if not all(np.isfinite(value).all() for value in (expert, *found)):
        raise LocalizeError(name, expected="finite states and divergences", found="NaN", fix="try --dtype float32")
    return _Said(file, bench, orders, measured, seed).record(unseen)


class _Said:
    """What the points say together."""

    def __init__(
        self,
        file: ScoreFile,
        bench: CurveBench,
        orders: Mapping[Order, Sets],
        measured: Mapping[Order, Sequence[Point]],
        seed: int,
    ) -> None:
        self.file, self.bench, self.orders, self.measured, self.seed = file, bench, orders, measured, seed
        self.tokens = bench.expert.tokens
        states = np.stack([[point.state for point in points] for points in measured.values()])
        self.changes = states - states[0, 0]
        """[orders, points, n], the base first; the score order first and the magnitude order last."""
        self.gaps = bench.expert_state - states[0, 0]
        # A recovery needs a gap on the scores' prompts and on these.
        self.recovers = file.metadata.scale == "recovery" and mean_low(self.gaps, bench.asked.topics, seed) > 0
        self.unit = float(self.gaps.mean()) if self.recovers else 1.0

    def record(self, unseen: bool) -> SetCurves:
        """The record of the curves."""
        counted = np.minimum(self.changes, self.gaps) if self.recovers else self.changes
        areas, topics = area(counted / self.unit), self.bench.asked.topics
        weights = np.ones(len(topics))
        lift = advantage(areas[0] - areas[1:-1], weights, topics, self.seed)
        magnitude = advantage(areas[0] - areas[-1:], weights, topics, self.seed)
        curves = tuple(
            self._curve(order, values) for order, values in zip(self.measured, self.changes / self.unit, strict=True)
        )
        start = curves[0].points[0]
        enough = len(set(topics)) >= MIN_TOPICS
        return SetCurves(
            curves=curves,
            scale="recovery" if self.recovers else "difference",
            lift=lift.value,
            lift_low=lift.low,
            lift_high=lift.high,
            magnitude_lift=magnitude.value,
            magnitude_lift_low=magnitude.low,
            magnitude_lift_high=magnitude.high,
            above_controls=self.recovers and enough and lift.low > 0 and magnitude.low > 0,
            kl_lift=self._kl_lift([order for order in self.measured if order[0] == "random"]),
            magnitude_kl_lift=self._kl_lift([("magnitude", None)]),
            prompts=len(topics),
            topics=len(set(topics)),
            unseen=unseen,
            base_kl=start.kl,
            base_pass_rate=start.pass_rate,
            expert_pass_rate=rate(self.bench.expert.passed[: len(self.bench.answered.pairs)]),
        )

    def _kl_lift(self, controls: Sequence[Order]) -> Lift | None:
        """How much lower the divergence of the score's sets is, mean over the shares between 0 and 1, nats per token."""
        score = self.measured["score", None][1:-1]
        kl = [
            [their.kl - own.kl for own, their in zip(score, self.measured[order][1:-1], strict=True)
             if own.kl is not None and their.kl is not None]
            for order in controls
        ]  # fmt: skip
        if not kl[0]:
            return None
        return advantage(np.array(kl).mean(1), self.tokens, self.bench.asked.topics, self.seed)

    def _curve(self, order: Order, values: Array) -> SetCurve:
        sizes = counts(self.orders[order], self.file.arrays)
        points = tuple(
            CurvePoint(
                share=share,
                components=components,
                parameters=parameters,
                recovery=float(value.mean()),
                kl=None if point.kl is None else float(point.kl.sum() / self.tokens.sum()),
                pass_rate=rate(point.passed),
            )
            for share, (components, parameters), value, point in zip(
                (0.0, *SHARES), sizes, values, self.measured[order], strict=True
            )
        )
        return SetCurve(order=order[0], seed=order[1], points=points)
