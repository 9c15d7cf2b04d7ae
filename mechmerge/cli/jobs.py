"""`mechmerge jobs`."""

from __future__ import annotations

import json
from typing import Any

import click

from mechmerge.cli.common import format_option, show
from mechmerge.cli.remote import connect, server_option, when


@click.command()
@click.argument("job", required=False)
@click.option("--state", "states", multiple=True, type=click.Choice(["queued", "running", "done", "failed", "cancelled"]),
              help="Only these; repeat.")  # fmt: skip
@click.option("--user", help="Only this user's.")
@click.option("--limit", type=click.IntRange(1, 200), default=50, show_default=True, help="At most so many.")
@server_option
@format_option
def command(job: str | None, states: tuple[str, ...], user: str | None, limit: int, server: str, output: str) -> None:
    """List the jobs of a server, the newest first, or show one JOB."""
    with connect(server) as client:
        found = [client.job(job)] if job is not None else client.jobs(states, user, limit)
    if output == "json":
        click.echo(json.dumps({"jobs": found}, ensure_ascii=False))
    elif job is not None:
        rows = [{"field": name, "value": _value(name, value)} for name, value in found[0].items() if value not in (None, {})]
        show(rows, output, f"job {job}")
    else:
        rows = [
            {
                "id": one["id"],
                "title": one["title"],
                "user": one["user"],
                "state": one["state"],
                "submitted": when(one["created"]),
                "where": (one["progress"] or {}).get("stage") or (one["result"] or {}).get("gate", ""),
            }
            for one in found
        ]
        show(rows, output, "jobs")


def _value(name: str, value: Any) -> str:
    if name in ("created", "started", "ended"):
        return when(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)
