"""Jobs: submit, look at, cancel, resume, delete, publish."""

from __future__ import annotations

import os
import shutil
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Response
from pydantic import Field

from mechmerge.artifacts import Document, digest, read_document, read_text, to_yaml, write_text
from mechmerge.errors import GateRefused
from mechmerge.evaluate.gate import GateResult
from mechmerge.publish.hub import check_options
from mechmerge.service.access import Publisher, Reader, Runner, The, require_own
from mechmerge.service.admission import FILES, PIPELINE, PIPELINE_BYTES, admit, check_repo, write_input
from mechmerge.service.log import Progress, progress_of, write_event
from mechmerge.service.problems import KeyTakenError, ServiceError, answers
from mechmerge.service.service import DELETED, INCOMING, Service
from mechmerge.service.store import Job, NewJob, State, job_id
from mechmerge.service.tokens import USER, Identity

router = APIRouter(prefix="/api/jobs", tags=["jobs"])
NORMAL = 5
"""The highest priority that not only administrators may ask for, and the usual one."""
ASKED = "asked"
"""In a job's folder: the digest of the request that made it."""
Id = Annotated[str, Path(pattern=r"^[0-9a-f]{16}$", description="A job's id.")]
Key = Annotated[str | None, Field(pattern=r"^[A-Za-z0-9_-]{8,64}$")]


class JobView(Job):
    """A job with where it is."""

    progress: Progress | None
    """Of a running job."""


class Jobs(Document):
    """A page of jobs."""

    jobs: tuple[JobView, ...]
    """The newest first."""
    next: int | None
    """What to pass as `before` for the next page; none: this is the last."""


class Submission(Document):
    """A pipeline to run."""

    pipeline: str = Field(max_length=PIPELINE_BYTES)
    """The pipeline file, YAML, as `mechmerge run` takes it; models are named by absolute folders or on the Hub."""
    files: dict[str, str] = Field(default_factory=dict, max_length=FILES)
    """Behaviour files, suites and data that it names: text by name, relative as in the pipeline."""
    priority: int = Field(default=NORMAL, ge=0, le=9)
    """Higher ones go first; above 5 for administrators."""
    key: Key = None
    """A name of one's own for this request: sent twice, it makes one job; another request under it is refused."""


class Publication(Document):
    """A merge to publish, if its gate accepts it."""

    repo: str = Field(min_length=3, max_length=200)
    """`owner/name` on the Hub, of an owner that the server publishes to."""
    model: str | None = Field(default=None, max_length=200)
    """The recipe of the run (default: the one that the pipeline publishes)."""
    mode: Literal["main", "pr", "branch", "direct"] = "main"
    branch: str | None = Field(default=None, max_length=200)
    """In the mode `branch`, and only there."""
    private: bool = False
    tag: str | None = Field(default=None, max_length=200)
    license: str | None = Field(default=None, max_length=200)
    dry_run: bool = False
    """Check everything, compare with the Hub, change nothing."""
    key: Key = None
    """As of a submission."""


def view(service: Service, job: Job) -> JobView:
    """A job as it is shown."""
    progress = progress_of(service.folder(job.id) / "log.jsonl") if job.state == "running" else None
    return JobView(**dict(job), progress=progress)


@router.post("", status_code=201, responses=answers(401, 409, 429, s200={"model": JobView, "description": "Submitted before."}))
def submit(body: Submission, identity: Runner, service: The, response: Response) -> JobView:
    """Queue a pipeline. Sent again with the same `key`, it answers 200 with the job that there is; another request under that
    key is refused (409).
    """
    _check_priority(identity, body.priority)
    pipeline = admit(body.pipeline, body.files, service.settings)
    new = NewJob(job_id(), "run", pipeline.title[:500], identity.user, body.priority, body.key)
    files = {PIPELINE: to_yaml(pipeline), **body.files}
    return _queue(service, new, body, files, response)


