"""What anything of ours holds: a file, a run directory, a model, or two models side by side."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from mechmerge.artifacts import parse_document, parse_json, read_document, read_text
from mechmerge.errors import CheckpointError, InputError, PairError, SchemaError
from mechmerge.evaluate.gate import GateResult
from mechmerge.evaluate.record import Evaluation
from mechmerge.models.adapters import is_adapter
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.models.deltas import delta_by_depth
from mechmerge.models.hub_files import PREFIX, is_hub_reference, local_file
from mechmerge.models.pair import check_pair, token_ids
from mechmerge.models.positions import positions_of
from mechmerge.models.references import Model, resolve
from mechmerge.pipeline.sweep import Sweep
from mechmerge.progress import SILENT, Progress
from mechmerge.recipe.schema import KEPT, read_recipe
from mechmerge.report.files import find_run_files
from mechmerge.report.inspection import Inspection, Rows, fact_rows, inspect_file

_HUB_MODEL = re.compile(r"hf://(?!datasets/)[\w.-]+/[\w.-]+(?:@[\w.-]+)?(?:\+.*)?")

SHOWN = (
    "reference", "revision", "family", "model_type", "layers", "hidden", "heads", "kv_groups", "head_dim", "neurons",
    "vocabulary", "tokens", "recipe",
)  # fmt: skip
"""Facts of a model that are shown as they are."""


def inspect_any(text: str, other: str | None = None, progress: Progress = SILENT) -> Inspection:
    """Reads and checks what a reference names, and says what it holds.

    Args:
        text: a file of ours, a run directory, a model reference, or `hf://…` of either.
        other: a second model reference: the two are compared.
        progress: told about downloads.

    Raises:
        InputError: nothing there.
        SchemaError: no file of ours, or one that breaks its schema.
        CheckpointError: a model that cannot be used.
    """
    if other is not None:
        return _pair(resolve(text, progress=progress), resolve(other, progress=progress))
    if is_hub_reference(text) and not _HUB_MODEL.fullmatch(text):
        return _file(local_file(text, progress))
    path = Path(text).expanduser()
    if path.is_file():
        return _file(path)
    if path.is_dir() and not (path / "config.json").is_file():
        return _adapter(path) if is_adapter(path) else _run(path)
    if not path.is_dir() and not text.startswith(("demo:", PREFIX)) and "/" not in text.strip("./~"):
        # A name without a slash is no repository: most likely a file name with a typing error.
        raise InputError(text, expected="a file of mechmerge, a run directory or a model reference", found="nothing there")
    return _model(resolve(text, progress=progress))


# ------------------------------------------------------------------------------------------------------------------ files
def _file(path: Path) -> Inspection:
    """A file that `report.inspection` knows, or a gate's verdict or a sweep, whose schemas belong to layers above it."""
    if path.suffix == ".json":
        value = parse_json(read_text(path), str(path))
        keys = value.keys() if isinstance(value, dict) else set()
        if {"passed", "rules"} <= keys:
            verdict = parse_document(GateResult, value, str(path))
            rules: Rows = [
                {
                    "rule": rule.rule, "passed": "yes" if rule.passed else "NO", "found": _number(rule.found),
                    "needed": _number(rule.bound), "problem": rule.problem or "",
                }
                for rule in verdict.rules
            ]  # fmt: skip
            title = "gate: passed" if verdict.passed else "gate: REFUSED"
            return Inspection("gate", verdict.model_dump(mode="json"), {}, {title: rules})
        if {"split", "ranking"} <= keys:
            sweep = parse_document(Sweep, value, str(path))
            ranked: Rows = [
                {"rank": row.rank, "merge": row.variant.name, "gate": "passed" if row.gate.passed else "failed"}
                | {name: f"{value:.3f}" for name, value in row.metrics.items()}
                for row in sweep.ranking
            ]
            return Inspection("sweep", sweep.model_dump(mode="json"), {}, {f"sweep on the {sweep.split} split": ranked})
    return inspect_file(path)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


