"""A command struck by a fault, and the same command again: what must hold after each.

After the first call, whatever became of it:
- it ended by the signal that was sent, with 130 after Ctrl-C, with 0, or with one line of an error of ours that is no bug;
- every file under a final name is, byte for byte, the one that an undisturbed call leaves; there may be fewer.
After the second: it ends as an undisturbed call does, and leaves the same files with the same bytes in the output folder, in
the cache and in the folder for temporary files: nothing lacks, and nothing is left over, hidden files included.

Times are outside of every comparison: `timings.jsonl`, and the cache's digests, which are kept by the times of files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.faults.project import Command, Project
from tests.faults.strike import STRIKE, Kind
from tests.hub.runner import Done, Runner

IMPORTS = (
    "mechmerge.localize.stage", "mechmerge.localize.effects", "mechmerge.merge.method", "mechmerge.merge.engine",
    "mechmerge.evaluate.run", "mechmerge.pipeline.run", "mechmerge.report.html", "mechmerge.publish.card", "peft",
    "transformers.models.llama.modeling_llama", "matplotlib.backends.backend_agg", "mergekit.merge", "mergekit.plan",
)  # fmt: skip
"""What the process that forks the commands imports before: each takes long, none starts a thread."""
TIMES = "timings.jsonl"
ONE_LINE = (2, 4)
"""Exit codes with which a command may answer a fault of the machine: never 1, a bug."""


@dataclass
class Verdict:
    """What came out of a case; `problems` is empty where all is well."""

    case: str
    code: int
    """Exit code of the struck call; negative: the signal that ended it."""
    said: str
    """Its last line on stderr."""
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Whole:
    """What an undisturbed call does."""

    files: Mapping[str, str]
    """Path → sha256, of everything that it leaves."""
    code: int
    moments: Mapping[str, int]
    """How often it touches the disk: `write`, `read`."""


def tree(root: Path) -> dict[str, str]:
    """Path → sha256 of every file beneath a folder but times; empty folders are named with a slash at the end."""
    found = {}
    for folder, folders, files in os.walk(root):
        here = Path(folder).relative_to(root)
        if str(here) == "cache":
            folders[:] = [name for name in folders if name != "digests"]
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                found[str(here / name)] = hashlib.sha256((Path(folder) / name).read_bytes()).hexdigest()
        if not folders and not files:
            found[f"{here}/"] = ""
    return {path: sha for path, sha in found.items() if Path(path).name != TIMES}


def is_final(path: str) -> bool:
    """Whether a file stands under a final name: no part of it is hidden or marked as partial, and it is no lock."""
    return not any(part.startswith(".") or ".partial" in part or part.endswith(".lock") for part in Path(path).parts)


class Campaign:
    """A project, and a process that forks its commands; a context manager.

    Args:
        root: a new folder for everything.
        project: what commands work on (made beneath `root` when None).
    """

    def __init__(self, root: Path, project: Project | None = None) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.root = root
        self.work = root / "work"
        """Output, cache and temporary files of the commands."""
        self.out, self.cache, self.temporary = (self.work / name for name in ("out", "cache", "tmp"))
        self.project = project or Project.make(root / "project")
        self._whole: dict[Command, Whole] = {}
        self._seconds: dict[Command, float] = {}
        self._fresh()
        self.environment = os.environ | {
            "MECHMERGE_CACHE": str(self.cache), "TMPDIR": str(self.temporary), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false", "MPLCONFIGDIR": str(root / "matplotlib"),
        }  # fmt: skip
        self.environment.pop("MECHMERGE_DEBUG", None)
        self.runner = Runner(self.environment, root / "output", IMPORTS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.runner.__exit__(kind, error, trace)

    def _fresh(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        for folder in (self.out, self.cache, self.temporary):
            folder.mkdir(parents=True)

    # ------------------------------------------------------------------------------------------------------------- calling
    def call(
        self, command: Command, kind: Kind = "none", at: int = 0, count: bool = False, runner: Runner | None = None
    ) -> Done:
        """Runs a command, struck by a fault at its `at`-th moment."""
        self.start(command, kind, at, count, runner)
        return (runner or self.runner).wait()

    def start(
        self, command: Command, kind: Kind = "none", at: int = 0, count: bool = False, runner: Runner | None = None
    ) -> None:
        """The same without waiting for its end."""
        roots = [str(self.work), str(self.project.root)]
        # Whether a digest is kept depends on the clock (models/digests.py), so that is no moment to be counted.
        besides = [str(self.cache / "digests")]
        fault = {"kind": kind, "at": at, "roots": roots, "besides": besides, "count": str(self._count) if count else None}
        arguments = self.project.arguments(command, self.out)
        (runner or self.runner).start("python", [STRIKE, json.dumps(fault), *arguments])

    @property
    def _count(self) -> Path:
        return self.root / "moments"

    def whole(self, command: Command) -> Whole:
        """What the command does undisturbed, found out once."""
        if command not in self._whole:
            self._fresh()
            done = self.call(command, count=True)
            if done.code != 0:
                raise RuntimeError(f"{command} undisturbed ended with {done.code}: {done.err[-800:]}")
            self._whole[command] = Whole(tree(self.work), done.code, json.loads(self._count.read_text()))
        return self._whole[command]

    def seconds(self, command: Command) -> float:
        """How long it takes undisturbed, measured once."""
        if command not in self._seconds:
            self._fresh()
            start = time.monotonic()
            self.call(command)
            self._seconds[command] = time.monotonic() - start
        return self._seconds[command]

    # --------------------------------------------------------------------------------------------------------------- cases
    def struck(self, command: Command, kind: Kind, at: int) -> Verdict:
        """A fault at a moment that is counted."""
        self.whole(command)
        self._fresh()
        return self._judge(command, f"{command}: {kind} at {at}", self.call(command, kind, at))

    def by_clock(self, command: Command, number: signal.Signals, share: float) -> Verdict:
        """A signal after a share of the time that the command takes undisturbed."""
        self.whole(command)
        seconds = self.seconds(command) * share
        self._fresh()
        self.start(command)
        timer = threading.Timer(seconds, lambda: self.runner.kill(number))
        timer.start()
        done = self.runner.wait()
        timer.cancel()
        return self._judge(command, f"{command}: {number.name} after {seconds:.2f} s", done)

    def small_disk(self, command: Command, size: int) -> Verdict:
        """The command's whole output on a file system of so many bytes; then there is room again (needs the right to mount)."""
        self.whole(command)
        self._fresh()
        with tmpfs(self.work, size):
            for folder in (self.out, self.cache, self.temporary):
                folder.mkdir()
            done = self.call(command)
            kept = self.root / "kept"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(self.work, kept, symlinks=True)
        shutil.rmtree(self.work)
        shutil.move(kept, self.work)
        return self._judge(command, f"{command}: a disk of {size} bytes", done)

    def changed(self, command: Command, at: int, change: Callable[[Path], None]) -> Verdict:
        """A model's weights are changed by `change` while the command stands at a moment, and put back after it has ended."""
        self.whole(command)
        self._fresh()
        shard = self.project.root / "models" / "a" / "model.safetensors"
        status, content = shard.stat(), shard.read_bytes()
        try:
            with self.paused(command, at):
                change(shard)
            done = self.runner.wait()
        finally:
            shard.write_bytes(content)
            os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
        name = getattr(change, "__name__", "change")
        # Where the other weights were found is remembered, by their digest, and rightly so.
        return self._judge(
            command, f"{command}: weights {name} at {at}", done, signals=(signal.SIGBUS,), besides="cache/known/"
        )

    @contextlib.contextmanager
    def paused(self, command: Command, at: int) -> Iterator[None]:
        """The command stands still at a moment until the block ends; it still has to be waited for."""
        self.start(command, "pause", at)
        state = Path(f"/proc/{self.runner.child}/stat")
        while state.exists() and state.read_text().rpartition(")")[2].split()[0] not in ("T", "Z"):
            time.sleep(0.01)
        try:
            yield
        finally:
            self.runner.kill(signal.SIGCONT)

    def beside(self, command: Command, at: int, other: Runner) -> tuple[Done, Verdict]:
        """A second call of the same command while the first stands at a moment: how the second ended, and what of the first."""
        self.whole(command)
        self._fresh()
        with self.paused(command, at):
            second = self.call(command, runner=other)
        return second, self._judge(command, f"{command}: another one at {at}", self.runner.wait())

    # ------------------------------------------------------------------------------------------------------------- judging
    def _judge(
        self, command: Command, case: str, done: Done, signals: tuple[int, ...] = (), besides: str | None = None
    ) -> Verdict:
        """Says what is wrong with how a command ended, and calls it again.

        Args:
            command: the command.
            case: what was done to it.
            done: how it ended.
            signals: that may have ended it beside SIGKILL.
            besides: beginning of paths that may be there although the reference lacks them.
        """
        whole = self.whole(command)

        def left() -> dict[str, str]:
            there = tree(self.work)
            return {p: sha for p, sha in there.items() if p in whole.files or besides is None or not p.startswith(besides)}

        lines = [line for line in done.err.splitlines() if line.strip()]
        verdict = Verdict(case, done.code, lines[-1] if lines else "")
        problems = verdict.problems
        if done.code not in (whole.code, 130, *ONE_LINE, -signal.SIGKILL, *(-s for s in signals)):
            problems.append(f"it ended with {done.code}: {done.err[-300:]}")
        elif done.code > 0 and done.code != whole.code and (len(lines) != 1 or not lines[0].startswith("mechmerge: ")):
            problems.append(f"it said more or less than one line: {done.err[-600:]}")
        elif done.code < 0 and lines:
            problems.append(f"it was killed and said: {done.err[-300:]}")
        after = left()
        odd = sorted(path for path, sha in after.items() if is_final(path) and whole.files.get(path) != sha)
        odd = [path for path in odd if not path.endswith("/")]
        if odd:
            problems.append(f"half or other under a final name: {odd}")
        if done.code == whole.code and after != whole.files:
            problems.append(f"it ended with {done.code}, but: {difference(after, whole.files)}")
        again = self.call(command)
        if again.code != whole.code:
            problems.append(f"the second call ended with {again.code}: {again.err[-300:]}")
        elif (found := left()) != whole.files:
            problems.append(f"after the second call: {difference(found, whole.files)}")
        return verdict


