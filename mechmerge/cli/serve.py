"""`mechmerge serve`, and its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mechmerge.cli.common import Finite, device_option, format_option, show
from mechmerge.cli.remote import need_service, when

if TYPE_CHECKING:
    from mechmerge.service.settings import Settings
    from mechmerge.service.tokens import Tokens

DATA = "~/.local/share/mechmerge"


def _size(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int:
    from mechmerge.localize.plan import parse_size

    return 0 if value is None else parse_size(value)


@click.group(invoke_without_command=True)
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; beyond this machine with tokens only."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="Port; 0: any that is free.")
@click.option("--allow-host", "hosts", multiple=True, metavar="NAME",
              help="A name under which the server is reached, such as a proxy's; repeat.")  # fmt: skip
@click.option("--data", type=click.Path(path_type=Path, file_okay=False), default=DATA, show_default=True,
              help="Folder of the store and the jobs.")  # fmt: skip
@click.option("--database", metavar="URL", help="postgresql://USER:PASSWORD@HOST/DATABASE (default: SQLite in --data). "
              "Better in the environment: MECHMERGE_SERVE_DATABASE.")  # fmt: skip
@click.option("--slots", type=click.IntRange(0), default=1, show_default=True, help="Jobs that run at once; 0: none.")
@click.option("--threads", type=click.IntRange(1), help="Threads of each job (default: the cores, shared among the slots).")
@click.option("--nice", type=click.IntRange(0, 19), default=5, show_default=True,
              help="How far jobs stand back for the server, as nice counts.")  # fmt: skip
@click.option("--time", "hours", type=Finite(min=0, min_open=True), default=24.0, show_default=True,
              help="Working hours after which a job is ended.")  # fmt: skip
@click.option("--memory", callback=_size, metavar="SIZE", help="Memory of a job, such as 16GB (default: no limit).")
@click.option("--disk", callback=_size, metavar="SIZE",
              help="Size of a job's folder, such as 100GB, the shared cache not counted (default: no limit).")  # fmt: skip
@click.option("--free-disk", callback=_size, metavar="SIZE", default="1GB", show_default=True,
              help="What must be free on the disk before a job is taken.")  # fmt: skip
@click.option("--allow-folder", "folders", multiple=True, type=click.Path(path_type=Path, file_okay=False, exists=True),
              help="A folder that models may lie in; repeat (default: none).")  # fmt: skip
@click.option("--allow-namespace", "namespaces", multiple=True, metavar="OWNER",
              help="An owner on the Hub whose models may be named; repeat; '*': all (default: none).")  # fmt: skip
@click.option("--publish-to", multiple=True, metavar="OWNER",
              help="An owner on the Hub that merges may be published under; repeat (default: none).")  # fmt: skip
@click.option("--quota", "quota_jobs", type=click.IntRange(1), default=20, show_default=True,
              help="Jobs of one user that may be queued or running.")  # fmt: skip
@click.option("--quota-running", type=click.IntRange(0), default=0, show_default=True,
              help="Jobs of one user that run at once; 0: as many as there are slots.")  # fmt: skip
@click.option("--attempts", type=click.IntRange(1), default=5, show_default=True,
              help="Times that a worker may die in one stage before its job is given up.")  # fmt: skip
@device_option
@click.pass_context
def command(context: click.Context, /, hours: float, memory: int, disk: int, **given: Any) -> None:
    """Serve pipelines to a team: a job queue with an HTTP API (/openapi.json), until it is interrupted.

    Jobs go on where they were when the server is started again. Everybody on this machine may use a server without tokens;
    with the first token (`mechmerge serve token add NAME`) every request needs one. What jobs may name is said with
    --allow-folder and --allow-namespace. Jobs publish with the server's own Hub token.
    """
    need_service()
    import logging

    from mechmerge.service.settings import Limits, Settings

    limits = Limits(seconds=hours * 3600, memory=memory, disk=disk)
    context.obj = Settings(limits=limits, **given)
    if context.invoked_subcommand is None:
        from mechmerge.service.serve import serve

        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
        serve(context.obj, lambda url: click.echo(f"serving {url}", err=True))


@command.group()
def token() -> None:
    """Add, list and revoke tokens (with --data and --database before the word `token`)."""


def _tokens(settings: Settings) -> Tokens:
    from mechmerge.service.service import open_store
    from mechmerge.service.tokens import Tokens

    return Tokens(open_store(settings)[0])


@token.command()
@click.argument("user")
@click.option("--role", type=click.Choice(["read", "run", "publish", "admin"]), default="run", show_default=True,
              help="What it allows; each allows what those before it do.")  # fmt: skip
@click.option("--days", type=Finite(min=0, min_open=True), help="How long it is valid (default: until it is revoked).")
@click.pass_obj
def add(settings: Settings, user: str, role: Any, days: float | None) -> None:
    """Make a token for USER and print it: this once, since only its digest is kept."""
    _, text = _tokens(settings).add(user, role, None if days is None else days * 86400)
    click.echo(text)


@token.command("list")
@format_option
@click.pass_obj
def list_(settings: Settings, output: str) -> None:
    """List tokens, without their secrets."""
    rows = [
        {
            "id": one.id,
            "user": one.user,
            "role": one.role,
            "created": when(one.created),
            "expires": when(one.expires),
            "revoked": when(one.revoked),
            "used": when(one.used),
        }
        for one in _tokens(settings).all()
    ]
    show(rows, output, "tokens")


@token.command()
@click.argument("id")
@click.pass_obj
def revoke(settings: Settings, id: str) -> None:
    """Make the token ID invalid, at once, and the sessions that it opened."""
    found = _tokens(settings).revoke(id)
    click.echo(f"revoked {found.id} of {found.user}", err=True)
