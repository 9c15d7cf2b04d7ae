"""Prompts in IFEval's format: JSON Lines with `key`, `prompt`, `instruction_id_list` and `kwargs`; IFBench has it as well."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from mechmerge.artifacts import digest, parse_document, parse_json, read_text
from mechmerge.behaviors.verifiers import check_arguments, check_verifier
from mechmerge.errors import MechmergeError, MissingError, SchemaError
from mechmerge.evaluate.suites import Suite, SuitePrompt


class Benchmark(NamedTuple):
    """What a benchmark of this format is known by."""

    suite: str
    """The suite's name."""
    title: str
    """Its own name."""
    holds: Callable[[str], bool]
    """Whether an instruction id is one of its own."""
    official: Collection[str]
    """First 32 digits of the digests of its official rows, however a file spells them."""
    answer_tokens: int


def read_suite(path: Path, benchmark: Benchmark) -> Suite:
    """The suite of a benchmark from a file; its split says whether the rows are the official ones (else `file`).

    Raises:
        SchemaError, InputError: a row that is not in the format, naming its line; an unknown instruction id; a key twice.
        MissingError: a checker needs something that is not on this machine.
    """
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
        "name": benchmark.suite,
        "split": "official" if digest(rows)[:32] in benchmark.official else "file",
        "answer_tokens": benchmark.answer_tokens,
        "readings": ("strict", "loose"),
        "breakdown": "instruction",
        "prompts": rows,
    }
    suite = parse_document(Suite, value, str(path))
    for (i, _), prompt in zip(lines, suite.prompts, strict=True):
        _check(prompt, f"{path}: line {i}", benchmark)
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


def _check(prompt: SuitePrompt, where: str, benchmark: Benchmark) -> None:
    for instruction in prompt.instructions:
        name = instruction.verifier.name
        if not benchmark.holds(name):  # another verifier would make it another benchmark under this one's name
            wanted = f"an instruction id of {benchmark.title}"
            raise SchemaError(f"{where} (key {prompt.id})", expected=wanted, found=f"unknown name {name!r}")
        try:
            check_verifier(instruction.verifier)
            check_arguments(instruction.verifier, instruction.arguments)
        except MissingError:
            raise
        except MechmergeError as error:
            wanted = f"an instruction of {benchmark.title}"
            raise SchemaError(f"{where} (key {prompt.id})", expected=wanted, found=str(error)) from None
