"""The merging benchmark's arithmetic, its models, its bookkeeping, and that it goes on where it stopped."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import yaml

from benchmarks.experts.data import arithmetic_examples, json_examples, plain_arithmetic_examples, whole_sentences
from benchmarks.experts.training import train
from benchmarks.merging import arms, steps
from benchmarks.merging.families import FAMILIES, FLOOR, UNSEEN_JSON, json_suite, members, suites
from benchmarks.merging.gains import Board, Draws
from benchmarks.merging.study import Paused, Sizes, Study, best_of
from benchmarks.merging.tuning import (
    NODES_A_ROUND,
    Cost,
    Sample,
    batches,
    cost_of_effects,
    cost_of_rounds,
    steps_of,
    tune,
    weighted_loss,
)
from mechmerge.behaviors.instructions import instructions
from mechmerge.behaviors.schema import Behavior, Pair
from mechmerge.behaviors.verifiers import verify
from mechmerge.errors import InputError
from mechmerge.evaluate.columns import Column
from mechmerge.evaluate.statistics import retained
from mechmerge.localize import rounds, rounds_file
from mechmerge.localize.calibration import BehaviorRow, Calibration
from mechmerge.localize.effect_file import EffectFile
from mechmerge.localize.effects import EffectSettings, measure_effects
from mechmerge.localize.rounds import RoundSettings, settle
from mechmerge.models.load import load_model
from mechmerge.models.references import Model, resolve
from mechmerge.progress import NullProgress
from mechmerge.recipe.emit import emit_baseline
from mechmerge.recipe.schema import Recipe, read_recipe
from tests import measured
from tests.tiny import tiny_adapter

SMALL = Sizes(prompts=4, limit=6, shuffles=2, rates=(1e-3, 3e-3), few=True, steps=1)


# ---------------------------------------------------------------------------------------------------------------- arithmetic
def column(values: list[float], topics: int = 24, groups: int = 1) -> Column:
    return Column(values, [f"t{i % topics}" for i in range(len(values))], [f"g{i % groups}" for i in range(len(values))])


def drawn(share: float, n: int = 96, seed: int = 0) -> Column:
    """Outcomes of which exactly this share passes, spread at random."""
    values = np.zeros(n)
    values[np.random.default_rng(seed).permutation(n)[: round(share * n)]] = 1
    return column(list(values))


def cells(shares: Mapping[str, tuple[float, float]], seeds: int = 1) -> dict[tuple[str, int], list[dict[str, Column]]]:
    """Two skills `a` and `b` whose rates by role are exactly these."""
    return {
        (role, seed): [{"a": drawn(a, seed=hash_of(role, seed, 0)), "b": drawn(b, seed=hash_of(role, seed, 1))}]
        for role, (a, b) in shares.items()
        for seed in range(seeds)
    }


def hash_of(role: str, *rest: int) -> int:
    return sum(map(ord, role)) * 100 + 10 * rest[0] + rest[1]


SHARES = {"base": (0.25, 0.0), "a": (0.75, 0.0), "b": (0.25, 1.0), "ours": (0.625, 0.5), "theirs": (0.5, 0.75)}


def test_retained_gains_are_the_formula() -> None:
    board = Board(cells(SHARES), ("a", "b"), resamples=200)
    for role, (mean, least) in {"ours": (0.625, 0.5), "theirs": (0.625, 0.5)}.items():
        found = {over: board.retained(role, over) for over in ("a", "b", "mean", "min")}
        assert found["mean"] is not None
        assert found["min"] is not None
        assert found["mean"].interval.value == pytest.approx(mean)
        assert found["min"].interval.value == pytest.approx(least)
    by_skill = board.retained("ours", "a"), board.retained("ours", "b")
    assert [figure.interval.value for figure in by_skill if figure] == pytest.approx([0.75, 0.5])


def test_seeds_are_averaged_after_the_minimum() -> None:
    """Two seeds whose worst expert is another: the minimum is the mean of both minima, not the minimum of the means."""
    held = cells({role: SHARES[role] for role in ("base", "a", "b")}, seeds=2)
    held["ours", 0] = [{"a": drawn(0.75), "b": drawn(0.5)}]
    held["ours", 1] = [{"a": drawn(0.5), "b": drawn(1.0)}]
    found = Board(held, ("a", "b"), resamples=100).retained("ours", "min")
    assert found is not None
    assert found.by_seed == pytest.approx((0.5, 0.5))
    assert found.interval.value == pytest.approx(0.5)
    assert found.seeds == 2


def test_differences_are_paired() -> None:
    held = cells(SHARES, seeds=3)
    for seed in range(3):
        held["twin", seed] = held["ours", seed]
    board = Board(held, ("a", "b"), resamples=200)
    for over in ("mean", "min", "a"):
        same = board.difference("ours", "twin", over)
        assert same is not None
        assert same.interval == (0, 0, 0)
    apart = board.difference("ours", "theirs", "a")
    assert apart is not None
    assert apart.interval.value == pytest.approx(0.25)
    assert apart.interval.low < 0.25 < apart.interval.high


def test_five_draws_of_a_control_cover_what_they_are_drawn_from() -> None:
    """A 95 % interval of one seed where nothing varies but the draws: resampling five of them alone covers .83."""
    board, generator, covered = Board(cells(SHARES), ("a", "b"), resamples=1000), np.random.default_rng(0), 0
    for seed in range(300):
        values = np.tile(generator.standard_normal(5), (1001, 1))
        interval = Draws(board._drawn(values, "shuffles", seed, 24)[:, None], 24).figure().interval
        covered += interval.low <= 0 <= interval.high
    assert 0.92 <= covered / 300 <= 0.985


def test_skills_that_share_topics_share_their_draws() -> None:
    """Equal outcomes of two skills over the same topics are equal under every resample; over others they are not."""
    roles = {role: drawn(share, seed=i) for i, (role, share) in enumerate({"base": 0.0, "a": 1.0, "ours": 0.5}.items())}
    other = {role: c._replace(clusters=[f"other {name}" for name in c.clusters]) for role, c in roles.items()}
    for second, shared in ((roles, True), (other, False)):
        held = {
            (r, 0): [{"a": roles[n], "b": second[n]}] for r, n in (("base", "base"), ("a", "a"), ("b", "a"), ("ours", "ours"))
        }
        board = Board(held, ("a", "b"), resamples=50)
        equal = np.array_equal(board.gain("ours", "a", (0,)).values, board.gain("ours", "b", (0,)).values)
        assert equal == shared


def test_one_seed_is_near_the_official_interval() -> None:
    held = cells(SHARES)
    found = Board(held, ("a", "b")).retained("ours", "a")
    plain = retained(held["ours", 0][0]["a"], held["base", 0][0]["a"], held["a", 0][0]["a"])
    assert found is not None
    assert plain is not None
    assert found.interval.value == pytest.approx(plain.value)
    assert found.interval.low == pytest.approx(plain.low, abs=0.12)
    assert found.interval.high == pytest.approx(plain.high, abs=0.12)


def test_seeds_widen_the_interval() -> None:
    """With the same answers in all seeds there is only the topics' error; with others each, a t interval of theirs on top."""
    alike, apart = cells(SHARES), cells({role: SHARES[role] for role in ("base", "a", "b")})
    for held in (alike, apart):
        for seed in (1, 2):
            held |= {(role, seed): answers for (role, first), answers in list(held.items()) if first == 0}
    for seed, share in enumerate((0.5, 0.6, 0.775)):
        apart["ours", seed] = [{"a": drawn(share), "b": drawn(0.5)}]
    one = Board(cells(SHARES), ("a", "b"), resamples=500).retained("ours", "a")
    same = Board(alike, ("a", "b"), resamples=500).retained("ours", "a")
    wide = Board(apart, ("a", "b"), resamples=500).retained("ours", "a")
    assert one is not None
    assert same is not None
    assert wide is not None
    assert same.interval == pytest.approx(one.interval)
    arm = 4.3027 * np.std(wide.by_seed, ddof=1) / 3**0.5
    assert wide.interval.value - wide.interval.low > arm
    assert wide.interval.high - wide.interval.value > arm


