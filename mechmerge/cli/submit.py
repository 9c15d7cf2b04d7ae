"""`mechmerge submit`."""

from __future__ import annotations

from pathlib import Path

import click

from mechmerge.cli.remote import connect, exit_code, follow, server_option


@click.command()
@click.argument("pipeline", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--priority", type=click.IntRange(0, 9), help="Higher ones go first; above 5 for administrators (default: 5).")
@click.option("--follow", "wait", is_flag=True, help="Show on stderr what happens, until the job ends.")
@server_option
def command(pipeline: Path, priority: int | None, wait: bool, server: str) -> int:
    """Queue a PIPELINE file, as `mechmerge run` takes it, on a server, and print the job's id.

    Behaviour files, suites and data that it names are sent along. Models are not: a folder is named to the server by its
    absolute path, and must be one that the server sees and allows. With --follow the exit code is 3 where
    the gate refused, 1 where the job failed or was cancelled.
    """
    with connect(server) as client:
        from mechmerge.service.client import bundle

        job = client.submit(bundle(pipeline), priority)
        click.echo(job["id"])
        return exit_code(follow(client, job["id"], lambda line: click.echo(line, err=True))) if wait else 0
