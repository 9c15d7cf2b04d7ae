"""What a publication would change: the files that are ready to go, beside those that the repository holds.

A file is ours, and is removed when the new state does not have it, where it lies in a place that `mechmerge publish` fills.
Everything else in the repository is left alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from mechmerge.artifacts import Document, digest, sha256_file

Kind = Literal["model", "dataset"]
Mode = Literal["main", "pr", "branch", "direct"]


@dataclass(frozen=True)
class LocalFile:
    """A file that is ready to go."""

    path: str
    """Its path in the repository."""
    source: Path

    @cached_property
    def size(self) -> int:
        """Bytes."""
        return self.source.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """What the Hub names a large file by."""
        return sha256_file(self.source)

    @cached_property
    def oid(self) -> str:
        """The SHA-1 of git's blob (https://git-scm.com/book/en/v2/Git-Internals-Git-Objects): what the Hub names others by."""
        blob = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        with self.source.open("rb") as handle:
            while chunk := handle.read(1 << 20):
                blob.update(chunk)
        return blob.hexdigest()

    def equals(self, remote: RemoteFile | None) -> bool:
        """Whether the repository holds this very content."""
        if remote is None or remote.size != self.size:
            return False
        return remote.sha256 == self.sha256 if remote.sha256 is not None else remote.oid == self.oid


class RemoteFile(NamedTuple):
    """A file of a commit on the Hub."""

    size: int
    oid: str
    sha256: str | None
    """None where the file is no large one."""


@dataclass(frozen=True)
class Outbox:
    """Everything that is to stand in the repository, and nothing else."""

    kind: Kind
    folder: Path
    """A folder with exactly these files in it, as the repository will hold them."""
    files: tuple[LocalFile, ...]
    left_out: tuple[str, ...]
    """Files beside them that do not leave this machine."""
    title: str
    """What is published, in a few words."""
    is_ours: Callable[[str], bool]
    """Whether a path of the repository is one that we fill."""

    @cached_property
    def digest(self) -> str:
        """One sha256 over paths and contents: the name of this very state."""
        return digest({file.path: file.sha256 for file in self.files})


class Plan(Document):
    """What a publication changes."""

    repo: str
    kind: Kind
    target: str
    """The branch that changes, or `pull request`."""
    parent: str | None
    """The commit that it is planned on; None where the repository is not there yet."""
    digest: str
    """sha256 over all files of the new state."""
    send: tuple[str, ...]
    """Files that are new or other than the repository's."""
    keep: tuple[str, ...]
    """Files that the repository holds already."""
    delete: tuple[str, ...]
    """Files of ours that the new state does not have."""
    left_out: tuple[str, ...]
    """Files that do not leave this machine."""
    bytes: int
    """Of the files to send."""

    @property
    def changes(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.send or self.delete)


def make_plan(outbox: Outbox, repo: str, target: str, parent: str | None, held: Mapping[str, RemoteFile]) -> Plan:
    """Compares what is ready with what the repository holds.

    Args:
        outbox: what is ready.
        repo: `owner/name`.
        target: the branch that changes.
        parent: its commit.
        held: the files of that commit.
    """
    keep = [file for file in outbox.files if file.equals(held.get(file.path))]
    kept = {file.path for file in keep}
    send = [file for file in outbox.files if file.path not in kept]
    ready = {file.path for file in outbox.files}
    return Plan(
        repo=repo,
        kind=outbox.kind,
        target=target,
        parent=parent,
        digest=outbox.digest,
        send=tuple(file.path for file in send),
        keep=tuple(file.path for file in keep),
        delete=tuple(sorted(path for path in held if path not in ready and outbox.is_ours(path))),
        left_out=outbox.left_out,
        bytes=sum(file.size for file in send),
    )
