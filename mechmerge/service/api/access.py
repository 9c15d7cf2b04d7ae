"""Who one is, sessions of browsers, and tokens."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Cookie, Path, Request, Response
from pydantic import Field

from mechmerge.artifacts import Document
from mechmerge.service.access import COOKIE, Admin, Reader, The
from mechmerge.service.problems import ServiceError, answers
from mechmerge.service.tokens import SESSION_SECONDS, USER, Role, Token

router = APIRouter(prefix="/api", tags=["access"])


class Me(Document):
    """Who asks."""

    user: str
    role: Role
    csrf: str | None
    """Of a session: what `X-CSRF-Token` must hold in every request that changes something."""


class Login(Document):
    """What opens a session."""

    token: str = Field(min_length=1, max_length=200)


class NewToken(Document):
    """A token to be made."""

    user: str = Field(pattern=f"^{USER}$")
    role: Role
    seconds: float | None = Field(default=None, gt=0, le=1e10)
    """How long it is valid; none: until it is revoked."""


class MadeToken(Document):
    """A token with its text, told this once."""

    token: Token
    text: str


class TokenList(Document):
    """All tokens, the oldest first."""

    tokens: tuple[Token, ...]


@router.get("/me", responses=answers(401))
def me(identity: Reader) -> Me:
    """Who one is to this server."""
    return Me(user=identity.user, role=identity.role, csrf=identity.csrf)


@router.post("/session", responses=answers(401))
def open_session(body: Login, service: The, request: Request, response: Response) -> Me:
    """Open a browser's session with a token: the cookie is set."""
    opened = service.tokens.open_session(body.token)
    if opened is None:
        raise ServiceError(
            401, "token", expected="a valid token", found="one that is not valid", headers={"WWW-Authenticate": "Bearer"}
        )
    identity, value = opened
    response.set_cookie(
        COOKIE, value, max_age=int(SESSION_SECONDS), httponly=True, samesite="strict", secure=request.url.scheme == "https"
    )
    return Me(user=identity.user, role=identity.role, csrf=identity.csrf)


@router.delete("/session", status_code=204, responses=answers())
def close_session(
    service: The, response: Response, cookie: Annotated[str | None, Cookie(alias=COOKIE, include_in_schema=False)] = None
) -> None:
    """End one's session, if there is one."""
    if cookie is not None:
        service.tokens.close_session(cookie)
    response.delete_cookie(COOKIE, httponly=True, samesite="strict")


@router.get("/tokens", responses=answers(401))
def list_tokens(identity: Admin, service: The) -> TokenList:
    """All tokens, without their secrets."""
    return TokenList(tokens=tuple(service.tokens.all()))


@router.post("/tokens", status_code=201, responses=answers(401))
def add_token(body: NewToken, identity: Admin, service: The) -> MadeToken:
    """Make a token. From the first one on every request needs one."""
    token, text = service.tokens.add(body.user, body.role, body.seconds)
    return MadeToken(token=token, text=text)


@router.delete("/tokens/{id}", responses=answers(401, 404))
def revoke_token(id: Annotated[str, Path(pattern=r"^[0-9a-f]{12}$")], identity: Admin, service: The) -> Token:
    """Make a token invalid, at once, with the sessions that it opened."""
    return service.tokens.revoke(id)
