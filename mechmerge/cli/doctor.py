"""`mechmerge doctor`."""

from __future__ import annotations

import click

from mechmerge.cli.common import format_option, show


@click.command()
@click.option("--offline", is_flag=True, help="Ask nothing of the network.")
@format_option
def command(offline: bool, output: str) -> int:
    """Look whether this machine has what is needed: versions, devices, memory, disk, the Hub, data, tools.

    Exit code 4 when something that is needed is missing; notes are about what only some work needs. A token is looked for
    and tried, never printed.
    """
    import json

    from mechmerge.pipeline.doctor import examine, passes

    checks = examine(offline=offline)
    if output == "json":
        found = {"ok": passes(checks), "checks": [check._asdict() for check in checks]}
        click.echo(json.dumps({"doctor": found}, ensure_ascii=False))
    else:
        show(
            [{"": check.state, "what": check.name, "found": check.found, "to do": check.fix} for check in checks],
            output,
            "doctor",
        )
    return 0 if passes(checks) else 4
