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
        parts = [f"expected {expected}" if expected else "", f"found {found}" if found else "", fix or ""]
        detail = "; ".join(part for part in parts if part)
        message = f"{where}: {detail}" if detail else where
        super().__init__(" ".join(message.split()))


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