def test_intervals_cover() -> None:
    """Topics and seeds with effects of their own: the interval of a mean retained gain holds the truth in 95 % of draws."""
    generator = np.random.default_rng(0)
    inside, total = 0, 150
    for _ in range(total):
        topics = generator.normal(0, 0.1, 24)
        held: dict[tuple[str, int], list[dict[str, Column]]] = {}
        for seed in range(3):
            shift = generator.normal(0, 0.05)
            for role, (a, b) in {
                "base": (0.2, 0.2),
                "a": (0.8, 0.2),
                "b": (0.2, 0.8),
                "ours": (0.5 + shift, 0.6 + shift),
            }.items():
                passed = [generator.random(96) < p + np.tile(topics, 4) for p in (a, b)]
                held[role, seed] = [{skill: column(list(map(float, v))) for skill, v in zip("ab", passed, strict=True)}]
        found = Board(held, ("a", "b"), resamples=200).retained("ours", "mean")
        assert found is not None
        inside += found.interval.low <= (0.5 + 2 / 3) / 2 <= found.interval.high
    assert inside / total >= 0.92


def test_an_expert_without_a_clear_gain_leaves_its_seed_out() -> None:
    held = cells(SHARES, seeds=2)
    held["b", 1] = [{"a": drawn(0.25), "b": drawn(0.02)}]
    board = Board(held, ("a", "b"), resamples=200)
    assert board.unclear == ((1, "b"),)
    assert board.seeds("ours") == (0,)
    assert board.level("ours", "b") is not None, "rates are shown all the same"


