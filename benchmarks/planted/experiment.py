"""One plan on one testbed: plant, find out the truth, measure, rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.planted import ranking, truth
from benchmarks.planted.measuring import MEASURES, Measurement, anchor_of, magnitude
from benchmarks.planted.planting import plant
from benchmarks.planted.testbeds import Plan, Testbed
from mechmerge.artifacts import Units
from mechmerge.versions import versions

Figures = dict[str, Any]


def experiment(testbed: Testbed, plan: Plan, folder: Path, seed: int) -> Figures:
    """All figures of one plan, named `testbed/plan kind: figure`; what is done is kept in `folder`."""
    bench = testbed.bench
    inputs = {
        "settings": [repr(testbed.settings), repr(plan), testbed.anchor_layer, seed],
        "base": {name: float(p.detach().double().abs().sum()) for name, p in bench.parameters.items()},
        "examples": [testbed.behavior, testbed.distraction, testbed.vector, testbed.score, testbed.truth],
        "versions": versions(),
    }
    units = Units(folder / testbed.name / plan.name, inputs)
    expert = plant(testbed, plan, units, seed)
    figures: Figures = {f"loss: {name}": value for name, value in expert.losses.items()}
    anchor, record = anchor_of(testbed, expert.tensors)
    figures |= {"anchor: separation": record.separation, "anchor: gap, lower end": record.gap_low / record.gap}

    def cost() -> dict[str, np.ndarray]:
        mean, error = truth.costs(bench, testbed.truth, expert.tensors, expert.planted, testbed.pairs, seed)
        return {"cost": mean, "stderr": error}

    costs = units.arrays("truth", cost)["cost"]
    candidates = [*expert.planted, *expert.pool]
    measured = Measurement(testbed, anchor, expert.tensors)

    def scores() -> dict[str, np.ndarray]:
        found = {name: getattr(measured, name)(candidates) for name in MEASURES}
        return found | {"control": np.array([measured.control(candidates[:: max(1, len(candidates) // 24)])])}

    found = units.arrays("scores", scores)
    figures["identity control"] = float(found.pop("control")[0])
    found["magnitude"] = magnitude(bench, expert.tensors, candidates)
    labels = np.zeros(len(candidates), int)
    labels[: len(costs)] = np.where(truth.positives(costs), 1, -1)
    relays, distractors = set(expert.relays), set(expert.distractors)
    for kind in plan.planted:
        kept = np.array([c.kind == kind and label >= 0 for c, label in zip(candidates, labels, strict=True)])
        own = {name: values[kept] for name, values in found.items()}
        here = [c for c, k in zip(candidates, kept, strict=True) if k]
        told = _ranked(own, labels[kept] > 0, np.array([c in relays for c in here]), np.array([c in distractors for c in here]))
        told["idle, left out"] = int(sum(c.kind == kind for c in expert.planted)) - int((labels[kept] > 0).sum())
        share = np.array([cost / costs.sum() for c, cost in zip(expert.planted, costs, strict=True) if c.kind == kind])
        told |= {"cost of planted, least share": float(share.min()), "cost of planted, largest share": float(share.max())}
        figures |= {f"{kind}: {name}": value for name, value in told.items()}
    return {f"{testbed.name}/{plan.name} {name}": value for name, value in figures.items()}


def _ranked(scores: dict[str, np.ndarray], positive: np.ndarray, relay: np.ndarray, distractor: np.ndarray) -> Figures:
    """Precision at k (k = positives) and average precision of every measure, and whom activation patching takes for sources."""
    k = int(positive.sum())
    told: Figures = {"n": len(positive), "positives (k)": k, "distractors": int(distractor.sum()), "moved relays": int(relay.sum())}
    for name, values in scores.items():
        told[f"{name} AP"] = ranking.average_precision(values, positive)
        told[f"{name} P@k"] = ranking.precision_at(values, positive, k)
    told["random AP"], told["random P@k"] = ranking.chance(positive, k, seed=0)
    middle = float(np.median(scores["activation"][positive]))
    told["unplanted above the sources' median, activation"] = int((scores["activation"][~positive] > middle).sum())
    middle = float(np.median(scores["sufficiency"][positive]))
    told["unplanted above the sources' median, sufficiency"] = int((scores["sufficiency"][~positive] > middle).sum())
    told["moved relays, sufficiency of the largest"] = float(scores["sufficiency"][relay].max()) if relay.any() else 0.0
    told["sources, sufficiency of the median"] = middle
    return told
