"""The score file: what localization measured of one expert and one behaviour (safetensors with one JSON document).

Tensors, float32, NaN where not measured:
    <kind>.<measure>          [layers, units]   kind: layer, attention, mlp, head, kv, neuron
    <kind>.<measure>.stderr   [layers, units]   standard error over prompts, those of one topic together
    <kind>.output             [layers, units]   layer, attention, mlp at or above the anchor: share of the base's divergence
                                                from the expert that their expert weights take away; NaN below
    <kind>.delta_norm         [layers, units]   Frobenius norm of expert − base
    <kind>.parameters         [layers]          parameters of one unit (int64)
measure: screen, sufficiency, necessity, activation. These are exactly 0 for components above the anchor. `output` is 1 −
KL(expert ‖ patched) / KL(expert ‖ base) of the next-token distribution: 0 is the base, 1 the expert, below 0 further away.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from mechmerge.artifacts import Document, read_arrays, write_arrays
from mechmerge.errors import SchemaError
from mechmerge.localize.adaptive import VerificationRecord
from mechmerge.localize.curve_record import SetCurves
from mechmerge.localize.roles import RoleSummary, roles_of
from mechmerge.models.components import SCORED_KINDS
from mechmerge.models.references import ModelId

Array = np.ndarray
MEASURES = ("screen", "sufficiency", "necessity", "activation", "output")


class AnchorRecord(Document):
    """An anchor's layer and validity figures (localize/anchor.py says how each is measured)."""

    layer: int
    """Residual stream after this many layers (1 … layers)."""
    valid: bool
    reasons: tuple[str, ...] = ()
    """Why it is not valid; empty when it is."""
    separation: float
    """Area under the ROC curve of s(expert, x⁺) against s(expert, x⁻) on held-out prompts, 0 … 1."""
    gap: float
    """Mean of s(expert, x⁺) − s(base, x⁺) over held-out prompts, in units of the residual stream."""
    gap_low: float
    """Lower end of the gap's 95 % bootstrap interval over topics."""
    steering_base: float | None = None
    """Pass rate of the base's answers to held-out prompts (x⁺), 0 … 1; None without a verifier."""
    steering_steered: float | None = None
    """The same with the anchor vector added to the base's residual stream."""
    stability: float | None = Field(default=None, ge=0, le=1)
    """Share of resamples of the topics, in both halves, in which the anchor separates and its gap is above 0; None in older
    files.
    """
    stability_cosine: float | None = Field(default=None, ge=-1.001, le=1.001)
    """Mean cosine between the vector and those of resampled topics; noise alone has about .71. None in older files."""
    stability_cosine_low: float | None = Field(default=None, ge=-1.001, le=1.001)
    """The 5 % quantile of those cosines."""
    prompts: int
    """Prompts that made the vector."""
    held_out: int
    """Prompts that validity and recovery are measured on (others than those)."""

    @property
    def stability_text(self) -> str | None:
        """The bootstrap's figures in words; None where it was not done."""
        if self.stability is None or self.stability_cosine is None:
            return None
        return f"passes in {self.stability:.2f} of resamples, cosine {self.stability_cosine:.2f}"

    @property
    def measured_on(self) -> int:
        """Prompts that scores are measured on."""
        return self.held_out