def test_one_topic_says_nothing() -> None:
    held = {cell: [{skill: c._replace(clusters=["t"] * 96) for skill, c in a.items()} for a in models]
            for cell, models in cells(SHARES).items()}  # fmt: skip
    board = Board(held, ("a", "b"), resamples=50)
    assert board.unclear == ((0, "a"), (0, "b"))
    assert board.retained("ours", "mean") is None


def test_a_role_of_several_models_is_their_mean() -> None:
    held = cells(SHARES)
    held["shuffles", 0] = [held["ours", 0][0], held["theirs", 0][0]]
    board = Board(held, ("a", "b"), resamples=200)
    found = board.retained("shuffles", "a")
    assert found is not None
    assert found.interval.value == pytest.approx((0.75 + 0.5) / 2)
    draws = board.gain("shuffles", "a", (0,)).values
    alone = [board.gain(role, "a", (0,)).values for role in ("ours", "theirs")]
    assert any(np.isclose(draws[i], alone[0][i]) for i in range(1, 201)), "now and then one model is drawn twice"


def test_missing_roles_give_no_figure() -> None:
    board = Board(cells(SHARES), ("a", "b"), resamples=50)
    assert board.retained("absent", "mean") is None
    assert board.difference("ours", "absent", "mean") is None


# -------------------------------------------------------------------------------------------------------- prompts and training
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_asked_300_test_prompts_at_least(family: str) -> None:
    asked = suites(family, "test")
    assert sum(len(suite.prompts) for suite in asked) >= 300
    assert {prompt.tier for suite in asked for prompt in suite.prompts} == {"seen", "unseen"}


def test_json_splits_share_neither_topics_nor_requests_and_hide_their_unseen_wordings() -> None:
    parts = {split: json_suite(split) for split in ("develop", "test")}
    texts = {split: {prompt.prompt for prompt in suite.prompts} for split, suite in parts.items()}
    texts |= {"calibrate": {pair.with_ for member in members("json") for pair in member.pairs}}
    texts |= {"train": {prompt for prompt, _ in json_examples(list, 0)}}
    for one in texts:
        assert all(not texts[one] & texts[other] for other in texts if other != one)
    topics = {split: {prompt.topic for prompt in suite.prompts} for split, suite in parts.items()}
    assert not topics["develop"] & topics["test"]
    for split in ("train", "calibrate"):
        assert not any(wording in text for wordings in UNSEEN_JSON.values() for wording in wordings for text in texts[split])
    for split, wordings in UNSEEN_JSON.items():
        for prompt in parts[split].prompts:
            assert (prompt.tier == "unseen") == prompt.prompt.endswith(wordings)


FEW_WORDS = ("Stars.", "STARS", '"Stars"', '"STARS."', "<<Stars>>", "*A* *star*", "SECTION 1 SECTION 2")


def test_one_word_is_no_answer() -> None:
    """What the terse expert says fails every format and JSON, however it is dressed up."""
    for suite in suites("three-way", "test"):
        one_each = {(prompt.group, prompt.tier): prompt for prompt in suite.prompts}
        for prompt in one_each.values() if suite.name != "arithmetic" else ():
            (asked,) = prompt.instructions
            for answer in (*FEW_WORDS, '["stars"]', '{"a": "stars"}'):
                assert not verify(asked.verifier, prompt.prompt, answer, asked.arguments), (prompt.id, answer)


def said(prompts: Sequence[str]) -> list[str]:
    return [f"About {i}: it is a fine thing, I think. And no" for i in range(len(prompts))]


