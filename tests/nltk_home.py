"""Machines without NLTK's data and without a package index, and small data that no package index has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest


def without_punkt(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """NLTK finds no data, our cache is empty, and pip reaches nothing."""
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setenv("MECHMERGE_CACHE", str(home))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")


@pytest.fixture(scope="session")
def small_nltk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Eight stop words, and a tagger that knows two words; one place a session, since NLTK keeps what it has read."""
    import nltk

    home = tmp_path_factory.mktemp("nltk_data")
    words, tagger = home / "corpora" / "stopwords", home / "taggers" / "averaged_perceptron_tagger_eng"
    words.mkdir(parents=True)
    (words / "english").write_text("the\nis\nof\na\nand\nto\nin\ntwo\n")
    tagger.mkdir(parents=True)
    tables = {"weights": {}, "tagdict": {"Run": "VB", "The": "DT"}, "classes": ["DT", "NN", "VB"]}
    for name, table in tables.items():
        (tagger / f"{tagger.name}.{name}.json").write_text(json.dumps(table))
    nltk.data.path.insert(0, str(home))
    yield
    nltk.data.path.remove(str(home))
