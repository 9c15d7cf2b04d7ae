"""From a pipeline file to resolved models and behaviours: everything that can be wrong is found before anything is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from mechmerge.artifacts import Document, read_document
from mechmerge.behaviors.schema import Behavior, load_group, load_protected
from mechmerge.errors import InputError
from mechmerge.evaluate.suites import BUILTIN, is_task, load_suite
from mechmerge.models.pair import align, check_pair
from mechmerge.models.references import Model, check_reference, is_local, is_unpinned_hub, resolve
from mechmerge.models.sides import chat_template, note_differences
from mechmerge.pipeline.schema import Pipeline
from mechmerge.progress import Progress
from mechmerge.publish.licenses import license_of_merge

D = TypeVar("D", bound=Document)


class Resolved(NamedTuple):
    """A pipeline whose models lie on this machine."""

    pipeline: Pipeline
    folder: Path
    """The folder of the pipeline file; relative names are read from it."""
    base: Model
    experts: dict[str, Model]
    behaviors: dict[str, tuple[Behavior, ...]]
    """By name of the pipeline; a group has several."""
    protected: dict[str, Behavior]
    """The base's own abilities, by name."""


def resolve_pipeline(path: Path, progress: Progress) -> Resolved:
    """Reads a pipeline file, fetches its models, and checks what would stop the run in a late stage.

    Whether weights are finite is left to the stages, which read them anyway.

    Raises:
        InputError, SchemaError: the pipeline or a model is not what it must be.
        MissingError: a model, package or the Hub is needed and not there.
    """
    pipeline, folder = load_pipeline(path), path.parent
    base = resolve(_pinned(pipeline.base, pipeline.revision, folder), relative_to=folder, progress=progress)
    experts = {
        name: resolve(_pinned(reference, pipeline.revision, folder), relative_to=folder, progress=progress)
        for name, reference in pipeline.experts.items()
    }
    license_of_merge([base.id, *(model.id for model in experts.values())], pipeline.license)
    for expert in experts.values():
        aligned = align(base, expert, pipeline.vocabulary)
        check_pair(base.checkpoint(), aligned.checkpoint(), positions=pipeline.positions, finite=False)
    behaviors = behaviors_of(pipeline, folder)
    _require_templates(pipeline, folder, base, experts, [member for group in behaviors.values() for member in group])
    note_differences(base.path, {name: expert.path for name, expert in experts.items()}, progress)
    return Resolved(pipeline, folder, base, experts, behaviors, protected_of(pipeline, folder))


def _require_templates(
    pipeline: Pipeline, folder: Path, base: Model, experts: Mapping[str, Model], behaviors: Sequence[Behavior]
) -> None:
    """A chat template is there wherever one is asked for: the base's in behaviours and suites, an expert's own in suites.

    Raises:
        InputError: naming the model that has none.
    """
    names = [near(name, folder) for name in pipeline.evaluate.suites if not is_task(name)]
    # Those of the package ask for the model's own; a file says itself.
    suites = [True if name in BUILTIN else load_suite(name).chat_template == "model" for name in names]
    asked = pipeline.chat_template is None and any(suites)
    if pipeline.chat_template is None and (asked or any(behavior.chat_template == "model" for behavior in behaviors)):
        _require_template("base", base)
    for name, expert in experts.items() if asked else ():
        _require_template(f"expert {name}", expert)


def _require_template(what: str, model: Model) -> None:
    if chat_template(model.path) is None:
        raise InputError(
            f"{what} ({model.id.name})",
            expected="a chat template, in which the pipeline asks it",
            found="none",
            fix="set `chat_template` in the pipeline: `none` for prompts as they are, or a Jinja template for all models",
        )


def load_pipeline(path: Path) -> Pipeline:
    """Reads a pipeline file and checks everything that can be checked without a model: schema, behaviours, suites.

    Raises:
        SchemaError, InputError: naming file, place, expected and found.
    """
    pipeline = read_document(Pipeline, path)
    behaviors_of(pipeline, path.parent)
    protected_of(pipeline, path.parent)
    for suite in pipeline.evaluate.suites:
        if suite not in BUILTIN and not is_task(suite):  # those may need data from elsewhere
            load_suite(near(suite, path.parent))
    return pipeline


def check_pipeline(path: Path) -> Pipeline:
    """Checks a pipeline file without fetching or reading any model: the schema, behaviours, suites and the form of references.

    Raises:
        SchemaError, InputError: naming file, place, expected and found.
    """
    pipeline = load_pipeline(path)
    for reference in (pipeline.base, *pipeline.experts.values()):
        check_reference(_pinned(reference, pipeline.revision, path.parent), relative_to=path.parent)
    return pipeline


def near(name: str, folder: Path) -> str:
    """A file named relative to the pipeline's folder, or the name of something built in."""
    return str(folder / name) if (folder / name).is_file() else name


def behaviors_of(pipeline: Pipeline, folder: Path) -> dict[str, tuple[Behavior, ...]]:
    """The behaviours of a pipeline by its names, in its chat template."""
    groups = {name: load_group(near(plan.file or name, folder)) for name, plan in pipeline.behaviors.items()}
    return {name: tuple(templated(member, pipeline) for member in members) for name, members in groups.items()}


def protected_of(pipeline: Pipeline, folder: Path) -> dict[str, Behavior]:
    """The base's own abilities of a pipeline by its names, in its chat template."""
    found = {name: load_protected(near(plan.file or name, folder)) for name, plan in pipeline.protect.items()}
    return {name: templated(behavior, pipeline) for name, behavior in found.items()}


def templated(document: D, pipeline: Pipeline) -> D:
    """A behaviour or suite with the pipeline's chat template in the place of `model`."""
    if pipeline.chat_template is None or getattr(document, "chat_template", None) != "model":
        return document
    return document.model_copy(update={"chat_template": pipeline.chat_template})


def _pinned(reference: str, revision: str | None, folder: Path) -> str:
    """A Hub reference with the pipeline's revision added where it names none."""
    if revision is None:
        return reference
    parts = (f"{part}@{revision}" if is_unpinned_hub(part, folder) else part for part in reference.split("+"))
    return reference if is_local(reference, folder) else "+".join(parts)
