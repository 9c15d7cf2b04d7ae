"""The rounds file: coefficients that were settled in rounds of measuring where the decision is taken (localize/rounds.py).

Tensors, float32: `<kind>.coefficient` [experts, layers, units], kind: head, kv, neuron; everything else of an expert has the
coefficient that the document's `rest` tells, or 1. One JSON document tells what each round proposed, predicted and got. A file
of the method `solve` (localize/solving.py) is one whose rounds are solutions of a linear program, each measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from mechmerge.artifacts import Document, read_arrays, write_arrays
from mechmerge.errors import SchemaError
from mechmerge.localize.effect_file import Linearity, Tokens
from mechmerge.models.components import UNIT_KINDS
from mechmerge.models.references import ModelId

Array = np.ndarray
CERTAINTY = 2.0
"""Standard errors by which turning a component over must help, where nothing else is asked (benchmarks/log.md, 2026-11-28)."""
MOST_CERTAIN = 100.0
"""Standard errors beyond which nothing is asked for."""


class RoundRecord(Document):
    """One round: what was changed from the round before, or, of the method `solve`, from the sum."""

    proposed: int
    """Components whose effect at the current merge asks for a change on both halves (and with the file's `certainty`)."""
    changed: int
    """Those whose effect along the path to the proposal does as well."""
    predicted: dict[str, float]
    """Change of loss by behaviour that the path's effects predict for what was changed, nats per answer token (`tokens`)."""
    realised: dict[str, float]
    """Change of loss by behaviour that was found."""
    gain: float
    """Weighted gain after the change: Σ weight × (base's loss − loss) / own gain."""
    accepted: bool
    """False for the last round when the gain did not rise: its change was taken back; of two solutions, for the worse one."""


class SolveRecord(Document):
    """What a linear program was asked (localize/program.py), and what came of it."""

    budget: float
    """Share of each expert's head + kv + neuron parameters, 0 … 1."""
    limits: dict[str, float]
    """Most rise of a behaviour's loss above the base's, nats per answer token."""
    agreement: bool
    """Whether the worst case was that of both halves of the prompts."""
    worst_predicted: float
    """Predicted retained gain of the worst-off behaviour, at the accepted solution."""
    worst_realised: float
    """The measured one."""
    path: str
    """The path of the effects that it was solved over first."""
    linearity: Linearity | None
    """How far their predictions come true, where that was measured."""


class SettledBehavior(Document):
    """A behaviour and its losses on the calibration answers, nats per answer token (see `tokens`)."""

    name: str
    expert: str
    """The expert that answers for it; `base` where it is protected."""
    weight: float
    members: tuple[str, ...]
    digests: dict[str, str]
    """Digest of each member's behaviour file."""
    answers: int
    """The expert's verified answers that the loss is measured on."""
    loss_base: float
    loss_expert: float
    loss_sum: float
    """At the sum of all experts, where the rounds start."""
    loss_merge: float
    """At the coefficients of this file."""


class RoundsMetadata(Document):
    """The JSON document of a rounds file."""

    schema_version: Literal[1] = 1
    kind: Literal["rounds"] = "rounds"
    base: ModelId
    method: Literal["rounds", "solve"] = "rounds"
    """How the coefficients were found."""
    tokens: Tokens = "all"
    """Which tokens of an answer its loss is the mean over."""
    certainty: float = 0.0
    """Standard errors by which a change had to help, beside helping on both halves of the prompts; of the method `rounds`."""
    experts: dict[str, ModelId]
    """Experts in the order of the tensors' first dimension."""
    rest: dict[str, float] = Field(default_factory=dict)
    """Coefficient of everything else of an expert; 1 where none is told."""
    solve: SolveRecord | None = None
    """Of the method `solve`."""
    behaviors: tuple[SettledBehavior, ...]
    rounds: tuple[RoundRecord, ...]
    parameters: dict[str, int]
    """Parameters of one head, KV group and neuron."""
    dtype: str
    seed: int
    versions: dict[str, str]


@dataclass(frozen=True)
class RoundsFile:
    """A rounds file in memory."""

    metadata: RoundsMetadata
    arrays: dict[str, Array]

    def write(self, path: Path) -> None:
        """Writes the file atomically, after checking its tensors."""
        _check(self.arrays, self.metadata, str(path))
        write_arrays(path, self.arrays, self.metadata)


def read_rounds(path: Path) -> RoundsFile:
    """Reads and checks a rounds file.

    Raises:
        InputError: no such file.
        SchemaError: not a rounds file, another schema version, or tensors of the wrong name, shape or values.
    """
    arrays, metadata = read_arrays(path, RoundsMetadata)
    _check(arrays, metadata, str(path))
    return RoundsFile(metadata, arrays)


def _check(arrays: dict[str, Array], metadata: RoundsMetadata, where: str) -> None:
    expected = {f"{kind}.coefficient" for kind in UNIT_KINDS}
    if set(arrays) != expected:
        raise SchemaError(where, expected=", ".join(sorted(expected)), found=", ".join(sorted(arrays)) or "nothing")
    for name, array in arrays.items():
        if array.dtype != np.float32 or array.ndim != 3 or array.shape[0] != len(metadata.experts):
            found = f"{array.dtype} {list(array.shape)}"
            raise SchemaError(f"{where}: {name}", expected="float32 [experts, layers, units]", found=found)
        if not np.isfinite(array).all():
            raise SchemaError(f"{where}: {name}", expected="finite coefficients", found="NaN or an infinite one")
