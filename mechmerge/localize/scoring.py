"""All measurements of one expert on one readout: screening, weight patching, knockout, activation patching, and their control.

Everything is a unit that is written when it is done, named by what was measured, so a call that was interrupted or asks for
more goes on from there. The bench holds the base between calls.

Shapes: n prompts, L layers, U units.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np

from mechmerge.artifacts import Units, digest
from mechmerge.errors import LocalizeError
from mechmerge.localize.adaptive import VerificationRecord, verify
from mechmerge.localize.anchor import standard_error
from mechmerge.localize.bench import Bench, layer_source
from mechmerge.localize.measure import Source, best_units, screen
from mechmerge.localize.patching import Patcher, Run
from mechmerge.localize.path import along_path
from mechmerge.localize.resume import Readout
from mechmerge.localize.settings import CALLED, MEASURES, Measure
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.models.components import SCORED_KINDS, UNIT_KINDS, Component, parse_component
from mechmerge.progress import SILENT, Progress, track

Array = np.ndarray
MODULE_KINDS = ("attention", "mlp", "layer")
ROUTERS = 4
"""Attentions with the highest activation scores whose heads and KV groups are all measured: a router does little by its
weights, so the screen does not find it.
"""


class Subject(NamedTuple):
    """What is asked, and what is read of it."""

    ids: list[list[int]]
    """Token ids of each prompt."""
    topics: list[str]
    """Topic of each prompt."""
    readout: Readout
    """Of all of them."""
    part: Callable[[Sequence[int]], Readout]
    """The readout of some of the prompts."""


class Controls(NamedTuple):
    """What the models themselves give."""

    base: Array
    """The base's readout, [n]."""
    expert: Array
    """The expert's, [n]."""
    identity: float
    """Largest change where components are replaced by the base's own."""


