"""What every request passes first: its Host and Origin, its size; and what every answer gets: headers, figures, one line where
something broke.

- Host: only the server's own names, so that a foreign name that resolves to this machine (DNS rebinding) reaches nothing.
- Origin, Sec-Fetch-Site: a browser says where a request comes from; one that may change something must come from here.
  https://cheatsheetseries.owasp.org/cheatsheets/Cross-Site_Request_Forgery_Prevention_Cheat_Sheet.html
"""

from __future__ import annotations

import logging
import time
from urllib.parse import urlsplit

from sqlalchemy.exc import SQLAlchemyError
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mechmerge.errors import MechmergeError
from mechmerge.service.access import SAFE
from mechmerge.service.problems import ServiceError, answer
from mechmerge.service.service import Service

LOG = logging.getLogger("mechmerge.service")
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'self'; object-src 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Set where the answer does not say otherwise."""
HEADER_BYTES = 32_000
METHODS = (*SAFE, "POST", "PUT", "PATCH", "DELETE")
"""Told apart in the figures: a client may invent others, and each name would be kept for ever."""


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.monotonic(), 0

        async def answering(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                route = getattr(scope.get("route"), "path", "other")
                method = scope["method"] if scope["method"] in METHODS else "other"
                self.service.metrics.answered(method, route, status, time.monotonic() - start)
            await send(message)

        try:
            headers = Headers(scope=scope)
            _check_size(headers)
            self._check_host(headers)
            if scope["method"] not in SAFE:
                check_origin(headers)
            await self.app(scope, await self._measured(headers, receive), answering)
        except MechmergeError as error:
            await answer(error)(scope, receive, answering)
        except Exception as error:
            if status:
                raise  # the answer has begun: all that is left is to break it off
            if isinstance(error, SQLAlchemyError):
                LOG.error("the store cannot be reached: %s", " ".join(str(error).split())[:200])
                told = ServiceError(503, "store", expected="a database within reach", found="none", fix="try again later")
            else:
                LOG.exception("%s %s", scope["method"], scope["path"])
                told = ServiceError(500, "server", expected="no bug", found=type(error).__name__, fix="see the server's log")
            await answer(told)(scope, receive, answering)

    def _check_host(self, headers: Headers) -> None:
        known = self.service.settings.known_hosts
        host = headers.get("host", "").lower()
        name = host.rpartition(":")[0] if ":" in host.rpartition("]")[2] else host
        if known and name not in known:
            raise ServiceError(
                403,
                "Host",
                expected=f"one of {', '.join(sorted(known))}",
                found=repr(host[:100]),
                fix="`mechmerge serve --allow-host NAME` adds a name",
            )

    async def _measured(self, headers: Headers, receive: Receive) -> Receive:
        """The request's messages, its body read whole: it is limited, and every route reads all of it anyway."""
        most = self.service.settings.body
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > most:
            raise _too_large(most, length)
        if length == "0" and "transfer-encoding" not in headers:
            return receive
        pieces, size = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                # Half a form can be a whole one that says something else.
                raise ServiceError(422, "request", expected="a whole body", found="a connection that broke off")
            piece = message.get("body", b"")
            pieces.append(piece)
            size += len(piece)
            if size > most:
                raise _too_large(most, f"more than {most}")
            if not message.get("more_body", False):
                break
        told = False

        async def whole() -> Message:
            nonlocal told
            if told:
                return await receive()
            told = True
            return {"type": "http.request", "body": b"".join(pieces), "more_body": False}

        return whole


def _check_size(headers: Headers) -> None:
    size = sum(len(name) + len(value) for name, value in headers.raw)
    if size > HEADER_BYTES:
        raise ServiceError(431, "headers", expected=f"at most {HEADER_BYTES} bytes", found=str(size))


def check_origin(headers: Headers) -> None:
    """Refuses what a browser sends from another site.

    Raises:
        ServiceError: it comes from there (403).
    """
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if site not in (None, "same-origin", "none"):
        raise ServiceError(403, "Sec-Fetch-Site", expected="same-origin", found=repr(site[:40] if site else site))
    if origin is not None and _netloc(origin) != headers.get("host", "").lower():
        raise ServiceError(403, "Origin", expected="this server", found=repr(origin[:100]))


def _netloc(origin: str) -> str | None:
    """Host and port of an origin; None where it is no address at all."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _too_large(most: int, found: str) -> ServiceError:
    return ServiceError(413, "request", expected=f"at most {most} bytes", found=found[:20], headers={"Connection": "close"})
