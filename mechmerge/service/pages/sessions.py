"""Logging in with a token, and out.

A form that nobody is logged in behind has a CSRF token too: one of the page's own, in a cookie and in the form (double submit,
https://cheatsheetseries.owasp.org/cheatsheets/Cross-Site_Request_Forgery_Prevention_Cheat_Sheet.html), so that nobody is logged
in as somebody else unawares.
"""

from __future__ import annotations

import hmac
import re
import secrets
from typing import Annotated

from fastapi import Cookie, Request
from fastapi.responses import RedirectResponse, Response

from mechmerge.service.access import COOKIE, Reader, The
from mechmerge.service.pages.render import render
from mechmerge.service.pages.route import Form, field, page_router
from mechmerge.service.problems import ServiceError
from mechmerge.service.tokens import SESSION_SECONDS

router = page_router()
LOGIN = "mechmerge_login"
_LOCAL = re.compile(r"/(?![/\\])[\x21-\x7e]*")


@router.get("/login")
def login_form(request: Request, service: The, next: str = "/") -> Response:
    """The form that takes a token."""
    if service.is_open:
        return RedirectResponse("/", status_code=303)
    return _form(request, next)


def _form(request: Request, back: str, *, wrong: bool = False) -> Response:
    secret = secrets.token_urlsafe(24)
    page = render(request, "login.html", None, status=401 if wrong else 200, csrf=secret, next=safe_next(back), wrong=wrong)
    page.set_cookie(LOGIN, secret, httponly=True, samesite="strict", path="/login", secure=request.url.scheme == "https")
    return page


@router.post("/login")
def login(request: Request, service: The, form: Form, cookie: Annotated[str | None, Cookie(alias=LOGIN)] = None) -> Response:
    """Opens a session."""
    if cookie is None or not hmac.compare_digest(cookie.encode(), field(form, "csrf").encode()):
        raise ServiceError(403, "csrf", expected="this form's own", found="another", fix="open /login again")
    back = safe_next(field(form, "next", "/"))
    opened = service.tokens.open_session(field(form, "token").strip()[:200])
    if opened is None:
        return _form(request, back, wrong=True)
    answer = RedirectResponse(back, status_code=303)
    secure = request.url.scheme == "https"
    answer.set_cookie(COOKIE, opened[1], max_age=int(SESSION_SECONDS), httponly=True, samesite="strict", secure=secure)
    answer.delete_cookie(LOGIN, path="/login", httponly=True, samesite="strict")
    return answer


@router.post("/logout")
def logout(identity: Reader, service: The, cookie: Annotated[str | None, Cookie(alias=COOKIE)] = None) -> Response:
    """Ends the session."""
    if cookie is not None:
        service.tokens.close_session(cookie)
    answer = RedirectResponse("/login", status_code=303)
    answer.delete_cookie(COOKIE, httponly=True, samesite="strict")
    return answer


def safe_next(path: str) -> str:
    """A path of this server to go on with; the front page where it is anything else."""
    return path if _LOCAL.fullmatch(path) else "/"
