"""The files of a run: a list, and each by its path, whole or in ranges (RFC 9110, section 14).

What names local paths stays here: `run.yaml`, hidden files and the bookkeeping. A page of ours that a browser shows is put into
a sandbox of its own (Content-Security-Policy), where it can ask the API nothing.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Annotated
from urllib.parse import quote

from fastapi import APIRouter, Header
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse, Response

from mechmerge.artifacts import Document
from mechmerge.service.access import Reader, The
from mechmerge.service.api.jobs import Id
from mechmerge.service.problems import ServiceError, answers

router = APIRouter(prefix="/api/jobs", tags=["artifacts"])
PRIVATE = ("run.yaml", "timings.jsonl")
"""`run.yaml` names local paths; `timings.jsonl` is no result."""
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".json": "application/json",
    ".jsonl": "application/jsonl; charset=utf-8",
    ".md": "text/markdown; charset=utf-8",
    ".png": "image/png",
    ".yaml": "application/yaml",
    ".txt": "text/plain; charset=utf-8",
}
"""Everything else is `application/octet-stream`."""
_PART = r"\s*(\d{1,18}-\d{0,18}|-\d{1,18})\s*"
_RANGE = re.compile(rf"bytes={_PART}(,{_PART}){{0,9}}", re.ASCII)
SANDBOX = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)


class Artifact(Document):
    """A file of a run."""

    path: str
    """Relative to the run directory."""
    size: int
    """Bytes."""
    modified: float
    """Seconds since 1970."""
    url: str


class Artifacts(Document):
    """The files of a run, by path."""

    artifacts: tuple[Artifact, ...]


@router.get("/{id}/artifacts", responses=answers(401, 404))
def list_artifacts(id: Id, identity: Reader, service: The) -> Artifacts:
    """The files of a job's run; of a publication those of the run that it publishes."""
    run = service.run(id)
    found = []
    for path in sorted(run.rglob("*")):
        name = path.relative_to(run)
        if is_public(name) and path.is_file() and not path.is_symlink():
            about = path.stat()
            url = f"/api/jobs/{id}/artifacts/{quote(name.as_posix())}"
            found.append(Artifact(path=name.as_posix(), size=about.st_size, modified=about.st_mtime, url=url))
    return Artifacts(artifacts=tuple(found))


@router.head("/{id}/artifacts/{path:path}", include_in_schema=False)
@router.get(
    "/{id}/artifacts/{path:path}",
    response_class=FileResponse,
    responses=answers(
        400,
        401,
        404,
        416,
        s200={"description": "The file.", "content": {"*/*": {"schema": {"type": "string", "format": "binary"}}}},
        s206={"description": "A range of it.", "content": {"*/*": {"schema": {"type": "string", "format": "binary"}}}},
    ),
)
def get_artifact(
    id: Id,
    path: Annotated[str, PathParameter(max_length=1000)],
    identity: Reader,
    service: The,
    range: Annotated[str | None, Header(max_length=1000, description="`bytes=FIRST-LAST`, also several.")] = None,
) -> Response:
    """A file of a run, whole or in ranges."""
    file = find_artifact(service.run(id), path)
    if range is not None:
        check_range(range, file.stat().st_size)
    kind = TYPES.get(file.suffix, "application/octet-stream")
    headers = {"Cache-Control": "private, no-cache"}
    if file.suffix == ".html":
        headers["Content-Security-Policy"] = SANDBOX
    inline = file.suffix in TYPES
    return FileResponse(
        file, media_type=kind, headers=headers, filename=file.name,
        content_disposition_type="inline" if inline else "attachment",
    )  # fmt: skip


def check_range(range: str, size: int) -> None:
    """Refuses a Range header that names no bytes of a file of `size` bytes.

    Raises:
        ServiceError: it is malformed (400), or begins beyond the end (416).
    """
    if not _RANGE.fullmatch(range):
        raise ServiceError(400, "Range", expected="bytes=FIRST-LAST", found=repr(range[:100]))
    for part in range.partition("=")[2].split(","):
        first, _, last = part.strip().partition("-")
        if (first and int(first) >= size) or (not first and int(last) == 0):
            raise ServiceError(
                416, "Range", expected=f"bytes of {size}", found=part[:100], headers={"Content-Range": f"bytes */{size}"}
            )
        if first and last and int(last) < int(first):
            raise ServiceError(400, "Range", expected="bytes=FIRST-LAST", found=repr(part[:100]))


def is_public(name: PurePosixPath | Path) -> bool:
    """Whether a file of a run, by its relative path, may be shown."""
    return not any(part.startswith(".") for part in name.parts) and str(name) not in PRIVATE


def find_artifact(run: Path, name: str) -> Path:
    """A file of a run by its path.

    Raises:
        ServiceError: there is none of this name that may be shown (404).
    """
    missing = ServiceError(404, f"artifact {name[:200]!r}", expected="a file of this run", found="none of this name")
    relative = PurePosixPath(name)
    if (
        "\0" in name
        or "\\" in name
        or str(relative) != name
        or relative.is_absolute()
        or ".." in relative.parts
        or not is_public(relative)
    ):
        raise missing
    path = run / relative
    try:
        inside = path.resolve(strict=True).is_relative_to(run.resolve())
    except (OSError, RuntimeError):
        raise missing from None
    if not inside or not path.is_file() or path.is_symlink():
        raise missing
    return path
