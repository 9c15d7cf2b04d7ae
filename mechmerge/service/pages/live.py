"""The list of jobs as it changes: server-sent events for the front page.

All browsers that watch the same list get the same words, which are made once a second however many they are.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response, StreamingResponse

from mechmerge.report.pack import clean
from mechmerge.service.access import Reader, The
from mechmerge.service.pages.jobs import Shown, list_rows
from mechmerge.service.service import Service
from mechmerge.service.tokens import Identity

router = APIRouter(include_in_schema=False)
EVERY, ALIVE = 1.0, 15.0
"""Seconds between two looks at the store, and between two signs of life."""


class Board:
    """The lists of a service that browsers watch, by what they are limited to."""

    def __init__(self, service: Service) -> None:
        self._service, self._lock = service, threading.Lock()
        self._said: dict[str, tuple[float, str]] = {}

    def look(self, shown: str) -> str:
        """The list as JSON, at most a second old."""
        with self._lock:
            made, said = self._said.get(shown, (0.0, ""))
            if time.monotonic() - made >= EVERY or not said:
                rows, _ = list_rows(self._service, shown)
                counts = self._service.store.counts().model_dump()
                said = json.dumps(clean({"rows": [row.model_dump() for row in rows], "counts": counts}))
                self._said[shown] = (time.monotonic(), said)
            return said


def board_of(request: Request, service: Service) -> Board:
    """The board of the application that answers."""
    if not hasattr(request.app.state, "board"):
        request.app.state.board = Board(service)
    found: Board = request.app.state.board
    return found


@router.get("/live")
async def live(request: Request, identity: Reader, service: The, shown: Annotated[Shown, Query()] = "all") -> Response:
    """The first page of the list, now and whenever it changes."""
    return StreamingResponse(
        _follow(request, service, board_of(request, service), shown, identity),
        media_type="text/event-stream",
        headers={"X-Accel-Buffering": "no"},
    )


async def _follow(request: Request, service: Service, board: Board, shown: str, identity: Identity) -> AsyncIterator[str]:
    loop = asyncio.get_running_loop()
    last, spoke = "", loop.time()
    service.metrics.stream(1)
    try:
        yield "retry: 2000\n\n"
        while not service.stopping.is_set() and not await request.is_disconnected():
            if not await run_in_threadpool(service.admits, identity):
                return  # the token was revoked, or is too old
            said = await run_in_threadpool(board.look, shown)
            if said != last:
                last, spoke = said, loop.time()
                yield f"event: list\ndata: {said}\n\n"
            elif loop.time() - spoke >= ALIVE:
                spoke = loop.time()
                yield ": still here\n\n"
            await asyncio.sleep(EVERY)
    finally:
        service.metrics.stream(-1)
