"""Anchors on synthetic states: which layer is chosen, which are valid, and which are unstable."""

from __future__ import annotations

import numpy as np
import pytest

from mechmerge.localize.anchor import (
    MIN_COSINE,
    MIN_HELD,
    MIN_SEPARATION,
    RESAMPLES,
    States,
    best_layers,
    direction,
    halves,
    judge,
    separation,
    stability,
)
from mechmerge.localize.scores import AnchorRecord

D = 400
SEED = 0


def synthetic(signal: float, noise: float, prompts: int = 24, layers: int = 10, gap: float = 1.0, seed: int = 0) -> States:
    """States [layers + 1, prompts, D] whose differences x⁺ − x⁻ are `signal` along one axis, plus noise of that length.

    Args:
        gap: share of the signal that the expert has and the base lacks.
    """
    rng = np.random.default_rng(seed)
    shape = (layers + 1, prompts, D)
    without = rng.standard_normal(shape) * noise / np.sqrt(2 * D)
    plus = rng.standard_normal(shape) * noise / np.sqrt(2 * D)
    plus[..., 0] += signal
    base = plus.copy()
    base[..., 0] -= gap * signal
    return States(plus, without, base)


def twin(
    states: States, layer: int, made: list[int], held_out: list[int], topics: list[str], seed: int
) -> tuple[float, np.ndarray]:
    """The bootstrap written out: prompts are copied as often as their topic is drawn, and vectors made of the copies."""
    rng = np.random.default_rng(seed)
    redrawn = []
    for half in (made, held_out):
        names = list(dict.fromkeys(topics[i] for i in half))
        picks = rng.integers(0, len(names), (RESAMPLES, len(names)))
        redrawn.append([[i for k in row for i in half if topics[i] == names[k]] for row in picks])
    whole, held, cosines = direction(states, layer, made), 0, []
    for mine, theirs in zip(*redrawn, strict=True):
        v = direction(states, layer, mine)
        v = v / np.linalg.norm(v)
        cosines.append(v @ whole / np.linalg.norm(whole))
        expert, without, base = (
            rows[layer, theirs] @ v for rows in (states.expert_with, states.expert_without, states.base_with)
        )
        held += separation(expert, without) >= MIN_SEPARATION and (expert - base).mean() > 0
    return held / RESAMPLES, np.array(cosines)


