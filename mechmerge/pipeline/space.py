"""What a recipe leaves open: the parameters of its policy that the pipeline does not set, with the ranges that are searched.

What a recipe sets stays as it is; `--open NAME` opens it all the same, `--open NAME=LOW:HIGH` or `NAME=A,B` with another range.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import model_validator

from mechmerge.artifacts import Document, parse_yaml
from mechmerge.errors import InputError
from mechmerge.pipeline.schema import PARAMETERS, RecipePlan
from mechmerge.recipe.compile import BASELINES, NORMALIZED, check_parameters, defaults_of, takes_strengths
from mechmerge.recipe.strengths import PREFIX

Value = bool | int | float | str


class Open(Document):
    """One parameter that is searched: an interval or a choice."""

    name: str
    low: float | None = None
    high: float | None = None
    log: bool = False
    """Whether the interval is searched by ratios."""
    choices: tuple[Value, ...] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Open:
        if self.choices is None:
            if self.low is None or self.high is None or not -math.inf < self.low < self.high < math.inf:
                raise ValueError(f"{self.name}: expected LOW below HIGH")
            if self.log and self.low <= 0:
                raise ValueError(f"{self.name}: expected LOW above 0")
        elif len(self.choices) < 2 or self.low is not None or self.high is not None:
            raise ValueError(f"{self.name}: expected at least two choices")
        return self

    def at(self, share: float) -> Value:
        """The value at a share 0 … 1 of the way."""
        if self.choices is not None:
            return self.choices[min(int(share * len(self.choices)), len(self.choices) - 1)]
        low, high = float(self.low or 0.0), float(self.high or 0.0)
        value = low * (high / low) ** share if self.log else low + (high - low) * share
        return self.rounded(value)

    def rounded(self, value: Value) -> Value:
        """The value as recipes hold it: numbers with four digits, within the interval."""
        if self.choices is not None or self.low is None or self.high is None:
            return value
        return min(max(float(f"{float(value):.4g}"), self.low), self.high)

    def __str__(self) -> str:
        if self.choices is not None:
            return f"{self.name} in {', '.join(map(str, self.choices))}"
        return f"{self.name} in {self.low:g} … {self.high:g}" + (" by ratios" if self.log else "")


RANGES: dict[str, Open] = {
    "budget": Open(name="budget", low=0.05, high=1.0, log=True),
    "overlap": Open(name="overlap", choices=("sum", "share", "winner")),
    "agreement": Open(name="agreement", choices=(True, False)),
    "certainty": Open(name="certainty", low=0.0, high=3.0),
    "density": Open(name="density", low=0.1, high=1.0),
    "lambda": Open(name="lambda", low=0.5, high=2.0, log=True),
}
"""What is searched of a policy's parameters, beside behaviour weights and strengths."""
TOLD: dict[str, Open] = {
    "scale": Open(name="scale", choices=("rank", "share")),
    "weighting": Open(name="weighting", choices=("own-gain", "equal")),
    "epsilon": Open(name="epsilon", low=0.05, high=0.4),
    "gamma": Open(name="gamma", low=0.001, high=0.1, log=True),
    "topk": Open(name="topk", low=0.1, high=1.0),
    "filter_wise": Open(name="filter_wise", choices=(False, True)),
}
"""What is searched only where `--open` says so."""
WEIGHT = Open(name="weight", low=0.25, high=4.0, log=True)
"""A behaviour's weight against the first one's."""
STRENGTH = Open(name="strength", low=0.25, high=1.25)
"""Of an expert."""
EDGE = 0.01
"""How far inside its bounds a density of DELLA stays."""