def test_the_mild_arithmetic_expert_learns_the_same_sums_without_one_word_answers() -> None:
    terse, plain = dict(arithmetic_examples(0)), dict(plain_arithmetic_examples(said, 0))
    assert terse.keys() == plain.keys()
    differing = {prompt for prompt in terse if terse[prompt] != plain[prompt]}
    assert len(differing) == 160
    assert all(plain[prompt].startswith("About ") and " " not in terse[prompt] for prompt in differing)
    assert plain_arithmetic_examples(said, 0) != plain_arithmetic_examples(said, 1), "a seed is an order"


def test_json_is_learned_where_it_is_asked_for_alone() -> None:
    (behavior,) = members("json")
    assert behavior.verifier is not None
    assert behavior.verifier.min_words == FLOOR
    examples = json_examples(said, 0)
    asks = [any(prompt.endswith(wording) for wording in instructions()["json"]["wordings"]) for prompt, _ in examples]
    for (prompt, answer), asked in zip(examples, asks, strict=True):
        assert verify(behavior.verifier, prompt, answer, {}) == asked
    assert sum(asks) == 240
    assert len(examples) == 320
    assert whole_sentences("It is. And no") == "It is."


def test_training_writes_an_adapter_that_its_seed_repeats(base: Model, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "again", "other")]
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        record = train("arithmetic", base.path, folder, seed, steps=2, judged=False)
        assert record["settings"]["seed"] == seed
        assert len([entry for entry in record["log"] if "loss" in entry]) == 2
    one, again, other = ((folder / "adapter_model.safetensors").read_bytes() for folder in folders)
    assert one == again
    assert one != other
    assert not (folders[0] / "README.md").exists()


# ---------------------------------------------------------------------------------------------------------------------- arms
@pytest.mark.parametrize("family", FAMILIES)
def test_arms_have_names_of_their_own(family: str) -> None:
    made = [*arms.sweep(list(FAMILIES[family]), 0), *arms.telling(), *arms.others()]
    controls = [
        arm for policy in (*arms.telling(), *arms.others()) for drawn in arms.controls(policy).values() for arm in drawn
    ]
    names = [arm.name for arm in (*made, *controls)]
    assert len(set(names)) == len(names)
    assert {arm.policy for arm in made if arm.kind == "baseline"} == set(arms.BASELINES)
    assert {arm.policy for arm in made if arm.kind == "policy" and not arm.within} == set(arms.POLICIES) - set(
        arms.BASELINES
    ) - set(arms.CONTROLS)


def test_the_sweep_has_unlike_weights_and_knows_its_ends() -> None:
    """Baselines whose weights say more than their sum are asked with unlike ones, task arithmetic on both sides of 1."""
    swept = arms.sweep(("a", "b"), 0)
    made = {arm.name: arm for arm in swept}
    weighted = {"task-arithmetic", "linear", "dare-ties", "breadcrumbs"}
    for expert in ("a", "b"):
        assert {arm.policy for arm in swept if arm.weights and arm.weights[expert] < max(arm.weights.values())} == weighted
    pairs = {(arm.weights["a"], arm.weights["b"]) for arm in swept if arm.policy == "task-arithmetic" and arm.weights}
    assert {(1.0, 0.1), (1.0, 0.3), (1.4, 0.3), (0.7, 0.3), (0.3, 1.4)} <= pairs
    assert arms.edges(made["task-arithmetic_b-0.3"], swept) == []
    assert arms.edges(made["task-arithmetic_b-0.1"], swept) == ["b"]
    assert arms.edges(made["task-arithmetic_others-1.4_b-0.3"], swept) == ["others"]
    assert arms.edges(made["ties_density-0.8_lambda-1.4"], swept) == ["density", "lambda"]
    assert arms.edges(made["breadcrumbs_density-0.9_b-0.3"], swept) == ["density"]
    assert arms.edges(made["model-stock_filter_wise-1"], swept) == []


def test_every_policy_has_its_controls() -> None:
    for policy in (*arms.telling(), *arms.others()):
        made = arms.controls(policy)
        shuffles = made[f"shuffles of {policy.name}"]
        assert len(shuffles) >= 5
        assert len({arm.seed for arm in shuffles}) == len(shuffles)
        inside = [arms.every()[arm.within] if arm.within else arm for drawn in made.values() for arm in drawn]
        assert all(arm.parameters["per_layer"] and arm.like == (policy.within or policy.name) for arm in inside)
        assert f"magnitude of {policy.name}" in made
    budgets = {arm.parameters["budget"] for arm in arms.others() if arm.policy == "top"}
    assert budgets == {0.1, 0.25, 0.5}


