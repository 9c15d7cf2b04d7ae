"""Commands under faults of the machine: a sample of `benchmarks/faults.py`, and that it can find something.

Publishing is struck in `test_publish_faults.py`, by the same forks against the loopback Hub.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from mechmerge.artifacts import Units, Watch, atomic_file, atomic_folder, lock, make_once
from mechmerge.errors import InputError, MissingError, machine_error
from tests.faults.campaign import CHANGES, IMPORTS, Campaign, moments, replaced
from tests.faults.project import COMMANDS, Command
from tests.faults.strike import Kind
from tests.hub.runner import Runner

HOLDER = r"found process \d+ on \S+ since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC; wait for it or stop it"


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    with Campaign(tmp_path_factory.mktemp("faults")) as made:
        yield made


# ----------------------------------------------------------------------------------------------------------------- commands
@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_killed_at_five_moments(command: Command, campaign: Campaign) -> None:
    """Three among those at which the command touches the disk, two by the clock."""
    verdicts = [campaign.struck(command, "kill", at) for at in moments(campaign.whole(command).moments["write"], 3, seed=4)]
    assert [verdict.code for verdict in verdicts] == [-signal.SIGKILL] * 3
    verdicts += [campaign.by_clock(command, signal.SIGKILL, share) for share in (0.3, 0.8)]
    for verdict in verdicts:
        assert not verdict.problems, f"{verdict.case}: {verdict.problems}"


STAGES: tuple[Command, ...] = ("localize", "effects", "merge", "evaluate")
ENDS: dict[Kind, tuple[int, ...]] = {"interrupt": (130,), "full": (2, 4), "short": (0, 4), "unreadable": (0, 2, 4)}
"""Exit codes of a struck call. A file of few bytes may be all that a command writes, and an unreadable one of no importance."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENDS)
def test_other_faults_of_the_disk_and_ctrl_c(kind: Kind, campaign: Campaign) -> None:
    """Five of each, in the stages of a run."""
    for seed, command in enumerate((*STAGES, "merge")):
        count = campaign.whole(command).moments["read" if kind == "unreadable" else "write"]
        at = 9000 if kind == "short" else moments(count, 3, seed)[1]
        verdict = campaign.struck(command, kind, at)
        assert not verdict.problems, f"{verdict.case}: {verdict.problems}"
        assert verdict.code in ENDS[kind], f"{verdict.case}: {verdict.said}"


@pytest.mark.slow
def test_weights_that_change_while_they_are_read(campaign: Campaign) -> None:
    cases: list[tuple[Command, int]] = [("localize", 0), ("effects", 1), ("merge", 0), ("evaluate", 2), ("localize", 2)]
    for command, which in cases:
        at = moments(campaign.whole(command).moments["write"], 4, seed=1)[1]
        verdict = campaign.changed(command, at, CHANGES[which])
        assert not verdict.problems, f"{verdict.case}: {verdict.problems}"


@pytest.mark.slow
def test_a_second_call_is_told_who_holds_the_first(campaign: Campaign) -> None:
    with Runner(campaign.environment, campaign.root / "second", IMPORTS) as other:
        for command in COMMANDS:
            at = campaign.whole(command).moments["write"] - (3 if command != "merge" else 6)
            second, first = campaign.beside(command, at, other)
            assert not first.problems, f"{first.case}: {first.problems}"
            assert first.code == 0
            assert second.code == 2, f"{command}: {second.err}"
            assert re.search(HOLDER, second.err), second.err


@pytest.mark.slow
def test_the_campaign_notices_what_is_wrong(campaign: Campaign) -> None:
    """The same checks find a leftover, a half file and another weight."""
    whole = campaign.whole("merge")
    campaign._fresh()
    (campaign.out / "model").mkdir()
    (campaign.out / "model" / "half.safetensors").write_bytes(b"half")
    (campaign.temporary / "left").write_text("over")
    done = campaign.call("merge")
    verdict = campaign._judge("merge", "a careless merge", done)
    assert any("under a final name" in problem and "half.safetensors" in problem for problem in verdict.problems)
    assert any("the second call" in problem for problem in verdict.problems)
    assert whole.code == 0


# -------------------------------------------------------------------------------------------------------------------- parts
def test_a_lock_names_its_holder_and_is_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with lock(path, "run x"):
        with pytest.raises(InputError, match=HOLDER.replace(r"process \d+", f"process {os.getpid()}")), lock(path, "run x"):
            pass
        assert path.exists(), "who was refused takes nothing away"
    assert not path.exists()
    path.write_text("4711 on somewhere since 2020-01-01 00:00:00 UTC")  # of a process that was killed
    with lock(path, "run x"):
        assert path.read_text().startswith(f"{os.getpid()} on ")
    assert not path.exists()


