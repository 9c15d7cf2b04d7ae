"""What we depend on, looked through: known vulnerabilities (pip-audit), licences, and a bill of materials (CycloneDX).

`make audit` runs this with the interpreter of `.venv`, whose packages it is about. The tools live in an environment of their
own, `.audit/`, so that they are never among what they look at. What cannot be checked (no network, no tool) is said and does
not fail, unless `--strict`; what is found does.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("pip-audit==2.10.1", "cyclonedx-bom==7.5.0")
FREE = (
    r"MIT(-CMU)?", r"(The )?MIT License( \(MIT\))?", r"0BSD", r"(\d-Clause )?BSD( License)?", r"BSD-\d-Clause", r"BSL-1\.0",
    r"Apache(-| )2\.0( License)?", r"Apache Software License", r"Apache-2\.0 WITH LLVM-exception", r"ISC License \(ISCL\)",
    r"ISC",
    r"Zlib", r"CC0-1\.0", r"HPND", r"Unlicense", r"PSF-2\.0", r"CNRI-Python", r"Python Software Foundation License",
    r"MPL-2\.0", r"Mozilla Public License 2\.0 \(MPL 2\.0\)",
    r"LGPL-\d\.\d-(only|or-later)", r"GNU Lesser General Public License v2 or later \(LGPLv2\+\)",
)  # fmt: skip
"""Licences under which a package may be depended on. The LGPL's are imported, never copied from."""
KNOWN = {
    "axe-playwright-python": "MIT, by the LICENSE of its repository; its wheel names none. For tests alone",
    r"nvidia-.*|cuda-.*": "NVIDIA's own terms: what torch's CUDA builds bring along; the CPU build has none",
}
"""Packages whose metadata says no licence of `FREE`, and why they may stay."""
IGNORED: dict[str, str] = {}
"""Vulnerabilities that do not concern us, by id, and why."""
RETRY = "there may be no network; run it again where there is one"


def license_of(package: metadata.Distribution) -> str:
    """What a package's metadata says of its licence: the expression, else the classifiers, else the first line of the text."""
    meta = package.metadata
    said = meta.get("License-Expression")
    if said:
        return str(said)
    classifiers = [entry.split(" :: ")[-1] for entry in meta.get_all("Classifier") or [] if entry.startswith("License :: OSI")]
    return " AND ".join(classifiers) or (meta.get("License") or "").strip().split("\n")[0][:60] or "none said"


def is_free(said: str) -> bool:
    """Whether every part of an AND, and one part of an OR, is a licence of `FREE`."""
    text = said.strip()
    if any(re.fullmatch(pattern, text, re.IGNORECASE) for pattern in FREE):
        return True
    if " AND " in text:
        return all(is_free(part.strip("() ")) for part in text.split(" AND "))
    return " OR " in text and any(is_free(part.strip("() ")) for part in text.split(" OR "))


def licenses(packages: Iterable[metadata.Distribution]) -> tuple[list[str], str]:
    """(packages that may not be depended on, a line about all of them)."""
    refused, count, excused = [], 0, 0
    for package in packages:
        name, said = str(package.metadata["Name"]).lower(), license_of(package)
        count += 1
        if is_free(said):
            continue
        if any(re.fullmatch(pattern, name) for pattern in KNOWN):
            excused += 1
            continue
        refused.append(f"{name}: licence {said!r} is none of those that may be depended on")
    return refused, f"licences: {count} packages, {len(refused)} refused, {excused} known by name"


def tools(folder: Path) -> Path | None:
    """The tools' environment, made where it is not there; None where they cannot be fetched."""
    wanted, stamp = "\n".join(TOOLS), folder / "tools.txt"
    if stamp.is_file() and stamp.read_text() == wanted:
        return folder / "bin"
    venv.create(folder, clear=True, with_pip=True)
    done = subprocess.run(
        [folder / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *TOOLS],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        return None
    stamp.write_text(wanted)
    return folder / "bin"


def vulnerabilities(
    packages: Iterable[metadata.Distribution], audit: Path, run: Callable[..., Any] = subprocess.run
) -> tuple[list[str], str]:
    """(known vulnerabilities, a line about what was looked at; it begins with `not checked` where nothing was)."""
    pins = sorted(f"{p.metadata['Name']}=={p.version.split('+')[0]}" for p in packages if p.metadata["Name"] != "mechmerge")
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(pins) + "\n")
        file.flush()
        command = [
            audit,
            "--requirement",
            file.name,
            "--no-deps",
            "--disable-pip",
            "--format",
            "json",
            "--progress-spinner",
            "off",
        ]
        done = run(command, capture_output=True, text=True, check=False)
    try:
        found = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return [], f"not checked: vulnerabilities ({last[:160]}); {RETRY}"
    problems = [
        f"{entry['name']} {entry['version']}: {one['id']}, mended in {', '.join(one['fix_versions']) or 'no version yet'}"
        for entry in found
        for one in entry.get("vulns", [])
        if one["id"] not in IGNORED
    ]
    skipped = [entry["name"] for entry in found if "skip_reason" in entry]
    if found and len(skipped) == len(found):
        # A package index without the data: a mirror, or none within reach.
        return [], f"not checked: vulnerabilities (the package index told of none of {len(found)} packages); {RETRY}"
    more = f" ({len(skipped)} not in the database: {', '.join(skipped[:5])})" if skipped else ""
    return problems, f"vulnerabilities: {len(found) - len(skipped)} packages looked up, {len(problems)} found{more}"


def materials(maker: Path, out: Path, count: int, run: Callable[..., Any] = subprocess.run) -> tuple[list[str], str]:
    """(what is wrong with the bill of materials, a line about it)."""
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [
        maker,
        "environment",
        sys.executable,
        "--pyproject",
        ROOT / "pyproject.toml",
        "--output-reproducible",
        "--of",
        "JSON",
    ]
    done = run([*command, "-o", out], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return [f"bill of materials: {last[:160]}"], "bill of materials: none"
    components = json.loads(out.read_text("utf-8")).get("components", [])
    # mechmerge itself is the bill's subject, not one of its components.
    missing = [f"bill of materials: {len(components)} components for {count} packages"] if len(components) < count - 1 else []
    return missing, f"bill of materials: {out} ({len(components)} components)"


def main(arguments: list[str] | None = None) -> int:
    """Checks all, prints what came out, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist/sbom.cdx.json", help="the bill of materials")
    parser.add_argument("--tools", type=Path, default=ROOT / ".audit", help="environment of the tools")
    parser.add_argument("--strict", action="store_true", help="fail when something could not be checked")
    options = parser.parse_args(arguments)
    packages = list({p.metadata["Name"].lower(): p for p in metadata.distributions()}.values())
    results = [licenses(packages)]
    folder = tools(options.tools)
    if folder is None:
        results.append(
            ([], f"not checked: vulnerabilities and bill of materials (pip could not fetch {', '.join(TOOLS)}); {RETRY}")
        )
    else:
        results.append(vulnerabilities(packages, folder / "pip-audit"))
        results.append(materials(folder / "cyclonedx-py", options.out, len(packages)))
    problems = [problem for found, _ in results for problem in found]
    unchecked = [line for _, line in results if line.startswith("not checked")]
    for line in (*(line for _, line in results), *(f"  {problem}" for problem in problems)):
        print(line)
    return 1 if problems or (options.strict and unchecked) else 0


if __name__ == "__main__":
    sys.exit(main())
