"""The sandbox's own process: runs an answer in one confined process and its tests in another (see `sandbox`).

    mechmerge ──job──► judge (this process, `main`)        holds the tests, decides, reports
                         │ ▲  calls and plain values       a pipe each way
                         ▼ │
                       answer (`_serve`, a fork)           never sees the tests, the verdict's channel or the judge's memory

What comes back from the answer is plain data (numbers, texts, lists, ...), decoded by the judge: an answer cannot hand over an
object whose `==` is always true, patch `assert`, or end the program with a verdict, for none of this happens in the process
that decides. Started by `python -P -s -S -B` with an empty environment; only the standard library is there.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import random
import signal
import sys
import sysconfig
import types
from typing import Any, NoReturn

from mechmerge.behaviors import confine
from mechmerge.behaviors.sandbox_wire import decode, encode, receive, send


class AnswerFault(BaseException):
    """The answer broke off or said something that is no plain value; not an `Exception`, so that no test swallows it."""


# ------------------------------------------------------------------------------------------------------ the answer's process
def _answer_process(commands: int, replies: int, seconds: int, memory: int, landlock: bool) -> NoReturn:
    """The fork's own confinement: no file open but its two pipes, limits, and the filter; then it serves."""
    confine.die_with_parent()
    silent = os.open("/dev/null", os.O_RDWR)
    for number, descriptor in enumerate((silent, silent, silent, commands, replies)):
        os.dup2(descriptor, number + 10)
    for number in range(5):
        os.dup2(number + 10, number)
    os.closerange(5, 64)
    confine.limit(seconds, memory)
    send(4, confine.filter_calls(writes=landlock))
    _serve(3, 4)


def _serve(commands: int, replies: int) -> NoReturn:
    """Runs the answer's code, then its function for each call, until the judge is gone."""
    module = types.ModuleType("answer")
    sys.modules["answer"] = module
    # Answers that draw or shuffle say the same each time.
    random.seed(0)
    while True:
        try:
            request = receive(commands)
        except EOFError:
            os._exit(0)
        try:
            if "code" in request:
                exec(compile(request["code"], "answer", "exec"), module.__dict__)  # noqa: S102 - what the sandbox is for
                reply: Any = {"callable": callable(module.__dict__.get(request["entry"]))}
            else:
                call, keywords = module.__dict__[request["entry"]], decode(request["keywords"])
                value = call(*decode(request["arguments"]), **keywords)
                try:
                    reply = {"value": encode(value)}
                except TypeError as error:
                    # No exception of the function's: tests that wait for a TypeError must not get this one.
                    reply = {"fault": _text(error)}
            send(replies, reply)
        except BaseException as error:
            # Of an exception only names of its classes and a short text pass.
            names = [kind.__name__ for kind in type(error).__mro__]
            send(replies, {"raised": names, "text": _text(error)})


def _text(error: BaseException) -> str:
    try:
        return str(error)[:200]
    except BaseException:
        return ""


# ------------------------------------------------------------------------------------------------------ the judge's process
class _Answer:
    """The answer's process as the judge sees it."""

    def __init__(self, process: int, commands: int, replies: int) -> None:
        self.process, self.commands, self.replies = process, commands, replies
        self.ended = False
        try:
            self.handle = os.pidfd_open(process)
        except (AttributeError, OSError):
            self.handle = -1

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        try:
            send(self.commands, request)
            reply = receive(self.replies)
            if not isinstance(reply, dict):
                raise TypeError("no mapping")
        except (EOFError, BrokenPipeError):
            raise AnswerFault(self._end()) from None
        except (ValueError, TypeError, RecursionError):
            raise AnswerFault("the answer said something that is no plain value") from None
        return reply

    def call(self, entry: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        reply = self.ask({"entry": entry, "arguments": encode(arguments), "keywords": encode(keywords)})
        if "raised" in reply:
            raise _exception(reply)
        if "fault" in reply:
            raise AnswerFault(f"the answer returned what is no plain value: {str(reply['fault'])[:200]}")
        try:
            return decode(reply["value"])
        except Exception:
            raise AnswerFault("the answer said something that is no plain value") from None

    def stop(self) -> None:
        """Ends the process and waits for it, so that nothing of it is left when the judge reports."""
        if self.ended:
            return
        # The filter leaves the judge one signal: the one to the process that it holds a handle of.
        with contextlib.suppress(OSError):
            if self.handle >= 0:
                signal.pidfd_send_signal(self.handle, signal.SIGKILL)
            else:
                os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)

    def _end(self) -> str:
        try:
            status = os.waitpid(self.process, 0)[1]
        except OSError:
            return "the answer ended the program"
        self.ended = True
        if not os.WIFSIGNALED(status):
            return "the answer ended the program"
        number = os.WTERMSIG(status)
        if number in (signal.SIGKILL, signal.SIGXCPU):
            return "out of CPU time or memory"
        return f"the answer crashed ({signal.Signals(number).name})"


