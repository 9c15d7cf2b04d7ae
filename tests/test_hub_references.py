"""`hf://` references: files at one commit, masks beside their recipe, models like owner/name@revision; portable records."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from mechmerge.artifacts import sha256_file
from mechmerge.errors import InputError, MissingError
from mechmerge.models.hub_errors import hub_error, is_fleeting, without_tokens
from mechmerge.models.hub_files import is_hub_reference, local_file
from mechmerge.models.references import Model, check_reference, is_local, is_unpinned_hub, resolve
from mechmerge.publish.repository import Repository
from tests.hub import Hub
from tests.hub.accounts import WRITER
from tests.hub.runner import PUBLISHER, Runner
from tests.merged_run import merged_run

SCORES = "hf://datasets/writer/scores"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, base: Model, expert: Model, second_expert: Model) -> Path:
    return merged_run(tmp_path_factory.mktemp("merged") / "run", base, {"first": expert, "second": second_expert})


@pytest.fixture(scope="module")
def published(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Runner]]:
    """A Hub that holds the run's merge (`writer/merge`, tagged v1) and its score files (`writer/scores`)."""
    folder = tmp_path_factory.mktemp("published")
    with Hub(folder / "hub") as hub, Runner(hub.env(), folder / "output", imports=PUBLISHER) as runner:
        for command, repo in (("publish", "writer/merge"), ("publish-scores", "writer/scores")):
            done = runner.mechmerge(command, run, repo, "--tag", "v1")
            assert done.code == 0, done.err
        yield hub, runner


# -------------------------------------------------------------------------------------------------------------------- files
def test_a_file_is_read_at_one_commit_which_is_said(published: tuple[Hub, Runner], run: Path) -> None:
    hub, runner = published
    commit = hub.commits("writer/scores", kind="datasets")[0].sha
    for revision in ("", "@main", "@v1", f"@{commit}"):
        reference = f"{SCORES}{revision}/scores/first/first.safetensors"
        done = runner.mechmerge("inspect", reference, "--format", "json")
        assert done.code == 0, done.err
        assert f"{reference}: commit {commit}" in done.err
        assert json.loads(done.out)["document"]["behavior"] == "first"


def test_masks_come_from_the_recipes_own_commit(published: tuple[Hub, Runner], run: Path) -> None:
    hub, runner = published
    commit = hub.commits("writer/merge")[0].sha
    code = (
        "import sys\nfrom mechmerge.models.hub_files import local_file\nfrom mechmerge.recipe.schema import read_recipe\n"
        "path = local_file(sys.argv[1])\nprint(path)\nprint(len(read_recipe(path)[1]))"
    )
    done = runner.python(code, "hf://writer/merge@v1/mechmerge/recipe.yaml")
    assert done.code == 0, done.err
    path, masks = done.out.split()
    assert f"/snapshots/{commit}/mechmerge/recipe.yaml" in path
    assert int(masks) > 0
    assert Path(path).read_bytes() == (run / "merged/conflict/mechmerge/recipe.yaml").read_bytes()


def test_what_is_recorded_is_portable(published: tuple[Hub, Runner], tmp_path: Path) -> None:
    _, runner = published
    reference = f"{SCORES}/effects.safetensors"
    done = runner.mechmerge("recipe", reference, "--policy", "conflict", "--out", tmp_path / "recipe.yaml")
    assert done.code == 0, done.err
    text = (tmp_path / "recipe.yaml").read_text()
    assert yaml.safe_load(text)["provenance"][0]["file"] == "effects.safetensors"
    assert "snapshots" not in text
    assert "hf://" not in text


