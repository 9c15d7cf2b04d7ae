"""Object names as git computes them (https://git-scm.com/book/en/v2/Git-Internals-Git-Objects), and Git LFS pointers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping


def git_object(kind: str, content: bytes) -> str:
    """The SHA-1 of a git object: `blob`, `tree` or `commit`."""
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def tree_object(blobs: Mapping[str, str]) -> str:
    """The SHA-1 of the tree that holds the blobs (path → SHA-1), folders included."""
    entries: dict[str, tuple[str, str]] = {}
    folders: dict[str, dict[str, str]] = {}
    for path, oid in blobs.items():
        name, _, rest = path.partition("/")
        if rest:
            folders.setdefault(name, {})[rest] = oid
        else:
            entries[name] = ("100644", oid)
    entries |= {name: ("40000", tree_object(inner)) for name, inner in folders.items()}
    order = sorted(entries, key=lambda name: name + ("/" if name in folders else ""))
    return git_object(
        "tree", b"".join(f"{entries[name][0]} {name}\0".encode() + bytes.fromhex(entries[name][1]) for name in order)
    )


def lfs_pointer(sha256: str, size: int) -> bytes:
    """The text that git keeps in the place of a large file (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md)."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