# ----------------------------------------------------------------------------------------------------------------- models
def describe(model: Model) -> dict[str, Any]:
    """What a model is, as a JSON-able mapping: architecture, sizes, dtypes, positions, chat template, recipe."""
    checkpoint = model.checkpoint()
    arch = checkpoint.arch
    weights = {name: _count(shape) for name, shape in checkpoint.shapes.items()}
    positions = positions_of(checkpoint.config)
    return {
        "reference": model.id.name,
        "revision": model.id.revision,
        "digest": model.id.digest,
        "folder": str(model.path),
        "family": arch.family.name,
        "model_type": checkpoint.config.get("model_type"),
        "layers": arch.layers,
        "hidden": arch.hidden,
        "heads": arch.heads,
        "kv_groups": arch.kv_groups,
        "head_dim": arch.head_dim,
        "neurons": arch.neurons,
        "vocabulary": arch.vocabulary,
        "tied_head": arch.tied,
        "positions": positions,
        "parameters": sum(weights.values()),
        "dtypes": dict(Counter(entry["dtype"] for entry in checkpoint.entries.values())),
        "shards": model.id.shards,
        "bytes": sum((model.path / name).stat().st_size for name in model.id.shards),
        "tokens": None if (ids := token_ids(model.path)) is None else len(ids),
        "chat_template": _has_template(model.path),
        "by_component": _by_component(checkpoint),
        "recipe": _policy_of(model.path),
    }


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _by_component(checkpoint: Checkpoint) -> dict[str, int]:
    """Parameters by leaf kind; together they are all parameters."""
    layout, shapes, counts = checkpoint.layout, checkpoint.shapes, Counter[str]()
    for layer, kind in layout.leaves():
        for block in layout.blocks(layer, kind):
            share = 1.0 if block.dim is None else block.width * block.units / shapes[block.tensor][block.dim]
            counts[kind] += round(_count(shapes[block.tensor]) * share)
    return dict(counts)


def _has_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    path = folder / "tokenizer_config.json"
    value = parse_json(read_text(path), str(path)) if path.is_file() else {}
    return isinstance(value, dict) and bool(value.get("chat_template"))


def _policy_of(folder: Path) -> str | None:
    """The policy of the recipe that a merged model keeps."""
    path = folder / KEPT
    return read_recipe(path)[0].policy.name if path.is_file() else None


def _model(model: Model) -> Inspection:
    known = describe(model)
    checkpoint = model.checkpoint()
    plain = {key: known[key] for key in SHOWN}
    shown = fact_rows(
        **plain,
        digest=known["digest"][:12],
        parameters=f"{known['parameters']:,}",
        dtypes=", ".join(f"{name} ({count} tensors)" for name, count in known["dtypes"].items()),
        size=f"{known['bytes'] / 1e6:.1f} MB in {len(known['shards'])} shards",
        head="tied to the embeddings" if known["tied_head"] else "of its own",
        chat_template="yes" if known["chat_template"] else "none",
        **{name: value for name, value in known["positions"].items() if value not in (None, {})},
    )
    total = known["parameters"]
    parts: Rows = [
        {"component": kind, "parameters": f"{count:,}", "share": f"{100 * count / total:.1f} %"}
        for kind, count in known["by_component"].items()
        if count
    ]
    shapes = {name: list(shape) for name, shape in sorted(checkpoint.shapes.items())}
    return Inspection("model", known, shapes, {"model": shown, "parameters by component": parts})


def _adapter(folder: Path) -> Inspection:
    from mechmerge.models.adapters import CONFIG, WEIGHTS, adapter_digests
    from mechmerge.models.checkpoint import read_header

    digests = adapter_digests(folder)
    config = parse_json(read_text(folder / CONFIG), str(folder / CONFIG))
    if not isinstance(config, dict):
        raise SchemaError(str(folder / CONFIG), expected="a JSON object", found=type(config).__name__)
    header = read_header(folder / WEIGHTS)
    targets = config.get("target_modules")
    shown = fact_rows(
        kind=config.get("peft_type"),
        base=config.get("base_model_name_or_path"),
        rank=config.get("r"),
        alpha=config.get("lora_alpha"),
        dora="yes" if config.get("use_dora") else None,
        modules=", ".join(sorted(targets)) if isinstance(targets, list) else targets,
        parameters=f"{sum(_count(entry['shape']) for entry in header.values()):,}",
        digest=digests[WEIGHTS][:12],
        use=f"name it as BASE+{folder}",
    )
    shapes = {name: list(entry["shape"]) for name, entry in sorted(header.items())}
    return Inspection("adapter", {"config": config, "digests": digests}, shapes, {"adapter": shown})


