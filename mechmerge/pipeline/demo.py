"""Where the demo's pipeline file and experts lie: in a checkout's `recipes/demo`, or in the wheel's copy of it."""

from __future__ import annotations

from pathlib import Path

from mechmerge.errors import MissingError


def demo_folder(package: Path | None = None) -> Path:
    """The folder that holds the demo's `pipeline.yaml` and `experts/`.

    Args:
        package: folder of the package (default: that of the running one).

    Raises:
        MissingError: neither a checkout nor a wheel's copy is there.
    """
    package = Path(__file__).resolve().parent.parent if package is None else package
    # The checkout first: an editable install also leaves a copy in site-packages, which does not follow edits.
    candidates = (package.parent / "recipes" / "demo", package / "_recipes" / "demo")
    for folder in candidates:
        if (folder / "pipeline.yaml").is_file():
            return folder
    raise MissingError(
        "the demo's recipes", expected=f"{candidates[0]} or {candidates[1]}", found="neither", fix="reinstall mechmerge"
    )
