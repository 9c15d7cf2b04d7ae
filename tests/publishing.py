"""What tests of publishing share: a run to publish, a client in this process and one in processes of its own, and readers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
import yaml
from huggingface_hub import close_session, constants

from mechmerge.artifacts import sha256_file
from mechmerge.models.references import Model
from mechmerge.publish.hub import Published, publish
from mechmerge.publish.patience import Patience
from tests.hub import Hub
from tests.hub.accounts import WRITER
from tests.hub.runner import PUBLISHER, Runner
from tests.merged_run import merged_run

REPO = "writer/merge"
WAITS: list[float] = []
"""Seconds that the client of `send` would have slept."""
QUICK = Patience(attempts=3, first_wait=1.0, sleep=WAITS.append)


class Publish(Protocol):
    """`publish` with the test's Hub and token filled in."""

    def __call__(self, source: Path, repo: str = REPO, **options: Any) -> Published: ...


@pytest.fixture(scope="session")
def original_run(models: Path, base: Model, expert: Model, second_expert: Model) -> Path:
    """A run of one real merge of tiny models; never changed."""
    return merged_run(models / "run-to-publish", base, {"first": expert, "second": second_expert})


@pytest.fixture
def run(original_run: Path, tmp_path: Path) -> Path:
    """A copy of that run, in a folder named after its user."""
    return Path(shutil.copytree(original_run, tmp_path / "alice-the-user" / "run"))


@pytest.fixture
def publisher(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Runner]:
    """`runner` with everything imported that a publication needs."""
    server: Hub = request.getfixturevalue("lfs_hub" if "lfs_hub" in request.fixturenames else "hub")
    with Runner(server.env(), tmp_path / "output", imports=PUBLISHER) as forks:
        yield forks


@pytest.fixture
def send(lfs_hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Iterator[Publish]:
    """`publish` in this process, in LFS mode: huggingface_hub read its environment when it was imported."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    close_session()
    WAITS.clear()

    def call(source: Path, repo: str = REPO, **options: Any) -> Published:
        return publish(source, repo, **({"endpoint": lfs_hub.url, "token": WRITER, "patience": QUICK} | options))

    yield call
    close_session()


def local_state(run: Path) -> dict[str, str]:
    """Path in the repository → sha256 of what the run holds of it."""
    merged = run / "merged" / "conflict"
    names = ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
             "chat_template.jinja")  # fmt: skip
    files = {name: merged / name for name in names}
    files |= {name: merged / name for name in ("mechmerge/recipe.yaml", "mechmerge/masks.safetensors")}
    files |= {f"mechmerge/{path.relative_to(run)}": path for path in run.glob("scores/*/*.safetensors")}
    files |= {f"mechmerge/{name}": run / name for name in ("effects.safetensors", "figures/effects.png", "figures/curves.png")}
    return {path: sha256_file(file) for path, file in files.items()}


def card_of(hub: Hub, repo: str = REPO) -> tuple[dict[str, Any], str]:
    """Metadata and body of the published card."""
    _, metadata, body = hub.read(repo, "README.md").decode().split("---\n", 2)
    return yaml.safe_load(metadata), body


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text()) if path.suffix == ".json" else yaml.safe_load(path.read_text())
    change(value)
    path.write_text(json.dumps(value) if path.suffix == ".json" else yaml.safe_dump(value))
