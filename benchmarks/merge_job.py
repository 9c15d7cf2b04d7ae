"""One merge in a process of its own, timed without its imports: `python -m benchmarks.merge_job JSON` prints JSON."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """What the process does."""

    engine: str
    """`direct`: mechmerge's writer; `verified`: with verification; `masked`: mergekit with our method; `stock`: mergekit's
    task arithmetic; `cp`: copies the base; `torch`: import torch, and nothing else.
    """
    recipe: str = ""
    models: str = ""
    """Folder with `base`, `one` and `two`."""
    out: str = ""
    cold: bool = False
    """Whether the inputs' pages are dropped before, or read."""


def run(job: Job, sample: bool = False) -> tuple[float, float]:
    """Runs a job.

    Args:
        job: the job.
        sample: whether anonymous memory is looked at every two milliseconds, which costs a little time.

    Returns:
        Seconds of the merge, flushed to the disk; the peak of anonymous resident memory in bytes (0 where not sampled).
    """
    command = [sys.executable, "-m", "benchmarks.merge_job", json.dumps(asdict(job))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak = 0
    while sample and process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.002)
    out, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(errors[-2000:])
    return float(json.loads(out.splitlines()[-1])["seconds"]), peak


def anonymous(pid: int) -> int:
    """Anonymous resident memory of a process, in bytes (0 when it is gone)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def prepare(job: Job) -> None:
    """Removes the output of the run before, and drops or reads the inputs.

    It is done right before every run, cp's too: what it leaves in memory is then the same for all.
    """
    shutil.rmtree(job.out, ignore_errors=True)
    os.sync()
    for path in Path(job.models).glob("*/*.safetensors"):
        with path.open("rb", buffering=0) as handle:
            if job.cold:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while not job.cold and handle.read(1 << 18):
                pass


def flush(folder: Path) -> None:
    """fsync of every file of a folder, and of the folder."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _child(job: Job) -> float:
    if job.engine == "torch":
        importlib.import_module("torch")

        time.sleep(0.2)
        return 0.0
    models = {name: Path(job.models) / name for name in ("base", "one", "two")}
    recipe, out = Path(job.recipe), Path(job.out)
    if job.engine == "cp":
        prepare(job)
        started = time.perf_counter()
        subprocess.run(["cp", "-r", "--reflink=never", str(models["base"]), str(out)], check=True)
        flush(out)
        return time.perf_counter() - started
    from mechmerge.merge.engine import merge, open_models
    from mechmerge.recipe.coefficients import coefficients
    from mechmerge.recipe.emit import emit_masked, emit_stock
    from mechmerge.recipe.schema import read_recipe

    if job.engine in ("direct", "verified"):
        prepare(job)
        started = time.perf_counter()
        merge(recipe, out, models, check=job.engine == "verified")
        return time.perf_counter() - started
    from mechmerge.merge.executor import execute
    from mechmerge.merge.tools import register_method

    register_method()
    read, masks = read_recipe(recipe)
    base, experts = open_models(read, models, finite=False)
    if job.engine == "masked":
        text = emit_masked(read, recipe, models)
    else:
        text = emit_stock(read, coefficients(read, masks, base.arch), base.layout, base.shapes, models)
    prepare(job)
    out.mkdir()
    started = time.perf_counter()
    execute(text, base, list(experts.values()), out)
    flush(out)
    return time.perf_counter() - started


if __name__ == "__main__":
    print(json.dumps({"seconds": _child(Job(**json.loads(sys.argv[1])))}))