def difference(found: Mapping[str, str], expected: Mapping[str, str]) -> str:
    """What one tree has and another has not."""
    more, other = sorted(found.keys() - expected.keys()), sorted(p for p in found if expected.get(p, found[p]) != found[p])
    return f"left over {more}, lacking {sorted(expected.keys() - found.keys())}, other {other}"


def replaced(shard: Path) -> None:
    """Other weights are moved into the place of the file, as tools that write atomically do."""
    other = shard.with_name("other")
    other.write_bytes(_other(shard))
    os.replace(other, shard)


def rewritten(shard: Path) -> None:
    """The file is written over in place, as long as it was."""
    shard.write_bytes(_other(shard))


def cut(shard: Path) -> None:
    """The file loses its second half. Who reads what is mapped of it gets SIGBUS: no Python code can answer that."""
    os.truncate(shard, shard.stat().st_size // 2)


CHANGES = (replaced, rewritten, cut)


def _other(shard: Path) -> bytes:
    """The file with other values in its last quarter."""
    content = bytearray(shard.read_bytes())
    start = len(content) * 3 // 4 // 4 * 4
    content[start:] = bytes(len(content) - start)
    return bytes(content)


def moments(count: int, number: int, seed: int) -> list[int]:
    """So many moments of 1 … count, each drawn from its own part of them."""
    draw = random.Random(seed)
    edges = [round(count * i / number) for i in range(number + 1)]
    return [draw.randint(low + 1, max(high, low + 1)) for low, high in pairwise(edges)]


@contextlib.contextmanager
def tmpfs(folder: Path, size: int) -> Iterator[None]:
    """A file system of so many bytes on a folder.

    Raises:
        PermissionError: the system does not let this user mount.
    """
    import subprocess

    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "mechmerge-faults", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PermissionError(done.stderr.strip())
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)