def _pair(base: Model, expert: Model) -> Inspection:
    """Whether two models can be merged, and where and how far they differ."""
    one, other = base.checkpoint(), expert.checkpoint()
    reason = None
    try:
        check_pair(one, other)
    except (PairError, CheckpointError) as error:
        reason = str(error)
    comparable = one.shapes == other.shapes and one.arch.family.name == other.arch.family.name
    equal = base.id.shards == expert.id.shards
    depths = delta_by_depth(one, other) if comparable else []
    known = {
        "base": describe(base),
        "expert": describe(expert),
        "compatible": reason is None,
        "reason": reason,
        "equal_weights": equal or (bool(depths) and not any(row["changed"] for row in depths)),
        "relative_delta_by_depth": depths,
    }
    shown = fact_rows(
        base=f"{base.id.name} ({base.id.digest[:12]})",
        expert=f"{expert.id.name} ({expert.id.digest[:12]})",
        compatible="yes" if reason is None else f"NO: {reason}",
        weights="equal: nothing to merge" if known["equal_weights"] else None,
        tensors_that_differ=f"{sum(r['changed'] for r in depths)} of {sum(r['tensors'] for r in depths)}" if depths else None,
    )
    tables: dict[str, Rows] = {"pair": shown}
    if depths:
        tables["norm of expert − base, relative to the base's"] = [
            {"where": row["where"]}
            | {part: f"{row[part]:.2e}" if part in row else "" for part in ("attention", "mlp", "norms", "all")}
            | {"tensors changed": f"{row['changed']} of {row['tensors']}"}
            for row in depths
        ]
    return Inspection("pair", known, {}, tables)


# ------------------------------------------------------------------------------------------------------------------- runs
def _run(run: Path) -> Inspection:
    """What a run directory holds, stage by stage, every file read and checked."""
    files = find_run_files(run)
    merged = sorted(path.parent for path in run.glob("merged/*/config.json"))
    stages: Rows = []
    inside: list[Inspection] = []
    for path in (*files.scores, *(p for p in (files.effects, files.rounds) if p is not None), *files.recipes.values()):
        found = inspect_file(path)
        inside.append(found)
        stages.append({"file": str(path.relative_to(run)), "kind": found.kind, "holds": _in_words(found)})
    for folder in merged:
        checkpoint = Checkpoint(folder)
        checkpoint.check_complete()
        size = sum((folder / name).stat().st_size for name in set(checkpoint.files.values()))
        stages.append({"file": str(folder.relative_to(run)), "kind": "model", "holds": f"complete, {size / 1e6:.1f} MB"})
    evaluation = None if files.evaluation is None else read_document(Evaluation, files.evaluation)
    if evaluation is not None:
        said = f"{len(evaluation.models)} models, {', '.join(evaluation.suites)}"
        stages.append({"file": "evaluation.json", "kind": "evaluation", "holds": said})
    verdict = None if files.gate is None else read_document(GateResult, files.gate)
    if verdict is not None:
        said = "passed" if verdict.passed else f"REFUSED: {len(verdict.failed)} of {len(verdict.rules)} rules failed"
        stages.append({"file": "gate.json", "kind": "gate", "holds": said})
    for name in ("report.html", "report.md", "README.md"):
        if (run / name).is_file():
            stages.append({"file": name, "kind": "report" if name != "README.md" else "model card", "holds": ""})
    known = {
        "title": files.title,
        "notes": files.notes,
        "publish": files.publish,
        "license": files.license,
        "files": [{"file": row["file"], "kind": row["kind"]} for row in stages],
        "recipes": list(files.recipes),
        "merged": [folder.name for folder in merged],
        "gate": None if verdict is None else verdict.passed,
        "models": [] if evaluation is None else list(evaluation.models),
    }
    shown = fact_rows(title=files.title, notes=files.notes, publishes=files.publish, license=files.license)
    return Inspection("run", known, {}, {"run": shown or fact_rows(folder=run.name), "files": stages})


def _in_words(found: Inspection) -> str:
    """A file of a run in a few words."""
    document = found.document
    match found.kind:
        case "scores":
            valid = any(row["field"] == "valid" and row["value"] == "yes" for row in found.tables["scores"])
            return f"{document['behavior']} of {document['expert']['name']}" + ("" if valid else " (NOT VALID)")
        case "effects" | "rounds":
            return f"{len(document['experts'])} experts, {len(document['behaviors'])} behaviours"
        case _:
            return f"{document['policy']['name']}: {', '.join(document['experts'])}"
