"""Tasks of lm-eval by name: looked up, checked, loaded, and digested by what they ask.

Source: `TaskManager` of https://github.com/EleutherAI/lm-evaluation-harness (lm_eval/tasks/manager.py). A name is a task
(`gsm8k`), a group (`mmlu`, whose members' results lm-eval combines) or a tag (several tasks side by side). lm-eval takes
seconds to import: only the functions here do so.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import inspect
import io
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mechmerge.artifacts import digest
from mechmerge.behaviors.sandbox import UNSAFE, unsafe_allowed
from mechmerge.errors import InputError, MissingError

CHATTY = ("lm_eval", "datasets", "evaluate")
"""Loggers that warn of their own defaults."""


class Loaded(NamedTuple):
    """What a name stands for."""

    name: str
    tasks: dict[str, Any]
    """The tasks proper, by name, in the order of lm-eval."""
    groups: dict[str, Any]
    """The groups whose results lm-eval combines, by name, the outermost first."""


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keeps lm-eval's bars, prints and warnings of its own defaults off the terminal."""
    before = {name: logging.getLogger(name).level for name in CHATTY}
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@functools.lru_cache(maxsize=4)
def manager(include: Path | None = None) -> Any:
    """The index of all tasks.

    Args:
        include: a folder with task files of the user's own; they stand above lm-eval's.
    """
    with silent():
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=None if include is None else str(include))


def load_task(name: str, include: Path | None = None) -> Loaded:
    """Loads a task with its data.

    Args:
        name: of a task, group or tag.
        include: a folder with task files of the user's own.

    Raises:
        InputError: no task of this name, or one that asks for more than text.
        MissingError: its data or a package is not on this machine, or it runs the model's code and that was not allowed.
    """
    tasks = manager(include)
    if name not in tasks.task_index:
        near = difflib.get_close_matches(name, tasks.all_tasks, n=5, cutoff=0.5)
        expected = f"a task of lm-eval, such as {', '.join(near)}" if near else "a task of lm-eval"
        raise InputError(f"lm_eval:{name}", expected=expected, found="an unknown name", fix="`lm-eval ls tasks` lists them")
    for member in _members(tasks.task_index, name, set()):
        _check_unsafe(name, member, (tasks.task_index[member].cfg or {}).get("unsafe_code"))
    try:
        with silent():
            found = tasks.load([name])
    except ImportError as error:
        raise MissingError(
            f"lm_eval:{name}", expected="the packages that the task needs", found=str(error), fix="install them with pip"
        ) from None
    except Exception as error:  # whatever a task file may do
        raise _unloadable(name, tasks, error) from None
    for member, task in found["tasks"].items():
        _check_unsafe(name, member, getattr(task, "UNSAFE_CODE", False))
        if getattr(task, "MULTIMODAL", False):
            raise InputError(f"lm_eval:{name}", expected="a task of text alone", found=f"{member} with images or sound")
    groups = {key: group for key, group in found["groups"].items() if group.has_aggregation}
    return Loaded(name, dict(found["tasks"]), groups)


def task_digest(task: Any) -> str:
    """sha256 of a task's configuration, version, and documents (those asked, and those that examples are drawn from)."""
    # Templates and functions count; where they and the documents lie does not.
    places = ("dataset_path", "dataset_name", "dataset_kwargs", "metadata")
    config = {key: value for key, value in task.dump_config().items() if key not in places}
    text = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(config, sort_keys=True, default=_plain))
    shown = task.fewshot_docs() if config.get("num_fewshot") else None
    return digest([text, str(task.VERSION), _documents(task.eval_docs), _documents(shown or [])])


def _documents(documents: Iterable[Any]) -> str:
    made = hashlib.sha256()
    for document in documents:
        made.update(json.dumps(document, sort_keys=True, default=str).encode() + b"\n")
    return made.hexdigest()


def _plain(value: Any) -> str:
    try:
        return inspect.getsource(value)
    except (TypeError, OSError):
        return str(value)


# ------------------------------------------------------------------------------------------------------------------- checks
def _members(index: Mapping[str, Any], name: str, seen: set[str]) -> Iterator[str]:
    """Names of all tasks beneath a name, from the index alone, without loading any."""
    entry = index.get(name)
    if entry is None or name in seen:
        return
    seen.add(name)
    listed = (entry.cfg or {}).get("task")
    children = listed if isinstance(listed, list) else sorted(entry.tags) if entry.kind.name == "TAG" else []
    if not children:
        yield name
    for child in children:
        inner = child if isinstance(child, str) else child.get("task") or child.get("group")
        for one in inner if isinstance(inner, list) else [inner]:
            if isinstance(one, str):
                yield from _members(index, one, seen)


def _check_unsafe(name: str, member: str, unsafe: Any) -> None:
    """Tasks that run what the model wrote do so in lm-eval's own process, without any protection."""
    if unsafe and not unsafe_allowed():
        raise MissingError(
            f"lm_eval:{name}",
            expected=f"leave to run the model's code without protection ({member} does)",
            found="none",
            fix=f"use --suite code, which is confined, or set {UNSAFE}=1 (and HF_ALLOW_CODE_EVAL=1) in a container",
        )


def _unloadable(name: str, tasks: Any, error: Exception) -> InputError | MissingError:
    """What keeps a task from being loaded: data that is not here, or a fault of its file."""
    found = f"{type(error).__name__}: {error}"[:300]
    entry = next(iter(_members(tasks.task_index, name, set())), name)
    source = (tasks.task_index[entry].cfg or {}).get("dataset_path") or entry
    is_absent = isinstance(error, OSError) or re.search(r"[Cc]ouldn't (find|reach)|offline", str(error)) is not None
    if is_absent:
        return MissingError(
            f"lm_eval:{name}",
            expected=f"its data ({source}) on this machine, or the Hub within reach",
            found=found,
            fix="check the network, or fetch the data once where there is one (HF_HOME says where it is kept)",
        )
    return InputError(f"lm_eval:{name}", expected="a task that lm-eval loads", found=found)
