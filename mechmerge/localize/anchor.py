"""The vector anchor: a direction in the residual stream that stands for "the control state of this behaviour has formed".

Weight patching (arXiv 2604.13694 §III-B): v = mean over prompts of h_A(x⁺; expert) − h_A(x⁻; expert) at the last prompt token,
state s(θ; x) = ⟨h_A(x; θ), v/‖v‖⟩. Difference-in-means vectors with layer choice and steering as checks: "Improving
Instruction-Following in Language Models through Activation Steering" (ICLR 2025, microsoft/llm-steer-instruct).

Ours: prompts are divided by topic into two disjoint halves. The first makes the vector and chooses the layer; validity
and recovery are measured on the second. Only layers between .3 and .8 of the depth are candidates: an anchor must leave
layers below it to localize and layers above it to act. Of each third of them the layer that sets expert and base apart
best (cross-fitted) is steered with, where it is valid by the cross-fit (where none is, all three are), and the one whose
steering raises the base's pass rate most is taken. Steering adds v to the residual stream after the anchor's layer at the
last prompt token and every token generated, on x⁺ prompts: the base reads the instruction, and the vector must make it
act on it.

An anchor must also be stable: the paper finds the vectors of language, length and keyword constraints unstable, by what
measure is not known to us. Ours is a bootstrap over topics, in both halves at once (Efron and Tibshirani 1993, ch. 6):
(a) in 95 % of the resamples the redrawn vector passes on the redrawn held-out prompts; (b) the mean cosine of redrawn
vectors with v is at least .92. Why .92: with n prompts, a common difference of squared length S, and deviations from it
of squared length N in nearly orthogonal directions, x = N/(nS) gives the bootstrap a cosine of √((1 + x)/(1 + 2x)), and v
one of 1/√(1 + x) with the vector that endless prompts would give. Noise alone has .71 so, in any dimension, and .92
stands for .9: a vector within 26° of the true one. Both bounds were set from this before any model was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mechmerge.intervals import levels, t_half
from mechmerge.localize.scores import AnchorRecord

Array = np.ndarray
MIN_SEPARATION = 0.9
"""Least area under the ROC curve of x⁺ against x⁻ that a valid anchor has."""
MIN_HELD = 0.95
"""Least share of resamples of the prompts in which a stable anchor passes."""
MIN_COSINE = 0.92
"""Least mean cosine of a stable anchor's vector with those of resampled prompts."""
RESAMPLES = 1000
DEPTHS = (0.3, 0.8)
STEERING_STRENGTHS = (1.0, 2.0)
"""Multiples of v that are tried in the steering check; the last one chooses the layer."""


@dataclass(frozen=True)
class States:
    """Residual streams at the last prompt token, [layers + 1, prompts, D] each (index l is after l layers)."""

    expert_with: Array
    expert_without: Array
    base_with: Array


def halves(topics: Sequence[str]) -> tuple[list[int], list[int]]:
    """Indices of two disjoint sets of prompts that share no topic: topics take turns in the order they appear."""
    order = {topic: i for i, topic in enumerate(dict.fromkeys(topics))}
    first = [i for i, topic in enumerate(topics) if order[topic] % 2 == 0]
    second = [i for i, topic in enumerate(topics) if order[topic] % 2 == 1]
    return first, second


def direction(states: States, layer: int, prompts: Sequence[int]) -> Array:
    """v at a layer from the given prompts, [D], not normalised."""
    difference: Array = (states.expert_with[layer, prompts] - states.expert_without[layer, prompts]).mean(0)
    return difference


def normalised(v: Array) -> Array:
    """A vector at length 1."""
    unit: Array = v / max(float(np.linalg.norm(v)), 1e-12)
    return unit


def separation(positive: Array, negative: Array) -> float:
    """Area under the ROC curve: the chance that a value of `positive` is above one of `negative` (ties count half)."""
    comparison = np.sign(positive[:, None] - negative[None, :])
    return float((comparison + 1).mean() / 2)


class Stability(NamedTuple):
    """What becomes of an anchor when its prompts are drawn anew."""

    held: float
    """Share of resamples, 0 … 1, in which x⁺ is separated from x⁻ and the expert's mean is above the base's."""
    cosine: float
    """Mean cosine of the resampled vectors with the vector, −1 … 1."""
    cosine_low: float
    """Their 5 % quantile."""


