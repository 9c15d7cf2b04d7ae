"""Who may do what: bearer tokens with a role, and browsers' sessions opened with one. Only digests of secrets are stored.

    read      see jobs, logs and artifacts
    run       submit pipelines; cancel, resume and delete one's own
    publish   publish merges that their gate accepts
    admin     everybody's jobs, high priorities, tokens

Each role may do what those above it may.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable
from typing import Literal, NamedTuple

from sqlalchemy import Engine, delete, func, select
from sqlalchemy.orm import Session

from mechmerge.artifacts import Document
from mechmerge.errors import InputError
from mechmerge.service.database import reading, writing
from mechmerge.service.problems import ServiceError
from mechmerge.service.tables import SessionRow, TokenRow

Role = Literal["read", "run", "publish", "admin"]
ROLES: tuple[Role, ...] = ("read", "run", "publish", "admin")
PREFIX = "mmt"
USER = r"[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}"
SESSION_SECONDS = 12 * 3600.0
LOCAL = "local"
"""The user of a server that only this machine reaches and that has no tokens."""


class Token(Document):
    """A token, without its secret."""

    id: str
    user: str
    role: Role
    created: float
    """Seconds since 1970, as all times here."""
    expires: float | None
    revoked: float | None
    used: float | None
    """When it was last used, to the minute."""


class Identity(NamedTuple):
    """Who asks."""

    user: str
    role: Role
    csrf: str | None = None
    """Of a session: what must come with every request that changes something."""
    token: str | None = None
    """The token's id."""
    session: str | None = None
    """Digest of the cookie's value, where it came with one."""

    def may(self, role: Role) -> bool:
        """Whether this role is held, or one above it."""
        return ROLES.index(self.role) >= ROLES.index(role)


class Tokens:
    """The tokens and sessions in a database.

    Args:
        engine: of `open_engine`, its tables up to date.
        clock: seconds since 1970.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time) -> None:
        self.engine, self.clock = engine, clock

    def add(self, user: str, role: Role, seconds: float | None = None) -> tuple[Token, str]:
        """A new token: what is known of it, and its text, which is told this once.

        Args:
            user: whose it is.
            role: what it allows.
            seconds: how long it is valid (None: until it is revoked).

        Raises:
            InputError: not a user's name.
        """
        if not re.fullmatch(USER, user):
            raise InputError("user", expected="1 to 64 letters, digits, _ . @ and -", found=repr(user[:100]))
        id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        now = self.clock()
        row = TokenRow(
            id=id, user=user, role=role, digest=_digest(secret), created=now, expires=None if seconds is None else now + seconds
        )
        with writing(self.engine) as session:
            session.add(row)
            session.flush()
            return _view(row), f"{PREFIX}_{id}_{secret}"

    def all(self) -> list[Token]:
        """All tokens, the oldest first."""
        with reading(self.engine) as session:
            return [_view(row) for row in session.scalars(select(TokenRow).order_by(TokenRow.created, TokenRow.id))]

    def revoke(self, id: str) -> Token:
        """Makes a token invalid, and the sessions that it opened.

        Raises:
            ServiceError: none of this name (404).
        """
        with writing(self.engine) as session:
            row = session.get(TokenRow, id)
            if row is None:
                raise ServiceError(404, f"token {id[:40]}", expected="a token of this server", found="none")
            row.revoked = row.revoked or self.clock()
            session.execute(delete(SessionRow).where(SessionRow.token == id))
            return _view(row)

    def ever(self) -> bool:
        """Whether there ever was a token: from then on every request needs one."""
        with reading(self.engine) as session:
            return bool(session.scalar(select(func.count()).select_from(TokenRow)))

    def valid(self) -> int:
        """Tokens that are valid now."""
        with reading(self.engine) as session:
            rows = session.scalars(select(TokenRow).where(TokenRow.revoked.is_(None)))
            return sum(self._is_valid(row) for row in rows)

    def identify(self, text: str) -> Identity | None:
        """Whose token this is; None where it is none, or no longer one."""
        kind, _, rest = text.partition("_")
        id, _, secret = rest.partition("_")
        # Not every database can look up whatever it may be, such as a NUL.
        if kind != PREFIX or not secret or not re.fullmatch("[0-9a-f]{12}", id):
            return None
        with reading(self.engine) as session:
            row = session.get(TokenRow, id)
            if row is None or not hmac.compare_digest(row.digest, _digest(secret)) or not self._is_valid(row):
                return None
            found, stale = Identity(row.user, _role(row), token=row.id), (row.used or 0.0) < self.clock() - 60
        if stale:
            with writing(self.engine) as session:
                row = session.get(TokenRow, id)
                if row is not None:
                    row.used = self.clock()
        return found

    def holds(self, identity: Identity) -> bool:
        """Whether the token, and the session, that somebody was identified by are still valid."""
        with reading(self.engine) as session:
            row = None if identity.token is None else session.get(TokenRow, identity.token)
            if row is None or not self._is_valid(row):
                return False
            opened = None if identity.session is None else session.get(SessionRow, identity.session)
            return identity.session is None or (opened is not None and opened.expires >= self.clock())

    # ------------------------------------------------------------------------------------------------------------ sessions
    def open_session(self, text: str) -> tuple[Identity, str] | None:
        """Opens a session with a token: who it is, and the cookie's value; None where the token is not valid."""
        identity = self.identify(text)
        if identity is None or identity.token is None:
            return None
        value, csrf = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        with writing(self.engine) as session:
            session.execute(delete(SessionRow).where(SessionRow.expires < self.clock()))
            row = SessionRow(digest=_digest(value), token=identity.token, csrf=csrf, expires=self.clock() + SESSION_SECONDS)
            session.add(row)
        return identity._replace(csrf=csrf), value

    def in_session(self, value: str) -> Identity | None:
        """Whose session this is; None where it is none, or no longer one."""
        with reading(self.engine) as session:
            row = session.get(SessionRow, _digest(value))
            if row is None or row.expires < self.clock():
                return None
            token = _token(session, row)
            return Identity(token.user, _role(token), row.csrf, token.id, row.digest) if self._is_valid(token) else None

    def close_session(self, value: str) -> None:
        """Ends a session."""
        with writing(self.engine) as session:
            session.execute(delete(SessionRow).where(SessionRow.digest == _digest(value)))

    def _is_valid(self, row: TokenRow) -> bool:
        return row.revoked is None and (row.expires is None or row.expires > self.clock())


def _token(session: Session, row: SessionRow) -> TokenRow:
    return session.get_one(TokenRow, row.token)


def _role(row: TokenRow) -> Role:
    return row.role  # type: ignore[return-value]  # only `add` writes it


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _view(row: TokenRow) -> Token:
    return Token(
        id=row.id,
        user=row.user,
        role=_role(row),
        created=row.created,
        expires=row.expires,
        revoked=row.revoked,
        used=row.used,
    )
