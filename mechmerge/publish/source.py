"""What is published, and whether it may be: one merge of a run, or a model folder, judged by a gate on these very weights.

An evaluation counts only for the weights that it was made on: the sha256 of every shard is computed anew and compared. What was
evaluated before the model was merged again says nothing about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mechmerge.artifacts import parse_document, parse_yaml, read_document, read_text
from mechmerge.errors import CheckpointError, GateRefused, InputError, MechmergeError
from mechmerge.evaluate.gate import Gate, GateResult, check_gate
from mechmerge.evaluate.record import Evaluation
from mechmerge.progress import SILENT, Progress
from mechmerge.recipe.schema import KEPT, Recipe, read_recipe
from mechmerge.report.files import RunFiles, find_run_files


@dataclass(frozen=True)
class MergeSource:
    """One merge, checked."""

    name: str
    """Its recipe's name in the run, its name in the evaluation, or its policy's."""
    folder: Path
    """The model folder."""
    recipe: Recipe
    recipe_file: Path
    """The recipe that the model was made by, in the model's own folder."""
    weights: dict[str, str]
    """sha256 of every shard, computed now."""
    run: Path | None
    """The run directory, where it comes from one."""
    files: RunFiles | None
    """The run's files."""
    evaluation: Evaluation | None
    """None where nobody evaluated these very weights."""
    gate: GateResult | None
    """What the gate said; None where none was asked."""


def find_source(
    source: Path,
    model: str | None = None,
    *,
    gate: Path | None = None,
    evaluation: Path | None = None,
    no_gate: bool = False,
    progress: Progress = SILENT,
) -> MergeSource:
    """Finds the merge to publish, asks the gate, and checks the model.

    Args:
        source: a run directory, or a model folder that `mechmerge merge` wrote.
        model: name of the recipe in a run, or of the model in the evaluation.
        gate: a gate file (default: the gate of the run's pipeline).
        evaluation: evaluation.json (default: the run's).
        no_gate: go on without a gate that passed.
        progress: told about steps.

    Raises:
        GateRefused: the gate refuses, is about other models, or its evaluation is of other weights.
        CheckpointError: the model is not complete, not finite, or does not load.
        InputError: nothing to publish, or no gate to ask.
    """
    if no_gate and gate is not None:
        raise InputError("--no-gate", expected="either a gate or none", found="--gate as well")
    folder, files = _locate(source, model)
    run = None if files is None else source
    if files is not None:
        evaluation = evaluation or files.evaluation
    recipe_file = folder / KEPT
    recipe, _ = read_recipe(recipe_file)
    weights = _digests(folder)
    record = None if evaluation is None else read_document(Evaluation, evaluation)
    if files is not None:
        name = chosen_recipe(files, model, source)
    else:
        # The folder's own name is nobody's business.
        name = model or (_name_in(record, weights) if record is not None else None) or recipe.policy.name
    rules = _rules(gate, run)
    evaluated = record is not None and is_evaluated(record, name, weights)
    verdict = check_gate(record, rules, name) if record is not None and rules is not None and evaluated else None
    if not no_gate:
        _require_pass(name, rules, record, evaluated, verdict)
    check_model(folder, progress)
    return MergeSource(
        name=name,
        folder=folder,
        recipe=recipe,
        recipe_file=recipe_file,
        weights=weights,
        run=run,
        files=files,
        evaluation=record if evaluated else None,
        gate=verdict,
    )


def _locate(source: Path, model: str | None) -> tuple[Path, RunFiles | None]:
    """The model folder that is meant, and the files of the run that it lies in."""
    if not source.is_dir():
        raise InputError(str(source), expected="a run directory or a model folder", found="nothing there")
    folder, files = source, None
    if not (source / "config.json").is_file():
        files = find_run_files(source)
        merged = source / "merged"
        # A single `RUN/recipe.yaml` is merged into `RUN/merged` itself.
        folder = merged if (merged / "config.json").is_file() else merged / chosen_recipe(files, model, source)
    if not (folder / KEPT).is_file():
        raise InputError(
            str(folder),
            expected=f"a model with its {KEPT}, as `mechmerge merge` writes it",
            found="none",
            fix="merge it first",
        )
    return folder, files


