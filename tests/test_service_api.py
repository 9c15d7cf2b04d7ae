"""The API over a real connection: who may do what, and what is kept out."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Message, Receive, Scope, Send

from mechmerge.service.api import jobs
from mechmerge.service.guard import Guard
from mechmerge.service.log import write_event
from mechmerge.service.settings import Settings
from mechmerge.service.store import Job
from mechmerge.service.tokens import ROLES
from tests.serving import ROOT, Served, served, stored_job, submission

REPORT = "<!doctype html><script>1</script>"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="module")
def api(root: Path) -> Iterator[Served]:
    settings = Settings(data=root / "data", namespaces=("good",), publish_to=("us",), quota_jobs=50, body=1_000_000)
    with served(settings) as server:
        yield server


@pytest.fixture(scope="module")
def done(api: Served) -> Job:
    """A job that is done, with a few files."""
    job = stored_job(api.service, gate="passed", worked=[])
    run = api.service.run(job.id)
    for name in ("merged/conflict/model.safetensors", "samples/a.jsonl", ".state/evaluate.json", "run.yaml"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(bytes(range(200)))
    (run / "report.html").write_text(REPORT)
    (run / "link.txt").symlink_to(api.service.settings.data / "instance")
    (run / "elsewhere").symlink_to(api.service.settings.data)
    log = api.service.folder(job.id) / "log.jsonl"
    for number in range(5):
        write_event(log, 1, "note", f"note {number}")
    return job


# ------------------------------------------------------------------------------------------------------------------ access
ROUTES: list[tuple[str, str, str, dict[str, Any] | None]] = [
    # least role, method, path, body
    ("none", "GET", "/healthz", None),
    ("none", "GET", "/openapi.json", None),
    ("read", "GET", "/api/me", None),
    ("read", "GET", "/api/service", None),
    ("read", "GET", "/metrics", None),
    ("read", "GET", "/api/jobs", None),
    ("read", "GET", "/api/jobs/{id}", None),
    ("read", "GET", "/api/jobs/{id}/log", None),
    ("read", "GET", "/api/jobs/{id}/events", None),
    ("read", "GET", "/api/jobs/{id}/artifacts", None),
    ("read", "GET", "/api/jobs/{id}/artifacts/report.html", None),
    ("run", "POST", "/api/jobs", {}),
    ("run", "POST", "/api/jobs/{id}/cancel", None),
    ("run", "POST", "/api/jobs/{id}/resume", None),
    ("run", "DELETE", "/api/jobs/ffffffffffffffff", None),
    ("publish", "POST", "/api/jobs/{id}/publish", {}),
    ("admin", "GET", "/api/tokens", None),
    ("admin", "POST", "/api/tokens", {}),
    ("admin", "DELETE", "/api/tokens/ffffffffffff", None),
]


@pytest.mark.parametrize(("least", "method", "path", "body"), ROUTES)
def test_roles(least: str, method: str, path: str, body: dict[str, Any] | None, api: Served, done: Job) -> None:
    roles = ["none", *ROLES]
    for role in roles:
        if method == "POST" and path.endswith(("cancel", "resume")):  # of one's own jobs
            done = stored_job(api.service, user=f"the-{role}")
        with api.client(None if role == "none" else role) as client:
            answer = client.request(method, path.format(id=done.id), json=body)
        if roles.index(role) >= roles.index(least):
            assert answer.status_code not in (401, 403), (role, answer.text)
        else:
            assert answer.status_code == (401 if role == "none" else 403), (role, answer.text)
            assert set(answer.json()) == {"where", "expected", "found", "fix"}


def test_the_table_of_roles_has_every_route(api: Served) -> None:
    document = httpx.get(f"{api.url}/openapi.json", trust_env=False).json()
    known = {(m.upper(), p) for p, entry in document["paths"].items() for m in entry}
    told = {(method, path.replace("ffffffffffffffff", "{id}").replace("ffffffffffff", "{id}")) for _, method, path, _ in ROUTES}
    told = {(method, path.replace("report.html", "{path}")) for method, path in told}
    others = {("GET", "/readyz"), ("GET", "/api/jobs/{id}/pipeline"), ("POST", "/api/session"), ("DELETE", "/api/session")}
    assert known == told - {("GET", "/openapi.json")} | others


@pytest.mark.parametrize("header", ["Bearer nonsense", "Bearer mmt_x_y", "Basic YTpi", "mmt", "Bearer mmt_{id}_{id}"])
def test_what_is_no_token(header: str, api: Served) -> None:
    id = api.tokens["admin"].split("_")[1]
    answer = httpx.get(f"{api.url}/api/me", headers={"Authorization": header.format(id=id)}, trust_env=False)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"


def test_tokens_end_when_they_are_revoked_or_too_old(api: Served) -> None:
    with api.client("admin") as admin:
        made = admin.post("/api/tokens", json={"user": "guest", "role": "read"}).json()
        guest = {"Authorization": f"Bearer {made['text']}"}
        assert httpx.get(f"{api.url}/api/me", headers=guest, trust_env=False).json()["user"] == "guest"
        stored = (api.service.settings.data / "service.sqlite-wal").read_bytes()
        assert made["text"].split("_", 2)[2].encode() not in stored, "only its digest is kept"
        assert admin.delete(f"/api/tokens/{made['token']['id']}").json()["revoked"]
        assert httpx.get(f"{api.url}/api/me", headers=guest, trust_env=False).status_code == 401
        short = admin.post("/api/tokens", json={"user": "guest", "role": "read", "seconds": 0.001}).json()
        assert (
            httpx.get(f"{api.url}/api/me", headers={"Authorization": f"Bearer {short['text']}"}, trust_env=False).status_code
            == 401
        )
        assert "text" not in admin.get("/api/tokens").text


def test_jobs_of_others_are_for_administrators(api: Served) -> None:
    for verb, status in (("cancel", 200), ("resume", 409)):
        job = stored_job(api.service, "done", user="somebody")
        with api.client("publish") as other, api.client("admin") as admin:
            refusal = other.post(f"/api/jobs/{job.id}/{verb}")
            assert refusal.status_code == 403
            assert refusal.json()["found"] == "a job of somebody"
            assert other.delete(f"/api/jobs/{job.id}").status_code == 403
            assert admin.post(f"/api/jobs/{job.id}/{verb}").status_code == status
            assert admin.delete(f"/api/jobs/{job.id}").status_code == 204
            assert admin.get(f"/api/jobs/{job.id}").status_code == 404
        assert not api.service.folder(job.id).exists()


def test_high_priorities_are_for_administrators(api: Served) -> None:
    body = submission("good/base", "good/expert") | {"priority": 6}
    with api.client("run") as runner, api.client("admin") as admin:
        assert runner.post("/api/jobs", json=body).status_code == 403
        made = admin.post("/api/jobs", json=body)
        assert made.status_code == 201
        assert made.headers["Location"] == f"/api/jobs/{made.json()['id']}"


# ---------------------------------------------------------------------------------------------------------------- sessions
def test_a_session_needs_its_csrf_token_to_change_anything(api: Served, done: Job) -> None:
    with api.client() as browser:
        assert browser.post("/api/session", json={"token": "mmt_x_y"}).status_code == 401
        opened = browser.post("/api/session", json={"token": api.tokens["run"]})
        cookie = opened.headers["Set-Cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        csrf = opened.json()["csrf"]
        assert browser.get("/api/me").json() == {"user": "the-run", "role": "run", "csrf": csrf}
        path = f"/api/jobs/{done.id}/cancel"
        assert browser.post(path).status_code == 403
        assert browser.post(path, headers={"X-CSRF-Token": "x" * len(csrf)}).status_code == 403
        assert browser.post(path, headers={"X-CSRF-Token": csrf}).status_code == 200
        assert browser.post(path, headers={"X-CSRF-Token": csrf, "Origin": "http://evil.example"}).status_code == 403
        assert browser.post(path, headers={"X-CSRF-Token": csrf, "Origin": api.url}).status_code == 200
        kept = browser.cookies["mechmerge_session"]
        assert browser.delete("/api/session").status_code == 204
    with api.client() as thief:
        thief.cookies.set("mechmerge_session", kept)
        assert thief.get("/api/me").status_code == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({}, 200),
    ],
)
def test_other_sites_change_nothing_even_on_an_open_server(headers: dict[str, str], status: int, tmp_path: Path) -> None:
    with served(Settings(data=tmp_path / "data"), tokens=False) as server:
        job = stored_job(server.service)
        with server.client() as client:
            assert client.get("/api/me").json() == {"user": "local", "role": "admin", "csrf": None}
            assert client.post(f"/api/jobs/{job.id}/cancel", headers=headers).status_code == status
            made = client.post("/api/tokens", json={"user": "ann", "role": "admin"})
            assert made.status_code == 201
            assert client.get("/api/me").status_code == 401, "from the first token on every request needs one"


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "evil.example:8000", "", "[::2]", "localhost.x"])
def test_foreign_names_reach_nothing(host: str, api: Served) -> None:
    answer = httpx.get(f"{api.url}/healthz", headers={"Host": host}, trust_env=False)
    assert answer.status_code in (400, 403), "an empty one is refused by the HTTP server itself"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]:80"])
def test_its_own_names_reach_it(host: str, api: Served) -> None:
    assert httpx.get(f"{api.url}/healthz", headers={"Host": host}, trust_env=False).status_code == 200


# -------------------------------------------------------------------------------------------------------------------- size
def test_bodies_are_limited(api: Served) -> None:
    with api.client("run") as client:
        big = {"pipeline": "x", "files": {"a.yaml": "x" * 1_000_000}}
        assert client.post("/api/jobs", json=big).status_code == 413

        def pieces() -> Iterator[bytes]:
            for _ in range(200):
                yield b"x" * 10_000

        assert client.post("/api/jobs", content=pieces()).status_code == 413, "without a length as well"
        many = {"pipeline": "x", "files": {f"{i}.yaml": "" for i in range(65)}}
        assert client.post("/api/jobs", json=many).status_code == 422
        assert client.post("/api/jobs", json={"pipeline": "x" * 100_001}).status_code == 422
        assert client.get("/api/jobs", params={"limit": 201}).status_code == 422
        assert client.get("/api/jobs", params={"user": "\0"}).status_code == 422, "PostgreSQL knows no such text"
        assert client.get("/api/jobs", params={"parent": "\0"}).status_code == 422
        assert client.get("/api/jobs", headers={"X-Long": "x" * 40_000}).status_code == 431
        assert client.get("/api/jobs").status_code == 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"pipeline": 1}', b'{"a": 1}', b"[" * 100_000]
)
def test_bodies_that_are_no_submission(body: bytes, api: Served) -> None:
    with api.client("run") as client:
        answer = client.post("/api/jobs", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert set(answer.json()) == {"where", "expected", "found", "fix"}
    assert "\n" not in "".join(str(value) for value in answer.json().values())


def test_half_a_body_is_no_request(api: Served) -> None:
    """A form that is cut off could be a whole one: without its last field, `dry_run`."""
    asked: list[str] = []

    async def route(_scope: Scope, receive: Receive, _send: Send) -> None:
        asked.append(str(await receive()))

    pieces: list[Message] = [{"type": "http.request", "body": b"repo=us/m", "more_body": True}, {"type": "http.disconnect"}]
    answers: list[Message] = []

    async def receive() -> Message:
        return pieces.pop(0)

    async def send(message: Message) -> None:
        answers.append(message)

    headers = [(b"host", b"localhost"), (b"content-length", b"24")]
    scope = {"type": "http", "method": "POST", "path": "/runs/x/publish", "headers": headers}
    asyncio.run(Guard(route, api.service)(scope, receive, send))
    assert asked == []
    assert answers[0]["status"] == 422


@pytest.mark.parametrize("charset", ["undefined", "unicode_escape", "utf-16", "hex"])
def test_forms_in_other_encodings_are_refused(charset: str, api: Served) -> None:
    form = b'--X\r\nContent-Disposition: form-data; name="csrf"\r\n\r\n\\ud800\r\n--X--\r\n'
    with api.client() as client:
        client.get("/login")
        for said, status in ((f"; charset={charset}", 422), ("; charset=UTF-8", 403), ("", 403)):
            headers = {"Content-Type": f"multipart/form-data; boundary=X{said}"}
            assert client.post("/login", content=form, headers=headers).status_code == status, said


@pytest.mark.parametrize(
    ("old", "new", "files"),
    [
        ("title: light", 'title: "li\\0ght"', {}),
        ("title: light", 'title: "li\\uD800ght"', {}),
        ("", "", {"x.json": "\ud800"}),
        ("", "", {"pipeline.yaml/x.json": "{}"}),
    ],
)
def test_texts_and_names_that_cannot_be_stored(old: str, new: str, files: dict[str, str], api: Served) -> None:
    body = submission("good/base", "good/expert")
    body["pipeline"] = body["pipeline"].replace(old, new) if old else body["pipeline"]
    body["files"] |= files
    with api.client("run") as client:
        # As ASCII: what JSON spells out arrives as it is meant.
        answer = client.post("/api/jobs", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 422, answer.text
    assert not list(api.service.settings.jobs.glob(".incoming-*"))


# --------------------------------------------------------------------------------------------------------------- artifacts
TRAVERSAL = [
    "../log.jsonl", "..%2flog.jsonl", "%2e%2e/log.jsonl", "%2e%2e%2flog.jsonl", "merged/../../log.jsonl", "....//log.jsonl",
    "/etc/passwd", "%2fetc%2fpasswd", "//etc/passwd", "..\\log.jsonl", "..%5clog.jsonl", "%252e%252e/log.jsonl", ".", "..", "",
    ".state/evaluate.json", "run.yaml", "./run.yaml", "merged", "merged/", "link.txt", "elsewhere/instance", "report.html%00",
    "report.html/", "report.html/x", "%c0%ae%c0%ae/log.jsonl", "~", "file:///etc/passwd", "x" * 900, "none.txt",
]  # fmt: skip


@pytest.mark.parametrize("path", TRAVERSAL)
def test_no_path_leads_out_of_the_run(path: str, api: Served, done: Job) -> None:
    """Sent as it is: a client like httpx would tidy the path before."""
    connection = http.client.HTTPConnection(api.url.removeprefix("http://"), timeout=30)
    headers = {"Authorization": f"Bearer {api.tokens['read']}"}
    connection.request("GET", f"/api/jobs/{done.id}/artifacts/{path}", headers=headers)
    answer = connection.getresponse()
    body = json.loads(answer.read())
    connection.close()
    assert answer.status in (404, 422) or set(body) == {"artifacts"}, body
    assert "root:" not in str(body)


def test_artifacts_are_listed_by_their_addresses(api: Served, done: Job) -> None:
    with api.client("read") as client:
        found = client.get(f"/api/jobs/{done.id}/artifacts").json()["artifacts"]
        assert [one["path"] for one in found] == ["merged/conflict/model.safetensors", "report.html", "samples/a.jsonl"]
        for one in found:
            assert len(client.get(one["url"]).content) == one["size"]


@pytest.mark.parametrize(
    ("range", "status", "body"),
    [
        ("bytes=0-9", 206, bytes(range(10))),
        ("bytes=190-", 206, bytes(range(190, 200))),
        ("bytes=-5", 206, bytes(range(195, 200))),
        ("bytes=150-5000", 206, bytes(range(150, 200))),
        ("bytes=200-", 416, None),
        ("bytes=-0", 416, None),
        ("bytes=9-3", 400, None),
        ("bytes=x-y", 400, None),
        ("lines=1-2", 400, None),
        ("bytes=" + ",".join(["0-1"] * 50), 400, None),
    ],
)
def test_ranges(range: str, status: int, body: bytes | None, api: Served, done: Job) -> None:
    with api.client("read") as client:
        answer = client.get(f"/api/jobs/{done.id}/artifacts/merged/conflict/model.safetensors", headers={"Range": range})
        assert answer.status_code == status
        if body is not None:
            assert answer.content == body
            assert answer.headers["Content-Range"].endswith("/200")
            head = client.head(f"/api/jobs/{done.id}/artifacts/merged/conflict/model.safetensors")
            assert (head.headers["Content-Length"], head.headers["Accept-Ranges"]) == ("200", "bytes")


def test_a_file_that_changed_is_not_patched_together(api: Served, done: Job) -> None:
    path = f"/api/jobs/{done.id}/artifacts/samples/a.jsonl"
    with api.client("read") as client:
        tag = client.get(path).headers["ETag"]
        assert client.get(path, headers={"Range": "bytes=5-", "If-Range": tag}).status_code == 206
        assert client.get(path, headers={"Range": "bytes=5-", "If-Range": '"other"'}).status_code == 200


def test_pages_of_a_run_are_in_a_sandbox(api: Served, done: Job) -> None:
    with api.client("read") as client:
        report = client.get(f"/api/jobs/{done.id}/artifacts/report.html")
        assert report.text == REPORT
        assert report.headers["Content-Security-Policy"].startswith("sandbox allow-scripts;")
        weights = client.get(f"/api/jobs/{done.id}/artifacts/merged/conflict/model.safetensors")
        assert weights.headers["Content-Disposition"].startswith("attachment")
        for answer in (report, weights):
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"


# ------------------------------------------------------------------------------------------------------------------ events
def events_of(text: str) -> list[dict[str, str]]:
    blocks = [block.split("\n") for block in text.split("\n\n") if block.startswith("id: ")]
    return [dict(line.split(": ", 1) for line in block) for block in blocks]


def test_a_stream_goes_on_where_it_was(api: Served, done: Job) -> None:
    path = f"/api/jobs/{done.id}/events"
    with api.client("read") as client:
        answer = client.get(path)
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        events = events_of(answer.text)
        assert [event["event"] for event in events] == ["note"] * 5 + ["end"]
        assert json.loads(events[-1]["data"])["id"] == done.id
        for place in range(4):
            again = events_of(client.get(path, headers={"Last-Event-ID": events[place]["id"]}).text)
            assert again == events[place + 1 :]
            assert events_of(client.get(path, params={"after": events[place]["id"]}).text) == again
        assert client.get(path, headers={"Last-Event-ID": events[-1]["id"]}).status_code == 204
        page = client.get(f"/api/jobs/{done.id}/log", params={"after": events[2]["id"]}).json()
        assert [event["text"] for event in page["events"]] == ["note 3", "note 4"]
        assert page["state"] == "done"
        assert client.get(f"/api/jobs/{done.id}/log", params={"after": page["next"]}).json()["events"] == []


def test_a_stream_tells_what_happens(api: Served) -> None:
    job = stored_job(api.service, "running")
    log = api.service.folder(job.id) / "log.jsonl"
    write_event(log, 1, "note", "before")
    told: list[str] = []
    with api.client("read") as client, client.stream("GET", f"/api/jobs/{job.id}/events") as stream:
        for line in stream.iter_lines():
            if line.startswith("event: "):
                told.append(line)
            if told == ["event: note"] and line == "":
                write_event(log, 1, "error", "while it was followed")
                from mechmerge.service.store import Claim

                api.service.store.finish(Claim(job.id, "a-server", 1), "failed", seconds=1.0)
                told.append("…")
    assert told == ["event: note", "…", "event: error", "event: end"]


@pytest.mark.parametrize("path", ["/api/jobs/{id}/events", "/live"])
@pytest.mark.parametrize("by", ["token", "session"])
def test_a_stream_ends_with_its_token(path: str, by: str, api: Served) -> None:
    job = stored_job(api.service, "running")
    token, text = api.service.tokens.add("guest", "read")
    with api.client() as client:
        if by == "session":
            assert client.post("/api/session", json={"token": text}).status_code == 200
        else:
            client.headers["Authorization"] = f"Bearer {text}"
        with client.stream("GET", path.format(id=job.id)) as stream:
            lines = stream.iter_lines()
            assert next(lines) == "retry: 2000"
            api.service.tokens.revoke(token.id)
            assert not any(line.startswith("event: end") for line in lines), "it ends, though the job goes on"
        assert client.get("/api/me").status_code == 401


@pytest.mark.parametrize("path", ["/api/jobs/{id}/events", "/live"])
def test_a_stream_ends_with_its_session(path: str, api: Served) -> None:
    job = stored_job(api.service, "running")
    with api.client() as client, api.client() as other:
        csrf = client.post("/api/session", json={"token": api.tokens["read"]}).json()["csrf"]
        other.cookies.set("mechmerge_session", client.cookies["mechmerge_session"])
        with client.stream("GET", path.format(id=job.id)) as stream:
            lines = stream.iter_lines()
            assert next(lines) == "retry: 2000"
            assert other.delete("/api/session", headers={"X-CSRF-Token": csrf}).status_code == 204
            assert not any(line.startswith("event: end") for line in lines), "it ends, though the job goes on"


# --------------------------------------------------------------------------------------------------------- the rest
def test_submissions(api: Served) -> None:
    body = submission("good/base", "good/expert") | {"key": "my-own-key"}
    with api.client("run") as client:
        made = client.post("/api/jobs", json=body)
        again = client.post("/api/jobs", json=body)
        assert (made.status_code, again.status_code) == (201, 200)
        assert made.json() == again.json()
        id = made.json()["id"]
        assert client.post("/api/jobs", json=body | {"priority": 3}).json()["id"] == id, "a priority says nothing of the work"
        (api.service.folder(id) / "input" / "left.txt").write_text("by a worker")
        assert client.post("/api/jobs", json=body).status_code == 200
        commented = {name: f"{text}# as before\n" for name, text in body["files"].items()}
        for other in (submission("good/base", "good/expert", seed=7), {"files": commented}):
            refused = client.post("/api/jobs", json=body | other)
            assert (refused.status_code, refused.json()["found"]) == (409, "another one")
            assert id in refused.json()["fix"]
        assert "hf://good/base" in client.get(f"/api/jobs/{id}/pipeline").text
        assert client.delete(f"/api/jobs/{id}").status_code == 409, "it is queued"
        assert client.post(f"/api/jobs/{id}/cancel").json()["state"] == "cancelled"
        assert client.post(f"/api/jobs/{id}/resume").json()["state"] == "queued"
        listed = client.get("/api/jobs", params={"state": "queued", "user": "the-run", "limit": 1}).json()
        assert listed["jobs"][0]["id"] == id
        evil = client.post("/api/jobs", json=submission("/etc", "good/expert"))
        assert evil.status_code == 422
        assert evil.json()["where"] == "model reference '/etc'"
    assert not list(api.service.settings.jobs.glob(".incoming-*"))


def test_publishing_is_checked_before_it_is_queued(api: Served, done: Job) -> None:
    waiting = stored_job(api.service, "running")
    with api.client("publish") as client:
        for id, body, status in (
            (done.id, {"repo": "them/model"}, 422),
            (done.id, {"repo": "us/model", "no_gate": True}, 422),
            (done.id, {"repo": "us/model", "mode": "branch"}, 422),
            (waiting.id, {"repo": "us/model"}, 409),
            (done.id, {"repo": "us/model"}, 202),
        ):
            assert client.post(f"/api/jobs/{id}/publish", json=body).status_code == status, body


def test_publications_under_a_key(api: Served, done: Job) -> None:
    with api.client("publish") as client:
        path, body = f"/api/jobs/{done.id}/publish", {"repo": "us/model", "key": "once-and-for-all"}
        first, again = client.post(path, json=body), client.post(path, json=body | {"mode": "main"})
        assert (first.status_code, again.status_code) == (202, 200)
        assert again.json()["id"] == first.json()["id"], "what is the default anyway is the same request"
        assert client.post(path, json=body | {"dry_run": True}).status_code == 409


def test_a_job_from_before_requests_were_kept_answers_to_its_key(api: Served) -> None:
    body = submission("good/base", "good/expert") | {"key": "from-another-version"}
    with api.client("run") as client:
        id = client.post("/api/jobs", json=body).json()["id"]
        (api.service.folder(id) / jobs.ASKED).unlink()
        assert client.post("/api/jobs", json=body).json()["id"] == id
        assert client.post(f"/api/jobs/{id}/cancel").status_code == 200


def test_metrics_are_in_prometheus_format(api: Served, done: Job) -> None:
    with api.client("read") as client:
        client.get(f"/api/jobs/{done.id}")
        for method in ("GET", "INVENTED", "INVENTED-TOO"):
            client.request(method, "/healthz")
        text = client.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert {"mechmerge_jobs", "mechmerge_http_requests", "mechmerge_disk_free_bytes"} <= families.keys()
    routes = {sample.labels.get("route") for sample in families["mechmerge_http_requests"].samples}
    assert "/api/jobs/{id}" in routes, "by route, not by path"
    methods = {sample.labels.get("method") for sample in families["mechmerge_http_requests"].samples}
    assert {"GET", "other"} <= methods
    assert not any(str(method).startswith("INVENTED") for method in methods), "clients do not name series"


def test_the_server_imports_no_torch() -> None:
    code = "import sys, mechmerge.service.serve, mechmerge.service.client\nprint({'torch', 'peft'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=os.environ)
    assert done.stdout.strip() == "set()"
