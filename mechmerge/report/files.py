"""What a run directory holds for the report and the card, by the layout of `mechmerge run`; every part may be absent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mechmerge.artifacts import parse_yaml, read_text
from mechmerge.errors import InputError


class RunFiles(NamedTuple):
    """The files of a run."""

    scores: tuple[Path, ...]
    """Score files, sorted by expert and behaviour."""
    effects: Path | None
    rounds: Path | None
    recipes: dict[str, Path]
    """Recipes by name; a single `RUN/recipe.yaml` is called `merged`."""
    evaluation: Path | None
    gate: Path | None
    title: str
    """The pipeline's title, or empty."""
    notes: str
    """The pipeline's notes, or empty."""
    publish: str | None
    """The recipe that the pipeline publishes."""
    license: str | None
    """The licence that the pipeline names."""


def find_run_files(run: Path) -> RunFiles:
    """Finds the files of a run directory.

    Raises:
        InputError: no such folder, or none of the files in it.
    """
    if not run.is_dir():
        raise InputError(str(run), expected="a run directory", found="none", fix="make one with `mechmerge run`")
    recipes = {path.parent.name: path for path in sorted(run.glob("recipes/*/recipe.yaml"))}
    if (run / "recipe.yaml").is_file():
        recipes.setdefault("merged", run / "recipe.yaml")
    pipeline = _pipeline(run / "run.yaml")
    # The pipeline's own order says more than the alphabet.
    named = pipeline.get("recipes")
    order = {name: place for place, name in enumerate(named if isinstance(named, Mapping) else ())}
    recipes = dict(sorted(recipes.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))
    found = RunFiles(
        scores=tuple(sorted(run.glob("scores/*/*.safetensors"))),
        effects=_if_there(run / "effects.safetensors"),
        rounds=_if_there(run / "rounds.safetensors"),
        recipes=recipes,
        evaluation=_if_there(run / "evaluation.json"),
        gate=_if_there(run / "gate.json"),
        title=_text(pipeline, "title") or "",
        notes=_text(pipeline, "notes") or "",
        publish=_text(pipeline, "publish"),
        license=_text(pipeline, "license"),
    )
    if not (found.scores or found.effects or found.recipes or found.evaluation):
        raise InputError(
            str(run),
            expected="scores/, effects.safetensors, recipes/ or evaluation.json",
            found="none of them",
            fix="it has finished no stage yet; call its `mechmerge run` again" if pipeline else "name RUN itself",
        )
    return found


def _if_there(path: Path) -> Path | None:
    return path if path.is_file() else None


def _text(pipeline: Mapping[str, Any], key: str) -> str | None:
    value = pipeline.get(key)
    return value if isinstance(value, str) and value else None


def _pipeline(path: Path) -> Mapping[str, Any]:
    """The resolved pipeline inside run.yaml; its schema belongs to a layer above this one."""
    if not path.is_file():
        return {}
    record = parse_yaml(read_text(path), str(path))
    pipeline = record.get("pipeline") if isinstance(record, Mapping) else None
    return pipeline if isinstance(pipeline, Mapping) else {}
