"""Publishing: main holds the old state or all of the new one, nothing is sent twice, and the round trip gives the same."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from safetensors.torch import save_file as save_tensors

from mechmerge.artifacts import read_document, sha256_file
from mechmerge.cli.publish import show_published
from mechmerge.errors import InputError, MechmergeError, MissingError
from mechmerge.evaluate.record import Evaluation
from mechmerge.models.references import resolve
from mechmerge.publish.hub import Published, publish_scores
from mechmerge.publish.repository import Repository
from mechmerge.publish.staging import STAGING
from tests.hub import Hub
from tests.hub.accounts import WRITER
from tests.hub.runner import Runner
from tests.merged_run import png
from tests.publishing import QUICK, REPO, WAITS, Publish, local_state

# huggingface_hub's own use of httpx2.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


# ---------------------------------------------------------------------------------------------------------------- sequence
def test_main_gets_all_of_it_in_one_commit(hub: Hub, publisher: Runner, run: Path) -> None:
    done = publisher.mechmerge("publish", run, REPO, "--tag", "v1", "--format", "json", "--quiet")
    assert done.code == 0, done.err
    published = Published.model_validate_json(done.out)
    files = hub.files(REPO)
    assert local_state(run).items() <= files.items()
    written = {"README.md", "mechmerge/evaluation.json", "mechmerge/gate.json"}
    assert files.keys() - local_state(run).keys() == written
    assert hub.commits(REPO)[0].sha == published.commit
    assert len(hub.commits(REPO)) == 2, "the repository's first commit, and ours"
    repository = hub.repositories["models", REPO]
    assert repository.tags == {"v1": published.commit}
    assert list(repository.heads) == ["main"], "the staging branch is gone"
    hub.count_anew()
    again = Published.model_validate_json(publisher.mechmerge("publish", run, REPO, "--tag", "v1", "--format", "json").out)
    assert (again.commit, again.changed, again.uploaded) == (published.commit, False, ())
    assert {entry.method for entry in hub.requests()} <= {"GET", "POST"}
    assert not [entry for entry in hub.requests() if "/commit/" in entry.path or "/preupload/" in entry.path]


def test_only_what_changed_is_sent_and_what_is_gone_is_removed(send: Publish, lfs_hub: Hub, run: Path) -> None:
    send(run)
    lfs_hub.push(REPO, {"notes.txt": b"theirs", "model-00001-of-00002.safetensors": b"old", "figures/own.png": b"theirs"})
    (run / "scores" / "second" / "second.safetensors").unlink()
    published = send(run)
    assert set(published.plan.delete) == {"model-00001-of-00002.safetensors", "mechmerge/scores/second/second.safetensors"}
    assert published.uploaded == ()
    files = lfs_hub.files(REPO)
    assert {"notes.txt", "figures/own.png"} <= files.keys()
    assert local_state(run).items() <= files.items()
    assert not set(published.plan.delete) & files.keys()
    assert lfs_hub.objects.sent_twice(REPO) == []


def test_two_files_of_one_content_are_sent_once(send: Publish, lfs_hub: Hub, run: Path) -> None:
    assert sha256_file(run / "figures/effects.png") == sha256_file(run / "figures/curves.png")
    send(run)
    assert lfs_hub.received(sha256_file(run / "figures/effects.png")) == len(png())


@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        ("POST", "/branch/"),
        ("POST", "/preupload/"),
        ("POST", "objects/batch"),
        ("PUT", "/_lfs/"),
        ("POST", f"/commit/{STAGING}"),
        ("GET", "/tree/"),
        ("POST", "/paths-info/"),
        ("POST", "/commit/main"),
    ],
)
def test_a_failure_leaves_main_as_it_was_and_a_rerun_goes_on(
    send: Publish, lfs_hub: Hub, run: Path, method: str, pattern: str
) -> None:
    Repository(REPO, endpoint=lfs_hub.url, token=WRITER).create(private=False)
    before = lfs_hub.commits(REPO)[0].sha
    fault = lfs_hub.faults.add("error", method=method, pattern=pattern, status=418)
    with pytest.raises(MechmergeError, match="418"):
        send(run)
    assert fault.struck == 1
    assert lfs_hub.commits(REPO)[0].sha == before
    published = send(run)
    assert local_state(run).items() <= lfs_hub.files(REPO).items()
    assert len(lfs_hub.commits(REPO)) == 2
    assert lfs_hub.objects.sent_twice(REPO) == []
    if pattern in ("/commit/main", "/paths-info/"):
        assert published.uploaded == (), "all of it was staged already"


def test_a_lost_answer_to_the_promotion_is_no_second_commit(send: Publish, lfs_hub: Hub, run: Path) -> None:
    fault = lfs_hub.faults.add("lost", method="POST", pattern="/commit/main")
    published = send(run, tag="v1")
    assert fault.struck == 1
    assert WAITS == [1.0]
    assert lfs_hub.commits(REPO)[0].sha == published.commit
    assert len(lfs_hub.commits(REPO)) == 2
    assert lfs_hub.repositories["models", REPO].tags["v1"] == published.commit


def test_a_lost_answer_to_a_removal_is_no_conflict(send: Publish, lfs_hub: Hub, run: Path) -> None:
    send(run)
    (run / "scores" / "second" / "second.safetensors").unlink()
    fault = lfs_hub.faults.add("lost", method="POST", pattern="/commit/main")
    published = send(run)
    assert fault.struck == 1
    assert lfs_hub.commits(REPO)[0].sha == published.commit
    assert len(lfs_hub.commits(REPO)) == 3


@pytest.mark.parametrize("kind", ["cut", "half", "lost", "error"])
def test_a_passing_fault_is_waited_out(send: Publish, lfs_hub: Hub, run: Path, kind: Any) -> None:
    lfs_hub.faults.add(kind, method="POST", pattern="/commit/", times=2)
    assert send(run).changed
    assert sorted(WAITS) in ([1.0, 2.0], [1.0, 1.0]), "two waits, of one request or of two"


def test_the_server_says_how_long_to_wait(send: Publish, lfs_hub: Hub, run: Path) -> None:
    lfs_hub.faults.add("busy", method="POST", pattern="/commit/main", seconds=7)
    assert send(run).changed
    assert WAITS == [7.0]


def test_a_wait_that_is_too_long_is_not_waited(send: Publish, lfs_hub: Hub, run: Path) -> None:
    lfs_hub.faults.add("busy", method="POST", pattern="/commit/main", seconds=3600)
    with pytest.raises(MissingError, match="rate limit; found too many; run it again in 3600 s"):
        send(run)
    assert WAITS == []


def test_someone_elses_push_wins_and_the_next_run_plans_on_it(send: Publish, lfs_hub: Hub, run: Path) -> None:
    lfs_hub.faults.add("push", method="POST", pattern="/commit/main", act=lambda: lfs_hub.push(REPO, {"notes.txt": b"theirs"}))
    with pytest.raises(InputError, match="someone pushed in between; plan again: run the same command once more"):
        send(run)
    assert lfs_hub.files(REPO).keys() == {"notes.txt"}
    assert send(run).uploaded == ()
    assert local_state(run).items() <= lfs_hub.files(REPO).items()
    assert "notes.txt" in lfs_hub.files(REPO)


def test_of_two_publishers_one_wins(send: Publish, lfs_hub: Hub, run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    (other / "scores" / "second" / "second.safetensors").unlink()
    Repository(REPO, endpoint=lfs_hub.url, token=WRITER).create(private=False)
    fault = lfs_hub.faults.add("push", method="POST", pattern="/commit/main", act=lambda: send(other))
    with pytest.raises(InputError, match="plan again"):
        send(run)
    assert fault.struck == 1
    assert lfs_hub.files(REPO).keys() == local_state(other).keys() | {
        "README.md",
        "mechmerge/evaluation.json",
        "mechmerge/gate.json",
    }


def test_what_is_staged_is_verified_before_it_is_promoted(send: Publish, lfs_hub: Hub, run: Path) -> None:
    def tamper() -> None:
        repository = lfs_hub.repositories["models", REPO]
        branch = next(name for name in repository.heads if name.startswith(STAGING))
        tree = dict(repository.resolve(branch).tree)
        tree["model.safetensors"] = tree["mechmerge/masks.safetensors"]
        repository.commit(branch, tree, "tampered", author="stranger")

    lfs_hub.faults.add("push", method="GET", pattern=f"/revision/{STAGING}", act=tamper)
    with pytest.raises(MechmergeError, match=r"model\.safetensors: expected sha256"):
        send(run)
    assert lfs_hub.files(REPO) == {}
    assert send(run).uploaded == ("model.safetensors",)
    assert local_state(run).items() <= lfs_hub.files(REPO).items()


def test_weights_that_change_after_the_gate_are_not_published(send: Publish, lfs_hub: Hub, run: Path) -> None:
    file = run / "merged" / "conflict" / "model.safetensors"

    def change() -> None:
        tensors = load_file(file)
        save_tensors({name: tensor + 1 for name, tensor in tensors.items()}, file, {"format": "pt"})

    lfs_hub.faults.add("push", method="POST", pattern="/preupload/", act=change)
    with pytest.raises(MechmergeError):
        send(run)
    assert lfs_hub.files(REPO) == {}


# ------------------------------------------------------------------------------------------------------------------- modes
def test_a_pull_request_is_made_once_and_left_to_a_person(send: Publish, lfs_hub: Hub, run: Path) -> None:
    lfs_hub.faults.add("error", method="POST", pattern=r"/commit/refs", status=418)
    with pytest.raises(MechmergeError):
        send(run, mode="pr")
    repository = lfs_hub.repositories["models", REPO]
    assert [pull.status for pull in repository.pull_requests.values()] == ["draft"], "half of it cannot be merged"
    published = send(run, mode="pr")
    assert published.pull_request == 1
    assert published.revision == "refs/pr/1"
    assert [pull.status for pull in repository.pull_requests.values()] == ["open"]
    assert lfs_hub.files(REPO) == {}
    assert local_state(run).items() <= lfs_hub.files(REPO, "refs/pr/1").items()
    assert lfs_hub.objects.sent_twice(REPO) == []
    again = send(run, mode="pr")
    assert (again.pull_request, again.changed, again.uploaded) == (1, False, ())
    repository.merge(1, "colleague")
    assert not send(run).changed


def test_a_pull_request_removes_what_is_gone(send: Publish, lfs_hub: Hub, run: Path) -> None:
    send(run)
    (run / "scores" / "second" / "second.safetensors").unlink()
    send(run, mode="pr")
    assert "mechmerge/scores/second/second.safetensors" in lfs_hub.files(REPO)
    assert "mechmerge/scores/second/second.safetensors" not in lfs_hub.files(REPO, "refs/pr/1")


def test_a_lost_answer_to_a_removal_in_a_pull_request_is_no_conflict(send: Publish, lfs_hub: Hub, run: Path) -> None:
    send(run)
    (run / "scores" / "second" / "second.safetensors").unlink()
    fault = lfs_hub.faults.add("lost", method="POST", pattern=r"/commit/refs")
    published = send(run, mode="pr")
    assert fault.struck == 1
    assert lfs_hub.commits(REPO, "refs/pr/1")[0].sha == published.commit
    assert "mechmerge/scores/second/second.safetensors" not in lfs_hub.files(REPO, "refs/pr/1")


def test_a_branch_is_published_onto_rather_than_main(send: Publish, lfs_hub: Hub, run: Path) -> None:
    published = send(run, mode="branch", branch="trial")
    assert published.revision == "trial"
    assert lfs_hub.files(REPO) == {}
    assert local_state(run).items() <= lfs_hub.files(REPO, "trial").items()
    assert set(lfs_hub.repositories["models", REPO].heads) == {"main", "trial"}


def test_direct_is_one_commit_on_the_same_condition(send: Publish, lfs_hub: Hub, run: Path) -> None:
    lfs_hub.faults.add("push", method="POST", pattern="/commit/main", act=lambda: lfs_hub.push(REPO, {"a.txt": b"theirs"}))
    with pytest.raises(InputError, match="plan again"):
        send(run, mode="direct")
    assert lfs_hub.files(REPO).keys() == {"a.txt"}
    lfs_hub.count_anew()
    send(run, mode="direct")
    assert local_state(run).items() <= lfs_hub.files(REPO).items()
    assert len(lfs_hub.commits(REPO)) == 3
    assert not [entry for entry in lfs_hub.requests() if "/branch/" in entry.path]


def test_a_dry_run_needs_no_token_and_changes_nothing(send: Publish, lfs_hub: Hub, run: Path) -> None:
    published = send(run, dry_run=True, token=False)
    assert published.commit is None
    assert published.dry_run
    assert local_state(run).keys() <= set(published.plan.send)
    assert published.plan.bytes > (run / "merged/conflict/model.safetensors").stat().st_size
    assert lfs_hub.repositories == {}
    assert {entry.method for entry in lfs_hub.requests()} == {"GET"}
    send(run)
    assert send(run, dry_run=True).plan.send == ()


def test_a_dry_run_lists_every_file(
    send: Publish, lfs_hub: Hub, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    send(run)
    (run / "scores" / "second" / "second.safetensors").unlink()
    (run / "merged/conflict/train.py").write_text("")
    show_published(send(run, dry_run=True), "table")
    said = capsys.readouterr().out
    rows = {tuple(cell.strip() for cell in line.split("│")[1:3]) for line in said.splitlines() if "│" in line}
    assert {("keep", path) for path in local_state(run)} <= rows
    assert ("remove", "mechmerge/scores/second/second.safetensors") in rows
    assert ("send", "README.md") not in rows, "the card names no score file"
    assert ("stayed here", "train.py") in rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "branch"}, "--branch: expected a name"),
        ({"branch": "x"}, "--branch: expected a name in mode branch"),
        ({"mode": "branch", "branch": "main"}, "a branch beside main"),
        ({"mode": "pr", "tag": "v1"}, "--tag"),
        ({"no_gate": True, "gate": Path("gate.yaml")}, "--no-gate: expected either a gate or none"),
    ],
)
def test_options_that_contradict_each_other(send: Publish, lfs_hub: Hub, run: Path, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        send(run, **options)
    assert lfs_hub.requests() == []


def test_a_private_repository(send: Publish, lfs_hub: Hub, run: Path) -> None:
    send(run, private=True)
    assert lfs_hub.repositories["models", REPO].private
    send(run, "writer/open")
    with pytest.raises(InputError, match="writer/open: expected a private repository; found a public one"):
        send(run, "writer/open", private=True)


def test_a_tag_is_never_moved(send: Publish, lfs_hub: Hub, run: Path) -> None:
    first = send(run, tag="v1").commit
    (run / "scores" / "second" / "second.safetensors").unlink()
    head = lfs_hub.commits(REPO)[0].sha
    with pytest.raises(InputError, match="tag v1: expected a tag that is free"):
        send(run, tag="v1")
    assert lfs_hub.commits(REPO)[0].sha == head == first
    second = send(run, tag="v2").commit
    assert lfs_hub.repositories["models", REPO].tags == {"v1": first, "v2": second}


# --------------------------------------------------------------------------------------------------------------- score files
def test_scores_become_a_data_set_with_a_card(hub: Hub, publisher: Runner, run: Path) -> None:
    arguments = ("publish-scores", run, "writer/scores", "--format", "json", "--quiet")
    done = publisher.mechmerge(*arguments)
    assert done.code == 0, done.err
    files = hub.files("writer/scores", kind="datasets")
    expected = {str(path.relative_to(run)): sha256_file(path) for path in run.glob("scores/*/*.safetensors")}
    expected["effects.safetensors"] = sha256_file(run / "effects.safetensors")
    assert files == expected | {"README.md": files["README.md"]}
    card = hub.read("writer/scores", "README.md", kind="datasets").decode()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit"
    assert "hf://datasets/writer/scores/scores/first/first.safetensors" in card
    assert not Published.model_validate_json(publisher.mechmerge(*arguments).out).changed


def test_a_run_that_measured_nothing_has_no_scores_to_publish(send: Publish, lfs_hub: Hub, run: Path) -> None:
    shutil.rmtree(run / "scores")
    (run / "effects.safetensors").unlink()
    with pytest.raises(InputError, match="expected score, effect or rounds files; found none"):
        publish_scores(run, "writer/scores", endpoint=lfs_hub.url, token=WRITER, patience=QUICK)


# --------------------------------------------------------------------------------------------------------------- round trip
def test_a_round_trip_gives_the_same_recipe_and_tensors(hub: Hub, publisher: Runner, run: Path, tmp_path: Path) -> None:
    for command, repo in (("publish", REPO), ("publish-scores", "writer/scores")):
        done = publisher.mechmerge(command, run, repo)
        assert done.code == 0, done.err
    names = ["scores/first/first.safetensors", "scores/second/second.safetensors", "effects.safetensors"]
    recipe = tmp_path / "again" / "recipe.yaml"
    sources = [f"hf://datasets/writer/scores/{name}" for name in names]
    options = ("--policy", "conflict", "--out-dtype", "float32", "--out", recipe)
    done = publisher.mechmerge("recipe", *sources, *options)
    assert done.code == 0, done.err
    here = tmp_path / "here" / "recipe.yaml"
    done = publisher.mechmerge("recipe", *(run / name for name in names), *options[:-1], here)
    assert done.code == 0, done.err
    assert recipe.read_bytes() == here.read_bytes()
    assert (recipe.parent / "masks.safetensors").read_bytes() == (run / "recipes/conflict/masks.safetensors").read_bytes()
    ours, theirs = (yaml.safe_load(path.read_text()) for path in (recipe, run / "recipes/conflict/recipe.yaml"))
    assert {key: ours[key] for key in ours if key != "provenance"} == {
        key: theirs[key] for key in theirs if key != "provenance"
    }
    code = """
