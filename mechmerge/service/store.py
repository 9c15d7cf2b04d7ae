"""The store: jobs and their states, in transactions. Every change of a running job is bound to the server and attempt that
it belongs to, so that a server that was given up cannot end, lose or double a job.

    queued ──claim──► running ──finish──► done | failed | cancelled ──resume──► queued
       ▲                 │
       └────requeue──────┘      a worker died, or the server stopped
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from pydantic import Field
from sqlalchemy import CursorResult, Engine, func, select, text, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from mechmerge.artifacts import Document
from mechmerge.errors import InputError
from mechmerge.service.database import reading, writing
from mechmerge.service.problems import Problem, ServiceError
from mechmerge.service.tables import JobRow, ServiceRow

Kind = Literal["run", "publish"]
State = Literal["queued", "running", "done", "failed", "cancelled"]
ENDED = ("done", "failed", "cancelled")
LEASE = 30.0
"""Seconds that a server answers for its jobs without saying so again."""


class Job(Document):
    """A job, as the API shows it."""

    id: str
    kind: Kind
    """`run`: a pipeline; `publish`: the publication of a run's merge."""
    parent: str | None
    """Of a publication: the job whose run it publishes."""
    title: str
    user: str
    priority: int
    """0 … 9; higher ones go first, equal ones in the order of submission."""
    state: State
    created: float
    """Seconds since 1970, as all times here."""
    started: float | None
    """When a worker last took it up."""
    ended: float | None
    seconds: float
    """Working time of the attempts that have ended."""
    attempt: int
    """Workers that have taken it up; more than one after an interruption."""
    cancelling: bool
    """Whether it is running and was asked to stop."""
    request: dict[str, Any]
    """What a publication was asked for; empty for a pipeline."""
    result: dict[str, Any] | None
    """What a job that is done came to: of a pipeline `gate` (`passed` or `refused`) and `worked` (stages), of a publication
    what was published.
    """
    error: Problem | None
    """Why it failed."""


class NewJob(NamedTuple):
    """A job to be stored."""

    id: str
    kind: Kind
    title: str
    user: str
    priority: int
    key: str | None = None
    parent: str | None = None
    request: Mapping[str, Any] = MappingProxyType({})


class Claim(NamedTuple):
    """A job that a server runs: what its changes are bound to."""

    id: str
    server: str
    attempt: int


class Counts(Document):
    """Jobs by state."""

    queued: int = Field(default=0, ge=0)
    running: int = Field(default=0, ge=0)
    done: int = Field(default=0, ge=0)
    failed: int = Field(default=0, ge=0)
    cancelled: int = Field(default=0, ge=0)


def job_id() -> str:
    """A new name of a job: 16 hex digits."""
    return secrets.token_hex(8)


