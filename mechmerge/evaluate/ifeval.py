"""IFEval's official prompts: 541 prompts, 834 instructions, 25 types (https://arxiv.org/abs/2311.07911).

They come from the data set `google/IFEval` on the Hub at a pinned commit, or from a local JSON Lines file in its format
(`key`, `prompt`, `instruction_id_list`, `kwargs`); the suite's split says whether they are the official ones. Key 2785 has two
wordings: google-research's file asks for "at least 3 placeholders", as the checker does; the Hub's, and the published GPT-4
answers, for "at least one placeholder". Four headline metrics: `ifeval` and `ifeval.instruction` (strict), `ifeval.loose` and
`ifeval.loose-instruction`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mechmerge.artifacts import digest, parse_document, parse_json, read_text, sha256_file
from mechmerge.behaviors.verifiers import IFEVAL, check_arguments, check_verifier
from mechmerge.errors import MechmergeError, MissingError, SchemaError
from mechmerge.evaluate.suites import Suite, SuitePrompt
from mechmerge.models.hub_files import local_file

DATASET, REVISION, FILE = "google/IFEval", "966cd89545d6b6acfd7638bc708b98261ca58e84", "ifeval_input_data.jsonl"
"""The data set's only data file, at the commit that its main branch has had since 2024."""
FILE_SHA256 = "6a85310ca8ce15eff755aa08a3a4ff931c7e273e7515ebb3c492ea85fd8288f2"
OFFICIAL = ("0ac7afb93a0ff5de1a3ae0013578b2e7", "a34017f5b34d4b7a67188fa688d9ae50")
"""First halves of the digests of the rows in either wording of key 2785, however a file spells them."""
ANSWER_TOKENS = 1280
"""As in lm-eval's task `ifeval` (max_gen_toks)."""


def load(data: Path | None) -> Suite:
    """The suite `ifeval`.

    Args:
        data: a JSON Lines file in IFEval's format (default: the official one from the Hub).

    Raises:
        SchemaError, InputError: a row that is not in the format, naming its line; an unknown instruction id; a key twice.
        MissingError: no data, and the Hub cannot be reached; or the sentence model is missing.
    """
    path = _download() if data is None else data
    lines = [(i, line) for i, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    rows = [converted(parse_json(line, f"{path}: line {i}"), f"{path}: line {i}") for i, line in lines]
    if not rows:
        raise SchemaError(str(path), expected="one prompt a line", found="none")
    first: dict[str, int] = {}
    for (i, _), row in zip(lines, rows, strict=True):
        if first.setdefault(row["id"], i) != i:
            earlier = first[row["id"]]
            raise SchemaError(f"{path}: line {i}", expected="each key once", found=f"{row['id']}, as in line {earlier}")
    value = {
        "name": "ifeval",
        "split": "official" if digest(rows)[:32] in OFFICIAL else "file",
        "answer_tokens": ANSWER_TOKENS,
        "readings": ("strict", "loose"),
        "breakdown": "instruction",
        "prompts": rows,
    }
    suite = parse_document(Suite, value, str(path))
    for (i, _), prompt in zip(lines, suite.prompts, strict=True):
        _check(prompt, f"{path}: line {i}")
    return suite


def converted(row: Any, where: str) -> dict[str, Any]:
    """A row in IFEval's format as a suite's prompt.

    Raises:
        SchemaError: a part is missing or has another shape.
    """
    if not isinstance(row, dict):
        raise SchemaError(
            where, expected="an object with key, prompt, instruction_id_list and kwargs", found=type(row).__name__
        )
    names, arguments = row.get("instruction_id_list"), row.get("kwargs")
    if not isinstance(row.get("key"), int | str) or isinstance(row["key"], bool) or row["key"] == "":
        raise SchemaError(where, expected="a key (a number or a text)", found=repr(row.get("key")))
    if not isinstance(row.get("prompt"), str) or not row["prompt"]:
        raise SchemaError(where, expected="a prompt", found=repr(row.get("prompt")))
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise SchemaError(where, expected="instruction_id_list with at least one id", found=repr(names))
    if not isinstance(arguments, list) or len(arguments) != len(names):
        found = f"{len(arguments)} for {len(names)} ids" if isinstance(arguments, list) else repr(arguments)
        raise SchemaError(where, expected="kwargs with one mapping for each id", found=found)
    instructions = []
    for name, given in zip(names, arguments, strict=True):
        if not isinstance(given, dict | None):
            raise SchemaError(where, expected="kwargs of mappings", found=type(given).__name__)
        kept = {key: value for key, value in (given or {}).items() if value is not None}
        instructions.append({"verifier": {"name": name}, "arguments": kept})
    return {"id": str(row["key"]), "prompt": row["prompt"], "instructions": instructions}


def _check(prompt: SuitePrompt, where: str) -> None:
    for instruction in prompt.instructions:
        name = instruction.verifier.name
        if name not in IFEVAL:  # a verifier of ours would make it another benchmark under IFEval's name
            unknown = f"unknown name {name!r}"
            raise SchemaError(f"{where} (key {prompt.id})", expected="an instruction id of IFEval", found=unknown)
        try:
            check_verifier(instruction.verifier)
            check_arguments(instruction.verifier, instruction.arguments)
        except MissingError:
            raise
        except MechmergeError as error:
            raise SchemaError(f"{where} (key {prompt.id})", expected="an instruction of IFEval", found=str(error)) from None


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
