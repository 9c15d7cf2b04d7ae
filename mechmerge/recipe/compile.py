"""From measured files and the name of a policy to a recipe: the one way in for the CLI and for pipelines."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from mechmerge.artifacts import to_yaml
from mechmerge.errors import InputError
from mechmerge.localize.rounds_file import MOST_CERTAIN, RoundsFile
from mechmerge.models.components import UNIT_KINDS
from mechmerge.models.pair import PositionRule, VocabularyRule
from mechmerge.recipe.controls import coinciding, magnitude_like, norm_matched, random_like
from mechmerge.recipe.policies import (
    Choice,
    Overlap,
    Scale,
    Weighting,
    conflict,
    predicted_change,
    rounds,
    solve,
    top,
    weighted,
)
from mechmerge.recipe.schema import Array, Masks, MergekitMethod, OutDtype, Policy, Recipe, RecipeExpert, Scalar, Source
from mechmerge.recipe.sources import Sources
from mechmerge.recipe.strengths import check_strengths, strengthened, without_strengths

CONTROLS = ("random", "magnitude")
BASELINES: dict[str, str] = {
    "task-arithmetic": "task_arithmetic",
    "linear": "linear",
    "ties": "ties",
    "dare-ties": "dare_ties",
    "della": "della",
    "breadcrumbs": "breadcrumbs",
    "sce": "sce",
    "model-stock": "model_stock",
}
"""Our names of mergekit's methods."""
OF_BASELINES: dict[str, dict[str, Scalar]] = {
    "task-arithmetic": {"weight": 1.0},
    "linear": {"weight": 1.0},
    "ties": {"weight": 1.0, "density": 0.5, "lambda": 1.0},
    "dare-ties": {"weight": 1.0, "density": 0.5},
    "della": {"weight": 1.0, "density": 0.5, "epsilon": 0.15, "lambda": 1.0},
    "breadcrumbs": {"weight": 1.0, "density": 0.9, "gamma": 0.01},
    "sce": {"topk": 1.0},
    "model-stock": {"filter_wise": False},
}
"""Parameters of each baseline, with what they are where none is given: TIES (https://arxiv.org/abs/2306.01708) and DARE
(https://arxiv.org/abs/2311.03099) keep a density of each delta; DELLA (https://arxiv.org/abs/2406.11617) draws with
probabilities density ± epsilon by size; Breadcrumbs (https://arxiv.org/abs/2312.06795) leaves out the largest gamma as well;
SCE (https://arxiv.org/abs/2408.07990) keeps the topk share of elements by variance over experts and weighs these itself, so
it has no weight; Model Stock (https://arxiv.org/abs/2403.19522) finds its own place between base and mean, of each tensor or
(`filter_wise`) each of its rows. `lambda` multiplies what TIES and DELLA add to the base.
"""
NORMALIZED = ("linear", "ties", "della")
"""Baselines that divide by the experts' weights (linear by all, TIES and DELLA by those that agree): only ratios matter."""
DRAWN = ("dare-ties", "della")
"""Baselines that draw at random."""
WITHIN = ("ties", "dare-ties")
"""Baselines that can be confined to another recipe's coefficients."""
_OF_EXPERTS = ("density", "epsilon", "gamma")
_NAMES_THERE = {"topk": "select_topk"}
POLICIES: tuple[str, ...] = ("conflict", "rounds", "solve", "top", "weighted", *CONTROLS, *BASELINES)


@dataclass(frozen=True)
class Compiled:
    """A recipe with its masks, not written yet."""

    recipe: Recipe
    masks: Masks
    notes: tuple[str, ...] = ()
    """What a user should know of how it was made."""


Like = tuple[Recipe, Masks]
Norms = Callable[[str], Mapping[str, Array]]
"""Delta norms by kind [layers, units] of an expert that no score file tells of."""


