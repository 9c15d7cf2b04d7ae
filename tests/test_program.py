"""The linear program against searching by hand, and from effect files to coefficients."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechmerge.errors import InputError, SchemaError
from mechmerge.localize.effect_file import EffectFile, Line, Linearity
from mechmerge.localize.effect_program import DAMAGE, limits_of, solve_effects
from mechmerge.localize.program import SECOND, Program, Solution, solve_program
from mechmerge.models.components import UNIT_KINDS
from mechmerge.recipe.compile import compile_recipe
from mechmerge.recipe.policies import conflict, predicted_change, solve
from mechmerge.recipe.sources import Sources
from tests.measured import BASE, FIRST, LAYERS, PARAMETERS, UNITS, effect_file
from tests.measured import SECOND as OTHER


def value(program: Program, c: np.ndarray) -> tuple[float, float]:
    """(worst case, objective) at coefficients, written out plainly; −inf where they are not allowed."""
    worst, shares = np.inf, []
    for sample in range(len(program.effects)):
        for b, own in enumerate(program.own):
            gain = program.nothing[sample, b] + sum(e * x for e, x in zip(program.effects[sample, b], c, strict=True))
            if own > 0:
                worst = min(worst, gain / own)
                shares.append((gain - program.nothing[sample, b]) / own)
            if b in program.limits and -gain > program.limits[b] + 1e-6:
                return -np.inf, -np.inf
    for e in set(program.expert.tolist()):
        mine = program.expert == e
        if (program.sizes * c)[mine].sum() > program.budget * program.sizes[mine].sum() + 1e-6:
            return -np.inf, -np.inf
    return worst, worst + SECOND * float(np.mean(shares))


def tiny(seed: int, budget: float, limited: bool, variables: int = 5) -> Program:
    draw = np.random.default_rng(seed)
    return Program(
        effects=draw.normal(size=(2, 3, variables)),
        nothing=draw.normal(size=(2, 3)) * 0.1,
        own=np.array([1.0, 0.5, 0.0]),
        limits={2: 0.3} if limited else {},
        sizes=np.array([4.0, 4.0, 1.0, 1.0, 0.0])[:variables],
        expert=np.array([0, 1, 0, 1, 0])[:variables],
        budget=budget,
    )


@given(seed=st.integers(0, 10_000), budget=st.sampled_from([0.3, 0.6, 1.0]), limited=st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_grid_point_beats_the_solution(seed: int, budget: float, limited: bool) -> None:
    program = tiny(seed, budget, limited)
    grid = [np.array(c) for c in itertools.product(np.linspace(0, 1, 5), repeat=5)]
    best = max(value(program, c)[1] for c in grid)
    if best == -np.inf:
        # The grid is coarse: limits that no grid point meets may still be met.
        with contextlib.suppress(InputError):
            assert value(program, solve_program(program, "abc").coefficients)[1] > -np.inf
        return
    found = solve_program(program, "abc")
    worst, objective = value(program, found.coefficients)
    assert worst == pytest.approx(found.worst, abs=1e-5)
    assert objective >= best - 1e-6


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_the_solution_is_found_by_hand_as_well(seed: int) -> None:
    """With two variables the optimum lies where two constraints meet: all such points are tried."""
    draw = np.random.default_rng(seed)
    program = Program(
        effects=draw.normal(size=(1, 2, 2)), nothing=np.zeros((1, 2)), own=np.ones(2), limits={},
        sizes=np.array([2.0, 1.0]), expert=np.zeros(2, int), budget=0.5,
    )  # fmt: skip
    e = program.effects[0]
    lines = [(1, 0, 0), (0, 1, 0), (1, 0, 1), (0, 1, 1), (2, 1, 1.5), (*(e[0] - e[1]), 0)]  # a x + b y = c
    points = [
        np.linalg.solve([one[:2], other[:2]], [one[2], other[2]])
        for one, other in itertools.combinations(lines, 2)
        if abs(np.linalg.det([one[:2], other[:2]])) > 1e-12
    ]
    allowed = [p for p in points if (p > -1e-9).all() and (p < 1 + 1e-9).all()]
    best = max(value(program, p)[1] for p in allowed)
    assert value(program, solve_program(program, "ab").coefficients)[1] == pytest.approx(best, abs=1e-6)


def test_nothing_to_gain_is_said() -> None:
    program = tiny(0, 1.0, False)
    with pytest.raises(InputError, match="whose own expert gains"):
        solve_program(Program(**(vars(program) | {"own": np.zeros(3)})), "abc")


def test_a_hundred_thousand_variables() -> None:
    """Not timed: that it ends, within its constraints, with a handful of fractions."""
    draw = np.random.default_rng(0)
    n = 100_000
    program = Program(
        effects=draw.normal(size=(1, 3, n)) * 1e-4, nothing=np.zeros((1, 3)), own=np.array([1.4, 2.0, 0.0]), limits={2: 0.1},
        sizes=np.full(n, 1728), expert=np.arange(n) % 2, budget=0.25,
    )  # fmt: skip
    found: Solution = solve_program(program, "abc")
    gains = program.effects[0] @ found.coefficients
    assert found.coefficients[::2].mean() <= 0.25 + 1e-6
    assert gains[2] >= -0.1 - 1e-6
    assert min(gains[0] / 1.4, gains[1] / 2.0) == pytest.approx(found.worst, abs=1e-5)
    assert ((found.coefficients > 0) & (found.coefficients < 1)).sum() <= 6


# ------------------------------------------------------------------------------------------------------------- effect files
def proven(file: EffectFile, slope: float = 1.0, r2: float = 0.95) -> EffectFile:
    lines = {b.name: Line(slope=slope, r2=r2, largest=1.0) for b in file.metadata.behaviors}
    return EffectFile(file.metadata.model_copy(update={"linearity": Linearity(masks=100, lines=lines)}), file.arrays)


def with_protected(file: EffectFile, name: str = "chat") -> EffectFile:
    """The file with the second behaviour as one of the base's own."""
    first, second = file.metadata.behaviors
    kept = second.model_copy(update={"name": name, "expert": "base", "loss_expert": second.loss_start})
    return EffectFile(file.metadata.model_copy(update={"behaviors": (first, kept)}), file.arrays)