class Store:
    """The jobs in a database.

    Args:
        engine: of `open_engine`, its tables up to date.
        clock: seconds since 1970.
    """

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time) -> None:
        self.engine, self.clock = engine, clock

    # ------------------------------------------------------------------------------------------------------------- reading
    def job(self, id: str) -> Job:
        """A job.

        Raises:
            ServiceError: none of this name (404).
        """
        with reading(self.engine) as session:
            return _view(_row(session, id))

    def jobs(
        self,
        *,
        states: Sequence[State] = (),
        user: str | None = None,
        parent: str | None = None,
        before: int | None = None,
        limit: int = 50,
    ) -> tuple[list[Job], int | None]:
        """Jobs, the newest first, and what to pass as `before` for the next ones (None: there are no more)."""
        wanted = select(JobRow).order_by(JobRow.number.desc()).limit(limit + 1)
        if states:
            wanted = wanted.where(JobRow.state.in_(states))
        if user is not None:
            wanted = wanted.where(JobRow.user == user)
        if parent is not None:
            wanted = wanted.where(JobRow.parent == parent)
        if before is not None:
            wanted = wanted.where(JobRow.number < before)
        with reading(self.engine) as session:
            rows = session.scalars(wanted).all()
            return [_view(row) for row in rows[:limit]], rows[limit - 1].number if len(rows) > limit else None

    def counts(self) -> Counts:
        """Jobs by state."""
        with reading(self.engine) as session:
            found = session.execute(select(JobRow.state, func.count()).group_by(JobRow.state))
            return Counts.model_validate({row[0]: row[1] for row in found})

    def is_reachable(self) -> bool:
        """Whether the database answers."""
        try:
            with reading(self.engine) as session:
                session.execute(text("SELECT 1"))
        except SQLAlchemyError:
            return False
        return True

    # ---------------------------------------------------------------------------------------------------------- submitting
    def known(self, user: str, key: str | None) -> Job | None:
        """The job that a user already submitted under a key."""
        if key is None:
            return None
        with reading(self.engine) as session:
            row = session.scalar(select(JobRow).where(JobRow.user == user, JobRow.key == key))
            return None if row is None else _view(row)

    def submit(self, new: NewJob, quota: int, prepare: Callable[[], None] = lambda: None) -> tuple[Job, bool]:
        """Stores a job, once.

        Args:
            new: the job.
            quota: jobs of this user that may be queued or running.
            prepare: puts the job's files in place; called only where a job is made, before it can be claimed.

        Returns:
            The job, and whether it is new (else it was submitted before, under the same key).

        Raises:
            ServiceError: the user's quota is used up (429), or the parent is not done (409).
        """
        with writing(self.engine) as session:
            self._serialize(session, new.user)
            if new.key is not None:
                row = session.scalar(select(JobRow).where(JobRow.user == new.user, JobRow.key == new.key))
                if row is not None:
                    return _view(row), False
            if new.parent is not None and (parent := _row(session, new.parent, lock=True)).state != "done":
                raise ServiceError(409, f"job {new.parent}", expected="a job that is done", found=parent.state)
            pending = session.scalar(
                select(func.count()).where(JobRow.user == new.user, JobRow.state.in_(("queued", "running")))
            )
            if (pending or 0) >= quota:
                raise ServiceError(
                    429,
                    f"jobs of {new.user}",
                    expected=f"at most {quota} queued or running",
                    found=str(pending),
                    fix="wait for one to end, or cancel one",
                    headers={"Retry-After": "60"},
                )
            prepare()
            row = JobRow(
                id=new.id,
                kind=new.kind,
                parent=new.parent,
                title=new.title,
                user=new.user,
                key=new.key,
                priority=new.priority,
                state="queued",
                created=self.clock(),
                seconds=0.0,
                attempt=0,
                crashes=0,
                interruptions=0,
                cancel=False,
                request=dict(new.request),
            )
            session.add(row)
            session.flush()
            return _view(row), True

    def _serialize(self, session: Session, user: str) -> None:
        """Lets one request of a user through at a time, as SQLite does anyway: quota and key are read before they are used."""
        if self.engine.dialect.name == "postgresql":
            session.execute(text("SELECT pg_advisory_xact_lock(hashtext(:user))"), {"user": user})

    # ------------------------------------------------------------------------------------------------------------- running
    def claim(self, server: str, running: int = 0) -> Job | None:
        """Takes up the next job, if there is one: the highest priority, then the oldest.

        Args:
            server: name of this server process.
            running: jobs of one user that may run at once (0: any number).
        """
        with writing(self.engine) as session:
            queue = select(JobRow).where(JobRow.state == "queued").order_by(JobRow.priority.desc(), JobRow.number)
            if running:
                busy = (
                    select(JobRow.user).where(JobRow.state == "running").group_by(JobRow.user).having(func.count() >= running)
                )
                queue = queue.where(JobRow.user.not_in(busy))
            row = session.scalars(queue.limit(1).with_for_update(skip_locked=True)).first()
            if row is None:
                return None
            row.state, row.server, row.started = "running", server, self.clock()
            row.attempt += 1
            row.lease = self.clock() + LEASE
            session.flush()
            return _view(row)

    def renew(self, claims: Sequence[Claim]) -> dict[Claim, bool]:
        """Answers for running jobs a while longer.

        Returns:
            The claims that still hold, each with whether it was asked to stop.
        """
        if not claims:
            return {}
        with writing(self.engine) as session:
            rows = session.scalars(select(JobRow).where(JobRow.id.in_([c.id for c in claims])).with_for_update())
            held = {(row.id, row.server, row.attempt): row for row in rows if row.state == "running"}
            kept = {claim: held[claim] for claim in claims if claim in held}
            for row in kept.values():
                row.lease = self.clock() + LEASE
            return {claim: row.cancel for claim, row in kept.items()}

    def cancels(self, claims: Sequence[Claim]) -> set[Claim]:
        """Those of the claims that were asked to stop, or no longer hold."""
        if not claims:
            return set()
        with reading(self.engine) as session:
            rows = session.scalars(select(JobRow).where(JobRow.id.in_([c.id for c in claims]))).all()
            held = {(row.id, row.server, row.attempt) for row in rows if row.state == "running" and not row.cancel}
            return {claim for claim in claims if claim not in held}

    def finish(
        self,
        claim: Claim,
        state: Literal["done", "failed", "cancelled"],
        *,
        seconds: float,
        result: dict[str, Any] | None = None,
        error: Problem | None = None,
    ) -> bool:
        """Ends a running job; False where the claim no longer holds."""
        values = {
            "state": state,
            "ended": self.clock(),
            "seconds": JobRow.seconds + seconds,
            "result": result,
            "error": None if error is None else error.model_dump(),
        }
        return self._change(claim, values)

    def requeue(
        self,
        claim: Claim,
        *,
        seconds: float,
        died: Literal["worker", "server"] | None = None,
        advanced: bool = False,
        attempts: int = 1,
    ) -> State | None:
        """Puts a job whose worker is gone back into the queue, at its old place, or ends it where that is of no use.

        Args:
            claim: the job.
            seconds: working time of this attempt.
            died: what was killed by something else than us; None: the server stopped as it was told to.
            advanced: whether it finished a stage before, so that earlier deaths no longer count.
            attempts: deaths of that kind in one stage with which the job is given up.

        Returns:
            Its state now: `queued`, `cancelled` where that was asked for, or `failed`; None where the claim no longer holds.
        """
        with writing(self.engine) as session:
            row = session.scalar(select(JobRow).where(JobRow.id == claim.id).with_for_update())
            if row is None or (row.id, row.server, row.attempt, row.state) != (*claim, "running"):
                return None
            if advanced:
                row.crashes = row.interruptions = 0
            row.crashes += died == "worker"
            row.interruptions += died == "server"
            deaths = {"worker": row.crashes, "server": row.interruptions}.get(died or "", 0)
            row.seconds += seconds
            row.state, row.server, row.lease = "queued", None, None
            if row.cancel:
                row.state, row.ended, row.cancel = "cancelled", self.clock(), False
            elif died and deaths >= attempts:
                row.state, row.ended = "failed", self.clock()
                row.error = Problem(
                    where=died,
                    expected="the stage to end",
                    found=f"that it was killed {deaths} times in it",
                    fix="look at the log, and at what the machine says of memory; then resume the job",
                ).model_dump()
            return _view(row).state

    def _change(self, claim: Claim, values: dict[str, Any]) -> bool:
        with writing(self.engine) as session:
            changed = session.execute(
                update(JobRow)
                .where(
                    JobRow.id == claim.id,
                    JobRow.server == claim.server,
                    JobRow.attempt == claim.attempt,
                    JobRow.state == "running",
                )
                .values(values | {"server": None, "lease": None, "cancel": False})
            )
            assert isinstance(changed, CursorResult)  # noqa: S101 - what an update gives
            return changed.rowcount == 1

    def claimed(self) -> list[tuple[Claim, bool]]:
        """All running jobs, each with whether its server's lease has run out."""
        with reading(self.engine) as session:
            rows = session.scalars(select(JobRow).where(JobRow.state == "running"))
            return [(Claim(row.id, str(row.server), row.attempt), (row.lease or 0) < self.clock()) for row in rows]

    # ------------------------------------------------------------------------------------------------------ asked by people
    def cancel(self, id: str) -> Job:
        """Cancels a queued job, asks a running one to stop, leaves an ended one as it is."""
        with writing(self.engine) as session:
            row = _row(session, id, lock=True)
            if row.state == "queued":
                row.state, row.ended = "cancelled", self.clock()
            elif row.state == "running":
                row.cancel = True
            return _view(row)

    def resume(self, id: str, quota: int) -> Job:
        """Queues a failed or cancelled job again; it goes on from its stages.

        Raises:
            ServiceError: it is in another state (409), or the user's quota is used up (429).
        """
        with writing(self.engine) as session:
            # Before the row is locked, as `submit` does: else two requests could wait for one another.
            self._serialize(session, session.scalar(select(JobRow.user).where(JobRow.id == id)) or "")
            row = _row(session, id, lock=True)
            if row.state not in ("failed", "cancelled"):
                raise ServiceError(409, f"job {id}", expected="a job that failed or was cancelled", found=row.state)
            pending = session.scalar(
                select(func.count()).where(JobRow.user == row.user, JobRow.state.in_(("queued", "running")))
            )
            if (pending or 0) >= quota:
                raise ServiceError(
                    429, f"jobs of {row.user}", expected=f"at most {quota} queued or running", found=str(pending),
                    headers={"Retry-After": "60"},
                )  # fmt: skip
            row.state, row.ended, row.error, row.seconds = "queued", None, None, 0.0
            row.crashes = row.interruptions = 0
            return _view(row)

    def delete(self, id: str, user: str | None = None) -> list[str]:
        """Removes an ended job and its publications; returns their names.

        Args:
            id: the job.
            user: who asks; records of what others published are not removed (None: for an administrator).

        Raises:
            ServiceError: it, or a publication of it, has not ended (409), or is somebody else's (403).
        """
        with writing(self.engine) as session:
            row = _row(session, id, lock=True)
            children = session.scalars(select(JobRow).where(JobRow.parent == id).with_for_update()).all()
            for one in (row, *children):
                if user is not None and one.user != user:
                    raise ServiceError(
                        403,
                        f"job {one.id}",
                        expected=f"nothing but what {user} sent",
                        found=f"{'a publication' if one.parent else 'a job'} of {one.user}",
                        fix="ask an administrator to delete it",
                    )
                if one.state not in ENDED:
                    raise ServiceError(
                        409, f"job {one.id}", expected="a job that has ended", found=one.state, fix="cancel it first"
                    )
            gone = [child.id for child in children] + [row.id]
            for child in children:
                session.delete(child)
            session.flush()
            session.delete(row)
            return gone

    # ------------------------------------------------------------------------------------------------------------ ownership
    def bind(self, instance: str) -> None:
        """Binds the store to one data folder, the first time, and refuses any other from then on.

        Raises:
            InputError: it belongs to another folder.
        """
        with writing(self.engine) as session:
            found = session.scalar(select(ServiceRow.instance))
            if found is None:
                if session.scalar(select(func.count()).select_from(JobRow)):
                    found = "none, though it holds jobs"
                else:
                    session.add(ServiceRow(instance=instance))
                    return
            if found != instance:
                raise InputError(
                    "database",
                    expected=f"that of this data folder ({instance})",
                    found=found,
                    fix="name the data folder that belongs to it with --data",
                )


def _row(session: Session, id: str, *, lock: bool = False) -> JobRow:
    wanted = select(JobRow).where(JobRow.id == id)
    row = session.scalar(wanted.with_for_update() if lock else wanted)
    if row is None:
        raise ServiceError(404, f"job {id[:40]}", expected="a job of this server", found="none")
    return row


def _view(row: JobRow) -> Job:
    return Job(
        id=row.id,
        kind=row.kind,  # type: ignore[arg-type]  # checked by the model
        parent=row.parent,
        title=row.title,
        user=row.user,
        priority=row.priority,
        state=row.state,  # type: ignore[arg-type]
        created=row.created,
        started=row.started,
        ended=row.ended,
        seconds=row.seconds,
        attempt=row.attempt,
        cancelling=row.cancel and row.state == "running",
        request=row.request,
        result=row.result,
        error=None if row.error is None else Problem.model_validate(row.error),
    )
