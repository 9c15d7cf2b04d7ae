"""Who asks, and whether they may: what routes depend on.

A token comes as `Authorization: Bearer …`, or a browser's session as a cookie. The cookie is HttpOnly and SameSite=Strict; a
request that changes something and comes with it must also hold the session's `csrf` in `X-CSRF-Token` or, of a page's form, in
its field `csrf` (service/pages/route.py finds it). Beside that the guard (service/guard.py) refuses every changing request that
a browser sends from another site, with or without a cookie.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, Request, Security
from fastapi.security import APIKeyCookie, HTTPAuthorizationCredentials, HTTPBearer

from mechmerge.service.problems import ServiceError
from mechmerge.service.service import Service
from mechmerge.service.tokens import LOCAL, Identity, Role

COOKIE = "mechmerge_session"
CSRF = "X-CSRF-Token"
SAFE = ("GET", "HEAD", "OPTIONS")
_bearer = HTTPBearer(auto_error=False, description="A token of `mechmerge serve token add`.")
_cookie = APIKeyCookie(name=COOKIE, auto_error=False, description="A session opened with a token, `POST /api/session`.")


# What waits for nothing is `async`: no thread is taken for it.
async def service_of(request: Request) -> Service:
    """The service that answers."""
    service: Service = request.app.state.service
    return service


The = Annotated[Service, Depends(service_of)]


def identify(
    request: Request,
    service: The,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
    cookie: Annotated[str | None, Security(_cookie)],
) -> Identity:
    """Who asks.

    Raises:
        ServiceError: nobody that is known (401), or a session's request without its CSRF token (403).
    """
    found = None
    if bearer is not None:
        found = service.tokens.identify(bearer.credentials)
    elif cookie is not None:
        found = service.tokens.in_session(cookie)
        sent = request.headers.get(CSRF) or str(getattr(request.state, "csrf", ""))
        if (
            found is not None
            and request.method not in SAFE
            and not hmac.compare_digest((found.csrf or "").encode(), sent.encode())
        ):
            raise ServiceError(403, CSRF, expected="the session's own", found="another" if sent else "none")
    if found is None and bearer is None and service.is_open:
        found = Identity(LOCAL, "admin")
    if found is None:
        sent = "one that is not valid" if bearer is not None or cookie is not None else "none"
        raise ServiceError(
            401,
            "token",
            expected="a valid token, as `Authorization: Bearer …`, or a session",
            found=sent,
            fix="ask an administrator for `mechmerge serve token add`",
            headers={"WWW-Authenticate": "Bearer"},
        )
    return found


def require(role: Role) -> Callable[..., Awaitable[Identity]]:
    """A dependency that gives who asks, if they hold a role.

    Raises:
        ServiceError: they do not (403).
    """

    async def check(identity: Annotated[Identity, Depends(identify)]) -> Identity:
        if not identity.may(role):
            raise ServiceError(403, "token", expected=f"the role {role}", found=identity.role)
        return identity

    return check


Reader = Annotated[Identity, Depends(require("read"))]
Runner = Annotated[Identity, Depends(require("run"))]
Publisher = Annotated[Identity, Depends(require("publish"))]
Admin = Annotated[Identity, Depends(require("admin"))]


def require_own(identity: Identity, user: str, what: str) -> None:
    """Refuses to change what is somebody else's, unless an administrator does it.

    Raises:
        ServiceError: it is (403).
    """
    if identity.user != user and not identity.may("admin"):
        raise ServiceError(403, what, expected=f"a job of {identity.user}, or the role admin", found=f"a job of {user}")
