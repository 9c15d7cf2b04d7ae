"""Finding a behaviour's anchor: the states of both models, the layer, the steering check, and the judgement.

localize/anchor.py says how each is computed; here the models are run, in units that are written when they are done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from mechmerge.artifacts import Document, Units, write_arrays
from mechmerge.behaviors.chat import chat_template_of, render
from mechmerge.behaviors.schema import Behavior
from mechmerge.errors import LocalizeError
from mechmerge.localize.anchor import STEERING_STRENGTHS, States, best_layers, direction, halves, judge, normalised
from mechmerge.localize.asked import ask
from mechmerge.localize.bench import Batch, Bench
from mechmerge.localize.scores import AnchorRecord
from mechmerge.localize.steering import Push, Steering
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.models.references import Model
from mechmerge.progress import Progress, track

Array = np.ndarray


class AnchorOptions(Protocol):
    """The settings of the localize stage that anchors depend on."""

    anchor_layer: int | None
    steering_prompts: int
    batch: int
    seed: int


class _Unit(Document):
    """Metadata of a vector file."""

    anchor: AnchorRecord


class AnchorFinder:
    """Anchors of one expert's behaviours.

    Args:
        base: the base.
        expert: the expert.
        bench: gives the bench, which holds the base's weights before and after every call.
        units: where a behaviour's units are kept.
        settings: the stage's.
        progress: told of every unit.
    """

    def __init__(
        self,
        base: Model,
        expert: Checkpoint,
        bench: Callable[[], Bench],
        units: Callable[[Behavior], Units],
        settings: AnchorOptions,
        progress: Progress,
    ) -> None:
        self.base, self.expert, self.bench, self.units = base, expert, bench, units
        self.settings, self.progress = settings, progress

    # -------------------------------------------------------------------------------------------------------------- states
    def prepare(self, behaviors: Sequence[Behavior]) -> None:
        """Residual streams of both models for all behaviours, so that the expert is loaded once."""
        missing = [b for b in behaviors if not (self.units(b).folder / "states.safetensors").exists()]
        if not missing:
            return
        bench = self.bench()
        found: dict[str, dict[str, Array]] = {b.name: {} for b in missing}
        texts = {b.name: self._rendered(b) for b in missing}
        for behavior in track(missing, "states of the base", len(missing), self.progress):
            positive, _, template = texts[behavior.name]
            found[behavior.name]["base_with"] = self._last(positive, template)
        bench.load(self.expert)
        for behavior in track(missing, "states of the expert", len(missing), self.progress):
            positive, negative, template = texts[behavior.name]
            found[behavior.name]["expert_with"] = self._last(positive, template)
            found[behavior.name]["expert_without"] = self._last(negative, template)
        bench.load(self.base.checkpoint())
        for behavior in missing:
            self.units(behavior).arrays("states", partial(found.__getitem__, behavior.name))

    def _rendered(self, behavior: Behavior) -> tuple[list[str], list[str], str | None]:
        tokenizer = self.bench().tokenizer
        template = chat_template_of(tokenizer, behavior.chat_template)
        positive = [render(tokenizer, pair.with_, template) for pair in behavior.pairs]
        negative = [render(tokenizer, pair.without, template) for pair in behavior.pairs]
        return positive, negative, template

    def _batches(self, texts: Sequence[str], template: str | None) -> list[Batch]:
        size = self.settings.batch
        return [self.bench().encode(texts[i : i + size], special_tokens=template is None) for i in range(0, len(texts), size)]

    def _last(self, texts: Sequence[str], template: str | None) -> Array:
        """Residual stream at the last token of every prompt, [L + 1, n, D]."""
        rows = [
            torch.stack([x[:, -1].float() for x in trace.residual]).cpu().numpy()
            for trace in self.bench().traces(self._batches(texts, template), self.base.checkpoint().arch.layers)
        ]
        return np.concatenate(rows, axis=1)

    # -------------------------------------------------------------------------------------------------------------- anchor
    def find(self, behavior: Behavior) -> tuple[AnchorRecord, Array]:
        """A prepared behaviour's anchor: its figures, and the unit vector [D].

        Raises:
            LocalizeError: fewer than four topics.
        """
        made, held_out = split(behavior)
        units = self.units(behavior)
        states = States(**units.arrays("states", dict))
        layer = self.settings.anchor_layer or int(units.json("layer", lambda: self._choose(behavior, states, made)))
        v = direction(states, layer, made)

        def compute() -> dict[str, Any]:
            steer = self._steering(behavior, held_out)
            rates = None
            if steer is not None:
                plain, *steered = steer.rates([Push(layer, v * strength) for strength in (0.0, *STEERING_STRENGTHS)])
                rates = plain, max(steered)
            record = judge(states, layer, made, held_out, rates, self.settings.seed, topics_of(behavior))
            return record.model_dump(mode="json")

        return AnchorRecord.model_validate(units.json("anchor", compute)), normalised(v).astype(np.float32)

    @staticmethod
    def write(path: Path, record: AnchorRecord, vector: Array) -> None:
        """Writes an anchor as a file of its own."""
        write_arrays(path, {"vector": vector}, _Unit(anchor=record))

    def _choose(self, behavior: Behavior, states: States, made: list[int]) -> int:
        """The candidate whose steering raises the base's pass rate most (the deepest of equals), on the vector's own
        prompts.
        """
        candidates = best_layers(states, made, topics_of(behavior))
        steer = self._steering(behavior, made)
        if steer is None:
            return candidates[-1]
        strength = STEERING_STRENGTHS[-1]
        rates = steer.rates([Push(layer, direction(states, layer, made) * strength) for layer in candidates])
        return max(zip(rates, candidates, strict=True))[1]

    def _steering(self, behavior: Behavior, prompts: list[int]) -> Steering | None:
        """The steering check on the first of the given prompts, or None where nothing judges answers."""
        count = self.settings.steering_prompts
        if behavior.verifier is None or count == 0:
            return None
        asked = ask(self.bench(), behavior, [behavior.pairs[i] for i in prompts[:count]])
        return Steering(self.bench(), asked, self.progress)


def split(behavior: Behavior) -> tuple[list[int], list[int]]:
    """Prompts that make the anchor, and prompts that everything is measured on; they share no topic.

    Raises:
        LocalizeError: fewer than four topics.
    """
    topics = topics_of(behavior)
    if (found := len(set(topics))) < 4:
        raise LocalizeError(f"behaviour {behavior.name}", expected="prompts on at least 4 topics", found=str(found))
    return halves(topics)


def topics_of(behavior: Behavior) -> list[str]:
    """The topic of each pair; a pair that names none is one of its own."""
    return [pair.topic or str(i) for i, pair in enumerate(behavior.pairs)]
