"""What part each component plays: the four measurements of a score file read together.

Weight patching (sufficiency) asks whose parameters hold the behaviour, activation patching where its signal passes, and the
output measure what restores the expert's next-token distribution after the anchor (arXiv 2604.13694, §III-E and IV-D to F):

    source      weight patching high
    router      activation patching high, and weight patching low beside it: it gathers or relays a signal made elsewhere
    execution   at or above the anchor, and its weights bring the output nearer to the expert's
    inert       every one of these low, and knockout too where it was measured
    unclear     measured, but between high and low, or too noisy to be called either
    unknown     what would decide was not measured

The last two are ours: a role is never guessed. So are the thresholds (`RoleThresholds`), which are stored with the summary, and
the use of standard errors: *high* is above the threshold and clearly above 0, *low* is below a share of the threshold and
clearly below the threshold. A role of one component alone is relative to the rest staying the base's.

Shapes: L layers, U units of a kind. Components at or above the anchor's layer are judged on the output alone: on the anchor
they score 0 by construction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from mechmerge.artifacts import Document
from mechmerge.models.components import SCORED_KINDS, Component

Array = np.ndarray
Role = Literal["source", "router", "execution", "inert", "unclear", "unknown"]
ROLES: tuple[Role, ...] = ("source", "router", "execution", "inert", "unclear", "unknown")
ROLE_NAMES: dict[str, str] = {
    "source": "source carrier",
    "router": "aggregator / router",
    "execution": "execution",
    "inert": "inert",
    "unclear": "unclear: near a threshold or within its error",
    "unknown": "unknown: not measured",
}
"""What each role is called where it is shown."""
MODULES = ("attention", "mlp")
THIRDS = ("first", "middle", "last")
NO_ROLES = "no roles: raw differences, since the gap between expert and base is not above 0"
"""What stands in the place of roles where there is nothing to recover."""
STRONGEST = 3


class RoleThresholds(Document):
    """When a measure counts as high or low.

    A component's share of the whole gap is set against its kind's size, since a neuron cannot do what a layer does: if effects
    added up, twenty modules, fifty heads or two hundred neurons at the thresholds would make the whole gap (ours).
    """

    module: float = Field(default=0.05, gt=0, le=1)
    """Layers, attentions and MLPs: least recovery that is high, above 0 … 1."""
    head: float = Field(default=0.02, gt=0, le=1)
    """Heads and KV groups: least recovery that is high, above 0 … 1; at most `module`."""
    neuron: float = Field(default=0.005, gt=0, le=1)
    """Neurons: least recovery that is high, above 0 … 1; at most `head`."""
    output: float = Field(default=0.05, gt=0, le=1)
    """Least share of the base's divergence from the expert that is high for execution, above 0 … 1."""
    low: float = Field(default=0.5, gt=0, lt=1)
    """What is low, as a share of the threshold; for a router, as a share of its own activation patching. Between 0 and 1."""
    errors: float = Field(default=2.0, ge=0)
    """Standard errors over prompts that a high one lies above 0, and a low one below the threshold, ≥ 0 (0: means alone)."""

    @model_validator(mode="after")
    def _parts_below_wholes(self) -> RoleThresholds:
        if self.head > self.module:
            raise ValueError(f"head ({self.head:g}) must not be above module ({self.module:g}): heads are parts of modules")
        if self.neuron > self.head:
            raise ValueError(f"neuron ({self.neuron:g}) must not be above head ({self.head:g}): a neuron does less than a head")
        return self

    def high(self, kind: str) -> float:
        """Least recovery of a kind that is high."""
        return {"head": self.head, "kv": self.head, "neuron": self.neuron}.get(kind, self.module)


class Strong(Document):
    """A module with its role and what made it stand out."""

    component: str
    """Its name, as L7.mlp."""
    value: float
    """Recovery by weight patching of a source, by activation patching of a router; the output's share of an execution one."""
    stderr: float | None
    """Standard error of that over prompts; None where it was not stored."""


class Depth(Document):
    """Some layers below the anchor, and the positive scores of their modules; None where nothing was measured."""

    first: int
    """First layer."""
    last: int
    """Last layer, itself included."""
    sufficiency: dict[str, float | None]
    """`attention` and `mlp` → sum of positive weight patching, in units of recovery, ≥ 0."""
    activation: dict[str, float | None]
    """The same of activation patching."""