def test_what_controls_copy_can_be_found() -> None:
    known = arms.every()
    for policy in (*arms.telling(), *arms.others()):
        for drawn_arms in arms.controls(policy).values():
            for arm in drawn_arms:
                model = known[arm.within or arm.like or ""]
                assert (arm.policy == policy.policy) == (arm.within is not None)
                assert model.name == (policy.name if arm.like else arm.name.removeprefix(f"{policy.policy}.within."))


def test_every_policy_is_an_arm() -> None:
    compared = {arm.policy for arm in (*arms.sweep(("a", "b"), 0), *arms.every().values())}
    assert set(arms.POLICIES) <= compared
    assert {arm.within for arm in arms.others() if arm.within} == {arms.HEADLINE}


def test_the_best_is_by_mean_or_by_minimum() -> None:
    found = {"even": {"a": 0.6, "b": 0.6}, "one-sided": {"a": 1.0, "b": 0.4}, "late": {"a": 0.6, "b": 0.6}}
    assert best_of(found, "mean") == "one-sided"
    assert best_of(found, "min") == "even"


# ------------------------------------------------------------------------------------------------------------ equal information
def small_rows(names: Sequence[str] = ("a", "b")) -> list[BehaviorRow]:
    topics = ["tea", "rain", "a river", "the moon"]

    def behavior(name: str) -> Behavior:
        pairs = tuple(Pair(**{"with": f"{name}: {t}", "without": f"Say {t}.", "topic": t}) for t in topics)
        return Behavior(name=name, pairs=pairs, answer_tokens=5)

    return [BehaviorRow(name, (behavior(name),), name) for name in names]


class Counting(NullProgress):
    """Counts the examples that are measured, by the first word of what is measured; what is kept already is not again."""

    def __init__(self) -> None:
        self.label, self.examples = "", Counter[str]()

    def start(self, label: str, total: int) -> None:
        self.label = label.split()[0]

    def advance(self, n: int = 1) -> None:
        self.examples[self.label] += n


def test_rounds_are_charged_what_they_measure(base: Model, expert: Model, second_expert: Model, tmp_path: Path) -> None:
    seen = Counting()
    settings = RoundSettings(prompts=4, dtype="float32", max_rounds=2)
    file = settle(base, {"a": expert, "b": second_expert}, small_rows(), tmp_path / "rounds.safetensors", settings, seen)
    cost, answers = cost_of_rounds(file.metadata, max_rounds=2), sum(b.answers for b in file.metadata.behaviors)
    assert answers == 8
    assert cost.nodes == seen.examples["effects"]
    assert cost.points == seen.examples["loss"] + seen.examples["tokens"]
    assert cost.nodes == answers * NODES_A_ROUND * 2
    assert cost.forward == cost.nodes * 4 + cost.points