def compile_recipe(
    policy: str,
    sources: Sources,
    *,
    parameters: Mapping[str, Any] | None = None,
    seed: int = 0,
    like: Like | None = None,
    within: Like | None = None,
    delta_norms: Norms | None = None,
    out_dtype: OutDtype = "bfloat16",
    vocabulary: VocabularyRule = "same",
    positions: PositionRule = "same",
) -> Compiled:
    """Applies a policy.

    Args:
        policy: one of `POLICIES`.
        sources: the measured files; baselines and controls take only the models' identities (and delta norms) from them.
        parameters: of the policy. `conflict`: weights (by behaviour, as `weight.NAME`), weighting, agreement, certainty;
            `solve`: budget, limits (by behaviour, as `limit.NAME`), agreement, unproven; `top`: budget, overlap; `weighted`:
            budget, scale, overlap; `random`, `magnitude`: per_layer; `random`: match_norms; baselines: `OF_BASELINES`.
            All but sce and model-stock: `strength.EXPERT`, which multiplies an expert's coefficients (recipe/strengths.py).
        seed: of what is drawn at random: `random` and `DRAWN`.
        like: for the controls, the recipe whose shares they copy, with its masks.
        within: for `ties` and `dare-ties`, the recipe whose coefficients they work inside, with its masks.
        delta_norms: called by `magnitude` for experts without score files.

    Raises:
        InputError: no such policy or parameter, a value out of range, or a file that the policy needs is missing.
    """
    if policy not in POLICIES:
        raise InputError(f"policy {policy!r}", expected=f"one of {', '.join(POLICIES)}", found="none of them")
    strengths, given = without_strengths(parameters or {})
    if strengths:
        plain = compile_recipe(
            policy, sources, parameters=given, seed=seed, like=like, within=within, delta_norms=delta_norms,
            out_dtype=out_dtype, vocabulary=vocabulary, positions=positions,
        )  # fmt: skip
        return Compiled(*strengthened(plain.recipe, plain.masks, strengths, sources.effects), plain.notes)
    common: dict[str, Any] = {"out_dtype": out_dtype, "vocabulary": vocabulary, "positions": positions}
    if within is not None and policy not in WITHIN:
        raise InputError(f"policy {policy}", expected="no recipe to work within", found="one",
                         fix=f"--within belongs to {' and '.join(WITHIN)}")  # fmt: skip
    if policy in BASELINES:
        idle = policy in NORMALIZED and given.get("weight", 1.0) != 1.0
        if within is not None:
            return _within(policy, sources, given, seed, within, common)
        notes = (f"{policy} divides by the experts' weights: a common one changes nothing",) if idle else ()
        made = _baseline(policy, sources, given, seed, common)
        return Compiled(_foreseen(sources, made, {}) if policy == "task-arithmetic" else made, {}, notes)
    if (policy in CONTROLS) != (like is not None):
        raise InputError(f"policy {policy}", expected="another recipe to be like" if like is None else "no recipe to be like",
                         found="none" if like is None else "one", fix="--like belongs to random and magnitude")  # fmt: skip
    if like is not None:
        return _control(policy, sources, given, seed, like, delta_norms, common)
    settings = _gathered(_gathered(given, "weight"), "limit")
    measured = _measured(policy, sources)
    if policy == "solve" and isinstance(measured, RoundsFile):
        given = _asked(measured, given)
        settings = {}
    _check(policy, settings)
    choice = FUNCTIONS[policy](measured, **settings)
    experts = {name: RecipeExpert(model=model, default=choice.defaults[name]) for name, model in sources.experts.items()}
    recipe = Recipe(
        base=sources.base,
        experts=experts,
        policy=Policy(name=policy, parameters=given),
        parameters=sources.unit_parameters() or None,
        predicted=choice.predicted,
        predicted_on=choice.metric,
        realised=choice.realised,
        provenance=sources.provenance,
        **common,
    )
    return Compiled(recipe if choice.predicted else _foreseen(sources, recipe, choice.masks), choice.masks, choice.notes)


def _foreseen(sources: Sources, recipe: Recipe, masks: Masks) -> Recipe:
    """The recipe with what effects of its very experts predict of it, where there are any."""
    predicted = expected_change(sources, recipe, masks)
    if predicted is None or sources.effects is None:
        return recipe
    return recipe.model_copy(update={"predicted": predicted, "predicted_on": sources.effects.metadata.metric})


