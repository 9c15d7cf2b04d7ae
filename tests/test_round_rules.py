"""What a round changes and when rounds end, without any model: losses that are written out, against the rules done by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from mechmerge.errors import LocalizeError
from mechmerge.localize.calibration import BASE, BehaviorRow, Calibration, Example, Point
from mechmerge.localize.proposal import NODES, agreed, drop, everything, per_nat, propose, standard_errors, switch, turned_over
from mechmerge.localize.rounds import RoundSettings, _rounds
from mechmerge.localize.rounds_file import RoundsFile
from mechmerge.models.components import UNIT_KINDS
from tests import measured as samples
from tests.test_generation import Recorder
from tests.test_rounds import behavior

LAYERS, UNITS = 2, {"head": 2, "kv": 1, "neuron": 4}
SIZE = LAYERS * sum(UNITS.values())
"""Components of one expert."""
Flat = np.ndarray
"""Something of every component: [experts, SIZE], or [n, experts, SIZE] by example."""


def flat(point: Point) -> Flat:
    """A point's coefficients, which are one for all of an expert where no units are told."""
    if point.units is None:
        return np.repeat(np.array(point.rest)[:, None], SIZE, 1)
    return np.concatenate([point.units[kind].reshape(len(point.rest), -1) for kind in UNIT_KINDS], 1).astype(float)


def parted(values: Flat) -> dict[str, np.ndarray]:
    """The same by kind, [..., layers, units]."""
    ends = np.cumsum([LAYERS * UNITS[kind] for kind in UNIT_KINDS])[:-1]
    parts = np.split(values, ends, axis=-1)
    return {kind: part.reshape(*values.shape[:-1], LAYERS, -1) for kind, part in zip(UNIT_KINDS, parts, strict=True)}


class Landscape(Calibration):
    """A calibration without models: the loss of every example is a function of the coefficients that is written out.

    Args:
        rows: the behaviours.
        examples: (row, member, half) of each.
        loss: [experts, SIZE] → [n].
        slope: its derivatives, [n, experts, SIZE].
        topics: of the examples; each its own where none are told.
    """

    def __init__(
        self,
        rows: Sequence[BehaviorRow],
        examples: Sequence[tuple[int, int, int]],
        loss: Callable[[Flat], np.ndarray],
        slope: Callable[[Flat], np.ndarray],
        experts: str = "ab",
        topics: Sequence[str] = (),
    ) -> None:
        self.rows, self.loss, self.slope, self.progress = rows, loss, slope, Recorder()
        told = topics or [""] * len(examples)
        self.examples = [Example(*example, prompt=(), topic=topic) for example, topic in zip(examples, told, strict=True)]
        ids = {"a": samples.FIRST, "b": samples.SECOND}
        self.base, self.experts = SimpleNamespace(id=samples.BASE), {name: SimpleNamespace(id=ids[name]) for name in experts}
        arch = SimpleNamespace(layers=LAYERS, units=lambda kind: UNITS[kind])
        layout = SimpleNamespace(unit_parameters=lambda layer, kind, shapes: 1)
        self.checkpoint = SimpleNamespace(arch=arch, layout=layout, shapes={})
        self.measured: list[str] = []

    def losses(self, point: Point, label: str) -> np.ndarray:
        self.measured.append(label)
        return self.loss(flat(point))

    def gradients(self, point: Point, label: str) -> dict[str, np.ndarray]:
        self.measured.append(label)
        return parted(-self.slope(flat(point)).swapaxes(0, 1))

    def by_row(self, values: np.ndarray, half: int | None = None) -> np.ndarray:
        """Every row's mean of values of the examples, written out: of its members' means, [R, ...]."""
        found = []
        for r, row in enumerate(self.rows):
            means = []
            for m in range(len(row.members)):
                own = [i for i, e in enumerate(self.examples) if (e.row, e.member) == (r, m) and half in (None, e.half)]
                means.append(sum(values[i] for i in own) / len(own))
            found.append(sum(means) / len(means))
        return np.array(found)

    def settled(self, rounds: int = 4, certainty: float = 0.0) -> RoundsFile:
        return _rounds(self, RoundSettings(max_rounds=rounds, certainty=certainty))

    def error(self, values: np.ndarray, per: Sequence[float]) -> np.ndarray:
        """The standard error over topics of the weighted sum of the rows' means, written out, [...]."""
        variance = np.zeros(values.shape[1:])
        for r in range(len(self.rows)):
            own = [i for i, example in enumerate(self.examples) if example.row == r]
            means = {
                m: values[[i for i in own if self.examples[i].member == m]].mean(0) for m in range(len(self.rows[r].members))
            }
            members = [sum(self.examples[i].member == m for i in own) for m in range(len(self.rows[r].members))]
            sums: dict[str, np.ndarray] = {}
            for i in own:
                share = 1 / len(members) / members[self.examples[i].member]
                topic = self.examples[i].topic or f"{i}"
                sums[topic] = sums.get(topic, 0) + share * (values[i] - means[self.examples[i].member])
            variance += per[r] ** 2 * len(sums) / (len(sums) - 1) * sum(value**2 for value in sums.values())
        return np.sqrt(variance)


