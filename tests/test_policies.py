"""Policies and controls: what they keep, what they drop, and what their masks must satisfy."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mechmerge.errors import InputError, SchemaError
from mechmerge.localize.effect_file import EFFECT_KINDS, EffectFile
from mechmerge.localize.scores import ScoreFile
from mechmerge.models.components import UNIT_KINDS
from mechmerge.pipeline.schema import RecipePlan
from mechmerge.recipe.compile import check_parameters
from mechmerge.recipe.controls import TOLERANCE, coinciding, magnitude_like, moved_norm, norm_matched, random_like
from mechmerge.recipe.explain import resolved, shares
from mechmerge.recipe.policies import behavior_weights, conflict, predicted_change, top, weighted
from mechmerge.recipe.schema import Masks
from tests.measured import LAYERS, PARAMETERS, SECOND, UNITS, effect_file, score_file
from tests.test_recipe import recipe

NAMES = [f"{expert}.{kind}" for expert in ("first", "second") for kind in UNIT_KINDS]


def with_arrays(file: EffectFile, **arrays: np.ndarray) -> EffectFile:
    return EffectFile(file.metadata, file.arrays | {name.replace("_", "."): a for name, a in arrays.items()})


# ---------------------------------------------------------------------------------------------------------------- conflict
@pytest.mark.parametrize("certainty", [0.0, 3.0, None])
@pytest.mark.parametrize("agreement", [True, False])
@pytest.mark.parametrize("weighting", ["own-gain", "equal"])
def test_conflict_drops_exactly_what_harms_the_behaviours_together(
    agreement: bool, weighting: str, certainty: float | None
) -> None:
    file = effect_file(gains=(2.0, 0.5))
    told = {} if certainty is None else {"certainty": certainty}
    choice = conflict(file, agreement=agreement, weighting=weighting, **told)  # type: ignore[arg-type]
    unsure = 0
    weights = (1 / 2.0, 1 / 0.5) if weighting == "own-gain" else (1.0, 1.0)
    dropped = 0
    for e, expert in enumerate(file.metadata.experts):
        assert choice.defaults[expert] == 1
        for kind in UNIT_KINDS:
            mask = choice.masks[f"{expert}.{kind}"]
            for layer in range(LAYERS):
                for unit in range(UNITS[kind]):
                    if agreement:
                        halves = [file.arrays[f"{kind}.half"][h, :, e, layer, unit] for h in (0, 1)]
                    else:
                        halves = [file.arrays[f"{kind}.effect"][:, e, layer, unit]]
                    harms = all(weights[0] * float(h[0]) + weights[1] * float(h[1]) < 0 for h in halves)
                    whole, error = (file.arrays[f"{kind}.{m}"][:, e, layer, unit].astype(float) for m in ("effect", "stderr"))
                    sure = (
                        -(weights[0] * whole[0] + weights[1] * whole[1])
                        > (certainty or 0.0) * (weights[0] ** 2 * error[0] ** 2 + weights[1] ** 2 * error[1] ** 2) ** 0.5
                    )
                    unsure += harms and not sure
                    harms = harms and sure
                    assert mask[layer, unit] == (0 if harms else 1)
                    dropped += harms
    assert 0 < dropped < mask.size * 6
    assert (unsure > 0) == bool(certainty)


def test_agreement_drops_less() -> None:
    file = effect_file()
    strict, loose = conflict(file).masks, conflict(file, agreement=False).masks
    assert sum((m == 0).sum() for m in strict.values()) < sum((m == 0).sum() for m in loose.values())


def test_a_heavy_weight_decides_alone() -> None:
    file = effect_file()
    masks = conflict(file, weights={"sums": 1e9}, agreement=False).masks
    for e, expert in enumerate(file.metadata.experts):
        assert np.array_equal(masks[f"{expert}.neuron"] == 0, file.arrays["neuron.effect"][1, e] < 0)


def test_an_effect_of_exactly_zero_is_kept() -> None:
    file = effect_file()
    quiet = with_arrays(file, head_half=np.zeros_like(file.arrays["head.half"]))
    assert (conflict(quiet).masks["first.head"] == 1).all()


def test_weights_are_divided_by_the_own_experts_gain() -> None:
    behaviors = effect_file(gains=(2.0, 0.5)).metadata.behaviors
    assert behavior_weights(behaviors).tolist() == [0.5, 2.0]
    assert behavior_weights(behaviors, {"sums": 3.0}).tolist() == [0.5, 6.0]
    assert behavior_weights(behaviors, {"sums": 3.0}, "equal").tolist() == [1.0, 3.0]
    assert behavior_weights(effect_file(gains=(2.0, -0.5)).metadata.behaviors, None, "equal").tolist() == [1.0, 1.0]


def test_weights_that_make_no_sense() -> None:
    with pytest.raises(InputError, match=r"sums.*--weighting equal"):
        conflict(effect_file(gains=(2.0, 0.0)))
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="weight of sums"):
            conflict(effect_file(), weights={"sums": weight})
    with pytest.raises(InputError, match="behaviours among formats, sums; found reading"):
        conflict(effect_file(), weights={"reading": 1.0})


def test_halves_are_needed_for_agreement() -> None:
    file = effect_file()
    bare = EffectFile(file.metadata, {name: a for name, a in file.arrays.items() if not name.endswith(".half")})
    with pytest.raises(SchemaError, match=r"head\.half"):
        conflict(bare)
    assert conflict(bare, agreement=False).masks


def test_the_prediction_is_the_effects_that_stay() -> None:
    file = effect_file()
    everything = predicted_change(file, {"first": 1.0, "second": 1.0}, {})
    for b, name in enumerate(("formats", "sums")):
        total = sum(float(file.arrays[f"{kind}.effect"][b].sum(dtype=np.float64)) for kind in EFFECT_KINDS)
        assert everything[name] == pytest.approx(-total, abs=1e-5)
    assert predicted_change(file, {"first": 0.0, "second": 0.0}, {}) == {"formats": 0.0, "sums": 0.0}
    choice = conflict(file, agreement=False)
    assert choice.predicted is not None
    dropped = sum(
        float(file.arrays[f"{k}.effect"][0, e][choice.masks[f"{n}.{k}"] == 0].sum(dtype=np.float64))
        for e, n in enumerate(("first", "second"))
        for k in UNIT_KINDS
    )
    assert choice.predicted["formats"] == pytest.approx(everything["formats"] + dropped, abs=1e-4)


# --------------------------------------------------------------------------------------------------------------------- top
def parameters_taken(masks: Masks, expert: str) -> int:
    return sum(int((masks[f"{expert}.{kind}"] > 0).sum()) * PARAMETERS[kind] for kind in UNIT_KINDS)


TOTAL = LAYERS * sum(UNITS[kind] * PARAMETERS[kind] for kind in UNIT_KINDS)


@given(budget=st.floats(0.01, 1), seed=st.integers(0, 50))
@settings(max_examples=40, deadline=None)
def test_top_takes_the_best_within_the_budget(budget: float, seed: int) -> None:
    file = score_file(seed)
    choice = top({"first": [file]}, budget)
    assert choice.defaults == {"first": 0.0}
    assert parameters_taken(choice.masks, "first") <= budget * TOTAL
    taken, left = [], []
    for kind in UNIT_KINDS:
        score, mask = file.score(kind), choice.masks[f"first.{kind}"]
        assert (score[mask > 0] > 0).all()
        assert (mask[-1] == 0).all(), "above the anchor"
        taken += score[mask > 0].tolist()
        left += score[(mask == 0) & (score > 0)].tolist()
    assert not taken or not left or min(taken) >= max(left)
    if left:
        assert parameters_taken(choice.masks, "first") + max(PARAMETERS.values()) > budget * TOTAL


def test_scores_are_means_over_what_was_measured() -> None:
    one, other = score_file(1), score_file(2, behavior="title")
    for file, value in ((one, 5.0), (other, np.nan)):
        file.arrays["head.screen"][0, 0] = value
    one.arrays["head.screen"][0, 1], other.arrays["head.screen"][0, 1] = 6.0, -7.0
    one.arrays["head.screen"][0, 2] = other.arrays["head.screen"][0, 2] = np.nan
    masks = top({"first": [one, other]}, 1.0).masks
    assert masks["first.head"][0, :3].tolist() == [1, 0, 0]
    best = top({"first": [one, other]}, 513 / TOTAL).masks
    assert best["first.head"][0, 0] == 1
    assert parameters_taken(best, "first") == 512


def test_invalid_anchors_and_raw_differences_do_not_enter_a_mean_silently() -> None:
    one = score_file(1)
    steered = score_file(2, behavior="title", valid=False)
    raw = score_file(3, behavior="quotation", valid=False, scale="difference")
    choice = top({"first": [one, steered, raw]}, 0.3)
    alone = top({"first": [one]}, 0.3)
    assert alone.notes == ()
    assert all(np.array_equal(choice.masks[n], alone.masks[n]) for n in alone.masks)
    assert choice.notes == ("first: scores of title, quotation were left out of the mean, since their anchors are not valid",)
    second = top({"first": [steered, raw]}, 0.3)
    assert "quotation were left out of the mean, since they are raw differences" in second.notes[0]
    assert second.notes[1] == "first: no anchor is valid; its scores may mean nothing"
    only = top({"first": [steered]}, 0.3)
    assert all(np.array_equal(second.masks[n], only.masks[n]) for n in only.masks)


def test_overlap() -> None:
    one, other = score_file(1), score_file(1, SECOND)
    other = ScoreFile(other.metadata, {n: a * 2 if n.endswith("screen") else a for n, a in other.arrays.items()})
    both = {"first": [one], "second": [other]}
    total, share, winner = (top(both, 0.2, overlap).masks for overlap in ("sum", "share", "winner"))  # type: ignore[arg-type]
    chosen = total["first.neuron"] > 0
    assert chosen.any()
    assert np.array_equal(total["first.neuron"], total["second.neuron"])
    assert (share["first.neuron"][chosen] == 0.5).all()
    assert (share["first.neuron"] + share["second.neuron"])[chosen].tolist() == [1.0] * chosen.sum()
    assert (winner["first.neuron"] == 0).all()
    assert np.array_equal(winner["second.neuron"], total["second.neuron"])


@pytest.mark.parametrize("budget", [0, -1, 1.01, float("nan")])
def test_budgets_that_are_none(budget: float) -> None:
    with pytest.raises(InputError, match="budget"):
        top({"first": [score_file()]}, budget)


def test_top_needs_scores() -> None:
    with pytest.raises(InputError, match="first"):
        top({"first": []}, 0.5)
    file = score_file()
    for name in ("head.parameters", "head.screen"):
        bare = dataclasses.replace(file, arrays={n: a for n, a in file.arrays.items() if n != name})
        with pytest.raises(SchemaError, match="head"):
            top({"first": [bare]}, 0.5)


# ---------------------------------------------------------------------------------------------------------------- weighted
@given(budget=st.floats(0.05, 0.6), seed=st.integers(0, 50), scale=st.sampled_from(["rank", "share"]))
@settings(max_examples=30, deadline=None)
def test_weighted_rises_with_the_score_and_meets_the_budget(budget: float, seed: int, scale: str) -> None:
    file = score_file(seed)
    choice = weighted({"first": [file]}, budget, scale)  # type: ignore[arg-type]
    assert choice.defaults == {"first": 0.0}
    for kind in UNIT_KINDS:
        score, mask = file.score(kind), choice.masks[f"first.{kind}"]
        assert ((mask >= 0) & (mask <= 1)).all()
        assert (mask[-1] == 0).all(), "above the anchor"
        order = np.argsort(score[:-1], axis=None)
        assert (np.diff(mask[:-1].ravel()[order]) >= -1e-6).all()
        short = any(f"too few {kind} " in note for note in choice.notes)
        assert mask.mean() == pytest.approx(budget, abs=1e-3) or (short and mask.mean() < budget)
    if scale == "share":
        assert all((choice.masks[f"first.{k}"][file.score(k) <= 0] == 0).all() for k in UNIT_KINDS)


def test_weighted_against_a_plain_reading() -> None:
    """Two thirds of the layers have scores: at a budget of a third γ is 1, since the mean of (rank − ½) / n is a half."""
    file = score_file(4)
    mask = weighted({"first": [file]}, 1 / 3).masks["first.neuron"]
    score = file.score("neuron")[:2]
    expected = [[((score <= value).sum() - 0.5) / 96 for value in row] for row in score]
    assert mask[:2] == pytest.approx(np.array(expected), abs=1e-4)
    share = weighted({"first": [file]}, 0.1, "share").masks["first.neuron"]
    above = share[(share > 0) & (share < 1)]
    ratio = above / file.score("neuron")[(share > 0) & (share < 1)]
    assert ratio == pytest.approx(np.full_like(ratio, ratio[0]), rel=1e-4), "in proportion to the score, up to 1"


def test_weighted_overlap_and_what_it_says() -> None:
    one, other = score_file(1), score_file(2, SECOND)
    both = {"first": [one], "second": [other]}
    total, share, winner = (weighted(both, 0.5, "rank", overlap).masks for overlap in ("sum", "share", "winner"))  # type: ignore[arg-type]
    for kind in UNIT_KINDS:
        a, b = total[f"first.{kind}"], total[f"second.{kind}"]
        assert share[f"first.{kind}"] == pytest.approx(a / np.maximum(a + b, 1), abs=1e-6)
        assert np.array_equal(winner[f"first.{kind}"], np.where(a >= b, a, 0))
        assert np.array_equal(winner[f"second.{kind}"], np.where(b > a, b, 0))
    notes = weighted({"first": [one]}, 0.9, "share").notes
    assert any("too few neuron components have a score: mean coefficient 0." in note for note in notes)
    for budget in (0, 1.5):
        with pytest.raises(InputError, match="budget"):
            weighted({"first": [one]}, budget)
    bare = ScoreFile(one.metadata, {n: np.full_like(a, np.nan) if n == "head.screen" else a for n, a in one.arrays.items()})
    assert (weighted({"first": [bare]}, 0.5).masks["first.head"] == 0).all()


def test_a_file_that_is_left_out_opens_no_layers() -> None:
    """An anchor that is not valid may lie deeper; components above the one that is used have no score."""
    used = score_file(3)
    left = score_file(4, behavior="other", valid=False)
    assert left.metadata.anchor is not None
    deeper = left.metadata.anchor.model_copy(update={"layer": LAYERS})
    left = ScoreFile(left.metadata.model_copy(update={"anchor": deeper}), left.arrays)
    assert left.depth > used.depth
    for scale in ("rank", "share"):
        both, alone = (weighted({"first": files}, 0.3, scale) for files in ([used, left], [used]))  # type: ignore[arg-type]
        assert all(np.array_equal(both.masks[name], alone.masks[name]) for name in alone.masks)
    assert all((mask[used.depth :] == 0).all() for mask in both.masks.values())


# ---------------------------------------------------------------------------------------------------------------- controls
masks = st.integers(0, 2**32 - 1).map(
    lambda seed: {
        name: np.random.default_rng([seed, i]).choice(np.float32([0, 0.5, 1]), size=(LAYERS, UNITS[name.split(".")[1]]))
        for i, name in enumerate(NAMES)
    }
)


@given(masks, st.integers(0, 2**32 - 1), st.booleans())
def test_random_keeps_the_counts_of_each_kind_and_expert(given_masks: Masks, seed: int, per_layer: bool) -> None:
    before = {name: mask.copy() for name, mask in given_masks.items()}
    drawn = random_like(given_masks, seed, per_layer)
    assert list(drawn) == list(given_masks)
    for name, mask in given_masks.items():
        assert np.array_equal(mask, before[name])
        assert np.array_equal(np.sort(drawn[name], axis=None), np.sort(mask, axis=None))
        if per_layer:
            assert np.array_equal(np.sort(drawn[name], axis=1), np.sort(mask, axis=1))
    assert shares(recipe(), drawn, PARAMETERS) == shares(recipe(), given_masks, PARAMETERS)
    again = random_like(dict(reversed(given_masks.items())), seed, per_layer)
    assert all(np.array_equal(again[name], drawn[name]) for name in drawn)


def test_random_shuffles_and_seeds_differ() -> None:
    mask = {"first.neuron": (np.arange(LAYERS * 48) < 72).astype(np.float32).reshape(LAYERS, 48)}
    draws = [random_like(mask, seed)["first.neuron"] for seed in range(5)]
    assert len({draw.tobytes() for draw in draws}) == 5
    assert np.mean([draw[-1].mean() for draw in draws]) == pytest.approx(0.5, abs=0.2)
    assert random_like(mask, 0, per_layer=True)["first.neuron"][0].all()


@given(masks, st.integers(0, 1000), st.booleans())
def test_magnitude_keeps_the_counts_and_the_largest(given_masks: Masks, seed: int, per_layer: bool) -> None:
    generator = np.random.default_rng(seed)
    norms = {name: generator.random(mask.shape, np.float32) for name, mask in given_masks.items()}
    made = magnitude_like(given_masks, norms, per_layer)
    for name, mask in given_masks.items():
        assert np.array_equal(np.sort(made[name], axis=None), np.sort(mask, axis=None))
        rows = (
            zip(made[name], norms[name], mask, strict=True)
            if per_layer
            else [(made[name].ravel(), norms[name].ravel(), mask.ravel())]
        )
        for row, norm, original in rows:
            assert np.array_equal(np.sort(row), np.sort(original))
            assert (np.diff(row[np.argsort(norm)]) >= 0).all(), "coefficients rise with the norms"


@given(masks, st.integers(0, 1000), st.integers(0, 5))
def test_norm_matched_shuffles_move_as_much(given_masks: Masks, seed: int, drawn: int) -> None:
    generator = np.random.default_rng(seed)
    norms = {name: np.exp(generator.normal(0, 0.3, mask.shape)).astype(np.float32) for name, mask in given_masks.items()}
    try:
        made = norm_matched(given_masks, norms, drawn, tolerance=0.02)
    except InputError as error:  # a tiny model may have none; the message says how near the nearest came
        found = float(str(error).split("found ")[1].split(" at best")[0])
        event("no shuffle within the tolerance")
        assert found > 0.02
        return
    for name in NAMES:
        for masked, rel in ((lambda m: m, 0.021), (lambda m: 1 - m, 0.101)):
            moved = [float(((masked(m[name]) * norms[name]).astype(np.float64) ** 2).sum()) ** 0.5 for m in (given_masks, made)]
            assert moved[1] == pytest.approx(moved[0], rel=rel)
    for name, mask in given_masks.items():
        assert np.array_equal(np.sort(made[name], axis=1), np.sort(mask, axis=1)), "counts of each layer stay"
    again = norm_matched(dict(reversed(given_masks.items())), norms, drawn, tolerance=0.02)
    assert all(np.array_equal(again[name], made[name]) for name in made)


def test_a_norm_matched_shuffle_is_a_shuffle_and_plain_ones_move_less() -> None:
    """A policy that takes the largest deltas: a shuffle within layers moves far less, a matched one as much."""
    generator = np.random.default_rng(0)
    norms = {"first.neuron": np.exp(generator.normal(0, 1, (8, 400))).astype(np.float32)}
    mask = {"first.neuron": (norms["first.neuron"] > np.quantile(norms["first.neuron"], 0.7)).astype(np.float32)}
    mask["first.neuron"][:, ::7] = 1 - mask["first.neuron"][:, ::7]
    wanted = moved_norm(list(mask.values()), list(norms.values()))
    plain = moved_norm(list(random_like(mask, 1, per_layer=True).values()), list(norms.values()))
    draws = [norm_matched(mask, norms, seed) for seed in range(5)]
    assert plain < 0.8 * wanted
    for drawn in draws:
        assert moved_norm(list(drawn.values()), list(norms.values())) == pytest.approx(wanted, rel=TOLERANCE)
        assert (drawn["first.neuron"] != mask["first.neuron"]).mean() > 0.03
    assert len({drawn["first.neuron"].tobytes() for drawn in draws}) == 5
    with pytest.raises(InputError, match=r"delta norms of first\.neuron"):
        norm_matched(mask, {}, 0)
    with pytest.raises(InputError, match=r"within -1 \(moved\) and -5 \(left out\) of the recipe's; found"):
        norm_matched(mask, norms, 0, tolerance=-1)


def test_a_norm_matched_shuffle_leaves_out_as_much_of_every_kind() -> None:
    """Few heads weigh little beside neurons: matched together, what is left out of them would be anything."""
    generator = np.random.default_rng(1)
    norms = {
        "first.head": np.exp(generator.normal(2, 0.3, (30, 9))).astype(np.float32),
        "first.neuron": np.exp(generator.normal(0, 0.3, (30, 1536))).astype(np.float32),
    }
    mask = {name: np.ones_like(norm) for name, norm in norms.items()}
    large = np.argsort(norms["first.head"], axis=None)[-90::4]
    mask["first.head"].ravel()[large] = 0
    mask["first.neuron"][norms["first.neuron"] > np.quantile(norms["first.neuron"], 0.99)] = 0
    for seed in range(3):
        drawn = norm_matched(mask, norms, seed)
        for name in mask:
            left = [moved_norm([1 - m[name]], [norms[name]]) for m in (mask, drawn)]
            assert left[1] == pytest.approx(left[0], rel=5 * TOLERANCE)
        for name, share in coinciding(mask, drawn).items():
            by_hand = ((mask[name] == 0) & (drawn[name] == 0)).sum() / (mask[name] == 0).sum()
            assert share == pytest.approx(by_hand)
            assert 0 < share < 0.9, "nothing else is as large as the largest, so many of them stay"
    assert coinciding(mask, mask) == dict.fromkeys(mask, 1.0)
    assert coinciding({"first.kv": np.ones((3, 2), np.float32)}, {"first.kv": np.ones((3, 2), np.float32)}) == {}


def test_what_leaves_out_nothing_is_not_matched_by_what_does() -> None:
    """A head without a delta is left out; no other head is."""
    norms, mask = {"first.head": np.ones((2, 64), np.float32)}, {"first.head": np.ones((2, 64), np.float32)}
    norms["first.head"][0, 0] = mask["first.head"][0, 0] = 0
    for seed in range(20):
        assert norm_matched(mask, norms, seed)["first.head"][0, 0] == 0


def test_magnitude_needs_norms_of_every_mask() -> None:
    mask = {"first.head": np.ones((3, 4), np.float32)}
    for norms in ({}, {"first.head": np.ones((4, 3))}, {"first.head": np.full((3, 4), np.nan)}):
        with pytest.raises(InputError, match=r"delta norms of first\.head"):
            magnitude_like(mask, norms)


def test_shares_are_said_by_kind() -> None:
    mask = {"first.head": np.float32([[1, 0, 0, 0]] * 3), "first.kv": np.zeros((3, 2), np.float32)}
    mask["first.neuron"] = np.full((3, 48), 0.5, np.float32)
    first, second = shares(recipe(), mask, PARAMETERS)
    assert (first["head"], first["kv"], first["neuron"]) == ("25.0 %", "0.0 %", "50.0 %")
    expected = 100 * (0.25 * 12 * 512 + 0.5 * 144 * 96) / TOTAL
    assert first["head + kv + neuron"] == f"{expected:.1f} %"
    assert second["everything else"] == "0"
    untold = shares(recipe(), mask, {})[0]
    assert (untold["head"], untold["head + kv + neuron"]) == ("25.0 %", "–"), "parameters that are not told weigh nothing"
    some = shares(recipe(), {"first.neuron": mask["first.neuron"]}, PARAMETERS)[0]
    assert (some["head"], some["neuron"], some["head + kv + neuron"]) == ("100.0 %", "50.0 %", "–")
    ruled, plain = shares(recipe(("L*.head.0", "first", 0.5)), {"first.neuron": mask["first.neuron"]}, PARAMETERS)
    assert (ruled["head"], ruled["neuron"], ruled["head + kv + neuron"]) == ("by rules", "50.0 %", "by rules")
    assert plain["head + kv + neuron"] == "0.0 %", "no rule is about the second"


def test_shares_of_rules_are_said_where_the_sizes_are_known() -> None:
    """As those of masks with the same coefficients."""
    shapes = {"head": (3, 4), "kv": (3, 2), "neuron": (3, 48)}
    ruled = recipe(("L*.head.0", "first", 0.5), ("L1.kv.*", "first", 0.25), ("L2.neuron.7", "second", 0.75))
    found = resolved(ruled, {}, shapes)
    masks = {f"{name}.{kind}": array for name in ruled.experts for kind, array in found.units[name].items() if kind in shapes}
    assert masks["first.head"].mean() == pytest.approx((3 + 0.5) / 4)
    told = shares(ruled, {}, PARAMETERS, found)
    assert told == shares(recipe(), masks, PARAMETERS)
    assert (told[0]["head"], told[0]["kv"], told[0]["neuron"]) == ("87.5 %", "75.0 %", "100.0 %")


@pytest.mark.parametrize(
    ("policy", "parameters", "said"),
    [
        ("top", {"budget": 2}, "policy top: budget: expected a number from 0 to 1; found 2"),
        ("top", {"budget": 0}, "policy top: budget: expected a share above 0"),
        ("solve", {"budget": 0}, "policy solve: budget: expected a share above 0"),
        ("conflict", {"weight.x": -1}, "weight.x: expected a positive number"),
        ("conflict", {"weight.x": float("nan")}, "weight.x: expected a positive number"),
        ("conflict", {"weight": 2}, "one of weight.NAME, agreement, weighting, certainty"),
        ("conflict", {"strength.a": "much"}, "strength.a: expected a number from -100 to 100"),
        ("sce", {"strength.a": 0.5}, "policy sce: expected no strengths"),
        ("weighted", {"scale": "none"}, "policy weighted: scale: expected one of rank, share"),
        ("conflict", {"weight.x": "high"}, "weight.x: expected a positive number"),
        ("solve", {"limit.x": float("nan")}, "limit.x: expected a number"),
        ("ties", {"density": "high"}, "policy ties: density: expected a number from 0 to 1"),
        ("della", {"density": 0.1, "epsilon": 0.2}, "density ± epsilon between 0 and 1"),
        ("random", {"per_layer": 1}, "policy random: per_layer: expected true or false"),
    ],
)
def test_a_pipeline_refuses_parameters_before_anything_is_measured(policy: str, parameters: dict[str, Any], said: str) -> None:
    """By the checks that recipes have."""
    like = {"like": "other"} if policy == "random" else {}
    with pytest.raises(InputError, match=re.escape(said)):
        check_parameters(policy, parameters)
    if "weight" not in parameters:  # of which a pipeline says itself that it has none
        with pytest.raises(ValidationError, match=re.escape(said)):
            RecipePlan.model_validate({"policy": policy, "parameters": parameters} | like)
    for name, value in {"top": {"budget": 0.2}, "della": {"lambda": 2.0}, "conflict": {"strength.a": 0.5}}.items():
        check_parameters(name, value)
