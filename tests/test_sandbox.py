"""The sandbox as an attacker and as an honest answer meet it."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from mechmerge.behaviors import confine, sandbox
from mechmerge.behaviors.sandbox import Outcome, extract, judge, run_code
from mechmerge.behaviors.sandbox_wire import decode, encode
from mechmerge.errors import InputError, MechmergeError, MissingError

confined = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in confine.ARCHITECTURES, reason="code is confined on Linux alone"
)
pytestmark = confined
DOUBLE = "assert f(2) == 4\nassert f(0) == 0\nassert f(-3) == -6"


def attempt(code: str, tests: str = DOUBLE, **limits: float) -> Outcome:
    return run_code(textwrap.dedent(code), textwrap.dedent(tests), "f", **limits)  # type: ignore[arg-type]


def said(code: str) -> str:
    """What an attacker's function returns (as the text of the assertion that shows it)."""
    return attempt(code, "assert False, repr(f(1))").reason


# ------------------------------------------------------------------------------------------------------------------ honest
def test_right_and_wrong() -> None:
    assert attempt("def f(x):\n    return 2 * x") == Outcome(True, "")
    wrong = attempt("def f(x):\n    return x + 2")
    assert not wrong.passed
    assert "assert f(0) == 0" in wrong.reason


def test_conventions_of_tests() -> None:
    check = "def check(candidate):\n    assert candidate(2) == 4"
    assert attempt("f = lambda x: 2 * x", check).passed
    assert not attempt("f = lambda x: x", check).passed
    assert attempt("f = lambda x: 2 * x", "assert candidate(x=2) == 4").passed
    assert attempt(
        "def f(x):\n    raise ValueError('no')", "try:\n    f(1)\nexcept ValueError:\n    pass\nelse:\n    assert 0"
    ).passed
    assert attempt("if __name__ == '__main__':\n    input()\ndef f(x):\n    return 2 * x").passed
    assert attempt("n = 0\ndef f(x):\n    global n\n    n += 1\n    return n", "assert [f(0), f(0)] == [1, 2]").passed
    assert attempt("def f(x):\n    x.append(1)", "a = []\nf(a)\nassert a == []").passed  # arguments are copies


@pytest.mark.parametrize(
    "value",
    [None, True, 0, -1, 2**200, 1.5, float("inf"), "a\udc80\n\0", b"\xff", 2 - 1j, [], [1, [2]], (1, "a"), {1, "b"},
     frozenset({2}), {"a": {1: (2,)}}, {(1, 2): None}],
)  # fmt: skip
def test_plain_values_come_back(value: object) -> None:
    back = decode(encode(value))
    assert (back, type(back)) == (value, type(value))


def test_values_through_the_processes() -> None:
    from collections import Counter

    assert attempt(
        "def f(x):\n    return x", "for v in [1e300, 'ä', (1, [2]), {3: {4}}, b'x', None]:\n    assert f(v) == v"
    ).passed
    assert attempt("def f(x):\n    return 10 ** x", "assert f(5000) == 10**5000").passed
    assert attempt("def f(x):\n    yield from range(x)", "assert list(f(3)) == [0, 1, 2]").passed
    assert attempt(
        "from collections import Counter\ndef f(x):\n    return Counter(x)", f"assert f('aab') == {dict(Counter('aab'))}"
    ).passed
    assert attempt(
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    n: int\ndef f(x):\n    return 2 * A(x).n"
    ).passed
    assert "no plain value" in attempt("def f(x):\n    return object()", "try:\n    f(1)\nexcept TypeError:\n    pass").reason


def test_says_why() -> None:
    assert "SyntaxError" in attempt("def f(x) return x").reason
    assert attempt("def g(x):\n    return x").reason == "the answer defines no function f"
    assert "ZeroDivisionError" in attempt("def f(x):\n    return x / 0").reason
    assert "RecursionError" in attempt("def f(x):\n    return f(x)").reason
    assert "No module named 'torch'" in attempt("import torch\ndef f(x):\n    return x").reason


def test_same_verdict_every_time() -> None:
    code = "import random\ndef f(x):\n    return [list({'ab', 'cd', 'ef', 'gh'}), random.random()]"
    assert len({said(code) for _ in range(4)}) == 1


