"""`make audit`: licences are judged by what packages say, findings fail, and what could not be checked is said."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package(folder: Path, name: str, *headers: str) -> metadata.Distribution:
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("\n".join(["Metadata-Version: 2.1", f"Name: {name}", "Version: 1.0", *headers]) + "\n")
    return metadata.Distribution.at(info)


@pytest.mark.parametrize(
    ("said", "free"),
    [
        ("MIT", True),
        ("mit", True),
        ("Apache-2.0 AND MIT", True),
        ("Apache-2.0 OR GPL-3.0-only", True),
        ("LGPL-3.0-only", True),
        ("BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0", True),
        ("3-Clause BSD License", True),
        ("GPL-3.0-only", False),
        ("AGPL-3.0-or-later", False),
        ("MIT AND GPL-2.0-only", False),
        ("Apache-2.0 with Commons Clause", False),
        ("none said", False),
        ("CC-BY-NC-4.0", False),
        ("SSPL-1.0", False),
        ("MIT-like, mostly", False),
    ],
)
def test_licences(audit: ModuleType, said: str, free: bool) -> None:
    assert audit.is_free(said) is free


def test_what_a_package_says(audit: ModuleType, tmp_path: Path) -> None:
    osi = "Classifier: License :: OSI Approved :: "
    packages = [
        package(tmp_path, "one", "License-Expression: MIT", "License: something else"),
        package(tmp_path, "two", f"{osi}BSD License", f"{osi}Apache Software License"),
        package(tmp_path, "three", "License: Apache 2.0"),
        package(tmp_path, "four", f"{osi}GNU Affero General Public License v3"),
        package(tmp_path, "five"),
        package(tmp_path, "nvidia-cublas-cu12", "License: NVIDIA Proprietary Software"),
    ]
    refused, line = audit.licenses(packages)
    assert [problem.split(":")[0] for problem in refused] == ["four", "five"]
    assert line == "licences: 6 packages, 2 refused, 1 known by name"


def test_our_own_dependencies_are_free(audit: ModuleType) -> None:
    refused, _ = audit.licenses(metadata.distributions())
    assert refused == []


def said(stdout: str, returncode: int = 0, stderr: str = "") -> Callable[..., Any]:
    return lambda command, **_: subprocess.CompletedProcess(command, returncode, stdout, stderr)


def test_vulnerabilities(audit: ModuleType, tmp_path: Path) -> None:
    packages = [package(tmp_path, "one"), package(tmp_path, "two"), package(tmp_path, "mechmerge")]
    found = {
        "dependencies": [
            {
                "name": "one",
                "version": "1.0",
                "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"]}, {"id": "PYSEC-2", "fix_versions": []}],
            },
            {"name": "two", "skip_reason": "not on the index"},
        ]
    }
    problems, line = audit.vulnerabilities(packages, Path("pip-audit"), said(json.dumps(found), 1))
    assert problems == ["one 1.0: PYSEC-1, mended in 1.1", "one 1.0: PYSEC-2, mended in no version yet"]
    assert line == "vulnerabilities: 1 packages looked up, 2 found (1 not in the database: two)"
    audit.IGNORED["PYSEC-1"] = "of this test"
    assert len(audit.vulnerabilities(packages, Path("pip-audit"), said(json.dumps(found), 1))[0]) == 1
    del audit.IGNORED["PYSEC-1"]
    nothing = {"dependencies": [{"name": name, "skip_reason": "not on the index"} for name in ("one", "two")]}
    problems, line = audit.vulnerabilities(packages, Path("pip-audit"), said(json.dumps(nothing)))
    assert problems == []
    assert line.startswith("not checked: vulnerabilities (the package index told of none of 2 packages)")
    problems, line = audit.vulnerabilities(packages, Path("pip-audit"), said("", 1, "…\nConnectionError: no route"))
    assert problems == []
    assert line.startswith("not checked: vulnerabilities (ConnectionError: no route)")


def test_the_bill_of_materials(audit: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "dist" / "sbom.json"

    def maker(command: list[Any], **_: Any) -> subprocess.CompletedProcess[str]:
        assert command[-2:] == ["-o", out]
        assert sys.executable in command
        out.write_text(json.dumps({"components": [{}, {}]}))
        return subprocess.CompletedProcess(command, 0, "", "")

    assert audit.materials(Path("cyclonedx-py"), out, 3, maker) == ([], f"bill of materials: {out} (2 components)")
    assert audit.materials(Path("cyclonedx-py"), out, 9, maker)[0] == ["bill of materials: 2 components for 9 packages"]
    assert audit.materials(Path("cyclonedx-py"), out, 9, said("", 2, "broken"))[0] == ["bill of materials: broken"]


def test_without_tools_it_says_so_and_passes_unless_strict(
    audit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(audit, "tools", lambda folder: None)
    assert audit.main(["--tools", str(tmp_path)]) == 0
    assert "not checked: vulnerabilities and bill of materials" in capsys.readouterr().out
    assert audit.main(["--tools", str(tmp_path), "--strict"]) == 1


def test_versions_are_pinned_and_the_update_keeps_the_form() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    assert all(line.startswith("#") for line in lines[:2])
    assert all("==" in line and "+" not in line and "@" not in line for line in lines[2:])
    assert any(line.startswith("torch==") for line in lines)
    assert subprocess.run(["bash", "-n", str(ROOT / ".ci" / "update")], check=False).returncode == 0
