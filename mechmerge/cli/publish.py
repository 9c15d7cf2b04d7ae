"""`mechmerge publish`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mechmerge.cli.common import format_option, make_progress, quiet_option, show

if TYPE_CHECKING:
    from mechmerge.publish.hub import Published
    from mechmerge.publish.plan import Mode


def hub_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """How a publication reaches the Hub, as `publish` and `publish-scores` take it."""
    options = (
        click.option("--pr", "as_pr", is_flag=True, help="Stop at the verified pull request, for a person to merge."),
        click.option("--branch", metavar="NAME", help="Publish onto this branch rather than main; made if it is not there."),
        click.option("--direct", is_flag=True, help="One commit straight to main, without a staging branch."),
        click.option("--private", is_flag=True, help="Make a private repository; refused where it is there and public."),
        click.option("--tag", metavar="TAG", help="Tag the new commit."),
        click.option(
            "--license", "license_", metavar="NAME",
            help="Licence, as the Hub writes it (default: the pipeline's, else the parents' common one).",
        ),
        click.option("--dry-run", is_flag=True, help="Check everything, compare with the Hub, say what would change."),
    )  # fmt: skip
    for option in reversed(options):
        function = option(function)
    return function


def mode_of(as_pr: bool, branch: str | None, direct: bool) -> Mode:
    """The mode that the options name.

    Raises:
        click.UsageError: two of them.
    """
    if sum((as_pr, branch is not None, direct)) > 1:
        raise click.UsageError("--pr, --branch and --direct exclude each other")
    return "pr" if as_pr else "branch" if branch is not None else "direct" if direct else "main"


def show_published(published: Published, output: str) -> None:
    """Prints what was published on stdout."""
    if output == "json":
        click.echo(published.model_dump_json())
        return
    plan = published.plan
    facts = {
        "revision": published.revision,
        "commit": published.commit or "none: a dry run",
        "pull request": published.pull_request,
        "tag": published.tag,
        "new or changed": f"{len(plan.send)} files, {plan.bytes / 1e6:.1f} MB",
        "sent now": f"{len(published.uploaded)} files",
        "there already": f"{len(plan.keep)} files",
        "removed": f"{len(plan.delete)} files",
        "stayed here": ", ".join(plan.left_out) or "nothing",
    }
    show([{"field": name, "value": value} for name, value in facts.items() if value is not None], output, published.url)
    if published.dry_run:
        held = [("send", plan.send), ("keep", plan.keep), ("remove", plan.delete)]
        show([{"what": what, "file": path} for what, paths in held for path in paths], output, "files")


@click.command()
@click.argument("source", metavar="RUN_OR_MODEL", type=click.Path(path_type=Path))
@click.argument("repo", metavar="REPO")
@click.option("--model", metavar="NAME", help="Recipe of the run (default: the one that the pipeline publishes).")
@click.option("--gate", type=click.Path(path_type=Path, dir_okay=False), help="Gate file (default: the run's own gate).")
@click.option("--evaluation", type=click.Path(path_type=Path, dir_okay=False),
              help="evaluation.json of these very weights (default: the run's).")  # fmt: skip
@click.option("--no-gate", is_flag=True, help="Publish without a gate that passed; the card says so.")
@hub_options
@quiet_option
@format_option
def command(
    source: Path,
    repo: str,
    model: str | None,
    gate: Path | None,
    evaluation: Path | None,
    no_gate: bool,
    as_pr: bool,
    branch: str | None,
    direct: bool,
    private: bool,
    tag: str | None,
    license_: str | None,
    dry_run: bool,
    quiet: bool,
    output: str,
) -> None:
    """Publish the merge of RUN_OR_MODEL, gated, with its card, recipe and measurements, as REPO (owner/name) on the Hub.

    The files are staged on a branch of their own, verified by checksums and sizes, and reach main in one commit, if main still
    stands where it stood. Until then main is as it was; after a failure the same command goes on and sends nothing twice.

    RUN_OR_MODEL is a run directory, or a model folder that `mechmerge merge` wrote. The token is huggingface_hub's own:
    `hf auth login`, or HF_TOKEN. Exit code 3: the gate refuses, or its evaluation is of other weights.
    """
    mode = mode_of(as_pr, branch, direct)
    from mechmerge.publish.hub import publish

    published = publish(
        source,
        repo,
        model=model,
        gate=gate,
        evaluation=evaluation,
        no_gate=no_gate,
        mode=mode,
        branch=branch,
        private=private,
        dry_run=dry_run,
        tag=tag,
        license=license_,
        progress=make_progress(quiet),
    )
    show_published(published, output)
