"""The public functions of `import mechmerge`: one for each stage, by the name of its command.

Rules that hold for all of them. A model is given as a reference (`mechmerge.resolve` says what that may be), a path, or a
`Model` that was resolved before. Paths may be strings. What belongs to the measurement itself stands in a settings record
(`LocalizeSettings`, ...), whose fields are documented one by one. Nothing is printed: work reports to `progress`. Errors are
`MechmergeError`s of one line: where, what was expected, what was found, what to do. A stage that was interrupted goes on when
it is called again with the same arguments; no file is ever half there.

Names and signatures are pinned by a test; until 1.0 they change with a minor version only, and stand in the changelog then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from mechmerge.errors import (
    CheckpointError,
    GateRefused,
    InputError,
    LocalizeError,
    MechmergeError,
    MissingError,
    PairError,
    SchemaError,
)
from mechmerge.progress import SILENT, Progress

if TYPE_CHECKING:
    from mechmerge.behaviors.generation import Answer
    from mechmerge.behaviors.prompts import Tier
    from mechmerge.behaviors.schema import Behavior
    from mechmerge.evaluate.gate import Gate, GateResult
    from mechmerge.evaluate.record import EvaluateSettings, Evaluation
    from mechmerge.localize.calibration import BehaviorRow
    from mechmerge.localize.effect_file import EffectFile
    from mechmerge.localize.effects import EffectSettings
    from mechmerge.localize.rounds import RoundSettings
    from mechmerge.localize.rounds_file import RoundsFile
    from mechmerge.localize.settings import LocalizeSettings
    from mechmerge.localize.solving import SolveSettings
    from mechmerge.merge.engine import Engine
    from mechmerge.models.pair import PositionRule, VocabularyRule
    from mechmerge.models.references import Model
    from mechmerge.pipeline.run import RunResult
    from mechmerge.pipeline.sweep import Sweep
    from mechmerge.pipeline.tuning import TuneSettings, Tuning
    from mechmerge.publish.plan import Mode
    from mechmerge.publish.staging import Published
    from mechmerge.recipe.schema import OutDtype, Recipe
    from mechmerge.report.inspection import Inspection

    ModelLike: TypeAlias = str | Path | Model
    """A model reference, a folder, or a resolved model."""
    BehaviorLike: TypeAlias = str | Path | Behavior
    """The name of a built-in behaviour or group, a behaviour file, or a behaviour."""

__all__ = [
    "SILENT", "CheckpointError", "EffectSettings", "EvaluateSettings", "GateRefused", "InputError", "LocalizeError",
    "LocalizeSettings", "MechmergeError", "MissingError", "Model", "PairError", "Progress", "RoundSettings", "SchemaError",
    "SolveSettings", "TuneSettings", "card", "compare", "effects", "evaluate", "export", "gate", "generate", "inspect",
    "localize", "merge", "publish", "publish_scores", "recipe", "report", "resolve", "rounds", "run", "sweep", "tune",
]  # fmt: skip

_RECORDS = {
    "EffectSettings": "mechmerge.localize.effects",
    "EvaluateSettings": "mechmerge.evaluate.record",
    "LocalizeSettings": "mechmerge.localize.settings",
    "Model": "mechmerge.models.references",
    "RoundSettings": "mechmerge.localize.rounds",
    "SolveSettings": "mechmerge.localize.solving",
    "TuneSettings": "mechmerge.pipeline.tuning",
}
"""Where the public records are defined; imported when they are used, since some of them load torch."""


def __getattr__(name: str) -> Any:
    if name in _RECORDS:
        import importlib

        return getattr(importlib.import_module(_RECORDS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ----------------------------------------------------------------------------------------------------------------- models
def resolve(model: ModelLike, *, progress: Progress = SILENT) -> Model:
    """A model on this machine: fetched, checked, its adapter merged in, its weights digested.

    Args:
        model: a folder; `owner/name[@revision]` on the Hub; `demo:smollm2-135m-instruct`; each with `+ADAPTER` for a LoRA
            adapter on top.
        progress: told about downloads.

    Raises:
        InputError, CheckpointError: not a reference, or no usable model there.
        MissingError: the Hub or the package index is needed and cannot be reached.
    """
    from mechmerge.models.references import Model
    from mechmerge.models.references import resolve as resolve_reference

    return model if isinstance(model, Model) else resolve_reference(str(model), progress=progress)


def generate(
    model: ModelLike,
    prompts: str | Sequence[str],
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    chat_template: str = "model",
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16",
    device: str = "cpu",
    progress: Progress = SILENT,
) -> list[Answer]:
    """What a model answers to prompts, each on its own.

    Args:
        model: the model.
        prompts: one or several prompts, each a user's turn.
        max_tokens: longest answer, in tokens.
        temperature: 0 is greedy; above it tokens are drawn from softmax(logits / temperature).
        seed: of the draws; a prompt's answer depends on it and on the prompt's place in the list alone.
        chat_template: `model` (the tokenizer's own), `none`, or a Jinja template.
        dtype: of the weights.
        device: a torch device.
        progress: told of every prompt.

    Returns:
        An `Answer` (text, ids, finished) for each prompt, in their order.

    Raises:
        InputError: no chat template, a prompt that is empty or too long, or an unknown device.
    """
    from mechmerge.behaviors.trial import Trial
    from mechmerge.progress import track

    asked = [prompts] if isinstance(prompts, str) else list(prompts)
    trial = Trial(resolve(model, progress=progress).path, chat_template=chat_template, dtype=dtype, device=device)
    numbered = track(enumerate(asked), "generate", len(asked), progress)
    return [trial.answer(prompt, max_tokens=max_tokens, temperature=temperature, seed=seed, number=i) for i, prompt in numbered]


# -------------------------------------------------------------------------------------------------------------- measuring
def localize(
    base: ModelLike,
    expert: ModelLike,
    behaviors: BehaviorLike | Sequence[BehaviorLike],
    out: str | Path,
    *,
    settings: LocalizeSettings | None = None,
    progress: Progress = SILENT,
) -> list[Path]:
    """Finds which components of an expert carry behaviours that the base lacks.

    Args:
        base: the base model.
        expert: the expert, of the same architecture.
        behaviors: names of built-in behaviours, behaviour files or behaviours; `formats` stands for its six members.
        out: folder of the score files.
        settings: see `LocalizeSettings`.
        progress: told of every unit.

    Returns:
        The score files, `out/BEHAVIOR.safetensors` or `out/BEHAVIOR.loss.safetensors`; `inspect` shows one.

    Raises:
        PairError: the models cannot be compared, or have equal weights.
        LocalizeError: an anchor is not valid (with `on_invalid="refuse"`), or a score is not what it must be.
    """
    from mechmerge.localize.stage import localize as measure

    given: Sequence[Any] = behaviors if isinstance(behaviors, list | tuple) else [behaviors]
    members = [member for behavior in given for member in _members(behavior)]
    return measure(resolve(base, progress=progress), resolve(expert, progress=progress), members, Path(out), settings, progress)


def effects(
    base: ModelLike,
    experts: Mapping[str, ModelLike],
    behaviors: Mapping[str, str | tuple[BehaviorLike, str]],
    out: str | Path,
    *,
    weights: Mapping[str, float] | None = None,
    protect: Mapping[str, float] | Sequence[str] = (),
    settings: EffectSettings | None = None,
    progress: Progress = SILENT,
) -> EffectFile:
    """Measures what every component of every expert does to every behaviour.

    Args:
        base: the base model.
        experts: experts by name, in the order in which a recipe sums them.
        behaviors: which expert answers for what: `{"formats": "a"}` for built-in behaviours and groups, or
            `{"mine": ("mine.yaml", "a")}` for a behaviour file (or a behaviour) under a name of one's own.
        out: the effect file.
        weights: of behaviours against each other, by name (1 unless given).
        protect: names of behaviours of the base that a merge should keep, or their weights by name.
        settings: see `EffectSettings`.
        progress: told of every unit.

    Raises:
        InputError: no behaviours, an unknown expert or behaviour, or a weight that is not a positive number.
        PairError: the models cannot be compared.
        LocalizeError: an expert has no verified answer, or an anchor is not valid.
    """
    from mechmerge.localize.effects import measure_effects

    rows = _rows(behaviors, weights, protect)
    return measure_effects(resolve(base, progress=progress), _resolved(experts, progress), rows, Path(out), settings, progress)


def rounds(
    base: ModelLike,
    experts: Mapping[str, ModelLike],
    behaviors: Mapping[str, str | tuple[BehaviorLike, str]],
    out: str | Path,
    *,
    weights: Mapping[str, float] | None = None,
    protect: Mapping[str, float] | Sequence[str] = (),
    solve: str | Path | None = None,
    settings: RoundSettings | SolveSettings | None = None,
    progress: Progress = SILENT,
) -> RoundsFile:
    """Settles which components a merge takes, in rounds of measuring where the decision is taken.

    Args:
        base, experts, behaviors, out, weights, protect, progress: those of `effects`; `out` is the rounds file.
        solve: an effect file: instead of rounds, a linear program over it is solved and measured.
        settings: see `RoundSettings`; with `solve`, `SolveSettings`.

    Raises:
        InputError: as `effects`, or settings of the other method.
        PairError, LocalizeError: as `effects`.
    """
    from mechmerge.localize.effect_file import read_effects
    from mechmerge.localize.rounds import RoundSettings, settle
    from mechmerge.localize.solving import SolveSettings, settle_solution

    wanted: type[Any] = RoundSettings if solve is None else SolveSettings
    if settings is not None and type(settings) is not wanted:
        raise InputError("settings of rounds", expected=wanted.__name__, found=type(settings).__name__)
    rows = _rows(behaviors, weights, protect)
    models, start = _resolved(experts, progress), resolve(base, progress=progress)
    if isinstance(settings, SolveSettings) or solve is not None:
        solved = settings if isinstance(settings, SolveSettings) else None
        return settle_solution(start, models, rows, read_effects(Path(str(solve))), Path(out), solved, progress)
    return settle(start, models, rows, Path(out), settings, progress)


def _resolved(models: Mapping[str, ModelLike], progress: Progress) -> dict[str, Model]:
    return {name: resolve(model, progress=progress) for name, model in models.items()}


def _members(behavior: BehaviorLike) -> tuple[Behavior, ...]:
    from mechmerge.behaviors.schema import Behavior, load_group

    return (behavior,) if isinstance(behavior, Behavior) else load_group(behavior)


def _rows(
    behaviors: Mapping[str, str | tuple[BehaviorLike, str]],
    weights: Mapping[str, float] | None,
    protect: Mapping[str, float] | Sequence[str],
) -> list[BehaviorRow]:
    from mechmerge.behaviors.schema import load_protected
    from mechmerge.localize.calibration import BASE, BehaviorRow

    numbers = dict(weights or {})
    kept = dict(protect) if isinstance(protect, Mapping) else dict.fromkeys(protect, 1.0)
    if unknown := numbers.keys() - behaviors.keys():
        raise InputError("weights", expected=f"some of {', '.join(behaviors)}", found=", ".join(sorted(unknown)))
    for name, number in (*numbers.items(), *kept.items()):
        if not 0 < number < float("inf"):
            raise InputError(f"weight of {name}", expected="a positive number", found=f"{number:g}")
    rows = []
    for name, owner in behaviors.items():
        what, expert = (name, owner) if isinstance(owner, str) else owner
        rows.append(BehaviorRow(name, _members(what), expert, numbers.get(name, 1.0)))
    return rows + [BehaviorRow(Path(name).stem, (load_protected(name),), BASE, number) for name, number in kept.items()]


# ---------------------------------------------------------------------------------------------------------------- merging
def recipe(
    files: Sequence[str | Path],
    policy: str,
    out: str | Path,
    *,
    parameters: Mapping[str, Any] | None = None,
    like: str | Path | None = None,
    within: str | Path | None = None,
    models: Mapping[str, ModelLike] | None = None,
    seed: int = 0,
    out_dtype: OutDtype = "bfloat16",
    vocabulary: VocabularyRule = "same",
    positions: PositionRule = "same",
    progress: Progress = SILENT,
) -> Recipe:
    """Compiles measured files into a recipe and writes it, its masks beside it.

    Args:
        files: score, effect and rounds files; paths, or `hf://` references.
        policy: `conflict`, `rounds`, `solve`, `top`, `weighted`, a control or a baseline (see `mechmerge recipe --help`).
        out: `recipe.yaml`.
        parameters: of the policy, such as `{"budget": 0.5}` for `top` or `{"weight.formats": 2}` for `conflict`.
        like: for the controls, the recipe whose shares they copy.
        within: for `ties` and `dare-ties`, the recipe whose coefficients they work inside.
        models: for controls whose delta norms no score file tells, the models, as for `merge`.
        seed: of what is drawn at random.
        out_dtype: dtype of the merged weights.
        vocabulary, positions: `same` refuses an expert that differs there, `base` takes the base's.
        progress: told what a user should know of how it was made.

    Raises:
        InputError: no such policy or parameter, or a file that the policy needs is missing.
        SchemaError: a file that breaks its schema.
    """
    from mechmerge.merge.engine import norms_of
    from mechmerge.models.hub_files import local_file
    from mechmerge.recipe.compile import compile_recipe
    from mechmerge.recipe.schema import read_recipe, write_recipe
    from mechmerge.recipe.sources import read_sources

    folders = {name: resolve(model, progress=progress).path for name, model in (models or {}).items()}
    shared = None if like is None else read_recipe(local_file(like, progress))
    compiled = compile_recipe(
        policy,
        read_sources([local_file(file, progress) for file in files]),
        parameters=parameters,
        seed=seed,
        like=shared,
        within=None if within is None else read_recipe(local_file(within, progress)),
        delta_norms=None if shared is None else lambda name: norms_of(shared[0], name, folders),
        out_dtype=out_dtype,
        vocabulary=vocabulary,
        positions=positions,
    )
    for note in compiled.notes:
        progress.note(note)
    return write_recipe(Path(out), compiled.recipe, compiled.masks)


def merge(
    recipe: str | Path,
    out: str | Path,
    *,
    models: Mapping[str, ModelLike] | None = None,
    expert: str | None = None,
    engine: Engine = "auto",
    verify: bool = True,
    progress: Progress = SILENT,
) -> Model:
    """Carries out a recipe; the model folder `out` appears complete (and verified), or not at all.

    Args:
        recipe: `recipe.yaml`; a path, or an `hf://` reference.
        out: the new folder; where it already holds the model of this recipe it is only verified.
        models: where models lie, by `base`, an expert's name or its reference (default: where they last were).
        expert: write only this expert of the recipe, masked, as a model of its own.
        engine: `direct`, our writer, for recipes of coefficients; `mergekit` for any recipe; `auto`: direct where possible.
        verify: whether the written model is verified before it appears.
        progress: told about tensors.

    Returns:
        The merged model.

    Raises:
        InputError: the recipe does not fit the models, or `out` holds something else.
        MissingError: a model of the recipe is not on this machine.
    """
    from mechmerge.merge.engine import merge as carry_out
    from mechmerge.models.hub_files import local_file

    folders = {name: resolve(model, progress=progress).path for name, model in (models or {}).items()}
    carry_out(local_file(recipe, progress), Path(out), folders, progress, expert, engine=engine, check=verify)
    return resolve(Path(out), progress=progress)


def export(
    recipe: str | Path,
    out: str | Path,
    *,
    rank: int | None = None,
    expert: str | None = None,
    models: Mapping[str, ModelLike] | None = None,
    progress: Progress = SILENT,
) -> Path:
    """Writes a recipe for other tools: as a LoRA adapter, or one of its experts as a masked checkpoint.

    Args:
        recipe: `recipe.yaml`; a path, or an `hf://` reference.
        out: the new folder.
        rank: the largest rank of a module of the adapter; None writes a masked expert.
        expert: this expert alone (needed for a masked expert).
        models: where models lie, as for `merge`.
        progress: told about tensors.

    Returns:
        The folder; an adapter's `export.json` holds the error of every tensor.

    Raises:
        InputError: neither a rank nor an expert, or a recipe that cannot be written so.
        MissingError: a model of the recipe is not on this machine.
    """
    from mechmerge.merge.engine import merge as carry_out
    from mechmerge.merge.export import export_lora
    from mechmerge.models.hub_files import local_file

    if rank is None and expert is None:
        raise InputError("export", expected="a rank for an adapter, or an expert to mask", found="neither")
    folders = {name: resolve(model, progress=progress).path for name, model in (models or {}).items()}
    file = local_file(recipe, progress)
    if rank is not None:
        export_lora(file, Path(out), rank, folders, progress, expert)
    else:
        carry_out(file, Path(out), folders, progress, expert)
    return Path(out)


# --------------------------------------------------------------------------------------------------------------- judging
def evaluate(
    models: Mapping[str, ModelLike],
    suites: Sequence[str | Path],
    out: str | Path,
    *,
    against: Sequence[str] = (),
    split: Literal["test", "develop"] = "test",
    tiers: Sequence[Tier] | None = None,
    limit: int | None = None,
    data: str | Path | None = None,
    overwrite: bool = False,
    settings: EvaluateSettings | None = None,
    progress: Progress = SILENT,
) -> Evaluation:
    """Generates every model's answers to the suites, judges them, and compares the models.

    Args:
        models: models by name.
        suites: built-in suites, suite files, or `lm_eval:TASK`.
        out: the evaluation file; answers are kept in `samples/` beside it.
        against: names of models that the others are compared with.
        split: prompts of built-in suites; what is chosen is chosen on `develop`.
        tiers: only prompts of these tiers.
        limit: at most this many prompts a suite.
        data: the prompts of `ifeval` or `ifbench` (default: the official ones).
        overwrite: whether samples of another model or of other settings may be replaced.
        settings: see `EvaluateSettings`.
        progress: told of every prompt.

    Raises:
        InputError: an unknown suite or name, or another process at work on `out`.
        MissingError: a verifier needs something that is not on this machine.
    """
    from mechmerge.evaluate.record import EvaluateSettings
    from mechmerge.evaluate.run import evaluate as measure
    from mechmerge.evaluate.suites import PUBLISHED, is_task, load_suite

    names = [str(suite) for suite in suites]
    if data is not None and len(set(names) & set(PUBLISHED)) != 1:
        raise InputError("data", expected=f"one suite that it belongs to, {' or '.join(PUBLISHED)}", found=", ".join(names))
    official = None if data is None else Path(data)
    loaded = [
        load_suite(name, split, limit, tiers=tiers, data=official if name in PUBLISHED else None)
        for name in names
        if not is_task(name)
    ]
    return measure(
        _resolved(models, progress),
        loaded,
        Path(out),
        settings or EvaluateSettings(),
        progress,
        against=against,
        overwrite=overwrite,
        tasks=[name for name in names if is_task(name)],
        limit=limit,
    )


def compare(
    evaluations: Mapping[str, str | Path | Evaluation], *, against: Sequence[str] = (), progress: Progress = SILENT
) -> Evaluation:
    """Models of several evaluations, paired on the same prompts.

    Args:
        evaluations: evaluation files (or evaluations) by a name that tells equal model names apart.
        against: models that the others are compared with (default: every pair).
        progress: told of suites that not every file has.

    Raises:
        InputError: no common suite, other decoding settings, or an unknown name.
    """
    from mechmerge.evaluate.compare import compare as paired

    return paired({name: _evaluation(one) for name, one in evaluations.items()}, against, progress)


def gate(
    evaluation: str | Path | Evaluation,
    rules: str | Path | Gate,
    *,
    model: str | None = None,
    weights: Mapping[str, ModelLike] | None = None,
) -> GateResult:
    """Checks an evaluation against the rules of a gate; `passed` says whether all hold, nothing is raised where one fails.

    Args:
        evaluation: an evaluation, or its file.
        rules: a gate, or its file.
        model: the model judged by rules that name none (default: the gate's).
        weights: models that are to be accepted, by name: a rule about one of them fails where the evaluation is of others.

    Raises:
        InputError: a rule without a model, or weights of a model that no rule is about.
    """
    from mechmerge.artifacts import read_document
    from mechmerge.evaluate.gate import Gate, check_asked, check_gate

    held = rules if isinstance(rules, Gate) else read_document(Gate, Path(rules))
    check_asked("weights", weights or {}, held, model)
    bound = {name: resolve(one).id for name, one in (weights or {}).items()}
    return check_gate(_evaluation(evaluation), held, model, weights=bound)


def _evaluation(given: str | Path | Evaluation) -> Evaluation:
    from mechmerge.artifacts import read_document
    from mechmerge.evaluate.record import Evaluation

    return given if isinstance(given, Evaluation) else read_document(Evaluation, Path(given))


def inspect(file: str | Path, other: str | Path | None = None, *, progress: Progress = SILENT) -> Inspection:
    """What a file, a run or a model holds, checked: its kind, its document, the shapes of its tensors, and tables to show.

    Args:
        file: a score, effect, rounds, recipe, evaluation, verdict (gate.json) or sweep file; a run directory; a model
            reference; or `hf://…`.
        other: a second model reference: whether the two can be merged, and where they differ.
        progress: told about downloads.

    Raises:
        InputError: nothing there.
        SchemaError: no file of ours, or one that breaks its schema.
    """
    from mechmerge.pipeline.inspection import inspect_any

    return inspect_any(str(file), None if other is None else str(other), progress)


# ----------------------------------------------------------------------------------------------------------------- whole
def run(pipeline: str | Path, out: str | Path, *, device: str = "cpu", progress: Progress = SILENT) -> RunResult:
    """Carries out a pipeline file into the run directory `out`, every stage resumable.

    Returns:
        The evaluation, what the gate said (`result.gate.passed`), and which stages did work in this call.

    Raises:
        InputError: the pipeline or a model is not what it must be, or another process works on `out`.
        MissingError: a model, package or the Hub is needed and not there.
    """
    from mechmerge.pipeline.run import run_pipeline

    return run_pipeline(Path(pipeline), Path(out), progress, device)


def sweep(
    pipeline: str | Path,
    vary: Mapping[str, Sequence[Any]],
    out: str | Path,
    *,
    split: Literal["test", "develop"] = "develop",
    device: str = "cpu",
    progress: Progress = SILENT,
) -> Sweep:
    """Merges and evaluates every combination of experts, policies and parameters of a pipeline, ranked by its gate.

    Args:
        pipeline: the pipeline file.
        vary: what is varied, such as `{"policy": ["conflict", "ties"], "density": [0.2, 0.5]}`.
        out: the sweep's folder.
        split: prompts of built-in suites; ranking is choosing, so the test split is for what was chosen.
        device: a torch device.
        progress: told of every step.

    Raises:
        InputError: a combination that cannot be, or another process at work on `out`.
    """
    from mechmerge.pipeline.sweep import run_sweep

    varied = {name: list(values) for name, values in vary.items()}
    found, _ = run_sweep(Path(pipeline), varied, Path(out), split=split, progress=progress, device=device)
    return found


def tune(
    pipeline: str | Path,
    out: str | Path,
    *,
    recipe: str | None = None,
    opened: Sequence[str] = (),
    suites: Sequence[str] | None = None,
    settings: TuneSettings | None = None,
    device: str = "cpu",
    progress: Progress = SILENT,
) -> Tuning:
    """Searches what a recipe of a pipeline leaves open, on prompts of the develop split.

    Args:
        pipeline: the pipeline file.
        out: the search's folder; calling it again goes on, and more trials may be allowed then.
        recipe: the recipe (default: the one that the pipeline publishes).
        opened: parameters to search although the recipe sets them, as `NAME`, `NAME=LOW:HIGH` or `NAME=A,B`.
        suites: asked in the place of the pipeline's suites.
        settings: see `TuneSettings`.
        device: a torch device.
        progress: told of every step.

    Raises:
        InputError: nothing is open, a suite is for testing, or another process works on `out`.
        MissingError: optuna (the extra `tune`), a model or data is needed and not there.
    """
    from mechmerge.pipeline.tune import tune as search

    return search(
        Path(pipeline), Path(out), settings, recipe=recipe, opened=opened, suites=suites, progress=progress, device=device
    )


def report(run: str | Path) -> Path:
    """Draws the figures of a run directory and writes its report; the HTML page is complete in itself.

    Returns:
        `RUN/report.html`; `RUN/report.md` and `RUN/figures/` lie beside it.

    Raises:
        InputError: no run there, or measurements of different bases.
    """
    from mechmerge.publish.licenses import license_of
    from mechmerge.report.files import find_run_files
    from mechmerge.report.html import write_page
    from mechmerge.report.summary import write_report

    folder = Path(run)
    files = find_run_files(folder)
    write_report(
        files.scores, files.effects, files.recipes, files.evaluation, folder,
        gate=files.gate, rounds=files.rounds, title=files.title, notes=files.notes,
    )  # fmt: skip
    return write_page(files, folder, license_of)


def card(run: str | Path, model: str | None = None, out: str | Path | None = None, *, license: str | None = None) -> Path:
    """Writes the model card of a recipe of a run.

    Args:
        run: the run directory.
        model: the recipe (default: the one that the pipeline publishes).
        out: the file (default: RUN/README.md).
        license: licence of the merge, as the Hub writes it (default: the pipeline's, else the parents' common one).

    Raises:
        InputError: no such recipe, or a licence that cannot be worked out.
    """
    from mechmerge.publish.card import write_card

    return write_card(Path(run), model, None if out is None else Path(out), license=license)


def publish(
    source: str | Path,
    repo: str,
    *,
    model: str | None = None,
    gate: str | Path | None = None,
    evaluation: str | Path | None = None,
    no_gate: bool = False,
    mode: Mode = "main",
    branch: str | None = None,
    private: bool = False,
    dry_run: bool = False,
    tag: str | None = None,
    license: str | None = None,
    progress: Progress = SILENT,
) -> Published:
    """Publishes a merge on the Hub: gated, staged, verified, one commit.

    Args:
        source: a run directory, or a model folder that `merge` wrote.
        repo: `owner/name`.
        model: the recipe (default: the one that the pipeline publishes).
        gate, evaluation: files (default: the run's).
        no_gate: publish without a gate that passed; the card says so.
        mode: `main`; `pr` (stop at the verified pull request); `branch` (onto `branch`); `direct` (without staging).
        branch: of mode `branch`.
        private: make the repository a private one, if it is not there.
        dry_run: check everything and say what would change.
        tag: a tag for the new commit.
        license: licence of the merge.
        progress: told about steps.

    Raises:
        GateRefused: the gate refuses, or its evaluation is of other weights.
        InputError, MissingError: anything else, in one line.
        MechmergeError: the Hub holds other bytes than were sent.
    """
    from mechmerge.publish.hub import publish as send

    return send(
        Path(source),
        repo,
        model=model,
        gate=None if gate is None else Path(gate),
        evaluation=None if evaluation is None else Path(evaluation),
        no_gate=no_gate,
        mode=mode,
        branch=branch,
        private=private,
        dry_run=dry_run,
        tag=tag,
        license=license,
        progress=progress,
    )


def publish_scores(
    run: str | Path,
    repo: str,
    *,
    mode: Mode = "main",
    branch: str | None = None,
    private: bool = False,
    dry_run: bool = False,
    tag: str | None = None,
    license: str | None = None,
    progress: Progress = SILENT,
) -> Published:
    """Publishes the score, effect and rounds files of a run as a data set; the arguments are those of `publish`.

    Raises:
        InputError, MissingError: as `publish`.
    """
    from mechmerge.publish.hub import publish_scores as send

    return send(
        Path(run), repo, mode=mode, branch=branch, private=private, dry_run=dry_run, tag=tag, license=license, progress=progress
    )
