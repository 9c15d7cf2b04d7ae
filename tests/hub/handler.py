"""One request at a time into the routes: read, struck by a fault if one fits, answered, written down."""

from __future__ import annotations

import contextlib
import re
import socket
import tempfile
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from tests.hub.accounts import WRITER
from tests.hub.answers import Answer, Refusal, Request, dispatch
from tests.hub.faults import Fault
from tests.hub.lfs import Transfer, upload_path

if TYPE_CHECKING:
    from tests.hub.server import Hub

BLOCK = 1 << 16


@dataclass(frozen=True)
class Entry:
    """A request in the log."""

    number: int
    method: str
    path: str
    length: int
    """Bytes of the body that were announced."""
    user: str | None
    fault: str | None


class Cut(Exception):
    """The connection ends here."""


class Handler(BaseHTTPRequestHandler):
    """Reads a request, lets the faults strike, and sends the answer."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for a delayed ACK
    timeout = 60

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on stderr: the Hub keeps its own log."""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (Cut, ConnectionError, TimeoutError):
            self.close_connection = True

    def answer_any(self) -> None:
        with self.hub.lock:
            self.hub.busy += 1
        try:
            self._answer_one()
        finally:
            with self.hub.lock:
                self.hub.busy -= 1

    def _answer_one(self) -> None:
        address = urlsplit(self.path)
        fault = self._enter(address.path)
        with tempfile.SpooledTemporaryFile(max_size=1 << 20) as file:
            request = Request(self.command, address.path, parse_qs(address.query), dict(self.headers.items()), file, 0)
            upload = upload_path(request)
            transfer = self.hub.objects.note(Transfer(*upload, received=0)) if upload else None
            self._receive(request, transfer, half=fault is not None and fault.kind == "half")
            answer = self._answer(request, fault)
            if transfer:
                transfer.acknowledged = answer.status == 200
            try:
                self._send(answer, fault)
            except (Cut, OSError):
                if transfer:
                    transfer.acknowledged = False
                raise

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = answer_any

    def _enter(self, path: str) -> Fault | None:
        hub = self.hub
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        account = hub.accounts.tokens.get(token)
        length = int(self.headers.get("Content-Length") or 0)
        with hub.lock:
            number = len(hub.log) - hub.counted_from
            fault = hub.faults.strike(number, self.command, path)
            hub.log.append(
                Entry(number, self.command, path, length, account.user if account else None, fault.kind if fault else None)
            )
        return fault

    def _receive(self, request: Request, transfer: Transfer | None, half: bool) -> None:
        """Reads the body, block by block."""
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            while size := int(self.rfile.readline().strip() or b"0", 16):
                request.file.write(self.rfile.read(size))
                self.rfile.readline()
                if half:
                    raise Cut
            self.rfile.readline()
            request.length = request.file.tell()
            return
        request.length = int(self.headers.get("Content-Length") or 0)
        left = request.length // 2 if half else request.length
        while left > 0:
            block = self.rfile.read(min(left, BLOCK))
            if not block:
                raise Cut
            request.file.write(block)
            left -= len(block)
            if transfer:
                transfer.received += len(block)
        if half:
            raise Cut

    def _answer(self, request: Request, fault: Fault | None) -> Answer:
        hub = self.hub
        try:
            if fault:
                self._strike(fault)
            request.account = hub.accounts.of(self.headers.get("Authorization"))
            # Storing bytes needs no lock; whatever reads or moves a ref does.
            if request.method == "PUT" and request.path.startswith("/_lfs/"):
                return dispatch(hub, request)
            with hub.lock:
                return dispatch(hub, request)
        except Refusal as refusal:
            return refusal.answer()
        except Cut:
            raise
        except Exception as error:  # a bug of ours must not pass for a fault: the Hub raises it when it closes
            hub.crashes.append(error)
            return Refusal(500, f"A bug of the loopback Hub: {error!r}").answer()

    def _strike(self, fault: Fault) -> None:
        """What a fault does before the request is carried out; it raises where it is not carried out at all."""
        match fault.kind:
            case "cut":
                raise Cut
            case "error":
                raise Refusal(fault.status, "Service Unavailable")
            case "busy":
                raise Refusal(429, "Too many requests", headers={"Retry-After": str(int(fault.seconds))})
            case "expired":
                self.hub.accounts.expire((self.headers.get("Authorization") or f"Bearer {WRITER}").removeprefix("Bearer "))
            case "slow":
                time.sleep(fault.seconds)
            case "push" if fault.act is None:
                self.hub.push_everywhere()
            case "push" | "hold" | "kill" if fault.act is not None:
                fault.act()
        if fault.kind == "kill":
            raise Cut

    def _send(self, answer: Answer, fault: Fault | None) -> None:
        content = answer.content()
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        start, stop, status, headers = 0, size, answer.status, dict(answer.headers)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted and status == 200:
            start, stop, status = int(wanted[1]), min(int(wanted[2] or size) + 1, size), 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        if not isinstance(answer.body, bytes | Path):
            headers["Content-Type"] = "application/json"
        headers.setdefault("Content-Length", str(stop - start))
        lines = [
            f"HTTP/1.1 {status} {self.responses.get(status, ('',))[0]}",
            *(f"{name}: {value}" for name, value in headers.items()),
        ]
        head = ("\r\n".join(lines) + "\r\n\r\n").encode()
        silent = self.command == "HEAD" or status in (204, 304)
        length = len(head) + (0 if silent else stop - start)
        limit = {"lost": 0, "truncated": length // 2}.get(fault.kind if fault else "", length)
        self._write(head, content, start, 0 if silent else stop - start, limit)
        if limit < length:
            raise Cut

    def _write(self, head: bytes, content: bytes | Path, start: int, count: int, limit: int) -> None:
        """Writes the head and `count` bytes of content from `start`, of all that at most `limit` bytes."""
        self.wfile.write(head[:limit])
        count = max(0, min(count, limit - len(head)))
        if isinstance(content, bytes):
            self.wfile.write(content[start : start + count])
        else:
            with content.open("rb") as file:
                file.seek(start)
                while count > 0 and (block := file.read(min(BLOCK, count))):
                    self.wfile.write(block)
                    count -= len(block)
        self.wfile.flush()

    def finish(self) -> None:
        """Closes at once: a client must see the end of a connection that was cut."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            super().finish()
