"""IFEval's official prompts: 541 prompts, 834 instructions, 25 types (https://arxiv.org/abs/2311.07911).

They come from the data set `google/IFEval` on the Hub at a pinned commit, or from a local JSON Lines file in its format
(`key`, `prompt`, `instruction_id_list`, `kwargs`); the suite's split says whether they are the official ones. Key 2785 has two
wordings: google-research's file asks for "at least 3 placeholders", as the checker does; the Hub's, and the published GPT-4
answers, for "at least one placeholder". Four headline metrics: `ifeval` and `ifeval.instruction` (strict), `ifeval.loose` and
`ifeval.loose-instruction`.
"""

from __future__ import annotations

from pathlib import Path

from mechmerge.artifacts import sha256_file
from mechmerge.behaviors.verifiers import IFEVAL
from mechmerge.errors import MechmergeError, MissingError, SchemaError
from mechmerge.evaluate.instruction_files import Benchmark, read_suite
from mechmerge.evaluate.suites import Suite
from mechmerge.models.hub_files import local_file

DATASET, REVISION, FILE = "google/IFEval", "966cd89545d6b6acfd7638bc708b98261ca58e84", "ifeval_input_data.jsonl"
"""The data set's only data file, at the commit that its main branch has had since 2024."""
FILE_SHA256 = "6a85310ca8ce15eff755aa08a3a4ff931c7e273e7515ebb3c492ea85fd8288f2"
BENCHMARK = Benchmark(
    suite="ifeval",
    title="IFEval",
    holds=IFEVAL.__contains__,
    official=("0ac7afb93a0ff5de1a3ae0013578b2e7", "a34017f5b34d4b7a67188fa688d9ae50"),  # either wording of key 2785
    answer_tokens=1280,  # as in lm-eval's task `ifeval` (max_gen_toks)
)


def load(data: Path | None) -> Suite:
    """The suite `ifeval`.

    Args:
        data: a JSON Lines file in IFEval's format (default: the official one from the Hub).

    Raises:
        SchemaError, InputError: a row that is not in the format, naming its line; an unknown instruction id; a key twice.
        MissingError: no data, and the Hub cannot be reached; or the sentence model is missing.
    """
    return read_suite(_download() if data is None else data, BENCHMARK)


def _download() -> Path:
    reference = f"hf://datasets/{DATASET}@{REVISION}/{FILE}"
    try:
        path = local_file(reference)
    except MechmergeError as error:
        raise MissingError(
            "suite ifeval", expected="its prompts", found=str(error), fix="or give its file with --data"
        ) from None
    if sha256_file(path) != FILE_SHA256:
        raise SchemaError(f"{DATASET}@{REVISION[:12]}", expected=f"a file of sha256 {FILE_SHA256[:12]}…", found="another one")
    return path