class LossRecord(Document):
    """What a loss score file measures in place of an anchor's state: −loss of the expert's own answers, over all layers."""

    base: float
    """The base's negative log-likelihood of the answers, nats per token, mean over them."""
    expert: float
    """The expert's own."""
    gap: float
    """base − expert."""
    gap_low: float
    """Lower end of the gap's 95 % bootstrap interval over topics."""
    prompts: int
    """Prompts asked."""
    answers: int
    """The expert's greedy answers that passed the verifier: what scores are measured on."""

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it is not valid; empty when it is."""
        low = self.gap_low
        return () if low > 0 else (f"base − expert loss {self.gap:.2f} with lower end {low:.2f}, not above 0",)

    @property
    def valid(self) -> bool:
        """Whether the expert lowers the loss."""
        return not self.reasons

    @property
    def measured_on(self) -> int:
        """Prompts that scores are measured on."""
        return self.answers


class ScoreMetadata(Document):
    """The JSON document of a score file."""

    schema_version: Literal[1] = 1
    kind: Literal["scores"] = "scores"
    base: ModelId
    expert: ModelId
    behavior: str
    behavior_digest: str
    chat_template: str
    """sha256 of the chat template that formatted the prompts, or `none`."""
    anchor: AnchorRecord | None = None
    """The anchor whose state scores are measured on; None where it is the loss."""
    loss: LossRecord | None = None
    """The loss that scores are measured on; None where it is an anchor."""
    scale: Literal["recovery", "difference"]
    """`recovery`: 0 is the base and 1 the expert. `difference`: raw change of the state, where the gap is not above 0."""
    state_base: float
    """The base's readout, mean over prompts: s along the anchor, or −loss."""
    state_expert: float
    """The expert's."""
    identity_control: float
    """Largest score of the base patched with itself; always 0."""
    dtype: str
    seed: int
    integrate: int = 0
    """Steps of the path from base to expert that the screen was averaged over; 0: at the base (localize/path.py)."""
    verified: dict[str, int]
    """Components of each kind that were really patched."""
    curves: SetCurves | None = None
    """Set curves beside their controls (localize/curves.py); None where they were not measured."""
    roles: RoleSummary | None = None
    """How many components play which part, and at which depth (localize/roles.py); None where that was not judged, and always
    where `scale` is `difference`.
    """
    verification: dict[str, VerificationRecord] = Field(default_factory=dict)
    """How far the best components of a kind are known (localize/adaptive.py), by kind; only kinds verified by `auto`."""
    versions: dict[str, str]

    @model_validator(mode="after")
    def _one_source(self) -> ScoreMetadata:
        if (self.anchor is None) == (self.loss is None):
            raise ValueError("exactly one of anchor and loss must be given")
        return self

    @property
    def source(self) -> Literal["anchor", "loss"]:
        """What scores are measured on."""
        return "anchor" if self.anchor is not None else "loss"

    @property
    def label(self) -> str:
        """The behaviour, and the source where it is not an anchor."""
        return self.behavior if self.loss is None else f"{self.behavior} by loss"

    @property
    def where(self) -> str:
        """What scores are measured on, in words."""
        return "the loss of its own answers" if self.anchor is None else f"anchor after layer {self.anchor.layer}"

    @property
    def below(self) -> int | None:
        """Layers whose components can have a score; None for all of them."""
        return None if self.anchor is None else self.anchor.layer

    @property
    def record(self) -> AnchorRecord | LossRecord:
        """The figures of what scores are measured on."""
        found = self.anchor if self.anchor is not None else self.loss
        if found is None:
            raise ValueError("exactly one of anchor and loss must be given")
        return found

    @property
    def valid(self) -> bool:
        """Whether the scores mean what they are taken for: a valid anchor, or a loss that the expert lowers."""
        return self.record.valid

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why they do not; empty where they do."""
        return () if self.valid else self.record.reasons or ("no reason stored",)

    @model_validator(mode="after")
    def _roles_of_recoveries(self) -> ScoreMetadata:
        if self.roles is not None and self.scale != "recovery":
            raise ValueError("roles need scale `recovery`: raw differences (scale `difference`) have none")
        return self


@dataclass(frozen=True)
class ScoreFile:
    """A score file in memory."""

    metadata: ScoreMetadata
    arrays: dict[str, Array]

    def score(self, kind: str) -> Array:
        """[layers, units]: sufficiency where it was measured, the screen elsewhere, −inf where neither was (or not an
        anchor policy's).
        """
        screen = self.arrays.get(f"{kind}.screen")
        verified = self.arrays.get(f"{kind}.sufficiency")
        if screen is None and verified is None:
            raise SchemaError(f"score file of {self.metadata.behavior}", expected=f"scores of kind {kind}", found="none")
        first = verified if verified is not None else np.full_like(screen, np.nan)
        second = screen if screen is not None else np.full_like(first, np.nan)
        merged = np.where(np.isnan(first), second, first)
        return np.where(np.isnan(merged), -np.inf, merged)

    def roles(self, kind: str) -> Array | None:
        """[layers, units]: the role of every component of a kind by the stored thresholds; None where none were judged."""
        summary = self.metadata.roles
        if summary is None or kind not in summary.counts:
            return None
        return roles_of(self.arrays, kind, self.depth, summary.thresholds)

    @property
    def depth(self) -> int:
        """Layers whose components can have a score."""
        below = self.metadata.below
        return len(next(iter(self.arrays.values()))) if below is None else below

    def write(self, path: Path) -> None:
        """Writes the file atomically, after checking its tensors."""
        _check(self.arrays, str(path))
        write_arrays(path, self.arrays, self.metadata)


def read_scores(path: Path) -> ScoreFile:
    """Reads and checks a score file.

    Raises:
        InputError: no such file.
        SchemaError: not a score file, another schema version, or tensors of the wrong name, shape or dtype.
    """
    arrays, metadata = read_arrays(path, ScoreMetadata)
    _check(arrays, str(path))
    return ScoreFile(metadata, arrays)


def _check(arrays: dict[str, Array], where: str) -> None:
    layers = {array.shape[0] for array in arrays.values() if array.ndim}
    if len(layers) != 1:
        raise SchemaError(where, expected="tensors with one number of layers", found=str(sorted(layers)))
    for name, array in arrays.items():
        kind, _, measure = name.partition(".")
        base = measure.removesuffix(".stderr")
        if kind not in SCORED_KINDS or base not in (*MEASURES, "delta_norm", "parameters"):
            raise SchemaError(where, expected="tensors named <kind>.<measure>", found=name)
        if base != "parameters" and (array.ndim != 2 or array.dtype != np.float32):
            raise SchemaError(
                f"{where}: {name}", expected="float32 [layers, units]", found=f"{array.dtype} {list(array.shape)}"
            )
        if np.isinf(array).any():
            raise SchemaError(f"{where}: {name}", expected="finite scores or NaN", found="an infinite one")
