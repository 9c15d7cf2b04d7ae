"""Pull requests: opened, listed, looked at, commented, closed and merged."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.hub.accounts import known, writing
from tests.hub.answers import Answer, Refusal, Request, route
from tests.hub.store import PullRequest, Repository, stamp
from tests.hub.write import writable

if TYPE_CHECKING:
    from tests.hub.server import Hub


def shown(repository: Repository, pull: PullRequest) -> dict[str, Any]:
    return {
        "num": pull.number,
        "title": pull.title,
        "author": {"name": pull.author},
        "createdAt": pull.date,
        "status": pull.status,
        "isPullRequest": True,
        "repo": {"name": repository.name, "type": repository.kind[:-1]},
    }


def event(pull: PullRequest, number: int, kind: str, author: str, data: dict[str, Any]) -> dict[str, Any]:
    """An event of a discussion, as huggingface_hub reads it."""
    return {
        "id": f"{pull.number:012x}{number:012x}",
        "type": kind,
        "createdAt": stamp(0),
        "author": {"name": author},
        "data": data,
    }


def pull_of(repository: Repository, number: str) -> PullRequest:
    if int(number) not in repository.pull_requests:
        raise Refusal(404, f"Discussion {number} not found", "EntryNotFound")
    return repository.pull_requests[int(number)]


@route("GET", "/api/{kind}/{repo}/discussions")
def listed(hub: Hub, request: Request, kind: str, repo: str) -> Answer:
    repository = hub.repository(kind, repo, request.account)
    status, author = request.query.get("status", ["all"])[0], request.query.get("author", [None])[0]
    groups = {"all": {"draft", "open", "closed", "merged"}, "open": {"draft", "open"}, "closed": {"closed", "merged"}}
    pulls = [
        pull for pull in repository.pull_requests.values() if pull.status in groups[status] and author in (None, pull.author)
    ]
    return Answer({"count": len(pulls), "start": 0, "discussions": [shown(repository, pull) for pull in reversed(pulls)]})


@route("POST", "/api/{kind}/{repo}/discussions")
def opened(hub: Hub, request: Request, kind: str, repo: str) -> Answer:
    repository, account = hub.repository(kind, repo, request.account), known(request.account)
    # Anyone may open a pull request on the Hub, with a token that may write at all.
    writing(account, account.user)
    pull = repository.open_pull_request(request.json["title"], repository.resolve("main"), account.user, "draft")
    return Answer({"num": pull.number, "pullRequest": True})


@route("GET", "/api/{kind}/{repo}/discussions/{number}")
def details(hub: Hub, request: Request, kind: str, repo: str, number: str) -> Answer:
    repository = hub.repository(kind, repo, request.account)
    pull = pull_of(repository, number)
    changes = {"base": "refs/heads/main"} | ({"mergeCommitId": pull.merge_commit} if pull.merge_commit else {})
    return Answer(shown(repository, pull) | {"changes": changes, "filesWithConflicts": [], "events": [], "diff": ""})


@route("POST", "/api/{kind}/{repo}/discussions/{number}/comment")
def comment(hub: Hub, request: Request, kind: str, repo: str, number: str) -> Answer:
    repository, account = hub.repository(kind, repo, request.account), known(request.account)
    pull, text = pull_of(repository, number), request.json["comment"]
    pull.comments.append(text)
    latest = {"raw": text, "html": text, "updatedAt": stamp(0), "author": {"name": account.user}}
    data = {"edited": False, "hidden": False, "latest": latest, "history": [latest]}
    return Answer({"newMessage": event(pull, len(pull.comments), "comment", account.user, data)})


@route("POST", "/api/{kind}/{repo}/discussions/{number}/status")
def status(hub: Hub, request: Request, kind: str, repo: str, number: str) -> Answer:
    repository, account = writable(hub, request, kind, repo), known(request.account)
    pull = pull_of(repository, number)
    pull.status = request.json["status"]
    return Answer({"newStatus": event(pull, 0, "status-change", account.user, {"status": pull.status})})


@route("POST", "/api/{kind}/{repo}/discussions/{number}/merge")
def merge(hub: Hub, request: Request, kind: str, repo: str, number: str) -> Answer:
    repository = writable(hub, request, kind, repo)
    if pull_of(repository, number).status != "open":
        raise Refusal(400, "Only an open pull request can be merged")
    repository.merge(int(number), known(request.account).user)
    return Answer()