def _measured(policy: str, sources: Sources) -> Any:
    settled = sources.rounds
    if policy == "rounds" and settled is None:
        raise InputError("policy rounds", expected="a rounds file", found="none", fix="make one with `mechmerge rounds`")
    solved = policy == "solve" and settled is not None and (settled.metadata.method == "solve" or sources.effects is None)
    if settled is not None and (policy == "rounds" or solved):
        if lacking := sorted(sources.experts.keys() - settled.metadata.experts.keys()):
            raise InputError(
                f"policy {policy}", expected=f"a rounds file with {', '.join(lacking)}",
                found=f"one of {', '.join(settled.metadata.experts)}", fix="leave out the files of other experts",
            )  # fmt: skip
        return settled
    if policy in ("conflict", "solve"):
        if sources.effects is None:
            raise InputError(
                f"policy {policy}", expected="an effect file", found="none", fix="make one with `mechmerge effects`"
            )
        missing = sources.experts.keys() - sources.effects.metadata.experts.keys()
        if missing:
            raise InputError(
                f"policy {policy}", expected=f"effects of {', '.join(sorted(missing))}", found="none in the effect file"
            )
        return sources.effects
    missing = sources.experts.keys() - sources.scores.keys()
    if missing:
        raise InputError(
            f"policy {policy}",
            expected=f"score files of {', '.join(sorted(missing))}",
            found="none",
            fix="run `mechmerge localize`",
        )
    return sources.scores


