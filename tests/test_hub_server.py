"""The loopback Hub against the real clients, in LFS mode and in xet mode: what the publisher's tests stand on."""

from __future__ import annotations

import hashlib
import http.client
import json
import random
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from mechmerge.models.references import Model
from tests.hub import Hub
from tests.hub.accounts import COLLEAGUE, EXPIRED, READER, STRANGER, WRITER
from tests.hub.faults import Kind
from tests.hub.git import git_object, tree_object
from tests.hub.runner import Done, Runner
from tests.hub.store import Repository

REPO = "writer/merge"
PREPARE = """
import json, sys
from huggingface_hub import HfApi, CommitOperationAdd, CommitOperationCopy, CommitOperationDelete
api, repo = HfApi(), "writer/merge"
def status(action):
    try:
        action()
    except Exception as error:
        while error and not getattr(error, "response", None):
            error = error.__cause__
        return error.response.status_code if error else 0
    return 200
"""


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def weights(size: int = 200_000, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two large files, two small ones, one of them in a folder."""
    folder = tmp_path / "model"
    (folder / "scores").mkdir(parents=True)
    (folder / "a.safetensors").write_bytes(weights())
    (folder / "scores/b.safetensors").write_bytes(weights(90_000, seed=1))
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256(path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()}


def python(runner: Runner, code: str, *arguments: str | Path) -> Any:
    """Runs code after PREPARE; the last line that it prints is its result."""
    done: Done = runner.python(PREPARE + code, *arguments)
    assert done.code == 0, done.err
    return json.loads(done.out.splitlines()[-1]) if done.out else None


def test_a_folder_is_uploaded_verified_and_downloaded(hub: Hub, runner: Runner, folder: Path, tmp_path: Path) -> None:
    code = """
api.create_repo(repo)
api.upload_folder(repo_id=repo, folder_path=sys.argv[1], commit_message="Upload")
report = api.verify_repo_checksums(repo, local_dir=sys.argv[1])
path = api.snapshot_download(repo, local_dir=sys.argv[2], cache_dir=sys.argv[2] + "-cache")
print(json.dumps([report.mismatches, sorted(report.missing_paths), sorted(report.extra_paths)]))
"""
    assert python(runner, code, folder, tmp_path / "copy") == [[], [".gitattributes"], []]
    assert hub.files(REPO) == contents(folder)
    copied = contents(tmp_path / "copy")
    assert {path: sha for path, sha in copied.items() if not path.startswith((".cache", ".git"))} == contents(folder)
    for path in ("a.safetensors", "scores/b.safetensors"):
        size = (folder / path).stat().st_size
        assert hub.received(hub.files(REPO)[path]) == (0 if hub.xet else size)
    assert hub.stored_bytes(REPO) >= 290_000
    assert any("xet-write-token" in entry.path for entry in hub.requests()) == hub.xet


def test_nothing_changed_sends_and_commits_nothing(hub: Hub, runner: Runner, folder: Path) -> None:
    upload = "api.create_repo(repo, exist_ok=True); api.upload_folder(repo_id=repo, folder_path=sys.argv[1])"
    python(runner, upload, folder)
    stored, head = hub.stored_bytes(REPO), hub.commits(REPO)[0].sha
    hub.count_anew()
    python(runner, upload, folder)
    assert hub.commits(REPO)[0].sha == head
    assert hub.stored_bytes(REPO) == stored
    assert not any(entry.method == "PUT" for entry in hub.requests())


def test_a_staged_branch_is_copied_to_main_on_one_condition(hub: Hub, runner: Runner, folder: Path) -> None:
    code = """
api.create_repo(repo)
old = api.repo_info(repo).sha
api.create_branch(repo, branch="staging")
staged = api.upload_folder(repo_id=repo, folder_path=sys.argv[1], revision="staging").oid
paths = ["a.safetensors", "scores/b.safetensors", "config.json", "README.md"]
copies = [CommitOperationCopy(path, path, src_revision=staged) for path in paths]
new = api.create_commit(repo, copies, commit_message="Promote", parent_commit=old).oid
again = [CommitOperationAdd("late.json", b"{}")]
stale = status(lambda: api.create_commit(repo, again, commit_message="Late", parent_commit=old))
api.create_tag(repo, tag="v1", revision=new)
api.delete_branch(repo, branch="staging")
print(json.dumps([old, new, stale, status(lambda: api.create_tag(repo, tag="v1"))]))
"""
    old, new, stale, tagged = python(runner, code, folder)
    assert (stale, tagged) == (412, 409)
    assert hub.files(REPO) == contents(folder)
    assert [commit.sha for commit in hub.commits(REPO)] == [new, old]
    assert hub.commits(REPO, "v1")[0].sha == new
    sent = [hub.received(sha) for path, sha in hub.files(REPO).items() if path.endswith(".safetensors")]
    assert sent == ([0, 0] if hub.xet else [200_000, 90_000])


def test_a_pull_request_is_filled_listed_opened_and_merged(hub: Hub, runner: Runner, folder: Path) -> None:
    code = """
api.create_repo(repo)
number = api.create_pull_request(repo, title="A merge").num
api.upload_folder(repo_id=repo, folder_path=sys.argv[1], revision=f"refs/pr/{number}")
other = api.create_commit(repo, [CommitOperationAdd("x.json", b"1")], commit_message="Other", create_pr=True)
drafts = [(found.num, found.status, found.title) for found in api.get_repo_discussions(repo)]
refs = sorted(ref.ref for ref in api.list_repo_refs(repo, include_pull_requests=True).pull_requests)
early = status(lambda: api.merge_pull_request(repo, number))
api.change_discussion_status(repo, number, "open")
api.comment_discussion(repo, number, "fine")
api.merge_pull_request(repo, number)
details = api.get_discussion_details(repo, number)
print(json.dumps([drafts, refs, early, details.status, details.merge_commit_oid, other.pr_num]))
"""
    drafts, refs, early, state, merged, other = python(runner, code, folder)
    assert drafts == [[2, "open", "Other"], [1, "draft", "A merge"]]
    assert refs == ["refs/pr/1", "refs/pr/2"]
    assert (early, state, other) == (400, "merged", 2)
    assert hub.commits(REPO)[0].sha == merged
    assert hub.files(REPO) == contents(folder)


def test_a_published_model_loads(hub: Hub, runner: Runner, base: Model) -> None:
    code = """
import torch
from transformers import AutoModelForCausalLM
api.create_repo(repo, private=True)
api.upload_folder(repo_id=repo, folder_path=sys.argv[1])
loaded = AutoModelForCausalLM.from_pretrained(repo).state_dict()
local = AutoModelForCausalLM.from_pretrained(sys.argv[1]).state_dict()
print(json.dumps(loaded.keys() == local.keys() and all(torch.equal(loaded[name], local[name]) for name in local)))
"""
    assert python(runner, code, base.path) is True


@pytest.mark.parametrize(
    ("token", "expected"), [(WRITER, 200), (COLLEAGUE, 200), (READER, 403), (STRANGER, 403), (EXPIRED, 401), (None, 401)]
)
def test_rights_follow_the_token(lfs_hub: Hub, tmp_path: Path, token: str | None, expected: int) -> None:
    add = 'print(json.dumps(status(lambda: api.create_commit(repo, [CommitOperationAdd("x", b"1")], commit_message="x"))))'
    with Runner(lfs_hub.env(), tmp_path / "owner") as owner:
        python(owner, "api.create_repo(repo)")
    with Runner(lfs_hub.env(token), tmp_path / "other") as other:
        assert python(other, add) == expected
        assert python(other, "print(json.dumps(status(lambda: api.create_repo('writer/new'))))") == expected
        readable = 401 if token == EXPIRED else 200
        assert python(other, "print(json.dumps(status(lambda: api.repo_info(repo))))") == readable
    assert ("x" in lfs_hub.files(REPO)) == (expected == 200)


def test_private_and_gated_repositories_are_kept_from_others(lfs_hub: Hub, runner: Runner, tmp_path: Path) -> None:
    code = """
api.create_repo(repo)
api.create_commit(repo, [CommitOperationAdd("config.json", b"{}")], commit_message="x")
api.update_repo_settings(repo, gated="manual")
"""
    ask = """
from huggingface_hub.errors import HfHubHTTPError
def kind(action):
    try:
        action()
    except HfHubHTTPError as error:
        return type(error).__name__
found = [kind(lambda: api.repo_info(repo)), kind(lambda: api.hf_hub_download(repo, "config.json", local_dir=sys.argv[1]))]
print(json.dumps(found))
"""
    with Runner(lfs_hub.env(STRANGER), tmp_path / "other") as stranger:
        python(runner, code)
        assert python(stranger, ask, tmp_path / "copy") == [None, "GatedRepoError"]
        python(runner, "api.update_repo_settings(repo, gated=False, private=True)")
        assert python(stranger, ask, tmp_path / "copy") == ["RepositoryNotFoundError", "RepositoryNotFoundError"]
    assert python(runner, ask, tmp_path / "mine") == [None, None]


def test_a_dataset_is_no_model(hub: Hub, runner: Runner, folder: Path, tmp_path: Path) -> None:
    code = """
api.create_repo(repo, repo_type="dataset")
api.upload_folder(repo_id=repo, repo_type="dataset", folder_path=sys.argv[1])
api.snapshot_download(repo, repo_type="dataset", local_dir=sys.argv[2], cache_dir=sys.argv[2] + "-cache")
print(json.dumps([status(lambda: api.repo_info(repo)), api.repo_info(repo, repo_type="dataset").sha]))
"""
    assert python(runner, code, folder, tmp_path / "copy") == [404, hub.commits(REPO, kind="datasets")[0].sha]
    assert hub.files(REPO, kind="datasets") == contents(folder)
    assert sha256((tmp_path / "copy" / "a.safetensors").read_bytes()) == sha256(weights())


def test_what_a_gitignore_names_is_left_out(lfs_hub: Hub, runner: Runner, folder: Path) -> None:
    python(runner, "api.create_repo(repo)")
    lfs_hub.push(REPO, {".gitignore": b"*.json\n"})
    python(runner, "api.upload_folder(repo_id=repo, folder_path=sys.argv[1])", folder)
    assert lfs_hub.files(REPO).keys() == {".gitignore", "README.md", "a.safetensors", "scores/b.safetensors"}


def test_a_bug_of_the_hub_is_no_fault(tmp_path: Path) -> None:
    hub = Hub(tmp_path)
    hub.repositories["models", REPO] = Repository("models", REPO, "writer")
    hub.__enter__()
    assert ask(hub, "POST", f"/{REPO}.git/info/lfs/objects/batch", b"{}") == 500
    with pytest.raises(KeyError, match="objects"):
        hub.__exit__(None, None, None)


def test_refusals_are_the_hubs(lfs_hub: Hub, runner: Runner, folder: Path) -> None:
    code = """
from huggingface_hub import ModelCard
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError, RemoteEntryNotFoundError
import httpx2 as http
first = str(api.create_repo(repo))
second = str(api.create_repo(repo, exist_ok=True))
api.create_repo(repo, repo_type="dataset")
headers = {"authorization": f"Bearer {sys.argv[1]}"}
bad = http.post(api.endpoint + "/api/repos/create", json={"name": "a--b", "organization": "writer"}, headers=headers)
def kind(action):
    try:
        action()
    except Exception as error:
        return type(error).__name__
kinds = [
    kind(lambda: api.repo_info("writer/other")),
    kind(lambda: api.repo_info(repo, revision="nowhere")),
    kind(lambda: api.hf_hub_download(repo, "nothing.json")),
    kind(lambda: ModelCard("---\\nbase_model: /home/me/model\\n---\\n").validate()),
    kind(lambda: ModelCard("---\\nbase_model: writer/base\\nbase_model_relation: merge\\nlicense: mit\\n---\\n").validate()),
]
print(json.dumps([first, second, status(lambda: api.create_repo(repo)), bad.status_code, kinds]))
"""
    first, second, exists, bad, kinds = python(runner, code, WRITER)
    assert first == second == f"{lfs_hub.url}/{REPO}"
    assert (exists, bad) == (409, 400)
    assert kinds == ["RepositoryNotFoundError", "RevisionNotFoundError", "RemoteEntryNotFoundError", "ValueError", None]
    assert ("datasets", REPO) in lfs_hub.repositories


def test_a_full_quota_is_a_403_and_changes_nothing(hub: Hub, runner: Runner, folder: Path) -> None:
    hub.quota = 250_000
    code = """
api.create_repo(repo)
try:
    api.upload_folder(repo_id=repo, folder_path=sys.argv[1])
    print(json.dumps("uploaded"))
except Exception as error:
    print(json.dumps(str(error)))
"""
    said = str(python(runner, code, folder))
    assert "storage limit reached" in said
    assert hub.files(REPO) == {}


def test_uploads_in_parts(tmp_path: Path, folder: Path) -> None:
    with Hub(tmp_path / "hub", chunk_size=64_000) as hub, Runner(hub.env(), tmp_path / "output") as runner:
        python(runner, "api.create_repo(repo); api.upload_folder(repo_id=repo, folder_path=sys.argv[1])", folder)
        assert hub.files(REPO) == contents(folder)
        assert hub.received(sha256(weights())) == 200_000
        assert {transfer.part for transfer in hub.objects.transfers} == {1, 2, 3, 4}
        assert hub.stored_bytes(REPO) == 290_000
        assert hub.objects.sent_twice(REPO) == []


def test_long_listings_come_in_pages(lfs_hub: Hub, runner: Runner) -> None:
    python(runner, "api.create_repo(repo)")
    lfs_hub.push(REPO, {f"deep/{number // 100}/{number}.txt": b"" for number in range(2300)})
    code = "print(json.dumps([len(list(api.list_repo_tree(repo, recursive=deep))) for deep in (True, False)]))"
    assert python(runner, code) == [1 + 2300 + 23 + 1, 2]  # .gitattributes, the files, the folders
    assert sum("/tree/" in entry.path for entry in lfs_hub.requests()) == 4


def test_names_are_gits() -> None:
    """Figures of `git hash-object` and `git write-tree`."""
    blob = git_object("blob", b"hello\n")
    assert blob == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert tree_object({"a/x": blob, "a.b": blob, "a0": blob}) == "789782debc5f8a6357d255c85ef58af981aa5a9e"


def test_commits_are_chained(lfs_hub: Hub, runner: Runner) -> None:
    python(runner, "api.create_repo(repo)")
    for number in range(3):
        lfs_hub.push(REPO, {"same.txt": b"the same"}, author=f"person{number % 2}")
    commits = lfs_hub.commits(REPO)
    assert [commit.parent for commit in commits] == [*(commit.sha for commit in commits[1:]), None]
    assert len({commit.sha for commit in commits}) == 4
    assert len({commit.sha for commit in commits if len(commit.sha) == 40}) == 4


def ask(
    hub: Hub, method: str = "GET", path: str = "/api/whoami-v2", body: bytes | None = None, token: str = WRITER
) -> int | str:
    """The status of one request by a plain client, or the name of what went wrong."""
    client = http.client.HTTPConnection(urlsplit(hub.url).netloc, timeout=10)
    try:
        client.request(method, path, body, {"Authorization": f"Bearer {token}"})
        answer = client.getresponse()
        answer.read()
        return answer.status
    except (OSError, http.client.HTTPException) as error:
        return type(error).__name__
    finally:
        client.close()


@pytest.mark.parametrize(
    ("fault", "expected", "after"),
    [
        ("cut", "RemoteDisconnected", 200),
        ("half", "RemoteDisconnected", 200),
        ("lost", "RemoteDisconnected", 200),
        ("error", 503, 200),
        ("busy", 429, 200),
        ("expired", 401, 401),
        ("push", 200, 200),
        ("slow", 200, 200),
    ],
)
def test_faults_strike_once_and_where_they_are_told(lfs_hub: Hub, fault: Kind, expected: int | str, after: int) -> None:
    struck = lfs_hub.faults.add(fault, index=1)
    assert [ask(lfs_hub), ask(lfs_hub), ask(lfs_hub)] == [200, expected, after]
    assert struck.struck == 1
    assert [entry.fault for entry in lfs_hub.requests()] == [None, fault, None]
    lfs_hub.accounts.renew()
    lfs_hub.count_anew()
    lfs_hub.faults.clear()
    lfs_hub.faults.add("error", pattern="whoami", times=2, status=500)
    assert [ask(lfs_hub, path="/api/models/a/b"), ask(lfs_hub), ask(lfs_hub), ask(lfs_hub)] == [404, 500, 500, 200]


def test_a_truncated_answer_is_half_an_answer(lfs_hub: Hub) -> None:
    lfs_hub.faults.add("truncated")
    assert ask(lfs_hub) in ("IncompleteRead", "RemoteDisconnected", "BadStatusLine")
    assert ask(lfs_hub) == 200


def test_a_push_comes_before_the_request(lfs_hub: Hub, runner: Runner) -> None:
    code = """
api.create_repo(repo)
old = api.repo_info(repo).sha
def commit():
    api.create_commit(repo, [CommitOperationAdd("x.json", b"{}")], commit_message="x", parent_commit=old)
print(json.dumps(status(commit)))
"""
    lfs_hub.faults.add("push", method="POST", pattern="/commit/")
    assert python(runner, code) == 412
    assert list(lfs_hub.files(REPO)) == ["NOTES.md"]
    assert lfs_hub.commits(REPO)[0].author == "colleague"


def test_what_was_sent_is_measured(lfs_hub: Hub) -> None:
    data = weights(300_000)
    oid, path = sha256(data), f"/_lfs/{REPO}/{sha256(data)}"
    lfs_hub.faults.add("half", index=0)
    lfs_hub.faults.add("lost", index=1)
    assert isinstance(ask(lfs_hub, "PUT", path, data), str)
    assert (lfs_hub.received(oid), lfs_hub.objects.has(REPO, oid)) == (150_000, False)
    assert isinstance(ask(lfs_hub, "PUT", path, data), str)
    assert (lfs_hub.received(oid), lfs_hub.objects.has(REPO, oid)) == (450_000, True)
    assert ask(lfs_hub, "PUT", path, data) == 200
    assert lfs_hub.objects.sent_twice(REPO) == []  # the sender had never been told that it is stored
    assert ask(lfs_hub, "PUT", path, data) == 200
    assert lfs_hub.objects.sent_twice(REPO) == [oid]
    assert lfs_hub.stored_bytes(REPO) == 300_000
    assert ask(lfs_hub, "PUT", path, data[1:]) == 400


def test_a_download_goes_on_where_it_was_cut(hub: Hub, runner: Runner, folder: Path, tmp_path: Path) -> None:
    python(runner, "api.create_repo(repo); api.upload_folder(repo_id=repo, folder_path=sys.argv[1])", folder)
    hub.faults.add("truncated", method="GET", pattern="_lfs|xet-read-token")
    code = "print(json.dumps(api.hf_hub_download(repo, 'a.safetensors', local_dir=sys.argv[1])))"
    assert sha256(Path(str(python(runner, code, tmp_path / "copy"))).read_bytes()) == sha256(weights())


def test_xet_stores_a_chunk_once(tmp_path: Path, folder: Path) -> None:
    with Hub(tmp_path / "hub", xet=True) as hub, Runner(hub.env(), tmp_path / "output") as runner:
        upload = "api.create_repo(repo, exist_ok=True); api.upload_folder(repo_id=repo, folder_path=sys.argv[1])"
        python(runner, upload, folder)
        stored = hub.stored_bytes(REPO)
        (folder / "c.safetensors").write_bytes(weights() + weights(90_000, seed=1))
        python(runner, upload, folder)
        assert hub.files(REPO) == contents(folder)
        assert stored < hub.stored_bytes(REPO) < stored + 200_000  # chunks at the seam are new
        assert hub.xet_store.chunks_stored_twice(REPO) == 0


def test_a_killed_client_is_reported_and_the_next_runs(lfs_hub: Hub, runner: Runner) -> None:
    lfs_hub.faults.add("kill", pattern="whoami", act=runner.kill)
    assert runner.python("from huggingface_hub import HfApi; HfApi().whoami()").code == -9
    assert runner.python("from huggingface_hub import HfApi; print(HfApi().whoami()['name'])").out == "writer\n"
