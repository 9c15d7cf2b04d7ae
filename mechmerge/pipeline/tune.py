"""Few-evaluation search over what a recipe leaves open: budget, strength of each expert, overlap rule, weights of behaviours.

TUNE/effects.safetensors [scores/ …]   what the policy and the predictions need, measured as in a run
TUNE/.trials/                          finished trials: a search that was killed goes on behind them
TUNE/samples/.answers/                 kept answers, a batch at a time
TUNE/tune.json                         every trial, the best, and why the search ended
TUNE/recipe.yaml [masks]               the best trial's recipe

Sampling is optuna's TPE (Bergstra et al., https://proceedings.neurips.cc/paper/2011/hash/86e8f7ab32cfd12577bc2619bc635690-Abstract.html),
seeded. The first trial is the policy as it is; the next are those of a Latin hypercube that the effect matrix, a linear model
of every behaviour's loss, predicts to be best. A trial is given up between chunks of prompts when a Wilcoxon signed-rank test
on the prompts asked so far says that it is worse than the best one (optuna's WilcoxonPruner); the sampler is then told the
best quality plus the difference of the pass rates on those prompts. The search ends after a number of trials, after so many
without a better one, or at a quality that was asked for. All of it sees development prompts only (pipeline/examining.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mechmerge.artifacts import lock, write_json, write_yaml
from mechmerge.errors import InputError, MissingError
from mechmerge.evaluate.record import EvaluateSettings
from mechmerge.pipeline.examining import Examiner, development_suites
from mechmerge.pipeline.schema import RecipePlan
from mechmerge.pipeline.search import Search
from mechmerge.pipeline.source import resolve_pipeline
from mechmerge.pipeline.space import space_of
from mechmerge.pipeline.stages import Stages, run_record
from mechmerge.pipeline.state import RunState
from mechmerge.pipeline.tuning import AskedSuite, TuneSettings, Tuning, best_of
from mechmerge.progress import SILENT, Progress
from mechmerge.recipe.compile import BASELINES
from mechmerge.recipe.schema import write_recipe
from mechmerge.recipe.sources import Sources, read_sources
from mechmerge.versions import versions


def tune(
    path: Path,
    out: Path,
    settings: TuneSettings | None = None,
    *,
    recipe: str | None = None,
    opened: Sequence[str] = (),
    suites: Sequence[str] | None = None,
    progress: Progress = SILENT,
    device: str = "cpu",
) -> Tuning:
    """Searches the open parameters of a recipe of a pipeline; calling it again goes on where it stopped.

    Args:
        path: the pipeline file: models, behaviours, suites and the gate.
        out: the search's folder.
        settings: see `TuneSettings`.
        recipe: the recipe whose open parameters are searched (default: the one that the pipeline publishes).
        opened: parameters that are opened although the recipe sets them, or with ranges of their own (`space.py`).
        suites: what is asked in the place of the pipeline's suites; always in the develop split.
        progress: told of every step.
        device: torch device.

    Raises:
        InputError: nothing is open, a suite is for testing, no trial can be made, or another process works on `out`.
        MissingError: optuna, a model, or data is needed and not there.
    """
    _need_optuna()
    settings = settings or TuneSettings()
    source = resolve_pipeline(path, progress)
    asked = {"split": "develop", "limit": settings.limit} | ({} if suites is None else {"suites": tuple(suites)})
    pipeline = source.pipeline.model_copy(update={"evaluate": source.pipeline.evaluate.model_copy(update=asked)})
    name = recipe or pipeline.publish
    if name not in pipeline.recipes:
        raise InputError("--recipe", expected=f"one of {', '.join(pipeline.recipes)}", found=name)
    plan = pipeline.recipes[name]
    if plan.like is not None:
        raise InputError(f"recipe {name}", expected="a policy with something to search", found=f"the control {plan.policy}")
    if plan.within is not None:
        raise InputError(
            f"recipe {name}", expected="a policy on its own", found=f"{plan.policy} within {plan.within}",
            fix=f"search {plan.within} instead",
        )  # fmt: skip
    space = space_of(plan, tuple(pipeline.experts), tuple(pipeline.behaviors), opened)
    loaded = development_suites(pipeline, source.folder, "name other suites with --suite", progress)
    if plan.policy == "solve":
        progress.note("note: trials of solve are the linear program's alone; a run measures once more at its solution")
    pipeline = pipeline.model_copy(update={"recipes": {name: plan}, "publish": name})
    out.mkdir(parents=True, exist_ok=True)
    with lock(out / ".lock", f"search {out}"):
        resolved = source._replace(pipeline=pipeline)
        write_yaml(out / "run.yaml", run_record(resolved))
        stages = Stages(resolved, out, RunState(out, progress), progress, device)
        files = measured(stages, plan)
        ids = {expert: model.id for expert, model in source.experts.items()}
        sources = read_sources(files, ids) if files else Sources(source.base.id, ids)
        plan_settings = EvaluateSettings(
            dtype=pipeline.evaluate.dtype, batch=pipeline.evaluate.batch, exact=pipeline.evaluate.exact,
            thinking=pipeline.evaluate.thinking, device=device, seed=pipeline.seed,
        )  # fmt: skip
        rules = {"vocabulary": pipeline.vocabulary, "positions": pipeline.positions, "out_dtype": pipeline.out_dtype}
        examiner = Examiner(
            source.base, source.experts, loaded, pipeline.gate, plan_settings, out, like=rules, chunk=settings.chunk,
            progress=progress,
        )  # fmt: skip
        search = Search(plan, space, sources, rules, examiner, settings, out, progress)
        trials, stopped = search.run()
        best = best_of(trials)
        if best is None:
            raise InputError(f"recipe {name}", expected="a trial that the policy takes", found=str(trials[0].problem))
        compiled = search.compiled(trials[best].parameters)
        write_recipe(out / "recipe.yaml", compiled.recipe, compiled.masks)
        tuning = Tuning(
            recipe=name,
            policy=plan.policy,
            fixed={key: value for key, value in plan.parameters.items() if key not in {one.name for one in space}},
            space=tuple(space),
            settings=settings,
            evaluation=plan_settings,
            suites={s.name: AskedSuite(digest=s.digest, split=s.split, prompts=len(s.prompts)) for s in loaded},
            references={who: examiner.reference(who).metrics for who in examiner.done},
            trials=tuple(trials),
            best=best,
            stopped=stopped,
            versions=versions(),
        )
        write_json(out / "tune.json", tuning)
    return tuning


def measured(stages: Stages, plan: RecipePlan) -> list[Path]:
    """Measures what the policy and the predictions need: effects but for baselines that are no weighted sum, all else where the
    policy may ask for it.
    """
    if plan.policy in BASELINES and plan.policy != "task-arithmetic":
        return []
    stages.effects()
    if plan.policy in ("conflict", "solve", *BASELINES):
        return [stages.run / "effects.safetensors"]
    stages.localize()
    stages.rounds()
    return stages.measurements()


def _need_optuna() -> None:
    try:
        import optuna  # noqa: F401
    except ImportError:
        raise MissingError(
            "mechmerge tune", expected="the package optuna", found="none", fix="pip install 'mechmerge[tune]'"
        ) from None
