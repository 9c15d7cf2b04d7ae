"""What a pipeline may name when it comes over the network: a table of what is refused, and what it is rewritten to."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mechmerge.errors import InputError
from mechmerge.models.demo import NAME as DEMO
from mechmerge.pipeline.schema import Pipeline
from mechmerge.service.admission import admit, admit_reference, check_names, check_repo, sent_files, write_input
from mechmerge.service.settings import Settings, check_exposure
from tests.serving import light_files, light_pipeline


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    for name in ("models/base", "models/a+b", "secret/model"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "models/file").write_text("x")
    (tmp_path / "models/out").symlink_to(tmp_path / "secret")
    (tmp_path / "models/alias").symlink_to("base")
    return Settings(data=tmp_path / "data", folders=(tmp_path / "models",), namespaces=("good",), publish_to=("us",))


REFUSED = [
    # paths
    "{root}/secret/model", "{root}/models/../secret/model", "{root}/models/out/model", "{root}/models", "{root}/models/none",
    "{root}/models/file", "/etc", "/etc/passwd", "/", "//etc", "~", "~root", "./base", "../models/base", "base", "models/base",
    "{root}/models/base/../../secret/model", "{root}/models-other", "{root}/models/base\0",
    "/proc/self/root{root}/secret/model",
    # the Hub
    "evil/model", "hf://evil/model", "good/../evil/model", "good/model@../../x", "hf://datasets/good/data", "good/model@",
    "good/a/b", "hf://good", "Good/model", "good /model", "good/mo del",
    # addresses
    "http://169.254.169.254/latest", "https://good/model", "file:///etc", "hf://good/model@http://x/y", "ftp://good/model",
    "//good/model", "good/model?x=1", "good/model#x", "s3://good/model",
    # others
    "", "+", "demo:other", "demo:", "good/model+", "+good/model", "good/model+evil/adapter", "good/model+/etc", "*", "{{7*7}}",
    "$HOME/models", "`id`", "-rf", "good/model\n", "good/mödel", "good/модель",
]  # fmt: skip


@pytest.mark.parametrize("reference", REFUSED)
def test_references_that_are_refused(reference: str, settings: Settings) -> None:
    text = reference.replace("{root}", str(settings.data.parent))
    if text == f"{settings.data.parent}/models":
        # The allowed folder itself holds models, and is none: reading it fails later, in the worker.
        assert admit_reference(text, settings) == text
        return
    with pytest.raises(InputError, match="model reference") as caught:
        admit_reference(text, settings)
    assert "\n" not in str(caught.value)


def test_what_lies_outside_is_not_told(settings: Settings) -> None:
    root = settings.data.parent

    def answer(path: str) -> str:
        with pytest.raises(InputError) as caught:
            admit_reference(path, settings)
        return str(caught.value).replace(path, "PATH")

    told = {answer(f"{root}/{name}") for name in ("secret/model", "secret/none", "models/out/model", "models/out/none")}
    assert len(told) == 1
    assert "that this server allows" in told.pop()


@pytest.mark.parametrize(
    ("reference", "meant"),
    [
        ("{root}/models/base", "{root}/models/base"),
        ("{root}/models/./base/", "{root}/models/base"),
        ("{root}/models/alias", "{root}/models/base"),
        ("{root}/models/a+b", "{root}/models/a+b"),
        ("{root}/models/base+good/adapter", "{root}/models/base+hf://good/adapter"),
        ("good/model", "hf://good/model"),
        ("hf://good/model@v1.0", "hf://good/model@v1.0"),
        ("good/model@refs/pr/1+good/adapter@main", "hf://good/model@refs/pr/1+hf://good/adapter@main"),
        (f"demo:{DEMO}", f"demo:{DEMO}"),
    ],
)
def test_references_that_are_allowed(reference: str, meant: str, settings: Settings) -> None:
    root = str(settings.data.parent)
    found = admit_reference(reference.replace("{root}", root), settings)
    assert found == meant.replace("{root}", root)
    assert admit_reference(found, settings) == found, "what the worker asks again"


def test_nothing_is_allowed_unless_it_is_said(tmp_path: Path) -> None:
    settings = Settings(data=tmp_path)
    for reference in ("good/model", str(tmp_path)):
        with pytest.raises(InputError):
            admit_reference(reference, settings)
    assert admit_reference("any/model", settings.model_copy(update={"namespaces": ("*",)})) == "hf://any/model"


def text_of(**changes: Any) -> str:
    return yaml.safe_dump(light_pipeline("good/base", "good/expert", **changes), sort_keys=False)


def test_an_admitted_pipeline_means_the_same_when_it_is_admitted_again(settings: Settings) -> None:
    from mechmerge.artifacts import to_yaml

    first = admit(text_of(), light_files(), settings)
    assert first.base == "hf://good/base"
    assert first.experts == {"a": "hf://good/expert"}
    assert admit(to_yaml(first), light_files(), settings) == first


EVALUATE: dict[str, Any] = {"suites": ["short.yaml"], "dtype": "float32", "batch": 4}
PIPELINES = {
    "an absolute behaviour": ({"behaviors": {"loud": {"expert": "a", "file": "/etc/passwd"}}}, "behaviors.loud"),
    "a behaviour above": ({"behaviors": {"loud": {"expert": "a", "file": "../../instance"}}}, "behaviors.loud"),
    "a behaviour that was not sent": ({"behaviors": {"other": {"expert": "a"}}}, "expected a file sent along"),
    "an absolute ability": ({"protect": {"talk": {"file": "/etc/passwd"}}}, "protect.talk"),
    "an ability above": ({"protect": {"../../x.yaml": {}}}, "protect"),
    "an absolute suite": ({"evaluate": EVALUATE | {"suites": ["/etc/passwd"]}}, "evaluate.suites"),
    "a suite above": ({"evaluate": EVALUATE | {"suites": ["../x.yaml"]}}, "evaluate.suites"),
    "absolute data": ({"evaluate": EVALUATE | {"ifeval_data": "/etc/passwd"}}, "evaluate.ifeval_data"),
    "data by URL": ({"evaluate": EVALUATE | {"ifeval_data": "http://127.0.0.1/x.jsonl"}}, "evaluate.ifeval_data"),
    "an unknown key": ({"trust_remote_code": True}, "trust_remote_code: unknown key"),
    "an expert elsewhere": ({"experts": {"a": "evil/model"}}, "an owner that this server allows"),
    "too long": ({"notes": "x" * 200_000}, "at most 100000 bytes"),
}


def test_every_place_that_names_a_file_is_in_the_table() -> None:
    """A new place in the schema needs admission, and a row above."""
    text = json.dumps(Pipeline.model_json_schema())
    named = {name for name in re.findall(r'"(\w+)(?=": \{)', text) if re.search("file|data|path|folder|director|suite", name)}
    assert named == {"file", "ifeval_data", "suites"}
    assert text.count('"file": {') == 2, "of behaviours, and of protected abilities"


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_that_are_refused(name: str, settings: Settings) -> None:
    changes, message = PIPELINES[name]
    with pytest.raises(InputError, match=message):
        admit(text_of(**changes), light_files(), settings)


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system [id]",
        "title: !!python/name:os.system",
        "a: &a [x]\nb: *a",
        "a: 1\na: 2",
        "[" * 50_000,
        "{" * 50_000,
        "- a list",
        "just text",
        "",
        "\0",
        "a: 9" + "9" * 10_000,
        "<<: {a: 1}",
    ],
)
def test_yaml_that_is_refused(text: str, settings: Settings) -> None:
    with pytest.raises(InputError) as caught:
        admit(text, [], settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["../x.yaml", "/x.yaml", "a/../x.yaml", ".x.yaml", "a/.x.yaml", "a//x.yaml", "x.py", "x", "a/b/c/d/x.yaml", "x.yaml\n",
     "x.yaml/", "pipeline.yaml", "a\\x.yaml", "x\0.yaml", "C:x.yaml", "", "x.yaml/y.yaml/../../z.yaml", "-x.yaml", "ä.yaml"],
)  # fmt: skip
def test_names_of_files_that_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="files"):
        write_input(tmp_path / "input", "x", {name: "text"})
    assert not list(tmp_path.rglob("*"))


def test_a_file_is_no_folder_of_another() -> None:
    with pytest.raises(InputError, match="a folder of another file"):
        check_names(["a.yaml", "a.yaml/b.yaml"])
    with pytest.raises(InputError, match="at most 64"):
        check_names(f"{i}.yaml" for i in range(65))


def test_sent_files_are_found_again(tmp_path: Path) -> None:
    write_input(tmp_path, "x", {"a.yaml": "1", "b/c.jsonl": "2"})
    assert sent_files(tmp_path) == ["a.yaml", "b/c.jsonl"]


@pytest.mark.parametrize(
    "repo", ["them/model", "us", "us/a/b", "us/model@main", "us/../them", "hf://us/model", "us/", "us/a b"]
)
def test_repositories_that_are_refused(repo: str, settings: Settings) -> None:
    with pytest.raises(InputError, match="repo"):
        check_repo(repo, settings)
    assert check_repo("us/model", settings) == "us/model"


@pytest.mark.parametrize(
    ("given", "open_"),
    [
        ({}, True),
        ({"host": "::1"}, True),
        ({"host": "localhost"}, True),
        ({"host": "127.8.8.8"}, True),
        ({"host": "0.0.0.0"}, False),  # noqa: S104
        ({"host": "::"}, False),
        ({"host": "10.0.0.1"}, False),
        ({"host": "server.example"}, False),
        ({"hosts": ("merge.example",)}, False),
    ],
)
def test_beyond_the_loopback_only_with_tokens(given: dict[str, Any], open_: bool, tmp_path: Path) -> None:
    settings = Settings(data=tmp_path, **given)
    check_exposure(settings, tokens=1)
    if open_:
        check_exposure(settings, tokens=0)
    else:
        with pytest.raises(InputError, match=r"expected tokens.*serve token add"):
            check_exposure(settings, tokens=0)
