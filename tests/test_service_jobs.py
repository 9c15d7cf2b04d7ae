"""Jobs that really run, in workers of a server of their own: to the same bytes under any SIGKILL, within their limits."""

from __future__ import annotations

import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from mechmerge.artifacts import write_json
from mechmerge.cli.main import cli
from mechmerge.models.references import Model
from mechmerge.pipeline.run import run_pipeline
from mechmerge.service.client import Client, bundle
from mechmerge.service.supervisor import read_outcome
from mechmerge.service.worker import Outcome, outcome_file
from tests.hub import Hub
from tests.serving import ServerProcess, database, light_files, postgres, stored_job, submission, write_light  # noqa: F401
from tests.test_pipeline import content

STAGES = ("localize-a", "effects", "merge-conflict", "evaluate", "report")
WAIT = 600.0


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, base: Model, expert: Model) -> dict[str, str]:
    """What an undisturbed run of the light pipeline leaves: sha256 by path."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run_pipeline(write_light(folder, base, expert), folder / "run")
    return content(folder / "run")


def start(data: Path, models: Path, *arguments: str, env: dict[str, str] | None = None) -> ServerProcess:
    return ServerProcess(data, "--allow-folder", str(models), "--threads", "1", "--nice", "0", *arguments, env=env)


def get(client: httpx.Client, path: str) -> Any:
    answer = client.get(path)
    assert answer.status_code == 200, answer.text
    return answer.json()


def wait_for(client: httpx.Client, id: str, *states: str) -> dict[str, Any]:
    until = time.monotonic() + WAIT
    while (job := get(client, f"/api/jobs/{id}"))["state"] not in states:
        assert time.monotonic() < until, job
        time.sleep(0.1)
    return dict(job)


def wait_for_stage(client: httpx.Client, id: str, stage: str, attempt: int) -> None:
    """Waits until a worker is at work in a stage, in one of the attempts after `attempt`."""
    until = time.monotonic() + WAIT
    while True:
        events = get(client, f"/api/jobs/{id}/log")["events"]
        if any(e["attempt"] > attempt and e.get("stage") == stage and e["text"] == "begins" for e in events):
            return
        assert not any(e["type"] == "state" and e["text"] in ("done", "failed") for e in events), (stage, events[-3:])
        assert time.monotonic() < until, events[-3:]
        time.sleep(0.02)


@pytest.mark.slow
def test_kills_leave_the_same_bytes(
    tmp_path: Path,
    models: Path,
    base: Model,
    expert: Model,
    reference: dict[str, str],
    database: str,  # noqa: F811
) -> None:
    """Workers and the server are killed in turn, in five stages (in two where the database is a server of its own); then the
    job ends, once, as if nothing had been.
    """
    draw = random.Random(0)
    stages = STAGES if database.startswith("sqlite") else STAGES[1:3]
    with start(tmp_path / "data", models, "--database", database) as server:
        with server.client() as client:
            id = client.post("/api/jobs", json=submission(str(base.path), str(expert.path))).json()["id"]
        attempt = 0
        for number, stage in enumerate(stages):
            with server.client() as client:
                wait_for_stage(client, id, stage, attempt)
                attempt = get(client, f"/api/jobs/{id}")["attempt"]
            time.sleep(draw.uniform(0, 0.1))
            if number % 2:
                server.kill()
                server.await_quiet()
                server.start()
            else:
                for worker in server.workers():
                    worker.kill()
        with server.client() as client:
            job = wait_for(client, id, "done", "failed")
            assert job["state"] == "done", job
            assert job["result"]["gate"] == "passed"
            assert content(server.data / "jobs" / id / "run") == reference
            events = get(client, f"/api/jobs/{id}/log")["events"]
            ends = [e["text"] for e in events if e["type"] == "state"]
            assert ends.count("done") == 1
            assert len(get(client, "/api/jobs")["jobs"]) == 1
        assert server.stop() == 0
        server.await_quiet(1)


# ------------------------------------------------------------------------------------------------------- limits and orders
@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[ServerProcess]:
    """A server whose jobs may take next to nothing."""
    arguments = ("--memory", "40MB", "--attempts", "2")
    with start(tmp_path_factory.mktemp("limited") / "data", models, *arguments) as server:
        yield server


def test_a_job_beyond_its_memory_is_ended(limited: ServerProcess, base: Model, expert: Model) -> None:
    with limited.client() as client:
        id = client.post("/api/jobs", json=submission(str(base.path), str(expert.path))).json()["id"]
        job = wait_for(client, id, "failed", "done")
        assert job["error"]["where"] == "memory"
        assert "--memory" in job["error"]["fix"]
        assert job["attempt"] == 1, "it would not do better a second time"
    limited.await_quiet()


def test_time_disk_cancel_and_restart(tmp_path: Path, models: Path, base: Model, expert: Model) -> None:
    body = submission(str(base.path), str(expert.path))
    with start(tmp_path / "data", models, "--time", "0.0003") as server:  # about a second
        with server.client() as client:
            id = client.post("/api/jobs", json=body).json()["id"]
            assert wait_for(client, id, "failed", "done")["error"]["where"] == "time"
        assert server.stop() == 0
        server.arguments = (*server.arguments[:6], "--disk", "1KB")
        server.start()
        with server.client() as client:
            assert client.post(f"/api/jobs/{id}/resume").status_code == 200
            assert wait_for(client, id, "failed", "done")["error"]["where"] == "disk"
        assert server.stop() == 0
        server.arguments = server.arguments[:6]
        server.start()
        with server.client() as client:
            client.post(f"/api/jobs/{id}/resume")
            wait_for(client, id, "running")
            second = client.post("/api/jobs", json=body).json()["id"]
            assert get(client, f"/api/jobs/{second}")["state"] == "queued", "there is one slot"
        assert server.stop() == 0, "a running job and an open queue do not hold it up"
        server.await_quiet(1)
        server.start()
        with server.client() as client:
            assert wait_for(client, id, "running")["attempt"] == 4, "it goes on by itself"
            for one in (second, id):
                assert client.post(f"/api/jobs/{one}/cancel").status_code == 200
                assert wait_for(client, one, "cancelled", "done")["state"] == "cancelled"
        server.await_quiet(5)


def test_a_worker_that_keeps_dying_is_given_up(tmp_path: Path, models: Path, base: Model, expert: Model) -> None:
    with start(tmp_path / "data", models, "--attempts", "2") as server, server.client() as client:
        id = client.post("/api/jobs", json=submission(str(base.path), str(expert.path))).json()["id"]
        until = time.monotonic() + WAIT
        while get(client, f"/api/jobs/{id}")["state"] != "failed":
            assert time.monotonic() < until
            for worker in server.workers():
                worker.kill()
            time.sleep(0.02)
        job = get(client, f"/api/jobs/{id}")
        assert job["attempt"] == 2
        assert job["error"]["found"] == "that it was killed 2 times in it"
        assert (server.data / "jobs" / id / "input" / "loud.yaml").read_text() == light_files()["loud.yaml"]


def test_what_is_wrong_with_a_model_is_one_line_without_the_servers_folders(tmp_path: Path, models: Path, base: Model) -> None:
    with start(tmp_path / "data", models) as server, server.client() as client:
        body = submission(str(base.path), str(base.path))
        body["files"]["loud.yaml"] = "name: loud\npairs: 7\n"
        id = client.post("/api/jobs", json=body).json()["id"]
        job = wait_for(client, id, "failed", "done")
        assert job["error"]["where"].startswith("loud.yaml: pairs")
        assert str(server.data) not in str(job)
        log = get(client, f"/api/jobs/{id}/log")["events"]
        assert [e["text"] for e in log if e["type"] == "state"] == ["queued", "running", "failed"]


# -------------------------------------------------------------------------------------------------------- the command line
def run_cli(server: ServerProcess, *arguments: str) -> Any:
    return CliRunner().invoke(cli, [*arguments, "--server", server.url], standalone_mode=False)


@pytest.mark.slow
def test_submit_follow_publish(
    tmp_path: Path, models: Path, base: Model, expert: Model, reference: dict[str, str], lfs_hub: Hub
) -> None:
    """The same file as `run` takes, from its folder, by the command line; then the gate decides what may be published."""
    path = write_light(tmp_path / "mine", base, expert, base=os.path.relpath(base.path, tmp_path / "mine"))
    with start(tmp_path / "data", models, "--publish-to", "writer", env=lfs_hub.env()) as server:
        done = run_cli(server, "submit", str(path), "--follow")
        assert done.return_value == 0, done.output
        id = done.stdout.split()[0]
        assert "▶ merge-conflict" in done.stderr
        assert content(server.data / "jobs" / id / "run") == reference
        assert "evaluate" in run_cli(server, "logs", id).output
        listed = run_cli(server, "jobs")
        assert id in listed.output
        assert "passed" in run_cli(server, "jobs", id).output
        run_cli(server, "cancel", id)
        with server.client() as client:
            published = client.post(f"/api/jobs/{id}/publish", json={"repo": "writer/merge"})
            assert published.status_code == 202, published.text
            job = wait_for(client, published.json()["id"], "done", "failed")
            assert job["state"] == "done", job["error"]
            assert job["result"]["repo"] == "writer/merge"
            assert lfs_hub.files("writer/merge")["model.safetensors"] == reference["merged/conflict/model.safetensors"]
            # The gate has no rule about the sum: the worker refuses it, whatever the endpoint lets through.
            other = client.post(f"/api/jobs/{id}/publish", json={"repo": "writer/sum", "model": "sum"}).json()["id"]
            refused = wait_for(client, other, "done", "failed")
            assert refused["state"] == "failed"
            assert refused["error"]["where"] == "gate of sum"


def test_a_bundle_holds_what_the_pipeline_names(tmp_path: Path, base: Model, expert: Model) -> None:
    folder = tmp_path / "deep" / "pipelines"
    path = write_light(folder, base, expert, base=os.path.relpath(base.path, folder))
    shutil.move(folder / "loud.yaml", tmp_path / "a loud one.yaml")
    text = path.read_text().replace("loud.yaml", "../../a loud one.yaml")
    path.write_text(text)
    sent = bundle(path)
    assert set(sent.files) == {"sent/0/a-loud-one.yaml", "short.yaml"}
    assert sent.files["sent/0/a-loud-one.yaml"] == light_files()["loud.yaml"]
    assert f"base: {base.path}" in sent.pipeline
    assert "file: sent/0/a-loud-one.yaml" in sent.pipeline


def test_a_client_without_a_server_is_one_line() -> None:
    from mechmerge.errors import InputError, MissingError

    with Client("http://127.0.0.1:9", patience=0.1) as client:
        with pytest.raises(MissingError, match="a server within reach"):
            client.jobs()
        with pytest.raises(InputError, match="16 hex digits"):
            client.job("../tokens")


def test_a_server_is_waited_for_after_a_long_silence_too() -> None:
    """It sends signs of life alone for longer than the client is patient, goes away, and is there again."""
    ends: list[str] = []

    class Quiet(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "10000")  # so that it breaks off, as that of a server that is killed
            self.end_headers()
            ends.append("")
            if len(ends) == 1:
                for _ in range(12):
                    self.wfile.write(b": still here\n\n")
                    time.sleep(0.1)
            else:
                self.wfile.write(b'id: 7\nevent: end\ndata: {"state": "done"}\n\n')

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with Client(f"http://127.0.0.1:{server.server_port}", patience=0.6) as client:
            assert list(client.follow("0" * 16)) == [{"state": "done", "type": "end"}]
        server.shutdown()
    assert len(ends) == 2


def test_jobs_are_told_to_a_command_with_its_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mechmerge.service.settings import Settings
    from tests.serving import served

    with served(Settings(data=tmp_path / "data")) as server:
        stored_job(server.service, gate="passed")
        arguments = ["jobs", "--server", server.url, "--format", "json"]
        refused = CliRunner().invoke(cli, arguments, standalone_mode=False)
        assert "server: token" in str(refused.exception)
        monkeypatch.setenv("MECHMERGE_TOKEN", server.tokens["read"])
        assert '"title": "stored"' in CliRunner().invoke(cli, arguments, standalone_mode=False).output


def test_a_server_that_stops_lets_go_of_its_workers(tmp_path: Path) -> None:
    from mechmerge.service.settings import Settings
    from tests.serving import served

    with served(Settings(data=tmp_path / "data", namespaces=("good",)), supervise=True, tokens=False) as server:
        with server.client() as client:
            id = client.post("/api/jobs", json=submission("good/base", "good/expert")).json()["id"]
        supervisor, until = server.service.supervisor, time.monotonic() + WAIT
        while not (running := list(supervisor.running)):
            assert time.monotonic() < until
            time.sleep(0.01)
        supervisor.stop()
        process = running[0].process
        assert process.returncode is not None
        assert process.stdin is not None
        assert process.stdin.closed
        assert server.service.store.job(id).state == "queued"


def test_a_job_whose_worker_cannot_be_started_is_given_up(tmp_path: Path) -> None:
    from mechmerge.service.settings import Settings
    from mechmerge.service.store import NewJob, job_id
    from tests.serving import served

    with served(Settings(data=tmp_path / "data", attempts=2), supervise=True) as server:
        job, _ = server.service.store.submit(NewJob(job_id(), "run", "without a folder", "ann", 5), 10)
        until = time.monotonic() + WAIT
        while (found := server.service.store.job(job.id)).state not in ("failed", "done"):
            assert time.monotonic() < until
            time.sleep(0.05)
        assert found.error is not None


def test_a_damaged_outcome_is_a_death(tmp_path: Path) -> None:
    """It must not stop the server's other jobs, whatever wrote into it."""
    assert read_outcome(tmp_path, 1) is None
    for damaged in ("", "{", '{"state": "won"}', "ÿ: not JSON"):
        outcome_file(tmp_path, 1).write_text(damaged)
        assert read_outcome(tmp_path, 1) is None
    write_json(outcome_file(tmp_path, 1), Outcome(state="done"))
    assert read_outcome(tmp_path, 1) == Outcome(state="done")
