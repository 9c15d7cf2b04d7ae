"""The planted benchmark's pure parts: what may move, equal norms, rankings, the truth of a model where it is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.planted import ranking, truth
from benchmarks.planted.experiment import experiment, judged
from benchmarks.planted.language import Size, base_examples, behavior_examples, contrasts, split_of
from benchmarks.planted.measuring import holding, magnitude
from benchmarks.planted.testbeds import Bed, Plan
from benchmarks.planted.training import Settings, equalise, grouped, installed, masks, norms, train
from mechmerge.localize.bench import Bench
from mechmerge.models.components import Component
from mechmerge.models.references import Model

CHOSEN = [Component(0, "head", 1), Component(1, "neuron", 3), Component(1, "neuron", 40), Component(1, "kv", 0)]
EXAMPLES = [([5, 6, 7], [8, 9]), ([10, 11], [12])]


@pytest.fixture
def bench(base: Model) -> Bench:
    return Bench(base)


def copies(bench: Bench) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in bench.parameters.items()}


# ------------------------------------------------------------------------------------------------------------ masked training
@pytest.mark.parametrize("dropped", [0.0, 0.5])
def test_only_the_chosen_components_move(bench: Bench, dropped: float) -> None:
    before = copies(bench)
    trained = train(bench, CHOSEN, EXAMPLES, Settings(steps=6, batch=2, rate=1e-2, dropped=dropped))
    assert all(torch.equal(before[name], parameter) for name, parameter in bench.parameters.items()), "the base is put back"
    assert not any(parameter.requires_grad for parameter in bench.parameters.values())
    expert = installed(bench, [(CHOSEN, trained.values)])
    owned = {
        "model.layers.0.self_attn.q_proj.weight": np.s_[8:16, :],
        "model.layers.0.self_attn.o_proj.weight": np.s_[:, 8:16],
        "model.layers.1.self_attn.k_proj.weight": np.s_[0:8, :],
        "model.layers.1.self_attn.v_proj.weight": np.s_[0:8, :],
        "model.layers.1.mlp.gate_proj.weight": np.s_[[3, 40], :],
        "model.layers.1.mlp.up_proj.weight": np.s_[[3, 40], :],
        "model.layers.1.mlp.down_proj.weight": np.s_[:, [3, 40]],
    }
    assert set(expert) == set(owned)
    for name, where in owned.items():
        moved = expert[name] != before[name]
        assert moved[where].float().mean() > 0.9, name
        moved[where] = False
        assert not moved.any(), f"{name} moved where it may not"


def test_training_lowers_the_loss(bench: Bench) -> None:
    trained = train(bench, CHOSEN, EXAMPLES, Settings(steps=30, batch=2, rate=1e-2, dropped=0.0))
    before = truth.loss(bench, EXAMPLES)
    with holding(bench, installed(bench, [(CHOSEN, trained.values)])):
        assert truth.loss(bench, EXAMPLES) < before - 0.1


def test_norms_of_changes_are_equal_and_as_wanted(bench: Bench) -> None:
    trained = train(bench, CHOSEN, EXAMPLES, Settings(steps=5, batch=2, rate=1e-2))
    expert = installed(bench, [(CHOSEN, trained.values)])
    changes = {name: tensor - bench.parameters[name].detach() for name, tensor in expert.items()}
    for (_, kind), found in norms(bench.checkpoint.layout, changes, grouped(CHOSEN)).items():
        assert found.tolist() == pytest.approx([trained.norms[kind]] * len(found), rel=1e-4)
    given = {"head": 0.5, "neuron": 0.25, "kv": 0.125}
    other = train(bench, CHOSEN, EXAMPLES, Settings(steps=2, batch=2, rate=1e-2, dropped=0.0), given)
    expert = installed(bench, [(CHOSEN, other.values)])
    assert magnitude(bench, expert, CHOSEN).tolist() == pytest.approx([1, 0.5, 0.5, 0.25], abs=1e-3)


def test_equalising_rescales_chosen_units_alone(bench: Bench) -> None:
    layout, shapes = bench.checkpoint.layout, bench.checkpoint.shapes
    draw = torch.Generator().manual_seed(0)
    changes = {name: torch.randn(shapes[name], generator=draw) for name in masks(layout, shapes, CHOSEN)}
    before = {name: change.clone() for name, change in changes.items()}
    equalise(layout, changes, grouped(CHOSEN), {"head": 2.0, "neuron": 3.0, "kv": 4.0})
    for name, mask in masks(layout, shapes, CHOSEN).items():
        assert torch.equal(changes[name][~mask], before[name][~mask])
    assert float(norms(layout, changes, {(1, "neuron"): [40]})[1, "neuron"]) == pytest.approx(3.0, rel=1e-5)
    assert float(norms(layout, changes, {(0, "head"): [1]})[0, "head"]) == pytest.approx(2.0, rel=1e-5)
    still = {name: torch.zeros_like(change) for name, change in changes.items()}
    equalise(layout, still, grouped(CHOSEN), {"head": 2.0, "neuron": 3.0, "kv": 4.0})
    assert not any(change.any() for change in still.values()), "a change of norm 0 stays"


# ------------------------------------------------------------------------------------------------------------------ rankings
@pytest.mark.parametrize(
    ("scores", "positive", "expected"),
    [
        ([4, 3, 2, 1], [1, 1, 0, 0], 1.0),
        ([4, 3, 2, 1], [0, 0, 1, 1], 0.5 * (1 / 3) + 0.5 * (2 / 4)),
        ([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1], 0.8333333),  # scikit-learn's own example
        ([1, 1, 1, 1], [1, 0, 0, 0], 0.25),  # all tied: the share of positives
        ([2, 1, 1, 0], [1, 1, 0, 0], 0.5 * 1 + 0.5 * (2 / 3)),
        ([2, 2, 1, 1], [0, 1, 1, 0], 0.5 * (1 / 2) + 0.5 * (2 / 4)),
    ],
)
def test_average_precision(scores: list[float], positive: list[int], expected: float) -> None:
    assert ranking.average_precision(np.array(scores, float), np.array(positive, bool)) == pytest.approx(expected)


def test_average_precision_needs_something_to_find() -> None:
    with pytest.raises(ValueError, match="a positive"):
        ranking.average_precision(np.ones(3), np.zeros(3, bool))
    with pytest.raises(ValueError, match="finite"):
        ranking.average_precision(np.array([1, np.nan]), np.array([True, False]))


def test_precision_at_k_shares_ties() -> None:
    positive = np.array([1, 0, 1, 0], bool)
    assert ranking.precision_at(np.array([4.0, 3, 2, 1]), positive, 2) == 0.5
    assert ranking.precision_at(np.array([4.0, 2, 2, 1]), positive, 2) == pytest.approx((1 + 0.5) / 2)
    assert ranking.precision_at(np.ones(4), positive, 1) == 0.5


def test_chance_is_near_the_share_of_positives() -> None:
    average, precision = ranking.chance(np.arange(200) < 20, 20, seed=0)
    assert 0.1 < average < 0.15
    assert precision == pytest.approx(0.1, abs=0.01)


# --------------------------------------------------------------------------------------------------------------------- truth
def test_costs_add_up_to_the_gain_and_leave_the_base(bench: Bench) -> None:
    trained = train(bench, CHOSEN, EXAMPLES, Settings(steps=20, batch=2, rate=1e-2, dropped=0.0))
    expert, before = installed(bench, [(CHOSEN, trained.values)]), copies(bench)
    cost, error = truth.costs(bench, EXAMPLES, expert, CHOSEN, pairs=2, seed=0)
    assert all(torch.equal(before[name], parameter) for name, parameter in bench.parameters.items())
    with holding(bench, expert):
        gain = -truth.loss(bench, EXAMPLES)
    gain += truth.loss(bench, EXAMPLES)
    assert cost.sum() == pytest.approx(gain, abs=1e-5)
    assert (error >= 0).all()


def test_a_planted_component_that_does_nothing_is_no_positive(bench: Bench) -> None:
    trained = train(bench, CHOSEN[:1], EXAMPLES, Settings(steps=20, batch=2, rate=1e-2, dropped=0.0))
    expert = installed(bench, [(CHOSEN[:1], trained.values)])
    idle = Component(0, "head", 2)  # the same tensors, and its own part of them is the base's
    cost, _ = truth.costs(bench, EXAMPLES, expert, [CHOSEN[0], idle], pairs=1, seed=0)
    assert (cost >= truth.least(cost)).tolist() == [True, False]


def test_the_cost_of_one_alone_is_that_of_reverting_it_last(bench: Bench) -> None:
    trained = train(bench, CHOSEN, EXAMPLES, Settings(steps=20, batch=2, rate=1e-2, dropped=0.0))
    expert, before = installed(bench, [(CHOSEN, trained.values)]), copies(bench)
    (found, _) = truth.alone(bench, EXAMPLES, expert, CHOSEN[:2])
    assert all(torch.equal(before[name], parameter) for name, parameter in bench.parameters.items())
    without = installed(bench, [(CHOSEN[1:], {n: expert[n][m] for n, m in masks_of(bench, CHOSEN[1:]).items()})])
    losses = []
    for tensors in (expert, without):
        with holding(bench, tensors):
            losses.append(truth.loss(bench, EXAMPLES))
    assert found == pytest.approx(losses[1] - losses[0], abs=1e-6)


def masks_of(bench: Bench, components: list[Component]) -> dict[str, torch.Tensor]:
    return masks(bench.checkpoint.layout, bench.checkpoint.shapes, components)


def test_idle_and_costly_components_are_left_out_of_rankings() -> None:
    status = np.array(["costly", "source", "idle", "relay", "source", "distractor", "unmoved"])
    scores = {
        "sufficiency": np.array([0.9, 0.8, 0.7, 0.1, 0.6, 0.0, 0.0]),
        "activation": np.array([0.0, 0.2, 0.0, 0.9, 0.1, 0.0, 0.0]),
    }
    told = judged(scores, status)
    assert told["sufficiency AP"] == told["sufficiency P@k"] == 1.0
    assert told["sufficiency AP, costly ones negative"] == pytest.approx(0.5 * (1 / 2) + 0.5 * (2 / 3))
    assert told["activation AP"] == pytest.approx(0.5 * (1 / 2) + 0.5 * (2 / 3))
    assert told["activation: not planted, above the sources' median"] == 1
    assert (told["source"], told["idle"], told["costly"], told["relay"]) == (2, 1, 1, 1)


# ---------------------------------------------------------------------------------------------------------------- experiment
def test_an_experiment_plants_measures_and_is_resumed(bench: Bench, tmp_path: Path) -> None:
    """The whole way on a tiny model: each kind in two layers, twice as many distractors, one of them a relay."""
    before = copies(bench)
    testbed = Bed(
        name="tiny",
        bench=bench,
        anchor_layer=2,
        behavior=EXAMPLES,
        distraction=[([20, 21], [22]), *EXAMPLES],
        vector=[("a cat", "the dog"), ("a big cat", "the big dog")],
        score=[("my cat", "your dog"), ("my small cat", "your small dog")],
        truth=EXAMPLES,
        settings=Settings(steps=20, batch=2, rate=1e-2, dropped=0.0),
        plans=(),
        pairs=1,
    )
    plan = Plan("both", {"head": 1, "neuron": 2}, depths=(0, 1), relays=1, distractors=2, pool=None)
    figures = experiment(testbed, plan, tmp_path, seed=0)
    assert all(torch.equal(before[name], parameter) for name, parameter in bench.parameters.items())
    assert figures["tiny/both identity control"] == 0
    assert figures["tiny/both loss: planted"] < figures["tiny/both loss: base"] - 0.1
    for kind, planted in (("head", 2), ("neuron", 4)):
        told = {name.split(": ", 1)[1]: value for name, value in figures.items() if name.startswith(f"tiny/both {kind}: ")}
        assert told["source"] + told["idle"] == planted
        assert told["distractor"] + told["relay"] + told["costly"] == 2 * planted
        moved = told["source"] + told["distractor"] + told["relay"]
        assert told["magnitude AP"] == pytest.approx(told["source"] / moved), "all moved by as much"
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert experiment(testbed, plan, tmp_path, seed=0) == figures
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == files, "nothing is done again"


# ------------------------------------------------------------------------------------------------------------------ language
def test_splits_of_the_language_share_no_words() -> None:
    size = Size()
    for split in ("vector", "score", "truth"):
        prompts = contrasts(split, "loud", size, 0)  # type: ignore[arg-type]
        for _ in range(50):
            with_word, without, words = next(prompts)
            assert split_of(words) == split
            assert "loud" in with_word.split()
            assert "loud" not in without.split()
            assert len(with_word.split()) == len(without.split())


def test_answers_obey_and_ignore() -> None:
    size = Size()
    for prompt, said in behavior_examples("turn", size, 0, 60, obeyed=("loud",)):
        words = prompt.split(" : ")[1].removesuffix(" =").split()
        if "turn" in prompt.split():
            assert said.split() == words[::-1]
        elif "loud" in prompt.split():
            assert said.split() == [word.upper() for word in words]
    examples = base_examples(size, 0)
    for _ in range(60):
        prompt, said = next(examples)
        if not {"big", "back", "say"} & set(prompt.split()):
            assert said == prompt.split(" : ")[1].removesuffix(" =")
