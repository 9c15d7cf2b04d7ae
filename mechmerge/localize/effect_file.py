"""The effect file: what every component of every expert does to every behaviour (safetensors with one JSON document).

Tensors, float32; sign: positive helps the behaviour. The unit is that of the document's `metric` (`UNITS`):
    <kind>.effect   [behaviours, experts, layers, units]      mean over prompts
    <kind>.stderr   [behaviours, experts, layers, units]      standard error over topics
    <kind>.half     [2, behaviours, experts, layers, units]   the mean on each half of the prompts
kind: head, kv, neuron, attention.rest, mlp.rest, norms (units 1) and embed, final_norm, lm_head (layers 1, units 1). Together
the kinds partition the parameters, so the sum over everything is the whole change of the metric along the path.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from mechmerge.artifacts import Document, read_arrays, write_arrays
from mechmerge.errors import SchemaError
from mechmerge.localize.scores import AnchorRecord
from mechmerge.localize.settings import ScoreSource
from mechmerge.models.components import LEAF_KINDS, OUTSIDE, UNIT_KINDS
from mechmerge.models.references import ModelId

Array = np.ndarray
EFFECT_KINDS: tuple[str, ...] = (*LEAF_KINDS, *OUTSIDE)
UNITS: dict[ScoreSource, str] = {
    "loss": "nats per answer token",
    "anchor": "recovery: 0 is the base's state, 1 its own expert's",
}
"""What effects and changes are counted in, by metric; positive effects help in either."""
MEASURED: dict[ScoreSource, str] = {"loss": "loss", "anchor": "recovery"}
"""What is shown of a behaviour at a point, by metric: a loss falls where a behaviour gains, a recovery rises."""


Tokens = Literal["all", "contested"]
"""Which tokens of an answer a loss is the mean over: `all` alike, or those that are `contested`, each by how much less likely
the worst of the base and the other experts makes it than the answer's own (localize/calibration.py).
"""
Origin = Literal["base", "sum"]
"""Where the path of the effects starts: at the base, leading to the sum of all experts; or at the sum, leading to what a round
would leave of it (localize/proposal.py).
"""
PATHS: dict[Origin, str] = {"base": "base→sum", "sum": "sum→proposal"}
"""The paths by where they start, as files name them."""
SLOPES = (0.8, 1.2)
"""Slopes within which a prediction is called linear."""
LEAST_R2 = 0.8
"""The least R² of a prediction that is called linear."""
LEAST_MASKS = 100
"""Masks without which nothing is called linear."""


def unit_of(metric: ScoreSource, tokens: Tokens) -> str:
    """What effects and changes are counted in, in words."""
    return UNITS[metric] + (", each by how much it is contested" if tokens == "contested" else "")


class Line(Document):
    """The least-squares line of a behaviour's measured changes on the predicted ones."""

    slope: float
    """1: what is predicted comes true. 0 where nothing was predicted to change."""
    r2: float
    """Share of the measured changes' variance that the line explains, 0 … 1."""
    largest: float
    """Largest measured change in size, in the metric's unit."""

    @property
    def holds(self) -> bool:
        """Whether the prediction is good enough to solve for."""
        return SLOPES[0] <= self.slope <= SLOPES[1] and self.r2 >= LEAST_R2


class Linearity(Document):
    """How far the effects' linear predictions come true where merges are decided: around the sum (localize/linearity.py)."""

    masks: int
    """Masks that were predicted and measured, shuffled ones among them."""
    lines: dict[str, Line]
    """By behaviour."""

    @property
    def holds(self) -> bool:
        """Whether the predictions of every behaviour are linear, over enough masks to say so."""
        return self.masks >= LEAST_MASKS and all(line.holds for line in self.lines.values())

    @property
    def failing(self) -> str:
        """What does not hold, in words; empty where all does."""
        few = [f"{self.masks} masks of {LEAST_MASKS}"] if self.masks < LEAST_MASKS else []
        bad = [f"{name}: slope {line.slope:.2f}, R² {line.r2:.2f}" for name, line in self.lines.items() if not line.holds]
        return "; ".join(few + bad)


class BehaviorEffect(Document):
    """What is known of one behaviour (a row of the matrix) beside its effects."""

    name: str
    expert: str
    """The expert that answers for it; `base` where it is protected: the loss is that of the base's own answers."""
    weight: float
    """Its weight as the user gave it (1 unless told otherwise)."""
    members: tuple[str, ...]
    """The behaviours that it is the mean of."""
    digests: dict[str, str]
    """Digest of each member's behaviour file."""
    prompts: int
    """Calibration prompts used (on the anchor: those that made the vectors too)."""
    answers: int
    """Prompts that are measured. On the loss: those whose greedy answer by the expert passed the verifier. On the anchor: those
    that made no vector.
    """
    loss_start: float
    """The value at the start of the path, that falls where the behaviour gains. On the loss: nats per answer token. On the
    anchor: −state/gap.
    """
    loss_end: float
    """The same at the end of the path."""
    loss_expert: float
    """The same of its own expert."""
    loss_base: float | None = None
    """The same of the base, where the path does not start there."""
    completeness_error: float
    """|Σ effects − (loss_start − loss_end)| / max(|loss_start − loss_end|, 0.05)."""
    anchors: dict[str, AnchorRecord] = Field(default_factory=dict)
    """The anchor of each member in its expert; empty on the loss."""

    @property
    def own_gain(self) -> float:
        """What its own expert takes away from the base's value, in the metric's unit; 0 where it is protected."""
        return self.at_base - self.loss_expert

    @property
    def at_base(self) -> float:
        """The base's value."""
        return self.loss_start if self.loss_base is None else self.loss_base

    @property
    def protected(self) -> bool:
        """Whether its answers are the base's own: no expert owns it, nothing is gained on it, and a rise of its loss is
        damage.
        """
        return self.expert == "base"

    @property
    def caveat(self) -> str | None:
        """Which of its anchors are not valid, and why; None where all are."""
        invalid = {name: "; ".join(record.reasons) for name, record in self.anchors.items() if not record.valid}
        return "anchor not valid: " + ", ".join(f"{name} ({why})" for name, why in invalid.items()) if invalid else None


