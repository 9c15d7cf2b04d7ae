"""Publishing a merge on the Hugging Face Hub: gate, checks of the folder, card, staged upload, verification, promotion, tag.

The steps on the Hub's side are those of `staging.py`; what leaves the machine is said in `outbox.py`. Tokens come from
huggingface_hub's own places (`hf auth login`, `HF_TOKEN`) and stand in no argument, file, log or error of ours.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mechmerge.errors import InputError
from mechmerge.progress import SILENT, Progress
from mechmerge.publish.licenses import hub_lookup
from mechmerge.publish.model import pack_model
from mechmerge.publish.patience import PATIENCE, Patience
from mechmerge.publish.plan import Mode
from mechmerge.publish.repository import Repository
from mechmerge.publish.scores import pack_scores
from mechmerge.publish.source import find_source
from mechmerge.publish.staging import MAIN, Published, send

__all__ = ["Published", "publish", "publish_scores"]


def publish(
    source: Path,
    repo: str,
    *,
    model: str | None = None,
    gate: Path | None = None,
    evaluation: Path | None = None,
    no_gate: bool = False,
    mode: Mode = "main",
    branch: str | None = None,
    private: bool = False,
    dry_run: bool = False,
    tag: str | None = None,
    license: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
    patience: Patience = PATIENCE,
    progress: Progress = SILENT,
) -> Published:
    """Publishes a merged model with its card, recipe and measurements.

    Args:
        source: a run directory, or a model folder that `mechmerge merge` wrote.
        repo: `owner/name`.
        model: name of the recipe in a run (default: the one that the pipeline publishes, or the only one).
        gate: a gate file (default: the gate of the run's pipeline).
        evaluation: evaluation.json (default: the run's); it must be of these very weights.
        no_gate: publish without a gate that passed; the card says so.
        mode: `main`: stage on a branch of its own, verify, and promote to main; `pr`: stop at the verified pull request;
            `branch`: promote to `branch` rather than to main; `direct`: one commit to main, without staging.
        branch: the branch of mode `branch`.
        private: make the repository a private one, if it is not there.
        dry_run: check everything here, compare with the Hub, and change nothing.
        tag: a tag for the new commit.
        license: licence of the merge (default: the pipeline's, else the parents' common one).
        endpoint: the Hub's address (default: huggingface_hub's own).
        token: a token (default: huggingface_hub's own places).
        patience: how often and how long requests are repeated.
        progress: told about steps.

    Returns:
        What was done. The branch holds either all of it or nothing; calling this again goes on.

    Raises:
        GateRefused: the gate refuses, or its evaluation is of other weights.
        CheckpointError: the model is not complete, not finite, or does not load.
        InputError, MissingError: anything else, in one line.
    """
    check_options(mode, branch, tag)
    repository = Repository(repo, endpoint=endpoint, token=token, patience=patience, progress=progress)
    if not dry_run:
        repository.require_token()
    found = find_source(source, model, gate=gate, evaluation=evaluation, no_gate=no_gate, progress=progress)
    with _quiet_bars(), tempfile.TemporaryDirectory(prefix="mechmerge-publish-") as folder:
        outbox = pack_model(found, Path(folder), repo, license=license, no_gate=no_gate, lookup=hub_lookup(endpoint, token))
        return send(outbox, repository, mode=mode, branch=branch, private=private, dry_run=dry_run, tag=tag, progress=progress)


def publish_scores(
    run: Path,
    repo: str,
    *,
    mode: Mode = "main",
    branch: str | None = None,
    private: bool = False,
    dry_run: bool = False,
    tag: str | None = None,
    license: str | None = None,
    endpoint: str | None = None,
    token: str | None = None,
    patience: Patience = PATIENCE,
    progress: Progress = SILENT,
) -> Published:
    """Publishes the score, effect and rounds files of a run as a data set repository; the arguments are those of `publish`.

    Raises:
        InputError, MissingError: as `publish` does; there is no gate to ask, since nothing is merged.
    """
    check_options(mode, branch, tag)
    repository = Repository(repo, "dataset", endpoint=endpoint, token=token, patience=patience, progress=progress)
    if not dry_run:
        repository.require_token()
    with _quiet_bars(), tempfile.TemporaryDirectory(prefix="mechmerge-publish-") as folder:
        outbox = pack_scores(run, Path(folder), repo, license=license, lookup=hub_lookup(endpoint, token))
        return send(outbox, repository, mode=mode, branch=branch, private=private, dry_run=dry_run, tag=tag, progress=progress)


def check_options(mode: Mode, branch: str | None, tag: str | None) -> None:
    """Refuses options that contradict each other.

    Raises:
        InputError: naming them.
    """
    if (mode == "branch") != (branch is not None):
        raise InputError("--branch", expected="a name in mode branch, and only there", found=f"{branch!r} in mode {mode}")
    if branch == MAIN or (branch or "").startswith("refs/"):
        raise InputError("--branch", expected="the name of a branch beside main", found=repr(branch))
    if mode == "pr" and tag is not None:
        raise InputError(
            "--tag", expected="a commit on a branch to name", found="--pr, which makes none", fix="tag it once it is merged"
        )


@contextmanager
def _quiet_bars() -> Iterator[None]:
    """Without huggingface_hub's own bars: progress is ours."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
