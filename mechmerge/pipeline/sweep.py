"""Side by side: every combination of experts, policies and parameters that is asked for, ranked by the gate.

SWEEP/sets/EXPERTS/        a run directory for each set of experts: its measurements, recipes and merges
SWEEP/evaluation.json      one evaluation of the base, all experts and all merges; equal weights share their answers
SWEEP/sweep.json           the ranking

Localization depends on the base and one expert, so it is made once and handed on; effects and rounds depend on the sum, so
they are measured for each set of experts. A sweep chooses, so it asks the develop split unless told otherwise: what it
ranks first is still to be run on the test split.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from mechmerge.artifacts import Document, lock, parse_yaml, write_json, write_yaml
from mechmerge.errors import InputError
from mechmerge.evaluate.gate import Gate, GateResult
from mechmerge.evaluate.record import Evaluation
from mechmerge.models.references import Model
from mechmerge.pipeline.examining import development_suites
from mechmerge.pipeline.ranking import judged
from mechmerge.pipeline.run import evaluated, merged_models, suites_of
from mechmerge.pipeline.schema import DRAWN, PARAMETERS, Pipeline, RecipePlan
from mechmerge.pipeline.source import Resolved, resolve_pipeline
from mechmerge.pipeline.stages import Stages, run_record
from mechmerge.pipeline.state import RunState
from mechmerge.progress import SILENT, Progress
from mechmerge.recipe.compile import BASELINES, takes_strengths

CONTROLS = ("random", "magnitude")
MEASURED = ("conflict", "rounds", "solve", "top", "weighted")
"""Policies that controls copy the shares of."""


class Variant(Document):
    """One combination."""

    name: str
    experts: tuple[str, ...]
    policy: str
    parameters: dict[str, Any]
    seed: int = 0
    """Of what is drawn at random."""
    like: str | None = None
    """For a control: the variant whose shares it copies."""
    within: str | None = None
    """The variant whose coefficients TIES or DARE-TIES works inside."""


class _Given(NamedTuple):
    """What is varied: a recipe of the pipeline, or a policy as it is."""

    title: str
    policy: str
    parameters: dict[str, Any]
    seed: int = 0
    within: str | None = None


class Ranked(Document):
    """What became of a variant."""

    rank: int
    """1 is the best: rules passed, then least missing to the failed ones, then the mean of the headline metrics."""
    variant: Variant
    gate: GateResult
    metrics: dict[str, float]
    """Headline metrics by flat name."""
    recipe: str
    """Its recipe file, relative to the sweep."""


class Sweep(Document):
    """`sweep.json`."""

    schema_version: Literal[1] = 1
    split: Literal["test", "develop"]
    """The prompts of built-in suites that the ranking rests on."""
    ranking: tuple[Ranked, ...]


def parse_vary(texts: Iterable[str]) -> dict[str, list[Any]]:
    """What is varied: `policy=conflict,top,budget=0.1,0.5` (a piece without `=` is one more value of the name before it).

    Raises:
        InputError: no name, no value, or a name twice.
    """
    found: dict[str, list[Any]] = {}
    for text in texts:
        name = ""
        for piece in text.split(","):
            before, sign, value = piece.partition("=")
            if sign:
                name = before.strip()
                if name in found:
                    raise InputError("--vary", expected="each name once", found=f"{name} twice")
                found[name] = []
            else:
                value = before
            if not name or not value.strip():
                raise InputError("--vary", expected="NAME=VALUE,VALUE…", found=repr(text))
            found[name].append(parse_yaml(value, f"--vary {name}"))
    return found


def expert_sets(names: Sequence[str], wanted: Sequence[Any]) -> list[tuple[str, ...]]:
    """Sets of experts, largest first: `all`, `pairs`, `subsets` (of two or more), or `a+b`.

    Raises:
        InputError: an unknown expert, or one twice.
    """
    found: list[tuple[str, ...]] = []
    for text in map(str, wanted):
        if text == "all":
            found.append(tuple(names))
        elif text == "pairs":
            found += itertools.combinations(names, 2)
        elif text == "subsets":
            found += [chosen for k in range(2, len(names) + 1) for chosen in itertools.combinations(names, k)]
        else:
            chosen = text.split("+")
            for name in chosen:
                if name not in names or chosen.count(name) > 1:
                    known = ", ".join(names)
                    raise InputError("--vary experts", expected=f"all, pairs, subsets, or A+B of {known}", found=repr(text))
            found.append(tuple(name for name in names if name in chosen))
    return sorted(dict.fromkeys(found), key=len, reverse=True)


def variants(pipeline: Pipeline, vary: dict[str, list[Any]]) -> list[Variant]:
    """All combinations for one set of experts.

    A parameter is varied for the policies that have it; `seeds=5` makes five of each that draws at random. Without `policy` the
    pipeline's own recipes are varied, but for its controls.

    Raises:
        InputError: an unknown policy, a parameter that no policy here has, a control without a policy to copy, or a recipe
            within a control.
    """
    given = {name: values for name, values in vary.items() if name not in ("policy", "experts", "seeds")}
    seeds = _seeds(vary.get("seeds", [1]))
    if "policy" in vary:
        plans = [_Given(str(policy), str(policy), {}) for policy in vary["policy"]]
    else:
        plans = [
            _Given(name, plan.policy, dict(plan.parameters), plan.seed, plan.within)
            for name, plan in pipeline.recipes.items()
            if plan.policy not in CONTROLS
        ]
    for plan in plans:
        if plan.policy not in PARAMETERS:
            raise InputError("--vary policy", expected=f"some of {', '.join(PARAMETERS)}", found=plan.policy)
    for name in given:
        if not any(_takes(plan.policy, name) for plan in plans):
            policies = ", ".join(plan.policy for plan in plans)
            raise InputError(f"--vary {name}", expected=f"a parameter of {policies}", found="one that none of them has")
    made: dict[str, list[Variant]] = {}
    for plan in sorted(plans, key=lambda plan: plan.policy in CONTROLS):
        title, policy = plan.title, plan.policy
        names = [name for name in given if _takes(policy, name)]
        others = _others(plan, made)
        drawn = [plan.seed + i for i in range(seeds if policy in DRAWN else 1)]
        values = list(itertools.product(*(given[name] for name in names)))
        for other, chosen_values, seed in itertools.product(others, values, drawn):
            chosen = dict(zip(names, chosen_values, strict=True))
            parts = [title, *(f"{name}-{value}" for name, value in chosen.items())]
            if other is not None and (policy in CONTROLS or len(others) > 1):
                parts.append(f"{'like' if policy in CONTROLS else 'within'}-{other.name}")
            parts += [f"seed-{seed}"] if len(drawn) > 1 else []
            made.setdefault(title, []).append(
                Variant(
                    name="_".join(parts).replace("+", "-"),
                    experts=tuple(pipeline.experts),
                    policy=policy,
                    parameters=plan.parameters | chosen,
                    seed=seed,
                    like=other.name if other is not None and policy in CONTROLS else None,
                    within=other.name if other is not None and policy not in CONTROLS else None,
                )
            )
    return [variant for some in made.values() for variant in some]


def _others(plan: _Given, made: dict[str, list[Variant]]) -> list[Variant] | list[None]:
    """The variants that a control is to be like, or that TIES is to work within; `[None]` for what stands alone."""
    if plan.policy in CONTROLS:
        copied = [variant for some in made.values() for variant in some if variant.policy in MEASURED]
        if not copied:
            raise InputError(
                f"--vary policy={plan.policy}", expected=f"one of {', '.join(MEASURED)} beside the control", found="none"
            )
        return copied
    if plan.within is None:
        return [None]
    if plan.within not in made:
        raise InputError(
            f"recipe {plan.title}", expected="a recipe that is varied too", found=f"one within the control {plan.within}"
        )
    return made[plan.within]


def _seeds(values: Sequence[Any]) -> int:
    """How many seeds of everything that is drawn.

    Raises:
        InputError: no number from 1 to 100.
    """
    if len(values) != 1 or type(values[0]) is not int or not 1 <= values[0] <= 100:
        raise InputError("--vary seeds", expected="one number from 1 to 100", found=", ".join(map(str, values)))
    count: int = values[0]
    return count


def _takes(policy: str, parameter: str) -> bool:
    kind, dot, _ = parameter.partition(".")
    if kind == "strength":
        return bool(dot) and takes_strengths(policy)
    # A baseline has one weight, other policies one of each behaviour.
    return kind in PARAMETERS[policy] and (kind != "weight" or bool(dot) != (policy in BASELINES))


def subset(pipeline: Pipeline, experts: Sequence[str], vary: dict[str, list[Any]]) -> tuple[Pipeline, list[Variant]]:
    """The pipeline of some of the experts, with a recipe for each variant.

    What is said of experts and behaviours that the set lacks (`strength.EXPERT`, `weight.BEHAVIOUR`) is left out.

    Raises:
        InputError: a combination that the policy does not take, or a name that is none of the pipeline's.
    """
    behaviors = {name: plan for name, plan in pipeline.behaviors.items() if plan.expert in experts}
    lacking = {"strength": pipeline.experts.keys() - set(experts), "weight": pipeline.behaviors.keys() - behaviors}
    lacking["limit"] = lacking["weight"]

    def kept(values: Mapping[str, Any]) -> dict[str, Any]:
        split = {name: name.partition(".") for name in values}
        return {name: values[name] for name, (kind, _, of) in split.items() if of not in lacking.get(kind, ())}

    part = pipeline.model_copy(
        update={
            "experts": {name: pipeline.experts[name] for name in experts},
            "behaviors": behaviors,
            "recipes": {
                name: plan.model_copy(update={"parameters": kept(plan.parameters)}) for name, plan in pipeline.recipes.items()
            },
        }
    )
    made = variants(part, kept(vary))
    try:
        recipes = {
            v.name: RecipePlan(policy=v.policy, like=v.like, within=v.within, parameters=v.parameters, seed=v.seed)  # type: ignore[arg-type]
            for v in made
        }
    except ValidationError as error:
        raise InputError("--vary", expected="parameters that the policy takes", found=str(error.errors()[0]["msg"])) from None
    part = part.model_copy(update={"recipes": recipes, "publish": made[0].name})
    try:
        part.check_named()
    except ValueError as error:
        raise InputError("--vary", expected="names of this set of experts and its behaviours", found=str(error)) from None
    return part, made


def run_sweep(
    path: Path,
    vary: dict[str, list[Any]],
    out: Path,
    *,
    split: Literal["test", "develop"] = "develop",
    progress: Progress = SILENT,
    device: str = "cpu",
) -> tuple[Sweep, Evaluation]:
    """Makes, evaluates and ranks all combinations; calling it again goes on where it stopped.

    Args:
        path: the pipeline file; its recipes, gate and suites are the sweep's.
        vary: what is varied (see `parse_vary`).
        out: the sweep's folder.
        split: of the suites that have splits; `develop` refuses those that are for testing (official ones, tasks of lm-eval).

    Raises:
        InputError: a combination that cannot be, a suite for testing, or another process at work on `out`.
        MissingError: a model, package or the Hub is needed and not there.
    """
    source = resolve_pipeline(path, progress)
    pipeline = source.pipeline.model_copy(update={"evaluate": source.pipeline.evaluate.model_copy(update={"split": split})})
    sets = expert_sets(tuple(pipeline.experts), vary.get("experts", ["all"]))
    plans = [subset(pipeline, experts, vary) for experts in sets]
    if split == "develop":
        fix = "name other suites in the pipeline, or choose with --split test"
        suites = development_suites(pipeline, source.folder, fix, progress)
    else:
        suites = suites_of(pipeline, source.folder)
    out.mkdir(parents=True, exist_ok=True)
    with lock(out / ".lock", f"sweep {out}"):
        models: dict[str, Model] = {"base": source.base} | source.experts
        found: list[tuple[Variant, Path]] = []
        for part, made in plans:
            label = "+".join(part.experts)
            stages = _stages(source._replace(pipeline=part), out / "sets" / label, out, progress, device)
            stages.make()
            for name, model in merged_models(stages).items():
                models[name if len(plans) == 1 else f"{label.replace('+', '-')}.{name}"] = model
            found += [(variant, stages.recipe(variant.name)) for variant in made]
        names = list(models)[1 + len(source.experts) :]
        whole = Stages(source._replace(pipeline=pipeline), out, RunState(out, progress), progress, device)
        evaluation = evaluated(whole, models, suites)
        sweep = Sweep(
            split=split,
            ranking=_ranked(
                evaluation,
                pipeline.gate,
                [
                    (name, variant.model_copy(update={"name": name}), str(recipe.relative_to(out)))
                    for name, (variant, recipe) in zip(names, found, strict=True)
                ],
                models,
            ),
        )
        write_json(out / "sweep.json", sweep)
    return sweep, evaluation


def _stages(source: Resolved, run: Path, sweep: Path, progress: Progress, device: str) -> Stages:
    """The stages of one set of experts, with the localization of sets that were measured before."""
    experts = {name: source.experts[name] for name in source.pipeline.experts}
    behaviors = {name: source.behaviors[name] for name in source.pipeline.behaviors}
    source = source._replace(experts=experts, behaviors=behaviors)
    (run / ".state").mkdir(parents=True, exist_ok=True)
    for name in experts:
        stamp = run / ".state" / f"localize-{name}.json"
        for other in sorted(sweep.glob(f"sets/*/.state/localize-{name}.json")):
            scores = other.parent.parent / "scores" / name
            if not stamp.exists() and scores.is_dir() and other != stamp:
                shutil.copytree(scores, run / "scores" / name, dirs_exist_ok=True)
                shutil.copy2(other, stamp)
    write_yaml(run / "run.yaml", run_record(source))
    return Stages(source, run, RunState(run, progress), progress, device)


def _ranked(
    evaluation: Evaluation, gate: Gate, found: Sequence[tuple[str, Variant, str]], models: dict[str, Model]
) -> tuple[Ranked, ...]:
    """The variants, best first."""
    ids = {name: model.id for name, model in models.items()}
    rows = [(judged(evaluation, gate, name, ids), variant, recipe) for name, variant, recipe in found]
    rows.sort(key=lambda row: row[0].order)
    return tuple(
        Ranked(rank=rank, variant=variant, gate=one.gate, metrics=one.metrics, recipe=recipe)
        for rank, (one, variant, recipe) in enumerate(rows, 1)
    )
