"""`mechmerge doctor`: every look finds what it should, a token is never printed, and what is missing exits 4."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from click.testing import CliRunner

from mechmerge.cli.main import cli
from mechmerge.pipeline.doctor import Check, examine, passes

TOKEN = "hf_" + "secretsecretsecret"


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_this_machine_passes() -> None:
    checks = by_name(examine(offline=True))
    assert passes(list(checks.values())), [check for check in checks.values() if check.state == "missing"]
    expected = {
        "python",
        "mechmerge",
        "system",
        "packages",
        "mergekit",
        "torch",
        "threads",
        "memory",
        "disk of the cache",
        "cache",
    }
    assert expected | {"NLTK's punkt_tab", "Hub", "Hub token", "sandbox for code", "pip", "chromium"} <= checks.keys()
    assert checks["mergekit"].found.startswith("0.1.5")
    assert checks["Hub"].found == "not asked: offline"
    assert all(check.fix for check in checks.values() if check.state == "missing")


def test_packages_that_are_missing_or_of_another_version() -> None:
    wanted = ["numpy>=1", "numpy>=999", "not-a-package-of-anybody>=1", "nothing-for-here; sys_platform == 'plan9'"]
    found = [check for check in examine(offline=True, requirements=wanted) if check.name.startswith("package")]
    assert [(check.name, check.state) for check in found] == [
        ("package numpy", "missing"),
        ("package not-a-package-of-anybody", "missing"),
        ("packages", "ok"),
    ]
    assert "expected >=999" in found[0].found
    assert found[1].fix == "pip install 'not-a-package-of-anybody>=1'"
    assert found[2].found.startswith("2 ")
    assert not passes(found)


def test_extras_are_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = by_name(examine(offline=True, requirements=['not-a-package-of-anybody; extra == "vllm"', 'numpy; extra == "tune"']))
    assert found["extra vllm"].state == "note"
    assert found["extra vllm"].fix == "pip install 'mechmerge[vllm]'"
    assert found["extra tune"].state == "ok"


def test_extras_of_what_is_required_count() -> None:
    found = by_name(examine(offline=True, requirements=['lm-eval[vllm]>=0.4; extra == "vllm"']))["extra vllm"]
    assert (found.state == "ok") is (find_spec("vllm") is not None), found


def test_a_token_is_never_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for form in ("table", "json"):
        done = CliRunner().invoke(cli, ["doctor", "--offline", "--format", form])
        assert TOKEN not in done.output
    checks = json.loads(done.output)["doctor"]["checks"]
    assert next(check for check in checks if check["name"] == "Hub token")["state"] == "ok"


def test_a_cache_that_cannot_be_made_exits_4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MECHMERGE_CACHE", str(tmp_path / "file" / "cache"))
    done = CliRunner().invoke(cli, ["doctor", "--offline", "--format", "json"], standalone_mode=False)
    assert done.return_value == 4
    found = json.loads(done.output)["doctor"]
    assert found["ok"] is False
    assert [check["name"] for check in found["checks"] if check["state"] == "missing"] == ["cache"]
    assert "MECHMERGE_CACHE" in next(check["fix"] for check in found["checks"] if check["name"] == "cache")
