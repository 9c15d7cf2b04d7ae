"""pytest fixtures: a Hub of the test's own, in either mode, and a runner of clients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.runner import Runner
from tests.hub.server import Hub


@pytest.fixture(params=["lfs", "xet"])
def hub(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Hub]:
    """An empty Hub, in LFS mode and in xet mode."""
    with Hub(tmp_path / "hub", xet=request.param == "xet") as server:
        yield server


@pytest.fixture
def lfs_hub(tmp_path: Path) -> Iterator[Hub]:
    """An empty Hub in LFS mode, for what does not depend on the storage."""
    with Hub(tmp_path / "hub") as server:
        yield server


@pytest.fixture
def runner(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Runner]:
    """Runs clients of the test's Hub in processes of their own."""
    name = "lfs_hub" if "lfs_hub" in request.fixturenames else "hub"
    server: Hub = request.getfixturevalue(name)
    with Runner(server.env(), tmp_path / "output") as forks:
        yield forks
