"""Git LFS storage, basic and multipart (https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md), and its transfers.

Every transfer is written down with the bytes that arrived and whether the sender was told that they are stored, so that a
test measures on the server whether anything was sent again.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from tests.hub.accounts import writing
from tests.hub.answers import Answer, Refusal, Request, route

if TYPE_CHECKING:
    from tests.hub.server import Hub


@dataclass
class Transfer:
    """One request that carried bytes of an object."""

    repo: str
    oid: str
    part: int
    """Number of the part, 0 for the whole object."""
    received: int
    """Bytes that arrived."""
    needless: bool = False
    """Whether the sender of these bytes, or another, had been told before that they are stored."""
    acknowledged: bool = False
    """Whether the sender was told that they are."""


@dataclass
class ObjectStore:
    """Large objects of all repositories, by SHA-256."""

    root: Path
    transfers: list[Transfer] = field(default_factory=list)
    chunk_size: int | None = None
    """Size from which uploads go in parts of this size; None: never."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def path(self, repo: str, oid: str, part: int = 0) -> Path:
        return self.root / repo / (f"{oid}.{part}" if part else oid)

    def has(self, repo: str, oid: str) -> bool:
        return self.path(repo, oid).exists()

    def stored_bytes(self, repo: str) -> int:
        return sum(path.stat().st_size for path in (self.root / repo).glob("*") if not path.suffix)

    def received(self, oid: str, repo: str | None = None) -> int:
        """Bytes of an object that arrived, cut uploads included."""
        return sum(transfer.received for transfer in self.transfers if transfer.oid == oid and repo in (None, transfer.repo))

    def note(self, transfer: Transfer) -> Transfer:
        """Writes a transfer down as it begins. Parts are needless once the whole object is there, not before."""
        same = [past for past in self.transfers if (past.repo, past.oid, past.part) == (transfer.repo, transfer.oid, 0)]
        with self.lock:
            told = any(past.acknowledged for past in same)
            transfer.needless = told or (transfer.part > 0 and self.has(transfer.repo, transfer.oid))
            self.transfers.append(transfer)
        return transfer

    def sent_twice(self, repo: str) -> list[str]:
        """Objects of which bytes were sent again after the sender had been told that these bytes are stored."""
        return sorted({transfer.oid for transfer in self.transfers if transfer.repo == repo and transfer.needless})

    def keep(self, source: IO[bytes], target: Path, oid: str | None) -> None:
        """Moves what was received to its place, if it is what its name says.

        Raises:
            Refusal: 400 for other content.
        """
        source.seek(0)
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished, digest = target.with_name(f".{target.name}.{threading.get_ident()}"), hashlib.sha256()
        with unfinished.open("wb") as file:
            while block := source.read(1 << 20):
                digest.update(block)
                file.write(block)
        if oid and digest.hexdigest() != oid:
            unfinished.unlink()
            raise Refusal(400, "The SHA-256 of the content is not the one announced")
        unfinished.replace(target)


def upload_path(request: Request) -> tuple[str, str, int] | None:
    """(repository, object, part) of a request that carries bytes of an object, None for others."""
    pieces = request.path.split("/")
    if request.method != "PUT" or pieces[1] != "_lfs":
        return None
    return f"{pieces[2]}/{pieces[3]}", pieces[4], int(pieces[5]) if len(pieces) > 5 else 0


@route("POST", "/{repo}.git/info/lfs/objects/batch")
def model_batch(hub: Hub, request: Request, repo: str) -> Answer:
    return batch(hub, request, "models", repo)


@route("POST", "/{kind}/{repo}.git/info/lfs/objects/batch")
def batch(hub: Hub, request: Request, kind: str, repo: str) -> Answer:
    repository = hub.repository(kind, repo, request.account)
    writing(request.account, repository.namespace)
    store, objects = hub.objects, request.json["objects"]
    hub.check_quota(repo, sum(item["size"] for item in objects if not store.has(repo, item["oid"])))
    answers = []
    for item in objects:
        oid, size = item["oid"], item["size"]
        answer = {"oid": oid, "size": size}
        if not store.has(repo, oid):
            address = f"{hub.url}/_lfs/{repo}/{oid}"
            header = {}
            if store.chunk_size and size > store.chunk_size:
                parts = range(1, -(-size // store.chunk_size) + 1)
                header = {"chunk_size": str(store.chunk_size)} | {str(part): f"{address}/{part}" for part in parts}
            answer["actions"] = {"upload": {"href": address, "header": header}, "verify": {"href": f"{hub.url}/_verify/{repo}"}}
        answers.append(answer)
    return Answer({"transfer": "basic", "objects": answers})


@route("PUT", "/_lfs/{repo}/{oid}")
def put(hub: Hub, request: Request, repo: str, oid: str) -> Answer:
    hub.objects.keep(request.file, hub.objects.path(repo, oid), oid)
    return Answer(b"")


@route("PUT", "/_lfs/{repo}/{oid}/{number}")
def put_part(hub: Hub, request: Request, repo: str, oid: str, number: str) -> Answer:
    hub.objects.keep(request.file, hub.objects.path(repo, oid, int(number)), None)
    return Answer(b"", headers={"ETag": f'"{hashlib.md5(request.body, usedforsecurity=False).hexdigest()}"'})


@route("POST", "/_lfs/{repo}/{oid}")
def complete(hub: Hub, request: Request, repo: str, oid: str) -> Answer:
    """Joins the parts of a multipart upload."""
    parts = [hub.objects.path(repo, oid, part["partNumber"]) for part in request.json["parts"]]
    whole = hub.objects.path(repo, oid, len(parts) + 1)
    with whole.open("w+b") as file:
        for part in parts:
            file.write(part.read_bytes())
        hub.objects.keep(file, hub.objects.path(repo, oid), oid)
    for part in (whole, *parts):
        part.unlink(missing_ok=True)
    return Answer()


@route("GET", "/_lfs/{repo}/{oid}")
def get(hub: Hub, request: Request, repo: str, oid: str) -> Answer:
    path = hub.objects.path(repo, oid)
    if not path.exists():
        raise Refusal(404, "Object not found")
    return Answer(path, headers={"Content-Type": "application/octet-stream", "ETag": f'"{oid}"'})


@route("POST", "/_verify/{repo}")
def verify(hub: Hub, request: Request, repo: str) -> Answer:
    item = request.json
    path = hub.objects.path(repo, item["oid"])
    if not path.exists() or path.stat().st_size != item["size"]:
        raise Refusal(404, "The object is not stored, or is of another size")
    return Answer()
