"""A user's own suite: a YAML or JSON Lines file.

    name: politeness                # default: the file's name
    answer_tokens: 64
    chat_template: model
    verifier: {name: contains}      # for prompts that name none
    prompts:
      - {id: a, prompt: "Thank the guard.", verifier: {name: contains}, arguments: {text: thank}, topic: guards, group: thanks}
      - {id: b, prompt: "Greet her, briefly.", instructions: [{verifier: {name: "punctuation:no_comma"}}]}

or JSON Lines with one such prompt a line; lines in IFEval's format (`instruction_id_list`, `kwargs`) are taken as well.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mechmerge.artifacts import parse_document, parse_json, parse_yaml, read_text
from mechmerge.behaviors.verifiers import check_arguments, check_verifier, verify
from mechmerge.errors import InputError, MechmergeError, MissingError, SchemaError
from mechmerge.evaluate.instruction_files import converted
from mechmerge.evaluate.suites import Suite, SuitePrompt


def load(path: Path) -> Suite:
    """Reads a suite file; every instruction is tried on a probe before any answer is made.

    Raises:
        InputError: an unknown verifier, or an argument that it does not take.
        SchemaError: the file breaks the schema, a prompt is missing, or an id stands twice.
        MissingError: a verifier needs data that is not on this machine.
    """
    where, text = str(path), read_text(path)
    if path.suffix == ".jsonl":
        lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        value: Any = {"prompts": [parse_json(line, f"{where}: line {i}") for i, line in lines]}
    else:
        value = parse_yaml(text, where)
        value = {"prompts": value} if isinstance(value, list) else value
    if not isinstance(value, dict) or not isinstance(value.get("prompts"), list):
        raise SchemaError(where, expected="a mapping with a list of prompts", found=type(value).__name__)
    if "split" in value or "limited" in value:
        raise SchemaError(where, expected="no split or limited (a file has neither)", found="one of them")
    default = value.pop("verifier", None)
    rows = [_row(row, number, default, f"{where}: prompt {number}") for number, row in enumerate(value["prompts"], 1)]
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", path.stem).strip("-_") or "suite"
    suite = parse_document(Suite, {"name": stem} | value | {"prompts": rows, "split": "file"}, where)
    for number, prompt in enumerate(suite.prompts, 1):
        _check(prompt, f"{where}: prompt {number} ({prompt.id})")
    return suite


def _row(row: Any, number: int, default: Any, where: str) -> Any:
    """A prompt of a file with what it may leave out: its id, and a verifier that is only a name or the file's own."""
    if not isinstance(row, dict):
        raise SchemaError(where, expected="a mapping with prompt, verifier and arguments", found=type(row).__name__)
    if not row.get("prompt"):
        raise SchemaError(where, expected="a prompt", found="none")
    if "instruction_id_list" in row:  # IFEval's own format
        return converted({"key": number} | row, where)
    row = row | {"id": str(row.get("id", number))}
    if "instructions" in row:
        if "verifier" in row or "arguments" in row:
            raise SchemaError(where, expected="instructions, or verifier and arguments", found="both")
        return row
    verifier = row.get("verifier", default)
    if verifier is None:
        raise SchemaError(where, expected="a verifier", found="none", fix="give the prompt or the file one")
    return row | {"verifier": {"name": verifier} if isinstance(verifier, str) else verifier}


def _check(prompt: SuitePrompt, where: str) -> None:
    """The verifiers of a prompt run: judged once on a probe, so that a wrong argument is found before any answer is made."""
    try:
        for instruction in prompt.instructions:
            check_verifier(instruction.verifier)
            check_arguments(instruction.verifier, instruction.arguments)
            verify(instruction.verifier, prompt.prompt, "A probe: 1 answer.", instruction.arguments)
    except MissingError:
        raise
    except MechmergeError as error:
        raise InputError(f"{where}: {error}") from None
    except Exception as error:
        raise InputError(where, expected="a verifier that runs", found=f"{type(error).__name__}: {error}") from None
