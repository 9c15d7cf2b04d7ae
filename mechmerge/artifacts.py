"""Files that are complete or absent: atomic writing, digests, schema-checked documents, safetensors with one JSON document.

*Same inputs, same bytes*: JSON is written with sorted keys, YAML in field order, safetensors with a single metadata entry
(several would be written in random order).
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import glob
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TextIO, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mechmerge.errors import InputError, SchemaError

METADATA_KEY = "mechmerge"
MOST_SEED = 2**32 - 1
"""The largest seed that torch, numpy and its older generators (optuna and mergekit draw with those) take; the least is 0."""
YAML_LIMIT = 16_000_000
"""Characters: PyYAML reads about a million in a second, and nothing of ours comes near (many prompts are JSON Lines)."""


Migration = Callable[[dict[str, Any]], dict[str, Any]]
"""From the parsed content of one schema version to that of the next; its argument is a copy of its own."""


class Document(BaseModel):
    """Base of every record that is read from or written to a file: frozen, unknown keys refused.

    A record whose format changed has a `schema_version` above 1 and, in `MIGRATIONS`, what makes an older file one of the next
    version: version → function. A version without one is refused. A field that is added with a default changes no version.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    MIGRATIONS: ClassVar[Mapping[int, Migration]] = {}


D = TypeVar("D", bound=Document)


# ---------------------------------------------------------------------------------------------------------- atomic writing
def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial-{os.getpid()}")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def remove_leftovers(path: Path) -> None:
    """Removes what processes that are gone left behind while writing `path`."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.partial-*"):
        pid = leftover.name.rsplit("-", 1)[1]
        if not pid.isdigit() or int(pid) == os.getpid() or _alive(int(pid)):
            continue
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; it becomes `path` when the block ends well, and is removed otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    partial = _partial(path)
    try:
        yield partial
        with partial.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yields a new temporary folder beside `path`; it becomes `path` (which must not exist) when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path)
    partial = _partial(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for inside in partial.rglob("*"):
            if inside.is_dir():
                _sync_folder(inside)
            elif inside.is_file():
                with inside.open("rb") as handle:
                    os.fsync(handle.fileno())
        _sync_folder(partial)
        os.replace(partial, path)
        _sync_folder(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_new(folder: Path) -> bool:
    """Whether a folder can be made: nothing is there, or an empty one.

    Raises:
        InputError: `.` or `..`, which cannot appear under its own name, or a link to such a folder, whose place it cannot take.
    """
    if folder.name in ("", ".."):
        raise InputError(str(folder), expected="a folder by its name", found="none", fix="name it from the folder above")
    new = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if new and folder.is_symlink():
        raise InputError(str(folder), expected="a new folder", found="a link", fix="name the folder that it points to")
    return new


def write_text(path: Path, text: str) -> None:
    """Writes `text` to `path` atomically (UTF-8)."""
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def lock(path: Path, what: str) -> Iterator[None]:
    """Holds an exclusive lock file, which is gone afterwards, or raises `InputError` naming who holds it.

    What is locked is the file's inode (flock), so a process that is killed holds nothing; its file is taken over.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path, what) as handle:
        handle.truncate(0)
        now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        handle.write(f"{os.getpid()} on {socket.gethostname()} since {now}")
        handle.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def drop_lock(path: Path) -> None:
    """Takes away the lock that a process left which was killed when its work was done; one that is held stays."""
    if path.exists():
        with contextlib.suppress(InputError, OSError), lock(path, str(path)):
            pass


def make_once(folder: Path, what: str, make: Callable[[], None]) -> None:
    """Has a folder made that is not there yet, by one process at a time.

    Where it is there only the lock is taken away that a process left which was killed just after it had made it.

    Raises:
        InputError: another process is making it; what `make` raises.
    """
    path = folder.with_suffix(".lock")
    if folder.exists() and not path.exists():
        return
    try:
        with lock(path, what):
            if not folder.exists():
                make()
    except (InputError, OSError):
        if not folder.exists():
            raise


