"""Opening the store's database: SQLite with a write-ahead log (WAL), or PostgreSQL; and bringing its tables up to date.

SQLite (https://www.sqlite.org/wal.html): readers do not wait for the one writer. Every transaction that writes begins as
`BEGIN IMMEDIATE`, so that it waits its turn at the start and never fails half-way when it turns from reading to writing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.orm import Session

from mechmerge.errors import InputError, MissingError

LOCK = 0x6D656368
"""PostgreSQL's advisory lock under which tables are brought up to date."""


def open_engine(url: str) -> Engine:
    """An engine for the store.

    Args:
        url: `sqlite:///FILE` or `postgresql://USER:PASSWORD@HOST/DATABASE`.

    Raises:
        InputError: another kind of URL.
    """
    parsed = _parse(url)
    if parsed.drivername == "sqlite":
        engine = create_engine(parsed, pool_size=20, max_overflow=20, connect_args={"timeout": 30})
        event.listen(engine, "connect", _prepare)
        event.listen(engine, "begin", _begin)
        return engine
    # Else texts of a database without an encoding would come as bytes.
    arguments = {"client_encoding": "utf8", "connect_timeout": 10}
    return create_engine(parsed, pool_size=20, max_overflow=20, pool_pre_ping=True, connect_args=arguments)


def _parse(url: str) -> URL:
    wanted = "postgresql://USER:PASSWORD@HOST/DATABASE, or sqlite:///FILE"
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise InputError("database", expected=wanted, found="something else") from None  # it may hold a password
    if parsed.drivername in ("postgresql", "postgres", "postgresql+psycopg"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername == "sqlite" and parsed.database not in (None, "", ":memory:"):
        return parsed
    raise InputError("database", expected=wanted, found=parsed.render_as_string(hide_password=True))


def _prepare(connection: Any, _record: Any) -> None:
    # The driver's own transactions would begin late; `_begin` begins them.
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def reading(engine: Engine) -> Iterator[Session]:
    """A session that only reads."""
    with Session(engine) as session:
        yield session


@contextmanager
def writing(engine: Engine) -> Iterator[Session]:
    """A session whose changes are kept when the block ends well, all of them or none."""
    with engine.connect() as connection:
        connection = connection.execution_options(writes=True)
        with Session(connection, expire_on_commit=False) as session, session.begin():
            yield session


def migrations() -> Config:
    """Alembic's configuration of the migrations inside the package."""
    config = Config()
    config.set_main_option("script_location", "mechmerge.service:migrations")
    config.set_main_option("path_separator", "os")
    return config


def migrate(engine: Engine, revision: str = "head") -> None:
    """Brings the tables up to date, in one transaction.

    Raises:
        MissingError: the database cannot be reached, or was written by a newer version.
    """
    config = migrations()
    try:
        with engine.connect() as connection:
            connection = connection.execution_options(writes=True)
            with connection.begin():
                if connection.dialect.name == "postgresql":
                    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": LOCK})
                config.attributes["connection"] = connection
                command.upgrade(config, revision)
    except SQLAlchemyError as error:
        raise MissingError(
            "database",
            expected=f"{engine.url.render_as_string(hide_password=True)} within reach",
            found=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            fix="check that it runs, and its name and password",
        ) from None
