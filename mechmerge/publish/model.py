"""What a model repository holds: the model, its card, and under `mechmerge/` its recipe and measurements."""

from __future__ import annotations

from pathlib import Path

from mechmerge.publish.card import card_contents, figures_of, make_card
from mechmerge.publish.licenses import Lookup
from mechmerge.publish.outbox import EVAL_RESULTS, Packing, is_ours_in_model, model_files
from mechmerge.publish.plan import Outbox
from mechmerge.publish.results import eval_results
from mechmerge.publish.source import MergeSource
from mechmerge.recipe.schema import FOLDER, KEPT


def pack_model(
    source: MergeSource,
    folder: Path,
    repo: str,
    *,
    license: str | None = None,
    no_gate: bool = False,
    lookup: Lookup | None = None,
) -> Outbox:
    """Puts a merge together as its repository will hold it.

    Args:
        source: the merge, checked.
        folder: an empty folder to put it in (links, and what is written anew).
        repo: where it will stand.
        license: licence of the merge (default: the pipeline's, else the parents' common one).
        no_gate: it goes out without a gate that passed; the card says so.
        lookup: reads the parents' cards.

    Raises:
        InputError: a licence that cannot be worked out, or a file that may not leave the machine.
    """
    packing = Packing(folder)
    go, left_out = model_files(source.folder, source.weights)
    for name in go:
        packing.link(name, source.folder / name)
    kept = {KEPT} | ({f"{FOLDER}/{source.recipe.masks.file}"} if source.recipe.masks is not None else set())
    for name in sorted(kept):
        packing.link(name, source.folder / name)
    contents = card_contents(source.name, source.recipe, source.recipe_file, source.files, license, lookup)
    contents = contents._replace(
        evaluation=source.evaluation, gate=source.gate, no_gate=no_gate, repo=repo, folder=f"{FOLDER}/"
    )
    if source.run is not None and source.files is not None:
        for path, file in measured_files(source.run).items():
            packing.link(f"{FOLDER}/{path}", file)
        figures = figures_of(source.run)
        for name, _ in figures:
            packing.link(f"{FOLDER}/figures/{name}", source.run / "figures" / name)
        contents = contents._replace(figures=tuple((f"{FOLDER}/figures/{name}", said) for name, said in figures))
    if source.evaluation is not None:
        packing.json(f"{FOLDER}/evaluation.json", source.evaluation)
        results = eval_results(source.evaluation, source.name)
        if results is not None:
            packing.text(EVAL_RESULTS, results)
    if source.gate is not None:
        packing.json(f"{FOLDER}/gate.json", source.gate)
    packing.text("README.md", make_card(contents))
    private = [source.folder, *([source.run] if source.run is not None else [])]
    stay = tuple(name for name in left_out if name not in kept)
    return Outbox("model", folder, packing.files(private), stay, source.name, is_ours_in_model)


def measured_files(run: Path) -> dict[str, Path]:
    """Score, effect and rounds files of a run, by their path in it."""
    from mechmerge.report.files import find_run_files

    files = find_run_files(run)
    found = [*files.scores, *(file for file in (files.effects, files.rounds) if file is not None)]
    return {file.relative_to(run).as_posix(): file for file in found}
