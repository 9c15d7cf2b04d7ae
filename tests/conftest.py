"""Fixtures that all tests share: a cache folder of the session's own, and tiny models."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from mechmerge.models.references import Model, resolve
from tests.hub.fixtures import hub, lfs_hub, runner  # noqa: F401  (fixtures)
from tests.nltk_home import small_nltk  # noqa: F401  (a fixture)
from tests.publishing import original_run, publisher, run, send  # noqa: F401  (fixtures)
from tests.tiny import tiny_expert, tiny_model

REAL_CACHE = os.environ.get("MECHMERGE_CACHE")
"""The cache named by the caller's environment: slow tests find the real SmolLM2 there."""


@pytest.fixture(scope="session", autouse=True)
def _session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One thread, no network, no user's configuration, and a cache that no other process sees."""
    import torch

    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MECHMERGE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("MECHMERGE_CONFIG", os.devnull)
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that holds the session's models."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def base(models: Path) -> Model:
    """A tiny Llama: 3 layers, 4 heads in 2 KV groups, 48 neurons, tied embeddings."""
    return resolve(str(tiny_model(models / "base")))


@pytest.fixture(scope="session")
def expert(models: Path, base: Model) -> Model:
    """The base with noise on every weight."""
    return resolve(str(tiny_expert(base.path, models / "expert", seed=1)))


@pytest.fixture(scope="session")
def second_expert(models: Path, base: Model) -> Model:
    """The base with other noise on every weight."""
    return resolve(str(tiny_expert(base.path, models / "second_expert", seed=2)))