import sys
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
save_file({name: parameter.detach().clone() for name, parameter in model.named_parameters()}, sys.argv[2])
"""
    done = publisher.python(code, REPO, tmp_path / "loaded.safetensors")
    assert done.code == 0, done.err
    loaded, merged = load_file(tmp_path / "loaded.safetensors"), load_file(run / "merged/conflict/model.safetensors")
    assert loaded.keys() == merged.keys()
    assert all(torch.equal(loaded[name], merged[name]) for name in merged)


def test_the_published_recipe_makes_the_published_model(hub: Hub, publisher: Runner, run: Path, tmp_path: Path) -> None:
    assert publisher.mechmerge("publish", run, REPO).code == 0
    done = publisher.mechmerge("merge", f"hf://{REPO}/mechmerge/recipe.yaml", tmp_path / "made")
    assert done.code == 0, done.err
    assert resolve(str(tmp_path / "made")).id.shards == resolve(str(run / "merged/conflict")).id.shards


def test_the_evaluation_that_is_published_reads_back(send: Publish, lfs_hub: Hub, run: Path, tmp_path: Path) -> None:
    send(run)
    (tmp_path / "evaluation.json").write_bytes(lfs_hub.read(REPO, "mechmerge/evaluation.json"))
    assert read_document(Evaluation, tmp_path / "evaluation.json") == read_document(Evaluation, run / "evaluation.json")
