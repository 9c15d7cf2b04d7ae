"""A job as a row of the list: what the template writes and what the live stream sends are the same words."""

from __future__ import annotations

import time
from typing import Literal

from mechmerge.artifacts import Document
from mechmerge.service.api.jobs import JobView
from mechmerge.service.pages.render import ago, duration
from mechmerge.service.tokens import Identity

Tone = Literal["good", "bad", "live", "quiet"]


class Row(Document):
    """A row of the list of jobs."""

    id: str
    title: str
    kind: str
    state: str
    said: str
    """The state in words, with what the gate said."""
    tone: Tone
    """How the state is coloured; the words say the same."""
    user: str
    priority: int
    created: float
    added: str
    """How long ago it was submitted."""
    took: str
    """Working time so far."""
    step: str
    """The stage and step of a running job."""
    units: str
    """How far the step is, in words."""
    done: int
    total: int
    """Units of the step; 0 where nothing is counted."""


def row_of(job: JobView) -> Row:
    """A job as a row."""
    progress = job.progress
    steps = [progress.stage, progress.step] if progress is not None else []
    done, total = (progress.done or 0, progress.total or 0) if progress is not None else (0, 0)
    said, tone = said_of(job)
    worked = job.seconds + (time.time() - job.started if job.state == "running" and job.started else 0.0)
    return Row(
        id=job.id,
        title=job.title,
        kind=job.kind,
        state=job.state,
        said=said,
        tone=tone,
        user=job.user,
        priority=job.priority,
        created=job.created,
        added=ago(job.created),
        took=duration(worked) if job.attempt else "–",
        step=" · ".join(part for part in steps if part),
        units=f"{done} of {total}" if total else "",
        done=min(done, total),
        total=total,
    )


def said_of(job: JobView) -> tuple[str, Tone]:
    """A job's state in words, and their tone."""
    if job.state == "running":
        return ("stopping" if job.cancelling else "running"), "live"
    if job.state == "failed":
        return "failed", "bad"
    if job.state == "done" and job.result is not None and "gate" in job.result:
        passed = job.result["gate"] == "passed"
        return ("done, gate passed", "good") if passed else ("done, gate refused", "bad")
    return job.state, "good" if job.state == "done" else "quiet"


def may_change(identity: Identity, job: JobView) -> bool:
    """Whether somebody may cancel, resume or delete a job."""
    return identity.may("run") and (identity.user == job.user or identity.may("admin"))
