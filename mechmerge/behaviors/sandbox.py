"""Judging code by running it: an answer's function against tests, in two confined processes of its own.

How an answer is read (conventions of HumanEval, https://arxiv.org/abs/2107.03374, and of EvalPlus' instruction-tuned mode,
https://arxiv.org/abs/2305.01210): its fenced ```python blocks up to the first that defines the function (a later one is an
example of use), else the whole answer. Tests are `assert` lines that call the function by its name or as `candidate`, or
HumanEval's `def check(candidate)`. They exchange plain data with it: numbers, texts, lists, tuples, sets, dicts, iterators;
an argument is a copy, so a change made in place is not seen.

What is protected, and by what (`confine`; Linux on x86_64 or aarch64 has all of it):
- network: a system-call filter (no socket at all), and a network namespace where one may be made;
- files: Landlock (reads Python's library alone, writes its temporary folder alone), else the filter refuses every write, but
  then what the user may read can be read;
- processes: no new process or thread, no signal to others; a process namespace where one may be made;
- resources: CPU time, memory, size of files, a wall clock, and all of it is killed at the end;
- the verdict: `sandbox_child` says how.
Not protected: the kernel itself, and the processor's side channels. Where network, files or processes lie open (macOS, other
processors) nothing is run, unless `MECHMERGE_UNSAFE_EXECUTION=1` is set: then only limits and clock hold.

The same answer gets the same verdict: hashes and `random` are seeded, and the limit is CPU time, not the clock's (that is
four times as long, for answers that sleep). Only the standard library can be imported.
"""

from __future__ import annotations

import contextlib
import json
import keyword
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mechmerge.errors import InputError, MechmergeError, MissingError

UNSAFE = "MECHMERGE_UNSAFE_EXECUTION"
"""Environment variable: `1` runs code on machines that cannot confine it."""
SECONDS, MEMORY_MB = 10.0, 512
"""Default limits of one answer: CPU seconds, and MiB of address space of each of the two processes."""
_FENCE = re.compile(r"^[ \t]*```[ \t]*(\w*)[^\n`]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_START = """import sys
sys.path.insert(0, sys.argv.pop())
from mechmerge.behaviors.sandbox_child import main
del sys.path[0]
main()"""


class Outcome(NamedTuple):
    """What came out of running an answer."""

    passed: bool
    """Whether all tests hold."""
    reason: str
    """Why not, in one line; empty where they do."""


def extract(answer: str, entry: str) -> str:
    """The code of an answer: its Python blocks up to the first that defines `entry`, else the whole answer.

    A block without a language counts as Python unless another block says that it is; an unclosed one ends with the answer.
    """
    blocks = [(match[1].lower(), match[2]) for match in _FENCE.finditer(answer)]
    tagged = [text for language, text in blocks if language in ("python", "py", "python3")]
    candidates = tagged or [text for language, text in blocks if not language]
    defines = re.compile(
        rf"^(?:(?:async\s+)?def\s+{re.escape(entry)}\b|{re.escape(entry)}\s*=|class\s+{re.escape(entry)}\b)", re.M
    )
    for number, text in enumerate(candidates):
        if defines.search(text):
            return "\n".join(candidates[: number + 1])
    return "\n".join(candidates) or answer


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """The verifier's arguments are right: `entry` is a name, and `tests` compile.

    Raises:
        InputError: they are not.
    """
    entry, tests = arguments.get("entry"), arguments.get("tests")
    if not isinstance(entry, str) or not entry.isidentifier() or keyword.iskeyword(entry):
        raise InputError("verifier python", expected="a function's name as entry", found=repr(entry))
    if not isinstance(tests, str) or not tests.strip():
        raise InputError("verifier python", expected="tests (Python that asserts)", found=repr(tests))
    try:
        compile(tests, "tests", "exec")
    except (SyntaxError, ValueError) as error:
        raise InputError("verifier python", expected="tests that compile", found=str(error)) from None


def judge(answer: str, arguments: Mapping[str, Any]) -> bool:
    """Whether the code of an answer passes.

    Args:
        answer: what a model said.
        arguments: `tests`: Python that asserts; `entry`: the function's name; on wish `seconds` and `memory_mb`.

    Raises:
        InputError: a wrong argument.
        MissingError: this machine cannot confine code.
    """
    check_arguments(arguments)
    entry = arguments["entry"]
    limits = {name: arguments[name] for name in ("seconds", "memory_mb") if name in arguments}
    return run_code(extract(answer, entry), arguments["tests"], entry, **limits).passed


def run_code(
    code: str, tests: str, entry: str, *, seconds: float = SECONDS, memory_mb: int = MEMORY_MB, clock: float | None = None
) -> Outcome:
    """Runs code, then tests of its function `entry`; nothing of it is left afterwards.

    Args:
        code: Python source, not trusted.
        tests: Python that asserts; `entry` and `candidate` are the function.
        entry: the function's name.
        seconds: most CPU time, of the code and of the tests each; rounded up to whole seconds.
        memory_mb: most address space of each process, MiB (Python alone takes about 30).
        clock: most seconds by the clock; by default four times `seconds`, plus five.

    Raises:
        MissingError: this machine cannot confine code, and `MECHMERGE_UNSAFE_EXECUTION` is not 1.
        MechmergeError: the sandbox did not start.
    """
    job = json.dumps({"code": code, "tests": tests, "entry": entry})
    with tempfile.TemporaryDirectory(prefix="mechmerge-code-", ignore_cleanup_errors=True) as folder:
        options = [str(math.ceil(seconds)), str(memory_mb << 20), folder, "unsafe" if unsafe_allowed() else "safe"]
        root = str(Path(__file__).parent.parent.parent)
        process = subprocess.Popen(
            [sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", "-c", _START, *options, root],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            # Hashes decide about the order of sets, and so about an answer.
            env={"PYTHONHASHSEED": "0"},
            start_new_session=True,
            text=True,
        )
        try:
            said, trouble = process.communicate(job, timeout=4 * math.ceil(seconds) + 5 if clock is None else clock)
        except subprocess.TimeoutExpired:
            return Outcome(False, "out of time (by the clock)")
        finally:
            _kill(process)
    return _outcome(said.splitlines(), process.returncode, trouble)


def unsafe_allowed() -> bool:
    """Whether the user allowed code to run where it cannot be confined."""
    return os.environ.get(UNSAFE) == "1"


def _kill(process: subprocess.Popen[str]) -> None:
    """Ends a group that still runs (the answer's process also dies with its parent) and waits."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def _outcome(lines: list[str], code: int, trouble: str) -> Outcome:
    if not lines:
        last = (trouble.strip().splitlines() or [f"exit code {code}"])[-1]
        raise MechmergeError("sandbox", expected="its process to start", found=last)
    layers = json.loads(lines[0])
    lacking = [name for name, holds in layers.items() if not holds]
    if len(lines) > 1:
        return Outcome(**json.loads(lines[1]))
    if lacking:
        raise MissingError(
            "sandbox",
            expected="a kernel that confines code (Linux on x86_64 or aarch64)",
            found=f"none for {', '.join(lacking)}",
            fix=f"run it in a container, or set {UNSAFE}=1 to run answers without protection",
        )
    return Outcome(False, "the tests did not end: out of CPU time or memory")