def taken(masks: dict[str, np.ndarray], expert: str) -> float:
    total = sum(float(masks[f"{expert}.{k}"].sum(dtype=np.float64)) * PARAMETERS[k] for k in UNIT_KINDS)
    return total / (LAYERS * sum(UNITS[k] * PARAMETERS[k] for k in UNIT_KINDS))


@pytest.mark.parametrize("budget", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("path", ["base→sum", "sum→proposal"])
def test_solve_keeps_the_budget_and_predicts_what_it_solved_for(budget: float, path: str) -> None:
    file = proven(effect_file(3))
    behaviors = tuple(b.model_copy(update={"loss_base": 3.5} if path != "base→sum" else {}) for b in file.metadata.behaviors)
    file = EffectFile(file.metadata.model_copy(update={"path": path, "behaviors": behaviors}), file.arrays)
    choice = solve(file, budget)
    for expert in ("first", "second"):
        assert taken(choice.masks, expert) <= budget + 1e-5
        assert 0 <= choice.defaults[expert] <= 1
    solved = solve_effects(file, budget)
    assert choice.predicted == pytest.approx(dict(zip(("formats", "sums"), -solved.gains, strict=True)), abs=1e-3)
    own = np.array([b.own_gain for b in behaviors])
    assert (solved.gains / own).min() >= solved.worst - 1e-6, "the mean of two halves is no worse than the worse one"
    loose = solve_effects(file, budget, agreement=False)
    assert (loose.gains / own).min() == pytest.approx(loose.worst, abs=1e-4)
    assert loose.worst >= solved.worst - 1e-6


def test_solve_beats_conflict_on_its_own_measure() -> None:
    file = proven(effect_file(5))
    own = np.array([b.own_gain for b in file.metadata.behaviors])

    def worst(predicted: dict[str, float] | None) -> float:
        return float(min(-np.array(list((predicted or {}).values())) / own))

    assert worst(solve(file, agreement=False).predicted) >= worst(conflict(file, agreement=False).predicted) - 1e-4


def test_effects_from_the_sum_predict_what_was_measured_there() -> None:
    file = effect_file(1)
    behaviors = tuple(b.model_copy(update={"loss_base": 3.5}) for b in file.metadata.behaviors)
    local = EffectFile(file.metadata.model_copy(update={"path": "sum→proposal", "behaviors": behaviors}), file.arrays)
    everything = predicted_change(local, {"first": 1.0, "second": 1.0}, {})
    assert everything == pytest.approx({b.name: b.loss_start - 3.5 for b in behaviors}, abs=1e-5)
    assert [b.own_gain for b in behaviors] == [3.5 - b.loss_expert for b in behaviors]


@pytest.mark.parametrize(("slope", "r2", "said"), [(0.5, 0.95, "slope 0.50"), (1.3, 0.95, "slope 1.30"), (1.0, 0.7, "R² 0.70")])
def test_solve_refuses_predictions_that_do_not_come_true(slope: float, r2: float, said: str) -> None:
    bad = proven(effect_file(), slope, r2)
    with pytest.raises(InputError, match=said) as caught:
        solve(bad)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"found not measured; .*--unproven"):
        solve(effect_file())
    for file in (bad, effect_file()):
        assert any("not proven" in note for note in solve(file, unproven=True).notes)
    assert not any("not proven" in note for note in solve(proven(effect_file())).notes)


