"""Experts and behaviours as `effects` and `rounds` take them on the command line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mechmerge.cli.common import named, named_numbers
from mechmerge.errors import InputError
from mechmerge.progress import Progress

if TYPE_CHECKING:
    from mechmerge.localize.calibration import BehaviorRow
    from mechmerge.models.references import Model


def open_experts(texts: Sequence[str], progress: Progress) -> dict[str, Model]:
    """Resolves [NAME=]EXPERT arguments; a name is made from the model's where none is given.

    Raises:
        InputError: a name twice, or not a reference.
    """
    from mechmerge.models.references import resolve
    from mechmerge.recipe.sources import expert_name

    models: dict[str, Model] = {}
    for text in texts:
        name, sign, reference = text.partition("=")
        model = resolve(reference if sign else text, progress=progress)
        name = name if sign else expert_name(model.id)
        if name in models:
            raise InputError("EXPERT", expected="each name once", found=f"{name} twice", fix="write NAME=EXPERT")
        models[name] = model
    return models


def open_folders(texts: Sequence[str]) -> dict[str, Path]:
    """The folders of NAME=MODEL options, whose models are references like everywhere else.

    Raises:
        InputError: no NAME=MODEL, or not a reference.
    """
    from mechmerge.models.references import resolve

    return {name: resolve(reference).path for name, reference in named(texts, "--model").items()}


def behavior_rows(behaviors: Sequence[str], weights: Sequence[str], protect: Sequence[str] = ()) -> list[BehaviorRow]:
    """Parses NAME=EXPERT behaviours, NAME=NUMBER weights and protected NAME[=NUMBER].

    Raises:
        InputError: a weight that is not a number, or of a behaviour that is not given.
    """
    from mechmerge.behaviors.schema import load_group, load_protected
    from mechmerge.localize.calibration import BASE, BehaviorRow

    owners, numbers = named(behaviors, "--behavior"), named_numbers(weights, "--weight")
    for name, number in numbers.items():
        if not (math.isfinite(number) and number > 0):
            raise InputError("--weight", expected="a positive number", found=f"{name}={number:g}")
    if unknown := numbers.keys() - owners.keys():
        raise InputError("--weight", expected=f"one of {', '.join(owners)}", found=", ".join(sorted(unknown)))
    rows = [BehaviorRow(Path(name).stem, load_group(name), expert, numbers.get(name, 1.0)) for name, expert in owners.items()]
    kept = named_numbers((text if "=" in text else f"{text}=1" for text in protect), "--protect")
    for name, number in kept.items():
        if not (math.isfinite(number) and number > 0):
            raise InputError("--protect", expected="a positive number", found=f"{name}={number:g}")
    return rows + [BehaviorRow(Path(name).stem, (load_protected(name),), BASE, number) for name, number in kept.items()]
