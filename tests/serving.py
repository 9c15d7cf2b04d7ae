"""What tests of the service share: a service in this process behind a real uvicorn, a server in a process of its own, a
PostgreSQL of the test's own, and a light pipeline.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import httpx
import psutil
import pytest
import uvicorn
import yaml

from mechmerge.models.references import Model
from mechmerge.service.app import create_app
from mechmerge.service.processes import MARK
from mechmerge.service.service import Service, open_service
from mechmerge.service.settings import Settings
from mechmerge.service.store import Claim, Job, NewJob, job_id
from mechmerge.service.tokens import ROLES

ROOT = Path(__file__).parents[1]
TOPICS = ["tea", "rain", "a river", "the moon", "a forest", "bread"]
LIGHT: dict[str, Any] = {
    "schema_version": 1,
    "title": "light",
    "license": "mit",
    "behaviors": {"loud": {"expert": "a", "file": "loud.yaml"}},
    "localize": {
        "anchor_layer": 2, "verify": 1, "prompts": 2, "steering_prompts": 0, "output_prompts": 0, "curves": False,
        "measures": ["sufficiency"], "on_invalid": "report",
    },
    "effects": {"prompts": 4, "dtype": "float32", "max_nodes": 6},
    "recipes": {
        "conflict": {"policy": "conflict"},
        "sum": {"policy": "task-arithmetic", "parameters": {"weight": 1.0}},
    },
    "publish": "conflict",
    "evaluate": {"suites": ["short.yaml"], "dtype": "float32", "batch": 4},
    "gate": {"model": "conflict", "rules": [{"metric": "short", "model": "conflict", "at_least": 0.0}]},
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- pipelines
def light_files() -> dict[str, str]:
    """The files that a light pipeline names."""
    pairs = [{"with": f"Shout about {t}.", "without": f"Write about {t}.", "topic": t} for t in TOPICS]
    suite = {"name": "short", "answer_tokens": 4, "verifier": {"name": "contains", "arguments": {"text": "e"}}}
    prompts = [{"prompt": f"Say {t}.", "topic": t} for t in TOPICS[:4]]
    return {
        "loud.yaml": yaml.safe_dump({"name": "loud", "pairs": pairs, "answer_tokens": 4}),
        "short.yaml": yaml.safe_dump(suite | {"prompts": prompts}),
    }


def light_pipeline(base: str, expert: str, /, **changes: Any) -> dict[str, Any]:
    """A pipeline of a few seconds; `changes` replace top-level entries."""
    return LIGHT | {"base": base, "experts": {"a": expert}} | changes


def submission(base: str, expert: str, /, **changes: Any) -> dict[str, Any]:
    """A light pipeline as the API takes it."""
    return {"pipeline": yaml.safe_dump(light_pipeline(base, expert, **changes), sort_keys=False), "files": light_files()}


def write_light(folder: Path, base: Model, expert: Model, /, **changes: Any) -> Path:
    """A light pipeline as files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in light_files().items():
        (folder / name).write_text(text)
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(light_pipeline(str(base.path), str(expert.path), **changes), sort_keys=False))
    return path


# ---------------------------------------------------------------------------------------------------------- in this process
class Served(NamedTuple):
    """A service of this process, and clients of it."""

    service: Service
    url: str
    tokens: dict[str, str]
    """By role, a token of the user of that name."""

    def client(self, role: str | None = None) -> httpx.Client:
        """A client with the token of a role."""
        headers = {} if role is None else {"Authorization": f"Bearer {self.tokens[role]}"}
        return httpx.Client(base_url=self.url, headers=headers, trust_env=False, timeout=30)


@contextlib.contextmanager
def served(settings: Settings, *, supervise: bool = False, tokens: bool = True) -> Iterator[Served]:
    """A service behind uvicorn on a port of its own, in a thread."""
    with open_service(settings) as service, socket.create_server(("127.0.0.1", 0)) as listener:
        made = {role: service.tokens.add(f"the-{role}", role)[1] for role in ROLES} if tokens else {}
        app = create_app(service, supervise=supervise)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            with httpx.Client(trust_env=False) as client:
                client.get(f"{url}/healthz", timeout=30)
            yield Served(service, url, made)
        finally:
            service.stopping.set()
            server.should_exit = True
            thread.join()


def stored_job(service: Service, state: str = "done", user: str = "the-run", run: Path | None = None, **result: Any) -> Job:
    """A job that was stored and, unless its state is `queued`, taken up and ended, as workers do it."""
    # Before all that wait: it is claimed at once.
    new = NewJob(job_id(), "run", "stored", user, 5 if state == "queued" else 9)
    folder = service.folder(new.id)
    (folder / "input").mkdir(parents=True)
    (folder / "run").mkdir() if run is None else shutil.copytree(run, folder / "run")
    service.store.submit(new, 1000)
    if state != "queued":
        job = service.store.claim("a-server")
        assert job is not None
        assert job.id == new.id
        if state != "running":
            claim = Claim(job.id, "a-server", job.attempt)
            service.store.finish(claim, state, seconds=1.0, result=result or None)  # type: ignore[arg-type]
    return service.store.job(new.id)


