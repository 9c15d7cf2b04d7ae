"""Accounts and repositories: who am I, create, delete, settings, rights, and the check of a card's metadata."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import yaml

from tests.hub.accounts import known, writing
from tests.hub.answers import Answer, Refusal, Request, route
from tests.hub.store import Repository

if TYPE_CHECKING:
    from tests.hub.server import Hub

NAME = re.compile(r"(?!.*(?:--|\.\.))(?!.*\.git$)[\w][\w.-]{0,94}[\w]|\w")
FRONT_MATTER = re.compile(r"\s*---\r?\n(.*?)\r?\n---", re.DOTALL)
HUB_ID = re.compile(r"(?:[\w.-]+/)?[\w.-]+")
RELATIONS = {"adapter", "merge", "quantized", "finetune"}


@route("GET", "/api/whoami-v2")
def whoami(hub: Hub, request: Request) -> Answer:
    account = known(request.account)
    organizations = [{"type": "org", "id": name, "name": name, "roleInOrg": "write"} for name in account.namespaces]
    token = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": account.role}}
    user = {"type": "user", "id": account.user, "name": account.user, "fullname": account.user}
    return Answer(user | {"orgs": organizations, "auth": token})


@route("POST", "/api/repos/create")
def create(hub: Hub, request: Request) -> Answer:
    wish = request.json
    kind, namespace = f"{wish.get('type') or 'model'}s", wish.get("organization") or known(request.account).user
    account = writing(request.account, namespace)
    if not NAME.fullmatch(wish["name"]):
        raise Refusal(400, f"Invalid repo name: {wish['name']} - repo name contains invalid characters or is too long")
    name = f"{namespace}/{wish['name']}"
    if (kind, name) in hub.repositories:
        url = f"{hub.url}/{hub.repositories[kind, name].url_path}"
        raise Refusal(409, f"You already created this {kind[:-1]} repo", url=url)
    private = wish.get("visibility") == "private" or bool(wish.get("private"))
    hub.repositories[kind, name] = Repository(kind, name, account.user, private)
    return Answer({"url": f"{hub.url}/{hub.repositories[kind, name].url_path}", "name": name, "id": name})


@route("DELETE", "/api/repos/delete")
def delete(hub: Hub, request: Request) -> Answer:
    wish = request.json
    kind, name = f"{wish.get('type') or 'model'}s", f"{wish.get('organization') or known(request.account).user}/{wish['name']}"
    writing(request.account, hub.repository(kind, name, request.account).namespace)
    del hub.repositories[kind, name]
    return Answer()


@route("PUT", "/api/{kind}/{repo}/settings")
def settings(hub: Hub, request: Request, kind: str, repo: str) -> Answer:
    repository, wish = hub.repository(kind, repo, request.account), request.json
    writing(request.account, repository.namespace)
    if "visibility" in wish or "private" in wish:
        repository.private = wish.get("visibility") == "private" or bool(wish.get("private"))
    repository.gated = wish.get("gated", repository.gated)
    return Answer({"private": repository.private, "gated": repository.gated})


@route("GET", "/api/{kind}/{repo}/auth-check")
def may_read(hub: Hub, request: Request, kind: str, repo: str) -> Answer:
    hub.repository(kind, repo, request.account)
    return Answer()


@route("GET", "/api/{kind}/{repo}/auth-check/write")
def may_write(hub: Hub, request: Request, kind: str, repo: str) -> Answer:
    writing(request.account, hub.repository(kind, repo, request.account).namespace)
    return Answer()


def front_matter(card: str) -> dict[str, Any] | None:
    """The metadata of a card, None without any."""
    found = FRONT_MATTER.match(card)
    return (yaml.safe_load(found[1]) or {}) if found else None


def problems(metadata: dict[str, Any]) -> list[str]:
    """What the Hub refuses in a card's metadata."""

    def texts(value: Any) -> bool:
        return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))

    found = [
        f'"{key}" must be a string' for key in ("library_name", "pipeline_tag") if not isinstance(metadata.get(key, ""), str)
    ]
    found += [
        f'"{key}" must be a string or a list of strings'
        for key in ("license", "language", "tags", "datasets")
        if not texts(metadata.get(key, ""))
    ]
    bases = metadata.get("base_model", [])
    if not texts(bases) or not all(HUB_ID.fullmatch(name) for name in ([bases] if isinstance(bases, str) else bases)):
        found.append('"base_model" with value is not valid. Use a model id from https://hf.co/models.')
    if metadata.get("base_model_relation", "merge") not in RELATIONS:
        found.append(f'"base_model_relation" must be one of [{", ".join(sorted(RELATIONS))}]')
    index = metadata.get("model-index", [])
    if not isinstance(index, list) or not all(isinstance(item, dict) and {"name", "results"} <= item.keys() for item in index):
        found.append('"model-index" must be a list of objects with "name" and "results"')
    return found


@route("POST", "/api/validate-yaml")
def validate_card(hub: Hub, request: Request) -> Answer:
    try:
        metadata = front_matter(request.json["content"])
    except yaml.YAMLError as error:
        raise Refusal(400, "Invalid YAML", errors=[{"message": str(error)}], warnings=[]) from error
    if metadata is None:
        return Answer({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
    if found := problems(metadata):
        raise Refusal(400, "Invalid metadata", errors=[{"message": message} for message in found], warnings=[])
    return Answer({"errors": [], "warnings": []})
