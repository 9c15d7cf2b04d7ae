"""mergekit is one version; its own tools run with our method registered."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from mechmerge.cli.mergekit import command
from mechmerge.errors import InputError, MissingError
from mechmerge.merge.probe import probe
from mechmerge.merge.tools import run_tool, tools
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.models.references import Model
from mechmerge.recipe.emit import emit_masked
from mechmerge.recipe.schema import read_recipe
from tests.test_merge import check_formula, random_masks, written


def test_another_version_is_one_clear_line() -> None:
    with pytest.raises(MissingError, match=r"^mergekit: expected version 9\.9; found 0\.1\.5; pip install mergekit==9\.9$"):
        probe(wanted="9.9")


def test_no_mergekit_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(MissingError, match=r"^mergekit: expected version 0\.1\.5; found none; pip install mergekit==0\.1\.5$"):
        probe()


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("mergekit.nowhere:Executor", "No module named 'mergekit.nowhere'"),
        ("mergekit.graph:Nothing", "module 'mergekit.graph' has no attribute 'Nothing'"),
        ("mergekit.graph:Executor.walk", "type object 'Executor' has no attribute 'walk'"),
    ],
)
def test_a_name_that_mergekit_lacks_is_one_clear_line(place: str, said: str) -> None:
    with pytest.raises(MissingError) as raised:
        probe({"mergekit.graph:Executor.run": ("quiet",), place: ()})
    assert str(raised.value) == f"mergekit 0.1.5: expected {place}; found {said}; pip install mergekit==0.1.5"


@pytest.mark.parametrize("place", ["mergekit.graph:Executor.run", "mergekit.merge:MergeOptions"])
def test_a_parameter_that_mergekit_lacks_is_one_clear_line(place: str) -> None:
    """Of a function, and of a model of pydantic; those that are there are not named."""
    assert probe({place: ("quiet",)}) == "0.1.5"
    with pytest.raises(MissingError) as raised:
        probe({place: ("quiet", "zeal", "loud")})
    assert str(raised.value) == f"mergekit 0.1.5: expected {place} with loud, zeal; found none; pip install mergekit==0.1.5"


def test_what_is_needed_is_there() -> None:
    assert probe() == "0.1.5"


def test_importing_the_method_probes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line, not what the import of another mergekit happens to fail with; and the next import asks again."""
    assert probe() == "0.1.5"
    monkeypatch.delitem(sys.modules, "mechmerge.merge.method", raising=False)
    monkeypatch.setitem(sys.modules, "mergekit.merge_methods.base", None)
    with pytest.raises(MissingError, match=r"^mergekit 0\.1\.5: expected mergekit\.merge_methods\.base:\S+; found .*halted"):
        importlib.import_module("mechmerge.merge.method")
    monkeypatch.setattr(metadata, "version", lambda name: "9.9")
    with pytest.raises(MissingError, match=r"^mergekit: expected version 0\.1\.5; found 9\.9; pip install mergekit==0\.1\.5$"):
        importlib.import_module("mechmerge.merge.method")
    assert "mechmerge.merge.method" not in sys.modules


def test_mergekits_tools_are_found_and_others_refused() -> None:
    assert {"yaml", "multi", "pytorch", "extract-lora"} <= tools().keys()
    with pytest.raises(InputError, match=r"'nothing'.*yaml"):
        run_tool("nothing", [])


def test_a_masked_recipe_through_mergekits_own_tool(base: Model, expert: Model, tmp_path: Path) -> None:
    """In a process of its own, as a user runs it."""
    experts = {"e": expert}
    file = written(tmp_path, base, experts, random_masks(base, experts))
    (tmp_path / "masked.yaml").write_text(
        emit_masked(read_recipe(file)[0], file, {"base": base.path, "e": expert.path}), "utf-8"
    )
    arguments = ["mergekit", "yaml", tmp_path / "masked.yaml", tmp_path / "out", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-m", "mechmerge.cli.main", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    check_formula(file, tmp_path / "out", base, experts, torch.bfloat16, "mergekit")
    assert Checkpoint(tmp_path / "out").shapes == base.checkpoint().shapes


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("no file", "FileNotFoundError"),
        ("no YAML", "ParserError"),
        ("no model", "missing"),
        ("recipe moved", "set `recipe:` to where it is now"),
        ("unknown expert", "models with expert: e, each once; found x"),
    ],
)
def test_what_mergekit_fails_over_is_one_clear_line(base: Model, expert: Model, tmp_path: Path, change: str, said: str) -> None:
    file = written(tmp_path, base, {"e": expert}, {})
    text = emit_masked(read_recipe(file)[0], file, {"base": base.path, "e": expert.path})
    match change:
        case "no YAML":
            text = "a: ["
        case "no model":
            text = text.replace(str(expert.path), str(tmp_path / "missing"))
        case "recipe moved":
            text = text.replace(str(file), str(tmp_path / "moved.yaml"))
        case "unknown expert":
            text = text.replace("expert: e", "expert: x")
    yaml = tmp_path / "masked.yaml"
    if change != "no file":
        yaml.write_text(text, "utf-8")
    with pytest.raises((InputError, MissingError), match=re.escape(said)) as caught:
        run_tool("yaml", [str(yaml), str(tmp_path / "out"), "--quiet"])
    assert "\n" not in str(caught.value)


def test_usage_errors_are_mergekits() -> None:
    done = CliRunner().invoke(command, ["yaml", "--no-such-option"])
    assert done.exit_code == 2
    assert "no-such-option" in done.output
    done = CliRunner().invoke(command, ["mergekit-yaml", "--help"])
    assert done.exit_code == 0
    assert "out_path" in done.output.lower()
