"""Runs many clients quickly: a process that has imported the heavy packages forks one child a command.

Every child is a process of its own, with the environment that huggingface_hub read at import, its own files for stdout and
stderr, and a number by which it can be killed; what is saved is the second that the imports take.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).parents[2]
CLIENT = ("huggingface_hub.hf_api",)
PUBLISHER = (*CLIENT, "mechmerge.publish.hub", "mechmerge.merge.verify", "transformers.models.llama.modeling_llama")
"""What is imported before the forks; each takes long, none starts a thread."""


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    """Exit code; negative: the signal that ended it."""
    out: str
    err: str


class Runner:
    """A process that forks; a context manager. One command at a time.

    Args:
        env: the environment of all commands (`Hub.env`).
        folder: where the commands' output goes.
        imports: modules to import before the forks (`PUBLISHER` where many publications run).
    """

    def __init__(self, env: Mapping[str, str], folder: Path, imports: Sequence[str] = CLIENT) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub.runner", *imports],
            env=dict(env),
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.child = 0
        """The process of the command that runs."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def mechmerge(self, *arguments: str | Path) -> Done:
        """Runs the command line."""
        return self._run("mechmerge", [str(argument) for argument in arguments])

    def python(self, code: str, *arguments: str | Path) -> Done:
        """Runs a piece of code, which finds its arguments in `sys.argv[1:]`."""
        return self._run("python", [code, *(str(argument) for argument in arguments)])

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """A signal to the command that runs, SIGKILL unless told otherwise."""
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(self.child, number)

    def _run(self, what: str, arguments: Sequence[str]) -> Done:
        self.start(what, arguments)
        return self.wait()

    def start(self, what: str, arguments: Sequence[str]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"what": what, "arguments": arguments, "folder": str(self.folder)}) + "\n")
        self._process.stdin.flush()
        self.child = int(self._answer())

    def wait(self) -> Done:
        code = int(self._answer())
        return Done(code, *((self.folder / name).read_text(errors="replace") for name in ("stdout", "stderr")))

    def _answer(self) -> str:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise RuntimeError("the process that forks has ended")
        return line


def _child(task: dict[str, object]) -> int:
    """In the child: carries out the command and gives its exit code."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{task['folder']}/{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    arguments = list(map(str, task["arguments"]))  # type: ignore[call-overload]
    try:
        if task["what"] == "mechmerge":
            from mechmerge.cli.main import main

            main(arguments)
        else:
            sys.argv = ["-c", *arguments[1:]]
            exec(arguments[0], {"__name__": "__main__"})  # noqa: S102  (a test's own code)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def serve() -> None:
    """Forks a child a line of stdin; answers with its number, then with its exit code."""
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        task = json.loads(line)
        child = os.fork()
        if child == 0:
            code = _child(task)
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            os._exit(code)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
