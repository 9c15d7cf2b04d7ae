"""Behaviour files: built-in ones, a user's own, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mechmerge.behaviors.schema import builtin_names, load_behavior, load_group
from mechmerge.behaviors.verifiers import check_verifier, verify
from mechmerge.errors import InputError, LocalizeError, SchemaError

GOOD = {
    "name": "brief",
    "verifier": {"name": "contains", "arguments": {"text": "yes"}},
    "pairs": [{"with": f"Say {w} briefly.", "without": f"Say {w}.", "topic": w} for w in ("tea", "rain", "sun", "sea")],
}


def write(folder: Path, **changes: object) -> Path:
    path = folder / "brief.yaml"
    path.write_text(yaml.safe_dump(GOOD | changes))
    return path


def test_the_behaviours_that_ship_inside_the_package() -> None:
    first = ["capitals", "no_comma", "title", "quotation", "highlights", "sections", "arithmetic", "code"]
    assert builtin_names()[:8] == first
    assert len(builtin_names()) == 27
    assert [b.name for b in load_group("formats")] == builtin_names()[:6]
    for name in builtin_names():
        behavior = load_behavior(name)
        assert behavior.name == name
        assert behavior.chat_template == "model", "every behaviour names its chat template"
        assert behavior.verifier is not None
        check_verifier(behavior.verifier)
        assert len(behavior.pairs) >= 24
        for pair in behavior.pairs:
            assert pair.with_ != pair.without
            if name not in ("arithmetic", "code"):
                assert pair.with_.startswith(pair.without), "x⁻ is x⁺ without the instruction"


def test_both_halves_of_the_arithmetic_prompts_hold_both_operations() -> None:
    """Prompts are halved by taking turns, for anchors and for calibration alike."""
    texts = [pair.with_ for pair in load_behavior("arithmetic").pairs]
    for first in (0, 1):
        half = texts[first::2]
        additions = sum("+" in text for text in half)
        assert additions == len(half) - additions


def test_a_one_word_answer_passes_no_format() -> None:
    for behavior in load_group("formats"):
        assert behavior.verifier is not None
        for answer in ("SEA.", '"Sea."', "sea", "<<sea", "<<Sea>>", "*sea*", "*the* *sea*", "SECTION 1 SECTION 2"):
            assert not verify(behavior.verifier, "", answer, {}), (behavior.name, answer)


def test_a_users_file_works_the_same(tmp_path: Path) -> None:
    behavior = load_behavior(write(tmp_path))
    assert [pair.with_ for pair in behavior.pairs][:2] == ["Say tea briefly.", "Say rain briefly."]
    assert load_group(tmp_path / "brief.yaml") == (behavior,)
    again = load_behavior(write(tmp_path, description="other words"))
    assert again.digest != behavior.digest


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"surprise": 1}, SchemaError, "surprise: unknown key: known keys: name, description"),
        ({"pairs": GOOD["pairs"][:3]}, LocalizeError, "expected at least 4 pairs; found 3"),
        ({"pairs": [*GOOD["pairs"], {"with": "Say it.", "without": "Say it."}]}, LocalizeError, "pair 4: expected a contrast"),
        ({"pairs": []}, SchemaError, "exactly one of pairs and builtin"),
        ({"builtin": "capitals"}, SchemaError, "exactly one of pairs and builtin"),
        ({"pairs": None, "builtin": "shouting"}, SchemaError, "pairs"),
        ({"name": "../up"}, SchemaError, "name"),
        ({"pairs": [{"with": "a"}]}, SchemaError, "without"),
        ({"answer_tokens": 0}, SchemaError, "answer_tokens"),
    ],
)
def test_files_that_are_refused(changes: dict[str, object], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        load_behavior(write(tmp_path, **changes))


def test_an_unknown_name_is_told_what_there_is() -> None:
    with pytest.raises(InputError, match="behaviour shouting: expected a file, or one of capitals, no_comma"):
        load_behavior("shouting")


def test_yaml_bombs_and_double_keys_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "b.yaml"
    path.write_text("name: a\nname: b\n")
    with pytest.raises(SchemaError, match="key 'name' stands twice"):
        load_behavior(path)
    path.write_text("a: &x [1]\nb: [*x, *x]\n")
    with pytest.raises(SchemaError, match="aliases are not allowed"):
        load_behavior(path)
    path.write_text("name: [\n")
    with pytest.raises(SchemaError, match="valid YAML"):
        load_behavior(path)
    path.write_text("- just a list\n")
    with pytest.raises(SchemaError, match="expected a mapping"):
        load_behavior(path)
