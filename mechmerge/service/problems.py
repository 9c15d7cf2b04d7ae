"""Errors as the API answers them: one line `{where, expected, found, fix}` with a status.

ServiceError            a MechmergeError with the status of its answer
KeyTakenError           409, of a key that names another request
InputError              422    anything in a request that is not what it must be
GateRefused             409
MissingError            503
"""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

from mechmerge.artifacts import Document
from mechmerge.errors import GateRefused, InputError, MechmergeError, MissingError


class Problem(Document):
    """What went wrong, in one line."""

    where: str
    """What it is about."""
    expected: str | None = None
    found: str | None = None
    fix: str | None = None
    """What to do."""


class ServiceError(MechmergeError):
    """A request that is refused, with the status of its answer."""

    def __init__(
        self,
        status: int,
        where: str,
        *,
        expected: str | None = None,
        found: str | None = None,
        fix: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(where, expected=expected, found=found, fix=fix)
        self.status, self.headers = status, headers


class KeyTakenError(ServiceError):
    """A request's key names another request of the same user."""


WORDS = {
    400: "The Range header is not valid.",
    401: "No valid token or session.",
    403: "The role, the origin or the address does not allow it.",
    404: "Nothing of that name.",
    409: "The job's state, the gate, or another request under the same key does not allow it.",
    413: "The request is too large.",
    416: "No such range.",
    422: "The request, or the pipeline in it, is not valid.",
    429: "The user's quota is used up.",
    431: "The request's headers are too large.",
    503: "Something that the service needs is missing: the store, disk space, publishing.",
}


Answers = dict[int | str, dict[str, Any]]
"""Entries of an OpenAPI document, by status."""


def answers(*statuses: int, **others: dict[str, Any]) -> Answers:
    """The OpenAPI entries of a route's answers: errors by their status, those that every route may give among them, and
    others by name (`s206={…}` for the status 206).
    """
    told: Answers = {int(name[1:]): entry for name, entry in others.items()}
    return told | {
        status: {"model": Problem, "description": WORDS[status]} for status in sorted({403, 413, 422, 431, 503, *statuses})
    }


def problem_of(error: MechmergeError) -> Problem:
    """An error as the API tells it."""
    return Problem(
        where=_line(error.where) or "",
        expected=_line(error.expected),
        found=_line(error.found),
        fix=_line(error.fix),
    )


def status_of(error: MechmergeError) -> int:
    """The status of an error's answer."""
    if isinstance(error, ServiceError):
        return error.status
    for kind, status in ((InputError, 422), (GateRefused, 409), (MissingError, 503)):
        if isinstance(error, kind):
            return status
    return 500


def answer(error: MechmergeError) -> JSONResponse:
    """The answer to a request that ended with an error."""
    headers = error.headers if isinstance(error, ServiceError) else None
    return JSONResponse(problem_of(error).model_dump(), status_of(error), headers)


def _line(text: str | None) -> str | None:
    return None if text is None else " ".join(text.split())[:2000]