class RoleSummary(Document):
    """The roles of one score file: how many of each, and at which depth. The roles themselves follow from its arrays."""

    thresholds: RoleThresholds
    """The thresholds that the roles were given by."""
    counts: dict[str, dict[Role, int]]
    """kind → role → components; roles that no component of the kind has are left out."""
    layers: tuple[Depth, ...]
    """Every layer below the anchor."""
    thirds: tuple[Depth, ...]
    """The layers below the anchor in three parts, shallow first (fewer where there are fewer layers)."""
    sources: tuple[Strong, ...]
    """The strongest modules that are sources."""
    routers: tuple[Strong, ...]
    """The strongest modules that are routers."""
    execution: tuple[Strong, ...]
    """The strongest modules at or above the anchor that restore the output."""

    @property
    def sentence(self) -> str:
        """Which depth holds the sources and which routes, in one line."""
        parts = [
            f"weight patching (sources): {_where(self.thirds, 'sufficiency')}{_named(self.sources, 'sources')}",
            f"activation patching (routes): {_where(self.thirds, 'activation')}{_named(self.routers, 'routers')}",
        ]
        if self.execution:
            parts.append(f"output after the anchor{_named(self.execution, 'execution')}")
        return "; ".join(parts)


# ------------------------------------------------------------------------------------------------------------------- roles
def roles_of(arrays: Mapping[str, Array], kind: str, anchor_layer: int, thresholds: RoleThresholds) -> Array:
    """The role of every component of a kind.

    Args:
        arrays: the score file's, in recoveries.
        kind: one of its kinds.
        anchor_layer: layers from here on are judged on the output.
        thresholds: what is high and low.

    Returns:
        [L, U] of the names in `ROLES`; [0, 0] where the kind was not measured at all.
    """
    shape = _shape(arrays, kind)
    weight, carried, needed, restored = (
        _Judged(
            arrays, f"{kind}.{measure}", shape, thresholds.output if measure == "output" else thresholds.high(kind), thresholds
        )
        for measure in ("sufficiency", "activation", "necessity", "output")
    )
    roles = np.full(shape, "unknown", dtype=f"U{max(map(len, ROLES))}")
    below = np.broadcast_to(np.arange(shape[0])[:, None] < anchor_layer, shape)
    relays = carried.high & ~weight.high & (weight.top <= thresholds.low * carried.value)
    known = weight.known & carried.known
    roles[below & known] = "unclear"
    roles[below & known & weight.low & carried.low & (needed.low | ~needed.known)] = "inert"
    roles[below & known & relays] = "router"
    roles[below & weight.high] = "source"
    roles[~below & restored.known] = "unclear"
    roles[~below & restored.low] = "inert"
    roles[~below & restored.high] = "execution"
    return roles


class _Judged:
    """One measure of a kind against its threshold; comparisons with NaN are False: what is not known is neither."""

    def __init__(
        self, arrays: Mapping[str, Array], name: str, shape: tuple[int, int], high: float, rule: RoleThresholds
    ) -> None:
        missing = np.full(shape, np.nan)
        self.value = np.asarray(arrays.get(name, missing), float)
        # Without an error nothing is said to be clearly above or below anything.
        self.error = np.asarray(arrays.get(f"{name}.stderr", missing), float)
        margin = rule.errors * self.error if rule.errors else np.zeros(shape)
        self.known = np.isfinite(self.value) & np.isfinite(margin)
        self.top = self.value + margin
        self.high = (self.value >= high) & (self.value >= margin)
        self.low = (self.value < rule.low * high) & (self.top < high)


def _shape(arrays: Mapping[str, Array], kind: str) -> tuple[int, int]:
    for name, array in arrays.items():
        if name.startswith(f"{kind}.") and np.ndim(array) == 2:
            return array.shape[0], array.shape[1]
    return 0, 0


