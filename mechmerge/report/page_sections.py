"""The sections of the page as HTML: every figure of a chart stands in a table here too, for print, for screen readers and for
browsers without scripts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mechmerge.artifacts import read_text, sha256_file
from mechmerge.evaluate.table import notes
from mechmerge.localize.scores import ScoreFile
from mechmerge.models.components import UNIT_KINDS, parse_component
from mechmerge.models.references import ModelId
from mechmerge.recipe.schema import MASKS_NAME
from mechmerge.report import effect_tables, evaluation_tables, role_tables, summary, tables
from mechmerge.report.files import RunFiles
from mechmerge.report.loading import Measurements
from mechmerge.report.markup import badge, bullets, chart, code, details, escaped, paragraph, section, table, text
from mechmerge.report.recipes import KeptOf, depth_kept_rows, predicted_rows, recipe_rows, unit_sizes
from mechmerge.report.style import caveat, doubts, short_name
from mechmerge.report.tables import Rows

TITLES = {
    "models": "What was merged",
    "evaluation": "Evaluation",
    "recipes": "Recipes",
    "rounds": "Rounds",
    "effects": "Effects",
    "behaviours": "Where the behaviours lie",
    "limits": "Limits",
    "reproduce": "How to make it again",
}
"""Headings of the sections by their names in links."""
TOP = 12
"""Components of each ranking that are listed."""
LicenseOf = Callable[[ModelId], str | None]
"""The licence of a parent, None where it is not known."""


def models(run: Measurements, files: RunFiles, license_of: LicenseOf) -> str:
    """What was merged: base and experts with revision, digest and licence."""
    if run.base is None:
        return ""
    header, rows = tables.models_rows(run.base, run.experts)
    licences = [license_of(model) or "not known" for model in (run.base, *run.experts.values())]
    whole: Rows = ([*header, "licence"], [(*row, licence) for row, licence in zip(rows, licences, strict=True)])
    shards: Rows = (
        ["model", "file", "sha256"],
        [(m.name, file, digest) for m in (run.base, *run.experts.values()) for file, digest in m.shards.items()],
    )
    said = f"Licence of the merge, as the pipeline names it: {files.license}." if files.license else ""
    return section(
        "models",
        TITLES["models"],
        table("Base and experts", whole),
        paragraph(said) if said else "",
        details("Every weight file", table("Weight files by sha256", shards)),
    )


def evaluation(run: Measurements, published: str | None) -> str:
    """What the models do: metrics with intervals, every merge against each parent, groups, and the gate."""
    record = run.evaluation
    if record is None:
        return section(
            "evaluation", TITLES["evaluation"], paragraph("None was made: nothing is known of what these merges do.")
        )
    said = ["95 % intervals stand in brackets (bootstrap of topics).", *notes(record)[1:]]
    parts = [paragraph(line, "note") for line in said]
    header, rows = evaluation_tables.headline_rows(record)
    rows = [(f"**{row[0]}**, published" if row[0] == published else row[0], *row[1:]) for row in rows]
    parts += [table("Headline metrics with 95 % intervals", (header, rows)), chart("evaluation")]
    if run.gate is not None:
        parts += ["<h3>Gate</h3>", gate(run), bullets(text(rule.line) for rule in run.gate.rules)]
    compared = evaluation_tables.compared_models(record)
    if compared and record.against:
        parts += ["<h3>Against each parent</h3>", paragraph(evaluation_tables.DIFFERENCES_SAID)]
        first = published if published in compared else compared[0]
        parts += [_compared(run, model, opened=model == first) for model in sorted(compared, key=lambda name: name != first)]
    return section("evaluation", TITLES["evaluation"], *parts)


def gate(run: Measurements) -> str:
    """The gate's answer as a label; empty without one."""
    if run.gate is None:
        return ""
    return f"<p>{badge('gate passed', 'good') if run.gate.passed else badge('gate refused', 'bad')}</p>"


def _compared(run: Measurements, model: str, *, opened: bool) -> str:
    record = run.evaluation
    if record is None:
        return ""
    lost = len(evaluation_tables.regressions(record, model))
    said = f"{lost} regression{'s' if lost != 1 else ''}"
    summary_line = f"<strong>{escaped(model)}</strong> {badge(f'▼ {said}' if lost else said, 'bad' if lost else 'plain')}"
    return details(
        summary_line,
        table(f"{model} against each parent", evaluation_tables.difference_rows(record, model)),
        chart("differences", model=model) if record.pairs else "",
        table(f"{model} by group", evaluation_tables.group_rows(record, model)),
        opened=opened,
    )


