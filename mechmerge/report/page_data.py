"""What the charts of the page are drawn from: scores, effects, coefficients, curves and metrics in packed arrays.

Neurons are many: a page holds all of them while they are few enough (`MOST_NEURONS`), else the best of each layer, and in both
cases their scores in bins by rank (a neuron's number means nothing, so neighbours are not averaged).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from mechmerge.evaluate.record import Evaluation
from mechmerge.evaluate.table import headlines, prompts_of
from mechmerge.localize.curve_record import SetCurves
from mechmerge.localize.effect_file import EffectFile
from mechmerge.localize.roles import ROLE_NAMES, ROLES
from mechmerge.localize.scores import ScoreFile
from mechmerge.models.components import LEAF_KINDS, UNIT_KINDS
from mechmerge.models.references import ModelId
from mechmerge.report.curve_figure import PANELS, lines_of
from mechmerge.report.evaluation_tables import verdict
from mechmerge.report.loading import Measurements
from mechmerge.report.pack import digits, pack
from mechmerge.report.recipes import KeptOf
from mechmerge.report.style import Array, caveat, doubts, span, unit_of

MOST_NEURONS = 600_000
"""Neuron scores of all behaviours together that a page holds one by one (seven bytes each with standard errors)."""
BEST = 256
"""Neurons of a layer that are held where there are more."""
BIN_EDGES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
"""Bins of a layer's neurons, from the best score to the worst."""
PAGE_NAMES = {
    "sufficiency": "patched",
    "screen": "screen",
    "necessity": "knockout",
    "activation": "activation",
    "output": "output",
}
"""What the page's script calls each measure."""
BIN_NAMES = ("top 1 %", "1–5 %", "5–10 %", "10–25 %", "25–50 %", "50–75 %", "75–90 %", "90–95 %", "95–99 %", "last 1 %")


def page_data(
    run: Measurements, published: str | None, recipes: Mapping[str, KeptOf], most_neurons: int = MOST_NEURONS
) -> dict[str, Any]:
    """Everything the page's script draws, as a JSON-able value.

    Args:
        run: the files of a run.
        published: the recipe that is published, which charts show first.
        recipes: the coefficients of every recipe (`coefficient_arrays`).
        most_neurons: see `MOST_NEURONS`.
    """
    neurons = sum(file.arrays["neuron.screen"].size for file in run.scores.values() if "neuron.screen" in file.arrays)
    return {
        "bins": list(BIN_NAMES),
        "roles": [ROLE_NAMES[role] for role in ROLES],
        "module_spans": _module_spans(run.scores),
        "scores": [_score(label, file, recipes, neurons <= most_neurons) for label, file in run.scores.items()],
        "recipes": [recipe_data(name, kept, name == published) for name, kept in recipes.items()],
        "effects": _effects(run.effects, most_neurons) if run.effects is not None else None,
        "evaluation": _evaluation(run.evaluation, run, published) if run.evaluation is not None else None,
    }


