"""The list of jobs, and the page of one: where it is, what happened, what it left, and what can be done about it."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NamedTuple

from fastapi import Query, Request, Response
from fastapi.responses import RedirectResponse

from mechmerge.service.access import Reader, Runner, The
from mechmerge.service.api import artifacts, jobs
from mechmerge.service.api.jobs import Id, JobView, view
from mechmerge.service.log import CHUNK, read_events
from mechmerge.service.pages.render import render
from mechmerge.service.pages.route import page_router
from mechmerge.service.pages.rows import Row, may_change, row_of
from mechmerge.service.service import Service
from mechmerge.service.store import ENDED, State

router = page_router()
LIMIT = 50
SHOWN: dict[str, tuple[State, ...]] = {
    "all": (),
    "running": ("running",),
    "queued": ("queued",),
    "done": ("done",),
    "failed": ("failed", "cancelled"),
}
"""What the list can be limited to."""
Shown = Literal["all", "running", "queued", "done", "failed"]
TABS = {
    "": "Overview",
    "maps": "Maps",
    "recipes": "Recipes",
    "builder": "Builder",
    "evaluation": "Evaluation",
    "samples": "Samples",
    "gate": "Gate and publish",
}
"""The pages of a run by the last part of their address."""


class Tab(NamedTuple):
    """A link to a page of a run."""

    name: str
    title: str
    there: bool
    """Whether there is anything to show."""


class Stage(NamedTuple):
    """A stage of a run."""

    name: str
    state: str
    """`done`, `unchanged`, `at work` or `stopped`."""


def list_rows(service: Service, shown: str, before: int | None = None) -> tuple[list[Row], int | None]:
    """A page of the list, the newest first, and what to pass as `before` for the next one."""
    found, following = service.store.jobs(states=SHOWN[shown], before=before, limit=LIMIT)
    return [row_of(view(service, job)) for job in found], following


@router.get("/")
def front(
    request: Request,
    identity: Reader,
    service: The,
    shown: Annotated[Shown, Query()] = "all",
    before: Annotated[int | None, Query(ge=0, le=2**62)] = None,
) -> Response:
    """Runs and queue."""
    rows, following = list_rows(service, shown, before)
    counts = service.store.counts()
    return render(
        request, "jobs.html", identity, rows=rows, following=following, counts=counts, shown=shown, before=before,
        slots=service.settings.slots,
    )  # fmt: skip


def tabs(service: Service, job: JobView) -> list[Tab]:
    """The pages of a run; of a publication there are none."""
    if job.kind != "run":
        return []
    run = service.run(job.id)
    measured = (run / "effects.safetensors").is_file() or any(run.glob("scores/*/*.safetensors"))
    judged = (run / "evaluation.json").is_file()
    there = {
        "": True,
        "maps": measured,
        "recipes": any(run.glob("recipes/*/recipe.yaml")),
        "builder": measured,
        "evaluation": judged,
        "samples": any(run.glob("samples/*.jsonl")),
        "gate": judged,
    }
    return [Tab(name, title, there[name]) for name, title in TABS.items()]


def heading(service: Service, id: str, name: str) -> dict[str, Any]:
    """What every page of a run shows at its top."""
    job = view(service, service.store.job(id))
    return {"job": job, "row": row_of(job), "tabs": tabs(service, job), "tab": name}


@router.get("/runs/{id}")
def run(request: Request, id: Id, identity: Reader, service: The) -> Response:
    """A run, or a publication."""
    top = heading(service, id, "")
    job: JobView = top["job"]
    log = service.folder(id) / "log.jsonl"
    # The position first: what is written meanwhile is shown by the stream as well, rather than by nobody.
    size = log.stat().st_size if log.is_file() else 0
    found, position = read_events(log, max(0, size - CHUNK + 4096))
    said = [event for _, event in found if event.type in ("note", "error", "state")]
    shown = artifacts.list_artifacts(id, identity, service).artifacts if service.run(id).is_dir() else ()
    pipeline = service.folder(job.parent or id) / "input" / "pipeline.yaml"
    return render(
        request,
        "run.html",
        identity,
        **top,
        stages=stages_of(service, job),
        events=said,
        position=position,
        pipeline=pipeline.read_text("utf-8") if pipeline.is_file() else "",
        artifacts=shown,
        publications=[row_of(view(service, one)) for one in service.store.jobs(parent=id)[0]],
        may_change=may_change(identity, job),
        ended=job.state in ENDED,
    )


def stages_of(service: Service, job: JobView) -> list[Stage]:
    """The stages that a job came to, in order; each as it was last."""
    path = service.folder(job.id) / "log.jsonl"
    found: dict[str, str] = {}
    if path.is_file():
        with path.open("rb") as handle:
            for line in handle:
                if b'"type":"stage"' not in line:
                    continue
                try:
                    event = json.loads(line)
                except ValueError:  # a killed worker's last line
                    continue
                name = event.get("stage")
                if name is not None:
                    found.pop(name, None)
                    found[name] = "unchanged" if event.get("text") == "unchanged" else "done"
    if found and job.state != "done" and found[last := list(found)[-1]] == "done":
        found[last] = "at work" if job.state == "running" else "stopped"
    return [Stage(name, state) for name, state in found.items()]


@router.post("/runs/{id}/cancel")
def cancel(id: Id, identity: Runner, service: The) -> Response:
    """Cancels a job."""
    jobs.cancel(id, identity, service)
    return RedirectResponse(f"/runs/{id}", status_code=303)


@router.post("/runs/{id}/resume")
def resume(id: Id, identity: Runner, service: The) -> Response:
    """Queues a job again."""
    jobs.resume(id, identity, service)
    return RedirectResponse(f"/runs/{id}", status_code=303)


@router.get("/runs/{id}/delete")
def ask_delete(request: Request, id: Id, identity: Runner, service: The) -> Response:
    """Asks whether a job is to be deleted."""
    return render(request, "delete.html", identity, **heading(service, id, "delete"))


@router.post("/runs/{id}/delete")
def delete(id: Id, identity: Runner, service: The) -> Response:
    """Deletes a job and its files."""
    jobs.delete(id, identity, service)
    return RedirectResponse("/", status_code=303)
