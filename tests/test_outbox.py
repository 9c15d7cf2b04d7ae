"""What leaves the machine: named kinds of files, what their names say, no path, no user and no token."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mechmerge.errors import InputError
from mechmerge.publish.hub import publish_scores
from mechmerge.publish.outbox import Packing, is_ours_in_model, may_leave, model_files
from tests.hub import Hub
from tests.hub.accounts import WRITER
from tests.hub.runner import Runner
from tests.publishing import QUICK, REPO, Publish

# huggingface_hub's own use of httpx2.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


def test_only_named_kinds_of_files_leave(run: Path) -> None:
    folder = run / "merged" / "conflict"
    for name in ("modeling.py", "optimizer.pt", "training_args.json", "notes.md", "tokenizer.model", "vocab.txt", "a/b.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"{}")
    go, stay = model_files(folder, ["model.safetensors"])
    assert set(go) == {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
                       "chat_template.jinja", "vocab.txt"}  # fmt: skip
    assert set(stay) == {"modeling.py", "optimizer.pt", "training_args.json", "notes.md", "tokenizer.model", "a/b.json",
                         "mechmerge/recipe.yaml", "mechmerge/masks.safetensors"}  # fmt: skip
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.model" in model_files(folder, ["model.safetensors"])[0], "there is no other tokenizer"


def test_what_stays_is_said(send: Publish, lfs_hub: Hub, run: Path) -> None:
    (run / "merged/conflict/train.py").write_text("secret = 1")
    assert send(run).plan.left_out == ("train.py",)
    assert "train.py" not in lfs_hub.files(REPO)
    assert not [path for path in lfs_hub.files(REPO) if not may_leave(Path(path).name)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"no json", r"a real \.json file"),
        ("figure.png", b"GIF89a", r"a real \.png file; found ValueError: no PNG"),
        ("scores.safetensors", b"\x80\x04pickle", r"a real \.safetensors file"),
        ("recipe.yaml", b"{", r"a real \.yaml file"),
        ("weights.bin", b"", "expected a .* file; found another kind"),
        (
            "config.json",
            b'{"_name_or_path": "/home/alice/models/base"}',
            "no path of this machine; found /home/alice/models/base",
        ),
        ("recipe.yaml", b"base: C:\\Users\\alice\\base", "no path of this machine"),
        ("README.md", b"mine: hf_abcdefghijklmnopqrstuvwxyz", "expected no token"),
        ("tokenizer.json", b'{"vocab": ["/home/", "hf_"]}', None),
    ],
)
def test_every_file_is_what_it_says_and_tells_nothing_private(
    tmp_path: Path, name: str, content: bytes, message: str | None
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    packing = Packing(tmp_path / "out")
    packing.link(name, tmp_path / "in" / name)
    if message is None:
        assert [file.path for file in packing.files()] == [name]
    else:
        with pytest.raises(InputError, match=message):
            packing.files()


def test_the_runs_own_folder_is_private_wherever_it_lies(tmp_path: Path) -> None:
    packing = Packing(tmp_path / "out")
    save_file({"a": np.zeros(1)}, tmp_path / "x.safetensors", {"mechmerge": json.dumps({"file": str(tmp_path / "x")})})
    packing.link("x.safetensors", tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="no path of this machine"):
        packing.files([tmp_path])


def test_no_path_and_no_user_reaches_the_hub(send: Publish, lfs_hub: Hub, run: Path) -> None:
    send(run)
    publish_scores(run, "writer/scores", endpoint=lfs_hub.url, token=WRITER, patience=QUICK)
    held = b"".join(
        file.data or lfs_hub.objects.path(name, file.sha256).read_bytes()
        for (_, name), repository in lfs_hub.repositories.items()
        for file in repository.resolve("main").tree.values()
    )
    for private in ("alice-the-user", str(run), str(Path.home()) + "/", "pytest-of"):
        assert private.encode() not in held, private


def test_no_token_in_any_output_or_file(hub: Hub, publisher: Runner, run: Path, tmp_path: Path) -> None:
    outputs, codes = [], []
    hub.faults.add("error", method="POST", pattern="/commit/main", status=403)

    def call(command: str, repo: str, *options: str) -> None:
        done = publisher.mechmerge("--debug", command, run, f"writer/{repo}", *options)
        outputs.extend((done.out, done.err))
        codes.append(done.code)

    call("publish", "model")
    assert "403" in outputs[1] or "Forbidden" in outputs[1]
    for options in ((), ("--dry-run",), ("--pr",), ("--branch", "trial"), ("--format", "json")):
        call("publish", "model", *options)
    call("publish", "direct", "--direct")
    call("publish-scores", "scores", "--tag", "v1")
    hub.faults.add("expired", method="POST")
    call("publish-scores", "again")
    assert "expected a valid token" in outputs[-1]
    assert codes == [1, *[0] * 7, 1], "with --debug an error is raised as it is"
    files = [path for folder in (run.parent, hub.root, tmp_path) for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 30
    for text in (*(output.encode() for output in outputs), *(path.read_bytes() for path in files)):
        assert WRITER.encode() not in text
        assert WRITER[4:].encode() not in text


def test_ours_is_what_publishing_fills() -> None:
    ours = ("README.md", "config.json", "model-00001-of-00003.safetensors", "tokenizer.model", "mechmerge/anything.png",
            ".eval_results/mechmerge.yaml")  # fmt: skip
    theirs = ("LICENSE", "notes.md", ".gitattributes", "onnx/model.onnx", "adapter_model.safetensors", "sub/tokenizer.json",
              ".eval_results/other.yaml", "vocab.bpe")  # fmt: skip
    assert all(map(is_ours_in_model, ours))
    assert not any(map(is_ours_in_model, theirs))