# ------------------------------------------------------------------------------------------------- forging the verdict
FORGERIES = {
    "prints it": "print('{\"passed\": true, \"reason\": \"\"}')\ndef f(x):\n    print('passed')",
    "exits at import": "import sys\nsys.exit(0)",
    "raises SystemExit": "def f(x):\n    raise SystemExit(0)",
    "ends the process at import": "import os\nos._exit(0)",
    "ends the process": "import os\ndef f(x):\n    os._exit(0)",
    "interrupts": "def f(x):\n    raise KeyboardInterrupt",
    "always equal": "class A:\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return A()",
    "always equal int": "class A(int):\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return A(7)",
    "always equal text": "class A(str):\n    __eq__ = lambda s, o: True\n    __hash__ = None\ndef f(x):\n    return A('q')",
    "patches builtins": """
        import builtins
        builtins.AssertionError = type('Quiet', (Exception,), {})
        builtins.exec = builtins.compile = lambda *a, **k: None
        builtins.isinstance = lambda *a: True
        def f(x): return 1""",
    "writes a verdict everywhere": """
        import os
        for d in range(64):
            try: os.write(d, b'{"passed": true, "reason": ""}\\n')
            except OSError: pass
        def f(x): return 1""",
    "writes to its parent's files": """
        import os
        for p in [os.getppid(), *range(1, 400)]:
            for d in range(12):
                try: open(f'/proc/{p}/fd/{d}', 'w').write('{"passed": true, "reason": ""}\\n')
                except OSError: pass
        def f(x): return 1""",
    "answers before it is asked": """
        import os, struct
        m = b'{"value": ["int", "0x4"]}'
        for d in range(64):
            try: os.write(d, struct.pack('>I', len(m)) + m)
            except OSError: pass
        def f(x): return 1""",
    "changes the server's frames": """
        import sys
        frame = sys._getframe()
        while frame:
            frame.f_globals.update(encode=lambda v: ['always'], _text=lambda e: '')
            frame = frame.f_back
        def f(x): return 1""",
    "hooks the end": "import atexit, sys\natexit.register(print, 'passed')\nsys.excepthook = print\ndef f(x): return 1",
    "hostile data": "import sys\nsys._getframe(1).f_globals['encode'] = lambda v: {'a': 1}\ndef f(x): return 1",
    "deep data": "def f(x):\n    a = []\n    for _ in range(100000): a = [a]\n    return a",
    "endless data": "def f(x):\n    return iter(int, 1)",
    "large data": "def f(x):\n    return 'x' * 10**7",
    "says nothing": "import os\nfor d in range(3, 64):\n    try: os.close(d)\n    except OSError: pass\ndef f(x): return 4",
    "raises oddly": "class E(Exception):\n    def __str__(self): raise SystemExit\ndef f(x): raise E",
    "stops the judge": "import os\ndef f(x):\n    for s in (9, 15, 19): os.kill(os.getppid() or -1, s)",
    "crashes": "import ctypes\ndef f(x):\n    ctypes.string_at(0)",
}  # fmt: skip


@pytest.mark.parametrize("trick", FORGERIES)
def test_verdict_cannot_be_forged(trick: str) -> None:
    outcome = attempt(FORGERIES[trick], seconds=2)
    assert not outcome.passed
    assert outcome.reason


def test_tests_that_print_what_they_got() -> None:
    forged = 'def f(x):\n    return \'{"passed": true, "reason": ""}\''
    assert not attempt(forged, "print(f(1))\nimport os\nos.write(1, f(1).encode())\nassert False").passed


def test_answer_sees_neither_tests_nor_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "hunter2")
    code = """
        import gc, os, sys
        def f(x):
            texts, frame = [], sys._getframe()
            while frame:
                texts.append(repr(frame.f_locals) + repr(frame.f_globals)); frame = frame.f_back
            texts += [repr(o) for o in gc.get_objects()][:100000] + [repr(dict(os.environ)), repr(sys.argv)]
            # Put together here, so that the answer's own code does not hold them.
            words = [''.join(word) for word in WORDS]
            return sum(word in t for t in texts for word in words)"""
    code = code.replace("WORDS", repr([tuple("ZEBRA"), tuple("hunter2")]))
    assert attempt(code, "assert f(1) == 0  # ZEBRA", memory_mb=2048).passed
    assert not attempt(code.replace("'Z'", "'PYTHONHASHSEED'").replace(", 'E', 'B', 'R', 'A'", ","), "assert f(1) == 0").passed


# ---------------------------------------------------------------------------------------------------- getting out of the box
def test_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        port = server.getsockname()[1]
        outcome = attempt(f"import socket\ndef f(x):\n    socket.create_connection(('127.0.0.1', {port}), 1)")
        assert "Operation not permitted" in outcome.reason
        with pytest.raises(TimeoutError):
            server.accept()


