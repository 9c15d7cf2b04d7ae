"""The vector anchor: a direction in the residual stream that stands for "the control state of this behaviour has formed".

Weight patching (arXiv 2604.13694 §III-B): v = mean over prompts of h_A(x⁺; expert) − h_A(x⁻; expert) at the last prompt token,
state s(θ; x) = ⟨h_A(x; θ), v/‖v‖⟩. Difference-in-means vectors with layer choice and steering as checks: "Improving
Instruction-Following in Language Models through Activation Steering" (ICLR 2025, microsoft/llm-steer-instruct).

Ours: prompts are divided by topic into two disjoint halves. The first makes the vector and chooses the layer; validity
and recovery are measured on the second. Only layers between .3 and .8 of the depth are candidates: an anchor must leave
layers below it to localize and layers above it to act. Of each third of them the layer that sets expert and base apart
best (cross-fitted) is steered with, and the one whose steering raises the base's pass rate most is taken. Steering adds v
to the residual stream after the anchor's layer at the last prompt token and every token generated, on x⁺ prompts: the
base reads the instruction, and the vector must make it act on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mechmerge.localize.scores import AnchorRecord

Array = np.ndarray
MIN_SEPARATION = 0.9
"""Least area under the ROC curve of x⁺ against x⁻ that a valid anchor has."""
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


def separation(positive: Array, negative: Array) -> float:
    """Area under the ROC curve: the chance that a value of `positive` is above one of `negative` (ties count half)."""
    comparison = np.sign(positive[:, None] - negative[None, :])
    return float((comparison + 1).mean() / 2)


def mean_low(values: Array, seed: int, resamples: int = 2000) -> float:
    """Lower end of the 95 % bootstrap interval of a mean."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(0, len(values), (resamples, len(values)))
    return float(np.quantile(values[picks].mean(1), 0.025))


def best_layers(states: States, prompts: Sequence[int]) -> list[int]:
    """One candidate layer of each third of the depths that are allowed, shallow first.

    The vector of one half of `prompts` is judged on the other and the reverse; a layer that separates x⁺ from x⁻ goes
    before one that does not, then the paired gap between expert and base over its standard error decides.
    """
    layers = states.expert_with.shape[0] - 1
    candidates = np.arange(max(1, round(DEPTHS[0] * layers)), max(2, round(DEPTHS[1] * layers) + 1))
    folds = (list(prompts[0::2]), list(prompts[1::2]))

    def merit(layer: int) -> tuple[bool, float]:
        gaps, areas = [], []
        for made, judged in (folds, folds[::-1]):
            v = direction(states, layer, made)
            v = v / max(float(np.linalg.norm(v)), 1e-12)
            gaps.append((states.expert_with[layer, judged] - states.base_with[layer, judged]) @ v)
            areas.append(separation(states.expert_with[layer, judged] @ v, states.expert_without[layer, judged] @ v))
        gap = np.concatenate(gaps)
        return min(areas) >= MIN_SEPARATION, float(gap.mean() / max(gap.std(ddof=1) / np.sqrt(len(gap)), 1e-9))

    return [max((int(layer) for layer in third), key=merit) for third in np.array_split(candidates, 3) if len(third)]


def judge(
    states: States,
    layer: int,
    made: Sequence[int],
    held_out: Sequence[int],
    rates: tuple[float, float] | None,
    seed: int,
) -> tuple[Array, AnchorRecord]:
    """The unit anchor vector [D] at a layer and its validity figures.

    Args:
        states: residual streams of all prompts.
        layer: the anchor's layer.
        made: prompts that make the vector.
        held_out: prompts on which it is judged.
        rates: the verifier's pass rate of the base without and with steering; None without a verifier.
        seed: of the bootstrap.
    """
    v = direction(states, layer, made)
    unit = v / max(float(np.linalg.norm(v)), 1e-12)
    expert = states.expert_with[layer, held_out] @ unit
    area = separation(expert, states.expert_without[layer, held_out] @ unit)
    gaps = expert - states.base_with[layer, held_out] @ unit
    low = mean_low(gaps, seed)
    plain, steered = rates or (None, None)
    reasons = []
    if area < MIN_SEPARATION:
        reasons.append(f"separates x⁺ from x⁻ with {area:.2f} < {MIN_SEPARATION}")
    if not low > 0:
        reasons.append(f"expert − base gap {gaps.mean():.2f} with lower end {low:.2f}, not above 0")
    if plain is not None and steered is not None and not steered > plain:
        reasons.append(f"steering the base does not raise the pass rate ({plain:.2f} → {steered:.2f})")
    return unit, AnchorRecord(
        layer=layer,
        valid=not reasons,
        reasons=tuple(reasons),
        separation=area,
        gap=float(gaps.mean()),
        gap_low=low,
        steering_base=plain,
        steering_steered=steered,
        prompts=len(made),
        held_out=len(held_out),
    )
