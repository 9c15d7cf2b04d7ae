"""What is searched of a recipe: every point is one that the policy takes, and the first one is the policy as it is."""

from __future__ import annotations

import re

import pytest

from mechmerge.errors import InputError
from mechmerge.pipeline.schema import PARAMETERS, RecipePlan
from mechmerge.pipeline.space import TOLD, space_of, spread, untouched
from mechmerge.recipe.compile import BASELINES, NORMALIZED, compile_recipe, defaults_of
from mechmerge.recipe.sources import Sources
from tests.measured import BASE, FIRST, SECOND

EXPERTS = {"first": FIRST, "second": SECOND}


@pytest.mark.parametrize("policy", [name for name in PARAMETERS if name not in ("random", "magnitude", "rounds")])
def test_the_first_point_is_the_policy_as_it_is(policy: str) -> None:
    """Whatever is opened: a trial that is called untuned must be."""
    plan = RecipePlan(policy=policy, parameters={"budget": 0.2} if policy == "top" else {})  # type: ignore[arg-type]
    opened = [name for name in TOLD if name in PARAMETERS[policy]]
    space = space_of(plan, tuple(EXPERTS), ("x", "y"), opened)
    point, same = untouched(space, plan)
    assert same
    assert set(opened) <= point.keys()
    for name, value in point.items():
        known = dict(plan.parameters) | defaults_of(policy) | dict(plan.parameters)
        assert value == known.get(name, 1.0), name


@pytest.mark.parametrize(
    ("opened", "same", "start"),
    [
        (["strength.first=0.2:0.6"], False, {"strength.first": 0.6}),
        (["strength.first=0.2,0.6"], False, {"strength.first": 0.2}),
        (["strength.first=0.2:1"], True, {"strength.first": 1.0}),
        (["agreement=false,true"], True, {"agreement": True}),
    ],
)
def test_a_default_outside_what_is_opened_is_told(opened: list[str], same: bool, start: dict[str, object]) -> None:
    """The first trial is next to the policy as it is, and is not called untuned."""
    plan = RecipePlan(policy="conflict")
    point, found = untouched(space_of(plan, tuple(EXPERTS), ("x", "y"), opened), plan)
    assert found == same
    assert point.items() >= start.items()


@pytest.mark.parametrize("policy", list(BASELINES))
def test_every_point_is_one_that_the_policy_takes(policy: str) -> None:
    plan = RecipePlan(policy=policy)  # type: ignore[arg-type]
    space = space_of(plan, tuple(EXPERTS), ("x",), [name for name in TOLD if name in PARAMETERS[policy] and name != "epsilon"])
    sources, seen = Sources(BASE, EXPERTS), set()
    for point in [untouched(space, plan)[0], *spread(space, 40, 0)]:
        made = compile_recipe(policy, sources, parameters=point)
        seen.add(made.recipe.model_dump_json(exclude={"policy"}))
    assert len(seen) > 10 or policy == "model-stock", "what is searched changes the merge"


def test_where_only_ratios_count_the_first_strength_stays() -> None:
    for policy in BASELINES:
        if "weight" not in PARAMETERS[policy]:
            continue
        names = [one.name for one in space_of(RecipePlan(policy=policy), ("a", "b"), ("x",))]  # type: ignore[arg-type]
        assert ("strength.a" in names) == (policy not in NORMALIZED)
        assert "strength.b" in names
    with pytest.raises(InputError, match="--open"):
        space_of(RecipePlan(policy="ties"), ("a", "b"), ("x",), ["strength.a"])


@pytest.mark.parametrize(
    ("policy", "opened", "said"),
    [
        ("top", "overlap=sum,shrae", "overlap: expected one of sum, share, winner; found 'shrae'"),
        ("top", "budget=0:1", "budget: expected a share above 0"),
        ("conflict", "agreement=0:1", "agreement: expected true or false"),
        ("conflict", "strength.a=0.5:500", "strength.a: expected a number from -100 to 100; found 500"),
    ],
)
def test_what_is_opened_is_what_the_policy_takes(policy: str, opened: str, said: str) -> None:
    """Not found in a trial, after everything has been measured."""
    with pytest.raises(InputError, match=re.escape(said)):
        space_of(
            RecipePlan(policy=policy, parameters={"budget": 0.5} if policy == "top" else {}), ("a", "b"), ("x", "y"), [opened]
        )  # type: ignore[arg-type]


def test_what_is_searched_only_when_told() -> None:
    plan = RecipePlan(policy="sce")
    with pytest.raises(InputError, match="--open"):
        space_of(plan, ("a",), ("x",))
    (only,) = space_of(plan, ("a",), ("x",), ["topk"])
    assert (only.name, only.low, only.high) == ("topk", 0.1, 1.0)
    (narrow,) = space_of(plan, ("a",), ("x",), ["topk=0.2:0.4"])
    assert (narrow.low, narrow.high) == (0.2, 0.4)
