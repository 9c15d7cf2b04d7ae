"""`mechmerge cancel`."""

from __future__ import annotations

import click

from mechmerge.cli.remote import connect, server_option


@click.command()
@click.argument("job")
@server_option
def command(job: str, server: str) -> None:
    """Cancel a JOB of a server: a queued one at once, a running one within a second; its stages so far are kept."""
    with connect(server) as client:
        found = client.cancel(job)
    click.echo(f"{found['id']}: {'stopping' if found['cancelling'] else found['state']}", err=True)