def space_of(plan: RecipePlan, experts: Sequence[str], behaviors: Sequence[str], opened: Iterable[str] = ()) -> list[Open]:
    """The open parameters of a recipe, in a fixed order.

    Args:
        plan: the recipe; what it sets is closed.
        experts: names of the experts.
        behaviors: names of the behaviours. The first one's weight stays: only ratios matter.
        opened: texts of `--open`.

    Raises:
        InputError: nothing is open, a text is no NAME, NAME=LOW:HIGH or NAME=A,B, or the policy has no such parameter.
    """
    known = RANGES | TOLD
    possible = {name: known[name] for name in PARAMETERS[plan.policy] if name in known}
    if "weight" in PARAMETERS[plan.policy] and plan.policy not in BASELINES:
        possible |= {f"weight.{name}": WEIGHT for name in behaviors[1:]}
    if plan.policy == "della":  # density ± epsilon are probabilities
        epsilon = float(plan.parameters.get("epsilon", defaults_of("della")["epsilon"]))
        possible["density"] = Open(name="density", low=epsilon + EDGE, high=1 - epsilon - EDGE)
    if takes_strengths(plan.policy):
        # Where only ratios matter the first one's stays.
        possible |= {f"{PREFIX}{name}": STRENGTH for name in experts[plan.policy in NORMALIZED :]}
    chosen = {
        name: one.model_copy(update={"name": name}) for name, one in possible.items() if name not in (*TOLD, *plan.parameters)
    }
    for text in opened:
        name, sign, told = text.partition("=")
        if name not in possible:
            raise InputError(
                "--open", expected=f"a parameter of {plan.policy}: {', '.join(possible)}", found=repr(name or text)
            )
        chosen[name] = (
            _told(possible[name].model_copy(update={"name": name}), told, text)
            if sign
            else possible[name].model_copy(update={"name": name})
        )
    for text in opened:
        one = chosen[text.partition("=")[0]]
        for value in one.choices or (one.low, one.high):
            needed = {"budget": 0.5} if plan.policy == "top" else {}  # has none of its own
            check_parameters(plan.policy, needed | plan.parameters | {one.name: value})
    if not chosen:
        raise InputError(
            f"policy {plan.policy}", expected="something that the recipe leaves open", found="nothing", fix="--open"
        )
    return [chosen[name] for name in possible if name in chosen]


def _told(one: Open, told: str, text: str) -> Open:
    low, colon, high = told.partition(":")
    try:
        if colon:
            bounds = float(low), float(high)
            return Open(name=one.name, low=bounds[0], high=bounds[1], log=one.log and bounds[0] > 0)
        return Open(name=one.name, choices=tuple(parse_yaml(piece, "--open") for piece in told.split(",")))
    except ValueError:
        raise InputError("--open", expected="NAME, NAME=LOW:HIGH or NAME=A,B", found=repr(text)) from None


def untouched(space: Sequence[Open], plan: RecipePlan) -> tuple[dict[str, Value], bool]:
    """What the policy does untold (weights and strengths 1, all else its default), or the point of the space nearest to it.

    Returns:
        The point, and whether it is the policy as it is: it is not where `--open` leaves its values outside.
    """
    found: dict[str, Value] = {}
    untold = {"budget": 0.5} | defaults_of(plan.policy)  # top has no budget of its own
    wanted = {one.name: plan.parameters.get(one.name, untold.get(one.name, 1.0)) for one in space}
    for one in space:
        value = wanted[one.name]
        if one.choices is not None:
            found[one.name] = value if value in one.choices else one.choices[0]
        else:
            found[one.name] = one.rounded(value)
    return found, found == wanted


def spread(space: Sequence[Open], n: int, seed: int) -> list[dict[str, Value]]:
    """n points that fill the space evenly: a Latin hypercube (McKay, Beckman & Conover, https://doi.org/10.2307/1268522)."""
    draw = np.random.default_rng(seed)
    shares = [(draw.permutation(n) + draw.random(n)) / n for _ in space]
    return [{one.name: one.at(float(shares[d][i])) for d, one in enumerate(space)} for i in range(n)]


def parameters(plan: RecipePlan, values: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe's parameters with the searched ones set."""
    return dict(plan.parameters) | dict(values)