def test_protected_behaviours_are_limits_and_not_gains() -> None:
    file = proven(with_protected(effect_file(2)))
    assert limits_of(file) == {"chat": DAMAGE}
    for limit in (0.0, DAMAGE, 2.0):
        choice = solve(file, limits={"chat": limit}, agreement=False)
        assert choice.predicted is not None
        assert choice.predicted["chat"] <= limit + 1e-4
    free = solve(file, limits={"chat": 1e6}, agreement=False).predicted
    tight = solve(file, limits={"chat": 0.0}, agreement=False).predicted
    assert free is not None
    assert tight is not None
    assert free["formats"] <= tight["formats"], "a limit costs"
    with pytest.raises(InputError, match="behaviours among formats, chat; found x"):
        solve(file, limits={"x": 1.0})
    with pytest.raises(InputError, match="limit of chat"):
        solve(file, limits={"chat": -1.0})


def test_a_protected_behaviour_weighs_by_the_nat() -> None:
    """In `conflict`, a nat of damage counts as much as `weight` whole own gains, whatever the (absent) own gain is."""
    file = with_protected(effect_file(2))
    masks = conflict(file, weights={"chat": 3.0}, agreement=False).masks
    for e, expert in enumerate(file.metadata.experts):
        total = file.arrays["head.effect"][0, e].astype(np.float64) / 2.0 + 3.0 * file.arrays["head.effect"][1, e]
        assert np.array_equal(masks[f"{expert}.head"], (total >= 0).astype(np.float32))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"budget": 0.0}, "budget"),
        ({"budget": True}, "budget"),
        ({"limit.formats": "much"}, "limit.formats"),
        ({"unproven": "yes"}, "true or false"),
        ({"weight.formats": 1.0}, "weights"),
        ({"overlap": "sum"}, "'overlap'"),
    ],
)
def test_parameters_that_solve_refuses(parameters: dict[str, Any], message: str) -> None:
    sources = Sources(BASE, {"first": FIRST, "second": OTHER}, proven(effect_file()))
    with pytest.raises(InputError, match=message):
        compile_recipe("solve", sources, parameters=parameters)


def test_the_recipe_says_that_it_is_not_proven() -> None:
    sources = Sources(BASE, {"first": FIRST, "second": OTHER}, effect_file())
    compiled = compile_recipe("solve", sources, parameters={"budget": 0.5, "limit.sums": 0.2, "unproven": True})
    assert compiled.recipe.policy.parameters == {"budget": 0.5, "limit.sums": 0.2, "unproven": True}
    assert compiled.recipe.policy.name == "solve"


def test_a_behaviour_that_its_expert_does_not_gain_on_is_not_passed_over() -> None:
    with pytest.raises(
        InputError, match=r"behaviour sums: expected its own expert second to gain on it; found a gain of -0\.100"
    ):
        solve(proven(effect_file(gains=(2.0, -0.1))))


def test_missing_tensors_are_named() -> None:
    file = proven(effect_file())
    bare = EffectFile(file.metadata, {n: a for n, a in file.arrays.items() if n != "kv.half"})
    with pytest.raises(SchemaError, match=r"kv\.half"):
        solve(bare)
    assert solve(bare, agreement=False).masks