def three_rows() -> list[BehaviorRow]:
    """One behaviour, a group of two, and a protected one."""
    return [
        BehaviorRow("first", (behavior("one"),), "a", weight=1.5),
        BehaviorRow("second", (behavior("two"), behavior("three")), "b"),
        BehaviorRow("own", (behavior("four"),), BASE, weight=0.3),
    ]


EXAMPLES = [
    (0, 0, 0), (0, 0, 0), (0, 0, 1), (0, 0, 1), (0, 0, 1),
    (1, 0, 0), (1, 0, 1), (1, 0, 1), (1, 1, 0), (1, 1, 0), (1, 1, 0), (1, 1, 1),
    (2, 0, 0), (2, 0, 0), (2, 0, 1),
]  # fmt: skip
"""Members and halves have unlike numbers of examples, so a mean of all would be another."""
TOPICS = ("", "", "x", "x", "y", "u", "v", "v", "u", "w", "", "x", "q", "r", "s")
"""Some are shared, by two members and by two behaviours too."""


def quadratic(seed: int) -> Landscape:
    """ℓ = 3 − g·c + (w·c)² / 2 of every example, where those of a behaviour have much in common and its expert helps it."""
    rng, n = np.random.default_rng(seed), len(EXAMPLES)
    rows = np.array([row for row, _, _ in EXAMPLES])
    g = rng.normal(size=(3, 2, SIZE))[rows] * 0.1 + rng.normal(size=(n, 2, SIZE)) * 0.05
    for row in (0, 1):
        g[rows == row, row] += 0.12
    w = rng.normal(size=(3, 2, SIZE))[rows] * 0.12 + rng.normal(size=(n, 2, SIZE)) * 0.05

    def loss(c: Flat) -> np.ndarray:
        return 3 - np.einsum("nes,es->n", g, c) + np.einsum("nes,es->n", w, c) ** 2 / 2

    def slope(c: Flat) -> np.ndarray:
        return -g + np.einsum("nes,es->n", w, c)[:, None, None] * w

    return Landscape(three_rows(), EXAMPLES, loss, slope, topics=TOPICS)


