"""Pages of a run's results in the words and charts of its report: maps, recipes, and models compared."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated

from fastapi import Query, Request, Response
from markupsafe import Markup

from mechmerge.evaluate.compare import compare
from mechmerge.evaluate.record import Evaluation
from mechmerge.report import evaluation_tables, page_sections
from mechmerge.report.markup import paragraph, table
from mechmerge.report.pack import script_json
from mechmerge.report.page_data import page_data
from mechmerge.report.tables import Rows
from mechmerge.service.access import Reader, The
from mechmerge.service.api.jobs import Id
from mechmerge.service.pages.components import component_facts, place_of
from mechmerge.service.pages.jobs import heading
from mechmerge.service.pages.reading import KEPT, Held, results_of
from mechmerge.service.pages.render import render
from mechmerge.service.pages.route import page_router
from mechmerge.service.problems import ServiceError

router = page_router()
Name = Annotated[str | None, Query(max_length=200)]


def markup(*sections: str) -> Markup:
    """Sections of the report, which escapes what stands in them."""
    return Markup("\n".join(filter(None, sections)))  # noqa: S704


@functools.lru_cache(maxsize=4 * KEPT)
def _sections(held: Held, tab: str) -> Markup:
    """The report's sections of a page."""
    files, run, kept = held.results.files, held.results.run, held.results.kept
    made: dict[str, Callable[[], tuple[str, ...]]] = {
        "maps": lambda: (page_sections.behaviors(run, kept), page_sections.effects(run), page_sections.limits(run)),
        "recipes": lambda: (page_sections.recipes(run, kept), page_sections.rounds(run)),
        "evaluation": lambda: (page_sections.evaluation(run, files.publish),),
    }
    return markup(*made[tab]())


@router.get("/runs/{id}/data.json")
def data(request: Request, id: Id, identity: Reader, service: The) -> Response:
    """What the charts of a run are drawn from."""
    results = results_of(service, id)
    tag = f'"{results.key}"'
    headers = {"ETag": tag, "Cache-Control": "private, no-cache"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(_data(Held(results)), media_type="application/json", headers=headers)


@functools.lru_cache(maxsize=KEPT)
def _data(held: Held) -> bytes:
    results = held.results
    return script_json(page_data(results.run, results.files.publish, results.kept)).encode()


@router.get("/runs/{id}/maps")
def maps(request: Request, id: Id, identity: Reader, service: The, component: Name = None) -> Response:
    """Where the behaviours lie, with all that is known of one component."""
    results = results_of(service, id)
    facts = component_facts(results, place_of(component)) if component else None
    return render(
        request,
        "maps.html",
        identity,
        **heading(service, id, "maps"),
        sections=_sections(Held(results), "maps"),
        component=component or "",
        facts=facts,
    )


@router.get("/runs/{id}/recipes")
def recipes(request: Request, id: Id, identity: Reader, service: The) -> Response:
    """What each recipe takes of each expert."""
    results = results_of(service, id)
    return render(
        request,
        "sections.html",
        identity,
        **heading(service, id, "recipes"),
        sections=_sections(Held(results), "recipes"),
    )


@router.get("/runs/{id}/evaluation")
def evaluation(request: Request, id: Id, identity: Reader, service: The, model: Name = None, against: Name = None) -> Response:
    """What the models do, and any two of them compared."""
    results = results_of(service, id)
    record = results.run.evaluation
    if record is None:
        raise ServiceError(404, f"evaluation of run {id}", expected="one", found="none yet", fix="wait for it")
    names = list(record.models)
    model = model or (results.files.publish if results.files.publish in names else names[-1])
    against = against or next((name for name in names if name != model), model)
    return render(
        request,
        "evaluation.html",
        identity,
        **heading(service, id, "evaluation"),
        names=names,
        model=model,
        against=against,
        compared=markup(*_compared(Held(results), model, against)),
        sections=_sections(Held(results), "evaluation"),
    )


@functools.lru_cache(maxsize=64)
def _compared(held: Held, model: str, against: str) -> list[str]:
    """Two models on the same prompts, headlines and groups, tested anew and corrected for these tests alone."""
    record = held.results.run.evaluation
    assert record is not None  # noqa: S101 - the page has looked
    if model == against:
        return [paragraph("Choose two different models.", "note")]
    for name in (model, against):
        record.metrics(name)
    two = record.model_copy(
        update={"models": {name: record.models[name] for name in (against, model)}, "against": (against,), "pairs": ()}
    )
    tested = compare({"this run": two}, [against])
    wanted = [pair for pair in tested.pairs if pair.model == model]
    header, rows = evaluation_tables.difference_rows(tested, model)
    values: Rows = (
        [header[0], model, against, *header[2:]],
        [
            (metric, _value(tested, model, str(metric)), _value(tested, against, str(metric)), *rest)
            for metric, _, *rest in rows
        ],
    )
    count = len(wanted)
    said = f"{model} minus {against}, on the same prompts; {count} test{'s' if count != 1 else ''}, corrected together."
    return [
        paragraph(said, "note"),
        table(f"{model} against {against}", values),
        table(f"{model} against {against}, by group", evaluation_tables.group_rows(tested, model)),
    ]


def _value(record: Evaluation, model: str, metric: str) -> str:
    found = record.metric(model, metric)
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"
