"""The Hub: its state, what tests ask of it, and the server that it runs in a thread."""

from __future__ import annotations

import os
import shutil
import threading
import time
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from tests.hub import account_routes, pull_requests, read, write  # noqa: F401  (their routes)
from tests.hub.accounts import WRITER, Account, Accounts
from tests.hub.answers import Refusal
from tests.hub.faults import Faults
from tests.hub.handler import Entry, Handler
from tests.hub.lfs import ObjectStore
from tests.hub.store import Commit, File, Repository
from tests.hub.xet import XetStore


class State(NamedTuple):
    """What clients have brought about on a Hub."""

    repositories: dict[tuple[str, str], Repository]
    folder: Path | None
    """A copy of the stored objects; None: none."""


class Hub:
    """A Hub on 127.0.0.1, with a folder of its own; a context manager.

    Args:
        root: folder for objects and for the clients' home (`env`).
        xet: whether large files go through xet (else Git LFS).
        quota: bytes that a repository may store.
        chunk_size: size from which LFS uploads go in parts.
        port: 0 for any.
    """

    def __init__(
        self, root: Path, *, xet: bool = False, quota: int | None = None, chunk_size: int | None = None, port: int = 0
    ) -> None:
        self.root, self.xet, self.quota = root.resolve(), xet, quota
        self.chunk_size = chunk_size
        self.lock, self.busy = threading.RLock(), 0
        self.crashes: list[Exception] = []
        self._states = 0
        self.restore(State({}, None))
        handler = type("HubHandler", (Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        # The client follows redirects within a host and would miss X-Repo-Commit: downloads go to another name.
        self.download_url = f"http://localhost:{port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        if self.crashes and error is None:
            raise self.crashes[0]

    # What tests ask.

    def env(self, token: str | None = WRITER, home: Path | None = None) -> dict[str, str]:
        """The environment of a client in a process of its own: this Hub, this token, a home of its own, no proxy."""
        dropped = ("HF_", "HUGGING", "MECHMERGE_HF")
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(dropped) and "proxy" not in name.lower()
        }
        ours = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home or self.root / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_XET": "0" if self.xet else "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            "NO_PROXY": "127.0.0.1,localhost",
        }
        return kept | ours | ({"HF_TOKEN": token} if token else {})

    def commits(self, repo: str, revision: str = "main", kind: str = "models") -> list[Commit]:
        """Commits of a revision, newest first."""
        with self.lock:
            return list(self.repositories[kind, repo].history(revision))

    def files(self, repo: str, revision: str = "main", kind: str = "models") -> dict[str, str]:
        """Path → SHA-256 of the files of a revision, without `.gitattributes`."""
        tree = self.commits(repo, revision, kind)[0].tree
        return {path: file.sha256 for path, file in sorted(tree.items()) if path != ".gitattributes"}

    def read(self, repo: str, path: str, revision: str = "main", kind: str = "models") -> bytes:
        """The content of a regular file."""
        data = self.commits(repo, revision, kind)[0].tree[path].data
        assert data is not None, f"{path} is a large file"
        return data

    def received(self, sha256: str, repo: str | None = None) -> int:
        """Bytes of an LFS object that arrived, cut uploads included."""
        return self.objects.received(sha256, repo)

    def stored_bytes(self, repo: str) -> int:
        """Bytes that a repository's large objects take on the server."""
        return self.objects.stored_bytes(repo) + self.xet_store.stored_bytes(repo)

    def requests(self) -> list[Entry]:
        """Requests since `count_anew`."""
        return self.log[self.counted_from :]

    def state(self) -> State:
        """All that clients have brought about, to come back to with `restore`."""
        with self.lock:
            folder = self.root / f"kept-{self._states}-{len(self.log)}"
            shutil.copytree(self.folder, folder)
            return State({key: repository.copy() for key, repository in self.repositories.items()}, folder)

    def restore(self, state: State) -> None:
        """Goes back to a state, in a folder of its own; log, faults and accounts are new. No client may be at work."""
        with self.lock:
            self._states += 1
            self.folder = self.root / f"store-{self._states}"
            if state.folder is None:
                self.folder.mkdir(parents=True)
            else:
                shutil.copytree(state.folder, self.folder)
            self.repositories = {key: repository.copy() for key, repository in state.repositories.items()}
            self.objects = ObjectStore(self.folder / "lfs", chunk_size=self.chunk_size)
            self.xet_store = XetStore(self.folder / "cas")
            self.accounts, self.faults = Accounts(), Faults()
            self.log: list[Entry] = []
            self.counted_from = 0

    def wait_until_idle(self) -> None:
        """Waits until every request that came in is done: those of a client that was killed, too."""
        while self.busy:
            time.sleep(0.005)

    def count_anew(self) -> None:
        """The next request is number 0 for the faults and for `requests`."""
        with self.lock:
            self.counted_from = len(self.log)

    def push(
        self, repo: str, files: dict[str, bytes], author: str = "colleague", kind: str = "models", branch: str = "main"
    ) -> Commit:
        """Someone else's commit on a branch."""
        with self.lock:
            repository = self.repositories[kind, repo]
            tree = repository.resolve(branch).tree | {path: File.regular(data) for path, data in files.items()}
            return repository.commit(branch, tree, f"Add {', '.join(files)}", author=author)

    def push_everywhere(self) -> None:
        """Someone else's note in every repository."""
        for kind, repo in list(self.repositories):
            self.push(repo, {"NOTES.md": b"A note of someone else.\n"}, kind=kind)

    # What routes ask.

    def repository(self, kind: str, repo: str, account: Account | None) -> Repository:
        """The repository, if it is there and the account may see it.

        Raises:
            Refusal: 404 (401 without a token), RepoNotFound.
        """
        found = self.repositories.get((kind, repo))
        if not found or (found.private and not (account and account.may_write(found.namespace))):
            raise Refusal(404 if account else 401, "Repository not found", "RepoNotFound")
        return found

    def check_quota(self, repo: str, more: int = 0) -> None:
        """Refuses what goes beyond the quota, in the Hub's words."""
        if self.quota is not None and self.stored_bytes(repo) + more > self.quota:
            raise Refusal(
                403,
                "Private repository storage limit reached, please upgrade your plan to increase your private storage limit.",
            )
