"""Requests and answers, and the table of routes: plain data, so that routes are functions from one to the other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import unquote

if TYPE_CHECKING:
    from tests.hub.accounts import Account
    from tests.hub.server import Hub


class Refusal(Exception):
    """An answer that is an error, as the Hub words it.

    Args:
        status: HTTP status.
        message: the text that huggingface_hub shows (`X-Error-Message`).
        code: `X-Error-Code`, which huggingface_hub turns into an exception class (`RepoNotFound`, `RevisionNotFound`, ...).
        headers: further headers.
        extra: further keys of the JSON body.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None, **extra: Any
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.extra = status, message, extra
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | dict(headers or {})

    def answer(self) -> Answer:
        return Answer({"error": self.message} | self.extra, self.status, self.headers)


@dataclass
class Answer:
    """What is sent back: `body` as JSON, bytes as they are, or a file."""

    body: Any = field(default_factory=dict)
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    def content(self) -> bytes | Path:
        match self.body:
            case bytes() | Path():
                return self.body
            case _:
                return json.dumps(self.body).encode()


@dataclass
class Request:
    """What came in, its body already received (in a spooled file, since weights come this way too)."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    file: IO[bytes]
    length: int
    account: Account | None = None

    @cached_property
    def body(self) -> bytes:
        self.file.seek(0)
        return self.file.read()

    @property
    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in {"1", "true"}


Route = Callable[..., Answer]
ROUTES: list[tuple[str, re.Pattern[str], Route]] = []
PARAMETERS = {
    "kind": "models|datasets|spaces",
    "repo": "[^/]+/[^/]+",
    "revision": "[^/]+",
    "rest": ".*",
    "oid": "[0-9a-f]{64}",
    "number": "[0-9]+",
}


def route(method: str, pattern: str) -> Callable[[Route], Route]:
    """Registers a function for a path such as `/api/{kind}/{repo}/refs`; it is called with (hub, request, **parameters).

    A revision is one segment: the client quotes the slash of `refs/pr/1`.
    """
    expression = re.sub(r"\\\{(\w+)\\\}", lambda found: f"(?P<{found[1]}>{PARAMETERS[found[1]]})", re.escape(pattern))

    def register(function: Route) -> Route:
        ROUTES.append((method, re.compile(expression), function))
        return function

    return register


def dispatch(hub: Hub, request: Request) -> Answer:
    """The answer of the first route that fits."""
    for method, pattern, function in ROUTES:
        found = pattern.fullmatch(request.path)
        if found and (request.method == method or (request.method == "HEAD" and method == "GET")):
            return function(hub, request, **{name: unquote(value) for name, value in found.groupdict().items()})
    raise Refusal(404, f"Sorry, we can't find the page you are looking for: {request.method} {request.path}")
