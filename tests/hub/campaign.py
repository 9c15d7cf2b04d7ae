"""Publishing under every fault: what main may hold after one, and that a second run finishes without sending anything twice.

A case is one publication, struck by one fault at one request, and a second publication without any. What must hold:

- after the first, main is the commit that it was before, or one commit further with everything of the new state (and nothing
  else), as the real client downloads it; where it ended with 0 it is the new one, and it never ended by a bug (exit code 1);
- after the second, main is the new state, by one commit of ours, on top of what anyone else has pushed; no staging is left;
- no large object was sent again after its sender had been told that it is stored (LFS: counted by request on the server), and
  the store holds as many bytes as after an undisturbed publication, no chunk twice (LFS and xet).

What a cut upload had sent before it broke may be sent again: nobody was told that it is stored, and it is not. Small files
travel inside commits, base64-encoded, and are no objects of the store.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.hub.accounts import TOKENS
from tests.hub.faults import KINDS, Kind
from tests.hub.runner import PUBLISHER, Done, Runner
from tests.hub.server import Hub, State

REPO = "writer/merge"
NOTE = {"NOTES.md": b"A note of someone else.\n"}
LEFTOVER = {"mechmerge/leftover.yaml": b"older: true\n"}
"""What only the older state holds, and the new one must remove."""
DOWNLOAD = """
import hashlib, json, sys, tempfile
from pathlib import Path
from huggingface_hub import snapshot_download
with tempfile.TemporaryDirectory() as cache:
    root = Path(snapshot_download(sys.argv[1], revision=sys.argv[2], cache_dir=cache))
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

    def __str__(self) -> str:
        mode, repository = "xet" if self.xet else "lfs", "new" if self.first else "older"
        return f"{mode}, {repository} repository: {self.kind} at request {self.index} ({self.request})"


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
    old: dict[str, str]
    """Path → SHA-256 of main before; empty where there is no repository."""
    new: dict[str, str]
    """Path → SHA-256 of main after an undisturbed publication."""
    stored: int
    """Bytes that the store then holds."""
    requests: Sequence[tuple[str, int]]
    """Its requests in order (method and path, bytes of the body)."""


def publish(runner: Runner, arguments: Sequence[str]) -> Done:
    """Runs `mechmerge publish`; the arguments are its source and its options."""
    return runner.mechmerge("publish", arguments[0], REPO, *arguments[1:], "--quiet")


class Campaign:
    """A Hub and its clients, in one mode; a context manager.

    Args:
        root: folder for the Hub and for output.
        old: what the older repository holds: arguments of `mechmerge publish`, the repository left out.
        new: what is published.
        xet: the mode.
        imports: what the process that forks the clients imports before.
    """

    def __init__(
        self, root: Path, old: Sequence[str], new: Sequence[str], *, xet: bool, imports: Sequence[str] = PUBLISHER
    ) -> None:
        self.hub = Hub(root / "hub", xet=xet)
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
                self._must_work(self.publish(self.old))
                self.hub.push(REPO, LEFTOVER, author="writer")
            state, old = self.hub.state(), {} if first else self.download("main")
            self.hub.restore(state)
            self._must_work(self.publish(self.new))
            requests = [(f"{entry.method} {entry.path}", entry.length) for entry in self.hub.requests()]
            new, stored = self.download("main"), self.hub.stored_bytes(REPO)
            assert new != old
            self._starts[first] = Start(state, old, new, stored, requests)
        return self._starts[first]

    def cases(self, kinds: Sequence[Kind] = KINDS) -> Iterator[Case]:
        """Every kind at every request of both publications; half a body only where there is one."""
        for first in (True, False):
            for index, (request, length) in enumerate(self.start(first).requests):
                for kind in kinds:
                    if kind != "half" or length:
                        yield Case(self.hub.xet, first, kind, index, request)

    def publish(self, arguments: Sequence[str]) -> Done:
        return publish(self.runner, arguments)

    def download(self, revision: str) -> dict[str, str]:
        """Path → SHA-256 of a revision, downloaded by the real client."""
        done = self.runner.python(DOWNLOAD, REPO, revision)
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

    def _act(self, kind: Kind) -> Callable[[], None] | None:
        return {"kill": self.runner.kill, "push": self._push}.get(kind)

    def _push(self) -> None:
        if ("models", REPO) in self.hub.repositories:
            self.hub.push(REPO, NOTE)

    def _must_work(self, done: Done) -> None:
        if done.code:
            raise RuntimeError(f"publishing undisturbed failed with {done.code}: {done.err}")

    def main(self) -> dict[str, str] | None:
        """The files of main as a client downloads them, without someone else's note; None without a repository."""
        if ("models", REPO) not in self.hub.repositories:
            return None
        found = self.download(self.hub.commits(REPO)[0].sha)
        return {path: sha for path, sha in found.items() if path not in NOTE}

    def _check_first(self, start: Start, done: Done) -> list[str]:
        problems = [f"the struck run ended by a bug: {done.err[-400:]}"] if done.code == 1 or "Traceback" in done.err else []
        problems += ["a token was printed"] if any(token in done.out + done.err for token in TOKENS) else []
        main = self.main()
        if main is None:
            return problems + (["it said 0 and made no repository"] if done.code == 0 else [])
        if main not in (start.old, start.new):
            problems.append(f"main is neither the old nor the new state: {_difference(main, start.new)}")
        if done.code == 0 and main != start.new:
            problems.append("it ended with 0, but main is not the new state")
        return problems + self._check_history(start, at_most=1)

    def _check_history(self, start: Start, at_most: int) -> list[str]:
        """Main grew by commits only: the old head is below, and at most so many are ours."""
        before = next(iter(start.state.repositories.values())).heads["main"] if start.state.repositories else None
        commits = self.hub.commits(REPO)
        shas = [commit.sha for commit in commits]
        if before is not None and before not in shas:
            return ["main lost its old commit"]
        ours = [commit for commit in commits[: shas.index(before) if before else -1] if commit.author == "writer"]
        return [f"{len(ours)} commits of ours on main: {[commit.title for commit in ours]}"] if len(ours) > at_most else []

    def check_second(self, start: Start, done: Done) -> list[str]:
        if done.code:
            return [f"the second run ended with {done.code}: {done.err[-400:]}"]
        main = self.main() or {}
        problems = [f"after the second run: {_difference(main, start.new)}"] if main != start.new else []
        pushed = any(commit.author == "colleague" for commit in self.hub.commits(REPO))
        if pushed and not NOTE.keys() <= self.hub.files(REPO).keys():
            problems.append("someone else's file is gone")
        repository = self.hub.repositories["models", REPO]
        if repository.heads.keys() != {"main"}:
            problems.append(f"left over: {sorted(repository.heads.keys() - {'main'})}")
        return problems + self._check_history(start, at_most=1)

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
