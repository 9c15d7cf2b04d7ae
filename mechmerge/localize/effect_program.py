"""From an effect file to the linear program over it (localize/program.py), and from its solution to coefficients. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mechmerge.errors import InputError, SchemaError
from mechmerge.localize.effect_file import EFFECT_KINDS, LEAST_MASKS, PATHS, EffectFile
from mechmerge.localize.program import Program, solve_program
from mechmerge.models.components import UNIT_KINDS

Array = np.ndarray
DAMAGE = 0.1
"""Most predicted rise of a protected behaviour's loss where no limit is given, nats per answer token."""


@dataclass(frozen=True)
class Solved:
    """A solution as coefficients."""

    rest: tuple[float, ...]
    """Each expert's coefficient of everything but heads, KV groups and neurons."""
    units: dict[str, Array]
    """head, kv, neuron → float32 [experts, layers, units]."""
    worst: float
    """Predicted retained gain of the worst-off behaviour, over both halves of the prompts."""
    gains: Array
    """Predicted gain over the base of each behaviour (of the whole effects), [R]."""


@dataclass(frozen=True)
class Anchored:
    """Where a prediction is exact: coefficients, and the gain over the base that was measured there."""

    rest: tuple[float, ...]
    units: Mapping[str, Array]
    gains: Array
    """[R]"""


def limits_of(effects: EffectFile, given: Mapping[str, float] | None = None) -> dict[str, float]:
    """The limits of damage by behaviour: those given, and `DAMAGE` for the protected behaviours that none is given for.

    Raises:
        InputError: a limit for a behaviour that is not there, or one below 0.
    """
    behaviors = effects.metadata.behaviors
    limits = {b.name: DAMAGE for b in behaviors if b.protected} | dict(given or {})
    if unknown := limits.keys() - {b.name for b in behaviors}:
        known = ", ".join(b.name for b in behaviors)
        raise InputError("limits", expected=f"behaviours among {known}", found=", ".join(sorted(unknown)))
    for name, limit in limits.items():
        if not (np.isfinite(limit) and limit >= 0):
            raise InputError(f"limit of {name}", expected="a number of at least 0", found=str(limit))
    return limits


def check_proven(effects: EffectFile, unproven: bool = False) -> str | None:
    """What is to be said of a file whose predictions are not known to come true; None where they are.

    Raises:
        InputError: they are not known to, or known not to, and `unproven` is not set.
    """
    linearity = effects.metadata.linearity
    if linearity is not None and linearity.holds:
        return None
    found = "not measured" if linearity is None else linearity.failing
    if unproven:
        return f"not proven: predictions of the effects may not come true ({found})"
    raise InputError(
        "policy solve", expected="an effect file whose predictions come true (slope .8 to 1.2, R² at least .8)", found=found,
        fix=f"measure it with `mechmerge effects --check {LEAST_MASKS}` (and --from sum), or say --unproven",
    )  # fmt: skip


