"""The store, on SQLite and on PostgreSQL: no job is lost, doubled or ended by a server that no longer answers for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Engine, column, inspect, table

from mechmerge.errors import InputError, MissingError
from mechmerge.service.database import migrate, open_engine
from mechmerge.service.problems import Problem, ServiceError
from mechmerge.service.store import LEASE, Claim, Job, NewJob, Store, job_id
from mechmerge.service.tables import Base
from mechmerge.service.tokens import Tokens
from tests.serving import database, postgres  # noqa: F401  (fixtures)


class Clock:
    """A clock that tests set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def engine(database: str) -> Iterator[Engine]:  # noqa: F811
    engine = open_engine(database)
    migrate(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def store(engine: Engine) -> Store:
    return Store(engine, Clock())


def put(store: Store, user: str = "ann", priority: int = 5, key: str | None = None, parent: str | None = None) -> Job:
    kind = "run" if parent is None else "publish"
    return store.submit(NewJob(job_id(), kind, "a title", user, priority, key, parent), quota=10)[0]  # type: ignore[arg-type]


def claim_of(job: Job | None, server: str = "one") -> Claim:
    assert job is not None
    return Claim(job.id, server, job.attempt)


# -------------------------------------------------------------------------------------------------------------- migrations
def test_migrations_make_the_tables_of_the_models(engine: Engine) -> None:
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    migrate(engine)  # once more: nothing to do
    assert set(inspect(engine).get_table_names()) == {*Base.metadata.tables, "alembic_version"}


def test_jobs_of_an_older_database_go_on(database: str) -> None:  # noqa: F811
    engine = open_engine(database)
    migrate(engine, "0001")
    columns = {one["name"] for one in inspect(engine).get_columns("jobs")} - {"number"}
    values = {"id": "0" * 16, "kind": "run", "title": "old", "owner_name": "ann", "priority": 5, "state": "queued",
              "created": 1.0, "seconds": 0.0, "attempt": 0, "crashes": 0, "cancel_asked": False, "request": "{}"}  # fmt: skip
    assert values.keys() <= columns
    assert "interruptions" not in columns
    jobs = table("jobs", *map(column, values))
    with engine.begin() as connection:
        connection.execute(jobs.insert(), values)
    migrate(engine)
    store = Store(engine)
    assert store.requeue(claim_of(store.claim("one")), seconds=0.0, died="server", attempts=2) == "queued"
    engine.dispose()


def test_a_database_out_of_reach_is_one_line(tmp_path: Path) -> None:
    engine = open_engine(f"postgresql://ann:secret@/none?host={tmp_path}")
    with pytest.raises(MissingError, match="database: expected postgresql") as caught:
        migrate(engine)
    assert "secret" not in str(caught.value)
    engine.dispose()


@pytest.mark.parametrize("url", ["mysql://a@b/c", "nonsense", "sqlite://", "sqlite:///:memory:"])
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(InputError, match="database: expected postgresql"):
        open_engine(url)


def test_a_store_belongs_to_one_data_folder(store: Store) -> None:
    store.bind("first")
    store.bind("first")
    with pytest.raises(InputError, match="that of this data folder"):
        store.bind("second")


def test_jobs_of_an_unknown_folder_are_not_taken_over(store: Store) -> None:
    put(store)
    with pytest.raises(InputError, match="none, though it holds jobs"):
        store.bind("first")


# ------------------------------------------------------------------------------------------------------------------- queue
def test_priority_goes_first_then_age(store: Store) -> None:
    low, first, second, high = put(store, priority=1), put(store), put(store), put(store, priority=9)
    taken = [store.claim("one") for _ in range(4)]
    assert [job.id for job in taken if job] == [high.id, first.id, second.id, low.id]
    assert store.claim("one") is None
    assert store.counts().running == 4


def test_a_users_quota_of_running_jobs_lets_others_pass(store: Store) -> None:
    put(store, "ann"), put(store, "ann")
    other = put(store, "bob", priority=0)
    assert getattr(store.claim("one", running=1), "user", None) == "ann"
    assert getattr(store.claim("one", running=1), "id", None) == other.id
    assert store.claim("one", running=1) is None
    assert store.claim("one", running=2) is not None


def test_the_quota_of_pending_jobs(store: Store) -> None:
    for _ in range(10):
        put(store)
    with pytest.raises(ServiceError, match="at most 10 queued or running; found 10") as caught:
        put(store)
    assert caught.value.status == 429
    put(store, "bob")
    store.cancel(store.jobs(user="ann")[0][0].id)
    put(store)


def test_a_request_sent_twice_makes_one_job_of_each_user(store: Store) -> None:
    made: list[str] = []
    new = NewJob(job_id(), "run", "t", "ann", 5, "the-same-key")
    first = store.submit(new, 10, lambda: made.append("first"))
    again = store.submit(new._replace(id=job_id()), 10, lambda: made.append("again"))
    assert first[1]
    assert not again[1]
    assert first[0].id == again[0].id
    assert made == ["first"]
    assert put(store, "bob", key="the-same-key").id != first[0].id


def test_many_servers_claim_every_job_once(store: Store) -> None:
    ids = {put(store, user).id for user in ("ann", "bob") for _ in range(10)}
    taken: list[str] = []

    def work(name: str) -> None:
        while job := store.claim(name):
            taken.append(job.id)

    threads = [threading.Thread(target=work, args=(f"server-{i}",)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(taken) == 20
    assert set(taken) == ids


def test_one_users_requests_at_once_keep_the_quota(store: Store) -> None:
    refused: list[int] = []

    def work() -> None:
        try:
            store.submit(NewJob(job_id(), "run", "t", "ann", 5), quota=3)
        except ServiceError as error:
            refused.append(error.status)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused == [429] * 5
    assert store.counts().queued == 3


# ------------------------------------------------------------------------------------------------------------------ claims
def test_jobs_resumed_at_once_keep_the_quota(store: Store) -> None:
    jobs = [put(store) for _ in range(8)]
    for job in jobs:
        store.cancel(job.id)
    refused: list[str] = []
    together = threading.Barrier(len(jobs))

    def work(id: str) -> None:
        together.wait()
        try:
            store.resume(id, quota=1)
        except ServiceError as error:
            refused.append(error.where)

    threads = [threading.Thread(target=work, args=(job.id,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused == ["jobs of ann"] * 7
    assert store.counts().queued == 1


def test_texts_that_are_no_token(engine: Engine) -> None:
    tokens = Tokens(engine)
    made, text = tokens.add("ann", "read")
    found = tokens.identify(text)
    assert found is not None
    assert tokens.holds(found)
    for other in ("", "mmt", "mmt_\0_x", f"mmt_{made.id}\0_x", "mmt__x", text[:-1], text.upper(), f"mmt_{made.id}_\0"):
        assert tokens.identify(other) is None
    tokens.revoke(made.id)
    assert not tokens.holds(found)


def test_a_claim_that_was_given_up_changes_nothing(store: Store) -> None:
    put(store)
    old = claim_of(store.claim("one"))
    assert store.requeue(old, seconds=1.0) == "queued"
    new = claim_of(store.claim("two"), "two")
    assert new.attempt == 2
    assert not store.finish(old, "done", seconds=1.0)
    assert store.requeue(old, seconds=1.0) is None
    assert store.cancels([old, new]) == {old}
    assert store.renew([old, new]) == {new: False}
    assert store.finish(new, "done", seconds=2.0, result={"gate": "passed"})
    assert not store.finish(new, "failed", seconds=2.0), "it ended already"
    job = store.job(new.id)
    assert (job.state, job.seconds, job.result) == ("done", 3.0, {"gate": "passed"})


def test_leases_run_out_unless_they_are_renewed(store: Store) -> None:
    clock = store.clock
    assert isinstance(clock, Clock)
    put(store)
    claim = claim_of(store.claim("one"))
    assert store.claimed() == [(claim, False)]
    clock.now += LEASE + 1
    assert store.claimed() == [(claim, True)]
    store.renew([claim])
    assert store.claimed() == [(claim, False)]


def test_deaths_in_one_stage_are_counted_and_progress_forgives(store: Store) -> None:
    put(store)
    for advanced, state in ((False, "queued"), (False, "queued"), (True, "queued"), (False, "queued"), (False, "failed")):
        claim = claim_of(store.claim("one"))
        assert store.requeue(claim, seconds=0.0, died="worker", advanced=advanced, attempts=3) == state
    error = store.job(claim.id).error
    assert error is not None
    assert error.found == "that it was killed 3 times in it"
    assert store.resume(claim.id, 10).state == "queued"
    assert store.job(claim.id).error is None


def test_a_stop_of_the_server_is_no_death(store: Store) -> None:
    put(store)
    for _ in range(5):
        assert store.requeue(claim_of(store.claim("one")), seconds=0.0, attempts=1) == "queued"


def test_deaths_of_servers_are_counted_apart(store: Store) -> None:
    put(store)
    assert store.requeue(claim_of(store.claim("one")), seconds=0.0, died="worker", attempts=2) == "queued"
    for advanced, state in ((False, "queued"), (True, "queued"), (False, "failed")):
        claim = claim_of(store.claim("one"))
        assert store.requeue(claim, seconds=0.0, died="server", advanced=advanced, attempts=2) == state
    error = store.job(claim.id).error
    assert error is not None
    assert (error.where, error.found) == ("server", "that it was killed 2 times in it")
    assert store.resume(claim.id, 10).state == "queued"
    assert store.requeue(claim_of(store.claim("one")), seconds=0.0, died="server", attempts=2) == "queued"


# ------------------------------------------------------------------------------------------------------ cancel and delete
def test_cancelling(store: Store) -> None:
    queued = put(store)
    assert store.cancel(queued.id).state == "cancelled"
    put(store)
    claim = claim_of(store.claim("one"))
    assert store.cancel(claim.id).cancelling
    assert store.cancels([claim]) == {claim}
    assert store.requeue(claim, seconds=0.0) == "cancelled", "a job that was to stop is not queued again"
    assert store.cancel(claim.id).state == "cancelled"
    assert store.claim("one") is None


def test_publications_hang_on_their_run(store: Store) -> None:
    run = put(store)
    with pytest.raises(ServiceError, match="expected a job that is done; found queued"):
        put(store, parent=run.id)
    store.finish(claim_of(store.claim("one")), "done", seconds=0.0)
    publication = put(store, parent=run.id)
    with pytest.raises(ServiceError, match=f"job {publication.id}: expected a job that has ended; found queued"):
        store.delete(run.id)
    store.finish(claim_of(store.claim("one")), "failed", seconds=0.0, error=Problem(where="the Hub"))
    assert set(store.delete(run.id, run.user)) == {run.id, publication.id}
    assert store.jobs() == ([], None)


def test_what_others_published_is_not_deleted_with_a_run(store: Store) -> None:
    run = put(store, "ann")
    store.finish(claim_of(store.claim("one")), "done", seconds=0.0)
    publication = put(store, "bob", parent=run.id)
    store.finish(claim_of(store.claim("one")), "done", seconds=0.0)
    with pytest.raises(
        ServiceError, match=f"job {publication.id}: expected nothing but what ann sent; found a publication of bob"
    ):
        store.delete(run.id, "ann")
    assert len(store.jobs()[0]) == 2
    assert set(store.delete(run.id)) == {run.id, publication.id}


def test_pages_of_jobs(store: Store) -> None:
    ids = [put(store, user).id for user in ("ann", "bob", "ann")]
    page, following = store.jobs(limit=2)
    assert [job.id for job in page] == ids[:0:-1]
    rest, end = store.jobs(limit=2, before=following)
    assert [job.id for job in rest] == ids[:1]
    assert end is None
    assert [job.id for job in store.jobs(user="bob")[0]] == [ids[1]]
    assert store.jobs(states=["running"]) == ([], None)