def _exception(reply: dict[str, Any]) -> Exception:
    """What the answer raised, as the nearest exception that Python itself has."""
    names, text = reply.get("raised"), str(reply.get("text"))[:200]
    for name in names if isinstance(names, list) else []:
        kind = getattr(builtins, name, None) if isinstance(name, str) else None
        if isinstance(kind, type) and issubclass(kind, Exception):
            try:
                return kind(text)
            except TypeError:  # UnicodeDecodeError and its like take more
                continue
    return RuntimeError(text)


def _judge(answer: _Answer, job: dict[str, Any]) -> tuple[bool, str]:
    """Whether all tests hold, and why not."""
    entry, tests = job["entry"], job["tests"]
    try:
        loaded = answer.ask({"code": job["code"], "entry": entry})
        if "raised" in loaded:
            return False, f"the answer does not run: {_line(_exception(loaded))}"
        if loaded.get("callable") is not True:
            return False, f"the answer defines no function {entry}"

        def candidate(*arguments: Any, **keywords: Any) -> Any:
            return answer.call(entry, arguments, keywords)

        space: dict[str, Any] = {"__name__": "tests", entry: candidate, "candidate": candidate}
        exec(compile(tests, "tests", "exec"), space)  # noqa: S102 - what the sandbox is for
        if callable(space.get("check")):
            space["check"](candidate)
    except AnswerFault as fault:
        return False, str(fault)
    except BaseException as error:
        return False, f"{_line(error)}{_place(error, tests)}"
    return True, ""


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {_text(error)}".split()).rstrip(": ")


def _place(error: BaseException, tests: str) -> str:
    """The line of the tests at which they stopped."""
    number, trace = 0, error.__traceback__
    while trace is not None:
        number = trace.tb_lineno if trace.tb_frame.f_code.co_filename == "tests" else number
        trace = trace.tb_next
    lines = tests.split("\n")
    return f" at `{lines[number - 1].strip()[:120]}`" if 0 < number <= len(lines) else ""


def _readable() -> list[str]:
    """What Python needs to read: its library, shared libraries, time zones."""
    own = [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), f"{sys.base_prefix}/lib"]
    shared = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store", "/gnu/store", "/etc/ld.so.cache"]
    return [*own, *shared, "/usr/share/zoneinfo", "/etc/localtime", "/dev/urandom"]


def main() -> None:
    """Confines itself, forks the answer's process, reads the job from stdin, and writes two lines to stdout: which layers
    hold (JSON), and the verdict. Arguments: CPU seconds, bytes of memory, temporary folder, whether to run without layers.
    """
    seconds, memory, folder, unsafe = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4] == "unsafe"
    own_network = confine.isolate()
    confine.hide()
    landlock = confine.restrict_files(_readable(), folder)
    confine.drop_capabilities()
    commands, replies = os.pipe(), os.pipe()
    process = os.fork()
    if process == 0:
        try:
            _answer_process(commands[0], replies[1], seconds, memory, landlock)
        finally:
            os._exit(1)  # whatever happened, this process never becomes a second judge
    os.close(commands[0])
    os.close(replies[1])
    answer = _Answer(process, commands[1], replies[0])
    confine.limit(seconds, memory)
    filtered = receive(replies[0]) is True and confine.filter_calls(writes=landlock, allowed={"pidfd_send_signal"})
    # Tests may print what the answer returned: the channel to mechmerge is no stream that Python code writes to by chance.
    channel, silent = os.dup(1), os.open("/dev/null", os.O_RDWR)
    for number in (1, 2):
        os.dup2(silent, number)
    layers = {"network": own_network or filtered, "files": landlock or filtered, "processes": own_network or filtered}
    os.write(channel, f"{json.dumps(layers)}\n".encode())
    if all(layers.values()) or unsafe:
        passed, reason = _judge(answer, json.load(sys.stdin))
        os.write(channel, f"{json.dumps({'passed': passed, 'reason': reason[:300]})}\n".encode())
    answer.stop()
