"""Serving: the application on a socket, by uvicorn, until a signal."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from mechmerge.errors import InputError
from mechmerge.service.app import create_app
from mechmerge.service.service import Service, open_service
from mechmerge.service.settings import Settings, check_exposure

GRACE = 5
"""Seconds that requests have to end when the server stops."""


class _Server(uvicorn.Server):
    """Tells the service at once when it is to stop: event streams would keep the server waiting."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._service.stopping.set()
        super().handle_exit(sig, frame)


def serve(settings: Settings, ready: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT; running jobs are queued again then, and go on when the server is started again.

    Args:
        settings: the server's.
        ready: told the address once connections are taken.

    Raises:
        InputError: the address cannot be had, another server works on the data folder, or tokens are missing.
        MissingError: the database cannot be reached.
    """
    with open_service(settings) as service:
        check_exposure(settings, service.tokens.valid())
        with _listen(settings) as listener:
            host, port = listener.getsockname()[:2]
            config = uvicorn.Config(
                create_app(service),
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=GRACE,
            )
            ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
            with _signals():
                _Server(config, service).run(sockets=[listener])


@contextmanager
def _signals() -> Iterator[None]:
    """uvicorn raises the signals that stopped it once more when it is done: they have been obeyed by then."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=256)
    except OSError as error:
        raise InputError(
            f"--host {settings.host} --port {settings.port}",
            expected="an address of this machine that is free",
            found=error.strerror or str(error),
            fix="name another port",
        ) from None
