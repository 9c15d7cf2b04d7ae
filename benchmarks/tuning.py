"""Does tuning need fewer evaluations than evolution? `python -m benchmarks.tuning [--quick] [--save] [--folder DIR]`.

The demo's pair, on its develop split; one evaluation function for all (pipeline/examining.py): a merge in memory asked the same
few prompts, its quality the mean of the headline metrics. In one run:

1. *task arithmetic*, swept over one weight for both experts: the best of it plus a margin is the quality to reach;
2. *tune*: the policy `conflict` with its open parameters, as `mechmerge tune` searches them, to the last trial, so that
   the best quality it finds is told as well;
3. *CMA-ES* (https://arxiv.org/abs/1604.00772, by `cma`) over layer weights, the search space of mergekit-evolve
   (https://arxiv.org/abs/2403.13187): a weight for each expert and each five layers, started at 1/2 with a step of 1/6, its
   defaults; negative weights are taken as positive ones, as there.

2 and 3 are run with the same seeds. The figure is the number of evaluations until the quality is reached, a trial that is given
up counted as a whole one; a search that does not reach it counts as one more than it was allowed. Goal: fewer with `tune`.
It also knows the effect matrix, whose cost is told in evaluations beside. n is small, and the quality found is
the best of several on the same prompts: nothing here says how good a merge is on test prompts.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.common import Goal, finish
from mechmerge.artifacts import lock
from mechmerge.cli.common import LineProgress, set_threads
from mechmerge.evaluate.gate import Gate, Rule
from mechmerge.evaluate.record import EvaluateSettings
from mechmerge.pipeline.demo import demo_folder
from mechmerge.pipeline.examining import Examiner
from mechmerge.pipeline.run import suites_of
from mechmerge.pipeline.search import Search
from mechmerge.pipeline.source import resolve_pipeline
from mechmerge.pipeline.space import space_of
from mechmerge.pipeline.stages import Stages
from mechmerge.pipeline.state import RunState
from mechmerge.pipeline.tuning import TuneSettings
from mechmerge.recipe.schema import Policy, Recipe, RecipeExpert
from mechmerge.recipe.schema import Rule as Coefficient
from mechmerge.recipe.sources import Sources, read_sources

WEIGHTS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
MARGIN = 0.05
"""Above the best of the sweep."""
GRANULARITY = 5
"""Layers that share a weight in CMA-ES."""
START, STEP = 0.5, 1 / 6
"""mergekit-evolve's: one over the number of models, and its `--sigma0`."""
POLICY = "conflict"


