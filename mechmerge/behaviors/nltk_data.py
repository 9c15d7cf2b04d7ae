"""Data of NLTK that checkers of IFEval and IFBench need and no package of theirs ships: sentence model, stop words, tagger.

It is looked for where NLTK looks, then in our cache; else `punkt_tab` and `stopwords` are taken from the PyPI wheel of
llama-index-core, which carries them (nothing of the wheel is installed or run). The English files are enough, and their digests
are pinned. The tagger is in no package that we know of: where it is missing, the error says how to get it. The data is
distributed by https://github.com/nltk/nltk_data; `punkt_tab` is Kiss and Strunk's (https://aclanthology.org/J06-4003).
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mechmerge.artifacts import atomic_folder, lock
from mechmerge.errors import MissingError
from mechmerge.models.cache import cache_folder, hold
from mechmerge.models.wheels import download_wheel

Data = Literal["punkt_tab", "stopwords", "averaged_perceptron_tagger_eng"]
REQUIREMENT = "llama-index-core==0.14.25"
WHEEL_SHA256 = "caa7d9c5ac9b13dc33400cf8d5e92e689b6d1e4497eb9bfa50d6f52ca2eb22a1"
INSIDE = "llama_index/core/_static/nltk_cache"
"""The wheel's folder of NLTK data."""


class Place(NamedTuple):
    """Where a kind of data lies."""

    folder: str
    """Under a folder of NLTK data."""
    probe: str
    """What NLTK must find there."""
    files: Mapping[str, str]
    """File → sha256 of what the wheel holds; empty where it holds nothing."""


PLACES: dict[Data, Place] = {
    "punkt_tab": Place(
        "tokenizers/punkt_tab/english",
        "tokenizers/punkt_tab/english/",
        {
            "abbrev_types.txt": "92a3e070f43d9b4c5534758ca40ad7343b04e7e29bfe0c2eb658a39445a4f779",
            "collocations.tab": "8e2da1225e4dd2cc9dba261ee231ccb134859e21b46006e7f472c5ee269af0cf",
            "ortho_context.tab": "4bbcca25ed3d3f06c02402abf8419b9f033b8adc06e7b482eca4e45f81a5dc4c",
            "sent_starters.txt": "f3f8535483e1dba487241b764945168123bca3209a9645e59acd1225dc76edac",
        },
    ),
    "stopwords": Place(
        "corpora/stopwords",
        "corpora/stopwords",
        {"english": "f6d005956f407dbc6ea32e5ff0c7e8e6f71488d3239b9023efdc7fc139d6375b"},
    ),
    "averaged_perceptron_tagger_eng": Place(
        "taggers/averaged_perceptron_tagger_eng", "taggers/averaged_perceptron_tagger_eng/", {}
    ),
}


def ensure(name: Data, what: str = "") -> None:
    """Makes NLTK find a kind of data, fetching it into our cache where it is nowhere yet (12 MB of download).

    Args:
        name: the data.
        what: what needs it, for the error (default: the data itself).

    Raises:
        MissingError: it is nowhere, and the package index cannot be reached or has none.
    """
    _ensured(name, cache_folder() / "nltk", what or f"NLTK's {name}")


@functools.cache
def _ensured(name: Data, home: Path, what: str) -> None:
    import nltk

    if _found(nltk, name):
        return
    place = PLACES[name]
    folder = home / place.folder
    hold(home)
    if not folder.is_dir():
        if not place.files:
            raise MissingError(what, expected=f"NLTK's {name}", found="none", fix=_by_hand(name))
        home.mkdir(parents=True, exist_ok=True)
        with lock(home / f"{name}.lock", "NLTK data"):
            if not folder.is_dir():
                _fetch(name, folder, what)
    if str(home) not in nltk.data.path:
        nltk.data.path.append(str(home))
    if not _found(nltk, name):
        raise MissingError(f"NLTK's {name}", expected="data that NLTK reads", found=str(folder), fix="remove that folder")


def present(name: Data) -> bool:
    """Whether a kind of data is here already: where NLTK looks, or in our cache. Fetches nothing."""
    import nltk

    return _found(nltk, name) or (cache_folder() / "nltk" / PLACES[name].folder).is_dir()


def _found(nltk: Any, name: Data) -> bool:
    probe = PLACES[name].probe
    for resource in (probe, f"{probe.rstrip('/')}.zip"):
        try:
            nltk.data.find(resource)
        except LookupError:
            continue
        return True
    return False


def _by_hand(name: Data) -> str:
    return f"run `python -m nltk.downloader {name}` where there is a network, and copy nltk_data here"


def _fetch(name: Data, folder: Path, what: str) -> None:
    place = PLACES[name]
    with tempfile.TemporaryDirectory() as scratch:
        try:
            wheel = download_wheel(REQUIREMENT, WHEEL_SHA256, Path(scratch), f"NLTK's {name}")
        except MissingError as error:
            fix = f"check the network, or {_by_hand(name)}"
            raise MissingError(what, expected=f"NLTK's {name}", found=str(error), fix=fix) from None
        with zipfile.ZipFile(wheel) as archive:
            held = {file: archive.read(f"{INSIDE}/{place.folder}/{file}") for file in place.files}
    for file, content in held.items():
        if hashlib.sha256(content).hexdigest() != place.files[file]:
            raise MissingError(f"{name} {file}", expected=f"sha256 {place.files[file][:12]}…", found="another file")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as made:
        for file, content in held.items():
            (made / file).write_bytes(content)