# ----------------------------------------------------------------------------------------------- in a process of its own
class ServerProcess:
    """`mechmerge serve` in a process of its own, which can be killed and started again; a context manager.

    Args:
        data: the data folder.
        arguments: further arguments of the command.
        env: its environment (default: this one's).
    """

    def __init__(self, data: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.data, self.arguments, self.env = data, arguments, dict(os.environ if env is None else env)
        self.port, self.starts = 0, 0
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens, after the first start always at the same port."""
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.await_quiet()

    def start(self) -> None:
        """Starts it, and waits until it takes connections."""
        self.data.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "mechmerge.cli.main", "serve", "--data", str(self.data), "--port", str(self.port)]
        log = self.data / f"server-{self.starts}.log"
        self.starts += 1
        with log.open("wb") as output:
            self.process = subprocess.Popen([*command, *self.arguments], cwd=ROOT, env=self.env, stderr=output, stdout=output)
        until = time.monotonic() + 120
        while "serving http" not in (text := log.read_text()):
            assert self.process.poll() is None, text
            assert time.monotonic() < until, text
            time.sleep(0.05)
        self.port = int(text.partition("serving http://127.0.0.1:")[2].split()[0])

    def kill(self) -> None:
        """SIGKILL, to the server alone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=60)
        self.process = None
        return code

    def workers(self) -> list[psutil.Process]:
        """All processes that carry the mark of a job of this data folder."""
        instance = self.data / "instance"
        mark = f"{instance.read_text().strip()}/" if instance.exists() else "none"
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK, "").startswith(mark):
                    found.append(process)
        return found

    def await_quiet(self, seconds: float = 20) -> None:
        """Waits until no worker is left: without a server none stays."""
        until = time.monotonic() + seconds
        while left := self.workers():
            assert time.monotonic() < until, f"orphans: {left}"
            time.sleep(0.05)

    def client(self) -> httpx.Client:
        """A client."""
        return httpx.Client(base_url=self.url, trust_env=False, timeout=60)


# -------------------------------------------------------------------------------------------------------------- PostgreSQL
class Postgres:
    """A PostgreSQL of the session's own, listening on a socket in its folder."""

    def __init__(self, binaries: Path, folder: Path) -> None:
        self.folder, self._binaries, self._made = folder, binaries, 0
        # It refuses to run as root, as containers do: then it runs as nobody.
        self._user = 65534 if os.geteuid() == 0 else None
        if self._user is not None:
            os.chown(folder, self._user, self._user)
        self._run("initdb", "-D", str(folder / "data"), "-U", "test", "-A", "trust", "-N", "--no-instructions")
        self._process = self._start("postgres", "-D", str(folder / "data"), "-k", str(folder), "-c", "listen_addresses=", "-F")
        until = time.monotonic() + 60
        while subprocess.run([binaries / "pg_isready", "-h", folder, "-q"], check=False).returncode:
            assert time.monotonic() < until, (folder / "output").read_text()
            time.sleep(0.1)

    def database(self) -> str:
        """The URL of a new database."""
        self._made += 1
        name = f"test{self._made}"
        self._run("createdb", "-h", str(self.folder), "-U", "test", name)
        return f"postgresql://test@/{name}?host={self.folder}"

    def close(self) -> None:
        """Ends it."""
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait()

    def _start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.folder / "output").open("ab") as output:
            return subprocess.Popen(
                [self._binaries / name, *arguments],
                stdout=output, stderr=output, user=self._user, group=self._user, cwd=self.folder, env={"LC_ALL": "C"},
            )  # fmt: skip

    def _run(self, name: str, *arguments: str) -> None:
        assert self._start(name, *arguments).wait() == 0, (self.folder / "output").read_text()


def postgres_binaries() -> Path | None:
    """The folder of PostgreSQL's programs: on the path, or Debian's own."""
    there = shutil.which("initdb")
    folders = [Path(there).resolve().parent] if there else sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((folder for folder in folders if (folder / "postgres").exists()), None)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """A PostgreSQL; skips where none is installed, or fails with MECHMERGE_NEED_POSTGRES (continuous integration sets it)."""
    import tempfile

    binaries = postgres_binaries()
    if binaries is None:
        said = "no PostgreSQL here (Debian: apt-get install postgresql)"
        pytest.fail(said) if os.environ.get("MECHMERGE_NEED_POSTGRES") else pytest.skip(said)
    # Not pytest's folder: only its owner enters that, and a socket's path is short.
    with tempfile.TemporaryDirectory(prefix="mm-pg-", ignore_cleanup_errors=True) as folder:
        server = Postgres(binaries, Path(folder))
        yield server
        server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty database, of either kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'store.sqlite'}"
    server: Postgres = request.getfixturevalue("postgres")
    return server.database()