def recipes(run: Measurements, kept: Mapping[str, KeptOf]) -> str:
    """What each recipe takes of each expert, by kind and depth, and what it predicts."""
    if not run.recipes:
        return ""
    sizes = unit_sizes(run.effects, run.scores.values())
    predicted = predicted_rows(run.recipes)
    return section(
        "recipes",
        TITLES["recipes"],
        paragraph(summary.RECIPES_SAID),
        table("What each recipe takes of each expert", recipe_rows(run.recipes, sizes)),
        chart("recipes"),
        table("Share of units taken, by kind and third of the model", depth_kept_rows(kept)),
        *([paragraph(summary.PREDICTED_SAID), table("Predicted change", predicted)] if predicted[1] else []),
    )


def rounds(run: Measurements) -> str:
    """The rounds in which coefficients were settled."""
    if run.rounds is None:
        return ""
    said = paragraph(summary.rounds_said(run.rounds.metadata))
    settled = table("Losses of each behaviour", effect_tables.settled_rows(run.rounds))
    return section("rounds", TITLES["rounds"], said, table("Rounds", effect_tables.rounds_rows(run.rounds)), settled)


def effects(run: Measurements) -> str:
    """What every expert does to every behaviour, by kind and depth."""
    if run.effects is None:
        return ""
    return section(
        "effects",
        TITLES["effects"],
        paragraph(summary.effects_said(run.effects.metadata)),
        table("Behaviours", effect_tables.losses_rows(run.effects)),
        table("Summed effects", effect_tables.effects_rows(run.effects)),
        chart("effects"),
        details(
            "By depth and kind", table("Summed effects by third of the model", effect_tables.effect_depth_rows(run.effects))
        ),
    )


def behaviors(run: Measurements, kept: Mapping[str, KeptOf]) -> str:
    """Where the behaviours lie: anchors, modules, set curves, and each behaviour on its own."""
    files = run.scores
    if not files:
        return ""
    wanted = {"attention.sufficiency", "mlp.sufficiency"}
    modules = {label: file for label, file in files.items() if wanted <= file.arrays.keys()}
    curves = tables.curves_rows(files)
    parts = [table("Anchors and their validity", tables.anchors_rows(files))]
    if any(file.metadata.loss is not None for file in files.values()):
        parts.append(table("Losses that scores are measured on", tables.losses_rows(files)))
    if modules:
        parts += ["<h3>Attention and MLP</h3>", chart("modules"), paragraph(summary.DEPTH_SAID)]
        parts += [table("Positive scores by third of the model", tables.depth_rows(modules))]
    if curves[1]:
        parts += ["<h3>Set curves and lift</h3>", paragraph(summary.CURVES_SAID), table("Lift over the controls", curves)]
    parts += ["<h3>Each behaviour</h3>"]
    parts += [_behavior(number, label, file, kept, opened=number == 0) for number, (label, file) in enumerate(files.items())]
    return section("behaviours", TITLES["behaviours"], *parts)


def _behavior(number: int, label: str, file: ScoreFile, kept: Mapping[str, KeptOf], *, opened: bool) -> str:
    meta = file.metadata
    labels = [badge(f"⚠ {doubt}", "bad") for doubt in doubts(meta)]
    if meta.curves is not None and meta.curves.doubt is None:
        labels.append(badge("above its controls", "good"))
    head = f"<strong>{escaped(label)}</strong> <span>expert {escaped(short_name(meta.expert))}</span> {' '.join(labels)}"
    patched = ", ".join(f"{count} {kind}" for kind, count in meta.verified.items() if count)
    parts = [paragraph(f"⚠ {caveat(meta)}", "warning")] if caveat(meta) else []
    parts += [
        paragraph(
            f"Expert {meta.expert.name}, scores on {meta.where}, {meta.record.measured_on} held-out prompts; "
            f"really patched: {patched or 'nothing'}."
        )
    ]
    if meta.curves is not None:
        weak = f": {meta.curves.doubt}" if meta.curves.doubt else ""
        parts += [f"<h4>Set curves{weak}</h4>", paragraph(meta.curves.verdict, "note"), chart("curves", score=number)]
    parts += _roles(label, file)
    for kinds, what in ((UNIT_KINDS, "heads, KV groups and neurons"), (("attention", "mlp"), "modules")):
        ranked = tables.top_components(file, kinds, TOP)
        if ranked:
            rows = tables.components_rows(ranked)
            parts.append(table(f"{label}: the top {len(ranked)} {what}", _with_coefficients(rows, file, kept)))
    for kind, what in (("attention", "Attention"), ("mlp", "MLP"), ("head", "Heads"), ("kv", "KV groups")):
        if f"{kind}.screen" in file.arrays or f"{kind}.sufficiency" in file.arrays:
            parts += [f'<h4 class="scripted">{what} by layer</h4>', chart("units", score=number, kind=kind)]
    if "neuron.screen" in file.arrays:
        parts += ['<h4 class="scripted">Neurons by layer</h4>', chart("neurons", score=number)]
    return details(head, *parts, opened=opened, identity=f"behaviour-{number}")


