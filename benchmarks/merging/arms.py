"""The models that are compared: baselines with the sweep that their settings are chosen from, policies, and their controls."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mechmerge.pipeline.schema import PARAMETERS
from mechmerge.recipe.compile import BASELINES, CONTROLS, POLICIES

Kind = Literal["baseline", "policy", "control"]
Measured = Literal["effects", "rounds", "scores", "solution"]
BUDGETS = (0.1, 0.25, 0.5)
"""Shares of each expert's head, KV and neuron parameters."""
SHUFFLES = 5
TELLING = ("rounds", "conflict")
"""The policies of the telling wave, the headline policy first. It was named before any run of this benchmark; but the demo has
answered the test prompts with both, with the experts of `conflict`, seed 0 (benchmarks/results/demo-2026-11-22.json), and the
tokens that its loss weighs, and the standard errors by which a change must help, were chosen on the develop split of that seed,
after a run of it (benchmarks/log.md, 2026-11-28).
"""
HEADLINE = TELLING[0]
MEASURED: dict[str, Measured] = {
    "rounds": "rounds",
    "conflict": "effects",
    "solve": "solution",
    "top": "scores",
    "weighted": "scores",
}
"""What policies are made from."""

WEIGHTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
OTHERS = (0.7, 1.0, 1.4)
LESS = (0.1, 0.2, 0.3, 0.5, 0.7)
"""Task arithmetic with one expert at less than the others, whose weight is one of `OTHERS`."""
DENSITIES = (0.2, 0.5, 0.8)
GRIDS: dict[str, dict[str, tuple[float | bool, ...]]] = {
    "task-arithmetic": {"weight": WEIGHTS},
    "linear": {},
    # TIES and DELLA divide by the weights, so that a common one cancels; their own scale is lambda.
    "ties": {"density": DENSITIES, "lambda": (0.7, 1.0, 1.4)},
    "dare-ties": {"density": DENSITIES, "weight": (0.4, 0.7, 1.0)},
    "della": {"density": (0.3, 0.6), "lambda": (0.7, 1.0, 1.4)},
    "breadcrumbs": {"density": (0.5, 0.9), "weight": (0.4, 0.7, 1.0)},
    "sce": {"topk": (0.1, 0.5, 1.0)},
    "model-stock": {"filter_wise": (False, True)},
}
"""What is swept on the develop split, for each baseline; a baseline that is not here has one setting, its default."""

UNEVEN: dict[str, tuple[tuple[float, ...], dict[str, float]]] = {
    "linear": ((0.1, 0.3, 0.5), {}),
    "dare-ties": ((0.3,), {"density": 0.8}),
    "breadcrumbs": ((0.3,), {"density": 0.9}),
}
"""Weights that one expert has in other baselines, where the others have 1, and the settings beside. TIES and DELLA are not
among them: they divide by the weights of those that agree, so that an element which one expert alone moves is moved whole.
"""


@dataclass(frozen=True)
class Arm:
    """A model that is made of the experts, and what it is called."""

    name: str
    kind: Kind
    policy: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    like: str | None = None
    """For a control: the name of the arm whose shares it copies."""
    within: str | None = None
    """The name of the arm whose coefficients a baseline works inside."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """Weights of single experts, in the place of a baseline's common one."""
    whole: Mapping[str, Any] = field(default_factory=dict)
    """Parameters of mergekit's method beside those that the policy knows."""

    @property
    def measured(self) -> Measured | None:
        """What its recipe is made from, beside other recipes and the models."""
        return MEASURED.get(self.policy)


def _named(policy: str, settings: Mapping[str, float]) -> str:
    return "_".join([policy, *(f"{key}-{value:g}" for key, value in settings.items())])


def sweep(experts: Sequence[str], seed: int, few: bool = False) -> list[Arm]:
    """The settings of every baseline.

    Args:
        experts: names of the experts.
        seed: of baselines that draw at random.
        few: task arithmetic at two weights alone, to try the benchmark out.
    """
    if few:
        return [_baseline("task-arithmetic", {"weight": weight}, seed) for weight in (0.5, 1.0)]
    arms = []
    for policy in BASELINES:
        grid = GRIDS.get(policy, {})
        arms += [_baseline(policy, dict(zip(grid, values, strict=True)), seed) for values in itertools.product(*grid.values())]
    for expert, weight, other in itertools.product(experts, LESS, OTHERS):
        if weight < other:
            weights, common = dict.fromkeys(experts, other) | {expert: weight}, {} if other == 1 else {"others": other}
            name = _named("task-arithmetic", common | {expert: weight})
            arms.append(Arm(name, "baseline", "task-arithmetic", weights=weights))
    for policy, (fractions, settings) in UNEVEN.items():
        for expert, fraction in itertools.product(experts, fractions):
            weights = dict.fromkeys(experts, 1.0) | {expert: fraction}
            even = _baseline(policy, settings, seed)
            arms.append(replace(even, name=_named(policy, settings | {expert: fraction}), weights=weights))
    return arms