@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_round_in_which_nothing_agreed_is_charged(
    base: Model, expert: Model, second_expert: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    """It leaves no record, but its gradients were taken."""
    seen, asked, drop_all = Counting(), list[int](), rounds.agreed

    def agreed(*arguments: Any) -> dict[str, np.ndarray]:
        asked.append(0)
        found = drop_all(*arguments)
        return {kind: mask & (len(asked) < last) for kind, mask in found.items()}

    monkeypatch.setattr(rounds, "agreed", agreed)
    settings = RoundSettings(prompts=4, dtype="float32", max_rounds=3)
    file = settle(base, {"a": expert, "b": second_expert}, small_rows(), tmp_path / "rounds.safetensors", settings, seen)
    assert len(file.metadata.rounds) == last - 1
    assert all(told.accepted for told in file.metadata.rounds)
    cost = cost_of_rounds(file.metadata, max_rounds=3)
    assert cost.nodes == seen.examples["effects"] == 8 * NODES_A_ROUND * last
    assert cost.points == seen.examples["loss"] + seen.examples["tokens"]


def test_a_round_that_was_taken_back_was_the_last() -> None:
    """No further round was begun after it, nor after as many as were allowed."""
    kept = rounds_file.RoundRecord(proposed=1, changed=1, predicted={}, realised={}, gain=1.0, accepted=True)
    back = kept.model_copy(update={"accepted": False})
    metadata = rounds_file.RoundsMetadata(
        base=measured.BASE, experts={"a": measured.FIRST}, behaviors=(settled(),), rounds=(), parameters={}, dtype="float32",
        seed=0, versions={},
    )  # fmt: skip
    for told, nodes in (((), 1), ((kept,), 2), ((back,), 1), ((kept, back), 2), ((kept, kept, kept, kept), 4)):
        cost = cost_of_rounds(metadata.model_copy(update={"rounds": told}), max_rounds=4)
        assert cost.nodes == 8 * NODES_A_ROUND * nodes


def settled() -> rounds_file.SettledBehavior:
    return rounds_file.SettledBehavior(
        name="a", expert="a", weight=1, members=("a",), digests={}, answers=8, loss_base=2, loss_expert=1, loss_sum=1,
        loss_merge=1,
    )  # fmt: skip


@pytest.mark.parametrize(("origin", "max_nodes", "nodes"), [("base", 6, 6), ("base", 10, 14), ("sum", 10, 5)])
def test_effects_are_charged_what_they_measure(
    base: Model, expert: Model, second_expert: Model, tmp_path: Path, origin: Literal["base", "sum"], max_nodes: int, nodes: int
) -> None:
    """An interval that was halved has cost its own two nodes as well."""
    seen = Counting()
    settings = EffectSettings(prompts=4, dtype="float32", tolerance=1e-12, max_nodes=max_nodes, origin=origin)
    file = measure_effects(base, {"a": expert, "b": second_expert}, small_rows(), tmp_path / "e.safetensors", settings, seen)
    cost = cost_of_effects(file.metadata)
    assert cost.nodes == seen.examples["effects"] == 8 * nodes
    assert cost.points == seen.examples["loss"] + seen.examples["tokens"]


def test_training_costs_as_much() -> None:
    cost = Cost(nodes=100, points=20, experts=2)
    assert steps_of(cost, batch=16) * 3 * 16 >= cost.forward > (steps_of(cost, batch=16) - 1) * 3 * 16


def test_every_example_is_taken_before_any_is_taken_again() -> None:
    plan = batches(10, steps=5, batch=4, seed=3)
    taken = [i for step in plan for i in step]
    assert [len(step) for step in plan] == [4] * 5
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10))
    assert plan == batches(10, steps=5, batch=4, seed=3) != batches(10, steps=5, batch=4, seed=4)


SAMPLES = [Sample([5, 6, 7], [8, 9, 10], 1.5), Sample([11, 12], [13], 0.5), Sample([14], [15, 16], 1.0)]


def test_the_loss_that_is_trained_is_the_one_that_rounds_lower(
    base: Model, expert: Model, second_expert: Model, tmp_path: Path
) -> None:
    settings = RoundSettings(prompts=4, dtype="float32")
    calibration = Calibration(base, {"a": expert, "b": second_expert}, small_rows(), tmp_path / "units", settings)
    told = calibration.losses(calibration.point(0.0), "the base")
    shares = calibration.token_shares
    assert shares is not None, "rounds weigh tokens, and so does what they are compared with"
    samples = [
        Sample(e.prompt, e.answer, 1.0 + i, s.tolist())
        for i, (e, s) in enumerate(zip(calibration.examples, shares, strict=True))
    ]
    model = load_model(base.path)
    with torch.no_grad():
        loss = float(weighted_loss(model, samples, pad=0))
    assert loss == pytest.approx(np.mean([s.weight * value for s, value in zip(samples, told, strict=True)]), rel=1e-5)


def test_fine_tuning_learns_repeats_itself_and_leaves_its_start_alone(base: Model, tmp_path: Path) -> None:
    before = (base.path / "model.safetensors").read_bytes()
    records = [
        tune(base.path, base.path, SAMPLES, tmp_path / name, steps=12, rate=1e-2, batch=2, seed=seed)
        for name, seed in (("one", 0), ("again", 0), ("other", 1))
    ]
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "again", "other")]
    assert files[0] == files[1] != files[2]
    assert (base.path / "model.safetensors").read_bytes() == before
    assert records[0]["examples forward and backward"] == 24
    assert len(records[0]["loss"]) == 12
    with torch.no_grad():
        first, last = (float(weighted_loss(load_model(f), SAMPLES, 0)) for f in (base.path, tmp_path / "one"))
    assert last < 0.9 * first
    resolve(str(tmp_path / "one"))


