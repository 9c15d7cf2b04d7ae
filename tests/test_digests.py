"""Digests of large files are remembered as long as the file is the same."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from mechmerge.artifacts import sha256_file
from mechmerge.models.digests import file_digest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MECHMERGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "digests"


def settled(path: Path) -> None:
    """Waits until the file has been left alone for long enough."""
    while time.time() - path.stat().st_ctime < 2.1:
        time.sleep(0.1)


def test_a_digest_is_kept_and_a_changed_file_has_another(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    assert file_digest(file) == sha256_file(file)
    assert not cache.exists(), "a file that was just written may change within the same tick of the clock"
    settled(file)
    first = file_digest(file)
    (record,) = cache.iterdir()
    record.write_text(record.read_text().replace(first, "f" * 64))
    assert file_digest(file) == "f" * 64, "it is not computed again"
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    file.write_bytes(b"two")
    os.utime(file, ns=times)
    assert file_digest(file) == sha256_file(file), "same size, same mtime, another ctime"
    other = tmp_path / "other"
    other.write_bytes(b"one")
    os.replace(other, file)
    assert file_digest(file) == sha256_file(file)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"state": 1, "sha256": "x"}'])
def test_a_broken_record_is_not_believed(tmp_path: Path, cache: Path, content: str) -> None:
    file = tmp_path / "weights"
    file.write_bytes(b"one")
    settled(file)
    file_digest(file)
    (record,) = cache.iterdir()
    record.write_text(content)
    assert file_digest(file) == sha256_file(file)
    assert json.loads(record.read_text())["sha256"] == sha256_file(file)
