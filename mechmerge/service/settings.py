"""What a server is told when it starts, and where its files lie.

DATA/service.sqlite      the store, unless a database is named by URL
DATA/instance            the name by which store and folder know each other
DATA/jobs/ID/input/      pipeline.yaml and the files sent with it
DATA/jobs/ID/run/        the run directory
DATA/jobs/ID/log.jsonl   what happened, an event a line (service/log.py)
DATA/jobs/ID/worker.log  what the worker printed
"""

from __future__ import annotations

import ipaddress
from pathlib import Path

from pydantic import Field, field_validator

from mechmerge.artifacts import Document
from mechmerge.errors import InputError

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


class Limits(Document):
    """What one job may take; beyond it the job is ended."""

    seconds: float = Field(default=24 * 3600.0, gt=0)
    """Working time, all attempts together."""
    memory: int = Field(default=0, ge=0)
    """Bytes resident, of the worker and everything that it starts; 0: no limit."""
    disk: int = Field(default=0, ge=0)
    """Bytes of the job's folder; 0: no limit. No single file may be larger either."""


class Settings(Document):
    """Settings of a server."""

    data: Path
    """The folder of everything that the server keeps."""
    database: str | None = None
    """URL of a PostgreSQL database (default: SQLite in the data folder)."""
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    hosts: tuple[str, ...] = ()
    """Names under which the server is reached, besides those of the loopback and `host` (what a Host header may say)."""
    slots: int = Field(default=1, ge=0)
    """Jobs that run at once; 0: none, the queue waits."""
    device: str = "cpu"
    threads: int | None = Field(default=None, ge=1)
    """Threads of a worker (default: the cores, shared among the slots)."""
    nice: int = Field(default=5, ge=0, le=19)
    """How far workers stand back for the server, as nice(1) counts."""
    limits: Limits = Limits()
    free_disk: int = Field(default=1_000_000_000, ge=0)
    """Bytes that must be free on the data folder's disk before a job is taken or started."""
    folders: tuple[Path, ...] = ()
    """Folders that model references may lie in."""
    namespaces: tuple[str, ...] = ()
    """Owners on the Hub whose models may be named; `*`: all."""
    publish_to: tuple[str, ...] = ()
    """Owners on the Hub under which merges may be published."""
    quota_jobs: int = Field(default=20, ge=1)
    """Jobs of one user that may be queued or running."""
    quota_running: int = Field(default=0, ge=0)
    """Jobs of one user that run at once; 0: as many as there are slots."""
    attempts: int = Field(default=5, ge=1)
    """Times that a worker may die in one stage before its job is given up."""
    interruptions: int = Field(default=20, ge=1)
    """Times that a server may die in one stage of a job before it is given up: what brings the server down must not do so for
    ever, and one that is killed by the machine's owner must not lose jobs.
    """
    body: int = Field(default=16_000_000, ge=1000)
    """Bytes of a request."""

    @field_validator("data", "folders", mode="after")
    @classmethod
    def _absolute(cls, value: Path | tuple[Path, ...]) -> Path | tuple[Path, ...]:
        if isinstance(value, Path):
            return value.expanduser().resolve()
        return tuple(folder.expanduser().resolve() for folder in value)

    @property
    def url(self) -> str:
        """The store's URL, as SQLAlchemy writes it."""
        return self.database or f"sqlite:///{self.data / 'service.sqlite'}"

    @property
    def jobs(self) -> Path:
        """The folder of the jobs' folders."""
        return self.data / "jobs"

    @property
    def loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def known_hosts(self) -> frozenset[str]:
        """What a Host header may say, without the port and in lower case; empty: anything, since the server listens on all
        addresses and was told no name.
        """
        if not self.loopback and not self.hosts and self.host in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
            return frozenset()
        host = f"[{self.host}]" if ":" in self.host else self.host
        return frozenset(name.lower() for name in (*LOOPBACK_NAMES, host, *self.hosts))


def check_exposure(settings: Settings, tokens: int) -> None:
    """Refuses to be reached from elsewhere without tokens.

    Args:
        settings: where the server would listen, and under which names.
        tokens: tokens that are valid.

    Raises:
        InputError: bound to more than the loopback, or named otherwise, and there is no token.
    """
    if tokens == 0 and (not settings.loopback or settings.hosts):
        where = f"--host {settings.host}" if not settings.loopback else f"--allow-host {settings.hosts[0]}"
        raise InputError(
            where,
            expected="tokens, since others than this machine's users can reach the server",
            found="none",
            fix="add one with `mechmerge serve token add NAME --role admin`",
        )
