"""Whether the server lives, whether it is ready, its figures, and what it allows."""

from __future__ import annotations

import shutil
from typing import Literal

from fastapi import APIRouter, Response

from mechmerge.artifacts import Document
from mechmerge.service.access import Reader, The
from mechmerge.service.metrics import CONTENT_TYPE
from mechmerge.service.problems import ServiceError, answers
from mechmerge.service.settings import Limits
from mechmerge.service.store import Counts
from mechmerge.version import __version__

router = APIRouter(tags=["health"])


class Health(Document):
    """That the server answers."""

    status: Literal["ok"] = "ok"


class About(Document):
    """What the server is and allows."""

    version: str
    slots: int
    """Jobs that run at once."""
    device: str
    limits: Limits
    quota_jobs: int
    """Jobs of one user that may be queued or running."""
    folders: tuple[str, ...]
    """Folders that models may lie in."""
    namespaces: tuple[str, ...]
    """Owners on the Hub whose models may be named; `*`: all."""
    publish_to: tuple[str, ...]
    """Owners on the Hub that merges may be published under."""
    jobs: Counts


@router.get("/healthz", responses=answers())
def healthz() -> Health:
    """Whether the server answers at all."""
    return Health()


@router.get("/readyz", responses=answers())
def readyz(service: The) -> Health:
    """Whether it takes and runs jobs: store, supervisor and disk."""
    if not service.store.is_reachable():
        raise ServiceError(503, "store", expected="a database within reach", found="none")
    if not service.supervisor.is_alive:
        raise ServiceError(503, "supervisor", expected="one at work", found="none")
    if not service.supervisor.has_space():
        raise ServiceError(503, "disk", expected=f"{service.settings.free_disk / 1e9:g} GB free", found="less")
    return Health()


@router.get(
    "/metrics",
    response_class=Response,
    responses=answers(401, s200={"content": {"text/plain": {"schema": {"type": "string"}}}}),
)
def metrics(identity: Reader, service: The) -> Response:
    """Figures, in Prometheus' text format."""
    free = shutil.disk_usage(service.settings.data).free
    text = service.metrics.render(service.store.counts(), service.settings.slots, free)
    return Response(text, headers={"Content-Type": CONTENT_TYPE})


@router.get("/api/service", responses=answers(401))
def about(identity: Reader, service: The) -> About:
    """What the server is and allows, and how many jobs it has."""
    settings = service.settings
    return About(
        version=__version__,
        slots=settings.slots,
        device=settings.device,
        limits=settings.limits,
        quota_jobs=settings.quota_jobs,
        folders=tuple(str(folder) for folder in settings.folders),
        namespaces=settings.namespaces,
        publish_to=settings.publish_to,
        jobs=service.store.counts(),
    )
