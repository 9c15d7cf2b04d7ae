"""A client of the service: what `mechmerge submit`, `jobs`, `logs` and `cancel` talk to a server with.

The pipeline file is the one that `mechmerge run` takes. Behaviour files, suites and data that it names go along; models do not:
a folder of this machine is named by its absolute path, which the server must see and allow, and everything else as it stands.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx

from mechmerge.artifacts import read_text, to_yaml
from mechmerge.errors import InputError, MissingError
from mechmerge.models.references import is_local
from mechmerge.pipeline.schema import Pipeline
from mechmerge.pipeline.source import load_pipeline

SUFFIXES = (".yaml", ".yml", ".json", ".jsonl")
PATIENCE = 60.0
"""Seconds that an unreachable server is waited for, once it was reached."""


class Bundle(NamedTuple):
    """A pipeline as it is sent."""

    pipeline: str
    """YAML."""
    files: dict[str, str]
    """What goes along: text by name."""


def bundle(path: Path) -> Bundle:
    """A pipeline file with everything that it names.

    Raises:
        SchemaError, InputError: as `mechmerge run --check` says it.
    """
    pipeline, files = load_pipeline(path), Files(path.parent)
    behaviors = {
        name: plan.model_copy(update={"file": files.send(plan.file or name)}) if files.has(plan.file or name) else plan
        for name, plan in pipeline.behaviors.items()
    }
    protect = {
        name: plan.model_copy(update={"file": files.send(plan.file or name)}) if files.has(plan.file or name) else plan
        for name, plan in pipeline.protect.items()
    }
    data = pipeline.evaluate.ifeval_data
    evaluate = pipeline.evaluate.model_copy(
        update={
            "suites": tuple(files.send(name) if files.has(name) else name for name in pipeline.evaluate.suites),
            "ifeval_data": data if data is None else files.send(data),
        }
    )
    changed: Mapping[str, Any] = {
        "base": absolute(pipeline.base, path.parent),
        "experts": {name: absolute(reference, path.parent) for name, reference in pipeline.experts.items()},
        "behaviors": behaviors,
        "protect": protect,
        "evaluate": evaluate,
    }
    sent: Pipeline = pipeline.model_copy(update=changed)
    return Bundle(to_yaml(sent), files.texts)


class Files:
    """The files that go along with a pipeline.

    Args:
        folder: the pipeline file's own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.texts: dict[str, str] = {}
        self._names: dict[str, str] = {}

    def has(self, name: str) -> bool:
        """Whether a name is that of a file, and not of something built in."""
        return (self.folder / name).is_file()

    def send(self, name: str) -> str:
        """Lets a file go along; the name that the sent pipeline calls it by: its own, where that lies below the folder."""
        if name not in self._names:
            plain = re.fullmatch(r"(?:[A-Za-z0-9][\w.-]*/){0,3}[A-Za-z0-9][\w.-]*", name, re.ASCII)
            sent = name if plain and name.endswith(SUFFIXES) else f"sent/{len(self._names)}/{_plain(Path(name))}"
            self._names[name] = sent
            self.texts[sent] = read_text(self.folder / name)
        return self._names[name]


def _plain(path: Path) -> str:
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", path.stem).strip("-_.") or "file"
    return stem + (path.suffix if path.suffix in SUFFIXES else ".yaml")


def absolute(reference: str, folder: Path) -> str:
    """A model reference with its local folders absolute, found where `mechmerge run` finds them."""
    if is_local(reference, folder):
        path = Path(reference).expanduser()
        return str(next(one for one in (folder / path, path) if one.exists()).resolve())
    base, plus, adapter = reference.rpartition("+")
    return f"{absolute(base, folder)}+{absolute(adapter, folder)}" if plus and base and adapter else reference


