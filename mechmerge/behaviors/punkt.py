"""NLTK's sentence model `punkt_tab`, which two IFEval checkers split text with and no package of theirs ships.

It is looked for where NLTK looks, then in our cache; else it is taken from the PyPI wheel of llama-index-core, which carries
it (nothing of the wheel is installed or run). The four English files are enough, and their digests are pinned. The data is
Kiss and Strunk's (https://aclanthology.org/J06-4003), distributed by https://github.com/nltk/nltk_data.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from mechmerge.artifacts import atomic_folder, lock
from mechmerge.errors import MissingError
from mechmerge.models.cache import cache_folder
from mechmerge.models.wheels import download_wheel

REQUIREMENT = "llama-index-core==0.14.25"
WHEEL_SHA256 = "caa7d9c5ac9b13dc33400cf8d5e92e689b6d1e4497eb9bfa50d6f52ca2eb22a1"
INSIDE = "llama_index/core/_static/nltk_cache/tokenizers/punkt_tab/english"
FILES = {
    "abbrev_types.txt": "92a3e070f43d9b4c5534758ca40ad7343b04e7e29bfe0c2eb658a39445a4f779",
    "collocations.tab": "8e2da1225e4dd2cc9dba261ee231ccb134859e21b46006e7f472c5ee269af0cf",
    "ortho_context.tab": "4bbcca25ed3d3f06c02402abf8419b9f033b8adc06e7b482eca4e45f81a5dc4c",
    "sent_starters.txt": "f3f8535483e1dba487241b764945168123bca3209a9645e59acd1225dc76edac",
}


def ensure_punkt() -> None:
    """Makes NLTK find `punkt_tab`, fetching it into our cache where it is nowhere yet (5 MB of download).

    Raises:
        MissingError: it is nowhere, and the package index cannot be reached.
    """
    _ensured(cache_folder() / "nltk")


@functools.cache
def _ensured(home: Path) -> None:
    import nltk

    if _found(nltk):
        return
    folder = home / "tokenizers" / "punkt_tab" / "english"
    if not folder.is_dir():
        home.mkdir(parents=True, exist_ok=True)
        with lock(home / "punkt_tab.lock", "NLTK data"):
            if not folder.is_dir():
                _fetch(folder)
    nltk.data.path.append(str(home))
    if not _found(nltk):
        raise MissingError("NLTK's punkt_tab", expected="data that NLTK reads", found=str(folder), fix="remove that folder")


def _found(nltk: Any) -> bool:
    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        return False
    return True


def _fetch(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        try:
            wheel = download_wheel(REQUIREMENT, WHEEL_SHA256, Path(scratch), "NLTK's punkt_tab")
        except MissingError as error:
            fix = "check the network, or run `python -m nltk.downloader punkt_tab` where there is one and copy nltk_data here"
            raise MissingError("NLTK's punkt_tab", expected=REQUIREMENT, found=str(error), fix=fix) from None
        with zipfile.ZipFile(wheel) as archive:
            held = {name: archive.read(f"{INSIDE}/{name}") for name in FILES}
    for name, content in held.items():
        if hashlib.sha256(content).hexdigest() != FILES[name]:
            raise MissingError(f"punkt_tab {name}", expected=f"sha256 {FILES[name][:12]}…", found="another file")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as made:
        for name, content in held.items():
            (made / name).write_bytes(content)
