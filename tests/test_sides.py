"""What an expert has otherwise than its base beside the weights: found, said once, and what is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mechmerge.errors import CheckpointError
from mechmerge.models.references import Model
from mechmerge.models.sides import RULE, chat_template, differences, note_differences
from mechmerge.progress import NullProgress
from mechmerge.publish.card_sections import _templates
from tests.samples import evaluation


@pytest.fixture
def folder(expert: Model, tmp_path: Path) -> Path:
    return Path(shutil.copytree(expert.path, tmp_path / "expert"))


def settings(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))


CASES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "nothing": (lambda folder: None, []),
    "another template": (
        lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
        ["it has another chat template; the merge keeps the base's"],
    ),
    "no template": (
        lambda folder: (folder / "chat_template.jinja").unlink(),
        ["it has no chat template; the merge keeps the base's"],
    ),
    "another end": (
        lambda folder: settings(folder, "tokenizer_config.json", eos_token="<|endoftext|>"),  # noqa: S106 - no password
        ["its eos_token is '<|endoftext|>'; the merge keeps the base's '<|im_end|>'"],
    ),
    "the same end, told at length": (
        lambda folder: settings(folder, "tokenizer_config.json", eos_token={"content": "<|im_end|>", "lstrip": False}),
        [],
    ),
    "another end of answers": (
        lambda folder: settings(folder, "generation_config.json", eos_token_id=[0, 2]),
        ["its answers end with token [0, 2]; the merge's with the base's 2"],
    ),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        ["it or the base has no tokenizer.json or vocab.json: equal rows are taken for equal tokens, unseen"],
    ),
    "the same end in a list": (lambda folder: settings(folder, "generation_config.json", eos_token_id=[2]), []),
}


@pytest.mark.parametrize("case", CASES)
def test_differences(case: str, base: Model, folder: Path) -> None:
    change, said = CASES[case]
    change(folder)
    assert differences(base.path, folder) == said


def test_a_base_without_a_template(base: Model, folder: Path, tmp_path: Path) -> None:
    plain = Path(shutil.copytree(base.path, tmp_path / "plain"))
    (plain / "chat_template.jinja").unlink()
    assert differences(plain, folder) == ["it has a chat template; the merge has none, like the base"]


def test_templates_wherever_they_lie(base: Model, tmp_path: Path) -> None:
    text = chat_template(base.path)
    assert text is not None
    old = Path(shutil.copytree(base.path, tmp_path / "old"))
    (old / "chat_template.jinja").unlink()
    assert chat_template(old) is None
    settings(old, "tokenizer_config.json", chat_template=text)
    assert chat_template(old) == text
    settings(old, "tokenizer_config.json", chat_template=[{"name": "default", "template": text}])
    assert chat_template(old) is not None


@pytest.mark.parametrize("content", ["{", "[]"])
def test_settings_that_are_no_settings(content: str, base: Model, folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(content)
    with pytest.raises(CheckpointError, match="tokenizer_config"):
        differences(base.path, folder)


class Heard(NullProgress):
    """Keeps notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_the_rule_is_said_where_something_differs(base: Model, expert: Model, folder: Path) -> None:
    heard = Heard()
    note_differences(base.path, {"a": expert.path}, heard)
    assert heard.notes == []
    (folder / "chat_template.jinja").unlink()
    note_differences(base.path, {"a": expert.path, "b": folder}, heard)
    assert heard.notes == ["note: expert b: it has no chat template; the merge keeps the base's", f"note: {RULE}"]


def test_the_card_says_who_was_asked_in_another_template() -> None:
    record = evaluation("base", "formats", "sum")
    assert _templates("sum", record) == []
    other = record.models["formats"].suites["formats"].model_copy(update={"template": "f" * 64})
    changed = record.models["formats"].model_copy(update={"suites": {"formats": other}})
    record = record.model_copy(update={"models": dict(record.models) | {"formats": changed}})
    assert _templates("sum", record) == ["In another chat template than this model's were asked: formats (formats).", ""]
    assert _templates("nobody", record) == []
