"""The report of a run: figures, and one Markdown summary that says what was merged, what was measured and how far to trust it.

Scores are those of "Weight Patching" (arXiv 2604.13694). Wherever an anchor is not valid, or the gap between base and expert is
not above 0, its figures and tables say that they are not a recovery.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mechmerge.artifacts import parse_document, parse_json, read_text, write_text
from mechmerge.errors import InputError
from mechmerge.localize.effect_file import EffectFile, read_effects
from mechmerge.localize.rounds_file import read_rounds
from mechmerge.localize.scores import ScoreFile, read_scores
from mechmerge.models.components import UNIT_KINDS
from mechmerge.models.references import ModelId
from mechmerge.report import figures, tables
from mechmerge.report.recipes import predicted_rows, recipe_rows, unit_sizes
from mechmerge.report.style import caveat, short_name
from mechmerge.versions import versions

TOP = 8
"""Components of each ranking that are listed."""
LIMITS = (
    "Scores are relative to this pair of models, these prompts and this granularity; another of either gives others.",
    "Scores of single components do not add up: components back each other up and act together.",
    "A first-order estimate ranks candidates and proves nothing; only what was really patched was measured.",
    "A recovered anchor state is not yet a recovered behaviour: judge a merge by its evaluation, never by scores alone.",
    "A gain in one behaviour can damage others, those that nobody measured included.",
)
"""What the method's paper states as limits, and what follows for a reader."""


def write_report(
    scores: Sequence[Path],
    effects: Path | None,
    recipes: dict[str, Path],
    evaluation: Path | None,
    out: Path,
    *,
    gate: Path | None = None,
    rounds: Path | None = None,
    title: str = "",
    notes: str = "",
) -> Path:
    """Draws the figures of a run and writes its summary: `out/report.md` and `out/figures/*.png`.

    Args:
        scores: score files, all against one base.
        effects: the effect file, if there is one.
        recipes: recipe files by name.
        evaluation: evaluation.json, if there is one.
        out: the folder to write into (the run directory).
        gate: what the gate said, if it was asked.
        rounds: the rounds file, if there is one.
        title: heading of the report.
        notes: a remark that stands under the heading.

    Returns:
        The path of report.md.

    Raises:
        InputError: nothing to report on, or scores and effects of different bases.
        SchemaError: a file that breaks its schema.
    """
    if not (scores or effects or recipes or evaluation):
        raise InputError("report", expected="score, effect, recipe or evaluation files", found="none")
    files = _labelled([read_scores(path) for path in scores])
    matrix = read_effects(effects) if effects is not None else None
    base, experts = _models(files, matrix)
    lines = [f"# {title or 'Report'}", "", *([notes, ""] if notes else [])]
    if base is not None:
        lines += ["## Models", "", *tables.models_table(base, experts)]
    # The result first: what a merge does is decided by its evaluation.
    lines += _evaluation_section(evaluation, gate)
    lines += recipe_section(recipes, unit_sizes(matrix, files.values()))
    lines += _rounds_section(rounds)
    lines += _effect_section(matrix, out)
    lines += _score_section(files, out)
    lines += ["## Limits", "", *(f"- {limit}" for limit in LIMITS), ""]
    lines += ["---", f"Written by {', '.join(f'{name} {version}' for name, version in versions().items())}.", ""]
    write_text(out / "report.md", "\n".join(lines))
    return out / "report.md"


def _labelled(files: Sequence[ScoreFile]) -> dict[str, ScoreFile]:
    """Score files by behaviour, with the expert added where a behaviour stands twice."""
    names = [file.metadata.behavior for file in files]
    labelled: dict[str, ScoreFile] = {}
    for file in files:
        meta = file.metadata
        label = meta.behavior if names.count(meta.behavior) == 1 else f"{meta.behavior} ({short_name(meta.expert)})"
        if label in labelled:
            label = f"{meta.behavior} ({meta.expert.name} {meta.expert.digest[:8]})"
        if label in labelled:
            raise InputError("report", expected="one score file for each behaviour and expert", found=f"two of {label}")
        labelled[label] = file
    return labelled


def _models(files: dict[str, ScoreFile], matrix: EffectFile | None) -> tuple[ModelId | None, dict[str, ModelId]]:
    """The base, and the experts by name."""
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


def _evaluation_section(evaluation: Path | None, gate: Path | None) -> list[str]:
    if evaluation is None:
        return []
    from mechmerge.evaluate.gate import GateResult
    from mechmerge.evaluate.record import Evaluation
    from mechmerge.evaluate.table import markdown_table

    record = parse_document(Evaluation, parse_json(read_text(evaluation), str(evaluation)), str(evaluation))
    lines = ["## Evaluation", "", markdown_table(record).strip(), ""]
    if gate is not None:
        result = parse_document(GateResult, parse_json(read_text(gate), str(gate)), str(gate))
        lines += [
            f"Gate: **{'passed' if result.passed else 'refused'}**.",
            "",
            *(f"- {tables.cell(rule.line)}" for rule in result.rules),
            "",
        ]
    return lines