def edges(arm: Arm, swept: Sequence[Arm]) -> list[str]:
    """The settings of a baseline at which its sweep ends, so that a better one may lie beyond."""
    found = []
    for key, value in _settings(arm).items():
        values = {held[key] for other in swept if other.policy == arm.policy and key in (held := _settings(other))}
        if len(values) > 1 and not isinstance(value, bool) and value in (min(values), max(values)):
            found.append(key)
    return found


def _settings(arm: Arm) -> dict[str, Any]:
    told = {**arm.parameters, **arm.whole}
    if arm.weights:
        least = min(arm.weights, key=arm.weights.__getitem__)
        told |= {least: arm.weights[least], "others": max(arm.weights.values())}
    return told


def _baseline(policy: str, settings: dict[str, float], seed: int) -> Arm:
    known = PARAMETERS[policy]
    return Arm(
        _named(policy, settings),
        "baseline",
        policy,
        {key: value for key, value in settings.items() if key in known},
        seed,
        whole={key: value for key, value in settings.items() if key not in known},
    )


def telling() -> list[Arm]:
    """The policies that are looked at first."""
    return [Arm(policy, "policy", policy) for policy in TELLING]


def others() -> list[Arm]:
    """All other policies, those that have a budget at each budget, and baselines inside the headline policy's coefficients."""
    arms: list[Arm] = []
    for policy in POLICIES:
        if policy in (*BASELINES, *CONTROLS, *TELLING):
            continue
        if "budget" in PARAMETERS.get(policy, ()):
            arms += [Arm(_named(policy, {"budget": budget}), "policy", policy, {"budget": budget}) for budget in BUDGETS]
        else:
            arms.append(Arm(policy, "policy", policy))
    return arms + [Arm(f"{policy}.within.{HEADLINE}", "policy", policy, within=HEADLINE) for policy in ("ties", "dare-ties")]


def controls(arm: Arm, shuffles: int = SHUFFLES) -> dict[str, list[Arm]]:
    """The controls of a policy, by role: the same shares of every layer, kind and expert, chosen without looking.

    `shuffles` are drawn at random; `norm` draws are matched for the norm of the deltas as well; `magnitude` gives the largest
    coefficients to the largest deltas. A baseline that works inside a recipe works inside the controls of that recipe.
    """
    if arm.within is not None:
        inside = controls(Arm(arm.within, "policy", arm.within), shuffles)
        names = [role.removesuffix(arm.within) + arm.name for role in inside]
        made = [[_inside(arm, control) for control in drawn] for drawn in inside.values()]
        return dict(zip(names, made, strict=True))
    found = {f"shuffles of {arm.name}": list(_drawn(arm, "shuffle", {"per_layer": True}, shuffles))}
    matched = {"per_layer": True, "match_norms": True}
    found[f"norm-matched of {arm.name}"] = list(_drawn(arm, "norm", matched, shuffles))
    magnitude = Arm(f"magnitude.like.{arm.name}", "control", "magnitude", {"per_layer": True}, like=arm.name)
    return found | {f"magnitude of {arm.name}": [magnitude]}


def _inside(arm: Arm, control: Arm) -> Arm:
    return replace(arm, name=f"{arm.policy}.within.{control.name}", kind="control", within=control.name, seed=control.seed)


def every() -> dict[str, Arm]:
    """Policies and their controls by name: what a recipe may be like, or work inside."""
    policies = [*telling(), *others()]
    drawn = [arm for policy in policies if policy.within is None for made in controls(policy).values() for arm in made]
    return {arm.name: arm for arm in (*policies, *drawn)}


def _drawn(arm: Arm, name: str, parameters: dict[str, Any], count: int) -> Iterator[Arm]:
    for seed in range(1, count + 1):
        yield Arm(f"{name}-{seed}.like.{arm.name}", "control", "random", parameters, seed, like=arm.name)
