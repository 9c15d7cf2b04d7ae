"""Plants a behaviour in chosen components, and distractors beside it.

1. The planted components, drawn by the seed at the plan's depths, are trained on the behaviour.
2. Unplanted components that pass it on when activations are patched (the expert's into the base) best are its relays.
3. The relays and other components of the planted depths are then trained on another behaviour, with examples that keep the
   first as it is, to changes of the same norm. Both changes together make the expert. (Trained apart and added, the two
   destroy each other: the expert then lost the behaviour.)
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.planted.measuring import Measurement, anchor_of, holding
from benchmarks.planted.testbeds import Bed, Plan
from benchmarks.planted.training import Trained, installed, train
from benchmarks.planted.truth import loss
from mechmerge.artifacts import Units
from mechmerge.models.components import Component, parse_component


@dataclass(frozen=True)
class Expert:
    """The expert with what was planted in it."""

    planted: list[Component]
    distractors: list[Component]
    """Relays first."""
    relays: list[Component]
    pool: list[Component]
    """Unplanted components that are looked at, distractors among them."""
    tensors: dict[str, torch.Tensor]
    """Those that differ from the base."""
    losses: dict[str, float]
    """On the truth's examples: of the base, with the planted changes alone, and of the expert."""


def draw_planted(plan: Plan, units: Mapping[str, int], draw: random.Random) -> list[Component]:
    """The plan's components: so many of each kind in each of its depths."""
    return [
        Component(layer, kind, unit)
        for kind, count in plan.planted.items()
        for layer in plan.depths
        for unit in sorted(draw.sample(range(units[kind]), count))
    ]


def draw_pool(
    plan: Plan, units: Mapping[str, int], below: int, planted: list[Component], draw: random.Random
) -> list[Component]:
    """Unplanted components of the plan's kinds below the anchor."""
    taken, pool = set(planted), []
    for kind in plan.planted:
        for layer in range(below):
            free = [c for unit in range(units[kind]) if (c := Component(layer, kind, unit)) not in taken]
            pool += free if plan.pool is None else sorted(draw.sample(free, min(plan.pool, len(free))))
    return pool


def plant(testbed: Bed, plan: Plan, units: Units, seed: int) -> Expert:
    """Makes the expert of a plan; what is trained is kept in `units`."""
    bench, draw = testbed.bench, random.Random(f"{testbed.name} {plan.name} {seed}")
    sizes = {kind: bench.checkpoint.arch.units(kind) for kind in plan.planted}
    planted = draw_planted(plan, sizes, draw)
    pool = draw_pool(plan, sizes, testbed.anchor_layer, planted, draw)
    settings = plan.trained(testbed.settings)
    own = _kept(units, "planted", lambda: train(bench, planted, testbed.behavior, settings))
    alone = installed(bench, [(planted, own.values)])

    def relays() -> list[str]:
        anchor, _ = anchor_of(testbed, alone)
        carried = Measurement(testbed, anchor, alone).activation(pool)
        found = []
        for kind in plan.planted:
            here = [i for i, component in enumerate(pool) if component.kind == kind]
            found += [str(pool[i]) for i in sorted(here, key=lambda i: -carried[i])[: plan.relays]]
        return found

    chosen = [parse_component(name) for name in units.json("relays", relays)]
    distractors = list(chosen)
    for kind in plan.planted:
        wanted = plan.distractors * sum(c.kind == kind for c in planted) - sum(c.kind == kind for c in chosen)
        beside = [c for c in pool if c.kind == kind and c.layer in plan.depths and c not in chosen]
        distractors += sorted(draw.sample(beside, min(wanted, len(beside))))

    def distract() -> Trained:
        with holding(bench, alone):
            return train(bench, distractors, testbed.distraction, replace(settings, dropped=0.0), own.norms)

    other = _kept(units, "distractors", distract)
    tensors = installed(bench, [(planted, own.values), (distractors, other.values)])
    losses = {"base": loss(bench, testbed.truth)}
    for name, changed in (("planted", alone), ("expert", tensors)):
        with holding(bench, changed):
            losses[name] = loss(bench, testbed.truth)
    return Expert(planted, distractors, chosen, pool, tensors, losses)


def _kept(units: Units, name: str, compute: Any) -> Trained:
    """A training run, kept as a unit."""
    run: list[Trained] = []

    def once() -> Trained:
        if not run:
            run.append(compute())
        return run[0]

    values = units.arrays(name, lambda: {key: value.numpy() for key, value in once().values.items()})
    told = units.json(f"{name}-log", lambda: {"norms": once().norms, "losses": once().losses})
    return Trained(
        {key: torch.from_numpy(np.asarray(value)) for key, value in values.items()}, told["norms"], tuple(told["losses"])
    )
