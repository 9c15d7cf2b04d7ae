"""`mechmerge completion`."""

from __future__ import annotations

import click

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def command(shell: str) -> None:
    """Print the script that completes commands and options in SHELL.

    For this session: eval "$(mechmerge completion bash)". For all of them: put it into ~/.bash_completion, into a file
    _mechmerge in a folder of zsh's $fpath, or into ~/.config/fish/completions/mechmerge.fish.
    """
    from click.shell_completion import get_completion_class

    from mechmerge.cli.main import COMPLETE, PROGRAM, cli

    kind = get_completion_class(shell)
    if kind is None:  # a shell that this click does not know
        raise click.UsageError(f"no completion for {shell} in this version of click")
    # Without click's look at the version of the bash that runs here: the script is for the user's own.
    maker = kind(cli, {}, PROGRAM, COMPLETE)
    click.echo(maker.source_template % maker.source_vars())
