"""The web page of the service in a real browser: a whole job as a person does it, and every page for everybody.

MECHMERGE_TEST_RUN may name the run directory of a finished run, such as the demo's: then every page is looked at on it as well.
MECHMERGE_SCREENSHOTS may name a folder for the pictures that the tests take (default: pytest's own).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

from mechmerge.artifacts import read_document
from mechmerge.evaluate.record import Evaluation
from mechmerge.localize.scores import ScoreFile, read_scores
from mechmerge.models.references import Model, ModelId
from mechmerge.pipeline.schema import PARAMETERS, RecipePlan
from mechmerge.recipe.compile import POLICIES, compile_recipe, expected_change
from mechmerge.recipe.explain import shares
from mechmerge.recipe.sources import read_sources
from mechmerge.report.style import signed
from mechmerge.service.access import COOKIE
from mechmerge.service.pages.render import POLICY
from mechmerge.service.pages.sessions import safe_next
from mechmerge.service.pages.settings import is_family, read_settings
from mechmerge.service.settings import Settings
from mechmerge.service.tokens import ROLES
from tests import merged_run
from tests.browser import Opened, headless, open_all, opened
from tests.curve_samples import set_curves
from tests.hub import Hub
from tests.samples import BASE, EXPERTS, LAYERS, judged_file, score_file, whole_run
from tests.serving import Served, light_files, light_pipeline, served, stored_job
from tests.test_report_page import HOSTILE, SEEN

SLOW = 900_000
"""Milliseconds that a job may take on a machine at work."""
expect.set_options(timeout=60_000)
PARTS = ("", "maps", "recipes", "builder", "evaluation", "samples", "gate")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with headless() as found:
        yield found


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = os.environ.get("MECHMERGE_SCREENSHOTS")
    folder = Path(named) if named else tmp_path_factory.mktemp("pictures")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# ------------------------------------------------------------------------------------------------------------- a whole job
BROKEN = {"name": "contains", "arguments": {"text": "\ufffd"}}
"""What the plain sum of the tiny experts answers with; base, experts and conflict merge say nothing but line breaks."""
GATE = {"rules": [{"metric": "short", "at_least": 0.5}]}


class Place(NamedTuple):
    """A server that runs jobs and publishes to a Hub of its own."""

    served: Served
    hub: Hub
    pipeline: str
    files: Path


@pytest.fixture
def place(tmp_path: Path, models: Path, base: Model, expert: Model, second_expert: Model) -> Iterator[Place]:
    files = tmp_path / "files"
    files.mkdir()
    for name, text in light_files().items():
        content = yaml.safe_load(text)
        if name == "short.yaml":
            content["verifier"] = BROKEN
        (files / name).write_text(yaml.safe_dump(content))
    soft = yaml.safe_load(light_files()["loud.yaml"]) | {"name": "soft"}
    (files / "soft.yaml").write_text(yaml.safe_dump(soft))
    plan = light_pipeline(
        str(base.path),
        str(expert.path),
        title="a whole job",
        behaviors={"loud": {"expert": "a", "file": "loud.yaml"}, "soft": {"expert": "b", "file": "soft.yaml"}},
        publish="sum",
        gate=GATE,
    )
    plan["experts"]["b"] = str(second_expert.path)
    with Hub(tmp_path / "hub") as hub, pytest.MonkeyPatch.context() as patch:
        # Workers inherit the server's environment.
        wanted = hub.env()
        for name in os.environ.keys() - wanted.keys():
            patch.delenv(name)
        for name, value in wanted.items():
            patch.setenv(name, value)
        settings = Settings(data=tmp_path / "data", folders=(models,), publish_to=("writer",), threads=1, nice=0)
        with served(settings, supervise=True) as found:
            yield Place(found, hub, yaml.safe_dump(plan, sort_keys=False), files)


def log_in(page: Page, token: str) -> None:
    page.get_by_label("Token").fill(token)
    page.get_by_role("button", name="Log in").click()


def tab(page: Page, name: str) -> None:
    page.get_by_role("navigation", name="This run").get_by_role("link", name=name).click()


def table_rows(page: Page, label: str) -> list[list[str]]:
    rows = page.get_by_role("region", name=label, exact=True).locator("tbody tr").all()
    return [row.locator("th, td").all_inner_texts() for row in rows]


def test_a_whole_job_as_a_person_does_it(browser: Browser, place: Place, pictures: Path) -> None:
    url, tokens = place.served.url, place.served.tokens
    with opened(browser, f"{url}/new") as shown:
        page = shown.page
        assert page.url == f"{url}/login?next=/new"
        log_in(page, "mmt_no_token")
        expect(page.get_by_role("alert")).to_contain_text("no valid token")
        assert "401" in shown.complaints.pop(), "a browser notes every answer that refuses"
        log_in(page, tokens["publish"])
        assert page.url == f"{url}/new", "one goes on where one wanted to go"

        # Start it. What is wrong with a form is said, and what was typed stays.
        page.get_by_label("Pipeline").fill("title: nothing more")
        page.get_by_role("button", name="Queue the run").click()
        expect(page.get_by_role("alert")).to_contain_text("pipeline")
        assert page.get_by_label("Pipeline").input_value() == "title: nothing more"
        shown.complaints.clear()
        page.get_by_label("Pipeline").fill(place.pipeline)
        page.get_by_label("Files that it names").set_input_files(list(place.files.iterdir()))
        page.get_by_role("button", name="Queue the run").click()
        expect(page.get_by_role("heading", name="a whole job")).to_be_visible()
        run = page.url
        (id,) = re.findall(r"/runs/([0-9a-f]{16})$", run)

        # Watch it: stages come by themselves, in the list as well.
        expect(page.locator("#stage-list .at-work")).to_have_count(1, timeout=SLOW)
        page.screenshot(path=pictures / "job-running.png")
        with opened(browser, f"{url}/login") as second:
            log_in(second.page, tokens["read"])
            row = second.page.locator(f'[data-job="{id}"]')
            expect(row.locator(".step")).to_contain_text(
                re.compile(r"localize|effects|recipe|merge|evaluate|report"), timeout=SLOW
            )
            second.page.screenshot(path=pictures / "list-running.png")
            expect(row.locator(".state")).to_have_text(re.compile("done|failed"), timeout=SLOW)
            assert row.locator(".state").inner_text() == "done, gate passed"
        expect(page.locator(".meta .state")).to_have_text("done, gate passed")
        stages = page.locator("#stage-list li > span:first-child").all_inner_texts()
        assert stages[:3] == ["localize-a", "localize-b", "effects"]
        assert stages[-2:] == ["evaluate", "report"]

        # Maps: hover, keyboard and click.
        tab(page, "Maps")
        open_all(page)
        heat = page.locator('[data-chart=units][data-kind=head][data-score="0"] .heat')
        tip = page.locator("#tip")
        for x in range(90, 100):  # a tip goes when the page scrolls, and it may still scroll to the map
            heat.hover(position={"x": x, "y": 9})
            page.wait_for_timeout(200)
            if tip.is_visible():
                break
        expect(tip).to_be_visible()
        assert re.match(r"L\d\.head\.0\n", tip.inner_text())
        heat.focus()
        for key in ("Home", "ArrowRight", "ArrowDown", "Enter"):
            page.keyboard.press(key)
        expect(page.locator("#facts h3")).to_have_text("L1.head.1")
        taken = {row[0]: row[1:] for row in table_rows(page, "What recipes take")}
        assert taken["sum"] == ["× 1", "× 1"]
        assert set(taken["conflict"]) <= {"× 0", "× 1"}
        assert page.url.endswith("?component=L1.head.1"), "the page can be shared as it is"
        assert "L1.head.1" in page.locator("#said").inner_text(), "a screen reader hears of it"
        heat.click(position={"x": 90, "y": 9})
        expect(page.locator("#facts h3")).to_have_text(re.compile(r"L\d\.head\.0"))

        # The builder: the server says what each budget comes to.
        tab(page, "Builder")
        sources = read_sources(
            [
                *sorted(place.served.service.run(id).glob("scores/*/*.safetensors")),
                place.served.service.run(id) / "effects.safetensors",
            ]
        )
        page.get_by_label("Policy").select_option("top")
        for key, budget in (("End", 1.0), ("Home", 0.01)):
            page.get_by_label("Budget").press(key)
            compiled = compile_recipe("top", sources, parameters={"budget": budget, "overlap": "sum"})
            said = [
                f"{row['head + kv + neuron']} of {row['expert']}"
                for row in shares(compiled.recipe, compiled.masks, sources.unit_parameters())
            ]
            change = expected_change(sources, compiled.recipe, compiled.masks)
            assert change is not None
            said += [f"{name} {signed(value)}" for name, value in change.items()]
            expect(page.locator("#summary")).to_contain_text(said[0])
            for part in said:
                expect(page.locator("#summary")).to_contain_text(part)
        expect(page.locator("#shares canvas").first).to_be_visible()
        page.get_by_role("link", name="Use in a new run").click()
        plan = yaml.safe_load(page.get_by_label("Pipeline").input_value())
        assert plan["publish"] == "built"
        assert plan["recipes"]["built"]["parameters"] == {"budget": 0.01, "overlap": "sum"}
        expect(page.locator("#copied")).to_contain_text("loud.yaml, short.yaml, soft.yaml")

        # Evaluation and answers.
        page.goto(f"{run}/evaluation")
        page.get_by_label("Model", exact=True).select_option("conflict")
        page.get_by_label("against", exact=True).select_option("sum")
        page.get_by_role("button", name="Compare").click()
        ((metric, mine, theirs, difference, *_),) = table_rows(page, "conflict against sum")
        assert (metric, mine[:4], theirs[:4]) == ("short", "0.00", "1.00")
        assert difference.startswith("−1.000 [")
        page.get_by_role("link", name="Their answers").click()
        assert page.locator(".answer .badge").all_inner_texts() == ["failed", "passed"] * 4
        page.get_by_label("Show").select_option("failed")
        page.get_by_role("button", name="Show").click()
        expect(page.locator("p.note").first).to_contain_text("0 prompts")

        # The gate refuses one merge and passes another, which is published.
        tab(page, "Gate and publish")
        assert [row[:2] for row in table_rows(page, "The gate on every merge")] == [["sum", "passed"], ["conflict", "refused"]]
        page.get_by_role("link", name="conflict", exact=True).click()
        assert table_rows(page, "Rules for conflict")[0][1:5] == ["failed", "0.000", "0.500", "0.500"]
        expect(page.get_by_role("button", name="Publish conflict")).to_be_disabled()
        page.screenshot(path=pictures / "gate-refused.png", full_page=True)
        refuse(page, run, "conflict")
        page.get_by_role("link", name="sum", exact=True).click()
        page.get_by_label("Repository on the Hub").fill("writer/merge")
        page.get_by_role("button", name="Publish sum").click()
        expect(page.locator(".meta .state")).to_have_text("done", timeout=SLOW)
        expect(page.locator("dl.facts")).to_contain_text("writer/merge")
        page.screenshot(path=pictures / "published.png", full_page=True)
        assert {"model.safetensors", "README.md", "mechmerge/recipe.yaml"} <= place.hub.files("writer/merge").keys()
        assert shown.complaints == []

        page.get_by_role("button", name="Log out").click()
        page.goto(run)
        assert "/login" in page.url


def refuse(page: Page, run: str, model: str) -> None:
    """The server refuses what the button would not send."""
    csrf = page.locator("form[action$=publish] [name=csrf]").get_attribute("value")
    cookie = next(one["value"] for one in page.context.cookies() if one.get("name") == COOKIE)
    form = {"csrf": csrf, "model": model, "repo": "writer/other", "mode": "main"}
    answer = httpx.post(f"{run}/publish", data=form, cookies={COOKIE: cookie}, trust_env=False, timeout=60)
    assert answer.status_code == 409
    assert "nothing was published" in answer.text


# -------------------------------------------------------------------------------------------------- every page, for everybody
def rich_run(run: Path, text: str = "Say tea.", title: str = "two experts") -> Path:
    """A finished run with curves, roles, an evaluation that tells its models apart, answers and a gate."""
    whole_run(run)
    score_file("capitals", seed=1, curves=set_curves(above=True)).write(run / "scores" / "formats" / "capitals.safetensors")
    judged_file("headlines").write(run / "scores" / "formats" / "headlines.safetensors")
    for path in run.glob("scores/*/*.safetensors"):
        counted(path)
    models = {
        "base": BASE,
        **EXPERTS,
        "conflict": ModelId(name="c", shards={"m": "5" * 64}),
        "sum": ModelId(name="s", shards={"m": "6" * 64}),
    }
    merged_run.evaluation(models, conflict=0.6, sum=0.2).write(run / "evaluation.json")
    gate = {"rules": [{"metric": "formats", "at_least": {"model": "base", "plus": 0.1}}]}
    recipes: dict[str, Any] = {"sum": {}, "conflict": {}}
    plan = {"title": title, "publish": "conflict", "recipes": recipes, "gate": gate}
    (run / "run.yaml").write_text(json.dumps({"pipeline": plan}))
    (run / "gate.json").write_text(json.dumps({"passed": True, "rules": []}))
    (run / "samples").mkdir()
    for number, model in enumerate(models):
        rows = [
            {"id": str(at), "group": "title", "prompt": f"{at}. {text}", "answer": f"{text}\n\tline two" * 3, "tokens": 9,
             "passed": (at + number) % 3 > 0, "instructions": ["title", "capitals"], "strict": [True, (at + number) % 3 > 0],
             "finished": at != 2, "answers": "0"}
            for at in range(25)
        ]  # fmt: skip
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (run / "samples" / f"{model}.formats.jsonl").write_text(lines)
    return run


def counted(path: Path) -> None:
    """Gives a score file the numbers of parameters that budgets count."""
    scores = read_scores(path)
    counts = {
        f"{kind}.parameters": np.full(LAYERS, number, np.int64) for kind, number in (("head", 64), ("kv", 32), ("neuron", 9))
    }
    ScoreFile(scores.metadata, scores.arrays | counts).write(path)


class Shown(NamedTuple):
    """A server with a finished run, and nothing that runs."""

    served: Served
    id: str

    def address(self, part: str) -> str:
        return f"{self.served.url}/runs/{self.id}/{part}".rstrip("/")


def showing(folder: Path, run: Path, **options: Any) -> Iterator[Shown]:
    settings = Settings(data=folder, slots=0, publish_to=("writer",))
    with served(settings, **options) as found:
        job = stored_job(found.service, run=run, gate="passed")
        (found.service.folder(job.id) / "input" / "pipeline.yaml").write_text("title: stored\n")
        yield Shown(found, job.id)


GIVEN = os.environ.get("MECHMERGE_TEST_RUN")


@pytest.fixture(scope="module", params=["made", "given"] if GIVEN else ["made"])
def every(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    """An open server with a run that shows all there is to show, and with the one that the environment names."""
    folder = tmp_path_factory.mktemp("shown")
    run = rich_run(folder / "run") if request.param == "made" else Path(str(GIVEN))
    yield from showing(folder / "data", run, tokens=False)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    """A server with tokens and a run."""
    folder = tmp_path_factory.mktemp("guarded")
    yield from showing(folder / "data", rich_run(folder / "run"))


@pytest.mark.parametrize("width", ["desktop", "phone"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_serious_barrier_anywhere(browser: Browser, every: Shown, pictures: Path, width: str, theme: str) -> None:
    pages = {part or "overview": every.address(part) for part in PARTS}
    pages |= {"list": every.served.url, "new": f"{every.served.url}/new?from={every.id}", "delete": every.address("delete")}
    evaluation = read_document(Evaluation, every.served.service.run(every.id) / "evaluation.json")
    refused = next(name for name in ("sum", "task-arithmetic") if name in evaluation.models)
    pages |= {"component": every.address("maps?component=L1.head.0"), "refused": every.address(f"gate?model={refused}")}
    for name, address in pages.items():
        with opened(browser, address, width, theme) as shown:
            page = shown.page
            if name in ("maps", "recipes", "evaluation"):
                open_all(page)
            if name == "builder":
                page.locator("#shares canvas").first.wait_for()
            page.screenshot(path=pictures / f"{name}-{width}-{theme}.png", full_page=True)
            found = Axe().run(page).response["violations"]
            serious = [(v["id"], v["nodes"][0]["html"]) for v in found if v["impact"] in ("serious", "critical")]
            assert serious == [], name
            assert page.evaluate("document.documentElement.scrollWidth") == page.evaluate("innerWidth"), name
            assert shown.complaints == [], name
            assert all(request.startswith(every.served.url) for request in shown.requests), name


def test_the_login_page_has_no_serious_barrier(browser: Browser, guarded: Shown) -> None:
    with opened(browser, f"{guarded.served.url}/login", "phone", "dark") as shown:
        log_in(shown.page, "wrong")
        expect(shown.page.get_by_label("Token")).to_have_attribute("aria-invalid", "true")
        found = Axe().run(shown.page).response["violations"]
        assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == []


def test_the_keyboard_reaches_everything_and_shows_where_it_is(browser: Browser, every: Shown) -> None:
    with opened(browser, every.address("gate")) as shown:
        page = shown.page
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "main"
        reached = set()
        for _ in range(60):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.name || document.activeElement.textContent.trim()"))
            if page.evaluate("document.activeElement.matches('a, input, button')"):
                assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        assert {"Samples", "repo", "mode", "private", "dry_run", "tag", "license"} <= reached


def test_without_javascript_everything_is_there_after_a_reload(browser: Browser, every: Shown) -> None:
    with opened(browser, every.served.url, "phone", java_script_enabled=False) as shown:
        page = shown.page
        expect(page.get_by_role("link", name="reload")).to_be_visible()
        page.goto(every.address("maps"))
        expect(page.get_by_text("Charts need JavaScript")).to_be_visible()
        assert page.locator("table").count() > 3
        page.get_by_label("Name").fill("L1.head.0")
        page.get_by_role("button", name="Show").click()
        expect(page.locator("#facts h3")).to_have_text("L1.head.0")
        page.goto(every.address("builder"))
        page.get_by_label("Policy").select_option("top")
        page.get_by_label("Budget").fill("0.2")
        page.get_by_role("button", name="Show what it does").click()
        expect(page.locator("#summary")).to_contain_text("top: takes ")
        expect(page.locator("#snippet")).to_contain_text("budget: 0.2")
        assert shown.complaints == []


def test_the_list_changes_by_itself_and_keeps_the_focus(browser: Browser, tmp_path: Path) -> None:
    with served(Settings(data=tmp_path / "data", slots=0), tokens=False) as found:
        first = stored_job(found.service, "queued")
        with opened(browser, found.url) as shown:
            link = shown.page.locator(f'[data-job="{first.id}"] a')
            link.focus()
            second = stored_job(found.service, "done", user=HOSTILE[:60])
            row = shown.page.locator(f'[data-job="{second.id}"]')
            expect(row).to_be_visible()
            expect(row.locator(".state")).to_have_text("done")
            assert shown.page.locator("#rows tr").first.get_attribute("data-job") == second.id
            expect(shown.page.locator("#said")).to_have_text("stored: done")
            assert link.evaluate("(one) => one === document.activeElement")
            found.service.store.delete(second.id)
            expect(row).to_have_count(0)
            expect(shown.page.locator('[data-count="queued"]')).to_have_text("1")
            assert shown.complaints == []


# ---------------------------------------------------------------------------------------------------------- what is refused
def test_nothing_from_a_file_runs(browser: Browser, tmp_path: Path) -> None:
    run = rich_run(tmp_path / "run", text=HOSTILE, title=HOSTILE)
    score_file(HOSTILE, valid=False, reasons=(HOSTILE,)).write(run / "scores" / "formats" / "x.safetensors")
    for hostile in showing(tmp_path / "data", run, tokens=False):
        for part in ("maps", "maps?component=L1.head.0", "samples", "gate", "evaluation", "builder"):
            with opened(browser, hostile.address(part)) as shown:
                check_harmless(shown)
                if part == "samples":
                    assert SEEN in shown.page.locator(".prompt").first.inner_text()
                    assert SEEN in shown.page.locator(".answer .text").first.inner_text()
                    assert "\n\tline two" in shown.page.locator(".answer .text").first.inner_text(), "lines and tabs stay"
                elif part.startswith("maps"):
                    assert SEEN in shown.page.locator("main").inner_text()
        with opened(browser, f"{hostile.served.url}/new") as shown:
            shown.page.get_by_label("Pipeline").fill(f"title: |\n  </textarea>{HOSTILE}")
            shown.page.get_by_role("button", name="Queue the run").click()
            shown.page.get_by_role("alert").wait_for()
            assert "</textarea></script>" in shown.page.get_by_label("Pipeline").input_value()
            shown.complaints.clear()
            check_harmless(shown)


def check_harmless(shown: Opened) -> None:
    assert shown.page.evaluate("window.pwned") is None
    assert shown.page.locator("img").count() == 0
    assert shown.complaints == []


@contextmanager
def session(shown: Shown, role: str) -> Iterator[tuple[httpx.Client, str]]:
    """A client with a session, logged in by the form, and its CSRF token."""
    with httpx.Client(base_url=shown.served.url, trust_env=False, timeout=60) as client:
        (csrf,) = re.findall(r'name="csrf" value="([^"]+)"', client.get("/login").text)
        answer = client.post("/login", data={"csrf": csrf, "token": shown.served.tokens[role], "next": "/"})
        assert answer.status_code == 303
        for part in ("HttpOnly", "SameSite=strict"):
            assert part in answer.headers["set-cookie"]
        (csrf,) = re.findall(r'name="csrf" value="([^"]+)"', client.get("/").text)
        yield client, csrf


def test_forms_need_the_session_and_its_csrf_token(guarded: Shown) -> None:
    job = stored_job(guarded.served.service, "queued")
    with session(guarded, "run") as (client, csrf), session(guarded, "run") as (other, _):
        for given in ({}, {"csrf": ""}, {"csrf": "ä"}, {"csrf": csrf[:-1]}):
            answer = client.post(f"/runs/{job.id}/cancel", data=given)
            assert answer.status_code == 403, given
        assert other.post(f"/runs/{job.id}/cancel", data={"csrf": csrf}).status_code == 403, "another session's"
        assert guarded.served.service.store.job(job.id).state == "queued"
        elsewhere = client.post(f"/runs/{job.id}/cancel", data={"csrf": csrf}, headers={"Origin": "http://evil.example"})
        assert elsewhere.status_code == 403
        assert client.post(f"/runs/{job.id}/cancel", data={"csrf": csrf}).status_code == 303
        assert guarded.served.service.store.job(job.id).state == "cancelled"
        assert client.post("/login", data={"csrf": "x", "token": "x"}).status_code == 403, "login has a token of its own"


@pytest.mark.parametrize("role", ROLES)
def test_the_button_is_there_for_those_who_may_publish(guarded: Shown, role: str) -> None:
    with session(guarded, role) as (client, csrf):
        (button,) = re.findall(
            r'<button class="button" type="submit"[^>]*>Publish conflict', client.get(guarded.address("gate")).text
        )
        assert ("disabled" in button) == (role in ("read", "run"))
        if role in ("read", "run"):
            form = {"csrf": csrf, "repo": "writer/merge", "mode": "main"}
            assert client.post(f"/runs/{guarded.id}/publish", data=form).status_code == 403
        assert ('href="/new"' in client.get("/").text) == (role != "read")
        assert client.get("/new").status_code == (403 if role == "read" else 200)


def test_a_form_that_was_changed_after_it_was_sent_gets_a_new_key(guarded: Shown) -> None:
    """Sent, back, changed, sent again: the first key names the first request, and the form that comes back has another."""
    with session(guarded, "publish") as (client, csrf):
        path = f"/runs/{guarded.id}/publish"
        form = {"csrf": csrf, "repo": "writer/one", "mode": "main", "key": "the-first-form"}
        first, again = (client.post(path, data=form) for _ in range(2))
        assert first.status_code == again.status_code == 303
        assert first.headers["location"] == again.headers["location"]
        changed = client.post(path, data=form | {"repo": "writer/two"})
        assert changed.status_code == 409
        assert "the request that it was first sent with" in changed.text
        keys = set(re.findall(r'name="key" value="([^"]+)"', changed.text))
        assert keys
        assert "the-first-form" not in keys
        other = client.post(path, data=form | {"repo": "writer/two", "key": keys.pop()})
        assert other.status_code == 303
        assert other.headers["location"] != first.headers["location"]


def test_without_a_session_every_page_leads_to_the_login(guarded: Shown) -> None:
    with httpx.Client(base_url=guarded.served.url, trust_env=False) as client:
        for path in ("/", "/new", *(f"/runs/{guarded.id}/{part}".rstrip("/") for part in PARTS)):
            answer = client.get(path)
            assert (answer.status_code, answer.headers["location"]) == (303, f"/login?next={path}")
        for path in (f"/runs/{guarded.id}/data.json", f"/runs/{guarded.id}/builder.json?policy=top"):
            assert client.get(path).status_code == 303
        assert client.get("/live").status_code == 401


def test_one_goes_on_nowhere_but_here() -> None:
    assert safe_next("/runs/1?x=2") == "/runs/1?x=2"
    for path in ("//evil.example", "/\\evil.example", "http://evil.example", "", "/a b", "/\r\nSet-Cookie:x", "/\t/evil"):
        assert safe_next(path) == "/"


def test_pages_load_one_script_and_one_style_and_hold_none(every: Shown) -> None:
    with httpx.Client(base_url=every.served.url, trust_env=False, timeout=60) as client:
        for path in ("/", "/new", *(every.address(part) for part in PARTS)):
            answer = client.get(path)
            assert answer.headers["content-security-policy"] == POLICY
            assert answer.headers["cache-control"] == "no-store"
            scripts = re.findall(r"<script\b[^>]*>", answer.text)
            assert [re.sub(r"/static/\w+", "", one) for one in scripts] == ['<script src="/app.js" defer>']
            assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", answer.text)
        (address,) = re.findall(r'src="(/static/\w+/app.js)"', answer.text)
        assert "immutable" in client.get(address).headers["cache-control"]
        assert client.get("/static/other/app.js").headers["cache-control"] == "no-cache"
        assert client.get("/static/other/nothing.js").status_code == 404
        first = client.get(every.address("data.json"))
        again = client.get(every.address("data.json"), headers={"If-None-Match": first.headers["etag"]})
        assert (first.status_code, again.status_code, again.content) == (200, 304, b"")
    assert "unsafe" not in POLICY


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/nothing/of/this/name", 404, "Not Found"),
        ("/runs/0000000000000000", 404, "a job of this server"),
        ("/runs/nonsense", 404, "a page of this server"),
        ("/runs/{id}/maps?component=L9.head.9", 404, "one that this run measured"),
        ("/runs/{id}/maps?component=../etc", 422, "L7.attention"),
        ("/runs/{id}/samples?first=nobody", 404, "none of this name"),
        ("/runs/{id}/samples?suite=../../run", 404, "none of this name"),
        ("/runs/{id}/gate?model=nobody", 404, "none of this name"),
        ("/runs/{id}/evaluation?model=nobody", 422, "no such model"),
        ("/runs/{id}/builder?policy=top&budget=2", 200, "a number from 0 to 1"),
        ("/runs/{id}/builder?policy=top&budget=nan", 200, "a number"),
        ("/runs/{id}/builder?policy=top&overlap=none", 200, "sum, share, winner"),
        ("/runs/{id}/builder?policy=nothing", 200, "one of conflict"),
        ("/runs/{id}/builder?policy=conflict&weight.nobody=2", 200, "behaviours among"),
    ],
)
def test_what_is_wrong_is_said_on_a_page(every: Shown, path: str, status: int, said: str) -> None:
    address = every.served.url + path.format(id=every.id)
    answer = httpx.get(address, trust_env=False, timeout=60, headers={"Accept": "text/html"})
    assert (answer.status_code, answer.headers["content-type"]) == (status, "text/html; charset=utf-8")
    assert said in answer.text


# ------------------------------------------------------------------------------------------------------------ one logic only
@pytest.mark.parametrize(
    ("query", "policy", "parameters"),
    [
        ("policy=top&budget=0.2&overlap=winner", "top", {"budget": 0.2, "overlap": "winner"}),
        ("policy=top&budget=0.75&overlap=share", "top", {"budget": 0.75, "overlap": "share"}),
        (
            "policy=conflict&weighting=equal&agreement=no",
            "conflict",
            {"weighting": "equal", "agreement": False, "certainty": 0.0},
        ),
        (
            "policy=conflict&weight.formats=3&certainty=2",
            "conflict",
            {"weighting": "own-gain", "agreement": True, "certainty": 2.0, "weight.formats": 3.0},
        ),
        ("policy=ties&weight=0.5&density=0.4", "ties", {"weight": 0.5, "density": 0.4, "lambda": 1.0}),
        ("policy=weighted&budget=0.4", "weighted", None),
        ("policy=solve&budget=0.5&unproven=yes", "solve", {"budget": 0.5, "agreement": True, "unproven": True}),
    ],
)
def test_the_builder_says_what_the_recipe_says(
    guarded: Shown, query: str, policy: str, parameters: dict[str, Any] | None
) -> None:
    parameters = read_settings(policy, {"budget": "0.4"}) if parameters is None else parameters
    run = guarded.served.service.run(guarded.id)
    sources = read_sources([*sorted(run.glob("scores/*/*.safetensors")), run / "effects.safetensors"])
    compiled = compile_recipe(policy, sources, parameters=parameters)
    taken = shares(compiled.recipe, compiled.masks, sources.unit_parameters())
    with guarded.served.client("read") as client:
        found = client.get(f"/runs/{guarded.id}/builder.json?{query}").json()
        assert found["tables"][0]["rows"] == [list(row.values()) for row in taken]
        assert found["notes"] == list(compiled.notes)
        assert yaml.safe_load(found["snippet"]) == {"recipes": {"built": {"policy": policy, "parameters": parameters}}}
        changes = {row[0]: row[1:] for row in found["tables"][1]["rows"]}
        if policy == "ties":
            assert set(changes["built"]) == {"–"}, "what a method does beyond coefficients is not foreseen"
        else:
            expected = expected_change(sources, compiled.recipe, compiled.masks)
            assert expected is not None
            assert changes["built"] == [signed(value) for value in expected.values()]
        again = client.get(f"/runs/{guarded.id}/builder.json?{found['query']}").json()
        assert again == found, "the address that is shared says the same"


def test_every_setting_of_every_policy_is_in_the_form() -> None:
    assert set(PARAMETERS) == set(POLICIES)
    for policy, names in PARAMETERS.items():
        assert list(read_settings(policy, {})) == [name for name in names if not is_family(policy, name)]
        given = {"strength.a": "0.5", "weight.b": "2", "limit.b": "0.1", "weight": "0.25", "budget": "0.25", "per_layer": "yes"}
        found = read_settings(policy, given)
        assert ("strength.a" in found) == (policy not in ("sce", "model-stock")), "those weigh the experts themselves"
        assert found.pop("strength.a", 0.5) == 0.5
        RecipePlan.model_validate(
            {"policy": policy, "parameters": found} | ({"like": "x"} if policy in ("random", "magnitude") else {})
        )
        assert ("weight.b" in found) == (policy == "conflict")
        assert ("limit.b" in found) == (policy == "solve")
        assert found.get("weight", 0.25) == found.get("budget", 0.25) == 0.25


def test_results_are_read_anew_when_a_file_changes(guarded: Shown, tmp_path: Path) -> None:
    for shown in showing(tmp_path / "data", rich_run(tmp_path / "run"), tokens=False):
        with httpx.Client(base_url=shown.served.url, trust_env=False, timeout=60) as client:
            before = client.get(f"/runs/{shown.id}/component.json?name=L1.head.0").json()
            changed = shown.served.service.run(shown.id) / "scores" / "formats" / "capitals.safetensors"
            score_file("capitals", seed=77).write(changed)
            after = client.get(f"/runs/{shown.id}/component.json?name=L1.head.0").json()
            assert before["tables"][0] != after["tables"][0]
            shutil.rmtree(shown.served.service.run(shown.id) / "recipes")
            rest = client.get(f"/runs/{shown.id}/component.json?name=L1.head.0").json()
            assert "What recipes take" not in [table["caption"] for table in rest["tables"]]
