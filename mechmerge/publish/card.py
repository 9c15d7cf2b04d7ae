"""The model card of a merge, as the Hugging Face Hub reads it (https://huggingface.co/docs/hub/model-cards).

It says what was merged from where at which revision, with the recipe word for word, the evaluation with intervals, how to do it
again, and the limits. It holds portable names, revisions and digests only: no local path and no user name.

`base_model` takes identifiers of the Hub alone, since the Hub refuses a card that names anything else there; parents that are
no models of the Hub stand in the card's own table.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mechmerge.artifacts import read_text, write_text
from mechmerge.evaluate.gate import GateResult
from mechmerge.evaluate.record import Evaluation
from mechmerge.models.references import ModelId
from mechmerge.publish import card_sections as sections
from mechmerge.publish.licenses import HUB_ID, Lookup, languages_of_merge, license_of_merge, parts_of
from mechmerge.publish.results import model_index
from mechmerge.publish.source import chosen_recipe
from mechmerge.recipe.schema import Recipe, read_recipe
from mechmerge.report.files import RunFiles, find_run_files
from mechmerge.report.loading import Measurements, read_run

TAGS = ("merge", "mergekit", "mechmerge")
ORIGINS = {"demo:smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Models of the Hub that our own names stand for; where the weights are not identical, the card says so."""
FIGURES = (
    ("effects.png", "What each expert's layers do to each behaviour"),
    ("modules.png", "Weight patching of attention and MLP by layer"),
    ("curves.png", "Set curves: the best components beside random sets and the largest deltas"),
)
"""Figures of the report that a card shows."""


class CardContents(NamedTuple):
    """What a card is made from."""

    name: str
    """The recipe's name."""
    title: str
    notes: str
    recipe: Recipe
    recipe_file: Path
    license: str
    """As the Hub writes it."""
    languages: list[str]
    """ISO 639 codes; empty where nothing says any."""
    measurements: Measurements | None = None
    """The run's score and effect files."""
    evaluation: Evaluation | None = None
    gate: GateResult | None = None
    no_gate: bool = False
    """Published without a gate that passed."""
    figures: tuple[tuple[str, str], ...] = ()
    """(link, caption)."""
    repo: str | None = None
    """Where the card will stand."""
    folder: str = ""
    """Folder of recipe and measurements in that repository, with its slash."""


def write_card(run: Path, model: str | None = None, out: Path | None = None, *, license: str | None = None) -> Path:
    """Writes the model card of one recipe of a run.

    Args:
        run: the run directory.
        model: name of the recipe (default: the one that the pipeline publishes, or the only one).
        out: the file to write (default: `run/README.md`).
        license: licence of the merge (default: the pipeline's, else the parents' common one).

    Returns:
        The path of the card.

    Raises:
        InputError: no such recipe, several and none named, or a licence that cannot be worked out.
        SchemaError: a file of the run that breaks its schema.
    """
    files = find_run_files(run)
    name = chosen_recipe(files, model, run)
    path = files.recipes[name]
    recipe, _ = read_recipe(path)
    out = run / "README.md" if out is None else out
    contents = card_contents(name, recipe, path, files, license)
    if contents.measurements is not None:
        contents = contents._replace(evaluation=contents.measurements.evaluation, gate=contents.measurements.gate)
    if out.parent.resolve() == run.resolve():
        contents = contents._replace(figures=tuple((f"figures/{file}", said) for file, said in figures_of(run)))
    write_text(out, make_card(contents))
    return out


def card_contents(
    name: str,
    recipe: Recipe,
    recipe_file: Path,
    files: RunFiles | None,
    license: str | None = None,
    lookup: Lookup | None = None,
) -> CardContents:
    """What is known of a merge before its evaluation and its place are: texts, measurements, licence and languages.

    Raises:
        InputError: a licence that cannot be worked out.
    """
    parents = parents_of(recipe)
    given = license or (files.license if files is not None else None)
    return CardContents(
        name=name,
        title=files.title if files is not None else "",
        notes=files.notes if files is not None else "",
        recipe=recipe,
        recipe_file=recipe_file,
        license=license_of_merge(parents, given, lookup),
        languages=languages_of_merge(parents, lookup),
        measurements=None if files is None else read_run(files),
    )


def figures_of(run: Path) -> list[tuple[str, str]]:
    """(file name, caption) of the run's figures that a card shows."""
    return [(file, said) for file, said in FIGURES if (run / "figures" / file).is_file()]


def make_card(contents: CardContents) -> str:
    """The text of a model card, metadata first."""
    from huggingface_hub import ModelCard, ModelCardData

    hub = hub_ids(parents_of(contents.recipe))
    results = [] if contents.evaluation is None else model_index(contents.evaluation, contents.name)
    data = ModelCardData(
        language=contents.languages or None,
        license=contents.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(TAGS),
        base_model=hub or None,
        base_model_relation="merge" if hub else None,
        model_name=(contents.repo or contents.name).split("/")[-1] if results else None,
        eval_results=results or None,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(contents)}"))


def parents_of(recipe: Recipe) -> list[ModelId]:
    """Base and experts of a recipe, in order."""
    return [recipe.base, *(expert.model for expert in recipe.experts.values())]


def hub_ids(models: list[ModelId]) -> list[str]:
    """Identifiers on the Hub of models and of their adapters, each once, in order."""
    names = [ORIGINS.get(part, part) for model in models for part, _ in parts_of(model)]
    return list(dict.fromkeys(name for name in names if HUB_ID.fullmatch(name)))


def _body(contents: CardContents) -> str:
    text = read_text(contents.recipe_file)
    lines = [
        *sections.heading(contents.name, contents.title, contents.notes, contents.recipe),
        *sections.parents(contents.recipe),
        *sections.evaluation(contents.name, contents.recipe, contents.evaluation, contents.gate, contents.no_gate),
        *sections.behaviors(contents.figures, contents.measurements),
        *sections.recipe(contents.name, contents.recipe_file, text, contents.measurements),
        *sections.again(contents.recipe, contents.repo, contents.folder),
        *(sections.files(contents.folder) if contents.repo is not None else []),
        *sections.limits(contents.measurements is not None),
    ]
    return "\n".join(lines)