def stability(
    states: States, layer: int, made: Sequence[int], held_out: Sequence[int], topics: Sequence[str] | None, seed: int
) -> Stability:
    """Bootstrap over topics: those that make the vector and those that judge it are drawn anew, with replacement.

    Args:
        states: residual streams of all prompts.
        layer: the anchor's layer.
        made: prompts that make the vector.
        held_out: prompts on which it is judged.
        topics: the topic of every prompt of `states`; each prompt is its own where None.
        seed: of the resamples.
    """
    rng = np.random.default_rng(seed)
    topics = [str(i) for i in range(states.expert_with.shape[1])] if topics is None else topics
    draws = _redrawn([topics[i] for i in made], rng)
    judged = _redrawn([topics[i] for i in held_out], rng)
    differences = (states.expert_with[layer, made] - states.expert_without[layer, made]).astype(np.float64)
    weights = np.stack([np.bincount(draw, minlength=len(made)) / len(draw) for draw in draws])  # [R, n]
    inner = differences @ differences.T
    lengths = np.sqrt(np.maximum(((weights @ inner) * weights).sum(1), 1e-24))
    cosines = (weights @ inner).mean(1) / lengths / max(float(np.sqrt(inner.mean())), 1e-12)
    expert, without, base = (
        (rows[layer, held_out] @ differences.T) @ weights.T / lengths  # states along each resampled vector, [m, R]
        for rows in (states.expert_with, states.expert_without, states.base_with)
    )
    held = [
        separation(expert[draw, r], without[draw, r]) >= MIN_SEPARATION and float((expert - base)[draw, r].mean()) > 0
        for r, draw in enumerate(judged)
    ]
    return Stability(float(np.mean(held)), float(cosines.mean()), float(np.quantile(cosines, 0.05)))


def _redrawn(topics: Sequence[str], rng: np.random.Generator) -> list[Array]:
    """For each resample, positions of the prompts whose topics were drawn, as often as they were."""
    members = [np.flatnonzero(np.array(topics) == topic) for topic in dict.fromkeys(topics)]
    picks = rng.integers(0, len(members), (RESAMPLES, len(members)))
    return [np.concatenate([members[k] for k in row]) for row in picks]


def mean_low(values: Array, topics: Sequence[str] | None, seed: int, resamples: int = 2000) -> float:
    """Lower end of the 95 % bootstrap interval of a mean; topics are drawn, each with all its prompts.

    Args:
        values: one of each prompt, [n].
        topics: the topic of each; each prompt is its own where None.
        seed: of the resamples.
        resamples: how many.

    Returns:
        The 2.5 % quantile at the level for so few topics, or the t interval's end where that is lower (mechmerge/intervals.py).
        One topic bounds nothing: then it is not above 0, whatever the values.
    """
    topic = _numbered(topics, len(values))
    drawn = int(topic.max()) + 1
    if drawn == 1:
        return min(0.0, float(values.min()))
    sums, sizes = np.zeros((2, drawn), values.dtype)
    np.add.at(sums, topic, values)
    np.add.at(sizes, topic, 1)
    picks = np.random.default_rng(seed).integers(0, drawn, (resamples, drawn))
    low = float(np.quantile(sums[picks].sum(1) / sizes[picks].sum(1), levels(drawn)[0]))
    return min(low, float(values.mean()) - t_half(drawn, float(standard_error(values, topics))))


def standard_error(values: Array, topics: Sequence[str] | None, weights: Array | None = None) -> Array:
    """Standard error of the mean over prompts, whose topics are what is independent.

    Where topics are shared: √(k/(k − 1) · Σ over the k topics of (Σ of their prompts' deviations from the mean)²) / n, the
    cluster-robust one; with one prompt a topic that is the usual s/√n.

    Args:
        values: of each prompt, [n, ...].
        topics: the topic of each; each prompt is its own where None.
        weights: of the prompts in the mean, [n], with the sum 1; all alike when None.

    Returns:
        [...]; NaN from one topic, which says nothing of others.
    """
    topic, n = _numbered(topics, len(values)), len(values)
    drawn = int(topic.max()) + 1
    if drawn == 1:
        return np.full(values.shape[1:], np.nan)
    if weights is None and drawn == n:
        return np.asarray(values.std(0, ddof=1) / np.sqrt(n))
    shares = np.full(n, 1 / n) if weights is None else weights
    member = (topic == np.arange(drawn)[:, None]) * shares
    sums = np.tensordot(member, values - np.tensordot(shares, values, 1), 1)
    return np.asarray(np.sqrt(drawn / (drawn - 1) * (sums**2).sum(0)))