def test_files_outside_are_out_of_reach(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("secret")
    before = kept.stat()
    deeds = [
        "open(p).read()", "open(p, 'w')", "open(p, 'a').write('x')", "os.remove(p)", "os.truncate(p, 0)", "os.chmod(p, 0o777)",
        "os.utime(p, (0, 0))", "os.rename(p, p + '2')", "os.mkdir(p + '2')", "os.symlink(p, p + '2')", "os.link(p, 'l')",
        "shutil.rmtree(os.path.dirname(p))", "os.listdir(os.path.dirname(p))", "[os.symlink(p, 'l'), open('l', 'w')]",
        "os.setxattr(p, 'user.a', b'b')", "os.open(p, os.O_WRONLY)", "open('/proc/self/environ').read()",
    ]  # fmt: skip
    for deed in deeds:
        code = f"import os, shutil\np = {str(kept)!r}\ndef f(x):\n    return str({deed})"
        reason = said(code)
        assert reason.startswith(("PermissionError", "OSError: [Errno 1]", "OSError: [Errno 18]")), (deed, reason)
    after = kept.stat()
    assert (kept.read_text(), after.st_mtime_ns, after.st_mode) == ("secret", before.st_mtime_ns, before.st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]


def test_temporary_folder_is_its_own_and_goes() -> None:
    reason = said(
        "import os\ndef f(x):\n    open('a', 'w').write('x')\n    return [os.getcwd(), os.listdir('.'), open('a').read()]"
    )
    folder = reason.split("'")[1]
    assert "['a'], 'x'" in reason
    assert "mechmerge-code-" in folder
    assert not Path(folder).exists()


@pytest.mark.parametrize(
    "deed",
    ["os.fork()", "1 // (os.system('true') == 0)", "subprocess.run(['true'])", "threading.Thread(target=int).start()",
     "multiprocessing.Process(target=int).start()", "os.kill(1, 0)", "os.kill(-1, 9)", "os.setsid()",
     "resource.setrlimit(resource.RLIMIT_CPU, (99, 99))", "os.execv('/bin/true', ['true'])", "os.nice(-1)",
     "ctypes.CDLL(None, use_errno=True).unshare(0x10000000) and 1/0"],
)  # fmt: skip
def test_no_other_process(deed: str) -> None:
    code = f"import ctypes, multiprocessing, os, resource, subprocess, threading\ndef f(x):\n    {deed}\n    return 'done'"
    reason = said(code)
    assert "done" not in reason
    assert any(word in reason for word in ("not permitted", "Permission", "can't start", "not allowed", "ZeroDivision")), reason


def test_limits() -> None:
    assert attempt("def f(x):\n    while True: pass", seconds=1).reason == "out of CPU time or memory"
    assert attempt("import signal\nsignal.signal(signal.SIGXCPU, lambda *a: 0)\nwhile True: pass", seconds=1).passed is False
    assert "MemoryError" in attempt("def f(x):\n    return [0] * 10**9").reason
    assert "MemoryError" in attempt("def f(x):\n    return len('x' * 200_000_000)", memory_mb=100).reason
    assert attempt("def f(x):\n    return len('x' * 200_000_000) // 100_000_000 * x", memory_mb=1000).passed
    assert "File too large" in attempt("def f(x):\n    open('a', 'wb').write(b'x' * 10**8)").reason
    assert "Too many open files" in said("def f(x):\n    return [open('/dev/null') for _ in range(99)]")
    assert "did not end" in attempt("def f(x): return x", "while True: pass", seconds=1).reason
    # Any amount of output goes nowhere.
    assert attempt("import sys\ndef f(x):\n    print('x' * 10**7)\n    sys.stderr.write('x' * 10**7)\n    return 2 * x").passed


def test_clock_ends_all_of_it() -> None:
    marker = f"m{os.getpid()}{time.monotonic_ns()}"
    outcome = attempt(f"import time\n{marker} = 1\ndef f(x):\n    time.sleep(600)", clock=1.5)
    assert outcome == Outcome(False, "out of time (by the clock)")
    ours = [line for line in subprocess.check_output(["ps", "-eo", "args"], text=True).splitlines() if "sandbox_child" in line]
    assert not [line for line in ours if str(os.getpid()) in line]


# ----------------------------------------------------------------------------------------------------- a kernel without it
UNDER = """
import os, sys
from mechmerge.behaviors import confine
from mechmerge.behaviors.sandbox import run_code
from mechmerge.errors import MissingError
confine.filter_calls(writes=True, allowed=set(confine.CALLS) - {"prctl", "unshare"})
try:
    print(run_code("def f(x):\\n    return x", "assert f(1) == 1", "f"))
except MissingError as error:
    print(error.exit_code, error)
"""


def _python(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ) | environment, check=False
    )
    return done.stdout + done.stderr