def test_a_recipe_to_be_like_may_lie_on_the_hub(published: tuple[Hub, Runner], tmp_path: Path) -> None:
    _, runner = published
    done = runner.mechmerge(
        "recipe", f"{SCORES}/effects.safetensors", "--policy", "random", "--like", "hf://writer/merge/mechmerge/recipe.yaml",
        "--out", tmp_path / "recipe.yaml",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["policy"]["name"] == "random like conflict"


def test_a_private_file_needs_the_token(published: tuple[Hub, Runner], tmp_path: Path) -> None:
    hub, _ = published
    Repository("writer/secret", "dataset", endpoint=hub.url, token=WRITER).create(private=True)
    hub.push("writer/secret", {"recipe.yaml": b"a: 1"}, kind="datasets")
    with Runner(hub.env(token=None, home=tmp_path / "home"), tmp_path / "output") as anonymous:
        done = anonymous.mechmerge("inspect", "hf://datasets/writer/secret/recipe.yaml")
    assert done.code == 2
    assert "expected a repository that exists and that you may see" in done.err
    assert "hf auth login" in done.err


@pytest.mark.parametrize(
    ("reference", "found"),
    [
        ("hf://datasets/writer/nothing/x.yaml", "a repository that exists"),
        (f"{SCORES}@nowhere/effects.safetensors", "a revision of the repository"),
        (f"{SCORES}/nothing.safetensors", "a file of the repository"),
    ],
)
def test_what_is_not_on_the_hub_is_wrong_input(published: tuple[Hub, Runner], reference: str, found: str) -> None:
    _, runner = published
    done = runner.mechmerge("inspect", reference)
    assert done.code == 2
    assert f"mechmerge: reference '{reference}': expected {found}" in done.err
    assert done.err.count("\n") == 1


def test_a_hub_that_is_away_is_missing(tmp_path: Path) -> None:
    with Hub(tmp_path / "hub") as hub, Runner(hub.env() | {"HF_HUB_OFFLINE": "1"}, tmp_path / "output") as runner:
        done = runner.mechmerge("inspect", f"{SCORES}/effects.safetensors")
    assert done.code == 4
    assert "expected the Hub within reach" in done.err


@pytest.mark.parametrize(
    "text",
    ["hf://", "hf://a", "hf://a/b", "hf://datasets/a/b", "hf://spaces/a/b/app.py", "hf://a/b@/x.yaml", "hf://a/b/../c.yaml",
     "hf://a b/c/x.yaml", "hf://buckets/a/b/c"],
)  # fmt: skip
def test_references_that_name_no_file(text: str) -> None:
    with pytest.raises(InputError, match=r"expected hf://\[datasets/\]owner/name"):
        local_file(text)


def test_a_path_stays_what_it_is(tmp_path: Path) -> None:
    assert local_file(tmp_path / "x.yaml") == tmp_path / "x.yaml"
    assert local_file("hf:/x") == Path("hf:/x")
    assert not is_hub_reference("models/hf")


# ------------------------------------------------------------------------------------------------------------------- models
def test_a_model_is_named_with_or_without_the_prefix(published: tuple[Hub, Runner], run: Path) -> None:
    hub, runner = published
    commit = hub.commits("writer/merge")[0].sha
    code = (
        "import sys\nfrom mechmerge.models.references import resolve\n"
        "print(*(resolve(text).id.model_dump_json() for text in sys.argv[1:]), sep='\\n')"
    )
    done = runner.python(code, "writer/merge@v1", "hf://writer/merge@v1", "hf://writer/merge")
    assert done.code == 0, done.err
    ids = [json.loads(line) for line in done.out.splitlines()]
    shards = {"model.safetensors": sha256_file(run / "merged/conflict/model.safetensors")}
    assert ids == [{"name": "writer/merge", "revision": commit, "shards": shards}] * 3


def test_forms_of_model_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("owner/name", "hf:/owner/name"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert is_local("owner/name")
    assert not is_local("hf://owner/name"), "the prefix means the Hub, whatever lies here"
    assert is_unpinned_hub("hf://owner/name")
    assert not is_unpinned_hub("hf://owner/name@main")
    check_reference("hf://owner/name@v1+hf://owner/adapter")
    for text in ("hf://owner", "hf://datasets/owner/name", "hf://owner/name/file.yaml"):
        with pytest.raises(InputError, match="model reference"):
            check_reference(text)
        with pytest.raises(InputError, match="model reference"):
            resolve(text)


# ------------------------------------------------------------------------------------------------------------------- errors
def test_no_message_holds_a_token() -> None:
    assert without_tokens(f"Authorization: Bearer abc.def, token {WRITER}!") == "Authorization: *** token ***!"
    assert WRITER not in str(hub_error(ConnectionError(f"with {WRITER}"), "uploading"))


def test_wrapped_errors_are_seen_through() -> None:
    wrapped = RuntimeError("Error while uploading 'model.safetensors' to the Hub.")
    wrapped.__cause__ = ConnectionResetError("reset by peer")
    assert is_fleeting(wrapped)
    error = hub_error(wrapped, "uploading")
    assert isinstance(error, MissingError)
    assert "reset by peer" in str(error)
    assert not is_fleeting(ValueError("bad metadata"))
    assert not is_fleeting(PermissionError("no"))