# ----------------------------------------------------------------------------------------------------------------- summary
def summarize(
    arrays: Mapping[str, Array], anchor_layer: int, scale: str, thresholds: RoleThresholds | None = None
) -> RoleSummary | None:
    """The summary of a score file's roles; None where its scores are no recoveries (`NO_ROLES` says so in its place).

    Args:
        arrays: the score file's.
        anchor_layer: the anchor stands after so many layers.
        scale: `recovery`, or `difference` where the gap is not above 0: raw differences have no roles.
        thresholds: what is high and low; None: the defaults.
    """
    if scale != "recovery":
        return None
    rule = thresholds or RoleThresholds()
    found: dict[str, Array] = {
        kind: roles_of(arrays, kind, anchor_layer, rule) for kind in SCORED_KINDS if _shape(arrays, kind)[0]
    }
    counts: dict[str, dict[Role, int]] = {
        kind: {role: int((roles == role).sum()) for role in ROLES if (roles == role).any()} for kind, roles in found.items()
    }
    below = np.arange(min(anchor_layer, max((len(roles) for roles in found.values()), default=0)))
    return RoleSummary(
        thresholds=rule,
        counts=counts,
        layers=tuple(_depth(arrays, np.array([layer])) for layer in below),
        thirds=tuple(_depth(arrays, part) for part in np.array_split(below, len(THIRDS)) if part.size),
        sources=_strongest(arrays, found, "source", "sufficiency"),
        routers=_strongest(arrays, found, "router", "activation"),
        execution=_strongest(arrays, found, "execution", "output"),
    )


def _depth(arrays: Mapping[str, Array], layers: Array) -> Depth:
    def total(kind: str, measure: str) -> float | None:
        values = arrays.get(f"{kind}.{measure}")
        here = np.zeros(0) if values is None else np.asarray(values, float)[layers]
        here = here[np.isfinite(here)]
        return float(here[here > 0].sum()) if here.size else None

    return Depth(
        first=int(layers[0]),
        last=int(layers[-1]),
        sufficiency={kind: total(kind, "sufficiency") for kind in MODULES},
        activation={kind: total(kind, "activation") for kind in MODULES},
    )


def _strongest(arrays: Mapping[str, Array], found: Mapping[str, Array], role: Role, measure: str) -> tuple[Strong, ...]:
    entries = []
    for kind in MODULES:
        for layer in np.flatnonzero((found[kind] == role)[:, 0]) if kind in found else ():
            errors = arrays.get(f"{kind}.{measure}.stderr")
            error = None if errors is None or not np.isfinite(errors[layer, 0]) else float(errors[layer, 0])
            value = float(arrays[f"{kind}.{measure}"][layer, 0])
            entries.append(Strong(component=str(Component(int(layer), kind)), value=value, stderr=error))
    return tuple(sorted(entries, key=lambda entry: -entry.value)[:STRONGEST])


def _where(thirds: tuple[Depth, ...], measure: Literal["sufficiency", "activation"]) -> str:
    """Which kind holds most of a measure's positive sum, and which kind of which third, with their shares."""
    cells = {(kind, at): getattr(depth, measure)[kind] for at, depth in enumerate(thirds) for kind in MODULES}
    found = {cell: value for cell, value in cells.items() if value is not None}
    total = sum(found.values())
    if not found:
        return "not measured on modules"
    if total <= 0:
        return "nothing above 0"
    by_kind = {kind: sum(value for cell, value in found.items() if cell[0] == kind) for kind in MODULES}
    more = max(MODULES, key=lambda kind: by_kind[kind])
    kind, at = max(found, key=lambda cell: found[cell])
    names = {"attention": "attention", "mlp": "MLPs"}
    only = "" if len({cell[0] for cell in found}) > 1 else " (the other was not measured)"
    place = f"{THIRDS[at]} third" if len(thirds) == len(THIRDS) else "part"
    share = f"{100 * found[kind, at] / total:.0f} %"
    return (
        f"{100 * by_kind[more] / total:.0f} % in {names[more]}{only}, most in the {names[kind]} of the {place} "
        f"({_layers(thirds[at])}: {share})"
    )


def _layers(depth: Depth) -> str:
    return f"L{depth.first}" if depth.first == depth.last else f"L{depth.first}–L{depth.last}"


def _named(strong: tuple[Strong, ...], what: str) -> str:
    if not strong:
        return f", no module is clearly one of the {what}"
    said = (
        f"{entry.component} {entry.value:.2f}" + ("" if entry.stderr is None else f" ± {entry.stderr:.2f}") for entry in strong
    )
    return f", strongest {', '.join(said)}"