class Client:
    """Talks to one server; a context manager.

    Args:
        url: the server's, such as http://127.0.0.1:8000.
        token: a token, or None for a server without tokens.
        patience: seconds that a server is waited for which was reached before.
    """

    def __init__(self, url: str, token: str | None = None, patience: float = PATIENCE) -> None:
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self.url, self.patience = url.rstrip("/"), patience
        self._heard = time.monotonic()
        try:
            local = httpx.URL(url).host in ("localhost", "127.0.0.1", "::1")
            # A proxy of the environment does not reach this machine's own address.
            self._http = httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=not local)
        except httpx.InvalidURL as error:
            raise InputError("--server", expected="a URL such as http://127.0.0.1:8000", found=str(error)) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.close()

    def submit(self, sent: Bundle, priority: int | None = None) -> dict[str, Any]:
        """Queues a pipeline; once, even where the answer was lost and it is sent again."""
        body: dict[str, Any] = {"pipeline": sent.pipeline, "files": sent.files, "key": secrets.token_hex(16)}
        if priority is not None:
            body["priority"] = priority
        return self._patiently(lambda: self._ask("POST", "/api/jobs", json=body))

    def jobs(self, states: tuple[str, ...] = (), user: str | None = None, limit: int = 50) -> list[dict[str, Any]]:
        """Jobs, the newest first."""
        parameters: dict[str, Any] = {"state": list(states), "limit": limit} | ({} if user is None else {"user": user})
        found: list[dict[str, Any]] = self._ask("GET", "/api/jobs", params=parameters)["jobs"]
        return found

    def job(self, id: str) -> dict[str, Any]:
        """A job."""
        return self._ask("GET", f"/api/jobs/{_id(id)}")

    def cancel(self, id: str) -> dict[str, Any]:
        """Cancels a job."""
        return self._ask("POST", f"/api/jobs/{_id(id)}/cancel")

    def log(self, id: str) -> Iterator[dict[str, Any]]:
        """What happened to a job so far."""
        after = 0
        while True:
            page = self._ask("GET", f"/api/jobs/{_id(id)}/log", params={"after": after})
            yield from page["events"]
            if page["next"] <= after:
                return
            after = page["next"]

    def follow(self, id: str) -> Iterator[dict[str, Any]]:
        """What happened to a job and what happens, until it ends; the last one is the job itself, its type `end`.

        A server that goes away meanwhile is waited for.
        """
        known, self._heard = 0, time.monotonic()
        while True:
            try:
                for kind, data, number in self._stream(_id(id), known):
                    known = number
                    yield data | {"type": kind}
                    if kind == "end":
                        return
            except httpx.TransportError as error:
                if time.monotonic() - self._heard > self.patience:
                    raise self._unreachable(error) from None
            time.sleep(min(1.0, self.patience))

    def _stream(self, id: str, after: int) -> Iterator[tuple[str, dict[str, Any], int]]:
        headers = {"Last-Event-ID": str(after)} if after else {}
        timeout = httpx.Timeout(60, connect=10)
        with self._http.stream("GET", f"/api/jobs/{id}/events", headers=headers, timeout=timeout) as answer:
            if answer.status_code == 204:  # all was said, and its end was lost
                yield "end", self.job(id), after
                return
            if answer.is_error:
                answer.read()
                _check(answer)
            fields: dict[str, str] = {}
            for line in answer.iter_lines():
                # A sign of life, too: a stage that says nothing for long is no server that went away.
                self._heard = time.monotonic()
                name, _, value = line.partition(": ")
                if line:
                    fields[name] = value
                    continue
                if "data" in fields:
                    yield fields["event"], json.loads(fields["data"]), int(fields["id"])
                fields = {}

    def _ask(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        try:
            answer = self._http.request(method, path, **arguments)
        except httpx.TransportError as error:
            raise self._unreachable(error) from error
        return _check(answer)

    def _patiently(self, ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Asks again where a connection broke off, but not where there never was one."""
        until = time.monotonic() + self.patience
        broken = False
        while True:
            try:
                return ask()
            except MissingError as error:
                broken = broken or isinstance(error.__cause__, httpx.ReadError | httpx.RemoteProtocolError)
                if not broken or time.monotonic() > until:
                    raise
            time.sleep(min(1.0, self.patience))

    def _unreachable(self, error: httpx.TransportError) -> MissingError:
        return MissingError(
            f"server {self.url}",
            expected="a server within reach",
            found=str(error) or type(error).__name__,
            fix="start one with `mechmerge serve`, or name it with --server",
        )


def _id(id: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{16}", id):
        raise InputError("job", expected="an id of 16 hex digits, as `mechmerge jobs` lists them", found=repr(id[:40]))
    return id


def _check(answer: httpx.Response) -> dict[str, Any]:
    """The answer's JSON.

    Raises:
        InputError: the server refused.
        MissingError: it lacks something, or no server of ours answered.
    """
    try:
        value = answer.json()
    except ValueError:
        value = None
    if answer.is_success and isinstance(value, dict):
        return value
    if not isinstance(value, dict) or "where" not in value:
        raise MissingError(
            f"server {answer.url.copy_with(raw_path=b'/')}", expected="a mechmerge server", found=f"status {answer.status_code}"
        )
    kind = MissingError if answer.status_code >= 500 else InputError
    problem = {name: value.get(name) for name in ("expected", "found", "fix")}
    raise kind(f"server: {value['where']}", **problem)
