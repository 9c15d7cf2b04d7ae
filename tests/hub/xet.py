"""Xet storage without a CAS server: hf_xet's own `local://` store, one folder a repository.

The Hub hands out a token and the address of the content-addressed store; hf_xet chunks, deduplicates and stores by itself.
What it stored is read back from its shards (https://huggingface.co/docs/xet/shard): a list of files (xet hash, SHA-256) and
a list of xorbs with their chunks.
"""

from __future__ import annotations

import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tests.hub.accounts import writing
from tests.hub.answers import Answer, Refusal, Request, route

if TYPE_CHECKING:
    from tests.hub.server import Hub

ENTRY = 48
"""Bytes of every record of a shard, its header included."""
BOOKEND = b"\xff" * 32
"""The hash that ends a section."""
HAS_VERIFICATION, HAS_SHA256 = 0x80000000, 0x40000000


def hash_text(raw: bytes) -> str:
    """A xet hash as text: four little-endian words of 64 bits."""
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def read_shard(shard: bytes) -> tuple[dict[str, str], dict[str, dict[str, int]]]:
    """SHA-256 → xet hash of the shard's files, and xorb → {chunk: bytes} of what it stores."""
    files: dict[str, str] = {}
    position = ENTRY
    while (name := shard[position : position + 32]) != BOOKEND:
        flags, segments = struct.unpack_from("<II", shard, position + 32)
        position += ENTRY * (1 + segments * (2 if flags & HAS_VERIFICATION else 1))
        if flags & HAS_SHA256:
            files[hash_text(shard[position : position + 32])] = hash_text(name)
            position += ENTRY
    xorbs: dict[str, dict[str, int]] = {}
    position += ENTRY
    while (name := shard[position : position + 32]) != BOOKEND:
        _, chunks = struct.unpack_from("<II", shard, position + 32)
        starts = range(position + ENTRY, position + ENTRY * (1 + chunks), ENTRY)
        xorbs[hash_text(name)] = {hash_text(shard[at : at + 32]): struct.unpack_from("<II", shard, at + 32)[1] for at in starts}
        position += ENTRY * (1 + chunks)
    return files, xorbs


class XetStore:
    """The `local://` stores of a Hub's repositories."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, repo: str) -> Path:
        return self.root / repo

    def shards(self, repo: str) -> Iterator[tuple[dict[str, str], dict[str, dict[str, int]]]]:
        for path in sorted(self.folder(repo).rglob("shards/*.mdb")):
            yield read_shard(path.read_bytes())

    def hash_of(self, repo: str, sha256: str) -> str | None:
        """The xet hash of a stored file."""
        return next((files[sha256] for files, _ in self.shards(repo) if sha256 in files), None)

    def stored_bytes(self, repo: str) -> int:
        """Bytes of all xorbs on disk."""
        return sum(path.stat().st_size for path in self.folder(repo).rglob("xorbs/default.*") if path.suffix != ".tagset")

    def chunks_stored_twice(self, repo: str) -> int:
        """Chunks that lie in more than one xorb."""
        xorbs: dict[str, dict[str, int]] = {}
        for _, found in self.shards(repo):
            xorbs |= found
        return sum(times > 1 for times in Counter(chunk for chunks in xorbs.values() for chunk in chunks).values())


def connection(hub: Hub, repo: str) -> dict[str, str]:
    """Headers that tell hf_xet where to store, and until when."""
    store = f"local://{hub.xet_store.folder(repo)}"
    return {"X-Xet-Cas-Url": store, "X-Xet-Access-Token": "loopback", "X-Xet-Token-Expiration": str(int(time.time()) + 3600)}


@route("GET", "/api/{kind}/{repo}/xet-write-token/{revision}")
def write_token(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Answer:
    repository = hub.repository(kind, repo, request.account)
    writing(request.account, repository.namespace)
    hub.check_quota(repo, 1)
    return token(hub, repo)


@route("GET", "/api/{kind}/{repo}/xet-read-token/{revision}")
def read_token(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Answer:
    hub.repository(kind, repo, request.account)
    return token(hub, repo)


def token(hub: Hub, repo: str) -> Answer:
    if not hub.xet:
        raise Refusal(404, "Xet is not enabled for this repository")
    hub.xet_store.folder(repo).mkdir(parents=True, exist_ok=True)
    headers = connection(hub, repo)
    body = {
        "accessToken": headers["X-Xet-Access-Token"],
        "exp": int(headers["X-Xet-Token-Expiration"]),
        "casUrl": headers["X-Xet-Cas-Url"],
    }
    return Answer(body, headers=headers)
