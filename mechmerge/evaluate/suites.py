"""Suites: prompts with the verifiers that judge their answers.

Built in are `formats` (every topic of the split in all six IFEval formats) and `arithmetic`; both have a tier of unseen
wordings that is reported apart. A user's own suite is a YAML file

    name: politeness                # default: the file's name
    answer_tokens: 64
    chat_template: model
    verifier: {name: contains}      # for prompts that name none
    prompts:
      - {id: a, prompt: "Thank the guard.", verifier: {name: contains}, arguments: {text: thank}, topic: guards, group: thanks}

or a JSON Lines file with one such prompt a line.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from mechmerge.artifacts import Document, digest, parse_document, parse_json, parse_yaml, read_text
from mechmerge.behaviors.prompts import Prompt, arithmetic_prompts, format_prompts, material
from mechmerge.behaviors.schema import Verifier, load_behavior
from mechmerge.behaviors.verifiers import check_arguments, check_verifier, verify
from mechmerge.errors import InputError, MechmergeError, MissingError, SchemaError

Tier = Literal["seen", "unseen"]
BUILTIN = ("formats", "arithmetic")
SUMS = {"seen": 120, "unseen": 60}
"""Sums of the built-in arithmetic suite, by tier."""


class SuitePrompt(Document):
    """One prompt and how its answer is judged."""

    id: str = Field(min_length=1)
    prompt: str = Field(min_length=1)
    verifier: Verifier
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the verifier for this prompt alone."""
    group: str = Field(default="all", pattern=r"^[A-Za-z0-9][A-Za-z0-9_:-]*$")
    """Kind of the prompt, such as one of the six formats; a suite's headline is the mean over its groups."""
    tier: Tier = "seen"
    """`unseen` prompts are reported apart."""
    topic: str | None = None
    """Prompts of one topic are one cluster in statistics; each its own by default."""

    @model_validator(mode="after")
    def _reserved(self) -> SuitePrompt:
        if self.group == "min":
            raise ValueError("the group name `min` is taken by the worst group")
        return self


