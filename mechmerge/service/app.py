"""The HTTP application.

The API (`/openapi.json` has all of it; times are seconds since 1970, errors `{where, expected, found, fix}`):

    POST   /api/jobs                        {pipeline, files, priority, key} → 201 job           role run
    GET    /api/jobs                        ?state=&user=&parent=&before=&limit= → {jobs, next}  read
    GET    /api/jobs/ID                     → job, with its progress while it runs               read
    GET    /api/jobs/ID/pipeline            → YAML                                               read
    GET    /api/jobs/ID/events              → server-sent events, Last-Event-ID or ?after=       read
    GET    /api/jobs/ID/log                 ?after= → {events, next, state}                      read
    GET    /api/jobs/ID/artifacts           → {artifacts: [{path, size, modified, url}]}         read
    GET    /api/jobs/ID/artifacts/PATH      → the file, by ranges                                read
    POST   /api/jobs/ID/cancel              → job                                                run, own or admin
    POST   /api/jobs/ID/resume              → job                                                run, own or admin
    DELETE /api/jobs/ID                     → 204                                                run, own or admin
    POST   /api/jobs/ID/publish             {repo, model, mode, …} → 202 job of kind publish     publish
    GET    /api/service                     → version, limits, what is allowed, jobs by state    read
    GET    /api/me                          → {user, role, csrf}                                 read
    POST   /api/session  DELETE             {token} → cookie and {user, role, csrf}
    GET    /api/tokens   POST  DELETE /ID   tokens                                               admin
    GET    /healthz  /readyz                → {status: "ok"}, or 503
    GET    /metrics                         Prometheus                                           read

For pages (server-rendered, in a browser; service/pages holds them):

- A router of pages is one more entry of `ROUTERS`; routes depend on `access.Reader`, `Runner`, `Publisher`, `Admin` (who asks,
  an `Identity` with `user`, `role`, `csrf`) and on `access.The` (the `Service`: `store`, `tokens`, `settings`, `run(id)` with
  the run directory, `folder(id)`). Requests that change something are plain forms; they hold the session's `csrf`, as requests
  of scripts to the API do in `X-CSRF-Token` (empty on a server without tokens). `EventSource` works with the cookie.
- A page that needs a session sends the browser to `/login`, which posts the token.
- Templates belong in `mechmerge/service/templates`, rendered by Jinja with autoescape on; scripts and styles in
  `mechmerge/service/static`, served at `/static`: no inline script or style, and nothing from elsewhere.
- Errors under `/api` are JSON; `problem_of` and `status_of` (service/problems.py) give what a page needs to show one.

No module of this package imports torch: models are loaded by workers (`worker.py`), which the supervisor starts.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from mechmerge.errors import MechmergeError
from mechmerge.service.api import access, artifacts, events, health, jobs
from mechmerge.service.guard import Guard
from mechmerge.service.pages import router as pages
from mechmerge.service.pages.route import problem_page
from mechmerge.service.problems import ServiceError, answer
from mechmerge.service.service import Service
from mechmerge.version import __version__

ROUTERS = (jobs.router, events.router, artifacts.router, access.router, health.router, pages)


def create_app(service: Service, *, supervise: bool = True) -> FastAPI:
    """The application of an open service.

    Args:
        service: of `open_service`.
        supervise: run the jobs (else they wait).
    """

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        if supervise:
            service.supervisor.start()
        yield
        if supervise:
            service.supervisor.stop()

    app = FastAPI(
        title="mechmerge",
        version=__version__,
        description="Model merging with mechanism-aware recipes, as a service.",
        lifespan=lifespan,
        # Their pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(MechmergeError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_middleware(Guard, service=service)
    return app


async def _on_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, MechmergeError)  # noqa: S101 - it is registered for these
    return answer(error)


async def _on_invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    found = "nothing" if first["type"] == "missing" else repr(first.get("input"))[:100]
    return answer(ServiceError(422, where, expected=first["msg"], found=found))


async def _on_http(request: Request, error: Exception) -> Response:
    """What the router itself refuses: an unknown path, a method that a path does not have."""
    assert isinstance(error, HTTPException)  # noqa: S101
    headers = dict(error.headers) if error.headers else None
    # 400 is a body that cannot be read as JSON: invalid, as others are.
    status = 422 if error.status_code == 400 else error.status_code
    told = ServiceError(status, "request", found=error.detail, headers=headers)
    by_browser = "text/html" in request.headers.get("accept", "") and not request.url.path.startswith("/api")
    return problem_page(request, told) if by_browser else answer(told)
