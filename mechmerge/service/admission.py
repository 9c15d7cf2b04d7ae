"""What a pipeline may name when it comes from elsewhere: everything else is refused before anything is read or fetched.

- Models: folders below an allowed one (after following links), models of allowed owners on the Hub, and the demo's base. The
  references are rewritten so that nothing else can be meant by them later: folders absolute, the Hub's as `hf://owner/name`.
- Files: those sent along, below the job's input folder, by the names that the pipeline uses.
- Addresses: none. A reference holds no URL, and the Hub's address is the server's own setting.

A pipeline is parsed by the safe loader without aliases, and written anew from what was understood. Its chat template is
rendered in transformers' sandbox, by the worker. The worker asks again when it starts: folders and settings may have changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from mechmerge.artifacts import parse_document, parse_yaml
from mechmerge.behaviors.schema import builtin_names, protected_names
from mechmerge.errors import InputError
from mechmerge.evaluate.suites import BUILTIN, is_task
from mechmerge.models.demo import NAME as DEMO
from mechmerge.models.hub_files import PREFIX
from mechmerge.pipeline.schema import Pipeline
from mechmerge.service.settings import Settings

PIPELINE = "pipeline.yaml"
PIPELINE_BYTES = 100_000
FILES, FILE_DEPTH = 64, 4
SUFFIXES = (".yaml", ".yml", ".json", ".jsonl")
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")
_HUB = re.compile(r"(?P<owner>[A-Za-z0-9][\w.-]*)/(?P<name>[A-Za-z0-9_][\w.-]*)(?P<revision>@[A-Za-z0-9_][\w./-]*)?", re.ASCII)


def admit(text: str, files: Iterable[str], settings: Settings) -> Pipeline:
    """The pipeline of a text, if it names only what it may, with its references rewritten.

    Args:
        text: YAML.
        files: names of the files sent along.
        settings: the server's.

    Raises:
        SchemaError, InputError: naming the place.
    """
    if len(text.encode()) > PIPELINE_BYTES:
        raise InputError("pipeline", expected=f"at most {PIPELINE_BYTES} bytes", found=str(len(text.encode())))
    pipeline = parse_document(Pipeline, parse_yaml(text, "pipeline"), "pipeline")
    if "\0" in pipeline.title or any("\ud800" <= character <= "\udfff" for character in pipeline.title):
        # YAML can spell them out, and no database or file takes them.
        raise InputError("pipeline: title", expected="text", found=ascii(pipeline.title[:200]))
    names = check_names(files)
    groups = {"formats", *builtin_names()}
    for name, plan in pipeline.behaviors.items():
        # What the pipeline calls it is a file's name too, where it names no other.
        _check_file(f"pipeline: behaviors.{name}", plan.file or name, names, groups)
    for name, ability in pipeline.protect.items():
        _check_file(f"pipeline: protect.{name}", ability.file or name, names, groups | {*protected_names()})
    for suite in pipeline.evaluate.suites:
        if not is_task(suite):
            _check_file("pipeline: evaluate.suites", suite, names, set(BUILTIN))
    if pipeline.evaluate.ifeval_data is not None:
        _check_file("pipeline: evaluate.ifeval_data", pipeline.evaluate.ifeval_data, names, set())
    base = admit_reference(pipeline.base, settings)
    experts = {name: admit_reference(reference, settings) for name, reference in pipeline.experts.items()}
    return pipeline.model_copy(update={"base": base, "experts": experts})


def check_names(files: Iterable[str]) -> set[str]:
    """The names of the files sent along, checked: relative, without `..` or hidden parts, of a kind that pipelines name.

    Raises:
        InputError: one is not.
    """
    names = set(files)
    if len(names) > FILES:
        raise InputError("files", expected=f"at most {FILES}", found=str(len(names)))
    for name in names:
        parts = name.split("/")
        plain = len(parts) <= FILE_DEPTH and all(_PART.fullmatch(part) for part in parts)
        if not plain or not name.endswith(SUFFIXES) or name == PIPELINE:
            raise InputError(
                f"files: {name[:200]!r}",
                expected=f"a relative name of letters, digits, _ . - and /, ending in {' '.join(SUFFIXES)}",
                found="another",
            )
    folders = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    # The pipeline itself lies beside them.
    if twice := sorted((names | {PIPELINE}) & folders):
        raise InputError(f"files: {twice[0]!r}", expected="a file", found="a folder of another file as well")
    return names


def _check_file(where: str, name: str, sent: set[str], known: set[str]) -> None:
    if name not in sent and name not in known:
        choices = f", or one of {', '.join(sorted(known))}" if known else ""
        raise InputError(
            where, expected=f"a file sent along{choices}", found=repr(name[:200]), fix="send it in `files` under this name"
        )


def admit_reference(reference: str, settings: Settings) -> str:
    """A model reference that may be used, written so that it can only mean this.

    Raises:
        InputError: it is not a reference, or names what is not allowed.
    """
    # A folder's name may hold a plus sign itself.
    if _is_path(reference) and Path(reference).is_dir():
        return _folder(reference, settings.folders)
    return "+".join(_part(part, settings) for part in reference.split("+"))


def _part(part: str, settings: Settings) -> str:
    if part == f"demo:{DEMO}":
        return part
    if _is_path(part):
        return _folder(part, settings.folders)
    match = _HUB.fullmatch(part.removeprefix(PREFIX))
    if match is None or ".." in part:
        raise InputError(
            f"model reference {part[:200]!r}",
            expected=f"an absolute folder, owner/name[@revision] or demo:{DEMO}",
            found="something else",
        )
    if "*" not in settings.namespaces and match["owner"] not in settings.namespaces:
        raise InputError(
            f"model reference {part[:200]!r}",
            expected=f"an owner that this server allows ({', '.join(settings.namespaces) or 'none'})",
            found=match["owner"],
            fix="ask for `mechmerge serve --allow-namespace`",
        )
    return f"{PREFIX}{match.group()}"


def _is_path(text: str) -> bool:
    return text.startswith(("/", "~", "."))


def _folder(text: str, allowed: tuple[Path, ...]) -> str:
    """A folder below an allowed one. What lies elsewhere is refused in the same words whether it is there or not."""
    outside = InputError(
        f"model reference {text[:200]!r}",
        expected="an absolute folder below one that this server allows",
        found="another",
        fix="`mechmerge serve --allow-folder DIR` allows more",
    )
    if not text.startswith("/") or "\0" in text:
        raise outside
    path = Path(text)
    try:
        real = path.resolve()
    except (OSError, RuntimeError):
        raise outside from None
    # Before links are followed as well, else the answer would tell what lies where.
    if not any(real.is_relative_to(folder) and _lexical(path).is_relative_to(folder) for folder in allowed):
        raise outside
    if not real.is_dir():
        raise InputError(f"model reference {text[:200]!r}", expected="a folder", found="none of this name")
    return str(real)


def _lexical(path: Path) -> Path:
    """A path without `..`, links not followed."""
    import os.path

    return Path(os.path.normpath(path))


def check_repo(repo: str, settings: Settings) -> str:
    """The name of a repository that may be published to.

    Raises:
        InputError: not `owner/name`, or an owner that is not allowed.
    """
    match = _HUB.fullmatch(repo)
    if match is None or match["revision"] or ".." in repo:
        raise InputError("repo", expected="owner/name", found=repr(repo[:200]))
    if match["owner"] not in settings.publish_to:
        raise InputError(
            f"repo {repo[:200]}",
            expected=f"an owner that this server publishes to ({', '.join(settings.publish_to) or 'none'})",
            found=match["owner"],
            fix="ask for `mechmerge serve --publish-to OWNER`",
        )
    return repo


def write_input(folder: Path, pipeline: str, files: Mapping[str, str]) -> None:
    """Writes a pipeline and the files sent along into a new folder; their names are checked.

    Raises:
        InputError: a name that may not be, or a text that UTF-8 cannot hold.
    """
    check_names(files)
    for name, text in {PIPELINE: pipeline, **files}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.write_text(text, encoding="utf-8")
        except UnicodeEncodeError:
            # JSON can spell out half of a surrogate pair.
            raise InputError(f"files: {name!r}", expected="text in UTF-8", found="half a surrogate pair") from None


def sent_files(folder: Path) -> list[str]:
    """Names of the files that were sent along."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != PIPELINE)