def chosen_recipe(files: RunFiles, model: str | None, run: Path) -> str:
    """The recipe of a run that is meant: the one named, the one that the pipeline publishes, or the only one.

    Raises:
        InputError: no such recipe, or several and none named.
    """
    known = ", ".join(files.recipes) or "none"
    if model is None:
        model = files.publish
    if model is None and len(files.recipes) == 1:
        model = next(iter(files.recipes))
    if model is None:
        raise InputError(str(run), expected="one recipe", found=known, fix="pass --model NAME")
    if model not in files.recipes:
        raise InputError(f"--model {model}", expected=f"a recipe of the run ({known})", found="no such recipe")
    return model


def is_evaluated(evaluation: Evaluation, name: str, weights: Mapping[str, str]) -> bool:
    """Whether the evaluation's model of this name has these very weights (sha256 by shard)."""
    result = evaluation.models.get(name)
    return result is not None and getattr(result.id, "shards", None) == dict(weights)


def check_model(folder: Path, progress: Progress = SILENT) -> None:
    """Checks that a model folder is complete, finite, and loads.

    Raises:
        CheckpointError: it is not.
    """
    from mechmerge.merge.verify import check_loads
    from mechmerge.models.checkpoint import Checkpoint

    progress.note(f"checking {folder.name}: complete, finite, loads")
    checkpoint = Checkpoint(folder)
    checkpoint.check_complete()
    checkpoint.check_finite()
    try:
        check_loads(checkpoint)
    except MechmergeError as error:
        raise CheckpointError(str(folder), expected="a model that loads", found=str(error)) from None
    except Exception as error:
        # transformers raises whatever its configuration classes raise.
        found = f"{type(error).__name__}: {error}"[:200]
        raise CheckpointError(str(folder), expected="a model that transformers can build", found=found) from None


def _digests(folder: Path) -> dict[str, str]:
    from mechmerge.models.checkpoint import Checkpoint

    return Checkpoint(folder).digests()


def _name_in(evaluation: Evaluation, weights: Mapping[str, str]) -> str | None:
    return next((name for name in evaluation.models if is_evaluated(evaluation, name, weights)), None)


def _rules(gate: Path | None, run: Path | None) -> Gate | None:
    if gate is not None:
        return read_document(Gate, gate)
    return None if run is None else gate_of_run(run)


def gate_of_run(run: Path) -> Gate | None:
    """The gate of a run's pipeline; None where the run names none."""
    path = run / "run.yaml"
    if not path.is_file():
        return None
    # The record's schema belongs to a layer above this one.
    record: Any = parse_yaml(read_text(path), str(path))
    for key in ("pipeline", "gate"):
        record = record.get(key) if isinstance(record, Mapping) else None
    return None if record is None else parse_document(Gate, record, f"{path}: pipeline.gate")


def _require_pass(
    name: str, rules: Gate | None, record: Evaluation | None, evaluated: bool, verdict: GateResult | None
) -> None:
    waive = "or publish without one, saying so, with --no-gate"
    if rules is None:
        raise InputError(f"gate of {name}", expected="a gate", found="none", fix=f"pass --gate FILE, {waive}")
    if record is None:
        raise InputError(
            f"gate of {name}", expected="an evaluation to judge", found="none", fix=f"pass --evaluation FILE, {waive}"
        )
    if not evaluated or verdict is None:
        found = "other weights under this name" if name in record.models else f"only {', '.join(record.models)}"
        raise GateRefused(
            f"gate of {name}", expected="an evaluation of these very weights", found=found, fix="evaluate this model first"
        )
    if not any(rule.model == name for rule in verdict.rules):
        raise GateRefused(f"gate of {name}", expected=f"a rule about {name}", found="none", fix="name it in the gate's rules")
    if not verdict.passed:
        raise GateRefused(
            f"gate of {name}",
            expected="every rule to pass",
            found="; ".join(rule.line for rule in verdict.failed),
            fix="nothing was published",
        )
