"""The page's one style, one script and one picture, put together from files in the package.

Charts are the report's own: the script holds the parts of its page (mechmerge/report/page) and those of `static/`, in one
scope. An asset's address holds its digest, so browsers keep it until it is another.
"""

from __future__ import annotations

import functools
import hashlib
from importlib import resources
from typing import NamedTuple

from fastapi import APIRouter
from fastapi.responses import Response

from mechmerge.report.html import page_asset, page_scripts, scoped
from mechmerge.service.problems import ServiceError

router = APIRouter(include_in_schema=False)
REPLACED = ("0-data.js", "9-start.js")
"""Parts of the report's script that the page has its own of: where data comes from, and what is set up."""


class Asset(NamedTuple):
    """A file that pages load."""

    content: bytes
    type: str
    digest: str


@functools.cache
def assets() -> dict[str, Asset]:
    """All of them by name."""
    parts = {name: text for name, text in page_scripts().items() if name not in REPLACED}
    parts |= {entry: _read(entry) for entry in _names(".js")}
    found = {
        "app.js": (scoped({"state": "let DATA = null;", **parts}), "text/javascript; charset=utf-8"),
        "app.css": (page_asset("page.css") + _read("app.css"), "text/css; charset=utf-8"),
        "icon.svg": (_read("icon.svg"), "image/svg+xml"),
    }
    return {
        name: Asset(text.encode(), kind, hashlib.sha256(text.encode()).hexdigest()[:16]) for name, (text, kind) in found.items()
    }


def address_of(name: str) -> str:
    """Where an asset is found."""
    return f"/static/{assets()[name].digest}/{name}"


@router.get("/static/{digest}/{name}")
def get_asset(digest: str, name: str) -> Response:
    """An asset, under any digest: an old page gets what is new."""
    asset = assets().get(name)
    if asset is None:
        raise ServiceError(404, "asset", expected=f"one of {', '.join(assets())}", found="none of this name")
    kept = "public, max-age=31536000, immutable" if digest == asset.digest else "no-cache"
    return Response(asset.content, media_type=asset.type, headers={"Cache-Control": kept})


def _read(name: str) -> str:
    return (resources.files("mechmerge.service") / "static" / name).read_text("utf-8")


def _names(suffix: str) -> list[str]:
    folder = resources.files("mechmerge.service") / "static"
    return sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(suffix))
