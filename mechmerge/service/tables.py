"""The tables of the store. A change here needs a migration in `migrations/versions`; a test compares the two.

Times are seconds since 1970 (UTC), as floats: SQLite has no type of its own for them.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import JSON, BigInteger, Boolean, Float, ForeignKey, Index, Integer, MetaData, String, Text, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_name)s",
    "pk": "pk_%(table_name)s",
}


class Base(DeclarativeBase):
    """Base of all tables."""

    metadata = MetaData(naming_convention=NAMES)


class JobRow(Base):
    """A job."""

    __tablename__ = "jobs"
    # SQLite counts up only in a column of the type INTEGER.
    number: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=True)
    """Order of submission; no number is given twice."""
    id: Mapped[str] = mapped_column(String(32), unique=True)
    kind: Mapped[str] = mapped_column(String(16))
    """`run` or `publish`."""
    parent: Mapped[str | None] = mapped_column(String(32), ForeignKey("jobs.id"), index=True)
    """Of a publication: the job whose run it publishes."""
    title: Mapped[str] = mapped_column(Text)
    user: Mapped[str] = mapped_column("owner_name", String(64), index=True)
    """Who submitted it."""
    key: Mapped[str | None] = mapped_column("request_key", String(64))
    """The submitter's own name for the request, so that sending it twice makes one job."""
    priority: Mapped[int] = mapped_column(Integer)
    state: Mapped[str] = mapped_column(String(16), index=True)
    """`queued`, `running`, `done`, `failed` or `cancelled`."""
    created: Mapped[float] = mapped_column(Float)
    started: Mapped[float | None] = mapped_column(Float)
    """When a worker last took it up."""
    ended: Mapped[float | None] = mapped_column(Float)
    seconds: Mapped[float] = mapped_column(Float, default=0.0)
    """Working time of the attempts that have ended."""
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    """Workers that have taken it up."""
    crashes: Mapped[int] = mapped_column(Integer, default=0)
    """Workers that died since the last stage was finished."""
    interruptions: Mapped[int] = mapped_column(Integer, default=0, server_default="0")
    """Servers that died since then while they ran it."""
    cancel: Mapped[bool] = mapped_column("cancel_asked", Boolean, default=False)
    request: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    """What a publication was asked for."""
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    server: Mapped[str | None] = mapped_column(String(32))
    """The server process that runs it."""
    lease: Mapped[float | None] = mapped_column(Float)
    """Until when that server answers for it, unless it says so again."""
    __table_args__ = (
        UniqueConstraint("owner_name", "request_key"),
        Index("ix_jobs_queue", "state", "priority", "number"),
        {"sqlite_autoincrement": True},
    )


class TokenRow(Base):
    """A bearer token; only its digest is kept."""

    __tablename__ = "tokens"
    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    user: Mapped[str] = mapped_column("owner_name", String(64), index=True)
    role: Mapped[str] = mapped_column(String(16))
    digest: Mapped[str] = mapped_column(String(64))
    """sha256 of the secret, in hex. The secret has 256 random bits, so a slow hash would add nothing."""
    created: Mapped[float] = mapped_column(Float)
    expires: Mapped[float | None] = mapped_column(Float)
    revoked: Mapped[float | None] = mapped_column(Float)
    used: Mapped[float | None] = mapped_column(Float)
    """When it was last used, to the minute."""


class SessionRow(Base):
    """A browser's session, opened with a token; it ends with it."""

    __tablename__ = "sessions"
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    """sha256 of the cookie's value, in hex."""
    token: Mapped[str] = mapped_column(String(16), ForeignKey("tokens.id"), index=True)
    csrf: Mapped[str] = mapped_column(String(64))
    expires: Mapped[float] = mapped_column(Float)


class ServiceRow(Base):
    """The one data folder that belongs to this store."""

    __tablename__ = "service"
    instance: Mapped[str] = mapped_column(String(32), primary_key=True)