def test_a_lock_taken_while_its_file_is_removed_is_taken_anew(tmp_path: Path) -> None:
    """Two processes take turns at one lock many times; there is never a moment at which both hold it."""
    path, count = tmp_path / ".lock", tmp_path / "count"
    count.write_text("0")
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            done = 0
            while done < 200:
                try:
                    with lock(path, "turns"):
                        count.write_text(str(int(count.read_text()) + 1))
                        done += 1
                except InputError:
                    continue
                except BaseException:
                    os._exit(1)
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert count.read_text() == "400"


def test_what_is_made_once_leaves_no_lock(tmp_path: Path) -> None:
    folder, made = tmp_path / "entry", []

    def make() -> None:
        made.append(1)
        folder.mkdir()

    make_once(folder, "entry", make)
    make_once(folder, "entry", make)
    assert made == [1]
    folder.with_suffix(".lock").write_text("of one that was killed when it had made it")
    make_once(folder, "entry", make)
    with lock(folder.with_suffix(".lock"), "entry"):
        make_once(folder, "entry", make)  # it is there, whoever is about to let go
        folder.rmdir()
        with pytest.raises(InputError, match="entry: expected no other process"):
            make_once(folder, "entry", make)
    assert made == [1]
    assert list(tmp_path.iterdir()) == []


def test_a_watch_notices_every_change_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    for change in (
        lambda: path.write_bytes(b"other"),
        lambda: os.replace(_beside(path, b"abcde"), path),
        lambda: path.write_bytes(b"ab"),
    ):
        path.write_bytes(b"abcde")
        os.utime(path, ns=(1, 1))
        watch = Watch([path])
        watch.check()
        change()
        with pytest.raises(InputError, match="found a changed one; run the command again"):
            watch.check()
    watch = Watch([path])
    path.unlink()
    with pytest.raises(InputError, match="found nothing"):
        watch.check()


def _beside(path: Path, content: bytes) -> Path:
    other = path.with_name("other")
    other.write_bytes(content)
    os.utime(other, ns=(1, 1))
    return other


def test_a_unit_of_changed_inputs_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"abcdefgh")
    units = Units(tmp_path / "units", {"weights": "digest"}, Watch([path]).check)
    assert units.json("first", lambda: 1) == 1

    def compute() -> int:
        replaced(path)
        return 2

    with pytest.raises(InputError, match="a changed one"):
        units.json("second", compute)
    assert units.json("first", lambda: 3) == 1
    assert not list(tmp_path.rglob("second*"))


def test_a_unit_that_cannot_be_read_is_made_again(tmp_path: Path) -> None:
    import numpy as np

    units = Units(tmp_path, {})
    units.json("a", lambda: [1])
    units.arrays("b", lambda: {"x": np.ones(2)})
    for path in units.folder.iterdir():
        path.write_bytes(path.read_bytes()[:-3])
    assert units.json("a", lambda: [1]) == [1]
    assert units.arrays("b", lambda: {"x": np.ones(2)})["x"].tolist() == [1, 1]


FULL = "/x/y: expected room on the disk; found none left; free some, then run the same command again"
BROKEN = "/x: expected a disk that can be read and written; found an input/output error"
SHUT = "/x: expected a path that can be read and written; found Permission denied"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(28, "No space left on device", "/x/y"), 4, FULL),
        (OSError(5, "Input/output error", "/x"), 4, BROKEN),
        (RuntimeError("I/O error: File too large (os error 27)"), 4, "this machine: expected files of this size to be allowed"),
        (PermissionError(13, "Permission denied", "/x"), 2, SHUT),
        (MemoryError(), 4, "this machine: expected memory; found none left"),
    ],
)
def test_what_the_machine_refuses_is_no_bug(error: Exception, code: int, message: str) -> None:
    found = machine_error(error)
    assert found is not None
    assert found.exit_code == code
    assert str(found).startswith(message)
    wrapped = ValueError("what a library made of it")
    wrapped.__cause__ = error
    assert isinstance(error, MemoryError) or str(machine_error(wrapped)) == str(found)
    assert machine_error(ValueError("a bug")) is None
    assert machine_error(FileNotFoundError(2, "No such file", "/x")) is None


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with atomic_file(path) as partial:
            partial.write_text("half")
            raise MissingError("the disk")

    with pytest.raises(MissingError):
        fail()
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and every folder inside, a model's `mechmerge` among them."""
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    with atomic_folder(tmp_path / "out") as partial:
        (partial / "mechmerge").mkdir()
        for name in ("config.json", "mechmerge/recipe.yaml"):
            (partial / name).write_text("{}")
        inside = {str(partial), *(str(partial / name) for name in ("config.json", "mechmerge", "mechmerge/recipe.yaml"))}
    assert set(synced[:-1]) == inside
    assert synced[-1] == str(tmp_path), "the rename"