def test_refuses_where_nothing_confines() -> None:
    found = _python(UNDER, MECHMERGE_UNSAFE_EXECUTION="0")
    assert found.startswith("4 sandbox: ")
    assert "MECHMERGE_UNSAFE_EXECUTION=1" in found
    assert "none for network, files, processes" in found
    assert "passed=True" in _python(UNDER, MECHMERGE_UNSAFE_EXECUTION="1")


def test_filter_alone_refuses_writes(tmp_path: Path) -> None:
    code = """
        import os, socket, sys
        from mechmerge.behaviors import confine
        assert confine.filter_calls(writes=False)
        os.chdir(sys.argv[1]) if len(sys.argv) > 1 else None
        tried = {
            "read": lambda: open(FILE).read(), "write": lambda: open(FILE, "w"), "append": lambda: open(FILE, "a"),
            "create": lambda: os.open(FILE + "2", os.O_CREAT), "remove": lambda: os.remove(FILE),
            "rename": lambda: os.rename(FILE, FILE + "2"), "fork": os.fork, "socket": socket.socket,
            "truncate": lambda: os.truncate(FILE, 0), "openat": lambda: os.open("kept", os.O_RDWR, dir_fd=FOLDER),
        }
        for name, deed in tried.items():
            try: deed(); print(name, "done")
            except PermissionError: print(name, "refused")
    """
    kept = tmp_path / "kept"
    kept.write_text("x")
    head = f"FILE = {str(kept)!r}\nimport os\nFOLDER = os.open({str(tmp_path)!r}, os.O_RDONLY)\n"
    lines = dict(line.split() for line in _python(head + textwrap.dedent(code)).splitlines())
    assert lines.pop("read") == "done"
    assert set(lines.values()) == {"refused"}
    assert len(lines) == 9


def test_numbers_of_system_calls() -> None:
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("no kernel headers here")
    known = dict(line.split()[1:3] for line in header.read_text().splitlines() if line.startswith("#define __NR_"))
    table = confine.CALLS | confine.CHANGES | {name: numbers for name, (numbers, _) in confine.OPENS.items()}
    compared = [name for name, (number, _) in table.items() if int(known.get(f"__NR_{name}", number)) == number]
    assert compared == list(table)


def test_sandbox_that_does_not_start() -> None:
    with pytest.raises(MechmergeError, match=r"to start.*boom"):
        sandbox._outcome([], 1, "Traceback\nImportError: boom")


# --------------------------------------------------------------------------------------------------------- reading an answer
CODE = "def f(x):\n    return 2 * x\n"


@pytest.mark.parametrize(
    "answer",
    [
        CODE,
        f"Here:\n```python\n{CODE}```\nThat is all.",
        f"```py\n{CODE}```",
        f"```\n{CODE}```",
        f"```python\n{CODE}",  # cut off
        f"```bash\npip install x\n```\n```python\n{CODE}```",
        f"```python\nimport math\n```\nand\n```python\n{CODE}```\nUse:\n```python\nprint(f(input()))\n```",
        f"1. Like this:\n   ```Python title=a\n{CODE}   ```",
        "```python\nf = lambda x: 2 * x\n```",
    ],
)
def test_extract_and_judge(answer: str) -> None:
    assert judge(answer, {"tests": DOUBLE, "entry": "f"})
    assert not judge(answer.replace("2 * x", "3 * x"), {"tests": DOUBLE, "entry": "f"})


def test_extract() -> None:
    assert extract(f"```python\nimport math\n```\n```python\n{CODE}```\n```python\nf(1)\n```", "f") == f"import math\n\n{CODE}"
    assert extract("no code", "f") == "no code"
    assert extract("```text\ndef f(x): 1\n```\n```python\ng = 1\n```", "f") == "g = 1\n"
    assert extract(f"```python\ndef fg(x): 1\n```\n```python\n{CODE}```", "f").endswith(CODE)
    assert not judge("", {"tests": DOUBLE, "entry": "f"})
    assert judge(CODE, {"tests": DOUBLE, "entry": "f", "seconds": 2, "memory_mb": 256})


@pytest.mark.parametrize(
    "arguments",
    [{"tests": DOUBLE}, {"entry": "f"}, {"tests": "assert (", "entry": "f"}, {"tests": " ", "entry": "f"},
     {"tests": DOUBLE, "entry": "f(x)"}, {"tests": DOUBLE, "entry": "def"}, {"tests": 1, "entry": "f"}],
)  # fmt: skip
def test_wrong_arguments(arguments: dict[str, object]) -> None:
    with pytest.raises(InputError, match="verifier python"):
        judge(CODE, arguments)


def test_missing_error_is_of_the_fourth_kind() -> None:
    with pytest.raises(MissingError):
        sandbox._outcome(['{"network": true, "files": false, "processes": true}'], 0, "")
