"""The report of a run: figures, and one Markdown summary that says what was merged, what was measured and how far to trust it.

Scores are those of "Weight Patching" (arXiv 2604.13694). Wherever an anchor is not valid, or the gap between base and expert is
not above 0, its figures and tables say that they are not a recovery.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mechmerge.artifacts import write_text
from mechmerge.evaluate.gate import GateResult
from mechmerge.evaluate.record import Evaluation
from mechmerge.evaluate.table import markdown_table
from mechmerge.localize.effect_file import EffectFile, EffectMetadata, unit_of
from mechmerge.localize.rounds_file import RoundsFile, RoundsMetadata
from mechmerge.localize.scores import ScoreFile
from mechmerge.models.components import UNIT_KINDS
from mechmerge.report import effect_tables, figures, role_tables, tables
from mechmerge.report.curve_figure import curve_map
from mechmerge.report.loading import read_measurements
from mechmerge.report.recipes import predicted_rows, recipe_rows, unit_sizes
from mechmerge.report.style import caveat, doubts, short_name
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
RECIPES_SAID = (
    "*In*: share of an expert's units whose coefficient is not 0, and the same by their parameters; the default "
    "covers everything that no rule and no mask names."
)
PREDICTED_SAID = (
    "Predicted change against the base: of the loss (nats per answer token, as what it was predicted from weighs them; "
    "negative is better), or of the recovery of the state along the anchor (1 is the own expert's; positive is better). A "
    "prediction without a measurement is linear in what is dropped, which neither is:"
)
DEPTH_SAID = "Share of the positive weight-patching scores in each third of the model (components after the anchor have none):"
CURVES_SAID = (
    "The base with a growing share of the expert's heads, KV groups and neurons moved in: the best by score, beside random "
    "sets and the largest deltas of the same size. Lift: the area between the score curve and a control's, over shares from 0 "
    "to 1. A localization whose intervals are not both above 0 is not above its controls: it means no more than they do."
)
ROUNDS_SAID = (
    "Starting from the sum, each round turned over the components whose effect at the merge, and along the path to the "
    "change, asked for it on both halves of the calibration prompts{certainty}. Weighted gain: Σ weight × (base's loss − "
    "loss) / own expert's gain. Losses in {unit}, on calibration answers."
)


def rounds_said(metadata: RoundsMetadata) -> str:
    """What is said of rounds, with the unit of their losses."""
    sure = f" and by {metadata.certainty:g} standard errors on all of them" if metadata.certainty else ""
    return ROUNDS_SAID.format(unit=unit_of("loss", metadata.tokens), certainty=sure)


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
    read = read_measurements(scores, effects, recipes, evaluation, gate, rounds)
    files, matrix, base, experts = read.scores, read.effects, read.base, read.experts
    lines = [f"# {tables.cell(title or 'Report')}", "", *([tables.cell(notes), ""] if notes else [])]
    if base is not None:
        lines += ["## Models", "", *tables.models_table(base, experts)]
    # The result first: what a merge does is decided by its evaluation.
    lines += _evaluation_section(read.evaluation, read.gate)
    lines += recipe_section(recipes, unit_sizes(matrix, files.values()))
    lines += _rounds_section(read.rounds)
    lines += _effect_section(matrix, out)
    lines += _score_section(files, out)
    lines += ["## Limits", "", *(f"- {limit}" for limit in LIMITS), ""]
    lines += ["---", f"Written by {', '.join(f'{name} {version}' for name, version in versions().items())}.", ""]
    write_text(out / "report.md", "\n".join(lines))
    return out / "report.md"


def _evaluation_section(record: Evaluation | None, gate: GateResult | None) -> list[str]:
    if record is None:
        return []
    lines = ["## Evaluation", "", markdown_table(record).strip(), ""]
    if gate is not None:
        lines += [f"Gate: **{'passed' if gate.passed else 'refused'}**.", ""]
        lines += [*(f"- {tables.cell(rule.line)}" for rule in gate.rules), ""]
    return lines


def recipe_section(recipes: dict[str, Path], sizes: Mapping[str, int]) -> list[str]:
    """Lines of the section on recipes: shares, and what the recipes predict of the loss."""
    if not recipes:
        return []
    lines = ["## Recipes", "", RECIPES_SAID, "", *tables.table(*recipe_rows(recipes, sizes))]
    header, rows = predicted_rows(recipes)
    if rows:
        lines += [PREDICTED_SAID, "", *tables.table(header, rows)]
    return lines


def _rounds_section(file: RoundsFile | None) -> list[str]:
    if file is None:
        return []
    return [
        "## Rounds",
        "",
        rounds_said(file.metadata),
        "",
        *tables.table(*effect_tables.rounds_rows(file)),
        *tables.table(*effect_tables.settled_rows(file)),
    ]


def _effect_section(matrix: EffectFile | None, out: Path) -> list[str]:
    if matrix is None:
        return []
    figures.effect_map(matrix, out / "figures" / "effects.png")
    return [
        "## Effects",
        "",
        effects_said(matrix.metadata),
        "",
        *tables.table(*effect_tables.losses_rows(matrix)),
        *tables.table(*effect_tables.effects_rows(matrix)),
        "![Effects by behaviour, expert, kind and layer](figures/effects.png)",
        "",
    ]


def effects_said(meta: EffectMetadata) -> str:
    """What the effects of a file are, and what they may not be taken for."""
    shared = {
        "loss": f"the drop in loss, in {meta.unit}",
        "anchor": f"the recovery of the state along the anchor ({meta.unit})",
    }
    said = (
        f"What each component of each expert does to each behaviour along {tables.cell(meta.path)}: its share of "
        f"{shared[meta.metric]} (positive helps), from {len(meta.nodes)} gradient points. The completeness error says how far "
        "the shares miss the whole."
    )
    if meta.metric == "anchor":
        said += " Components after a behaviour's anchor have 0: what they do, recovery does not say."
    return " ".join([said, *(f"⚠ {tables.cell(name)}: {tables.cell(why)}." for name, why in meta.caveats.items())])


def _score_section(files: dict[str, ScoreFile], out: Path) -> list[str]:
    if not files:
        return []
    lines = ["## Where the behaviours lie", "", "### Anchors", "", *tables.table(*tables.anchors_rows(files))]
    if any(file.metadata.loss is not None for file in files.values()):
        lines += ["", "### Losses", "", *tables.table(*tables.losses_rows(files))]
    wanted = {"attention.sufficiency", "mlp.sufficiency"}
    modules = {label: file for label, file in files.items() if wanted <= file.arrays.keys()}
    if modules:
        figures.module_map(modules, out / "figures" / "modules.png")
        lines += [
            "### Modules",
            "",
            DEPTH_SAID,
            "",
            *tables.table(*tables.depth_rows(modules)),
            f"![Attention and MLP by layer{_doubtful(modules)}](figures/modules.png)",
            "",
        ]
    header, rows = tables.curves_rows(files)
    if rows:
        curve_map(files, out / "figures" / "curves.png")
        said = f"![Set curves and their controls{_doubtful(files)}](figures/curves.png)"
        lines += ["### Set curves", "", CURVES_SAID, "", *tables.table(header, rows), said, ""]
    stems: set[str] = set()
    for number, (label, file) in enumerate(files.items()):
        stem = f"{tables.slug(short_name(file.metadata.expert))}-{tables.slug(label)}"
        # Names that differ only in what a file name cannot hold must not share a figure.
        stem = f"{stem}-{number}" if stem in stems else stem
        stems.add(stem)
        lines += _behavior_section(label, file, out / "figures", stem)
    return lines


def _doubtful(files: dict[str, ScoreFile]) -> str:
    weak = [tables.cell(tables.marked(label, file)) for label, file in files.items() if doubts(file.metadata)]
    return f"; {', '.join(weak)}" if weak else ""


def _roles_section(file: ScoreFile) -> list[str]:
    """Roles, where they lie by depth, and how far the best components are known; empty where none of it was judged."""
    meta, lines = file.metadata, []
    said = role_tables.roles_said(meta)
    if said is not None:
        lines += [f"Roles: {tables.cell(said)}.", ""]
    header, rows = role_tables.role_rows(file)
    if rows:
        lines += [*tables.table(header, rows), role_tables.thresholds_said(meta), ""]
    header, rows = role_tables.depth_rows(file)
    if rows:
        lines += [role_tables.DEPTH_SAID, "", *tables.table(header, rows)]
    known = role_tables.verification_said(meta)
    return [*lines, *(f"- {kind}: {tables.cell(sentence)}" for kind, sentence in known.items()), *([""] if known else [])]


def _behavior_section(label: str, file: ScoreFile, folder: Path, stem: str) -> list[str]:
    meta = file.metadata
    lines = [f"### {tables.cell(label)}", ""]
    warning = f"⚠ {tables.cell(caveat(meta))}"
    if caveat(meta):
        lines += [f"> **{warning}**", ""]
    patched = ", ".join(f"{count} {kind}" for kind, count in meta.verified.items() if count)
    who = f"Expert {tables.cell(meta.expert.name)}, {meta.record.measured_on} held-out prompts"
    lines += [f"{who}; really patched: {patched or 'nothing'}.", ""]
    lines += _roles_section(file)
    for kinds, what in ((UNIT_KINDS, "Heads, KV groups and neurons"), (("attention", "mlp"), "Modules")):
        ranked = tables.top_components(file, kinds, TOP)
        if ranked:
            lines += [f"{what}, the top {len(ranked)}:", "", *tables.table(*tables.components_rows(ranked))]
    for name, kind, draw in (("heads", "head", figures.head_map), ("neurons", "neuron", figures.neuron_density)):
        if f"{kind}.screen" in file.arrays:
            draw(file, folder / f"{stem}-{name}.png")
            said = f"{tables.cell(label)}: {name} by layer{'; ' + warning if caveat(meta) else ''}"
            lines += [f"![{said}](figures/{stem}-{name}.png)", ""]
    return lines