def layered(sources: Sources, weights: np.ndarray, layers: int) -> Recipe:
    """Task arithmetic with a weight for every expert and group of layers, [experts, groups]; what lies outside the layers has
    the first group's.
    """
    size = layers // weights.shape[1]
    return Recipe(
        base=sources.base,
        experts={n: RecipeExpert(model=m, default=float(weights[e, 0])) for e, (n, m) in enumerate(sources.experts.items())},
        policy=Policy(name="by hand"),
        rules=tuple(
            Coefficient(component=f"L{layer}", expert=name, coefficient=float(weights[e, layer // size]))
            for e, name in enumerate(sources.experts)
            for layer in range(layers)
        ),
    )


def evolve(
    quality: Callable[[np.ndarray, str], float], shape: tuple[int, int], seed: int, most: int, target: float
) -> list[float]:
    """Qualities of CMA-ES's evaluations, in order, until the target or the allowed number is reached.

    Args:
        quality: of weights [experts, groups], by the name of the evaluation.
        shape: [experts, groups].
        seed: of its draws (cma takes 0 for the clock).
        most: evaluations that are allowed.
        target: where it ends.
    """
    import cma

    search = cma.CMAEvolutionStrategy(np.full(shape, START).ravel(), STEP, {"seed": seed + 1, "verbose": -9})
    found: list[float] = []
    while len(found) < most:
        asked, told = search.ask(), []
        for point in asked[: most - len(found)]:
            told.append(quality(np.abs(point).reshape(shape), f"cma-{seed}.{len(found)}"))
            found.append(told[-1])
            if told[-1] >= target:
                return found
        if len(told) == len(asked):
            search.tell(asked, [-value for value in told])
    return found


def until(qualities: list[float], target: float, most: int) -> int:
    """Evaluations until the target; one more than are allowed where it is not reached."""
    return next((number for number, value in enumerate(qualities, 1) if value >= target), most + 1)


@click.command()
@click.option("--quick", is_flag=True, help="Few prompts and evaluations; the figures mean nothing.")
@click.option("--save", is_flag=True)
@click.option(
    "--folder", type=click.Path(path_type=Path, file_okay=False), help="Where answers are kept; a stopped call goes on."
)
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True)
@click.option("--prompts", type=click.IntRange(4), default=48, show_default=True, help="Development prompts a suite.")
@click.option("--evaluations", type=click.IntRange(2), default=60, show_default=True, help="Most evaluations of CMA-ES.")
@click.option("--trials", type=click.IntRange(2), default=24, show_default=True, help="Most evaluations of tune.")
@click.option("--threads", type=click.IntRange(1))
def main(
    quick: bool, save: bool, folder: Path | None, seeds: int, prompts: int, evaluations: int, trials: int, threads: int | None
) -> None:
    """Count the evaluations that tune and CMA-ES need to reach a quality."""
    set_threads(threads)
    if quick:
        seeds, prompts, evaluations, trials = 1, 4, 3, 3
    with tempfile.TemporaryDirectory() as scratch:
        where = folder or Path(scratch)
        where.mkdir(parents=True, exist_ok=True)
        with lock(where / ".lock", f"benchmark {where}"):
            figures = measure(where, quick, seeds, prompts, evaluations, trials)
    goals = {"tune over CMA-ES, evaluations": Goal(0.99), "seeds in which tune reaches it": Goal(seeds, at_most=False)}
    finish("tuning", figures, goals, save, quick)


def measure(folder: Path, quick: bool, seeds: int, prompts: int, evaluations: int, trials: int) -> dict[str, Any]:
    """All figures."""
    progress = LineProgress()
    source = resolve_pipeline(demo_folder() / "pipeline.yaml", progress)
    plan = source.pipeline
    effects = plan.effects.model_copy(update={"prompts": 36, "max_nodes": 6} if quick else {})
    develop = plan.evaluate.model_copy(update={"split": "develop", "limit": prompts})
    source = source._replace(pipeline=plan.model_copy(update={"evaluate": develop, "effects": effects}))
    stages = Stages(source, folder, RunState(folder, progress), progress, "cpu")
    stages.effects()
    sources = read_sources([folder / "effects.safetensors"], {name: model.id for name, model in source.experts.items()})
    suites = suites_of(source.pipeline, source.folder)
    examiner = Examiner(
        source.base, source.experts, suites, Gate(model="merge", rules=(Rule(metric=suites[0].name, at_least=0.0),)),
        EvaluateSettings(dtype=develop.dtype, batch=develop.batch), folder, like={}, chunk=24, progress=progress,
    )  # fmt: skip
    layers, experts = examiner.opened.arch.layers, len(source.experts)

    def quality(weights: np.ndarray, name: str) -> float:
        found = examiner.examine(name, layered(sources, weights, layers), {}).judged
        assert found is not None
        print(f"{name}: quality {found.quality:.3f}", flush=True)
        return found.quality

    weights = (0.5, 1.0) if quick else WEIGHTS
    sweep = {weight: quality(np.full((experts, 1), weight), f"task-arithmetic-{weight:g}") for weight in weights}
    best = max(sweep, key=lambda weight: sweep[weight])
    target = sweep[best] + MARGIN
    figures: dict[str, Any] = {
        "prompts": ", ".join(f"{suite.name} {len(suite.prompts)}" for suite in suites),
        "task arithmetic: weights swept": len(weights),
        "task arithmetic: best weight": best,
        "task arithmetic: best quality": sweep[best],
        "quality to reach": target,
        "seeds": seeds,
        "tune: evaluations allowed": trials,
        "CMA-ES: evaluations allowed": evaluations,
        "CMA-ES: layer weights": experts * (layers // GRANULARITY),
    }
    needed: dict[str, list[int]] = {"tune": [], "CMA-ES": []}
    recipe = plan.recipes[POLICY]
    space = space_of(recipe, tuple(source.experts), tuple(plan.behaviors))
    for seed in range(seeds):
        settings = TuneSettings(trials=trials, patience=trials, limit=prompts, seed=seed)
        made, _ = Search(recipe, space, sources, {}, examiner, settings, folder, progress).run()
        # The estimate of a trial that was given up is at most the best one's quality: it reaches nothing by itself.
        tuned = [trial.quality or 0.0 for trial in made]
        reached = until(tuned, target, trials)
        evolved = evolve(quality, (experts, layers // GRANULARITY), seed, evaluations, target)
        needed["tune"].append(reached)
        needed["CMA-ES"].append(until(evolved, target, evaluations))
        figures |= {
            f"seed {seed}, tune: evaluations": needed["tune"][-1],
            f"seed {seed}, tune: prompts answered until then": sum(trial.prompts for trial in made[:reached]),
            f"seed {seed}, tune: untuned quality": tuned[0],
            f"seed {seed}, tune: best quality": max(tuned),
            f"seed {seed}, CMA-ES: evaluations": needed["CMA-ES"][-1],
            f"seed {seed}, CMA-ES: prompts answered": len(evolved) * examiner.prompts,
            f"seed {seed}, CMA-ES: best quality": max(evolved),
        }
    ratios = [one / other for one, other in zip(needed["tune"], needed["CMA-ES"], strict=True)]
    figures |= {
        "seeds in which tune reaches it": sum(number <= trials for number in needed["tune"]),
        "seeds in which CMA-ES reaches it": sum(number <= evaluations for number in needed["CMA-ES"]),
        "tune over CMA-ES, evaluations": max(ratios),
    }
    return figures | costs(folder, needed["tune"], needed["CMA-ES"])


def costs(folder: Path, tuned: list[int], evolved: list[int]) -> dict[str, float]:
    """What an evaluation and the effect matrix take, and the ratio with the matrix counted as so many evaluations."""
    entries = [json.loads(line) for line in (folder / "timings.jsonl").read_text().splitlines()]
    each: dict[str, float] = {}
    for entry in entries:
        word, _, told = entry["stage"].partition(" ")
        if word == "evaluate" and told.startswith(("cma-", "task-arithmetic-")):  # whole ones
            name = told.split()[0]
            each[name] = each.get(name, 0.0) + entry["seconds"]
    measuring = sum(entry["seconds"] for entry in entries if entry["stage"] == "effects")
    if not each:
        return {}
    seconds = statistics.median(each.values())
    more = measuring / seconds
    return {
        "seconds an evaluation (median)": seconds,
        "the effect matrix, in evaluations": more,
        "tune over CMA-ES, the matrix counted": max((a + more) / b for a, b in zip(tuned, evolved, strict=True)),
    }


if __name__ == "__main__":
    main()