# ------------------------------------------------------------------------------------------------------------------ scores
def _score(label: str, file: ScoreFile, recipes: Mapping[str, KeptOf], every_neuron: bool) -> dict[str, Any]:
    meta = file.metadata
    kinds = {}
    for kind in ("attention", "mlp", *UNIT_KINDS):
        arrays = {measure: file.arrays.get(f"{kind}.{measure}") for measure in ("sufficiency", "screen")}
        if all(array is None for array in arrays.values()):
            continue
        score = np.where(np.isfinite(file.score(kind)), file.score(kind), np.nan)
        score[file.depth :] = np.nan
        entry: dict[str, Any] = {"span": digits(span(score)), "count": int(np.isfinite(score).sum())}
        if kind == "neuron":
            entry["bins"] = _bins(score, meta.expert, recipes)
        chosen = None if kind != "neuron" or every_neuron else _best(score)
        if chosen is not None:
            # Ranks among all neurons go with them: the script cannot count those that are not there.
            entry |= {"unit": pack(chosen, "f32"), "units": score.shape[1]}
            entry["rank"] = pack(_take(_ranks(score), chosen), "f32")
        for measure, name in PAGE_NAMES.items():
            for part, suffix, packing in (("", "", "f24"), (".stderr", "_se", "b16")):
                array = file.arrays.get(f"{kind}.{measure}{part}")
                if array is None:
                    continue
                judged = np.array(array, np.float32)
                # 0 by construction is no result: after the anchor only the output is judged.
                judged[slice(file.depth) if measure == "output" else slice(file.depth, None)] = np.nan
                entry[name + suffix] = pack(judged if chosen is None else _take(judged, chosen), packing)  # type: ignore[arg-type]
        roles = _roles(file, kind)
        if roles is not None:
            entry["role"] = pack(roles if chosen is None else _take(roles, chosen), "b16")
        kinds[kind] = entry
    return {
        "label": label,
        "expert": meta.expert.digest,
        "anchor": file.depth,
        "unit": unit_of(meta),
        "caveat": caveat(meta),
        "doubts": list(doubts(meta)),
        "kinds": kinds,
        "curves": _curves(meta.curves) if meta.curves is not None else None,
    }


def _roles(file: ScoreFile, kind: str) -> Array | None:
    """[layers, units]: the number of each component's role in `ROLES`, NaN where it is not known; None without roles."""
    roles = file.roles(kind)
    if roles is None:
        return None
    numbers = np.full(roles.shape, np.nan, np.float32)
    for number, role in enumerate(ROLES):
        if role != "unknown":
            numbers[roles == role] = number
    return numbers


def _module_spans(scores: Mapping[str, ScoreFile]) -> dict[str, float | None]:
    """Half the colour range of the map of all modules, by unit of measurement."""
    found: dict[str, list[Array]] = {}
    for file in scores.values():
        for name in ("attention.sufficiency", "mlp.sufficiency"):
            if name in file.arrays:
                found.setdefault(unit_of(file.metadata), []).append(file.arrays[name][: file.depth].ravel())
    return {unit: digits(span(np.concatenate(parts))) for unit, parts in found.items()}


def _best(score: Array) -> Array:
    """[layers, BEST] numbers of the best units of each layer, best first."""
    return np.argsort(-np.nan_to_num(score, nan=-np.inf), axis=1, kind="stable")[:, :BEST]


def _take(values: Array, chosen: Array) -> Array:
    return np.take_along_axis(values, chosen, axis=1)


def _ranks(score: Array) -> Array:
    """1 for the best score of the whole model; NaN where there is none."""
    ranks = np.full(score.size, np.nan)
    there = np.flatnonzero(np.isfinite(score))
    ranks[there[np.argsort(-score.flat[there], kind="stable")]] = np.arange(1, len(there) + 1)
    return ranks.reshape(score.shape)


def _bins(score: Array, expert: ModelId, recipes: Mapping[str, KeptOf]) -> dict[str, Any]:
    """Mean, smallest and largest score of each bin [bins, layers], and what share of the bin each recipe takes."""
    order = np.argsort(-np.nan_to_num(score, nan=-np.inf), axis=1, kind="stable")
    ranked = _take(score, order)
    coefficients = {name: kept.units(expert, "neuron", score.shape) for name, kept in recipes.items()}
    taken = {name: _take(array, order) != 0 for name, array in coefficients.items() if array is not None}
    edges = [round(edge * score.shape[1]) for edge in BIN_EDGES]

    def by_bin(values: Array, reduce: Callable[..., Array]) -> Array:
        parts = [values[:, start:end] for start, end in pairwise(edges)]
        return np.stack([reduce(part, axis=1) if part.size else np.full(len(values), np.nan) for part in parts])

    return {
        "sizes": [end - start for start, end in pairwise(edges)],
        "mean": pack(by_bin(ranked, np.mean)),
        "low": pack(by_bin(ranked, np.min)),
        "high": pack(by_bin(ranked, np.max)),
        "taken": {name: pack(by_bin(kept, np.mean), "b16") for name, kept in taken.items()},
    }


