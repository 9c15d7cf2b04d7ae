"""A machine without NLTK's sentence model, and without a package index."""

from __future__ import annotations

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
