"""The files of a run, read and checked against each other: what the Markdown summary and the HTML page are both made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from mechmerge.artifacts import Document, parse_document, parse_json, read_text
from mechmerge.errors import InputError
from mechmerge.evaluate.gate import GateResult
from mechmerge.evaluate.record import Evaluation
from mechmerge.localize.effect_file import EffectFile, read_effects
from mechmerge.localize.rounds_file import RoundsFile, read_rounds
from mechmerge.localize.scores import ScoreFile, read_scores
from mechmerge.models.references import ModelId
from mechmerge.report.files import RunFiles
from mechmerge.report.style import short_name

D = TypeVar("D", bound=Document)


class Measurements(NamedTuple):
    """What a run measured and decided; every part may be absent."""

    scores: dict[str, ScoreFile]
    """By label: the behaviour, with its expert where a behaviour stands twice."""
    effects: EffectFile | None
    rounds: RoundsFile | None
    base: ModelId | None
    experts: dict[str, ModelId]
    """Experts by name, as the effect file calls them or, where only scores name them, by the model's short name."""
    recipes: dict[str, Path]
    evaluation: Evaluation | None
    gate: GateResult | None


def read_measurements(
    scores: Sequence[Path],
    effects: Path | None,
    recipes: Mapping[str, Path],
    evaluation: Path | None,
    gate: Path | None = None,
    rounds: Path | None = None,
) -> Measurements:
    """Reads the files of a run.

    Raises:
        InputError: nothing to read, two score files of one behaviour and expert, or measurements of different bases.
        SchemaError: a file that breaks its schema.
    """
    if not (scores or effects or recipes or evaluation):
        raise InputError("report", expected="score, effect, recipe or evaluation files", found="none")
    files = labelled([read_scores(path) for path in scores])
    matrix = read_effects(effects) if effects is not None else None
    base, experts = models_of(files, matrix)
    return Measurements(
        scores=files,
        effects=matrix,
        rounds=read_rounds(rounds) if rounds is not None else None,
        base=base,
        experts=experts,
        recipes=dict(recipes),
        evaluation=_json(Evaluation, evaluation),
        gate=_json(GateResult, gate),
    )


def read_run(files: RunFiles) -> Measurements:
    """`read_measurements` of what `find_run_files` found."""
    return read_measurements(files.scores, files.effects, files.recipes, files.evaluation, files.gate, files.rounds)


def _json(kind: type[D], path: Path | None) -> D | None:
    return None if path is None else parse_document(kind, parse_json(read_text(path), str(path)), str(path))


def labelled(files: Sequence[ScoreFile]) -> dict[str, ScoreFile]:
    """Score files by behaviour, with the expert added where a behaviour stands twice.

    Raises:
        InputError: two files of one behaviour and expert.
    """
    names = [file.metadata.label for file in files]
    found: dict[str, ScoreFile] = {}
    for file in files:
        meta = file.metadata
        label = meta.label if names.count(meta.label) == 1 else f"{meta.label} ({short_name(meta.expert)})"
        if label in found:
            label = f"{meta.label} ({meta.expert.name} {meta.expert.digest[:8]})"
        if label in found:
            raise InputError("report", expected="one score file for each behaviour and expert", found=f"two of {label}")
        found[label] = file
    return found


def models_of(files: Mapping[str, ScoreFile], matrix: EffectFile | None) -> tuple[ModelId | None, dict[str, ModelId]]:
    """The base, and the experts by name.

    Raises:
        InputError: measurements of different bases.
    """
    documents = [file.metadata.base for file in files.values()] + ([matrix.metadata.base] if matrix else [])
    for other in documents:
        if other.digest != documents[0].digest:
            raise InputError(
                "report",
                expected=f"measurements of one base ({documents[0].name} {documents[0].digest[:12]})",
                found=f"another base ({other.name} {other.digest[:12]})",
                fix="report on each base apart",
            )
    experts = dict(matrix.metadata.experts) if matrix else {}
    for file in files.values():
        expert = file.metadata.expert
        if expert.digest not in {model.digest for model in experts.values()}:
            experts[short_name(expert) if short_name(expert) not in experts else expert.name] = expert
    return (documents[0] if documents else None), experts
