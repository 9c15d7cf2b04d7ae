"""Where derived models live: `MECHMERGE_CACHE`, else `~/.cache/mechmerge`."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """The cache folder (made when something is written into it)."""
    named = os.environ.get("MECHMERGE_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "mechmerge"