def recipe_section(recipes: dict[str, Path], sizes: Mapping[str, int]) -> list[str]:
    """Lines of the section on recipes: shares, and what the recipes predict of the loss."""
    if not recipes:
        return []
    said = (
        "*In*: share of an expert's units whose coefficient is not 0, and the same by their parameters; the default "
        "covers everything that no rule and no mask names."
    )
    lines = ["## Recipes", "", said, "", *tables.table(*recipe_rows(recipes, sizes))]
    header, rows = predicted_rows(recipes)
    if rows:
        lines += [
            "Predicted change of loss against the base (nats per answer token; negative is better). A prediction without a "
            "measurement is linear in what is dropped, which the loss is not:",
            "",
        ]
        lines += tables.table(header, rows)
    return lines


def _rounds_section(rounds: Path | None) -> list[str]:
    if rounds is None:
        return []
    said = (
        "Starting from the sum, each round turned over the components whose effect at the merge, and along the path to the "
        "change, agreed on both halves of the calibration prompts. Weighted gain: Σ weight × (base's loss − loss) / own "
        "expert's gain. Losses in nats per answer token, on calibration answers."
    )
    file = read_rounds(rounds)
    return ["## Rounds", "", said, "", *tables.table(*tables.rounds_rows(file)), *tables.table(*tables.settled_rows(file))]


def _effect_section(matrix: EffectFile | None, out: Path) -> list[str]:
    if matrix is None:
        return []
    figures.effect_map(matrix, out / "figures" / "effects.png")
    meta = matrix.metadata
    return [
        "## Effects",
        "",
        f"What each component of each expert does to each behaviour along {meta.path}: its share of the drop in loss, in nats "
        f"per answer token (positive helps), from {len(meta.nodes)} gradient points. The completeness error says how far the "
        "shares miss the whole drop.",
        "",
        *tables.table(*tables.losses_rows(matrix)),
        *tables.table(*tables.effects_rows(matrix)),
        "![Effects by behaviour, expert, kind and layer](figures/effects.png)",
        "",
    ]


def _score_section(files: dict[str, ScoreFile], out: Path) -> list[str]:
    if not files:
        return []
    lines = ["## Where the behaviours lie", "", "### Anchors", "", *tables.anchors_table(files)]
    wanted = {"attention.sufficiency", "mlp.sufficiency"}
    modules = {label: file for label, file in files.items() if wanted <= file.arrays.keys()}
    if modules:
        figures.module_map(modules, out / "figures" / "modules.png")
        lines += [
            "### Modules",
            "",
            "Share of the positive weight-patching scores in each third of the model (components after the anchor have none):",
            "",
            *tables.depth_table(modules),
            f"![{_modules_caption(modules)}](figures/modules.png)",
            "",
        ]
    stems: set[str] = set()
    for number, (label, file) in enumerate(files.items()):
        stem = f"{tables.slug(short_name(file.metadata.expert))}-{tables.slug(label)}"
        # Names that differ only in what a file name cannot hold must not share a figure.
        stem = f"{stem}-{number}" if stem in stems else stem
        stems.add(stem)
        lines += _behavior_section(label, file, out / "figures", stem)
    return lines


def _modules_caption(modules: dict[str, ScoreFile]) -> str:
    doubtful = [tables.cell(label) for label, file in modules.items() if caveat(file.metadata)]
    return "Attention and MLP by layer" + (f"; ⚠ not a recovery: {', '.join(doubtful)}" if doubtful else "")


def _behavior_section(label: str, file: ScoreFile, folder: Path, stem: str) -> list[str]:
    meta = file.metadata
    lines = [f"### {tables.cell(label)}", ""]
    warning = f"⚠ {tables.cell(caveat(meta))}"
    if caveat(meta):
        lines += [f"> **{warning}**", ""]
    patched = ", ".join(f"{count} {kind}" for kind, count in meta.verified.items() if count)
    who = f"Expert {tables.cell(meta.expert.name)}, {meta.anchor.held_out} held-out prompts"
    lines += [f"{who}; really patched: {patched or 'nothing'}.", ""]
    for kinds, what in ((UNIT_KINDS, "Heads, KV groups and neurons"), (("attention", "mlp"), "Modules")):
        ranked = tables.top_components(file, kinds, TOP)
        if ranked:
            lines += [f"{what}, the top {len(ranked)}:", "", *tables.components_table(ranked)]
    for name, kind, draw in (("heads", "head", figures.head_map), ("neurons", "neuron", figures.neuron_density)):
        if f"{kind}.screen" in file.arrays:
            draw(file, folder / f"{stem}-{name}.png")
            said = f"{tables.cell(label)}: {name} by layer{'; ' + warning if caveat(meta) else ''}"
            lines += [f"![{said}](figures/{stem}-{name}.png)", ""]
    return lines
