"""Whatever a request holds, the answer is one that the OpenAPI document names: schemathesis (https://schemathesis.io) tries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import checks
from schemathesis.generation import GenerationMode

from mechmerge.service.app import create_app
from mechmerge.service.service import Service, open_service
from mechmerge.service.settings import Settings
from tests.serving import database, postgres, stored_job  # noqa: F401  (fixtures)

NAMES = ("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance")
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
EXAMPLES = 10
"""Requests a route; a longer hunt raises it."""
HOST = {"Host": "127.0.0.1"}


@pytest.fixture
def service(database: str, tmp_path: Path) -> Iterator[Service]:  # noqa: F811
    chosen = Settings(data=tmp_path / "data", database=database, namespaces=("*",), publish_to=("us",), body=100_000, slots=0)
    with open_service(chosen) as opened:
        job = stored_job(opened, gate="passed")
        (opened.run(job.id) / "report.html").write_text("<!doctype html>")
        # It has no slots, and so nothing to do, but it is there.
        opened.supervisor.start()
        yield opened
        opened.supervisor.stop()


def strategy(operation: Any) -> st.SearchStrategy[Any]:
    """Requests that keep the document's rules, and such that break them."""
    return st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in MODES))


def hunt(operation: Any, job: str, wanted: list[Any]) -> set[int]:
    """Sends requests of one operation; the statuses that came."""
    statuses: set[int] = set()
    # The name of a job that is there, every other time: else nearly all answers would be 404.
    named = "/api/jobs/{id}" in operation.path and operation.method.upper() != "DELETE"

    @given(case=strategy(operation), real=st.booleans())
    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    def probe(case: Any, real: bool) -> None:
        if named and real:
            case.path_parameters["id"] = job
        answer = case.call(base_url="http://127.0.0.1", headers=HOST)
        statuses.add(answer.status_code)
        case.validate_response(answer, checks=wanted)

    probe()
    return statuses


def test_every_answer_is_documented(service: Service) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(service, supervise=False), headers=HOST)
    wanted = [checks.CHECKS.get_one(name) for name in NAMES]
    job = service.store.jobs()[0][0].id
    statuses = set().union(*(hunt(found.ok(), job, wanted) for found in schema.get_all_operations()))
    assert {200, 204, 404, 422} <= statuses, statuses
