"""`mechmerge`: a table of commands, loaded when they are called, and the one place where errors become exit codes."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click

from mechmerge.cli.config import apply, name_variables
from mechmerge.errors import MechmergeError, machine_error
from mechmerge.version import __version__

COMMANDS: dict[str, tuple[str, str]] = {
    # command: (module under mechmerge.cli, one line of help); the module holds a click command named `command`
    "demo": ("demo", "Run the whole demo on SmolLM2-135M."),
    "run": ("run", "Run a pipeline file: every stage, resumable."),
    "sweep": ("sweep", "Merge, evaluate and rank combinations of experts, policies and parameters."),
    "tune": ("tune", "Search what a recipe leaves open, on development prompts."),
    "localize": ("localize", "Find which components of an expert carry a behaviour."),
    "effects": ("effects", "Measure what every component of every expert does to every behaviour."),
    "rounds": ("rounds", "Settle a merge in rounds, measuring where the decision is taken."),
    "recipe": ("recipe", "Compile measured files into a merge recipe."),
    "merge": ("merge", "Carry out a recipe and write the merged model."),
    "mergekit": ("mergekit", "Run mergekit's own tools with our merge method registered."),
    "export": ("export", "Write a recipe as a LoRA adapter, or one of its experts as a masked checkpoint."),
    "evaluate": ("evaluate", "Generate answers and judge them, with intervals and paired tests."),
    "compare": ("compare", "Compare models of evaluation files, paired on the same prompts."),
    "gate": ("gate", "Accept or refuse an evaluation by the rules of a gate file."),
    "card": ("card", "Write the model card of a run."),
    "publish": ("publish", "Publish a merge on the Hugging Face Hub: gated, staged, verified."),
    "publish-scores": ("publish_scores", "Publish score, effect and rounds files as a data set on the Hub."),
    "report": ("report", "Draw the heat maps of a run, its Markdown summary and its page."),
    "serve": ("serve", "Serve pipelines to a team: a job queue with an HTTP API."),
    "submit": ("submit", "Queue a pipeline file on a server."),
    "jobs": ("jobs", "List the jobs of a server."),
    "logs": ("logs", "Print what happened to a job, or follow it."),
    "cancel": ("cancel", "Cancel a job."),
    "inspect": ("inspect", "Print what a file, a run, a model or a pair of models holds."),
    "generate": ("generate", "Try a model: answer prompts, alone or beside another model."),
    "cache": ("cache", "See and clear what lies in the cache of this machine."),
    "doctor": ("doctor", "Look whether this machine has what is needed."),
    "completion": ("completion", "Print the script that completes commands in a shell."),
}


PROGRAM, COMPLETE = "mechmerge", "_MECHMERGE_COMPLETE"
"""Our name, and the variable by which a shell asks for completions."""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are used: `--help` stays fast and free of torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"mechmerge.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = module.command
        name_variables(command, f"MECHMERGE_{cmd_name.upper().replace('-', '_')}")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="mechmerge")
@click.option("--debug", is_flag=True, envvar="MECHMERGE_DEBUG", help="Show tracebacks.")
@click.option("--allow-pickle", is_flag=True, envvar="MECHMERGE_ALLOW_PICKLE",
              help="Read models that are pickles alone: their tensors, never their code.")  # fmt: skip
@click.pass_context
def cli(context: click.Context, debug: bool, allow_pickle: bool) -> None:
    """Model merging with mechanism-aware recipes: localize, compile, merge, evaluate, gate."""
    apply(context, cli, context.invoked_subcommand)
    if allow_pickle:
        from mechmerge.models.pickles import ALLOWED

        ALLOWED.set(True)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments or bool(os.environ.get("MECHMERGE_DEBUG"))
    try:
        result: Any = cli.main(args=arguments, prog_name=PROGRAM, complete_var=COMPLETE, standalone_mode=False)
        sys.exit(result if isinstance(result, int) else 0)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except (click.Abort, KeyboardInterrupt):
        print("mechmerge: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except MechmergeError as error:
        if debug:
            raise
        print(f"mechmerge: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        if debug:
            raise
        trouble = machine_error(error)
        if trouble is not None:
            print(f"mechmerge: {trouble}", file=sys.stderr)
            sys.exit(trouble.exit_code)
        text = " ".join(f"{type(error).__name__}: {error}".split())
        print(f"mechmerge: a bug: {text[:500]} (--debug shows where)", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
