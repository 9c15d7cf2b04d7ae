"""`mechmerge serve` at the command line: tokens, and what it refuses to start with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mechmerge.cli.main import cli
from mechmerge.errors import InputError
from mechmerge.service.database import open_engine
from mechmerge.service.service import open_service
from mechmerge.service.settings import Settings
from mechmerge.service.tokens import Tokens


def serve(data: Path, *arguments: str) -> Any:
    return CliRunner().invoke(cli, ["serve", "--data", str(data), "--port", "0", *arguments], standalone_mode=False)


def test_tokens_are_added_listed_and_revoked(tmp_path: Path) -> None:
    text = serve(tmp_path, "token", "add", "ann", "--role", "publish", "--days", "2").stdout.strip()
    tokens = Tokens(open_engine(Settings(data=tmp_path).url))
    identity = tokens.identify(text)
    assert identity is not None
    assert (identity.user, identity.role) == ("ann", "publish")
    listed = serve(tmp_path, "token", "list", "--format", "json").stdout
    assert '"user": "ann"' in listed
    assert text.split("_", 2)[2] not in listed
    assert "ann" in serve(tmp_path, "token", "revoke", str(identity.token)).stderr
    assert tokens.identify(text) is None
    assert tokens.ever()
    assert tokens.valid() == 0
    tokens.engine.dispose()
    assert isinstance(serve(tmp_path, "token", "add", "a b").exception, InputError)


@pytest.mark.parametrize("arguments", [("--host", "0.0.0.0"), ("--host", "::"), ("--allow-host", "merge.example")])  # noqa: S104
def test_nobody_else_is_served_without_tokens(arguments: tuple[str, ...], tmp_path: Path) -> None:
    refused = serve(tmp_path, *arguments)
    assert isinstance(refused.exception, InputError)
    assert "expected tokens" in str(refused.exception)


def test_one_server_a_folder_and_one_folder_a_store(tmp_path: Path) -> None:
    with open_service(Settings(data=tmp_path / "one")):
        assert "no other process at work on it" in str(serve(tmp_path / "one").exception)
        database = Settings(data=tmp_path / "one").url
        assert "that of this data folder" in str(serve(tmp_path / "two", "--database", database).exception)


def test_a_folder_that_lost_its_name_is_not_served(tmp_path: Path) -> None:
    with open_service(Settings(data=tmp_path)) as service:
        (service.settings.jobs / "0123456789abcdef").mkdir()
    (tmp_path / "instance").unlink()
    assert "though it holds jobs" in str(serve(tmp_path).exception)


def test_what_was_half_written_or_half_deleted_is_removed(tmp_path: Path) -> None:
    for name in (".incoming-0123456789abcdef", ".deleted-0123456789abcdef", "0123456789abcdef"):
        (tmp_path / "jobs" / name).mkdir(parents=True)
    (tmp_path / "instance").write_text("here")
    with open_service(Settings(data=tmp_path)) as service:
        assert [path.name for path in service.settings.jobs.iterdir()] == ["0123456789abcdef"]


def test_the_folder_is_its_owners_alone(tmp_path: Path) -> None:
    with open_service(Settings(data=tmp_path / "data")) as service:
        assert service.settings.data.stat().st_mode & 0o077 == 0