def test_stability_equals_the_bootstrap_written_out() -> None:
    rows = np.random.default_rng(0).standard_normal((3, 6, 18, 8))
    rows[0, ..., 0] += 2.5
    states = States(*rows)
    topics = [str(i // 2) for i in range(18)]
    made, held_out = halves(topics)
    found = stability(states, 5, made, held_out, topics, seed=3)
    share, cosines = twin(states, 5, made, held_out, topics, seed=3)
    assert 0.05 < share < 0.95, "a share of 0 or 1 would prove little"
    assert found.held == share
    assert found.cosine == pytest.approx(cosines.mean(), abs=1e-9)
    assert found.cosine_low == pytest.approx(np.quantile(cosines, 0.05), abs=1e-9)
    assert stability(states, 5, made, held_out, topics, seed=3) == found
    assert stability(states, 5, made, held_out, topics, seed=4) != found


def test_prompts_of_one_topic_are_drawn_together() -> None:
    """Four copies of a prompt tell no more than one: the vector looks steadier where they are taken for four."""
    one = synthetic(1.0, 3.0, prompts=8)
    many = States(*(np.repeat(rows, 4, axis=1) for rows in (one.expert_with, one.expert_without, one.base_with)))
    topics = [str(i // 4) for i in range(32)]
    made, held_out = halves(topics)
    alone = stability(one, 5, *halves([str(i) for i in range(8)]), None, SEED)
    together = stability(many, 5, made, held_out, topics, SEED)
    apart = stability(many, 5, made, held_out, None, SEED)
    assert together == pytest.approx(alone, abs=1e-9)
    assert apart.cosine > alone.cosine + 0.05


@pytest.mark.parametrize("dimension", [50, 400, 4000])
def test_noise_alone_has_a_bootstrap_cosine_of_about_seven_tenths(dimension: int) -> None:
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((3, 1, 24, dimension))
    found = stability(States(*rows), 0, *halves([str(i) for i in range(24)]), None, SEED)
    assert found.cosine == pytest.approx(0.71, abs=0.06)
    assert found.cosine < MIN_COSINE


@pytest.mark.parametrize("cosine", [0.7, 0.9, 0.98])
def test_the_bootstrap_cosine_tells_how_near_the_true_vector_is(cosine: float) -> None:
    """√((1 + x)/(1 + 2x)) where the vector's cosine with the true one is 1/√(1 + x): the reason for MIN_COSINE."""
    x = 1 / cosine**2 - 1
    made = list(range(0, 48, 2))
    states = synthetic(1.0, np.sqrt(x * len(made)), prompts=48)
    v = direction(states, 5, made)
    assert v[0] / np.linalg.norm(v) == pytest.approx(cosine, abs=0.05)
    found = stability(states, 5, made, list(range(1, 48, 2)), None, SEED)
    assert found.cosine == pytest.approx(np.sqrt((1 + x) / (1 + 2 * x)), abs=0.02)
    x = 1 / 0.9**2 - 1
    assert np.sqrt((1 + x) / (1 + 2 * x)) == pytest.approx(MIN_COSINE, abs=0.005)


def judged(states: States) -> AnchorRecord:
    return judge(states, 5, *halves([str(i) for i in range(states.expert_with.shape[1])]), None, SEED)


def test_a_clear_anchor_is_stable_and_valid() -> None:
    record = judged(synthetic(1.0, 0.5))
    assert record.valid
    assert record.stability == 1.0
    assert record.stability_cosine is not None
    assert record.stability_cosine > 0.98
    assert record.stability_text == f"passes in 1.00 of resamples, cosine {record.stability_cosine:.2f}"


def test_an_anchor_of_scattered_differences_is_refused_with_its_reason() -> None:
    """It separates and has a gap, yet its vector points elsewhere for other prompts."""
    record = judged(synthetic(1.0, 4.0, prompts=48))
    assert record.separation >= MIN_SEPARATION
    assert record.gap_low > 0
    assert not record.valid
    assert len(record.reasons) == 1
    assert record.reasons[0].startswith(f"unstable: cosine {record.stability_cosine:.2f} < {MIN_COSINE} with the vectors of")


def test_an_anchor_that_passes_by_the_prompts_drawn_is_refused_with_its_reason() -> None:
    """Three of its held-out prompts do not have it: drawn more often, they break the separation."""
    states = synthetic(1.0, 0.3, prompts=40)
    for i in (1, 11, 21):
        states.expert_with[5, i] = states.expert_without[5, i] - 0.01
        states.base_with[5, i] = states.expert_with[5, i] - 0.01
    record = judged(states)
    assert record.separation >= MIN_SEPARATION
    assert record.gap_low > 0
    assert record.stability is not None
    assert 0 < record.stability < MIN_HELD
    (reason,) = record.reasons
    assert reason == f"unstable: passes in {record.stability:.2f} of the resamples of its prompts < {MIN_HELD}"


def test_older_records_read_without_stability() -> None:
    known = judged(synthetic(1.0, 0.5)).model_dump(mode="json")
    kept = {key: value for key, value in known.items() if not key.startswith("stability")}
    assert AnchorRecord.model_validate(kept).stability is None
    assert AnchorRecord.model_validate(kept).stability_text is None
    assert AnchorRecord.model_validate(known).stability == 1.0


# ------------------------------------------------------------------------------------------------------------------- layers
def test_candidates_that_are_not_valid_are_left_out_where_others_are() -> None:
    """Of layers 3 … 8 in three thirds, only 5 and 6 separate; without them every third keeps its best."""
    states = synthetic(0.0, 1.0)
    assert len(best_layers(states, range(24))) == 3
    clear = synthetic(3.0, 1.0)
    for layer in (5, 6):
        for rows, good in zip(
            (states.expert_with, states.expert_without, states.base_with),
            (clear.expert_with, clear.expert_without, clear.base_with),
            strict=True,
        ):
            rows[layer] = good[layer]
    (chosen,) = best_layers(states, range(24))
    assert chosen in (5, 6)


def test_a_layer_where_the_expert_is_below_the_base_is_not_valid() -> None:
    states = synthetic(3.0, 1.0)
    states.base_with[7:9, :, 0] += 9.0
    assert max(best_layers(states, range(24))) < 7


def test_layers_are_judged_on_topics_that_did_not_make_the_vector() -> None:
    """Prompts of a topic share what is peculiar to it: judged on their own topic's vector, noise looks like a signal."""
    rng = np.random.default_rng(2)
    topics = [str(i // 2) for i in range(32)]
    peculiar = np.repeat(rng.standard_normal((11, 16, D)), 2, axis=1)
    without = np.repeat(rng.standard_normal((11, 16, D)) * 0.01, 2, axis=1)
    states = States(peculiar, without, without.copy())
    clear = synthetic(3.0, 1.0, prompts=32)
    for rows, good in zip((states.expert_with, states.expert_without, states.base_with),
                          (clear.expert_with, clear.expert_without, clear.base_with), strict=True):  # fmt: skip
        rows[5] = good[5]
    assert best_layers(states, range(32), topics) == [5]
    assert best_layers(states, range(32)) != [5]
