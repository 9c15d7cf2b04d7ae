"""Licence and languages of a merge, as far as its parents say them.

What a parent's own card on the Hub says is read where a lookup is given (`license`, `language`); without one, or for a model
that is not on the Hub, the table below is all that is known: the demo's family (SmolLM2, Apache-2.0 throughout, English). A
licence is never guessed: where the parents' are not all known, or differ, the user or the pipeline file must name one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from mechmerge.errors import InputError
from mechmerge.models.hub_errors import is_hubs
from mechmerge.models.references import ModelId


class ParentFacts(NamedTuple):
    """What a card says of a model."""

    license: str | None
    """As the Hub writes it (`apache-2.0`); None where it is not said, or is `other`."""
    languages: tuple[str, ...]
    """ISO 639 codes."""


Lookup = Callable[[str, str | None], ParentFacts | None]
"""(identifier on the Hub, revision) → what its card says, None where it cannot be read."""

KNOWN = {
    r"demo:smollm2-135m-instruct": ParentFacts("apache-2.0", ("en",)),
    r"HuggingFaceTB/SmolLM2-(135M|360M|1\.7B)(-Instruct)?": ParentFacts("apache-2.0", ("en",)),
}
"""Pattern of a model's whole name → what is known of it."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
NOTHING = ParentFacts(None, ())


def hub_lookup(endpoint: str | None = None, token: str | None = None) -> Lookup:
    """Reads the cards of models on the Hub; what is not there, not ours to see or out of reach is not known."""
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token)

    def look(name: str, revision: str | None) -> ParentFacts | None:
        try:
            card = api.model_info(name, revision=revision).card_data
        except Exception as error:
            if is_hubs(error):
                return None
            raise
        if card is None:
            return None
        languages = card.language if isinstance(card.language, list) else [card.language] if card.language else []
        known = card.license if isinstance(card.license, str) and card.license != "other" else None
        return ParentFacts(known, tuple(str(language) for language in languages))

    return look


def parts_of(model: ModelId) -> list[tuple[str, str | None]]:
    """A model and the adapters merged into it, each with its revision where that is clear."""
    names = model.name.split("+")
    revisions = (model.revision or "").split("+")
    return list(zip(names, revisions if len(revisions) == len(names) else [None] * len(names), strict=True))


def facts_of(name: str, revision: str | None, lookup: Lookup | None = None) -> ParentFacts:
    """What is known of one model or adapter."""
    found = next((facts for pattern, facts in KNOWN.items() if re.fullmatch(pattern, name)), None)
    if found is None and lookup is not None and HUB_ID.fullmatch(name):
        found = lookup(name, revision or None)
    return found or NOTHING


def license_of(model: ModelId, lookup: Lookup | None = None) -> str | None:
    """The licence of a parent, or None where it is not known, or not the same for the model and its adapters."""
    found = {facts_of(name, revision, lookup).license for name, revision in parts_of(model)}
    return found.pop() if len(found) == 1 else None


def license_of_merge(parents: Iterable[ModelId], given: str | None, lookup: Lookup | None = None) -> str:
    """The licence that the card names.

    Args:
        parents: base and experts.
        given: what the user says; it wins.
        lookup: reads cards on the Hub.

    Raises:
        InputError: none given, and the parents' are not all known or differ.
    """
    if given:
        return given
    known = {model.name: license_of(model, lookup) for model in parents}
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


def languages_of_merge(parents: Iterable[ModelId], lookup: Lookup | None = None) -> list[str]:
    """Languages that any parent's card names, each once, in order; empty where none says any."""
    parts = [part for model in parents for part in parts_of(model)]
    found = [language for name, revision in parts for language in facts_of(name, revision, lookup).languages]
    return list(dict.fromkeys(found))
