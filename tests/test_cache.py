"""The cache: what lies in it, who uses it, and that pruning never takes what a running process needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from mechmerge.artifacts import lock
from mechmerge.cli.main import cli
from mechmerge.errors import InputError
from mechmerge.models.cache import cache_folder, claim, hold, hold_if_cached, use_lock
from mechmerge.models.cache_entries import entries, parse_age, prune
from mechmerge.models.references import Model, resolve
from tests.tiny import tiny_adapter, tiny_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, set for this process and its children."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MECHMERGE_CACHE", str(folder))
    return folder


def made(cache: Path, name: str, *, age: float = 0.0) -> Path:
    """An entry of 100 bytes, last used some seconds ago."""
    entry = cache / name
    entry.mkdir(parents=True)
    (entry / "model.safetensors").write_bytes(b"x" * 100)
    os.utime(entry, (time.time() - age,) * 2)
    return entry


HOLDER = """
import sys
from pathlib import Path
from mechmerge.models.cache import hold
hold(Path(sys.argv[1]))
print("holding", flush=True)
sys.stdin.read()
"""


class Holder:
    """Another process that uses an entry."""

    def __init__(self, entry: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(entry)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "holding\n"

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()


def test_ages() -> None:
    assert [parse_age(text) for text in ("30d", "12h", "2w", "0", "1.5m", "90s", "1")] == [
        2592000,
        43200,
        1209600,
        0,
        90,
        90,
        86400,
    ]
    for text in ("", "soon", "-1d", "1y", "1 d 2"):
        with pytest.raises(InputError, match="age"):
            parse_age(text)


def test_an_empty_cache(cache: Path) -> None:
    assert entries() == []
    assert prune(0) == ([], [])
    assert not cache.exists()


def test_what_is_not_old_enough_stays(cache: Path) -> None:
    old, new = made(cache, "materialised/old", age=100), made(cache, "materialised/new", age=10)
    assert [entry.path for entry in prune(50, dry_run=True)[0]] == [old]
    assert old.exists()
    removed, kept = prune(50)
    assert ([entry.path for entry in removed], kept) == ([old], [])
    assert not old.exists()
    assert new.exists()
    assert sorted(p.name for p in (cache / "materialised").iterdir()) == ["new"], "no lock, nothing half removed is left"


def test_what_a_process_uses_or_makes_is_never_removed(cache: Path) -> None:
    used, made_now, free = (made(cache, f"materialised/{name}", age=100) for name in ("used", "making", "free"))
    with Holder(used), lock(made_now.with_suffix(".lock"), "an entry"):
        os.utime(used, (0, 0))
        assert {entry.path.name: entry.in_use for entry in entries()} == {"used": True, "making": True, "free": False}
        removed, kept = prune(50)
        assert [entry.path for entry in removed] == [free]
        assert {entry.path for entry in kept} == {used, made_now}
    assert used.exists()
    assert {entry.path for entry in prune(50)[0]} == {used, made_now}, "once its user is gone, even by SIGKILL"


def test_what_this_process_uses_is_not_removed_either(cache: Path) -> None:
    entry = made(cache, "aligned/mine")
    hold(entry)
    assert prune(-1)[1][0].path == entry
    assert entry.exists()


def test_whoever_comes_while_it_is_removed_waits_and_finds_it_gone(cache: Path) -> None:
    entry = made(cache, "materialised/one")
    code = HOLDER.replace('"holding"', "'there' if Path(sys.argv[1]).exists() else 'gone'")
    with claim(entry) as free:
        assert free
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(entry)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        # Until it waits for the lock that we hold, or is through (which it must not be).
        waiting = f"/proc/{process.pid}/wchan"
        for _ in range(600):
            if process.poll() is not None or "lock" in Path(waiting).read_text():
                break
            time.sleep(0.05)
        (entry / "model.safetensors").unlink()
        entry.rmdir()
    assert process.stdout is not None
    assert process.stdout.readline() == "gone\n"
    with claim(entry) as free:
        assert not free, "it holds the lock of the file that is there now, not of the one that was removed"
    process.kill()
    process.communicate()
    assert use_lock(entry).exists()


def test_a_materialised_model_is_listed_with_who_refers_to_it(cache: Path, tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    adapter = tiny_adapter(base, tmp_path / "adapter")
    model = resolve(f"{base}+{adapter}")
    found = {entry.kind: entry for entry in entries() if entry.kind != "known"}
    assert found["materialised"].path == model.path
    assert found["materialised"].refers == ("base+adapter",)
    assert found["materialised"].in_use, "by us"
    assert found["materialised"].bytes == sum(p.stat().st_size for p in model.path.rglob("*"))
    records = [entry for entry in entries() if entry.kind == "known"]
    assert {entry.refers[0].split(" in ")[0] for entry in records} == {"base", "base+adapter"}
    # A use makes it young again, without writing into it.
    os.utime(model.path, (0, 0))
    resolve(f"{base}+{adapter}")
    assert time.time() - next(e for e in entries() if e.kind == "materialised").used < 100


def test_pruned_models_are_made_again_with_the_same_bytes(cache: Path, tmp_path: Path) -> None:
    base = tiny_model(tmp_path / "base")
    adapter = tiny_adapter(base, tmp_path / "adapter")
    code = "import sys; from mechmerge.models.references import resolve; print(resolve(sys.argv[1]).id.digest)"

    def digest() -> str:
        done = subprocess.run([sys.executable, "-c", code, f"{base}+{adapter}"], capture_output=True, text=True, check=True)
        return done.stdout

    first = digest()
    assert sorted(entry.kind for entry in prune(0)[0] if entry.kind != "digests") == ["known", "known", "materialised"]
    assert entries() == []
    assert digest() == first


def test_leftovers_of_dead_processes_go_and_what_is_not_ours_stays(cache: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead = made(cache, f"materialised/.half.partial-{process.pid}")
    alive = made(cache, f"materialised/.half.partial-{os.getppid()}")
    foreign = made(cache, "somebody-elses", age=1000)
    assert [entry.kind for entry in entries()] == ["other"]
    prune(0)
    assert (dead.exists(), alive.exists(), foreign.exists()) == (False, True, True)


def test_digests_are_told_in_one_line_and_pruned_one_by_one(cache: Path) -> None:
    (cache / "digests").mkdir(parents=True)
    for age in (5, 50):
        record = cache / "digests" / f"{age}.json"
        record.write_text("{}")
        os.utime(record, (time.time() - age * 86400,) * 2)
    assert "2 files" in CliRunner().invoke(cli, ["cache", "list"]).output
    assert [entry.path.name for entry in prune(parse_age("30d"))[0]] == ["50.json"]
    assert [entry.path.name for entry in entries()] == ["5.json"]


def test_records_that_cannot_be_read_do_no_harm(cache: Path) -> None:
    (cache / "known").mkdir(parents=True)
    for name, text in {"a": "{", "b": "[]", "c": '{"name": 1}', "d": '{"name": "m", "path": "/nowhere"}'}.items():
        (cache / "known" / f"{name}.json").write_text(text)
    assert [entry.refers for entry in entries()][-1] == ("m in /nowhere (gone)",)
    assert len(prune(0)[0]) == 4


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_cache_that_may_only_be_read(cache: Path) -> None:
    entry = made(cache, "models/one")
    (cache / "models").chmod(0o500)
    hold(entry)
    assert not use_lock(entry).exists()
    (cache / "models").chmod(0o700)


def test_only_what_lies_in_the_cache_is_held(cache: Path, tmp_path: Path) -> None:
    hold_if_cached(tmp_path / "elsewhere")
    hold_if_cached(cache)
    assert not (tmp_path / ".elsewhere.use").exists()
    entry = made(cache, "materialised/one")
    hold_if_cached(entry / "model.safetensors")
    assert use_lock(entry).exists()


def test_the_command(cache: Path) -> None:
    made(cache, "materialised/old", age=40 * 86400)
    made(cache, "models/new")
    listed = CliRunner().invoke(cli, ["cache", "list"]).output
    assert "40 days ago" in listed
    assert "lately" in listed
    found = json.loads(CliRunner().invoke(cli, ["cache", "list", "--format", "json"]).output)["cache"]
    assert [(row["kind"], row["bytes"], row["in_use"]) for row in found] == [
        ("materialised", 100, False),
        ("models", 100, False),
    ]
    assert "would remove 1 entries, 100 B; 0 in use" in CliRunner().invoke(cli, ["cache", "prune", "--dry-run"]).output
    assert "removed 1 entries" in CliRunner().invoke(cli, ["cache", "prune"]).output
    assert [entry.path.name for entry in entries()] == ["new"]


def test_the_session_keeps_its_own(base: Model) -> None:
    assert cache_folder().is_dir()
    assert not base.path.is_relative_to(cache_folder())