class EffectMetadata(Document):
    """The JSON document of an effect file."""

    schema_version: Literal[1] = 1
    kind: Literal["effects"] = "effects"
    metric: ScoreSource = "loss"
    """What effects are of: the `loss` of the expert's own answers (as in files that say nothing), or its state along the
    `anchor`.
    """
    tokens: Tokens = "all"
    """Which tokens of an answer its loss is the mean over."""
    base: ModelId
    experts: dict[str, ModelId]
    """Experts in the order of the tensors' second dimension."""
    behaviors: tuple[BehaviorEffect, ...]
    """Behaviours in the order of the tensors' first dimension."""
    path: str
    """`base→sum`: from the base to base + Σ (expert − base); `sum→proposal`: from there to what a round would leave of it."""
    nodes: tuple[float, ...]
    """Points of the path, 0 … 1, at which gradients were taken."""
    parameters: dict[str, int]
    """Parameters of one unit of head, kv and neuron."""
    dtype: str
    linearity: Linearity | None = None
    """How far predictions come true around the sum; None where that was not measured."""
    seed: int
    versions: dict[str, str]

    @property
    def unit(self) -> str:
        """The unit of effects and changes."""
        return unit_of(self.metric, self.tokens)

    def shown(self, behavior: BehaviorEffect) -> dict[str, float]:
        """A behaviour at `path's start`, `path's end` and `its expert`, as it is shown: losses, or recoveries."""
        values = {"path's start": behavior.loss_start, "path's end": behavior.loss_end, "its expert": behavior.loss_expert}
        return values if self.metric == "loss" else {where: behavior.at_base - value for where, value in values.items()}

    @property
    def counted(self) -> str:
        """What `answers` of a behaviour counts."""
        return "answers" if self.metric == "loss" else "prompts measured"

    @property
    def caveats(self) -> dict[str, str]:
        """What a reader must be told of a behaviour's effects, by behaviour: anchors that are not valid."""
        return {b.name: b.caveat for b in self.behaviors if b.caveat is not None}


@dataclass(frozen=True)
class EffectFile:
    """An effect file in memory."""

    metadata: EffectMetadata
    arrays: dict[str, Array]

    def gains_at_nothing(self, total: Array) -> Array:
        """Each behaviour's predicted gain at coefficients 0, [R], to which coefficient × effect is added.

        It is 0 where the path starts at the base. Where it starts at the sum, whose gain was measured, it is what the
        prediction would be at the base: of no meaning there, but it makes the prediction exact at the sum.

        Args:
            total: sum of each behaviour's effects over everything, [R].
        """
        if self.metadata.path == PATHS["base"]:
            return np.zeros(len(self.metadata.behaviors))
        found: Array = np.array([b.at_base - b.loss_start for b in self.metadata.behaviors]) - total
        return found

    def write(self, path: Path) -> None:
        """Writes the file atomically, after checking its tensors."""
        _check(self.arrays, self.metadata, str(path))
        write_arrays(path, self.arrays, self.metadata)


def read_effects(path: Path) -> EffectFile:
    """Reads and checks an effect file.

    Raises:
        InputError: no such file.
        SchemaError: not an effect file, another schema version, or tensors of the wrong name, shape or values.
    """
    arrays, metadata = read_arrays(path, EffectMetadata)
    _check(arrays, metadata, str(path))
    return EffectFile(metadata, arrays)


def _check(arrays: dict[str, Array], metadata: EffectMetadata, where: str) -> None:
    matrix = (len(metadata.behaviors), len(metadata.experts))
    for name, array in arrays.items():
        kind, _, measure = name.rpartition(".")
        if kind not in EFFECT_KINDS or measure not in ("effect", "stderr", "half"):
            raise SchemaError(where, expected="tensors named <kind>.effect, .stderr or .half", found=name)
        lead = (2, *matrix) if measure == "half" else matrix
        if array.dtype != np.float32 or array.shape[:-2] != lead:
            raise SchemaError(
                f"{where}: {name}", expected=f"float32 {[*lead, 'layers', 'units']}", found=f"{array.dtype} {list(array.shape)}"
            )
        if not np.isfinite(array).all():
            raise SchemaError(f"{where}: {name}", expected="finite effects", found="NaN or an infinite one")
        effect = arrays.get(f"{kind}.effect")
        if effect is None or effect.shape[-2:] != array.shape[-2:]:
            found = "none" if effect is None else str(list(effect.shape))
            raise SchemaError(where, expected=f"{kind}.effect of {name}'s [layers, units]", found=found)
    depths = {array.shape[-2] for name, array in arrays.items() if name.rpartition(".")[0] in LEAF_KINDS}
    if len(depths) > 1:
        raise SchemaError(where, expected="one number of layers", found=", ".join(map(str, sorted(depths))))
    if metadata.parameters.keys() != set(UNIT_KINDS) or min(metadata.parameters.values()) < 1:
        expected = f"parameters of one unit of {', '.join(UNIT_KINDS)}"
        raise SchemaError(where, expected=expected, found=str(metadata.parameters))