def by_hand(land: Landscape, most: int, certainty: float = 0.0) -> tuple[Flat, list[dict[str, Any]], str]:
    """The rounds written out over flat arrays: coefficients, what each round did, and why they ended."""
    base, c = land.by_row(land.loss(np.zeros((2, SIZE)))), np.ones((2, SIZE))
    per = []
    for r, row in enumerate(land.rows):
        alone = np.zeros((2, SIZE))
        if row.expert != "base":
            alone["ab".index(row.expert)] = 1
        per.append(row.weight if row.expert == "base" else row.weight / (base - land.by_row(land.loss(alone)))[r])

    def gain(at: Flat) -> float:
        return sum(p * value for p, value in zip(per, base - land.by_row(land.loss(at)), strict=True))

    told: list[dict[str, Any]] = []
    for _ in range(most):

        def helps(effects: np.ndarray, c: Flat = c) -> np.ndarray:
            """Whether a component's change raises the weighted gain, in the first half and in the second."""
            found = np.ones((2, SIZE), bool)
            for half in (0, 1):
                weighted = sum(p * effect for p, effect in zip(per, land.by_row(effects, half), strict=True))
                found &= np.where(c == 1, -weighted, weighted) > 0
            if certainty:
                weighted = sum(p * effect for p, effect in zip(per, land.by_row(effects), strict=True))
                found &= np.where(c == 1, -weighted, weighted) > certainty * land.error(effects, per)
            return found

        wanted = helps(-land.slope(c))
        there = np.where(wanted, 1 - c, c)
        along = -(land.slope(c) + land.slope(there)) / 2  # the slope of a quadratic is a straight line
        kept = wanted & helps(along)
        if not kept.any():
            return c, told, "nothing"
        following = np.where(kept, 1 - c, c)
        change = following - c
        told.append({
            "proposed": wanted.sum(), "changed": kept.sum(), "gain": gain(following), "accepted": gain(following) > gain(c),
            "predicted": -land.by_row((along * change).sum((1, 2))),
            "realised": land.by_row(land.loss(following)) - land.by_row(land.loss(c)),
        })  # fmt: skip
        if not told[-1]["accepted"]:
            return c, told, "taken back"
        c = following
    return c, told, "rounds"


SEEDS = range(12)


