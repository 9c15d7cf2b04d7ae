"""What a run holds, read once for as long as its files stay the same."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

from mechmerge.artifacts import digest
from mechmerge.errors import InputError
from mechmerge.recipe.sources import Sources, read_sources
from mechmerge.report.files import RunFiles, find_run_files
from mechmerge.report.loading import Measurements, read_run
from mechmerge.report.recipes import KeptOf, coefficient_arrays
from mechmerge.service.problems import ServiceError
from mechmerge.service.service import Service

KEPT = 4
"""Runs that are held in memory."""
Stamp = tuple[str, int, int]


class Results(NamedTuple):
    """What a run measured and decided."""

    key: str
    """Another one whenever a file is."""
    files: RunFiles
    run: Measurements
    kept: dict[str, KeptOf]
    """The coefficients of every recipe."""


class Held:
    """Results that are told apart by their key alone: what is made of them is kept for as long as they stay the same."""

    def __init__(self, results: Results) -> None:
        self.results = results

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Held) and other.results.key == self.results.key

    def __hash__(self) -> int:
        return hash(self.results.key)


def results_of(service: Service, id: str) -> Results:
    """The results of a job's run.

    Raises:
        ServiceError: there are none yet (404).
    """
    run = service.run(id)
    return _read(run, _stamps(_found(run, id)))


def sources_of(service: Service, id: str) -> Sources:
    """The measurements that recipes are made from.

    Raises:
        ServiceError: there are none yet (404).
    """
    run = service.run(id)
    files = _found(run, id)
    measured = [path for path in (*files.scores, files.effects, files.rounds) if path is not None]
    if not measured:
        raise _nothing(id)
    return _sources(tuple(measured), _stamps(files))


def _found(run: Path, id: str) -> RunFiles:
    try:
        return find_run_files(run)
    except InputError:
        raise _nothing(id) from None


def _nothing(id: str) -> ServiceError:
    return ServiceError(404, f"results of run {id}", expected="measurements", found="none yet", fix="wait for its first stages")


def _stamps(files: RunFiles) -> tuple[Stamp, ...]:
    paths = [*files.scores, files.effects, files.rounds, *files.recipes.values(), files.evaluation, files.gate]
    there = [path for path in paths if path is not None]
    about = [(path, path.stat()) for path in there]
    return tuple((str(path), stat.st_mtime_ns, stat.st_size) for path, stat in about)


@functools.lru_cache(maxsize=KEPT)
def _read(run: Path, stamps: tuple[Stamp, ...]) -> Results:
    files = find_run_files(run)
    found = read_run(files)
    kept = {name: coefficient_arrays(path, found) for name, path in found.recipes.items()}
    return Results(digest([list(stamp) for stamp in stamps])[:16], files, found, kept)


@functools.lru_cache(maxsize=KEPT)
def _sources(measured: tuple[Path, ...], stamps: tuple[Stamp, ...]) -> Sources:
    return read_sources(measured)