class Scorer:
    """Measures components of one pair on one subject.

    Args:
        bench: holds the base's weights, and does so again after every call.
        base: the base.
        expert: the expert.
        subject: prompts and readout.
        units: where results are kept.
        key: prefix of their names.
        name: what is measured, for errors and progress.
        progress: told of every layer whose components are replaced.
    """

    def __init__(
        self,
        bench: Callable[[], Bench],
        base: Checkpoint,
        expert: Checkpoint,
        subject: Callable[[], Subject],
        below: int,
        units: Units,
        key: str,
        name: str,
        progress: Progress = SILENT,
    ) -> None:
        self._bench, self._subject, self.below = bench, subject, below
        self.base, self.expert, self.units, self.key, self.name, self.progress = base, expert, units, key, name, progress
        self.source, self.own = layer_source(expert), layer_source(base)
        self._on_bench = "base"
        self._known: dict[Measure, dict[str, Array]] = {measure: {} for measure in MEASURES}

    # ------------------------------------------------------------------------------------------------------------ apparatus
    @functools.cached_property
    def bench(self) -> Bench:
        """Loaded when a unit is missing."""
        return self._bench()

    @functools.cached_property
    def subject(self) -> Subject:
        """Made when a unit is missing."""
        return self._subject()

    @functools.cached_property
    def _patcher(self) -> Patcher:
        return Patcher(self.bench, self.subject.ids, self.subject.readout)

    @functools.cached_property
    def _base_run(self) -> Run:
        self._hold("base")
        return self._patcher.run()

    @functools.cached_property
    def _expert_run(self) -> Run:
        self._hold("expert")
        return self._patcher.run()

    def _hold(self, which: str) -> None:
        if self._on_bench != which:
            self.bench.load(self.base if which == "base" else self.expert)
            self._on_bench = which

    # --------------------------------------------------------------------------------------------------------- measurements
    def screened(self, batch: int, steps: int = 0) -> dict[str, Array]:
        """First-order change of the readout: each scored kind → [n, L, U].

        Args:
            batch: prompts a forward pass with gradients.
            steps: of the path from base to expert; 0 screens at the base.
        """

        def compute() -> dict[str, Array]:
            subject = self.subject
            rows = [range(i, min(i + batch, len(subject.ids))) for i in range(0, len(subject.ids), batch)]
            batches = [self.bench.batch([subject.ids[i] for i in some]) for some in rows]
            readouts = [subject.part(some) for some in rows]

            def here(origin: Source | None) -> dict[str, Array]:
                return screen(self.bench, batches, readouts, self.source, origin)

            return along_path(self.bench, self.base.tensor, self.expert.tensor, steps, here)

        found = self.units.arrays(f"{self.key}-screen-{steps}", compute)
        if not all(np.isfinite(array).all() for array in found.values()):
            raise LocalizeError(f"behaviour {self.name}", expected="finite scores", found="NaN", fix="try --dtype float32")
        return found

    def patched(self, measure: Measure, components: Iterable[Component]) -> dict[str, Array]:
        """The change of the readout by component, each alone, float64 [n], in the readout's own unit.

        Args:
            measure: `sufficiency`: the expert's weights in the base; `necessity`: how much lower the expert's readout is with
                the base's weights in; `activation`: the expert's activations in the base.
            components: any of layers below the readout.
        """
        known, asked = self._known[measure], set(components)
        new = sorted((c for c in asked if str(c) not in known), key=lambda c: (c.layer, c.kind, c.unit))
        try:
            by_layer = [(layer, list(here)) for layer, here in groupby(new, key=lambda component: component.layer)]
            label = f"{self.name}: {CALLED[measure]} below layer {self.below}"
            for layer, together in track(by_layer, label, len(by_layer), self.progress):
                names = digest([str(component) for component in together])[:12]
                compute = functools.partial(self._patch, measure, together)
                known |= self.units.arrays(f"{self.key}-{measure}-{layer}-{names}", compute)
        finally:
            self._hold("base")
        if not all(np.isfinite(known[str(component)]).all() for component in new):
            raise LocalizeError(f"behaviour {self.name}", expected="finite scores", found="NaN", fix="try --dtype float32")
        return {str(component): known[str(component)] for component in asked}

    def all_patched(self, measure: Measure) -> dict[str, Array]:
        """Everything that `patched` has found."""
        return dict(self._known[measure])

    def _patch(self, measure: Measure, components: Sequence[Component]) -> dict[str, Array]:
        match measure:
            case "sufficiency":
                run = self._base_run
                self._hold("base")
                return self._patcher.patch(run, components, self.source)
            case "activation":
                run, other = self._base_run, self._expert_run
                self._hold("base")
                return self._patcher.transplant(run, other, components, self.source)
            case "necessity":
                run = self._expert_run
                self._hold("expert")
                return {name: -change for name, change in self._patcher.patch(run, components, self.own).items()}

    def controls(self) -> Controls:
        """The models' own readouts, and the base patched with itself.

        Raises:
            LocalizeError: that changes anything at all, or a readout is not a number.
        """

        def compute() -> dict[str, Array]:
            layers = sorted({0, self.below // 2, self.below - 1})
            tried = [Component(layer, kind) for layer in layers for kind in SCORED_KINDS]
            self._hold("base")
            run = self._base_run
            changes = [
                *self._patcher.patch(run, tried, self.own).values(),
                *self._patcher.transplant(run, run, tried, self.own).values(),
            ]
            return {
                "base": run.state,
                "expert": self._expert_run.state,
                "identity": np.array([max(float(np.abs(change).max()) for change in changes)]),
            }

        try:
            found = self.units.arrays(f"{self.key}-control", compute)
        finally:
            self._hold("base")
        controls = Controls(found["base"], found["expert"], float(found["identity"][0]))
        if not (np.isfinite(controls.base).all() and np.isfinite(controls.expert).all()):
            raise LocalizeError(f"behaviour {self.name}", expected="finite states", found="NaN", fix="try --dtype float32")
        if controls.identity != 0:
            raise LocalizeError(
                f"behaviour {self.name}", expected="0 for the base patched with itself", found=str(controls.identity)
            )
        return controls

    # ------------------------------------------------------------------------------------------------------------- choices
    def modules(self) -> list[Component]:
        """Every attention, MLP and layer below the readout."""
        return [Component(layer, kind) for layer in range(self.below) for kind in MODULE_KINDS]

    def routers(self, activations: Mapping[str, Array]) -> list[Component]:
        """Heads and KV groups of the attentions with the highest activation scores."""
        arch = self.base.arch
        scores = [float(activations[str(Component(layer, "attention"))].mean()) for layer in range(self.below)]
        best = sorted(range(self.below), key=lambda layer: -scores[layer])[:ROUTERS]
        return [
            Component(layer, kind, unit)
            for layer in sorted(best)
            for kind in ("head", "kv")
            for unit in range(arch.units(kind))
        ]

    def best(self, means: Mapping[str, Array], count: int) -> list[Component]:
        """The best heads, KV groups and neurons, `count` of each, by their mean screen [L, U]."""
        return best_units(dict(means), self.below, count)

    def settled(
        self, means: Mapping[str, Array], scale: float, top: int, confidence: float, seed: int
    ) -> tuple[list[Component], dict[str, VerificationRecord]]:
        """The `top` best components of each kind, after replacing as many as it takes to know them (localize/adaptive.py).

        Args:
            means: the screen of each kind, [L, U], in the readout's unit.
            scale: what the scores are divided by.
        """
        chosen: list[Component] = []
        records: dict[str, VerificationRecord] = {}
        for kind in UNIT_KINDS:
            units = means[kind].shape[1]

            def measure(indices: list[int], kind: str = kind, units: int = units) -> Array:
                asked = [Component(index // units, kind, index % units) for index in indices]
                found = self.patched("sufficiency", asked)
                return np.stack([found[str(component)] for component in asked]) / scale

            result = verify(
                means[kind][: self.below] / scale,
                measure,
                top,
                confidence=confidence,
                # A component that does much and of which the screen says nothing is in no sample: where there are few, the
                # draw alone must vouch for all but one of the best.
                assured=None if kind == "neuron" else 1,
                topics=self.subject.topics,
                seed=seed,
            )
            records[kind] = result.record
            chosen += [Component(int(index) // units, kind, int(index) % units) for index in result.best]
        return chosen, records


def score_arrays(
    screened: Mapping[str, Array],
    measured: Mapping[Measure, Mapping[str, Array]],
    scale: float,
    below: int,
    topics: Sequence[str] | None = None,
) -> dict[str, Array]:
    """The tensors of a score file: means over prompts and their standard errors by topic, float32 [L, U].

    Args:
        screened: [n, L, U] of each kind.
        measured: [n] of each component, by measure.
        scale: what everything is divided by.
        below: components from this layer on score exactly 0 on the readout.
        topics: the topic of every prompt; each prompt is its own where None.
    """
    arrays: dict[str, Array] = {}
    for kind, values in screened.items():
        arrays[f"{kind}.screen"] = values.mean(0) / scale
        arrays[f"{kind}.screen.stderr"] = standard_error(values, topics) / abs(scale)
        for measure in measured:
            blank = np.full(values.shape[1:], np.nan)
            blank[below:] = 0.0
            arrays[f"{kind}.{measure}"], arrays[f"{kind}.{measure}.stderr"] = blank, blank.copy()
    for measure, changes in measured.items():
        for name, change in changes.items():
            component = parse_component(name)
            place = (component.layer, component.unit)
            arrays[f"{component.kind}.{measure}"][place] = change.mean() / scale
            arrays[f"{component.kind}.{measure}.stderr"][place] = standard_error(change, topics) / abs(scale)
    return {name: array.astype(np.float32) for name, array in arrays.items()}