def solve_effects(
    effects: EffectFile,
    budget: float = 1.0,
    limits: Mapping[str, float] | None = None,
    agreement: bool = True,
    anchored: Anchored | None = None,
) -> Solved:
    """The best worst case that the effects predict.

    Args:
        effects: the effects; weights of behaviours play no part in a worst case.
        budget: share of each expert's head + KV + neuron parameters, 0 < budget ≤ 1.
        limits: most rise of a behaviour's loss above the base's, see `limits_of`.
        agreement: the worst case is that of both halves of the calibration prompts (else: of their mean). Their slopes are
            their own; where the prediction is exact both stand at the gain that all prompts together have there.
        anchored: where the prediction is exact (default: at the base, or at the sum where the path starts there).

    Raises:
        InputError: a budget or limit out of range, nothing to gain, or limits that cannot be met.
        SchemaError: the file lacks effects, or halves although agreement is asked for.
    """
    if not 0 < budget <= 1:
        raise InputError("budget", expected="a fraction above 0 and at most 1", found=str(budget))
    metadata, names = effects.metadata, [b.name for b in effects.metadata.behaviors]
    for b in metadata.behaviors:
        if not b.protected and b.own_gain <= 0:
            raise InputError(
                f"behaviour {b.name}", expected=f"its own expert {b.expert} to gain on it",
                found=f"a gain of {b.own_gain:.3f} ({metadata.unit})", fix="leave the behaviour out",
            )  # fmt: skip
    whole = _table(effects, "effect")[None]
    samples = _table(effects, "half") if agreement else whole
    experts, shapes = len(metadata.experts), [effects.arrays[f"{kind}.effect"].shape[1:] for kind in UNIT_KINDS]
    at = _anchor(effects, anchored)
    told = limits_of(effects, limits)
    program = Program(
        effects=samples,
        nothing=at.gains - samples @ _row(at.rest, at.units),
        own=np.array([0.0 if b.protected else b.own_gain for b in metadata.behaviors]),
        limits={names.index(name): limit for name, limit in told.items()},
        sizes=np.concatenate([*(np.full(np.prod(s), metadata.parameters[k]) for k, s in zip(UNIT_KINDS, shapes, strict=True)),
                              np.zeros(experts)]),
        expert=np.concatenate([*(np.repeat(np.arange(experts), np.prod(s[1:])) for s in shapes), np.arange(experts)]),
        budget=budget,
    )  # fmt: skip
    solution = solve_program(program, names)
    ends = np.cumsum([np.prod(shape) for shape in shapes])
    parts = np.split(solution.coefficients, ends)
    units: dict[str, Array] = {
        k: part.reshape(s).astype(np.float32) for k, part, s in zip(UNIT_KINDS, parts, shapes, strict=False)
    }
    rest = tuple(float(np.float32(value)) for value in parts[-1])
    gains = at.gains + whole[0] @ (_row(rest, units) - _row(at.rest, at.units))
    return Solved(rest, units, solution.worst, gains)


def _anchor(effects: EffectFile, anchored: Anchored | None) -> Anchored:
    if anchored is not None:
        return anchored
    behaviors, experts = effects.metadata.behaviors, len(effects.metadata.experts)
    value = 0.0 if effects.metadata.path == PATHS["base"] else 1.0
    units: dict[str, Array] = {kind: np.full(effects.arrays[f"{kind}.effect"].shape[1:], value) for kind in UNIT_KINDS}
    return Anchored((value,) * experts, units, value * np.array([b.at_base - b.loss_start for b in behaviors]))


def _row(rest: tuple[float, ...], units: Mapping[str, Array]) -> Array:
    """Coefficients in the program's order: heads, KV groups and neurons of all experts, then the rest of each."""
    return np.concatenate([*(units[kind].ravel() for kind in UNIT_KINDS), np.array(rest)]).astype(np.float64)


def _table(effects: EffectFile, measure: str) -> Array:
    """Effects in the program's order: [R, V], or [2, R, V] of the halves."""
    for kind in UNIT_KINDS:
        for name in (f"{kind}.{measure}", f"{kind}.effect"):
            if name not in effects.arrays:
                raise SchemaError("effect file", expected=f"a tensor {name}", found="none", fix="measure the effects again")
    found = {kind: effects.arrays[f"{kind}.{measure}"].astype(np.float64) for kind in UNIT_KINDS}
    lead = found["head"].shape[:-3]
    others = [
        effects.arrays[f"{k}.{measure}"] for k in EFFECT_KINDS if k not in UNIT_KINDS and f"{k}.{measure}" in effects.arrays
    ]
    rest = sum((array.sum(axis=(-2, -1), dtype=np.float64) for array in others), np.zeros((*lead, found["head"].shape[-3])))
    return np.concatenate([*(array.reshape(*lead, -1) for array in found.values()), rest], axis=-1)
