"""Publishing under every fault: what main may hold after one, and that a second run finishes without sending anything twice.

A case is one publication, struck by one fault at one request, and a second publication without any. What must hold:

- after the first, main is the commit that it was before, or one commit further with everything of the new state (and nothing
  else), as the real client downloads it; where it ended with 0 it is the new one, and it never ended by a bug (exit code 1);
- after the second, main is the new state, by one commit of ours, on top of what anyone else has pushed; no staging is left;
- where something else than main is published onto (`ways.py`), that is the old or the new state and main is as it was: a
  branch by one commit, too; a pull request may grow while it is a draft, and there is one, open and whole, in the end;
- no large object was sent again after its sender had been told that it is stored (LFS: counted by request on the server), and
  the store holds as many bytes as after an undisturbed publication, no chunk twice (LFS and xet).

What a cut upload had sent before it broke may be sent again: nobody was told that it is stored, and it is not. Small files
travel inside commits, base64-encoded, and are no objects of the store.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from tests.hub.accounts import TOKENS
from tests.hub.faults import KINDS, Kind
from tests.hub.runner import PUBLISHER, Done, Runner
from tests.hub.server import Hub, State
from tests.hub.store import Commit, Repository
from tests.hub.ways import MAIN, Name, Way

REPO = "writer/merge"
NOTE = {"NOTES.md": b"A note of someone else.\n"}
LEFTOVER = {"models": {"mechmerge/leftover.yaml": b"older: true\n"}, "datasets": {"scores/old/leftover.safetensors": b"older"}}
"""What only the older state holds, and the new one must remove, by kind of repository."""
DOWNLOAD = """
import hashlib, json, sys, tempfile
from pathlib import Path
from huggingface_hub import snapshot_download
with tempfile.TemporaryDirectory() as cache:
    kind, repo, revision = sys.argv[1:]
    root = Path(snapshot_download(repo, repo_type=kind.removesuffix("s"), revision=revision, cache_dir=cache))
    files = [path for path in root.rglob("*") if path.is_file() and path.name != ".gitattributes"]
    found = {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Case:
    """One fault at one request of one publication."""

    xet: bool
    first: bool
    """Whether the repository is not there yet (else it holds an older state)."""
    kind: Kind
    index: int
    request: str
    """The request that stands at this index of an undisturbed publication."""
    way: Name = "main"

    def __str__(self) -> str:
        mode, repository = "xet" if self.xet else "lfs", "new" if self.first else "older"
        return f"{self.way}, {mode}, {repository} repository: {self.kind} at request {self.index} ({self.request})"


@dataclass
class Verdict:
    """What came out of a case; every list is empty where all is well."""

    case: Case
    main_broken: list[str] = field(default_factory=list)
    rerun_failed: list[str] = field(default_factory=list)
    sent_twice: list[str] = field(default_factory=list)
    struck: bool = False
    """Whether the fault struck a request."""
    code: int = 0
    """Exit code of the struck publication."""

    @property
    def problems(self) -> list[str]:
        return [*self.main_broken, *self.rerun_failed, *self.sent_twice]


@dataclass(frozen=True)
class Start:
    """Where a case starts from, and what it must come to."""

    state: State
    main: dict[str, str]
    """Path → SHA-256 of main before; empty where there is no repository."""
    old: dict[str, str]
    """The same of what is published onto, before; that of main where it is not there."""
    new: dict[str, str]
    """The same after an undisturbed publication."""
    stored: int
    """Bytes that the store then holds."""
    requests: Sequence[tuple[str, int]]
    """Its requests in order (method and path, bytes of the body)."""


def publish(runner: Runner, arguments: Sequence[str], way: Way = MAIN) -> Done:
    """Publishes; the arguments are the command's source and its options."""
    return runner.mechmerge(way.command, arguments[0], REPO, *arguments[1:], *way.options, "--quiet")


class Campaign:
    """A Hub and its clients, in one mode; a context manager.

    Args:
        root: folder for the Hub and for output.
        old: what the older repository holds: arguments of `mechmerge publish`, the repository left out.
        new: what is published.
        xet: the mode.
        way: how it is published.
        imports: what the process that forks the clients imports before.
    """

    def __init__(
        self,
        root: Path,
        old: Sequence[str],
        new: Sequence[str],
        *,
        xet: bool,
        way: Way = MAIN,
        imports: Sequence[str] = PUBLISHER,
    ) -> None:
        self.hub, self.way = Hub(root / "hub", xet=xet), way
        self.runner = Runner(self.hub.env(), root / "output", imports)
        self.old, self.new = list(old), list(new)
        self._starts: dict[bool, Start] = {}

    def __enter__(self) -> Self:
        self.hub.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.runner.__exit__(kind, error, trace)
        self.hub.__exit__(kind, error, trace)

    def start(self, first: bool) -> Start:
        """Publishes undisturbed, once for all cases."""
        if first not in self._starts:
            self.hub.restore(State({}, None))
            if not first:
                # A pull request starts from what stands on main.
                self._must_work(publish(self.runner, self.old) if self.way.name == "pr" else self.publish(self.old))
                self._push(LEFTOVER[self.way.kind], "writer")
            state, main = self.hub.state(), {} if first else self.download("main")
            old = self.published() or main
            self.hub.restore(state)
            self._must_work(self.publish(self.new))
            requests = [(f"{entry.method} {entry.path}", entry.length) for entry in self.hub.requests()]
            new, stored = self.published(), self.hub.stored_bytes(REPO)
            assert new is not None
            assert new != old
            self._starts[first] = Start(state, main, old, new, stored, requests)
        return self._starts[first]

    def cases(self, *, dealt: bool = False) -> Iterator[Case]:
        """Every kind at every request of both publications, or one at each, dealt out in turn (`half` needs a body)."""
        turn = len(KINDS) // 2 * self.hub.xet
        for first in (True, False):
            for index, (request, length) in enumerate(self.start(first).requests):
                fitting = [kind for kind in KINDS if kind != "half" or length]
                turn += 1
                for kind in [fitting[turn % len(fitting)]] if dealt else fitting:
                    yield Case(self.hub.xet, first, kind, index, request, self.way.name)

    def publish(self, arguments: Sequence[str]) -> Done:
        return publish(self.runner, arguments, self.way)

    def download(self, revision: str) -> dict[str, str]:
        """Path → SHA-256 of a revision, downloaded by the real client."""
        done = self.runner.python(DOWNLOAD, self.way.kind, REPO, revision)
        assert done.code == 0, done.err
        found: dict[str, str] = json.loads(done.out)
        return found

    def run(self, case: Case) -> Verdict:
        """Carries out a case."""
        start, hub, verdict = self.start(case.first), self.hub, Verdict(case)
        hub.restore(start.state)
        fault = hub.faults.add(case.kind, index=case.index, seconds=0.2 if case.kind == "slow" else 0, act=self._act(case.kind))
        done = self.publish(self.new)
        hub.wait_until_idle()
        verdict.struck, verdict.code = fault.struck > 0, done.code
        hub.accounts.renew()
        hub.faults.clear()
        verdict.main_broken = self._check_first(start, done)
        again = self.publish(self.new)
        verdict.rerun_failed = self.check_second(start, again)
        verdict.sent_twice = self.check_store(start)
        return verdict

    def struck_after(self, seconds: float, number: signal.Signals, *, first: bool) -> tuple[int, list[str]]:
        """Sends a signal to a publication after so many seconds, and publishes again: its exit code, and what is not right.

        The xet store's index (redb) is a part of the stand-in that lives in the process of its client: where the signal tore
        it, which no real store's index would suffer, the signal is sent a little earlier instead.
        """
        start, hub = self.start(first), self.hub
        hub.restore(start.state)
        timer = threading.Timer(seconds, lambda: self.runner.kill(number))
        timer.start()
        done = self.publish(self.new)
        timer.cancel()
        hub.wait_until_idle()
        problems = [f"it ended with {done.code}: {done.err[-300:]}"] if done.code not in (0, 130, -signal.SIGKILL) else []
        problems += self._check_first(start, done)
        second = self.publish(self.new)
        if done.code == -signal.SIGKILL and second.code and "redb database" in second.err:
            return self.struck_after(0.9 * seconds, number, first=first)
        return done.code, problems + self.check_second(start, second) + self.check_store(start)

    def _act(self, kind: Kind) -> Callable[[], None] | None:
        return {"kill": self.runner.kill, "push": self._push}.get(kind)

    def _push(self, files: Mapping[str, bytes] = MappingProxyType(NOTE), author: str = "colleague") -> None:
        """A commit of someone else on the branch that is published onto, or on main where there is none."""
        repository = self.repository
        if repository is not None:
            branch = self.way.revision if self.way.revision in repository.heads else "main"
            self.hub.push(REPO, dict(files), author=author, kind=self.way.kind, branch=branch)

    def _must_work(self, done: Done) -> None:
        if done.code:
            raise RuntimeError(f"publishing undisturbed failed with {done.code}: {done.err}")

    @property
    def repository(self) -> Repository | None:
        return self.hub.repositories.get((self.way.kind, REPO))

    def commits(self, revision: str) -> list[Commit]:
        return self.hub.commits(REPO, revision, self.way.kind)

    def main(self) -> dict[str, str] | None:
        """The files of main as a client downloads them, without someone else's note; None without a repository."""
        return self._files("main")

    def published(self) -> dict[str, str] | None:
        """The same of what is published onto; None where it is not there. Of a draft nobody says that it is whole."""
        repository = self.repository
        if repository is None or (self.way.name == "pr" and [p.status for p in repository.pull_requests.values()] != ["open"]):
            return None
        return self._files(self.way.revision) if self.way.name == "pr" or self.way.revision in repository.heads else None

    def _files(self, revision: str) -> dict[str, str] | None:
        if self.repository is None:
            return None
        found = self.download(self.commits(revision)[0].sha)
        return {path: sha for path, sha in found.items() if path not in NOTE}

    def _check_first(self, start: Start, done: Done) -> list[str]:
        problems = [f"the struck run ended by a bug: {done.err[-400:]}"] if done.code == 1 or "Traceback" in done.err else []
        problems += ["a token was printed"] if any(token in done.out + done.err for token in TOKENS) else []
        found = self.published()
        if found is None:
            problems += ["it said 0 and published nothing"] if done.code == 0 else []
        elif found not in (start.old, start.new):
            problems.append(f"it is neither the old nor the new state: {_difference(found, start.new)}")
        elif done.code == 0 and found != start.new:
            problems.append("it ended with 0, but this is not the new state")
        return problems + self._check_main(start) + self._check_history(start)

    def _check_main(self, start: Start) -> list[str]:
        """Main is as it was where something else is published onto."""
        if self.way.lands_on_main or self.repository is None:
            return []
        ours = [commit.title for commit in self._since(start, "main") if commit.author == "writer"]
        problems = [f"commits of ours on main: {ours}"] if ours else []
        main = self.main() or {}
        return problems + ([f"main was changed: {_difference(main, start.main)}"] if main != start.main else [])

    def _since(self, start: Start, revision: str) -> list[Commit]:
        """Commits of a branch since the start, newest first; the repository's own first one is left out."""
        commits = self.commits(revision)
        repository = start.state.repositories.get((self.way.kind, REPO))
        before = None if repository is None else repository.heads.get(revision, repository.heads["main"])
        shas = [commit.sha for commit in commits]
        return commits[: shas.index(before) if before in shas else -1]

    def _check_history(self, start: Start) -> list[str]:
        """The branch grew by commits only: its old head is below, and at most one of them is ours. A pull request may grow."""
        repository, revision = self.repository, self.way.revision
        if repository is None or revision not in repository.heads or self.way.name == "pr":
            return []
        old = start.state.repositories.get((self.way.kind, REPO))
        before = None if old is None else old.heads.get(revision, old.heads["main"])
        if before is not None and before not in [commit.sha for commit in self.commits(revision)]:
            return [f"{revision} lost its old commit"]
        ours = [commit.title for commit in self._since(start, revision) if commit.author == "writer"]
        return [f"{len(ours)} commits of ours on {revision}: {ours}"] if len(ours) > 1 else []

    def check_second(self, start: Start, done: Done) -> list[str]:
        if done.code:
            return [f"the second run ended with {done.code}: {done.err[-400:]}"]
        repository, found = self.repository, self.published() or {}
        assert repository is not None
        problems = [f"after the second run: {_difference(found, start.new)}"] if found != start.new else []
        branch = self.way.revision if self.way.revision in repository.heads else "main"
        pushed = any(commit.author == "colleague" for commit in self.commits(branch))
        if pushed and not NOTE.keys() <= self.hub.files(REPO, branch, self.way.kind).keys():
            problems.append("someone else's file is gone")
        left = repository.heads.keys() - {"main", self.way.revision}
        problems += [f"left over: {sorted(left)}"] if left else []
        return problems + self._check_main(start) + self._check_history(start)

    def check_store(self, start: Start) -> list[str]:
        problems = [f"sent again though stored: {oid[:12]}" for oid in self.hub.objects.sent_twice(REPO)]
        if (stored := self.hub.stored_bytes(REPO)) != start.stored:
            problems.append(f"the store holds {stored} bytes, after an undisturbed publication {start.stored}")
        if twice := self.hub.xet_store.chunks_stored_twice(REPO):
            problems.append(f"{twice} chunks are stored twice")
        return problems


def _difference(found: dict[str, str], expected: dict[str, str]) -> str:
    """What one state has and another has not."""
    other = sorted(path for path, sha in found.items() if expected.get(path) != sha)
    return f"other or more: {other}; lacking: {sorted(expected.keys() - found.keys())}"