@router.get("", responses=answers(401))
def list_jobs(
    identity: Reader,
    service: The,
    state: Annotated[list[State] | None, Query(max_length=5, description="Only these states.")] = None,
    user: Annotated[str | None, Query(pattern=f"^{USER}$", description="Only of this user.")] = None,
    parent: Annotated[str | None, Query(pattern=r"^[0-9a-f]{16}$", description="Only publications of this job.")] = None,
    before: Annotated[int | None, Query(ge=0, le=2**62, description="`next` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
) -> Jobs:
    """Jobs, the newest first."""
    found, following = service.store.jobs(states=state or (), user=user, parent=parent, before=before, limit=limit)
    return Jobs(jobs=tuple(view(service, job) for job in found), next=following)


@router.get("/{id}", responses=answers(401, 404))
def get_job(id: Id, identity: Reader, service: The) -> JobView:
    """A job."""
    return view(service, service.store.job(id))


@router.get(
    "/{id}/pipeline",
    response_class=Response,
    responses=answers(401, 404, s200={"content": {"application/yaml": {"schema": {"type": "string"}}}}),
)
def get_pipeline(id: Id, identity: Reader, service: The) -> Response:
    """The pipeline, as it was understood."""
    job = service.store.job(id)
    text = read_text(service.folder(job.parent or id) / "input" / PIPELINE)
    return Response(text, media_type="application/yaml")


@router.post("/{id}/cancel", responses=answers(401, 404))
def cancel(id: Id, identity: Runner, service: The) -> JobView:
    """Cancel a queued job, or ask a running one to stop; an ended one stays as it is."""
    before = service.store.job(id)
    require_own(identity, before.user, f"job {id}")
    after = service.store.cancel(id)
    if before.state == "queued" and after.state == "cancelled":
        write_event(service.folder(id) / "log.jsonl", after.attempt, "state", "cancelled")
    service.supervisor.wake()
    return view(service, after)


@router.post("/{id}/resume", responses=answers(401, 404, 409, 429))
def resume(id: Id, identity: Runner, service: The) -> JobView:
    """Queue a failed or cancelled job again; it goes on from its stages."""
    require_own(identity, service.store.job(id).user, f"job {id}")
    job = service.store.resume(id, service.settings.quota_jobs)
    write_event(service.folder(id) / "log.jsonl", job.attempt, "state", "queued")
    service.supervisor.wake()
    return view(service, job)


@router.delete("/{id}", status_code=204, responses=answers(401, 404, 409))
def delete(id: Id, identity: Runner, service: The) -> None:
    """Delete an ended job, its publications' records, and all its files; where others published it, an administrator does."""
    require_own(identity, service.store.job(id).user, f"job {id}")
    for gone in service.store.delete(id, None if identity.may("admin") else identity.user):
        folder = service.folder(gone)
        if folder.exists():
            # First out of sight, at once: what is interrupted from here on is finished when a server starts.
            hidden = folder.rename(folder.with_name(f"{DELETED}{gone}"))
            shutil.rmtree(hidden)


@router.post(
    "/{id}/publish",
    status_code=202,
    responses=answers(401, 404, 409, 429, s200={"model": JobView, "description": "Asked before."}),
)
def publish(id: Id, body: Publication, identity: Publisher, service: The, response: Response) -> JobView:
    """Publish the merge of a job that is done, if its gate accepts it: a job of its own, which asks the gate again. Keys are as
    of submissions.
    """
    check_repo(body.repo, service.settings)
    check_options(body.mode, body.branch, body.tag)
    parent = service.store.job(id)
    if parent.kind != "run" or parent.state != "done":
        raise ServiceError(409, f"job {id}", expected="a pipeline that is done", found=f"{parent.kind}, {parent.state}")
    if body.model is None:
        _require_gate(service, id)
    new = NewJob(
        job_id(),
        "publish",
        f"publish {body.repo}",
        identity.user,
        NORMAL,
        body.key,
        parent=id,
        request=body.model_dump(exclude={"key"}),
    )
    return _queue(service, new, body, {}, response)


def _require_gate(service: Service, id: str) -> None:
    """Says at once what the publication would say later.

    Raises:
        GateRefused: the gate refused the run's merge.
    """
    path = service.run(id) / "gate.json"
    if path.is_file() and not (gate := read_document(GateResult, path)).passed:
        raise GateRefused(
            f"gate of job {id}",
            expected="every rule to pass",
            found="; ".join(rule.line for rule in gate.failed),
            fix="nothing was published",
        )


def _check_priority(identity: Identity, priority: int) -> None:
    if priority > NORMAL and not identity.may("admin"):
        raise ServiceError(403, "priority", expected=f"at most {NORMAL}, or the role admin", found=str(priority))


def _queue(service: Service, new: NewJob, body: Submission | Publication, files: dict[str, str], response: Response) -> JobView:
    """Stores a job with its input; the folder is put in place in the moment in which the job is stored.

    Raises:
        KeyTakenError: the user's key already names another request.
        ServiceError: there is no space (503), or the job of that key was deleted in this moment (404).
    """
    known = service.store.known(new.user, new.key)
    if known is None and not service.supervisor.has_space():
        raise ServiceError(
            503, "disk", expected=f"{service.settings.free_disk / 1e9:g} GB free", found="less", fix="delete jobs that are done"
        )
    folder = service.folder(new.id)
    incoming = folder.with_name(f"{INCOMING}{new.id}")
    try:
        (incoming / "input").mkdir(parents=True, mode=0o700)
        if files:
            text: Any = dict(files)
            write_input(incoming / "input", text.pop(PIPELINE), text)
        # What is left at its default says nothing, so that a request is the same in a later version with more settings; and a
        # priority says nothing of the work.
        told = body.model_dump(mode="json", exclude={"key", "priority"}, exclude_defaults=True)
        asked = digest([new.kind, new.parent, told])
        write_text(incoming / ASKED, asked)
        write_event(incoming / "log.jsonl", 0, "state", "queued")
        job, is_new = service.store.submit(new, service.settings.quota_jobs, lambda: os.rename(incoming, folder))
    finally:
        shutil.rmtree(incoming, ignore_errors=True)
    if is_new:
        response.headers["Location"] = f"/api/jobs/{job.id}"
        service.supervisor.wake()
    elif _first_asked(service, job) not in (None, asked):
        raise KeyTakenError(
            409, f"key {new.key}", expected="the request that it was first sent with", found="another one",
            fix=f"send a new key; job {job.id} has this one",
        )  # fmt: skip
    else:
        response.status_code = 200
    return view(service, job)


def _first_asked(service: Service, job: Job) -> str | None:
    """The digest of the request that a stored job was made by; None of a job from before it was kept."""
    path = service.folder(job.id) / ASKED
    if path.is_file():
        return read_text(path)
    service.store.job(job.id)  # deleted meanwhile: not found
    return None