@pytest.mark.parametrize("certainty", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_rounds_are_those_written_out(seed: int, certainty: float) -> None:
    land = quadratic(seed)
    file = land.settled(certainty=certainty)
    assert file.metadata.certainty == certainty
    c, told, _ = by_hand(land, 4, certainty)
    assert np.array_equal(flat(Point((1.0, 1.0), {k: file.arrays[f"{k}.coefficient"] for k in UNIT_KINDS})), c)
    assert len(file.metadata.rounds) == len(told)
    names = [row.name for row in land.rows]
    for record, own in zip(file.metadata.rounds, told, strict=True):
        assert (record.proposed, record.changed, record.accepted) == (own["proposed"], own["changed"], own["accepted"])
        assert record.gain == pytest.approx(own["gain"], abs=1e-5)
        assert [record.predicted[name] for name in names] == pytest.approx(own["predicted"], abs=1e-5)
        assert [record.realised[name] for name in names] == pytest.approx(own["realised"], abs=1e-5)
    assert [b.loss_merge for b in file.metadata.behaviors] == pytest.approx(land.by_row(land.loss(c)), abs=1e-5)


def test_the_rounds_written_out_meet_every_case() -> None:
    found = [by_hand(quadratic(seed), 4) for seed in SEEDS]
    assert {why for _, _, why in found} >= {"nothing", "taken back"}
    told = [record for _, records, _ in found for record in records]
    assert any(record["changed"] < record["proposed"] for record in told), "the path takes some proposals away"
    assert any(not record["accepted"] for record in told)
    assert max(len(records) for _, records, _ in found) >= 3
    changed = [[sum(r["changed"] for r in by_hand(quadratic(s), 4, k)[1]) for k in (0, 1, 3)] for s in SEEDS]
    assert all(a >= 1 for a, _, _ in changed)
    assert any(a > b > c for a, b, c in changed), "certainty leaves some as they are"


# ---------------------------------------------------------------------------------------------------------------- agreement
def test_only_what_helps_on_both_halves_agrees() -> None:
    """Against loops over components; many help on the whole, and on one half alone."""
    land, rng = quadratic(0), np.random.default_rng(1)
    effects, direction = rng.normal(size=(len(EXAMPLES), 2, SIZE)), rng.integers(-1, 2, (2, SIZE))
    per = np.array([0.7, 3.0, 0.3])
    by_kind = parted(effects.swapaxes(0, 1))
    found = agreed(land, by_kind, per, parted(direction), 0.0)
    found_flat = np.concatenate([found[kind].reshape(2, -1) for kind in UNIT_KINDS], 1)
    first, second, whole = (land.by_row(effects, half) for half in (0, 1, None))
    cases = set()
    for e in range(2):
        for s in range(SIZE):
            a, b, both = (sum(per[r] * part[r, e, s] for r in range(3)) * direction[e, s] for part in (first, second, whole))
            assert found_flat[e, s] == (a > 0 and b > 0)
            cases.add((a > 0, b > 0, both > 0))
    assert cases >= {(True, True, True), (True, False, True), (False, True, True), (False, False, False)}
    assert not found_flat[direction == 0].any(), "what is not to change does not"
    z = sum(per[r] * whole[r] for r in range(3)) * direction / land.error(effects, per)
    for certainty in (0.5, 1.0, 2.0):
        sure = agreed(land, by_kind, per, parted(direction), certainty)
        sure_flat = np.concatenate([sure[kind].reshape(2, -1) for kind in UNIT_KINDS], 1)
        assert (sure_flat == found_flat & (z > certainty)).all()
        assert 0 < sure_flat.sum() < found_flat.sum()


def test_how_members_differ_is_no_error() -> None:
    """Two members with effects of 1 and −1 and no noise, one with fewer answers, of topics of its own."""
    rows = [BehaviorRow("both", (behavior("one"), behavior("two")), "a")]
    examples = [(0, 0, half) for half in (0, 1) for _ in range(4)] + [(0, 1, 0), (0, 1, 1)]
    land = Landscape(rows, examples, lambda c: np.zeros(10), lambda c: np.zeros((10, 1, SIZE)), "a", topics="abcdefghij")
    values = np.array([1.0] * 8 + [-1.0] * 2)[None, :, None, None]
    assert standard_errors(land, values).max() < 1e-12
    noisy = values + np.array([0.1, -0.1] * 5)[None, :, None, None]
    assert standard_errors(land, noisy)[0, 0, 0, 0] == pytest.approx(
        (10 / 9 * (8 * (0.1 / 16) ** 2 + 2 * (0.1 / 4) ** 2)) ** 0.5
    )


def test_components_that_agree_on_one_half_alone_are_left() -> None:
    """Four neurons that harm: on both halves, on the first, on the second, and on the whole but not on the second."""
    harm = np.zeros((4, 2))
    harm[0], harm[1], harm[2], harm[3] = (0.1, 0.2), (0.1, -0.1), (-0.1, 0.1), (0.3, -0.1)
    file = linear([harm], [1.0]).settled()
    out = file.arrays["neuron.coefficient"][0, 0] == 0
    assert out.tolist() == [True, False, False, False]
    assert sum(int((array == 0).sum()) for array in file.arrays.values()) == 1
    assert (file.metadata.rounds[0].proposed, file.metadata.rounds[0].changed) == (1, 1)


def linear(harms: Sequence[np.ndarray], gains: Sequence[float], weights: Sequence[float] = (1, 1)) -> Landscape:
    """Behaviours on one expert, with an example in each half.

    Args:
        harms: of each behaviour, how much the first neurons raise its loss, [neurons, halves].
        gains: what the whole expert gains on each.
        weights: of the behaviours.
    """
    slopes, neurons = np.zeros((len(harms), 2, 1, SIZE)), LAYERS * (UNITS["head"] + UNITS["kv"])
    for r, (harm, gain) in enumerate(zip(harms, gains, strict=True)):
        for half in (0, 1):
            # All others make up for it alike, so that the gain is what is said on either half.
            slopes[r, half] = -(gain + harm[:, half].sum()) / (SIZE - len(harm))
            slopes[r, half, 0, neurons : neurons + len(harm)] = harm[:, half]
    flat_slopes = slopes.reshape(-1, 1, SIZE)
    rows = [BehaviorRow(f"b{r}", (behavior(f"b{r}"),), "a", weight=w) for r, w in zip(range(len(harms)), weights, strict=False)]
    examples = [(r, 0, half) for r in range(len(harms)) for half in (0, 1)]
    return Landscape(rows, examples, lambda c: 3 + np.einsum("nes,es->n", flat_slopes, c), lambda c: flat_slopes, "a")


# ---------------------------------------------------------------------------------------------------------- own gains steer
@pytest.mark.parametrize(
    ("gains", "weights", "taken_out"),
    [
        ((1.0, 1.0), (1, 1), False),  # helps the first by .10, harms the second by .05
        ((1.0, 0.2), (1, 1), True),  # .10 of 1 against .05 of .2
        ((0.2, 0.2), (1, 1), False),
        ((1.0, 1.0), (1, 5), True),  # a weight of 5 is an own gain of a fifth
        ((1.0, 0.2), (5, 1), False),
    ],
)
def test_a_behaviour_with_a_small_own_gain_counts_more(
    gains: tuple[float, float], weights: tuple[float, float], taken_out: bool
) -> None:
    land = linear([np.full((1, 2), -0.1), np.full((1, 2), 0.05)], gains, weights)
    file = land.settled()
    assert [b.loss_base - b.loss_expert for b in file.metadata.behaviors] == pytest.approx(gains)
    assert (file.arrays["neuron.coefficient"][0, 0, 0] == 0) == taken_out
    assert sum(int((array == 0).sum()) for array in file.arrays.values()) == taken_out
    expected = [sum(w * g / g for w, g in zip(weights, gains, strict=True))]
    if taken_out:
        expected.append(expected[0] - weights[0] * 0.1 / gains[0] + weights[1] * 0.05 / gains[1])
        assert expected[1] > expected[0]
    assert [expected[0], *(r.gain for r in file.metadata.rounds)] == pytest.approx(expected)


def test_a_gain_counts_by_what_the_expert_itself_gains() -> None:
    land = quadratic(0)
    assert per_nat(land, np.array([0.5, 0.125, 0.0])).tolist() == [1.5 / 0.5, 1.0 / 0.125, 0.3]
    for gain in (0.0, -0.1, np.nan):
        with pytest.raises(LocalizeError, match=r"behaviour second: expected its expert b to lower its loss; found a gain of"):
            per_nat(land, np.array([0.5, gain, 0.0]))
    land.metric = "anchor"  # type: ignore[misc]
    with pytest.raises(LocalizeError, match=r"to move its state along the anchor; found a gain of 0\.000 of recovery"):
        per_nat(land, np.array([0.5, 0.0, 0.0]))


# ----------------------------------------------------------------------------------------------------------------- proposal
def test_turning_over() -> None:
    units = parted(np.random.default_rng(0).integers(0, 2, (2, SIZE)).astype(np.float32))
    which = parted(np.random.default_rng(1).integers(0, 2, (2, SIZE)).astype(bool))
    change, turned = switch(units), turned_over(units, which)
    for kind, before in units.items():
        assert change[kind].dtype == turned[kind].dtype == np.float32
        assert (change[kind][before == 1] == -1).all()
        assert (change[kind][before == 0] == 1).all()
        assert (turned[kind][~which[kind]] == before[~which[kind]]).all()
        assert (turned[kind][which[kind]] != before[which[kind]]).all()
        assert (turned[kind] == before + change[kind] * which[kind]).all()
        assert (turned_over(turned, which)[kind] == before).all()


def test_a_proposal_is_asked_for_where_the_merge_stands_and_integrated_on_the_way() -> None:
    """Effects times changes are the drop of every example's loss, to the fourth power of the coefficients."""
    rng, n = np.random.default_rng(5), len(EXAMPLES)
    g, w = rng.normal(size=(n, 2, SIZE)) * 0.1, rng.normal(size=(n, 2, SIZE)) * 0.2

    def loss(c: Flat) -> np.ndarray:
        return np.einsum("nes,es->n", g, c) + np.einsum("nes,es->n", w, c) ** 4

    def slope(c: Flat) -> np.ndarray:
        return g + 4 * np.einsum("nes,es->n", w, c)[:, None, None] ** 3 * w

    land = Landscape(three_rows(), EXAMPLES, loss, slope)
    current, per = everything(land), np.array([1.0, 2.0, 0.5])
    units = turned_over(current.units or {}, parted(rng.integers(0, 2, (2, SIZE)).astype(bool)))
    current = Point(current.rest, units)
    wanted, point, along = propose(land, current, per, "here", 0.0)
    assert land.measured == ["here", *(f"{t:.3f} of the path" for t in NODES)]
    here = agreed(land, land.gradients(current, "again"), per, switch(units), 0.0)
    for kind in UNIT_KINDS:
        assert (wanted[kind] == here[kind]).all()
        assert ((point.units or {})[kind] == np.where(wanted[kind], 1 - units[kind], units[kind])).all()
    change = flat(point) - flat(current)
    assert {-1.0, 1.0} <= set(change.ravel()), "some are put back in and some taken out"
    effects = np.concatenate([along[kind].reshape(2, n, -1) for kind in UNIT_KINDS], 2)
    fallen = loss(flat(current)) - loss(flat(point))
    assert np.einsum("ens,es->n", effects, change) == pytest.approx(fallen, abs=1e-5)
    for half in (None, 0, 1):
        assert drop(land, along, parted(change), half) == pytest.approx(land.by_row(fallen, half), abs=1e-5)


# ------------------------------------------------------------------------------------------------------------------ endings
def dominoes(*losses: Sequence[float], base: Sequence[float]) -> Landscape:
    """One expert whose components harm one after another: each does once those before it are out.

    Args:
        losses: of each behaviour, with none, one, two … components out.
        base: each behaviour's at the base.
    """

    def loss(c: Flat) -> np.ndarray:
        out = round(float((1 - c).sum()))
        return np.repeat([start if out == SIZE else told[out] for told, start in zip(losses, base, strict=True)], 2)

    def slope(c: Flat) -> np.ndarray:
        out = int((1 - c).sum())
        return np.broadcast_to(np.where(np.arange(SIZE) <= out, 1.0, -1.0), (2 * len(losses), 1, SIZE))

    rows = [BehaviorRow(f"b{r}", (behavior(f"b{r}"),), "a") for r in range(len(losses))]
    return Landscape(rows, [(r, 0, half) for r in range(len(losses)) for half in (0, 1)], loss, slope, "a")


def out_of(file: RoundsFile) -> list[int]:
    """Which components are out."""
    return np.flatnonzero(flat(Point((1.0,), {k: file.arrays[f"{k}.coefficient"] for k in UNIT_KINDS}))[0] == 0).tolist()


@pytest.mark.parametrize("most", [1, 3, 4])
def test_no_more_rounds_than_are_allowed(most: int) -> None:
    """Every round would gain, also the fifth."""
    land = dominoes([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4], base=[2.0])
    file = land.settled(most)
    assert [r.accepted for r in file.metadata.rounds] == [True] * most
    assert [r.gain for r in file.metadata.rounds] == pytest.approx([1.1, 1.2, 1.3, 1.4][:most])
    assert out_of(file) == list(range(most))
    assert file.metadata.behaviors[0].loss_merge == pytest.approx([0.9, 0.8, 0.7, 0.6][most - 1])


def test_four_is_the_most_that_can_be_asked_for() -> None:
    assert RoundSettings().max_rounds == 4
    assert len(dominoes([1.0, 0.9, 0.8, 0.7, 0.6, 0.5], base=[2.0]).settled(RoundSettings().max_rounds).metadata.rounds) == 4
    for wrong in (0, 5):
        with pytest.raises(ValidationError, match="max_rounds"):
            RoundSettings(max_rounds=wrong)


@pytest.mark.parametrize("third", [0.8, 0.95, 3.0])
def test_a_gain_that_no_longer_rises_ends_the_rounds_and_is_taken_back(third: float) -> None:
    """Also one that stays what it is; the fourth round, which would gain much, is never tried."""
    land = dominoes([1.0, 0.9, 0.8, third, 0.1], base=[2.0])
    file = land.settled()
    assert [(r.changed, r.accepted) for r in file.metadata.rounds] == [(1, True), (1, True), (1, False)]
    assert [r.gain for r in file.metadata.rounds] == pytest.approx([1.1, 1.2, 2.0 - third])
    assert file.metadata.rounds[-1].realised["b0"] == pytest.approx(third - 0.8)
    assert out_of(file) == [0, 1]
    (only,) = file.metadata.behaviors
    assert (only.loss_base, only.loss_expert, only.loss_sum) == (2.0, 1.0, 1.0)
    assert only.loss_merge == pytest.approx(0.8), "that of what is kept, not of what was tried"
    assert not any("round 4" in label for label in land.measured)


@pytest.mark.parametrize(("first", "second", "kept"), [(0.8, 1.1, False), (1.2, 0.9, True)])
def test_the_gain_that_must_rise_is_the_weighted_one(first: float, second: float, kept: bool) -> None:
    """The second behaviour's own gain is a tenth of the first's, so a nat of it is ten of the other's."""
    land = dominoes([1.0, first], [1.0, second], base=[2.0, 1.1])
    before, after = 1.0 / 1.0 + 0.1 / 0.1, (2.0 - first) / 1.0 + (1.1 - second) / 0.1
    assert (after > before) == kept
    assert (first + second < 2.0) != kept, "a nat for a nat, it would be the other way round"
    record = land.settled(1).metadata.rounds[0]
    assert record.gain == pytest.approx(after)
    assert record.accepted == kept
    assert out_of(land.settled(1)) == ([0] if kept else [])


def test_what_the_way_there_takes_back_is_not_changed() -> None:
    """A component that harms where the merge stands and helps once it is less: proposed, and left, so nothing is measured."""
    turned = np.zeros((1, SIZE))
    turned[0, 3] = 1

    def slope(c: Flat) -> np.ndarray:
        return np.broadcast_to(-1.0 + (1.5 if c[0, 3] == 1 else 0.0) * turned, (2, 1, SIZE))

    row = BehaviorRow("b", (behavior("b"),), "a")
    land = Landscape([row], [(0, 0, 0), (0, 0, 1)], lambda c: np.full(2, 3 - c.mean()), slope, "a")
    here = propose(land, everything(land), np.ones(1), "here", 0.0)
    assert sum(int(mask.sum()) for mask in here.wanted.values()) == 1
    land.measured.clear()
    file = land.settled()
    assert file.metadata.rounds == ()
    assert out_of(file) == []
    assert file.metadata.behaviors[0].loss_merge == file.metadata.behaviors[0].loss_sum
    assert "the merge, round 1" in land.measured
    assert not any("after round" in label or "round 2" in label for label in land.measured)


def test_a_merge_that_asks_for_nothing_is_left() -> None:
    row = BehaviorRow("b", (behavior("b"),), "a")
    slopes = np.full((2, 1, SIZE), -1.0)
    file = Landscape([row], [(0, 0, 0), (0, 0, 1)], lambda c: np.full(2, 3 - c.mean()), lambda c: slopes, "a").settled()
    assert file.metadata.rounds == ()
    assert out_of(file) == []


def test_nothing_left_to_change_ends_rounds_that_gained() -> None:
    """Two components harm from the start; with both out no other is asked for, though two rounds are left."""
    slopes = np.full((2, 1, SIZE), -1.0)
    slopes[:, 0, [2, 9]] = 1.0
    row = BehaviorRow("b", (behavior("b"),), "a")
    land = Landscape([row], [(0, 0, 0), (0, 0, 1)], lambda c: 3 + np.einsum("nes,es->n", slopes, c), lambda c: slopes, "a")
    file = land.settled()
    (only,) = file.metadata.rounds
    assert (only.proposed, only.changed, only.accepted) == (2, 2, True)
    assert only.predicted["b"] == pytest.approx(only.realised["b"]) == pytest.approx(-2.0)
    assert out_of(file) == [2, 9]
    assert "the merge, round 2" in land.measured
