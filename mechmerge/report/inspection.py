"""What a file of ours holds, in tables: score, effect and evaluation files and recipes, told apart by their content."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mechmerge.artifacts import METADATA_KEY, parse_document, parse_json, parse_yaml, read_text
from mechmerge.errors import InputError, SchemaError
from mechmerge.localize.effect_file import read_effects
from mechmerge.localize.rounds_file import SolveRecord, read_rounds
from mechmerge.localize.scores import LossRecord, ScoreMetadata, read_scores
from mechmerge.models.components import UNIT_KINDS
from mechmerge.recipe.schema import read_recipe
from mechmerge.report import effect_tables, role_tables, tables
from mechmerge.report.recipes import predicted_rows, recipe_rows
from mechmerge.report.style import caveat

TOP = 12
"""Components that are listed."""
KINDS = "a score, effect or rounds file, a recipe or an evaluation of mechmerge"

Rows = list[dict[str, Any]]


class Inspection(NamedTuple):
    """A file of ours, read and checked."""

    kind: str
    """scores, effects, recipe or evaluation."""
    document: dict[str, Any]
    """Its JSON document, whole."""
    tensors: dict[str, list[int]]
    """Shapes of its tensors; empty for text files."""
    tables: dict[str, Rows]
    """What a reader wants to see first: rows by title."""


def inspect_file(path: Path) -> Inspection:
    """Reads and checks a file and says what it holds.

    Raises:
        InputError: no such file.
        SchemaError: no file of ours, or one that breaks its schema.
    """
    if not path.is_file():
        raise InputError(str(path), expected=KINDS, found="a folder" if path.is_dir() else "nothing there")
    if _is_safetensors(path):
        kind = _kind_of_tensors(path)
        if kind == "scores":
            return _scores(path)
        if kind == "effects":
            return _effects(path)
        if kind == "rounds":
            return _rounds(path)
        raise SchemaError(str(path), expected=KINDS, found=f"a safetensors file of kind {kind}")
    text = read_text(path)
    is_json = text.lstrip().startswith("{")
    value = parse_json(text, str(path)) if is_json else parse_yaml(text, str(path))
    keys = value.keys() if isinstance(value, Mapping) else set()
    if {"suites", "models", "pairs"} <= keys:
        return _evaluation(path, value)
    if {"base", "experts"} <= keys:
        return _recipe(path)
    raise SchemaError(str(path), expected=KINDS, found=f"keys {', '.join(map(str, list(keys)[:6])) or 'none'}")


def _is_safetensors(path: Path) -> bool:
    # Eight bytes of header length, then the header's JSON.
    with path.open("rb") as handle:
        return handle.read(9)[8:] == b"{"


def _kind_of_tensors(path: Path) -> str:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as handle:
            text = (handle.metadata() or {}).get(METADATA_KEY)
    except (SafetensorError, OSError) as error:
        raise SchemaError(str(path), expected="a safetensors file", found=str(error)) from None
    if text is None:
        raise SchemaError(str(path), expected=KINDS, found="a safetensors file that mechmerge did not write")
    document = parse_json(text, str(path))
    return str(document.get("kind")) if isinstance(document, Mapping) else "unknown"


def fact_rows(**given: Any) -> Rows:
    """Rows of what is known: a name each, without those that are None or empty."""
    return [{"field": name.replace("_", " "), "value": value} for name, value in given.items() if value not in (None, "")]


def _shapes(arrays: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name: list(array.shape) for name, array in sorted(arrays.items())}


def _readout(meta: ScoreMetadata) -> dict[str, Any]:
    """The figures of an anchor, or of a loss."""
    record = meta.record
    gap = f"{record.gap:.3f} (95 % low {record.gap_low:.3f})"
    if isinstance(record, LossRecord):
        losses = f"{record.base:.3f}, {record.expert:.3f} nats per token"
        return {"loss_of_base_and_expert": losses, "gap": gap, "prompts": f"{record.answers} of {record.prompts} answers pass"}
    steered = None
    if record.steering_base is not None and record.steering_steered is not None:
        steered = f"{record.steering_base:.2f} → {record.steering_steered:.2f}"
    prompts = f"{record.prompts} for the anchor, {record.held_out} held out"
    return {
        "separation": f"{record.separation:.3f}",
        "gap": gap,
        "stability": record.stability_text,
        "pass_rate_when_steered": steered,
        "prompts": prompts,
    }


def _scores(path: Path) -> Inspection:
    file = read_scores(path)
    meta = file.metadata
    facts = fact_rows(
        behaviour=meta.behavior,
        base=f"{meta.base.name} ({meta.base.digest[:12]})",
        expert=f"{meta.expert.name} ({meta.expert.digest[:12]})",
        scores_on=meta.where,
        valid="yes" if meta.valid else "NO",
        caveat=caveat(meta),
        set_curves=meta.curves.verdict if meta.curves is not None else None,
        **_readout(meta),
        roles=role_tables.roles_said(meta),
        **{f"best_{kind}": said for kind, said in role_tables.verification_said(meta).items()},
        state_of_base_and_expert=f"{meta.state_base:.3f}, {meta.state_expert:.3f}",
        scale=meta.scale,
        screened=f"along {meta.integrate} steps from base to expert" if meta.integrate else "at the base",
        patched=", ".join(f"{n} {kind}" for kind, n in meta.verified.items()),
        dtype=meta.dtype,
        seed=meta.seed,
    )
    measured = {measure: any(name.endswith(f".{measure}") for name in file.arrays) for measure in ("necessity", "activation")}
    rankings = {
        title: [
            {
                "component": r.name,
                "weight patching": _measured(r.patched, r.stderr),
                "first-order": _measured(r.screen, r.screen_stderr),
                **({"knockout": _measured(r.necessity, r.necessity_stderr)} if measured["necessity"] else {}),
                **({"activation": _measured(r.activation, r.activation_stderr)} if measured["activation"] else {}),
                **({"role": r.role} if meta.roles is not None else {}),
            }
            for r in tables.top_components(file, kinds, TOP)
        ]
        for title, kinds in (("heads, kv groups, neurons", UNIT_KINDS), ("modules", ("attention", "mlp")))
    }
    judged = {"roles": _parsed(role_tables.role_rows(file)), "depth": _parsed(role_tables.depth_rows(file))}
    shown = {"scores": facts} | {title: rows for title, rows in (judged | rankings).items() if rows}
    return Inspection("scores", meta.model_dump(mode="json"), _shapes(file.arrays), shown)


def _effects(path: Path) -> Inspection:
    file = read_effects(path)
    meta = file.metadata
    facts = fact_rows(
        base=f"{meta.base.name} ({meta.base.digest[:12]})",
        **{f"expert_{name}": f"{model.name} ({model.digest[:12]})" for name, model in meta.experts.items()},
        metric=f"{meta.metric} ({meta.unit})",
        path=meta.path,
        gradient_points=len(meta.nodes),
        dtype=meta.dtype,
        seed=meta.seed,
    )
    facts += fact_rows(**{f"caveat_{name}": why for name, why in meta.caveats.items()})
    facts += fact_rows(protected=", ".join(b.name for b in meta.behaviors if b.protected))
    linear: Rows = [
        {"behaviour": name, "slope": f"{line.slope:.3f}", "R²": f"{line.r2:.3f}", "holds": "yes" if line.holds else "NO"}
        for name, line in (meta.linearity.lines if meta.linearity is not None else {}).items()
    ]
    shown = {
        "effects": facts,
        **({f"predictions around the sum, {meta.linearity.masks} masks": linear} if meta.linearity is not None else {}),
        "behaviours": _parsed(effect_tables.losses_rows(file)),
        "sums of effects": _parsed(effect_tables.effects_rows(file)),
    }
    return Inspection("effects", meta.model_dump(mode="json"), _shapes(file.arrays), shown)


def _asked(solve: SolveRecord | None) -> dict[str, Any]:
    """What a linear program was asked, and what came of it."""
    if solve is None:
        return {}
    limits = ", ".join(f"{name} {limit:g}" for name, limit in solve.limits.items())
    worst = f"{solve.worst_predicted:.3f} predicted, {solve.worst_realised:.3f} measured"
    proven = "yes" if solve.linearity is not None and solve.linearity.holds else "NO"
    return {"budget": f"{solve.budget:g}", "limits": limits, "worst_retained_gain": worst, "predictions_proven": proven}


def _rounds(path: Path) -> Inspection:
    file = read_rounds(path)
    meta = file.metadata
    facts = fact_rows(
        base=f"{meta.base.name} ({meta.base.digest[:12]})",
        **{f"expert_{name}": f"{model.name} ({model.digest[:12]})" for name, model in meta.experts.items()},
        method=meta.method,
        **_asked(meta.solve),
        dtype=meta.dtype,
        seed=meta.seed,
    )
    shown = {
        "rounds file": facts,
        "rounds": _parsed(effect_tables.rounds_rows(file)),
        "behaviours": _parsed(effect_tables.settled_rows(file)),
    }
    return Inspection("rounds", meta.model_dump(mode="json"), _shapes(file.arrays), shown)


def _recipe(path: Path) -> Inspection:
    recipe, masks = read_recipe(path)
    facts = fact_rows(
        base=f"{recipe.base.name} ({recipe.base.digest[:12]})",
        **{f"expert_{name}": f"{entry.model.name} ({entry.model.digest[:12]})" for name, entry in recipe.experts.items()},
        mergekit_method=recipe.mergekit.method if recipe.mergekit else None,
        masks=f"{recipe.masks.file} ({recipe.masks.sha256[:12]})" if recipe.masks else None,
        out_dtype=recipe.out_dtype,
        made_from=", ".join(f"{source.file} ({source.sha256[:12]})" for source in recipe.provenance),
    )
    shown = {"recipe": facts, "shares": _parsed(recipe_rows({path.parent.name: path}))}
    if recipe.predicted:
        shown["predicted change"] = _parsed(predicted_rows({path.parent.name: path}))
    if recipe.rules:
        shown["rules"] = [rule.model_dump(mode="json") for rule in recipe.rules]
    return Inspection("recipe", recipe.model_dump(mode="json"), _shapes(masks), shown)


def _evaluation(path: Path, value: Mapping[str, Any]) -> Inspection:
    from mechmerge.evaluate.record import Evaluation

    record = parse_document(Evaluation, value, str(path))
    metrics: Rows = []
    for model in record.models:
        for name, metric in record.metrics(model).items():
            interval = f"{metric.low:.3f} – {metric.high:.3f}"
            row = {"model": model, "metric": name, "value": f"{metric.value:.3f}", "95 % interval": interval, "n": metric.n}
            metrics.append(row)
    pairs: Rows = [
        {
            "model": pair.model,
            "against": pair.against,
            "metric": pair.metric,
            "difference": f"{pair.difference:+.3f}",
            "95 % interval": f"{pair.low:+.3f} – {pair.high:+.3f}",
            "p (Holm)": f"{pair.p_holm:.3g}",
        }
        for pair in record.pairs
    ]
    shown = {"evaluation": metrics} | ({"paired tests": pairs} if pairs else {})
    return Inspection("evaluation", record.model_dump(mode="json"), {}, shown)


def _parsed(table: tuple[list[str], list[tuple[Any, ...]]]) -> Rows:
    header, rows = table
    return [dict(zip(header, row, strict=True)) for row in rows]


def _measured(value: float, error: float) -> str:
    """A score with its standard error, – where it was not measured."""
    if value != value:
        return "–"
    return f"{value:+.4f}" if error != error else f"{value:+.4f} ± {error:.4f}"