def _locked(path: Path, what: str) -> TextIO:
    """The lock file, opened and locked."""
    while True:
        handle = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking its holder may have ended and removed it: a lock on that inode binds nobody.
            if _same_file(handle, path):
                return handle
        except BlockingIOError:
            handle.seek(0)
            holder = handle.read().strip() or "unknown"
            handle.close()
            raise InputError(
                what, expected="no other process at work on it", found=f"process {holder}", fix="wait for it or stop it"
            ) from None
        except BaseException:
            handle.close()
            raise
        handle.close()


def _same_file(handle: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


# --------------------------------------------------------------------------------------------------------- files of others
class Watch:
    """Files that must stay as they are while something is made of them: by inode, size and time, which costs no reading.

    Args:
        files: they must exist; they are marked now.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._marks = {path: _mark(path) for path in files}

    def check(self) -> None:
        """Raises `InputError` where a file is another one now."""
        for path, mark in self._marks.items():
            try:
                changed = _mark(path) != mark
            except FileNotFoundError:
                raise InputError(str(path), expected="the file that was there when this began", found="nothing") from None
            if changed:
                raise InputError(
                    str(path), expected="the file as it was when this began", found="a changed one", fix="run the command again"
                )


def _mark(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


# ----------------------------------------------------------------------------------------------------------------- digests
def sha256_file(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces: the form that is digested."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """The sha256, in hex, of a JSON-able value in canonical form."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


# --------------------------------------------------------------------------------------------------------------- documents
def _problem(error: ValidationError) -> tuple[str, str]:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "top level"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown key"
    elif first["type"] not in ("missing", "value_error"):
        message = f"{message} (found {str(first['input'])[:80]!r})"
    return place, message


class _OnlyOnce(yaml.SafeLoader):
    """PyYAML's safe loader without aliases (a YAML bomb) and without duplicate keys (one of them would be lost)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.YAMLError(f"key {key!r} stands twice")
            seen.add(key)
        result: dict[Any, Any] = super().construct_mapping(node, deep)
        return result


def parse_yaml(text: str, where: str) -> Any:
    """Parses YAML (JSON is a subset) with aliases and duplicate keys refused."""
    if len(text) > YAML_LIMIT:
        raise SchemaError(where, expected=f"at most {YAML_LIMIT} characters of YAML", found=str(len(text)))
    try:
        return yaml.load(text, _OnlyOnce)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise SchemaError(where, expected="valid YAML", found=str(error)) from None


def parse_json(text: str, where: str) -> Any:
    """Parses JSON, with one-line errors."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SchemaError(where, expected="valid JSON", found=str(error)) from None


def _migrated(kind: type[Document], value: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The content in the version of today, where it is of an older one.

    Raises:
        SchemaError: a newer version, or an older one that cannot be read any more.
    """
    field, found = kind.model_fields.get("schema_version"), value.get("schema_version")
    if field is None or isinstance(found, bool) or not isinstance(found, int) or found == field.default:
        return value
    if found > field.default:
        raise SchemaError(
            f"{where}: schema_version", expected=f"at most {field.default}", found=f"{found}, of a newer mechmerge",
            fix="upgrade mechmerge",
        )  # fmt: skip
    current = copy.deepcopy(dict(value))
    for version in range(found, field.default):
        if version not in kind.MIGRATIONS:
            raise SchemaError(
                f"{where}: schema_version", expected=str(field.default), found=f"{found}, which is read no more",
                fix="make the file again",
            )  # fmt: skip
        try:
            current = kind.MIGRATIONS[version](current) | {"schema_version": version + 1}
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise SchemaError(
                where, expected=f"a {kind.__name__} of schema version {version}", found=f"{type(error).__name__}: {error}"
            ) from None
    return current


def parse_document(kind: type[D], value: Any, where: str) -> D:
    """Validates a parsed value as a document of type `kind`."""
    if not isinstance(value, Mapping):
        raise SchemaError(where, expected=f"a mapping ({kind.__name__})", found=type(value).__name__)
    value = _migrated(kind, value, where)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        place, message = _problem(error)
        raise SchemaError(f"{where}: {place}: {message}", fix=f"known keys: {', '.join(kind.model_fields)}") from None


def read_text(path: Path) -> str:
    """Reads a UTF-8 text file, with one-line errors."""
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise InputError(str(path), expected="a file", found="nothing there") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(str(path), expected="a readable UTF-8 text file", found=str(error)) from None


def read_document(kind: type[D], path: Path) -> D:
    """Reads a YAML or JSON file as a document of type `kind`."""
    parse = parse_json if path.suffix == ".json" else parse_yaml
    return parse_document(kind, parse(read_text(path), str(path)), str(path))


def to_yaml(document: Document) -> str:
    """A document as YAML in field order."""
    value = document.model_dump(mode="json")
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120)
    if any(c in text for c in "\x85\u2028\u2029\ufeff"):
        # PyYAML writes these line breaks plainly and reads them back as spaces.
        text = yaml.safe_dump(value, sort_keys=False, allow_unicode=False, width=120)
    return text


def write_yaml(path: Path, document: Document) -> None:
    """Writes a document as YAML, in field order, atomically."""
    write_text(path, to_yaml(document))


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON-able value or a document, indented, keys sorted, atomically."""
    if isinstance(value, Document):
        value = value.model_dump(mode="json")
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")


# ----------------------------------------------------------------------------------------------------------------- tensors
def write_arrays(path: Path, arrays: Mapping[str, Any], metadata: Document) -> None:
    """Writes numpy arrays and one JSON document as a safetensors file, atomically."""
    from safetensors.numpy import save

    with atomic_file(path) as partial:
        # In document order, not sorted: the order of a mapping may name a tensor's dimension (experts of an effect file).
        text = json.dumps(metadata.model_dump(mode="json"), separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        # Not `save_file`, whose files only their owner may read.
        partial.write_bytes(save(dict(arrays), {METADATA_KEY: text}))


def read_arrays(path: Path, kind: type[D]) -> tuple[dict[str, Any], D]:
    """Reads a safetensors file of ours: its numpy arrays and its metadata as a document of type `kind`."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as handle:
            text = (handle.metadata() or {}).get(METADATA_KEY)
            if text is None:
                raise SchemaError(str(path), expected=f"a {kind.__name__} written by mechmerge", found="no such metadata")
            return {name: handle.get_tensor(name) for name in handle.keys()}, parse_document(  # noqa: SIM118 - it is no mapping
                kind, parse_json(text, str(path)), str(path)
            )
    except FileNotFoundError:
        raise InputError(str(path), expected="a file", found="nothing there") from None
    except (SafetensorError, OSError) as error:
        raise SchemaError(str(path), expected="a safetensors file", found=str(error)) from None


# ------------------------------------------------------------------------------------------------------------------- units
class Units:
    """The finished units of a stage, as files in one folder: what makes a stage resumable.

    The folder is named by the digest of the stage's inputs, so units of other inputs are never picked up. A unit that cannot be
    read (a file system that lost it with the power) is computed again.

    Args:
        folder: the stage's folder of units.
        inputs: what the stage depends on.
        check: called before a unit is written; it raises where the inputs are no longer what they were.
    """

    def __init__(self, folder: Path, inputs: Any, check: Callable[[], None] | None = None) -> None:
        self.folder, self._check = folder / digest(inputs)[:16], check

    def json(self, key: str, compute: Callable[[], Any]) -> Any:
        """The unit's JSON value: read when it is done, else computed and written."""
        path = self.folder / f"{key}.json"
        with contextlib.suppress(FileNotFoundError, ValueError):
            return json.loads(path.read_text("utf-8"))
        value = compute()
        self._unchanged()
        write_json(path, value)
        return json.loads(path.read_text("utf-8"))

    def arrays(self, key: str, compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The unit's numpy arrays: read when it is done, else computed and written."""
        from safetensors import SafetensorError
        from safetensors.numpy import load_file, save_file

        path = self.folder / f"{key}.safetensors"
        with contextlib.suppress(FileNotFoundError, SafetensorError):
            return load_file(path)
        arrays = dict(compute())
        self._unchanged()
        with atomic_file(path) as partial:
            save_file(arrays, partial)
        return load_file(path)

    def _unchanged(self) -> None:
        if self._check is not None:
            self._check()

    def discard(self) -> None:
        """Removes the units, once the stage's result is written, and their folder when it is empty then; what cannot be
        removed is an error, and the next call removes it.
        """
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self.folder)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()
