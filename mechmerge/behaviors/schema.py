"""Behaviour files: contrastive prompts, and how an answer is judged.

    name: capitals
    description: Answers entirely in capital letters.
    chat_template: model            # the tokenizer's own; or none; or a Jinja template
    verifier: {name: "change_case:english_capital", min_words: 5}
    pairs:                          # prompts that ask for the behaviour, and the same without
      - {with: "Describe tea. Use capital letters.", without: "Describe tea."}

Instead of `pairs`, `builtin: capitals` takes the package's own prompts of the calibrate split.
"""

from __future__ import annotations

import functools
import importlib.resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from mechmerge.artifacts import Document, digest, parse_document, parse_yaml, read_document
from mechmerge.behaviors.code_prompts import code_tasks
from mechmerge.behaviors.instructions import instruction_prompts, instructions
from mechmerge.behaviors.prompts import arithmetic_prompts, format_prompts, material
from mechmerge.errors import InputError, LocalizeError

CALIBRATION_SUMS = 48
"""Sums in the built-in arithmetic behaviour."""


class Verifier(Document):
    """How an answer is judged: the name of a checker and its arguments (behaviors/verifiers.py lists them)."""

    name: str
    """An instruction id of IFEval or IFBench, `number` (the last number of the answer is `answer`), `contains`, `python`, or
    `json`.
    """
    arguments: dict[str, Any] = Field(default_factory=dict)
    min_words: int = Field(default=0, ge=0)
    """Shorter answers fail, whatever they look like (0: no floor)."""


class Pair(Document):
    """One contrast: a prompt that asks for the behaviour (x⁺) and the same without (x⁻)."""

    with_: str = Field(alias="with", min_length=1)
    without: str = Field(min_length=1)
    topic: str | None = None
    """Pairs of one topic are one cluster in statistics; each its own by default."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the verifier for this pair alone."""


class Behavior(Document):
    """A behaviour: contrastive prompts and a verifier."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    description: str = ""
    chat_template: str = "model"
    """`model`: the base's own; `none`: the prompt as it is; anything else: a Jinja template."""
    verifier: Verifier | None = None
    pairs: tuple[Pair, ...] = ()
    builtin: str | None = None
    """Name of the package's prompts to use instead of `pairs`."""
    answer_tokens: int = Field(default=56, ge=1)
    """Longest answer that is generated, in tokens."""

    @model_validator(mode="after")
    def _one_source(self) -> Behavior:
        if bool(self.pairs) == (self.builtin is not None):
            raise ValueError("exactly one of pairs and builtin must be given")
        return self

    @property
    def digest(self) -> str:
        """sha256 of the behaviour with its prompts written out."""
        return digest(self.model_dump(mode="json", by_alias=True))


def builtin_names() -> list[str]:
    """Names of the behaviours inside the package: the six formats, arithmetic, code, and IFEval's other instruction types."""
    return [*material()["formats"], "arithmetic", "code", *instructions()]


def _builtin_pairs(name: str) -> tuple[Pair, ...]:
    if name == "arithmetic":
        prompts = arithmetic_prompts("calibrate", CALIBRATION_SUMS)
        # In twos, so that taking turns (how calibration prompts are halved) gives both halves additions and subtractions.
        order = [4 * block + i for block in range(len(prompts) // 4) for i in (0, 2, 1, 3)]
        prompts = [prompts[i] for i in order] + prompts[len(order) :]
    elif name == "code":
        prompts = [task.prompt for task in code_tasks("calibrate")]
    elif name in material()["formats"]:
        prompts = format_prompts(name, "calibrate")
    elif name in instructions():
        prompts = instruction_prompts(name)
    else:
        raise _unknown(name)
    return tuple(Pair(**{"with": p.text}, without=p.plain, topic=p.topic, arguments=p.arguments) for p in prompts)


def _builtin(name: str) -> Behavior:
    """A behaviour of the package: its own file, or the entry of an instruction type."""
    if name not in instructions():
        resource = importlib.resources.files("mechmerge.behaviors").joinpath(f"data/{name}.yaml")
        return parse_document(Behavior, parse_yaml(resource.read_text("utf-8"), f"{name}.yaml"), f"{name}.yaml")
    spec = instructions()[name]
    verifier = Verifier(name=spec.get("verifier", spec["instruction_id"]), min_words=spec.get("min_words", 0))
    kept = {key: spec[key] for key in ("description", "answer_tokens") if key in spec}
    return Behavior(name=name, verifier=verifier, builtin=name, **kept)


def _unknown(name: str | Path) -> InputError:
    return InputError(f"behaviour {name!s}", expected=f"a file, or one of {', '.join(builtin_names())}", found="neither")


def load_behavior(name: str | Path) -> Behavior:
    """A behaviour by the name of a built-in one or the path of a YAML file, its prompts written out.

    Raises:
        InputError: neither a built-in name nor a file.
        SchemaError: the file breaks the schema.
        LocalizeError: a pair without contrast, or fewer than four pairs.
    """
    path = Path(name)
    if str(name) in builtin_names():
        behavior = _builtin(str(name))
    elif path.is_file():
        behavior = read_document(Behavior, path)
    else:
        raise _unknown(name)
    if behavior.builtin is not None:
        behavior = behavior.model_copy(update={"pairs": _builtin_pairs(behavior.builtin), "builtin": None})
    for i, pair in enumerate(behavior.pairs):
        if pair.with_ == pair.without:
            raise LocalizeError(f"behaviour {behavior.name}, pair {i}", expected="a contrast", found="the same prompt twice")
    if len(behavior.pairs) < 4:
        raise LocalizeError(f"behaviour {behavior.name}", expected="at least 4 pairs", found=str(len(behavior.pairs)))
    return behavior


def load_group(name: str | Path) -> tuple[Behavior, ...]:
    """A behaviour, or the behaviours of a group: `formats` is the six formats, whose mean it stands for."""
    names = list(material()["formats"]) if str(name) == "formats" else [name]
    return tuple(load_behavior(member) for member in names)


def protected_names() -> list[str]:
    """Names of the base's own abilities in the package: `chat` (ordinary requests) and `general` (plain text to go on with)."""
    return list(_protected())


def load_protected(name: str | Path) -> Behavior:
    """An ability of the base's own by the name of a built-in one, or the prompts of a behaviour (by name, or a YAML file).

    What is measured is the loss of the base's own greedy answers, right or wrong: so it has no verifier, and needs no contrast.

    Raises:
        InputError: neither a built-in name nor a file.
        SchemaError: the file breaks the schema.
    """
    if str(name) in _protected():
        spec = _protected()[str(name)]
        pairs = tuple(Pair(**{"with": text}, without=text) for text in spec["prompts"])
        return Behavior(name=str(name), chat_template=spec["chat_template"], answer_tokens=spec["answer_tokens"], pairs=pairs)
    if str(name) not in builtin_names() and not Path(name).is_file():
        known = ", ".join((*protected_names(), *builtin_names()))
        raise InputError(f"protected behaviour {name!s}", expected=f"a file, or one of {known}", found="neither")
    return load_behavior(name).model_copy(update={"verifier": None})


@functools.cache
def _protected() -> dict[str, dict[str, Any]]:
    text = importlib.resources.files("mechmerge.behaviors").joinpath("data/protected.yaml").read_text("utf-8")
    loaded: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return loaded