def _gathered(given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """`weight.NAME` entries become one mapping `weights`, `limit.NAME` ones `limits`."""
    if f"{name}s" in given:
        raise InputError(f"parameter '{name}s'", expected=f"{name}.NAME for each behaviour", found=repr(given[f"{name}s"]))
    settings = {key: value for key, value in given.items() if not key.startswith(f"{name}.")}
    found = {key.removeprefix(f"{name}."): value for key, value in given.items() if key.startswith(f"{name}.")}
    return settings | ({f"{name}s": found} if found else {})


def _asked(file: RoundsFile, given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that a measured solution was asked with; those given must not differ from them."""
    record = file.metadata.solve
    if record is None:
        return dict(given)
    proven = record.linearity is not None and record.linearity.holds
    limits = {f"limit.{name}": limit for name, limit in record.limits.items()}
    asked = {"budget": record.budget, **limits} | ({} if record.agreement else {"agreement": False})
    asked |= {} if proven else {"unproven": True}
    for name, value in given.items():
        was = asked.get(name, True if name == "agreement" else None)
        if name != "unproven" and was != value:
            raise InputError(f"policy solve: {name}", expected=f"{was}, as the rounds file was made", found=repr(value))
    return asked


FUNCTIONS: dict[str, Callable[..., Choice]] = {
    "conflict": conflict,
    "rounds": rounds,
    "solve": solve,
    "top": top,
    "weighted": weighted,
}
"""The policies that choose coefficients from what was measured."""


def defaults_of(policy: str) -> dict[str, Scalar]:
    """What a policy's parameters are where they are not given."""
    if policy not in FUNCTIONS:
        return dict(OF_BASELINES.get(policy, {}))
    found = inspect.signature(FUNCTIONS[policy]).parameters.values()
    return {p.name: p.default for p in found if isinstance(p.default, bool | int | float | str)}


LARGEST_LIMIT = 1000.0
"""Of a predicted damage, in nats."""
CHOICES: dict[str, tuple[str, ...]] = {"overlap": get_args(Overlap), "weighting": get_args(Weighting), "scale": get_args(Scale)}


def takes_strengths(policy: str) -> bool:
    """Whether a policy takes `strength.EXPERT`: SCE and Model Stock weigh the experts themselves."""
    return policy not in BASELINES or "weight" in OF_BASELINES[policy]


def check_parameters(policy: str, parameters: Mapping[str, Any]) -> None:
    """Whether a policy can be told these parameters, as far as that is known before anything is measured.

    Raises:
        InputError: a parameter that it does not have, or a value out of range.
    """
    strengths, given = without_strengths(parameters)
    check_strengths(policy, strengths, takes_strengths(policy))
    if policy in BASELINES:
        _settings(policy, given)
    elif policy in CONTROLS:
        _flags(policy, given)
    else:
        _check(policy, _gathered(_gathered(given, "weight"), "limit"))


def _check(policy: str, settings: Mapping[str, Any]) -> None:
    accepted = list(inspect.signature(FUNCTIONS[policy]).parameters)[1:]
    given_as = {"weights": "weight.NAME", "limits": "limit.NAME"}
    _known(policy, settings, accepted, [given_as.get(name, name) for name in accepted])
    for name, choices in CHOICES.items():
        if name in settings and settings[name] not in choices:
            raise InputError(f"policy {policy}: {name}", expected=f"one of {', '.join(choices)}", found=repr(settings[name]))
    if (policy == "top" or "budget" in settings) and _number(policy, "budget", settings.get("budget"), 0, 1) == 0:
        raise InputError(f"policy {policy}: budget", expected="a share above 0", found="0")
    if "certainty" in settings:
        _number(policy, "certainty", settings["certainty"], 0, MOST_CERTAIN)
    for name in ("agreement", "unproven"):
        if not isinstance(settings.get(name, False), bool):
            raise InputError(f"policy {policy}: {name}", expected="true or false", found=repr(settings[name]))
    for name, weight in settings.get("weights", {}).items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < np.inf:
            raise InputError(f"policy {policy}: weight.{name}", expected="a positive number", found=repr(weight))
    for name, limit in settings.get("limits", {}).items():
        _number(policy, f"limit.{name}", limit, 0, LARGEST_LIMIT)


def _flags(policy: str, given: Mapping[str, Any]) -> None:
    """Checks the parameters of a control."""
    _known(policy, given, ["per_layer", "match_norms"] if policy == "random" else ["per_layer"])
    for name, value in given.items():
        if not isinstance(value, bool):
            raise InputError(f"policy {policy}: {name}", expected="true or false", found=repr(value))


def _known(policy: str, settings: Mapping[str, Any], accepted: list[str], told: list[str] | None = None) -> None:
    """Refuses parameters that are not `accepted`, which a message calls what they are `told` as."""
    for name in settings:
        if name not in accepted:
            raise InputError(f"policy {policy}: parameter {name!r}", expected=f"one of {', '.join(told or accepted) or 'none'}")


def _number(policy: str, name: str, value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InputError(f"policy {policy}: {name}", expected=f"a number from {low:g} to {high:g}", found=repr(value))
    return float(value)


def _settings(policy: str, given: Mapping[str, Any]) -> dict[str, Scalar]:
    """All parameters of a baseline.

    Raises:
        InputError: one that it does not have, or a value out of range.
    """
    known = OF_BASELINES[policy]
    _known(policy, given, list(known))
    settings: dict[str, Scalar] = known | dict(given)
    for name, value in settings.items():
        if name == "filter_wise":
            if not isinstance(value, bool):
                raise InputError(f"policy {policy}: {name}", expected="true or false", found=repr(value))
        else:
            settings[name] = _number(policy, name, value, *((-100, 100) if name in ("weight", "lambda") else (0, 1)))
    if "epsilon" in settings:
        density, epsilon = float(settings["density"]), float(settings["epsilon"])
        if density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
            raise InputError(
                f"policy {policy}", expected="density ± epsilon between 0 and 1", found=f"{density:g} ± {epsilon:g}"
            )
    return settings


def _method(policy: str, settings: Mapping[str, Scalar], experts: Iterable[str], within: bool = False) -> MergekitMethod:
    """The mergekit block of a baseline."""
    each = {name: settings[name] for name in _OF_EXPERTS if name in settings} | (
        {"weight": settings["weight"]} if within else {}
    )
    whole: dict[str, Scalar] = {"normalize": policy in NORMALIZED} if "weight" in settings else {}
    own = {k: v for k, v in settings.items() if k not in _OF_EXPERTS and k != "weight"}
    whole |= {_NAMES_THERE.get(k, k): v for k, v in own.items()}
    return MergekitMethod.model_validate(
        {
            "method": BASELINES[policy],
            "parameters": whole,
            "expert_parameters": {name: dict(each) for name in experts} if each else {},
            "within": within,
        }
    )


def _baseline(policy: str, sources: Sources, given: dict[str, Any], seed: int, common: dict[str, Any]) -> Recipe:
    settings = _settings(policy, given)
    if policy == "model-stock" and len(sources.experts) < 2:
        raise InputError("policy model-stock", expected="two experts or more", found=str(len(sources.experts)))
    weight = float(settings.get("weight", 1.0))
    if policy == "linear" and weight == 0:
        raise InputError("policy linear: weight", expected="weights whose sum is not 0, since it divides by it", found="0")
    return Recipe(
        base=sources.base,
        experts={name: RecipeExpert(model=model, default=weight) for name, model in sources.experts.items()},
        policy=Policy(name=policy, parameters=settings, seed=seed if policy in DRAWN else None),
        mergekit=_method(policy, settings, sources.experts),
        provenance=sources.provenance,
        **common,
    )


def _copied(recipe: Recipe) -> Source:
    """The recipe that another one is made like, or within. The digest is that of the file that `write_recipe` writes: one that
    was edited by hand, or written by an older version, may have another.
    """
    return Source(file="recipe.yaml", kind="recipe", sha256=hashlib.sha256(to_yaml(recipe).encode()).hexdigest())


def _within(policy: str, sources: Sources, given: dict[str, Any], seed: int, within: Like, common: dict[str, Any]) -> Compiled:
    """TIES or DARE-TIES inside another recipe's coefficients."""
    model, masks = within
    settings = _settings(policy, given)
    if model.mergekit is not None:
        raise InputError(f"policy {policy}", expected="a recipe of coefficients to work within", found=model.policy.name)
    if model.base.digest != sources.base.digest:
        raise InputError(f"policy {policy}", expected=f"a recipe of the base {sources.base.name}", found=model.base.name)
    recipe = model.model_copy(
        update={
            "policy": Policy(
                name=f"{policy} within {model.policy.name}", parameters=settings, seed=seed if policy in DRAWN else None
            ),
            "masks": None,
            "mergekit": _method(policy, settings, model.experts, within=True),
            "predicted": None,
            "realised": None,
            "provenance": (*sources.provenance, _copied(model)),
            **common,
        }
    )
    values = [expert.default for expert in model.experts.values()] + [rule.coefficient for rule in model.rules]
    fractions = any(v not in (0, 1) for v in values) or any(bool(((m != 0) & (m != 1)).any()) for m in masks.values())
    notes = (f"{policy} divides by the experts' weights: where one alone is inside, a coefficient other than 0 counts as 1",)
    return Compiled(recipe, dict(masks), notes if fractions and policy in NORMALIZED else ())


def _control(
    policy: str,
    sources: Sources,
    given: dict[str, Any],
    seed: int,
    like: Like,
    delta_norms: Norms | None,
    common: dict[str, Any],
) -> Compiled:
    model, masks = like
    _flags(policy, given)
    if not masks or model.rules:
        raise InputError(
            f"policy {policy}", expected="a recipe of masks to be like", found=f"one of rules ({model.policy.name})"
        )
    if model.base.digest != sources.base.digest:
        raise InputError(f"policy {policy}", expected=f"a recipe of the base {sources.base.name}", found=model.base.name)
    per_layer, notes = bool(given.get("per_layer", False)), tuple[str, ...]()
    if policy == "random" and given.get("match_norms", False):
        drawn = norm_matched(masks, _norms(model, masks, sources, delta_norms), seed)
        kept = ", ".join(f"{share:.0%} of {name}" for name, share in coinciding(masks, drawn).items()) or "none"
        notes = (f"of the components that {model.policy.name} treats unlike most these keep their coefficient: {kept}",)
    elif policy == "random":
        drawn = random_like(masks, seed, per_layer)
    else:
        drawn = magnitude_like(masks, _norms(model, masks, sources, delta_norms), per_layer)
    name = f"{policy} like {model.policy.name}"
    recipe = model.model_copy(
        update={
            "policy": Policy(name=name, parameters=given, seed=seed if policy == "random" else None),
            "masks": None,
            # What TIES or DARE does inside coefficients no effects of components foresee.
            "predicted": expected_change(sources, model, drawn) if model.mergekit is None else None,
            "predicted_on": "loss" if sources.effects is None else sources.effects.metadata.metric,
            "realised": None,
            "provenance": (*sources.provenance, _copied(model)),
            **common,
        }
    )
    return Compiled(recipe, drawn, notes)


def expected_change(sources: Sources, model: Recipe, masks: Masks) -> dict[str, float] | None:
    """`predicted_change` of a recipe's coefficients; None where no effects of its very experts were measured."""
    if sources.effects is None or sources.effects.metadata.experts.keys() != model.experts.keys():
        return None
    return predicted_change(sources.effects, {name: e.default for name, e in model.experts.items()}, masks)


def _norms(model: Recipe, masks: Masks, sources: Sources, compute: Norms | None) -> dict[str, Array]:
    by_digest = {identity.digest: name for name, identity in sources.experts.items()}
    known = sources.delta_norms()
    found: dict[str, Array] = {}
    for name, expert in model.experts.items():
        theirs = by_digest.get(expert.model.digest, name)
        for kind in UNIT_KINDS:
            if f"{theirs}.{kind}" in known:
                found[f"{name}.{kind}"] = known[f"{theirs}.{kind}"]
        if compute is not None and any(m.startswith(f"{name}.") and m not in found for m in masks):
            found |= {f"{name}.{kind}": norms for kind, norms in compute(name).items()}
    return found
