"""What lies beside the weights of a base and of an expert, compared: chat template, special tokens, end of an answer.

The rule: a merge keeps the base's tokenizer, special tokens, chat template and generation settings, and behaviours are measured
in the base's template; an expert's own are used in one place alone, where the expert itself is evaluated. Where they differ it
is said, since such an expert was trained on other texts than those that the merge will read. The vocabularies themselves are no
matter of taste: `pair.check_pair` refuses others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mechmerge.errors import CheckpointError
from mechmerge.models.pair import vocabulary_file
from mechmerge.progress import Progress

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")
"""Entries of tokenizer_config.json that name a token with a meaning."""
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
"""Where else than in tokenizer_config.json a template may lie."""
RULE = "A merge keeps the base's tokenizer, special tokens, chat template and generation settings."


def differences(base: Path, expert: Path) -> list[str]:
    """What an expert has otherwise than the base, one sentence each; empty where nothing differs.

    Raises:
        CheckpointError: one of their files is no JSON object.
    """
    said = []
    mine, theirs = chat_template(base), chat_template(expert)
    if mine != theirs:
        found = "has no chat template" if theirs is None else "has another chat template" if mine else "has a chat template"
        kept = "the merge has none, like the base" if mine is None else "the merge keeps the base's"
        said.append(f"it {found}; {kept}")
    if any(vocabulary_file(folder) is None for folder in (base, expert)):
        said.append("it or the base has no tokenizer.json or vocab.json: equal rows are taken for equal tokens, unseen")
    one, other = _settings(base, "tokenizer_config.json"), _settings(expert, "tokenizer_config.json")
    for name in SPECIAL:
        if other and _token(one, name) != _token(other, name):
            said.append(f"its {name} is {_token(other, name)!r}; the merge keeps the base's {_token(one, name)!r}")
    ends = [_settings(folder, "generation_config.json").get("eos_token_id") for folder in (base, expert)]
    if None not in ends and _ids(ends[0]) != _ids(ends[1]):
        said.append(f"its answers end with token {ends[1]}; the merge's with the base's {ends[0]}")
    return said


def note_differences(base: Path, experts: Mapping[str, Path], progress: Progress) -> None:
    """Tells of every difference, and of the rule where there is one."""
    said = [f"expert {name}: {text}" for name, expert in experts.items() for text in differences(base, expert)]
    for text in said:
        progress.note(f"note: {text}")
    if said:
        progress.note(f"note: {RULE}")


def chat_template(folder: Path) -> str | None:
    """The chat template of a model folder as a text that can be compared; None where it has none.

    Raises:
        CheckpointError: a file that should hold one is no JSON object.
    """
    for name in TEMPLATES:
        path = folder / name
        if path.is_file():
            return path.read_text("utf-8", errors="replace")
        if path.is_dir():
            return "\n".join(file.read_text("utf-8", errors="replace") for file in sorted(path.glob("*.jinja")))
    template = _settings(folder, "tokenizer_config.json").get("chat_template")
    return template if isinstance(template, str) or template is None else json.dumps(template, sort_keys=True)


def _settings(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise CheckpointError(str(path), expected="valid JSON", found=str(error)) from None
    if not isinstance(value, dict):
        raise CheckpointError(str(path), expected="a JSON object", found=type(value).__name__)
    return value


def _token(settings: dict[str, Any], name: str) -> str | None:
    value = settings.get(name)
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _ids(value: Any) -> list[Any]:
    """End tokens, one or several, in an order of their own."""
    return sorted(value if isinstance(value, list) else [value], key=str)
