"""What happens to a job: as server-sent events, and as plain pages for clients that ask again and again.

Server-sent events: https://html.spec.whatwg.org/multipage/server-sent-events.html. An event's `id` is its number in the log, so
`Last-Event-ID` goes on exactly there. When the job has ended and all is said, an event `end` with the job comes last, and the
stream closes; a browser that connects again then is answered 204, which stops it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response, StreamingResponse

from mechmerge.artifacts import Document
from mechmerge.service.access import Reader, The
from mechmerge.service.api.jobs import Id, view
from mechmerge.service.log import Event, read_events
from mechmerge.service.problems import ServiceError, answers
from mechmerge.service.service import Service
from mechmerge.service.store import ENDED, State
from mechmerge.service.tokens import Identity

EVENT = {
    "type": "object",
    "description": "One event of the stream.",
    "properties": {name: {"type": "string"} for name in ("id", "event", "data")},
    "required": ["data"],
}

router = APIRouter(prefix="/api/jobs", tags=["events"])
POLL, ASK, ALIVE = 0.25, 1.0, 15.0
"""Seconds between two looks at the log, at the job's state where the log says nothing, and between two signs of life."""
BIG = 2**62


class NumberedEvent(Event):
    """An event with its number."""

    number: int


class EventPage(Document):
    """Events after a number."""

    events: tuple[NumberedEvent, ...]
    next: int
    """What to pass as `after` for what comes next."""
    state: State
    """The job's, asked before the log was read: where it has ended and there are no events, there will be none."""


@router.get("/{id}/log", responses=answers(401, 404))
def log(id: Id, identity: Reader, service: The, after: Annotated[int, Query(ge=0, le=BIG)] = 0) -> EventPage:
    """Events after a number, about 64 kB of them at most."""
    state = service.store.job(id).state
    found, position = read_events(service.folder(id) / "log.jsonl", after)
    return EventPage(
        events=tuple(NumberedEvent(number=number, **dict(event)) for number, event in found), next=position, state=state
    )


@router.get(
    "/{id}/events",
    response_class=StreamingResponse,
    responses=answers(
        401,
        404,
        s200={
            "description": "Events, one JSON object each; the last one is `end`, with the job.",
            "content": {"text/event-stream": {"schema": EVENT}},
        },
        s204={"description": "The job has ended and there is nothing after this number."},
    ),
)
async def events(
    id: Id,
    request: Request,
    identity: Reader,
    service: The,
    after: Annotated[int, Query(ge=0, le=BIG, description="Number of the last event that is known.")] = 0,
    last_event_id: Annotated[str | None, Header(max_length=40, description="The same, as browsers send it.")] = None,
) -> Response:
    """Follow a job: what happened so far (after a number), then what happens, until it ends."""
    job = await run_in_threadpool(service.store.job, id)
    known = last_event_id is not None and last_event_id.isascii() and last_event_id.isdecimal()
    start = min(int(last_event_id or 0), BIG) if known else after
    if start and job.state in ENDED and not read_events(service.folder(id) / "log.jsonl", start)[0]:
        return Response(status_code=204)
    return StreamingResponse(
        _follow(id, start, request, service, identity), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"}
    )


async def _follow(id: str, position: int, request: Request, service: Service, identity: Identity) -> AsyncIterator[str]:
    path = service.folder(id) / "log.jsonl"
    loop = asyncio.get_running_loop()
    asked, spoke, checked = 0.0, loop.time(), loop.time()
    ended = False
    service.metrics.stream(1)
    try:
        yield "retry: 2000\n\n"
        while not service.stopping.is_set():
            if loop.time() - checked >= ASK:
                checked = loop.time()
                if not await run_in_threadpool(service.admits, identity):
                    return  # the token was revoked, or is too old
            found, position = read_events(path, position)
            for number, event in found:
                yield _message(event.type, event.model_dump_json(exclude_none=True), number)
            if found:
                spoke = loop.time()
                continue
            if ended:
                job = await run_in_threadpool(service.store.job, id)
                yield _message("end", view(service, job).model_dump_json(), position)
                return
            if loop.time() - asked >= ASK:
                asked = loop.time()
                # The log is read once more after the job was found ended: nothing is left out.
                ended = (await run_in_threadpool(service.store.job, id)).state in ENDED
                if await request.is_disconnected():
                    return
            if loop.time() - spoke >= ALIVE:
                spoke = loop.time()
                yield ": still here\n\n"
            if not ended:
                await asyncio.sleep(POLL)
    except ServiceError:
        return  # it was deleted meanwhile
    finally:
        service.metrics.stream(-1)


def _message(type: str, data: str, number: int) -> str:
    return f"id: {number}\nevent: {type}\ndata: {data}\n\n"
