"""Versions of what a result depends on."""

from __future__ import annotations

import functools
import platform
from importlib import metadata

from mechmerge.version import __version__

PACKAGES = ("torch", "transformers", "safetensors", "numpy")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of mechmerge, Python and the packages that numbers depend on."""
    found = {"mechmerge": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        found[package] = metadata.version(package)
    return found