class Suite(Document):
    """A suite with its prompts written out."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    split: str
    """`test`, `develop`, or `file` for a user's own."""
    answer_tokens: int = Field(default=128, ge=1)
    """Longest answer, in tokens."""
    chat_template: str = "model"
    """`model`: each model's own; `none`: the prompts as they are; anything else: a Jinja template."""
    prompts: tuple[SuitePrompt, ...] = Field(min_length=1)
    limited: bool = False
    """Whether prompts were left out by a limit."""

    @model_validator(mode="after")
    def _unique(self) -> Suite:
        twice = [name for name, count in Counter(p.id for p in self.prompts).items() if count > 1]
        if twice:
            raise ValueError(f"prompt id {twice[0]!r} stands twice")
        return self

    @property
    def digest(self) -> str:
        """sha256 of the suite with its prompts."""
        return digest(self.model_dump(mode="json"))

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups, in order of appearance."""
        return tuple(dict.fromkeys(p.group for p in self.prompts))


def load_suite(name: str | Path, split: Literal["test", "develop"] = "test", limit: int | None = None) -> Suite:
    """A suite by the name of a built-in one or the path of a YAML or JSON Lines file.

    Args:
        name: `formats`, `arithmetic`, or a path.
        split: of a built-in suite: `test` is what is reported, `develop` is for choosing settings. A file has no splits.
        limit: at most this many prompts, the same share of every group and tier.

    Raises:
        InputError: neither a built-in name nor a file; an unknown verifier or argument.
        SchemaError: the file breaks the schema, a prompt is missing, or an id stands twice.
        MissingError: a verifier needs data that is not on this machine.
    """
    if str(name) == "formats":
        suite = _formats(split)
    elif str(name) == "arithmetic":
        suite = _arithmetic(split)
    elif Path(name).is_file():
        suite = _from_file(Path(name))
    else:
        raise InputError(f"suite {name!s}", expected=f"a file, or one of {', '.join(BUILTIN)}", found="neither")
    return suite if limit is None or limit >= len(suite.prompts) else _limited(suite, limit)


# ---------------------------------------------------------------------------------------------------------------- built in
def _formats(split: Literal["test", "develop"]) -> Suite:
    prompts: list[SuitePrompt] = []
    tokens = 0
    for name in material()["formats"]:
        verifier, longest = _judged(name)
        tokens = max(tokens, longest)
        unseen = format_prompts(name, split, "unseen")
        rows = format_prompts(name, split) + unseen[: len(unseen) // 2]
        prompts += [_builtin(row, f"{name}.{row.tier}.{row.topic}", name, verifier) for row in rows]
    return Suite(name="formats", split=split, answer_tokens=tokens, prompts=tuple(prompts))


def _arithmetic(split: Literal["test", "develop"]) -> Suite:
    verifier, tokens = _judged("arithmetic")
    tiers: tuple[Tier, ...] = ("seen", "unseen")
    prompts = []
    for row in [row for tier in tiers for row in arithmetic_prompts(split, SUMS[tier], tier)]:
        low, high = (int(operand) for operand in row.topic.split(","))
        group = "addition" if row.arguments["answer"] == low + high else "subtraction"
        prompts.append(_builtin(row, f"{group}.{row.tier}.{low}.{high}", group, verifier))
    return Suite(name="arithmetic", split=split, answer_tokens=tokens, prompts=tuple(prompts))


def _judged(name: str) -> tuple[Verifier, int]:
    """The verifier of a built-in behaviour and its longest answer, in tokens."""
    behavior = load_behavior(name)
    if behavior.verifier is None:
        raise SchemaError(f"{name}.yaml", expected="a verifier", found="none")
    return behavior.verifier, behavior.answer_tokens


def _builtin(row: Prompt, name: str, group: str, verifier: Verifier) -> SuitePrompt:
    return SuitePrompt(
        id=name, prompt=row.text, verifier=verifier, arguments=row.arguments, group=group, tier=row.tier, topic=row.topic
    )


def _limited(suite: Suite, limit: int) -> Suite:
    """Takes prompts from every group and tier in turn; the order of those taken stays."""
    if limit < 1:
        raise InputError("limit", expected="at least 1", found=str(limit))
    cells: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, prompt in enumerate(suite.prompts):
        cells[prompt.tier, prompt.group].append(i)
    ordered = [members for _, members in sorted(cells.items(), key=lambda cell: cell[0][0])]  # the seen tier first
    turns = sorted((turn, c, i) for c, members in enumerate(ordered) for turn, i in enumerate(members))
    kept = sorted(i for _, _, i in turns[:limit])
    return suite.model_copy(update={"prompts": tuple(suite.prompts[i] for i in kept), "limited": True})


# ------------------------------------------------------------------------------------------------------------------- files
def _from_file(path: Path) -> Suite:
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
    verifier = row.get("verifier", default)
    if verifier is None:
        raise SchemaError(where, expected="a verifier", found="none", fix="give the prompt or the file one")
    verifier = {"name": verifier} if isinstance(verifier, str) else verifier
    return row | {"id": str(row.get("id", number)), "verifier": verifier}


def _check(prompt: SuitePrompt, where: str) -> None:
    """The verifier of a prompt runs: judged once on a probe, so that a wrong argument is found before any answer is made."""
    try:
        check_verifier(prompt.verifier)
        check_arguments(prompt.verifier, prompt.arguments)
        verify(prompt.verifier, prompt.prompt, "A probe: 1 answer.", prompt.arguments)
    except MissingError:
        raise
    except MechmergeError as error:
        raise InputError(f"{where}: {error}") from None
    except Exception as error:
        raise InputError(where, expected="a verifier that runs", found=f"{type(error).__name__}: {error}") from None
