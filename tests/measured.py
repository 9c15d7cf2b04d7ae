"""Score and effect files with random numbers, for tests of what is made from them."""

from __future__ import annotations

from typing import Any

import numpy as np

from mechmerge.localize.effect_file import EFFECT_KINDS, BehaviorEffect, EffectFile, EffectMetadata
from mechmerge.localize.scores import AnchorRecord, ScoreFile, ScoreMetadata
from mechmerge.models.components import OUTSIDE, SCORED_KINDS
from mechmerge.models.references import ModelId

BASE = ModelId(name="base", shards={"model.safetensors": "0" * 64})
FIRST = ModelId(name="some/first", revision="abc", shards={"model.safetensors": "1" * 64})
SECOND = ModelId(name="base+second", shards={"model.safetensors": "2" * 64})
LAYERS = 3
UNITS = {"head": 4, "kv": 2, "neuron": 48}
PARAMETERS = {"head": 512, "kv": 512, "neuron": 96}


def shape(kind: str) -> tuple[int, int]:
    """[layers, units] of a kind in the tiny Llama."""
    return (1, 1) if kind in OUTSIDE else (LAYERS, UNITS.get(kind, 1))


def effect_file(
    seed: int = 0, experts: dict[str, ModelId] | None = None, gains: tuple[float, float] = (2.0, 0.5)
) -> EffectFile:
    """Effects of two experts on two behaviours; each half of the prompts has its own, and the effect is their mean."""
    experts = experts or {"first": FIRST, "second": SECOND}
    generator = np.random.default_rng(seed)
    arrays = {}
    for kind in EFFECT_KINDS:
        half = generator.normal(size=(2, 2, len(experts), *shape(kind))).astype(np.float32)
        arrays[f"{kind}.half"] = half
        arrays[f"{kind}.effect"] = half.mean(axis=0, dtype=np.float32)
        arrays[f"{kind}.stderr"] = np.full(half.shape[1:], 0.1, np.float32)
    behaviors = tuple(
        BehaviorEffect(
            name=name,
            expert=expert,
            weight=1.0,
            members=(name,),
            digests={name: "d" * 64},
            prompts=8,
            answers=8,
            loss_start=3.0,
            loss_end=2.0,
            loss_expert=3.0 - gain,
            completeness_error=0.01,
        )
        for name, expert, gain in zip(("formats", "sums"), experts, gains, strict=True)
    )
    metadata = EffectMetadata(
        base=BASE,
        experts=experts,
        behaviors=behaviors,
        path="base→sum",
        nodes=(0.5,),
        parameters=PARAMETERS,
        dtype="float32",
        seed=0,
        versions={},
    )
    return EffectFile(metadata, arrays)


def score_file(
    seed: int = 0, expert: ModelId = FIRST, behavior: str = "formats", *, valid: bool = True, **changes: Any
) -> ScoreFile:
    """Scores of one expert: normal ones, the last layer exactly 0 (above the anchor), with norms and parameter counts."""
    generator = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}
    for kind in SCORED_KINDS:
        size = shape(kind)
        screen = generator.normal(size=size).astype(np.float32)
        screen[-1] = 0
        arrays[f"{kind}.screen"] = screen
        arrays[f"{kind}.delta_norm"] = generator.uniform(0.1, 1, size).astype(np.float32)
        arrays[f"{kind}.parameters"] = np.full(LAYERS, PARAMETERS.get(kind, 1000), np.int64)
    anchor = AnchorRecord(layer=2, valid=valid, separation=1.0, gap=1.0, gap_low=0.5, prompts=8, held_out=4)
    metadata = ScoreMetadata(
        **{
            "base": BASE,
            "expert": expert,
            "behavior": behavior,
            "behavior_digest": "b" * 64,
            "chat_template": "none",
            "anchor": anchor,
            "scale": "recovery",
            "state_base": 0.0,
            "state_expert": 1.0,
            "identity_control": 0.0,
            "dtype": "float32",
            "seed": 0,
            "verified": {},
            "versions": {},
            **changes,
        }
    )
    return ScoreFile(metadata, arrays)
