"""`mechmerge publish-scores`."""

from __future__ import annotations

from pathlib import Path

import click

from mechmerge.cli.common import format_option, make_progress, quiet_option
from mechmerge.cli.publish import hub_options, mode_of, show_published


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("repo", metavar="REPO")
@hub_options
@quiet_option
@format_option
def command(
    run: Path,
    repo: str,
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
    """Publish the score, effect and rounds files of RUN as the data set REPO (owner/name) on the Hub, with a card.

    They reach the Hub as `mechmerge publish` brings a model there. Anyone can then make a recipe from them:
    `mechmerge recipe hf://datasets/owner/name/effects.safetensors --policy conflict --out recipe.yaml`.
    """
    mode = mode_of(as_pr, branch, direct)
    from mechmerge.publish.hub import publish_scores

    published = publish_scores(
        run,
        repo,
        mode=mode,
        branch=branch,
        private=private,
        dry_run=dry_run,
        tag=tag,
        license=license_,
        progress=make_progress(quiet),
    )
    show_published(published, output)