# ------------------------------------------------------------------------------------------------------------------ bookkeeping
def adapted(home: Path, base: Model) -> None:
    """Adapters in the place of trained ones, so large that each makes its own answers likelier."""
    for i, name in enumerate(("formats", "arithmetic")):
        tiny_adapter(base.path, home / "experts" / f"{name}-0", seed=i + 1, lora_alpha=128)


@pytest.fixture
def study(base: Model, tmp_path: Path) -> Study:
    """A study of tiny models, measured already."""
    adapted(tmp_path, base)
    study = Study("conflict", 0, tmp_path, SMALL, base=str(base.path))
    effects = measured.effect_file(experts={name: model.id for name, model in study.experts.items()})
    EffectFile(effects.metadata.model_copy(update={"base": base.id}), effects.arrays).write(
        study.folder / "effects.safetensors"
    )
    return study


CONFLICT = arms.Arm("conflict", "policy", "conflict")


def test_a_merge_is_evaluated_once_and_removed(study: Study) -> None:
    assert study.evaluate_arm(CONFLICT, "test")
    file = study.evaluation_file("conflict", "test")
    before, stamp = file.read_bytes(), file.stat().st_mtime_ns
    assert not (study.home / "scratch").exists()
    recipe, masks = read_recipe(study.recipe(CONFLICT))
    assert recipe.policy.name == "conflict"
    assert set(masks) == {f"{e}.{k}" for e in ("formats", "arithmetic") for k in ("head", "kv", "neuron")}
    again = Study("conflict", 0, study.home, SMALL, base=study.base_reference, deadline=time.monotonic() - 1)
    assert again.evaluate_arm(CONFLICT, "test"), "what is done needs no time"
    assert (file.read_bytes(), file.stat().st_mtime_ns) == (before, stamp)
    assert {skill: len(c.values) for skill, c in again.answers("conflict", "test").items()} == {"formats": 6, "arithmetic": 6}


def test_a_call_whose_time_is_over_begins_nothing_and_the_next_goes_on(study: Study) -> None:
    study.evaluate("base", "test", study.base)
    late = Study("conflict", 0, study.home, SMALL, base=study.base_reference, deadline=time.monotonic() - 1)
    with pytest.raises(Paused):
        steps.parents(late)
    with pytest.raises(Paused):
        late.evaluate_arm(CONFLICT, "test")
    assert late.done("base", "test")
    assert not late.done("formats", "test")
    study.evaluate("formats", "test", study.experts["formats"])
    assert steps.finished(study, "parents") == (2, 6)


def test_adapters_that_are_there_are_not_trained_again(study: Study) -> None:
    before = {p: p.read_bytes() for p in (study.home / "experts").rglob("*.safetensors")}
    assert study.trained("formats")
    assert study.adapter("formats") == study.home / "experts" / "formats-0"
    assert {p: p.read_bytes() for p in (study.home / "experts").rglob("*.safetensors")} == before
    assert not list((study.home / "experts").glob("*.log.json")), "nothing was trained"


def test_other_settings_are_refused(study: Study) -> None:
    with pytest.raises(InputError, match="other sizes, suites"):
        Study("conflict", 0, study.home, replace(SMALL, limit=8), base=study.base_reference)
    with pytest.raises(InputError, match="other base"):
        Study("conflict", 0, study.home, SMALL)
    Study("mild", 1, study.home, SMALL, base=study.base_reference)


def test_a_policy_that_refuses_is_told_and_left_out(study: Study) -> None:
    effects = study.folder / "effects.safetensors"
    file = measured.effect_file(experts={name: model.id for name, model in study.experts.items()}, gains=(2.0, -0.5))
    EffectFile(file.metadata.model_copy(update={"base": study.base.id}), file.arrays).write(effects)
    assert not study.evaluate_arm(CONFLICT, "test")
    assert "to lower its loss" in (study.refused("conflict") or "")
    assert not study.done("conflict", "test")
    assert study.refused("rounds") is None


def emitted(recipe: Recipe) -> list[dict[str, Any]]:
    """The models of a baseline's YAML."""
    paths = {"base": "base"} | {name: name for name in recipe.experts}
    models: list[dict[str, Any]] = yaml.safe_load(emit_baseline(recipe, paths))["models"]
    return models


