"""The effect file: what every component of every expert does to every behaviour (safetensors with one JSON document).

Tensors, float32; sign: positive lowers the loss, that is, helps the behaviour:
    <kind>.effect   [behaviours, experts, layers, units]      nats per answer token, mean over prompts
    <kind>.stderr   [behaviours, experts, layers, units]      standard error over prompts
    <kind>.half     [2, behaviours, experts, layers, units]   the mean on each half of the prompts
kind: head, kv, neuron, attention.rest, mlp.rest, norms (units 1) and embed, final_norm, lm_head (layers 1, units 1). Together
the kinds partition the parameters, so the sum over everything is the whole change of loss along the path.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from mechmerge.artifacts import Document, read_arrays, write_arrays
from mechmerge.errors import SchemaError
from mechmerge.models.components import LEAF_KINDS, OUTSIDE
from mechmerge.models.references import ModelId

Array = np.ndarray
EFFECT_KINDS: tuple[str, ...] = (*LEAF_KINDS, *OUTSIDE)


class BehaviorEffect(Document):
    """What is known of one behaviour (a row of the matrix) beside its effects."""

    name: str
    expert: str
    """The expert that answers for it."""
    weight: float
    """Its weight as the user gave it (1 unless told otherwise)."""
    members: tuple[str, ...]
    """The behaviours that it is the mean of."""
    digests: dict[str, str]
    """Digest of each member's behaviour file."""
    prompts: int
    """Calibration prompts asked."""
    answers: int
    """The expert's own greedy answers that passed the verifier: what the loss is measured on."""
    loss_start: float
    """Nats per answer token at the start of the path."""
    loss_end: float
    """Nats per answer token at the end of the path."""
    loss_expert: float
    """Nats per answer token of its own expert."""
    completeness_error: float
    """|Σ effects − (loss_start − loss_end)| / max(|loss_start − loss_end|, 0.05)."""

    @property
    def own_gain(self) -> float:
        """Loss that its own expert takes away from the path's start, in nats per answer token."""
        return self.loss_start - self.loss_expert


class EffectMetadata(Document):
    """The JSON document of an effect file."""

    schema_version: Literal[1] = 1
    kind: Literal["effects"] = "effects"
    base: ModelId
    experts: dict[str, ModelId]
    """Experts in the order of the tensors' second dimension."""
    behaviors: tuple[BehaviorEffect, ...]
    """Behaviours in the order of the tensors' first dimension."""
    path: str
    """`base→sum`: from the base to base + Σ (expert − base)."""
    nodes: tuple[float, ...]
    """Points of the path, 0 … 1, at which gradients were taken."""
    parameters: dict[str, int]
    """Parameters of one unit of head, kv and neuron."""
    dtype: str
    seed: int
    versions: dict[str, str]


@dataclass(frozen=True)
class EffectFile:
    """An effect file in memory."""

    metadata: EffectMetadata
    arrays: dict[str, Array]

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