def _curves(curves: SetCurves) -> dict[str, Any]:
    panels = []
    for field, name in PANELS:
        lines = [
            {
                "order": line.order,
                "x": [digits(float(x)) for x in line.share],
                "y": [digits(float(y)) for y in line.value],
                "low": [digits(float(y)) for y in line.low],
                "high": [digits(float(y)) for y in line.high],
            }
            for line in lines_of(curves, field)
        ]
        if lines:
            panels.append({"field": field, "name": " ".join(name.split()), "lines": lines})
    seeds = sum(curve.order == "random" for curve in curves.curves)
    return {"panels": panels, "seeds": seeds, "above": curves.above_controls, "verdict": curves.verdict}


# ------------------------------------------------------------------------------------------------------ effects and recipes
def _effects(matrix: EffectFile, most_neurons: int) -> dict[str, Any]:
    names = [kind for kind in LEAF_KINDS if np.any(matrix.arrays.get(f"{kind}.effect", np.zeros(1)))]
    kinds = {}
    for kind in names:
        values = matrix.arrays[f"{kind}.effect"]
        entry: dict[str, Any] = {
            "units": values.shape[-1],
            "sum": pack(values.sum(axis=-1)),
            "hurt": pack((values < 0).mean(axis=-1), "b16"),
        }
        if kind in UNIT_KINDS and (kind != "neuron" or values.size <= most_neurons):
            entry["effect"] = pack(values)
            if f"{kind}.stderr" in matrix.arrays:
                entry["se"] = pack(matrix.arrays[f"{kind}.stderr"], "b16")
        kinds[kind] = entry
    sums = np.stack([matrix.arrays[f"{kind}.effect"].sum(axis=-1) for kind in names]) if names else np.zeros(1)
    meta = matrix.metadata
    return {
        "unit": meta.unit,
        "behaviors": [{"name": b.name, "expert": b.expert, "doubtful": b.caveat is not None} for b in meta.behaviors],
        "experts": [{"name": name, "digest": model.digest} for name, model in meta.experts.items()],
        "kinds": kinds,
        "span": digits(span(sums)),
    }


def recipe_data(name: str, kept: KeptOf, published: bool) -> dict[str, Any]:
    """What charts show of a recipe: its coefficients by expert and kind."""
    experts = []
    for expert, model in kept.experts.items():
        arrays = {kind: kept.of(expert, kind) for kind in UNIT_KINDS}
        there = {kind: array for kind, array in arrays.items() if array is not None}
        experts.append({"name": expert, "digest": model.digest, "kinds": {kind: pack(a) for kind, a in there.items()}})
    return {"name": name, "published": published, "instead": kept.instead, "experts": experts}


# -------------------------------------------------------------------------------------------------------------- evaluation
def _evaluation(record: Evaluation, run: Measurements, published: str | None) -> dict[str, Any]:
    def role(model: str) -> str:
        if model in record.against:
            return "parent"
        return "published" if model == published else "merge" if model in run.recipes else "other"

    names = headlines(record)
    return {
        "metrics": [{"name": name, "n": prompts_of(record, name)} for name in names],
        "models": [
            {
                "name": model,
                "role": role(model),
                "values": {
                    name: [digits(m.value), digits(m.low), digits(m.high)]
                    for name, m in record.metrics(model).items()
                    if name in names
                },
            }
            for model in record.models
        ],
        "pairs": [
            {
                "model": p.model,
                "against": p.against,
                "metric": p.metric,
                "headline": p.headline,
                "verdict": verdict(p),
                "values": [digits(p.difference), digits(p.low), digits(p.high)],
            }
            for p in record.pairs
        ],
    }
