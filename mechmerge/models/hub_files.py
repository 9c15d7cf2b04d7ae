"""Files on the Hugging Face Hub, named as `hf://` references wherever a file of ours may be named.

    hf://datasets/owner/name[@revision]/path/file.safetensors
    hf://owner/name[@revision]/mechmerge/recipe.yaml

The syntax is huggingface_hub's (https://huggingface.co/docs/huggingface_hub/package_reference/hf_uris). A file is downloaded
into huggingface_hub's cache, at one commit, which is said; what is recorded of it is its name and digest, as of any other file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from mechmerge.artifacts import parse_yaml, read_text
from mechmerge.errors import InputError
from mechmerge.models.hub_errors import hub_error, is_hubs, quiet_hub
from mechmerge.progress import SILENT, Progress

PREFIX = "hf://"
SYNTAX = "hf://[datasets/]owner/name[@revision]/path/to/file"
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_hub_reference(text: str) -> bool:
    """Whether a text is an `hf://` reference."""
    return text.startswith(PREFIX)


def local_file(reference: str | Path, progress: Progress = SILENT, endpoint: str | None = None) -> Path:
    """The local path of a file: a path stays what it is, an `hf://` reference is downloaded.

    Beside a recipe its masks file is downloaded too, from the same commit.

    Args:
        reference: a path, or `hf://[datasets/]owner/name[@revision]/path`.
        progress: told which commit it was.
        endpoint: the Hub's address (default: huggingface_hub's own, `HF_ENDPOINT`).

    Raises:
        InputError: not a reference, or no such repository, revision or file.
        MissingError: the Hub cannot be reached, or wants a token.
    """
    text = str(reference)
    if not is_hub_reference(text):
        return Path(text)
    kind, repository, revision, name = _parse(text)
    path = _download(kind, repository, revision, name, text, endpoint)
    # …/snapshots/<commit>/path/in/repository
    commit = path.parents[len(PurePosixPath(name).parts) - 1].name
    progress.note(f"{text}: commit {commit}")
    masks = _masks_of(path) if path.suffix in (".yaml", ".yml") else None
    if masks is not None:
        beside = str(PurePosixPath(name).with_name(masks))
        _download(kind, repository, commit if _COMMIT.fullmatch(commit) else revision, beside, text, endpoint)
    return path


def _parse(text: str) -> tuple[str, str, str | None, str]:
    """(type, repository, revision, path in it) of an `hf://` reference."""
    from huggingface_hub import parse_hf_uri
    from huggingface_hub.errors import HfUriError

    try:
        uri = parse_hf_uri(text)
    except HfUriError as error:
        raise InputError(f"reference {text!r}", expected=SYNTAX, found=str(error).split(". ")[0]) from None
    parts = PurePosixPath(uri.path_in_repo).parts
    if uri.type not in ("model", "dataset") or not parts or ".." in parts:
        raise InputError(f"reference {text!r}", expected=SYNTAX, found="no file of a model or data set")
    return uri.type, uri.id, uri.revision, uri.path_in_repo


def _download(kind: str, repository: str, revision: str | None, name: str, text: str, endpoint: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        with quiet_hub():
            found = hf_hub_download(repository, name, repo_type=kind, revision=revision, endpoint=endpoint)
    except Exception as error:
        if not is_hubs(error):
            raise
        raise hub_error(error, f"reference {text!r}") from None
    return Path(str(found))


def _masks_of(path: Path) -> str | None:
    """The masks file that a recipe names; None for other files. Whether it is a recipe at all is for its reader to say."""
    try:
        value = parse_yaml(read_text(path), str(path))
    except InputError:
        return None
    masks = value.get("masks") if isinstance(value, Mapping) else None
    name = masks.get("file") if isinstance(masks, Mapping) else None
    plain = isinstance(name, str) and name == PurePosixPath(name).name and name.endswith(".safetensors")
    return str(name) if plain else None
