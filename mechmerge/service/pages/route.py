"""Routes of pages: forms with their CSRF token, and errors as pages.

Forms are read before anybody asks who sent them, since the token is one of their fields; the guard has limited their size.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import RedirectResponse, Response
from fastapi.routing import APIRoute
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData

from mechmerge.errors import MechmergeError
from mechmerge.service.pages.render import render
from mechmerge.service.problems import ServiceError, problem_of, status_of

FIELDS = 200
"""Fields of a form, and files that come with it, at most."""


class PageRoute(APIRoute):
    """A route whose answers are pages, also where something is wrong."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            try:
                if request.method != "POST":
                    return await handler(request)
                _check_charset(request)
                async with request.form(max_files=FIELDS, max_fields=FIELDS) as form:
                    request.state.form = form
                    request.state.csrf = field(form, "csrf")
                    return await handler(request)
            except RequestValidationError:
                error = ServiceError(404, "page", expected="a page of this server", found="none of this address")
                return problem_page(request, error)
            except MechmergeError as error:
                if isinstance(error, ServiceError) and error.status == 401:
                    back = request.url.path if request.method == "GET" else "/"
                    return RedirectResponse(f"/login?next={quote(back)}", status_code=303)
                return problem_page(request, error)

        return handle


def _check_charset(request: Request) -> None:
    """Refuses a form in another encoding than browsers send ours in: a codec that a request names is not always one of texts.

    Raises:
        ServiceError: it is (422).
    """
    _, parameters = parse_options_header(request.headers.get("content-type"))
    charset = parameters.get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in ("utf-8", "utf8"):
        raise ServiceError(422, "Content-Type", expected="charset=utf-8", found=repr(charset[:40]))


def page_router() -> APIRouter:
    """A router of pages."""
    return APIRouter(route_class=PageRoute, include_in_schema=False)


def problem_page(request: Request, error: MechmergeError) -> Response:
    """An error as a page."""
    return render(request, "problem.html", None, status=status_of(error), problem=problem_of(error))


def _form(request: Request) -> FormData:
    form: FormData = request.state.form
    return form


Form = Annotated[FormData, Depends(_form)]
"""The fields of a request that was posted."""


def field(form: FormData, name: str, default: str = "") -> str:
    """A text field of a form."""
    value = form.get(name)
    return value if isinstance(value, str) else default
