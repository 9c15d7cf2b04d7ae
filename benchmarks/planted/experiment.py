"""One plan on one testbed: plant, find out the truth, measure, rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.planted import ranking, truth
from benchmarks.planted.measuring import MEASURES, Measurement, anchor_of, magnitude
from benchmarks.planted.planting import plant
from benchmarks.planted.testbeds import Bed, Plan
from mechmerge.artifacts import Units
from mechmerge.versions import versions

Figures = dict[str, Any]


def experiment(testbed: Bed, plan: Plan, folder: Path, seed: int) -> Figures:
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
        beside = truth.alone(bench, testbed.truth, expert.tensors, expert.distractors)
        return {"cost": mean, "stderr": error, "distractors": beside}

    known = units.arrays("truth", cost)
    costs, least = known["cost"], truth.least(known["cost"])
    costly = {c for c, cost in zip(expert.distractors, known["distractors"], strict=True) if cost >= least}
    candidates = [*expert.planted, *expert.pool]
    measured = Measurement(testbed, anchor, expert.tensors)

    def scores() -> dict[str, np.ndarray]:
        found = {name: getattr(measured, name)(candidates) for name in MEASURES}
        return found | {"control": np.array([measured.control(candidates[:: max(1, len(candidates) // 24)])])}

    found = units.arrays("scores", scores)
    figures["identity control"] = float(found.pop("control")[0])
    found["magnitude"] = magnitude(bench, expert.tensors, candidates)
    status = {c: "source" if cost >= least else "idle" for c, cost in zip(expert.planted, costs, strict=True)}
    status |= {c: "costly" if c in costly else "relay" if c in expert.relays else "distractor" for c in expert.distractors}
    for kind in plan.planted:
        here = np.array([c.kind == kind for c in candidates])
        told = judged(
            {name: values[here] for name, values in found.items()},
            np.array([status.get(c, "unmoved") for c in candidates if c.kind == kind]),
        )
        share = np.array([cost / costs.sum() for c, cost in zip(expert.planted, costs, strict=True) if c.kind == kind])
        told |= {"cost of planted, least share": float(share.min()), "cost of planted, largest share": float(share.max())}
        figures |= {f"{kind}: {name}": value for name, value in told.items()}
    return {f"{testbed.name}/{plan.name} {name}": value for name, value in figures.items()}


def judged(scores: dict[str, np.ndarray], status: np.ndarray) -> Figures:
    """Precision at k (k = sources) and average precision of every measure, and whom each takes for sources.

    Args:
        scores: by measure, [n].
        status: [n], each of source, idle, distractor, relay (one that is a distractor as well), costly (a distractor that
            serves the behaviour) and unmoved. Idle and costly ones are left out.
    """
    told: Figures = {
        name: int((status == name).sum()) for name in ("source", "idle", "distractor", "relay", "costly", "unmoved")
    }
    kept = ~np.isin(status, ("idle", "costly"))
    positive = status[kept] == "source"
    k = int(positive.sum())
    for name, values in scores.items():
        told[f"{name} AP"] = ranking.average_precision(values[kept], positive)
        told[f"{name} P@k"] = ranking.precision_at(values[kept], positive, k)
    told["random AP"], told["random P@k"] = ranking.chance(positive, k, seed=0)
    strict = status != "idle"
    told["sufficiency AP less activation AP"] = told["sufficiency AP"] - told["activation AP"]
    told["sufficiency AP, costly ones negative"] = ranking.average_precision(
        scores["sufficiency"][strict], status[strict] == "source"
    )
    for name in ("activation", "sufficiency"):
        values = scores[name][kept]
        told[f"{name}: not planted, above the sources' median"] = int((values[~positive] > np.median(values[positive])).sum())
        told[f"{name}: sources' median recovery"] = float(np.median(values[positive]))
        moved = values[status[kept] == "relay"]
        told[f"{name}: moved relays' median recovery"] = float(np.median(moved)) if len(moved) else 0.0
    return told
