"""A run directory with a real merge of tiny models, made in a second: what publishing starts from."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mechmerge.evaluate.record import EvaluateSettings, Evaluation, ModelResult, PairTest, SuiteResult
from mechmerge.localize.effect_file import EffectFile
from mechmerge.localize.scores import ScoreFile
from mechmerge.merge.engine import merge
from mechmerge.models.references import Model, ModelId, resolve
from mechmerge.recipe.compile import compile_recipe
from mechmerge.recipe.schema import write_recipe
from mechmerge.recipe.sources import read_sources
from tests import measured
from tests.samples import plain_result, plain_suite

GATE = {"model": "conflict", "rules": [{"metric": "formats", "at_least": {"model": "base", "plus": 0.1}}]}
PNG = b"\x89PNG\r\n\x1a\n"


def png() -> bytes:
    """A whole PNG of one grey pixel."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b"\0\x80")), (b"IEND", b""))
    return PNG + b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)


def merged_run(run: Path, base: Model, experts: Mapping[str, Model], **pipeline: Any) -> Path:
    """A run of one recipe, `conflict`, measured, merged, evaluated, with a gate that passes; `pipeline` replaces entries."""
    ids = {name: model.id for name, model in experts.items()}
    effects = measured.effect_file(experts=ids)
    metadata = effects.metadata.model_copy(update={"base": base.id})
    EffectFile(metadata, effects.arrays).write(run / "effects.safetensors")
    for seed, (name, model) in enumerate(ids.items()):
        scores = measured.score_file(seed, model, name)
        scores = ScoreFile(scores.metadata.model_copy(update={"base": base.id}), scores.arrays)
        scores.write(run / "scores" / name / f"{name}.safetensors")
    sources = read_sources([*sorted(run.glob("scores/*/*.safetensors")), run / "effects.safetensors"], ids)
    compiled = compile_recipe("conflict", sources, out_dtype="float32")
    recipe = run / "recipes" / "conflict" / "recipe.yaml"
    write_recipe(recipe, compiled.recipe, compiled.masks)
    folders = {"base": base.path} | {name: model.path for name, model in experts.items()}
    merge(recipe, run / "merged" / "conflict", folders)
    merged = resolve(str(run / "merged" / "conflict")).id
    evaluation({"base": base.id} | ids | {"conflict": merged}).write(run / "evaluation.json")
    (run / "figures").mkdir()
    for name in ("effects.png", "curves.png"):
        (run / "figures" / name).write_bytes(png())
    plan = {"title": "Two experts", "publish": "conflict", "license": "mit", "recipes": {"conflict": {}}, "gate": GATE}
    (run / "run.yaml").write_text(yaml.safe_dump({"pipeline": plan | pipeline, "path": str(run)}))
    return run


def evaluation(models: Mapping[str, ModelId], **values: float) -> Evaluation:
    """An evaluation in which the base passes 30 of 120 formats and the others 60, unless `values` say otherwise."""

    def result(name: str) -> SuiteResult:
        return plain_result(values.get(name, 0.25 if name == "base" else 0.5))

    others = [name for name in models if name != "conflict"]
    pairs = tuple(
        PairTest(
            model="conflict", against=name, metric="formats", difference=0.25, low=0.1, high=0.4, better=9, worse=1, p=0.01,
            p_holm=0.02,
        )
        for name in others
    )  # fmt: skip
    return Evaluation(
        suites={"formats": plain_suite()},
        models={name: ModelResult(id=model, suites={"formats": result(name)}) for name, model in models.items()},
        against=tuple(others),
        pairs=pairs,
        settings=EvaluateSettings(),
        versions={"torch": "2.13.0"},
    )
