"""One service: its settings, store, tokens, figures and supervisor, over one data folder that no other server works on."""

from __future__ import annotations

import secrets
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import Engine

from mechmerge.artifacts import lock, read_text, write_text
from mechmerge.errors import InputError
from mechmerge.service.database import migrate, open_engine
from mechmerge.service.metrics import Metrics
from mechmerge.service.settings import Settings
from mechmerge.service.store import Store
from mechmerge.service.supervisor import Supervisor
from mechmerge.service.tokens import Identity, Tokens


@dataclass(frozen=True)
class Service:
    """What requests are answered from."""

    settings: Settings
    store: Store
    tokens: Tokens
    metrics: Metrics
    supervisor: Supervisor
    stopping: threading.Event = field(default_factory=threading.Event)
    """Set when the server is told to stop: event streams end then."""

    @property
    def is_open(self) -> bool:
        """Whether no token is needed: only this machine reaches the server, and there never was one."""
        return self.settings.loopback and not self.settings.hosts and not self.tokens.ever()

    def admits(self, identity: Identity) -> bool:
        """Whether somebody who was let in may stay: what streams ask again and again."""
        return self.is_open if identity.token is None else self.tokens.holds(identity)

    def folder(self, id: str) -> Path:
        """A job's folder."""
        return self.settings.jobs / id

    def run(self, id: str) -> Path:
        """The run directory of a job; of a publication that of the run that it publishes."""
        return self.folder(self.store.job(id).parent or id) / "run"


@contextmanager
def open_service(settings: Settings) -> Iterator[Service]:
    """The service of a data folder, which is made if need be; its supervisor is not started.

    Raises:
        InputError: another server works on the folder, or the database belongs to another one.
        MissingError: the database cannot be reached.
    """
    settings.jobs.mkdir(parents=True, exist_ok=True, mode=0o700)
    settings.data.chmod(0o700)
    with lock(settings.data / ".lock", f"data folder {settings.data}"):
        engine, instance = open_store(settings)
        try:
            store = Store(engine)
            store.bind(instance)
            _tidy(settings, store)
            metrics = Metrics()
            supervisor = Supervisor(settings, store, instance, metrics)
            yield Service(settings, store, Tokens(engine), metrics, supervisor)
        finally:
            engine.dispose()


def open_store(settings: Settings) -> tuple[Engine, str]:
    """The engine of a data folder's store, its tables up to date, and the folder's name."""
    settings.data.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = settings.data / "instance"
    if not path.exists():
        if any(settings.jobs.glob("*")):
            raise InputError(str(path), expected="the name of this data folder", found="none, though it holds jobs")
        write_text(path, secrets.token_hex(8) + "\n")
    engine = open_engine(settings.url)
    migrate(engine)
    return engine, read_text(path).strip()


INCOMING, DELETED = ".incoming-", ".deleted-"


def _tidy(settings: Settings, store: Store) -> None:
    """Removes what a server that was killed left half written or half deleted."""
    for folder in settings.jobs.glob(f"{INCOMING}*"):
        shutil.rmtree(folder)
    for folder in settings.jobs.glob(f"{DELETED}*"):
        shutil.rmtree(folder)
