"""The exception tree: one meaning a class, one exit code a branch.

    MechmergeError                 1  a bug, when nothing below fits
    ├── InputError                 2  wrong usage or input
    │   ├── SchemaError            2  a file of ours (YAML, JSON, score file, ...) that breaks its schema
    │   ├── CheckpointError        2  a model folder that cannot be read as a safetensors checkpoint
    │   ├── PairError              2  two models that cannot be compared or merged
    │   └── LocalizeError          2  nothing that could be localized: no contrast, no valid anchor, no gap
    ├── GateRefused                3  the evaluation does not satisfy the gate
    └── MissingError               4  a package, a model or the Hub is needed and not there

Every message is one line: where, what was expected, what was found, what to do.
"""

from __future__ import annotations

import errno
import re
import unicodedata

_BIDIRECTIONAL = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff")
LONGEST = 2000
"""Characters of a part of a message: what was found may be a whole file."""


def visible(text: str) -> str:
    """A text with its control characters, half surrogates and marks of writing direction spelt out, as U+202E is in Python."""

    def shown(character: str) -> str:
        harmful = unicodedata.category(character) in ("Cc", "Cs") or character in _BIDIRECTIONAL
        return character.encode("unicode_escape").decode() if harmful else character

    return "".join(map(shown, text))


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


class MechmergeError(Exception):
    """Base of all errors that mechmerge raises on purpose.

    Args:
        where: the file, tensor, option or model that the error is about.
        expected: what would have been right.
        found: what was there.
        fix: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, where: str, *, expected: str | None = None, found: str | None = None, fix: str | None = None) -> None:
        self.where, self.expected, self.found, self.fix = where, expected, found, fix
        parts = [f"expected {_short(expected)}" if expected else "", f"found {_short(found)}" if found else "", fix or ""]
        detail = "; ".join(part for part in parts if part)
        message = f"{_short(where)}: {detail}" if detail else _short(where)
        super().__init__(visible(" ".join(message.split())))


class InputError(MechmergeError):
    """Wrong usage or input."""

    exit_code = 2


class SchemaError(InputError):
    """A file of ours that breaks its schema."""


class CheckpointError(InputError):
    """A model folder that cannot be read as a safetensors checkpoint."""


class PairError(InputError):
    """Two models that cannot be compared or merged."""


class LocalizeError(InputError):
    """Nothing that could be localized: no contrast, no valid anchor, no gap."""


class GateRefused(MechmergeError):
    """The evaluation does not satisfy the gate."""

    exit_code = 3


class MissingError(MechmergeError):
    """A package, a model or the Hub is needed and not there."""

    exit_code = 4


AGAIN = "then run the same command again: it goes on where it stopped"
_MACHINE: dict[int, tuple[str, str, str]] = {
    # errno: (expected, found, what to do)
    errno.ENOSPC: ("room on the disk", "none left", f"free some, {AGAIN}"),
    errno.EDQUOT: ("room on the disk", "the user's quota used up", f"free some, {AGAIN}"),
    errno.EFBIG: ("files of this size to be allowed", "a limit on them", f"raise it (`ulimit -f`), {AGAIN}"),
    errno.EIO: ("a disk that can be read and written", "an input/output error", f"check the disk, {AGAIN}"),
    errno.EMFILE: ("files to open", "the process's limit reached", f"raise it (`ulimit -n`), {AGAIN}"),
    errno.ENFILE: ("files to open", "the machine's limit reached", f"close some, {AGAIN}"),
    errno.ENOMEM: ("memory", "none left", f"free some, {AGAIN}"),
}
_PATHS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EEXIST}
"""What the system refuses to do with a path that the user named."""


def machine_error(error: BaseException) -> MechmergeError | None:
    """An exception as an error of the machine (4) or of a path (2), where it, or what caused it, is one; None where it is not.

    Errors of Rust libraries are known by the number that they end with, `(os error 28)`.
    """
    cause: BaseException | None = error
    for _ in range(8):
        if cause is None:
            break
        number, name = _errno(cause), getattr(cause, "filename", None)
        if number in _MACHINE:
            expected, found, fix = _MACHINE[number]
            return MissingError(str(name or "this machine"), expected=expected, found=found, fix=fix)
        if number in _PATHS and name is not None:
            return InputError(str(name), expected="a path that can be read and written", found=str(cause.args[1]))
        cause = cause.__cause__ or cause.__context__
    return MissingError("this machine", expected="memory", found="none left") if isinstance(error, MemoryError) else None


def _errno(error: BaseException) -> int | None:
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    told = re.search(r"\(os error (\d+)\)", str(error))
    return int(told[1]) if told else None
