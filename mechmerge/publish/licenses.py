"""Licences of known parents: enough to work out that of a merge when all parents agree, and nothing beyond that.

The table holds the demo's family alone (SmolLM2, released under Apache-2.0 throughout). Any other parent, an adapter or a local
folder has no known licence: the user or the pipeline file must name one. A licence is never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from mechmerge.errors import InputError
from mechmerge.models.references import ModelId

KNOWN = {
    r"demo:smollm2-135m-instruct": "apache-2.0",
    r"HuggingFaceTB/SmolLM2-(135M|360M|1\.7B)(-Instruct)?": "apache-2.0",
}
"""Pattern of a model's whole name → its licence, as the Hub writes it."""


def license_of(model: ModelId) -> str | None:
    """The licence of a parent, or None where it is not known."""
    return next((name for pattern, name in KNOWN.items() if re.fullmatch(pattern, model.name)), None)


def license_of_merge(parents: Iterable[ModelId], given: str | None) -> str:
    """The licence that the card names.

    Args:
        parents: base and experts.
        given: what the user says; it wins.

    Raises:
        InputError: none given, and the parents' are not all known or differ.
    """
    if given:
        return given
    known = {model.name: license_of(model) for model in parents}
    distinct = set(known.values())
    if len(distinct) == 1 and None not in distinct:
        return next(name for name in distinct if name is not None)
    found = ", ".join(f"{name}: {license or 'unknown'}" for name, license in known.items())
    raise InputError(
        "licence of the merge",
        expected="parents under one known licence",
        found=found,
        fix="pass --license NAME, or set `license:` in the pipeline",
    )
