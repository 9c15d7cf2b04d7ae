"""What can be read: information, trees, refs, history and files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode

from tests.hub.account_routes import front_matter
from tests.hub.answers import Answer, Refusal, Request, route
from tests.hub.git import lfs_pointer, tree_object
from tests.hub.store import File

if TYPE_CHECKING:
    from tests.hub.server import Hub

PAGE = 1000
"""Entries of a page of a tree or of a history."""


def large(file: File, name: str) -> dict[str, Any]:
    return {name: file.sha256, "size": file.size, "pointerSize": len(lfs_pointer(file.sha256, file.size))}


def entry(path: str, file: File) -> dict[str, Any]:
    """A file as trees and paths-info show it."""
    shown: dict[str, Any] = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
    if file.is_large:
        shown["lfs"] = large(file, "oid")
    return shown | ({"xetHash": file.xet} if file.xet else {})


def paged(hub: Hub, request: Request, items: list[Any]) -> Answer:
    """One page, with the address of the next in `Link`."""
    start = int(request.query.get("cursor", ["0"])[0])
    headers = {}
    if start + PAGE < len(items):
        query = urlencode({key: values[0] for key, values in request.query.items()} | {"cursor": start + PAGE})
        headers["Link"] = f'<{hub.url}{request.path}?{query}>; rel="next"'
    return Answer(items[start : start + PAGE], headers=headers)


@route("GET", "/api/{kind}/{repo}")
def head_info(hub: Hub, request: Request, kind: str, repo: str) -> Answer:
    return info(hub, request, kind, repo, "main")


@route("GET", "/api/{kind}/{repo}/revision/{revision}")
def info(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Answer:
    repository = hub.repository(kind, repo, request.account)
    commit = repository.resolve(revision)
    siblings = []
    for path, file in sorted(commit.tree.items()):
        shown: dict[str, Any] = {"rfilename": path}
        if request.flag("blobs"):
            shown |= {"size": file.size, "blobId": file.oid} | ({"lfs": large(file, "sha256")} if file.is_large else {})
        siblings.append(shown)
    card = commit.tree.get("README.md")
    metadata = front_matter(card.data.decode()) if card and card.data is not None else None
    dates = {"createdAt": repository.created, "lastModified": commit.date}
    state = {"private": repository.private, "gated": repository.gated, "disabled": False, "downloads": 0, "likes": 0}
    names = {"_id": repo, "id": repo, "modelId": repo, "author": repository.namespace, "sha": commit.sha}
    return Answer(
        names | state | dates | {"tags": (metadata or {}).get("tags", []), "cardData": metadata or {}, "siblings": siblings}
    )


@route("GET", "/api/{kind}/{repo}/tree/{revision}")
def root_tree(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Answer:
    return tree(hub, request, kind, repo, revision, "")


@route("GET", "/api/{kind}/{repo}/tree/{revision}/{rest}")
def tree(hub: Hub, request: Request, kind: str, repo: str, revision: str, rest: str) -> Answer:
    files = hub.repository(kind, repo, request.account).resolve(revision).tree
    folder = f"{rest.strip('/')}/" if rest.strip("/") else ""
    inside = {path: file for path, file in sorted(files.items()) if path.startswith(folder)}
    if folder and not inside:
        raise Refusal(404, f"{rest} does not exist on {revision}", "EntryNotFound")
    recursive = request.flag("recursive")
    folders = {
        folder + "/".join(path.removeprefix(folder).split("/")[:depth])
        for path in inside
        for depth in depths(path, folder, recursive)
    }
    shown = [entry(path, file) for path, file in inside.items() if recursive or "/" not in path.removeprefix(folder)]
    for name in sorted(folders):
        below = {path.removeprefix(f"{name}/"): file.oid for path, file in inside.items() if path.startswith(f"{name}/")}
        shown.append({"type": "directory", "path": name, "oid": tree_object(below), "size": 0})
    return paged(hub, request, shown)


def depths(path: str, folder: str, recursive: bool) -> range:
    """How many parts of a path, below a folder, are folders that a listing shows."""
    count = path.removeprefix(folder).count("/")
    return range(1, 1 + (count if recursive else min(count, 1)))


@route("POST", "/api/{kind}/{repo}/paths-info/{revision}")
def paths_info(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Answer:
    files = hub.repository(kind, repo, request.account).resolve(revision).tree
    return Answer([entry(path, files[path]) for path in parse_qs(request.body.decode()).get("paths", []) if path in files])


@route("GET", "/api/{kind}/{repo}/refs")
def refs(hub: Hub, request: Request, kind: str, repo: str) -> Answer:
    repository = hub.repository(kind, repo, request.account)

    def shown(names: dict[str, str], prefix: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": prefix + name, "targetCommit": sha} for name, sha in names.items()]

    branches = {name: sha for name, sha in repository.heads.items() if not name.startswith("refs/")}
    answer: dict[str, Any] = {
        "branches": shown(branches, "refs/heads/"),
        "tags": shown(repository.tags, "refs/tags/"),
        "converts": [],
    }
    if request.query.get("include_prs") or request.flag("include_pull_requests"):
        pulls = {name: sha for name, sha in repository.heads.items() if name.startswith("refs/pr/")}
        answer["pullRequests"] = shown(pulls, "")
    return Answer(answer)


@route("GET", "/api/{kind}/{repo}/commits/{revision}")
def history(hub: Hub, request: Request, kind: str, repo: str, revision: str) -> Answer:
    commits = hub.repository(kind, repo, request.account).history(revision)
    shown = [
        {
            "id": commit.sha,
            "title": commit.title,
            "message": commit.message,
            "authors": [{"user": commit.author}],
            "date": commit.date,
        }
        for commit in commits
    ]
    return paged(hub, request, shown)


@route("GET", "/{repo}/resolve/{revision}/{rest}")
def resolve_model(hub: Hub, request: Request, repo: str, revision: str, rest: str) -> Answer:
    return resolve(hub, request, "models", repo, revision, rest)


@route("GET", "/{kind}/{repo}/resolve/{revision}/{rest}")
def resolve(hub: Hub, request: Request, kind: str, repo: str, revision: str, rest: str) -> Answer:
    repository = hub.repository(kind, repo, request.account)
    if repository.gated and not (request.account and request.account.may_write(repository.namespace)):
        raise Refusal(403, f"Access to {kind[:-1]} {repo} is restricted and you are not in the authorized list.", "GatedRepo")
    commit = repository.resolve(revision)
    headers = {"X-Repo-Commit": commit.sha}
    file = commit.tree.get(rest)
    if file is None:
        raise Refusal(404, "Entry not found", "EntryNotFound", headers)
    if file.data is not None:
        return Answer(file.data, headers=headers | {"ETag": f'"{file.oid}"', "Content-Type": "application/octet-stream"})
    headers |= {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
    if file.xet:
        token = f"{hub.url}/api/{kind}/{repo}/xet-read-token/{commit.sha}"
        headers |= {"X-Xet-Hash": file.xet, "Link": f'<{token}>; rel="xet-auth"'}
    return Answer(b"", 302, headers | {"Location": f"{hub.download_url}/_lfs/{repo}/{file.sha256}"})