def _roles(label: str, file: ScoreFile) -> list[str]:
    """Roles, where they lie by depth, and how far the best components are known; empty where none of it was judged."""
    meta = file.metadata
    said, known = role_tables.roles_said(meta), role_tables.verification_said(meta)
    if said is None and not known:
        return []
    counts, depths = role_tables.role_rows(file), role_tables.depth_rows(file)
    layers = role_tables.depth_rows(file, by_layer=True)
    parts = ["<h4>Roles</h4>", paragraph(f"{said[0].upper()}{said[1:]}.", "note")] if said is not None else []
    if counts[1]:
        parts += [table(f"{label}: components by role", counts), paragraph(role_tables.thresholds_said(meta), "note")]
    if depths[1]:
        parts += [paragraph(role_tables.DEPTH_SAID), table(f"{label}: positive scores by depth", depths)]
        parts.append(details("Layer by layer", table(f"{label}: positive scores by layer", layers)))
    if known:
        parts += ["<h4>How far the best are known</h4>", bullets(text(f"{kind}: {line}") for kind, line in known.items())]
    return parts


def _with_coefficients(rows: Rows, file: ScoreFile, kept: Mapping[str, KeptOf]) -> Rows:
    """The rows of a ranking of units with the coefficient that each recipe gives them."""
    header, body = rows
    found: list[tuple[object, ...]] = []
    names = [name for name, recipe in kept.items() if recipe.kinds]
    for row in body:
        component = parse_component(str(row[0]))
        if component.kind not in UNIT_KINDS:
            return rows
        shape = next(
            array.shape
            for name, array in file.arrays.items()
            if name in (f"{component.kind}.screen", f"{component.kind}.sufficiency")
        )
        arrays = [kept[name].units(file.metadata.expert, component.kind, shape) for name in names]
        found.append((*row, *("–" if a is None else f"{a[component.layer, component.unit]:g}" for a in arrays)))
    return [*header, *(f"{name} takes" for name in names)], found


def limits(run: Measurements) -> str:
    """What follows from the method, and what is weak in this run."""
    weak = [
        f"<strong>{escaped(tables.marked(label, file))}</strong>: {text(caveat(file.metadata))}"
        for label, file in run.scores.items()
        if doubts(file.metadata)
    ]
    unmeasured = [label for label, file in run.scores.items() if file.metadata.curves is None]
    said = [text(limit) for limit in summary.LIMITS]
    if unmeasured:
        said.append(text(f"Without set curves, no control says what a ranking is worth: {', '.join(unmeasured)}."))
    return section("limits", TITLES["limits"], bullets([*said, *weak]))


def reproduction(run: Measurements, published: str | None, versions: Mapping[str, str]) -> str:
    """How to make the merges again: the recipes by digest, one command, and the published recipe word for word."""
    if not run.recipes:
        return ""
    rows: list[tuple[object, ...]] = []
    for name, path in run.recipes.items():
        masks = path.with_name(MASKS_NAME)
        rows.append((name, sha256_file(path), sha256_file(masks) if masks.is_file() else "none"))
    shown = published if published in run.recipes else next(iter(run.recipes))
    return section(
        "reproduce",
        TITLES["reproduce"],
        paragraph(
            "A recipe names its parents by sha256; its masks lie beside it. The same bytes come out on the same machine with "
            f"the same versions ({', '.join(f'{name} {version}' for name, version in versions.items())}) and number of threads."
        ),
        code("Command", "mechmerge merge RUN/recipes/NAME/recipe.yaml OUT"),
        table("Recipes by sha256", (["recipe", "recipe.yaml", "masks"], rows)),
        details(f"The recipe {escaped(shown)}, word for word", code("Recipe", read_text(run.recipes[shown]).rstrip("\n"))),
    )