def _numbered(topics: Sequence[str] | None, n: int) -> Array:
    """The topic of each of n prompts as a number, 0 … in the order they appear, [n]."""
    if topics is None:
        return np.arange(n)
    order = {topic: i for i, topic in enumerate(dict.fromkeys(topics))}
    return np.array([order[topic] for topic in topics])


def best_layers(states: States, prompts: Sequence[int], topics: Sequence[str] | None = None) -> list[int]:
    """One candidate layer of each third of the depths that are allowed, shallow first.

    The vector of one half of `prompts` is judged on the other, which shares no topic with it, and the reverse. A layer that
    is valid there (it separates x⁺ from x⁻, and the expert's mean is above the base's) goes before one that is not, then the
    paired gap between expert and base over its standard error decides. Candidates that are not valid are left out where others
    are.

    Args:
        states: residual streams of all prompts.
        prompts: those that the layer is chosen on.
        topics: the topic of every prompt of `states`; each prompt is its own where None.
    """
    layers = states.expert_with.shape[0] - 1
    candidates = np.arange(max(1, round(DEPTHS[0] * layers)), max(2, round(DEPTHS[1] * layers) + 1))
    topics = [str(i) for i in range(states.expert_with.shape[1])] if topics is None else topics
    first, second = halves([topics[i] for i in prompts])
    folds = ([prompts[i] for i in first], [prompts[i] for i in second])

    def merit(layer: int) -> tuple[bool, float]:
        gaps, areas = [], []
        for made, judged in (folds, folds[::-1]):
            v = normalised(direction(states, layer, made))
            gaps.append((states.expert_with[layer, judged] - states.base_with[layer, judged]) @ v)
            areas.append(separation(states.expert_with[layer, judged] @ v, states.expert_without[layer, judged] @ v))
        gap = np.concatenate(gaps)
        valid = min(areas) >= MIN_SEPARATION and gap.mean() > 0
        error = standard_error(gap, [topics[i] for _, judged in (folds, folds[::-1]) for i in judged])
        return bool(valid), float(gap.mean() / max(error, 1e-9))

    best = [max((int(layer) for layer in third), key=merit) for third in np.array_split(candidates, 3) if len(third)]
    return [layer for layer in best if merit(layer)[0]] or best


def judge(
    states: States,
    layer: int,
    made: Sequence[int],
    held_out: Sequence[int],
    rates: tuple[float, float] | None,
    seed: int,
    topics: Sequence[str] | None = None,
) -> AnchorRecord:
    """An anchor's validity figures.

    Args:
        states: residual streams of all prompts.
        layer: the anchor's layer.
        made: prompts that make the vector.
        held_out: prompts on which it is judged.
        rates: the verifier's pass rate of the base without and with steering; None without a verifier.
        seed: of the bootstraps.
        topics: the topic of every prompt of `states`; each prompt is its own where None.
    """
    unit = normalised(direction(states, layer, made))
    expert = states.expert_with[layer, held_out] @ unit
    area = separation(expert, states.expert_without[layer, held_out] @ unit)
    gaps = expert - states.base_with[layer, held_out] @ unit
    low = mean_low(gaps, None if topics is None else [topics[i] for i in held_out], seed)
    stable = stability(states, layer, made, held_out, topics, seed)
    plain, steered = rates or (None, None)
    reasons = []
    if area < MIN_SEPARATION:
        reasons.append(f"separates x⁺ from x⁻ with {area:.2f} < {MIN_SEPARATION}")
    if not low > 0:
        reasons.append(f"expert − base gap {gaps.mean():.2f} with lower end {low:.2f}, not above 0")
    if plain is not None and steered is not None and not steered > plain:
        reasons.append(f"steering the base does not raise the pass rate ({plain:.2f} → {steered:.2f})")
    if stable.held < MIN_HELD:
        reasons.append(f"unstable: passes in {stable.held:.2f} of the resamples of its prompts < {MIN_HELD}")
    if stable.cosine < MIN_COSINE:
        reasons.append(f"unstable: cosine {stable.cosine:.2f} < {MIN_COSINE} with the vectors of resampled prompts")
    return AnchorRecord(
        layer=layer,
        valid=not reasons,
        reasons=tuple(reasons),
        separation=area,
        gap=float(gaps.mean()),
        gap_low=low,
        steering_base=plain,
        steering_steered=steered,
        stability=stable.held,
        stability_cosine=stable.cosine,
        stability_cosine_low=stable.cosine_low,
        prompts=len(made),
        held_out=len(held_out),
    )
