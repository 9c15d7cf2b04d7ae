"""`mechmerge logs`."""

from __future__ import annotations

import click

from mechmerge.cli.remote import connect, exit_code, follow, line_of, server_option


@click.command()
@click.argument("job")
@click.option(
    "--follow",
    "wait",
    is_flag=True,
    help="Go on until the job ends; exit code 3 where its gate refused, 1 where it failed or was cancelled.",
)
@server_option
def command(job: str, wait: bool, server: str) -> int:
    """Print what happened to a JOB of a server."""
    with connect(server) as client:
        if wait:
            return exit_code(follow(client, job, click.echo))
        for event in client.log(job):
            line = line_of(event)
            if line is not None:
                click.echo(line)
    return 0
