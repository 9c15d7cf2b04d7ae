"""What the commands that talk to a server share."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from mechmerge.errors import MissingError

if TYPE_CHECKING:
    from mechmerge.service.client import Client

PACKAGES = ("alembic", "fastapi", "httpx", "jinja2", "prometheus_client", "python_multipart", "sqlalchemy", "uvicorn")
"""Of the extra `service`, by the names that are imported."""
TOKEN = "MECHMERGE_TOKEN"  # noqa: S105 - the variable's name


def need_service() -> None:
    """Says how to install what the service needs.

    Raises:
        MissingError: it is not installed.
    """
    try:
        for package in PACKAGES:
            importlib.import_module(package)
    except ImportError as error:
        raise MissingError(
            f"package {error.name}", expected="the service's packages", found="none", fix="pip install 'mechmerge[service]'"
        ) from None


def server_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--server URL`."""
    return click.option(
        "--server", metavar="URL", default="http://127.0.0.1:8000", show_default=True, envvar="MECHMERGE_SERVER",
        help=f"The server (or MECHMERGE_SERVER); a token is read from {TOKEN}.",
    )(function)  # fmt: skip


def connect(server: str) -> Client:
    """A client of a server, with the token of the environment."""
    need_service()
    from mechmerge.service.client import Client

    return Client(server, os.environ.get(TOKEN) or None)


def when(seconds: float | None) -> str:
    """A time as text (UTC)."""
    return "" if seconds is None else time.strftime("%Y-%m-%d %H:%M:%SZ", time.gmtime(seconds))


def line_of(event: dict[str, Any]) -> str | None:
    """An event of a log as a line; None for what only a bar would show."""
    clock = time.strftime("%H:%M:%S", time.localtime(event["time"]))
    text = event.get("text", "")
    match event["type"]:
        case "state":
            return f"{clock} job {text}"
        case "stage":
            return f"{clock} {'▶' if text == 'begins' else '✓'} {event.get('stage')}"
        case "step":
            return f"{clock}   {text} …"
        case "progress":
            return f"{clock}   {text}: {event.get('done')} of {event.get('total')}"
        case "error":
            return f"{clock} ERROR {text}"
        case _:
            return f"{clock} {text}"


def follow(client: Client, id: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Shows what happens to a job until it ends; returns the job."""
    for event in client.follow(id):
        if event["type"] == "end":
            return event
        line = line_of(event)
        if line is not None:
            say(line)
    raise AssertionError("a followed job ends")


def exit_code(job: dict[str, Any]) -> int:
    """The exit code of a job that has ended: 3 where its gate refused, 1 where it failed or was cancelled."""
    if job["state"] != "done":
        return 1
    return 3 if (job["result"] or {}).get("gate") == "refused" else 0
