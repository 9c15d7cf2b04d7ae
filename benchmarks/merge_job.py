"""One merge in a process of its own, timed without its imports: `python -m benchmarks.merge_job JSON` prints JSON."""

from __future__ import annotations

import json
import os
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
    task arithmetic; `torch`: import torch, and nothing else.
    """
    recipe: str = ""
    models: str = ""
    """Folder with `base`, `one` and `two`."""
    out: str = ""


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


def flush(folder: Path) -> None:
    """fsync of every file of a folder, and of the folder."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _child(job: Job) -> float:
    import torch  # noqa: F401

    if job.engine == "torch":
        time.sleep(0.2)
        return 0.0
    from mechmerge.merge.engine import merge, open_models
    from mechmerge.recipe.coefficients import coefficients
    from mechmerge.recipe.emit import emit_masked, emit_stock
    from mechmerge.recipe.schema import read_recipe

    models = {name: Path(job.models) / name for name in ("base", "one", "two")}
    recipe, out = Path(job.recipe), Path(job.out)
    if job.engine in ("direct", "verified"):
        started = time.perf_counter()
        merge(recipe, out, models, check=job.engine == "verified")
        return time.perf_counter() - started
    from mechmerge.merge.executor import execute
    from mechmerge.merge.mergekit_api import register_method

    register_method()
    read, masks = read_recipe(recipe)
    base, experts = open_models(read, models, finite=False)
    if job.engine == "masked":
        text = emit_masked(read, recipe, models)
    else:
        text = emit_stock(read, coefficients(read, masks, base.arch), base.layout, base.shapes, models)
    out.mkdir()
    started = time.perf_counter()
    execute(text, base, list(experts.values()), out)
    flush(out)
    return time.perf_counter() - started


if __name__ == "__main__":
    print(json.dumps({"seconds": _child(Job(**json.loads(sys.argv[1])))}))
