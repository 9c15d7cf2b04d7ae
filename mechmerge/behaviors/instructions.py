"""Built-in behaviours for IFEval's instruction types (https://arxiv.org/abs/2311.07911) beyond the six formats.

One mechanism makes them all from `data/instructions.yaml`: a plain request about a topic of the split, followed by a wording
into which the arguments of a case are written. The prompts are the package's own; none of IFEval's is used.
"""

from __future__ import annotations

import functools
import importlib.resources
from typing import Any

import yaml

from mechmerge.behaviors.prompts import Prompt, Split, material, requests


@functools.cache
def instructions() -> dict[str, dict[str, Any]]:
    """The parsed `data/instructions.yaml`: name → what its behaviour is made of."""
    text = importlib.resources.files("mechmerge.behaviors").joinpath("data/instructions.yaml").read_text("utf-8")
    loaded: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return loaded


def behavior_of_instruction() -> dict[str, str]:
    """IFEval instruction id → name of the built-in behaviour, all 25: the six formats, then the others."""
    return {spec["instruction_id"]: name for name, spec in (material()["formats"] | instructions()).items()}


def instruction_prompts(name: str, split: Split = "calibrate") -> list[Prompt]:
    """The prompts of one instruction type, one a topic of the split; wordings and cases take turns.

    Args:
        name: one of `instructions()`.
        split: whose topics are taken. The built-in behaviours take `calibrate`: no expert of ours was trained on it.
    """
    spec = instructions()[name]
    wordings, cases, own = spec["wordings"], spec.get("cases", [{}]), spec.get("requests")
    prompts = []
    for i, (topic, plain) in enumerate(requests(split)):
        if own:
            plain = own[i % len(own)].format(topic)
        case = {key: _filled(value, plain) for key, value in cases[i % len(cases)].items()}
        wording = wordings[i % len(wordings)].format(**{key: _written(value) for key, value in case.items()})
        arguments = {key: value for key, value in case.items() if key != "shown"}
        prompts.append(Prompt(f"{plain} {wording}", plain, name, "seen", topic, arguments))
    return prompts


def _filled(value: Any, plain: str) -> Any:
    return value.format(plain=plain) if isinstance(value, str) else value


def _written(value: Any) -> str:
    """An argument as a sentence holds it: words one after the other, the last behind an `and`."""
    if isinstance(value, list):
        return " and ".join(part for part in (", ".join(f"'{word}'" for word in value[:-1]), f"'{value[-1]}'") if part)
    return str(value)
