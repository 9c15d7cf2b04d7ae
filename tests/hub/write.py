"""What changes a repository: commits, branches and tags."""

from __future__ import annotations

import base64
import json
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from tests.hub.accounts import writing
from tests.hub.answers import Answer, Refusal, Request, route
from tests.hub.store import Commit, File, Repository, Tree

if TYPE_CHECKING:
    from tests.hub.server import Hub

LARGE_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".onnx", ".h5", ".parquet", ".png")
LARGE_BYTES = 10_000_000


def writable(hub: Hub, request: Request, kind: str, repo: str) -> Repository:
    """The repository, which the request's account may write."""
    repository = hub.repository(kind, repo, request.account)
    writing(request.account, repository.namespace)
    return repository


@route("POST", "/api/{kind}/{repo}/preupload/{revision}")
def preupload(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Answer:
    """Which files are large, which a .gitignore leaves out, and what is there already."""
    files = writable(hub, request, kind, repo).resolve(revision).tree
    ignored = ((files[".gitignore"].data or b"") if ".gitignore" in files else b"").decode().split()
    answers = []
    for wish in request.json["files"]:
        path, there = wish["path"], files.get(wish["path"])
        is_large = wish["size"] > LARGE_BYTES or path.endswith(LARGE_SUFFIXES)
        oid = None if there is None else there.sha256 if there.is_large else there.oid
        answers.append(
            {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": ignores(ignored, path), "oid": oid}
        )
    return Answer({"files": answers})


def ignores(patterns: list[str], path: str) -> bool:
    """Whether a .gitignore of plain patterns names a path, or its file name."""
    return any(fnmatch(path, pattern) or fnmatch(path.split("/")[-1], pattern) for pattern in patterns)


def large_file(hub: Hub, repository: Repository, value: dict[str, Any]) -> File:
    """A large file of a commit: a new object, or one that the repository has (a copy names no size).

    Raises:
        Refusal: 400 when the object was never stored.
    """
    sha256, known = value["oid"], repository.known_objects()
    if sha256 in known:
        return known[sha256]
    path = hub.objects.path(repository.name, sha256)
    xet = hub.xet_store.hash_of(repository.name, sha256) if hub.xet else None
    if "size" not in value or not (xet or (path.exists() and path.stat().st_size == value["size"])):
        raise Refusal(
            400, f"Your push was rejected because an LFS pointer pointed to a file that does not exist: {value['path']}"
        )
    return File.large(sha256, value["size"], xet)


def changed(hub: Hub, repository: Repository, tree: Tree, operations: list[dict[str, Any]]) -> Tree:
    """The tree after a commit's operations."""
    tree = dict(tree)
    for operation in operations:
        value = operation["value"]
        match operation["key"]:
            case "file":
                tree[value["path"]] = File.regular(base64.b64decode(value["content"]))
            case "lfsFile":
                tree[value["path"]] = large_file(hub, repository, value)
            case "deletedFile":
                if tree.pop(value["path"], None) is None:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            case "deletedFolder":
                folder = value["path"].rstrip("/") + "/"
                tree = {path: file for path, file in tree.items() if not path.startswith(folder)}
            case other:
                raise Refusal(400, f"Unknown operation {other}")
    return tree


@route("POST", "/api/{kind}/{repo}/commit/{revision}")
def commit(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Answer:
    """One commit, all or nothing; `parentCommit` must be the head that it was planned on."""
    repository = writable(hub, request, kind, repo)
    header, *operations = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    wish, pull_request = header["value"], request.flag("create_pr")
    if not pull_request and revision not in repository.heads:
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    base, author = repository.resolve(revision), request.account.user if request.account else ""
    if wish.get("parentCommit") and base.sha != wish["parentCommit"]:
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    if any(operation["key"] == "lfsFile" for operation in operations):
        hub.check_quota(repo)
    tree = changed(hub, repository, base.tree, operations)
    if pull_request:
        number = repository.open_pull_request(wish["summary"], base, author, "open").number
        revision = f"refs/pr/{number}"
    made = repository.commit(revision, tree, wish["summary"], wish.get("description", ""), author=author)
    page = f"{hub.url}/{repository.url_path}"
    answer = {"success": True, "commitOid": made.sha, "commitUrl": f"{page}/commit/{made.sha}", "hookOutput": ""}
    return Answer(answer | ({"pullRequestUrl": f"{page}/discussions/{number}"} if pull_request else {}))


@route("POST", "/api/{kind}/{repo}/branch/{revision}")
def create_branch(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Answer:
    repository = writable(hub, request, kind, repo)
    if revision in repository.heads:
        raise Refusal(409, f"Reference already exists: {revision}")
    repository.heads[revision] = repository.resolve(request.json.get("startingPoint") or "main").sha
    return Answer()


@route("DELETE", "/api/{kind}/{repo}/branch/{revision}")
def delete_branch(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Answer:
    repository = writable(hub, request, kind, repo)
    if revision == "main" or repository.heads.pop(revision, None) is None:
        raise Refusal(403 if revision == "main" else 404, f"Reference cannot be deleted: {revision}")
    return Answer()


@route("POST", "/api/{kind}/{repo}/tag/{revision}")
def create_tag(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Answer:
    repository, name = writable(hub, request, kind, repo), request.json["tag"]
    if name in repository.tags:
        raise Refusal(409, f"Tag reference exists already: {name}")
    target: Commit = repository.resolve(revision)
    repository.tags[name] = target.sha
    return Answer()


@route("DELETE", "/api/{kind}/{repo}/tag/{revision}")
def delete_tag(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Answer:
    if writable(hub, request, kind, repo).tags.pop(revision, None) is None:
        raise Refusal(404, f"Tag does not exist: {revision}", "RevisionNotFound")
    return Answer()
