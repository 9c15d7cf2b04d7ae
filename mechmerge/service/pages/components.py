"""All that is known of one component: its scores, ranks and roles by behaviour, its effects, and what recipes take of it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from fastapi import Query, Response
from fastapi.responses import JSONResponse

from mechmerge.localize.roles import ROLE_NAMES
from mechmerge.localize.scores import ScoreFile
from mechmerge.models.components import PARTS, UNIT_KINDS, Component, parse_component
from mechmerge.report.pack import clean
from mechmerge.report.recipes import KeptOf
from mechmerge.report.style import MEASURES, Array, short_name, signed, small
from mechmerge.report.tables import Rows
from mechmerge.service.access import Reader, The
from mechmerge.service.api.jobs import Id
from mechmerge.service.pages.reading import Results, results_of
from mechmerge.service.pages.route import page_router
from mechmerge.service.problems import ServiceError

router = page_router()
ORDER = ("sufficiency", "screen", "necessity", "activation", "output")


class Table(NamedTuple):
    """A table with its caption."""

    caption: str
    header: list[str]
    rows: list[tuple[object, ...]]


class Facts(NamedTuple):
    """What is known of a component."""

    name: str
    said: str
    """In one line, for a live region."""
    tables: list[Table]


def place_of(name: str) -> Component:
    """A component by its name.

    Raises:
        InputError: not a name of one.
    """
    return parse_component(name.strip())


@router.get("/runs/{id}/component.json")
def component(id: Id, identity: Reader, service: The, name: str = Query(max_length=100)) -> Response:
    """What is known of a component, as the page writes it."""
    facts = component_facts(results_of(service, id), place_of(name))
    tables = [table._asdict() for table in facts.tables]
    return JSONResponse(clean({"name": facts.name, "said": facts.said, "tables": tables}))


def component_facts(results: Results, place: Component) -> Facts:
    """Everything that a run's files say of a component.

    Raises:
        ServiceError: the model has no such component, or nothing was measured of it (404).
    """
    effects = results.run.effects
    unit = "" if effects is None else f", {effects.metadata.unit.partition(':')[0]}"
    measured = {"Scores by behaviour": _scores(results, place), f"Effects{unit}": _effects(results, place)}
    tables = [Table(caption, *rows) for caption, rows in measured.items() if rows[1]]
    if not tables:
        raise ServiceError(404, f"component {place}", expected="one that this run measured", found="nothing about it")
    taken = _taken(results, place)
    tables += [Table("What recipes take", *taken)] if taken[1] else []
    return Facts(str(place), f"{place}: {'; '.join(_lines(tables))}", tables)


def _lines(tables: list[Table]) -> list[str]:
    return [f"{table.caption.lower()}, {len(table.rows)} row{'s' if len(table.rows) != 1 else ''}" for table in tables]


def _scores(results: Results, place: Component) -> Rows:
    measured = [
        measure for measure in ORDER if any(f"{place.kind}.{measure}" in file.arrays for file in results.run.scores.values())
    ]
    header = ["behaviour", *(MEASURES[measure] for measure in measured), "rank", "role", "expert"]
    rows: list[tuple[object, ...]] = []
    for label, file in results.run.scores.items():
        score = _score(file, place.kind)
        if score is None or not _inside(place, score.shape):
            continue
        roles = file.roles(place.kind)
        role = "not judged" if roles is None else ROLE_NAMES[str(roles[place.layer, place.unit])]
        cells = [_measure(file, place, measure) for measure in measured]
        rows.append((label, *cells, _rank(file, score, place), role, short_name(file.metadata.expert)))
    return header, rows


def _score(file: ScoreFile, kind: str) -> Array | None:
    there = any(f"{kind}.{measure}" in file.arrays for measure in ("sufficiency", "screen"))
    return file.score(kind) if there else None


def _inside(place: Component, shape: tuple[int, ...]) -> bool:
    return 0 <= place.layer < shape[-2] and place.unit < shape[-1]


def _rank(file: ScoreFile, score: Array, place: Component) -> str:
    if place.layer >= file.depth:
        return "after the anchor"
    below = score[: file.depth]
    mine = below[place.layer, place.unit]
    if not np.isfinite(mine):
        return "not measured"
    return f"{1 + int((below > mine).sum())} of {int(np.isfinite(below).sum())}"


def _measure(file: ScoreFile, place: Component, measure: str) -> str:
    array = file.arrays.get(f"{place.kind}.{measure}")
    if array is None or not np.isfinite(array[place.layer, place.unit]):
        return "–"
    # After the anchor only the output is judged, and before it never.
    if (place.layer >= file.depth) != (measure == "output"):
        return "0 by construction" if measure != "output" else "–"
    errors = file.arrays.get(f"{place.kind}.{measure}.stderr")
    error = float("nan") if errors is None else float(errors[place.layer, place.unit])
    return small(float(array[place.layer, place.unit]), error)


def _effects(results: Results, place: Component) -> Rows:
    effects = results.run.effects
    if effects is None:
        return [], []
    meta = effects.metadata
    kinds = [place.kind] if f"{place.kind}.effect" in effects.arrays else list(PARTS.get(place.kind, ()))
    found = [effects.arrays[f"{kind}.effect"] for kind in kinds if f"{kind}.effect" in effects.arrays]
    layer = max(place.layer, 0)
    if not found or not _inside(Component(layer, place.kind, place.unit), found[0].shape):
        return [], []
    rows: list[tuple[object, ...]] = []
    for b, behavior in enumerate(meta.behaviors):
        cells = []
        for e in range(len(meta.experts)):
            if kinds == [place.kind]:
                errors = effects.arrays.get(f"{place.kind}.stderr")
                error = float("nan") if errors is None else float(errors[b, e, layer, place.unit])
                cells.append(small(float(found[0][b, e, layer, place.unit]), error))
            else:
                cells.append(signed(sum(float(array[b, e, layer].sum()) for array in found)))
        rows.append((behavior.name, *cells))
    return ["on", *(f"of {name}" for name in meta.experts)], rows


def _taken(results: Results, place: Component) -> Rows:
    experts = list(dict.fromkeys(name for kept in results.kept.values() for name in kept.experts))
    rows = [
        (name, *(_share(kept, expert, place) for expert in experts)) for name, kept in results.kept.items() if place.layer >= 0
    ]
    return ["recipe", *(f"takes of {expert}" for expert in experts)], list(rows)


def _share(kept: KeptOf, expert: str, place: Component) -> str:
    if kept.instead is not None:
        return kept.instead
    kinds = [kind for kind in PARTS.get(place.kind, (place.kind,)) if kind in UNIT_KINDS]
    arrays = [array for kind in kinds if (array := kept.of(expert, kind)) is not None]
    if not arrays or not _inside(place, arrays[0].shape):
        return "–"
    if place.kind in UNIT_KINDS:
        return f"× {arrays[0][place.layer, place.unit]:g}"
    rows = np.concatenate([array[place.layer] for array in arrays])
    return f"{100 * float((rows != 0).mean()):.0f} % of its units"
