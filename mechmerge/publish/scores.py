"""What a data set repository of score files holds: the measurements of a run and a card that says what they are.

A score file is what people share of a localization: it is small, names base and expert by the sha256 of their weights, and any
recipe can be made from it without measuring again (https://huggingface.co/docs/hub/datasets-cards).
"""

from __future__ import annotations

import re
from pathlib import Path

from mechmerge.errors import InputError
from mechmerge.publish.card import hub_ids
from mechmerge.publish.licenses import Lookup, license_of_merge
from mechmerge.publish.model import measured_files
from mechmerge.publish.outbox import Packing
from mechmerge.publish.plan import Outbox
from mechmerge.report import tables
from mechmerge.report.files import RunFiles, find_run_files
from mechmerge.report.loading import Measurements, read_measurements
from mechmerge.report.summary import LIMITS
from mechmerge.version import __version__

TAGS = ("mechmerge", "model-merging", "mechanistic-interpretability", "weight-patching")
_OURS = re.compile(r"README\.md|effects\.safetensors|rounds\.safetensors|scores/[^/]+/[^/]+\.safetensors")


def pack_scores(run: Path, folder: Path, repo: str, *, license: str | None = None, lookup: Lookup | None = None) -> Outbox:
    """Puts the measurements of a run together as their data set repository will hold them.

    Args:
        run: the run directory.
        folder: an empty folder to put them in.
        repo: where they will stand.
        license: licence of the files (default: the pipeline's, else the measured models' common one).
        lookup: reads the models' cards.

    Raises:
        InputError: nothing was measured, a licence that cannot be worked out, or a file that may not leave the machine.
    """
    files = find_run_files(run)
    measured = measured_files(run)
    if not measured:
        raise InputError(str(run), expected="score, effect or rounds files", found="none", fix="measure something first")
    # Read as a whole: a broken file, or one of another base, goes nowhere.
    read = read_measurements(files.scores, files.effects, {}, None, rounds=files.rounds)
    packing = Packing(folder)
    for path, file in measured.items():
        packing.link(path, file)
    packing.text("README.md", _card(files, read, sorted(measured), repo, license, lookup))
    title = f"measurements of {files.title}" if files.title else "measurements"
    return Outbox("dataset", folder, packing.files([run]), (), title, lambda path: _OURS.fullmatch(path) is not None)


def _card(files: RunFiles, read: Measurements, paths: list[str], repo: str, license: str | None, lookup: Lookup | None) -> str:
    from huggingface_hub import DatasetCard, DatasetCardData

    models = [*([read.base] if read.base is not None else []), *read.experts.values()]
    data = DatasetCardData(
        license=license_of_merge(models, license or files.license, lookup),
        pretty_name=f"Measurements of {files.title}" if files.title else "Measurements of experts",
        tags=[*TAGS, *(f"base_model:{name}" for name in hub_ids(models))],
        # A table viewer has nothing to show of safetensors files.
        viewer=False,
    )
    matrix = None if read.effects is None else read.effects.metadata
    first = next((path for path in paths if path.startswith("scores/")), paths[0])
    lines = [
        f"# {tables.cell(files.title) if files.title else 'Measurements'}",
        "",
        f"What components of the experts carry which behaviour, measured with mechmerge {__version__}: files from which any "
        "merge recipe can be made without measuring again.",
        "",
        *([tables.cell(files.notes), ""] if files.notes else []),
        "## Models",
        "",
        *(tables.models_table(read.base, read.experts) if read.base is not None else []),
    ]
    if read.scores:
        lines += ["## Anchors", "", *tables.table(*tables.anchors_rows(read.scores))]
    lines += [
        "## Files",
        "",
        *(f"- `{path}`" for path in paths),
        "",
        "`scores/EXPERT/BEHAVIOR.safetensors`: tensors `<kind>.<measure>` of shape [layers, units]; `effects.safetensors`: "
        "what every component of every expert does to every behaviour"
        f"{'' if matrix is None else f' ({tables.cell(matrix.unit)})'}; `rounds.safetensors`: coefficients settled in rounds.",
        "",
        *(
            f"⚠ Effects on {tables.cell(name)}: {tables.cell(said)}.\n"
            for name, said in (matrix.caveats if matrix else {}).items()
        ),
        "## Use",
        "",
        "```sh",
        f"mechmerge inspect hf://datasets/{repo}/{first}",
        f"mechmerge recipe {_sources(paths, repo)} --policy {_policy(paths)} --out recipe.yaml",
        "```",
        "",
        "## Limits",
        "",
        *(f"- {limit}" for limit in LIMITS),
        "",
    ]
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines)))


def _policy(paths: list[str]) -> str:
    return "conflict" if "effects.safetensors" in paths else "top --budget 0.5"


def _sources(paths: list[str], repo: str) -> str:
    wanted = ["effects.safetensors"] if "effects.safetensors" in paths else [p for p in paths if p.startswith("scores/")]
    return " ".join(f"hf://datasets/{repo}/{path}" for path in wanted or paths)