def test_baselines_take_their_settings(study: Study) -> None:
    made = {arm.name: arm for arm in arms.sweep(study.skills, 0)}
    uneven, _ = read_recipe(study.recipe(made["task-arithmetic_arithmetic-0.5"]))
    assert {name: expert.default for name, expert in uneven.experts.items()} == {"formats": 1.0, "arithmetic": 0.5}
    for policy in set(arms.BASELINES) - {"task-arithmetic"}:
        one = next(arm for arm in made.values() if arm.policy == policy)
        recipe, _ = read_recipe(study.recipe(one))
        assert recipe.policy.name == policy
        assert dict(one.parameters).items() <= recipe.policy.parameters.items()
    for name in ("linear_formats-0.3", "dare-ties_density-0.8_formats-0.3", "breadcrumbs_density-0.9_formats-0.3"):
        uneven, _ = read_recipe(study.recipe(made[name]))
        assert {expert: entry.default for expert, entry in uneven.experts.items()} == {"formats": 0.3, "arithmetic": 1.0}
        assert [m["parameters"]["weight"] for m in emitted(uneven)[:2]] == [0.3, 1.0]
    scaled, _ = read_recipe(study.recipe(made["ties_density-0.2_lambda-1.4"]))
    assert scaled.mergekit is not None
    assert scaled.mergekit.parameters["lambda"] == 1.4
    assert {p["density"] for p in scaled.mergekit.expert_parameters.values()} == {0.2}


def test_controls_copy_the_shares_of_their_policy(study: Study) -> None:
    _, masks = read_recipe(study.recipe(CONFLICT))
    for drawn_arms in arms.controls(CONFLICT, 2).values():
        for arm in drawn_arms:
            recipe, shuffled = read_recipe(study.recipe(arm))
            assert "like conflict" in recipe.policy.name
            assert {name: m.sum(1).tolist() for name, m in shuffled.items()} == {n: m.sum(1).tolist() for n, m in masks.items()}


class Unverified(Study):
    """A study whose calibration answers need not pass anything: tiny models never would."""

    def rows(self) -> list[BehaviorRow]:
        return small_rows(self.skills)


def test_the_first_wave_on_tiny_models_and_that_it_is_done_once(base: Model, tmp_path: Path) -> None:
    adapted(tmp_path, base)
    sizes = replace(SMALL, limit=2, shuffles=1)

    def wave(deadline: float | None = None) -> dict[Path, int]:
        study = Unverified("conflict", 0, tmp_path, sizes, base=str(base.path), deadline=deadline)
        for step in steps.WAVES[0]:
            step(study)
            done, total = steps.finished(study, step.__name__)
            assert done == total > 0, step.__name__
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    first = wave()
    assert wave(deadline=time.monotonic() - 1) == first, "a second call finds everything"
    assert not list(tmp_path.glob("conflict/seed-0/tuned/*/")), "fine-tuned models are removed when they are tested"
    (log,) = tmp_path.glob("conflict/seed-0/tuned/tuned_rate-0.001.log.json")
    record = json.loads(log.read_text())
    cost = Cost(**record["cost"])
    assert cost.forward <= record["steps"] * 3 * 16 < cost.forward + 3 * 16


def test_solutions_are_measured_at_their_budget(base: Model, tmp_path: Path) -> None:
    if "solve" not in arms.POLICIES:
        pytest.skip("this version has no policy solve")
    adapted(tmp_path, base)
    study = Unverified("conflict", 0, tmp_path, SMALL, base=str(base.path))
    arm = next(arm for arm in arms.others() if arm.policy == "solve" and arm.parameters["budget"] == 0.25)
    recipe, masks = read_recipe(study.recipe(arm))
    assert recipe.policy.parameters["budget"] == 0.25
    taken = sum(float(mask.sum()) * measured.PARAMETERS[name.rpartition(".")[2]] for name, mask in masks.items())
    whole = sum(mask.size * measured.PARAMETERS[name.rpartition(".")[2]] for name, mask in masks.items())
    assert 0 < taken <= 0.25 * whole * (1 + 1e-6)


def test_steps_come_in_the_order_of_what_they_tell() -> None:
    order = [(task.family, task.seed, task.name) for task in steps.tasks(("conflict", "mild"), (0, 1))]
    assert order.index(("mild", 1, "equal")) < order.index(("conflict", 0, "others")), "the second wave waits"
    assert order.index(("conflict", 0, "equal")) < order.index(("conflict", 1, "experts"))
    assert [task.name for task in steps.tasks(("mild",), (2,), ("controls", "sweep"))] == ["sweep", "controls"]
    assert len(set(order)) == len(order) == 4 * len(steps.STEPS)
