"""`mechmerge mergekit`."""

from __future__ import annotations

import click


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("tool")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def command(tool: str, arguments: tuple[str, ...]) -> int:
    """Run mergekit's own TOOL (yaml, multi, pytorch, extract-lora, ...) with our merge method registered.

    What `mechmerge recipe --emit masked` writes beside the recipe is run by `mechmerge mergekit yaml mergekit.yaml OUT`.
    """
    from mechmerge.merge.tools import run_tool

    result = run_tool(tool, arguments)
    return result if isinstance(result, int) else 0
