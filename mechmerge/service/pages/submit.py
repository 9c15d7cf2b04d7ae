"""Starting a run: a pipeline file, the files that it names, or those of an earlier run with another recipe."""

from __future__ import annotations

import secrets
from typing import Annotated, Any

from fastapi import Query, Request, Response
from fastapi.responses import RedirectResponse
from starlette.datastructures import FormData, UploadFile

from mechmerge.artifacts import parse_document, parse_yaml, read_text, to_yaml
from mechmerge.errors import InputError, MechmergeError
from mechmerge.pipeline.schema import Pipeline, RecipePlan
from mechmerge.service.access import Runner, The
from mechmerge.service.admission import PIPELINE, sent_files
from mechmerge.service.api import jobs
from mechmerge.service.pages.builder import BUILT, Asked, Wanted
from mechmerge.service.pages.render import render
from mechmerge.service.pages.route import Form, field, page_router
from mechmerge.service.problems import KeyTakenError, Problem, ServiceError, problem_of, status_of
from mechmerge.service.service import Service
from mechmerge.service.tokens import Identity

router = page_router()
EMPTY = """schema_version: 1
title: two experts
base: owner/base-model
experts:
  first: owner/first-expert
  second: owner/second-expert
behaviors:
  formats: {expert: first}
  arithmetic: {expert: second}
recipes:
  conflict: {policy: conflict}
  control: {policy: random, like: conflict}
publish: conflict
evaluate:
  suites: [formats, arithmetic]
gate:
  rules:
  - {metric: formats, at_least: {model: base, plus: 0.1}}
"""
"""What the form begins with: a pipeline whose models are to be named."""


@router.get("/new")
def new(
    request: Request,
    identity: Runner,
    service: The,
    asked: Wanted,
    source: Annotated[str | None, Query(alias="from", pattern="^[0-9a-f]{16}$")] = None,
) -> Response:
    """The form, empty or with the pipeline of an earlier run."""
    text = EMPTY
    if source is not None:
        text = read_text(_input(service, source) / PIPELINE)
        if asked.policy:
            text = with_recipe(text, asked)
    return _form(request, identity, service, text, source)


def with_recipe(text: str, asked: Asked) -> str:
    """A pipeline with the recipe that was built as the one that it publishes."""
    pipeline = parse_document(Pipeline, parse_yaml(text, "pipeline"), "pipeline")
    plan = parse_document(RecipePlan, asked.plan(), "recipe")
    recipes = {name: other for name, other in pipeline.recipes.items() if name != BUILT} | {BUILT: plan}
    gate = pipeline.gate.model_copy(update={"model": BUILT if pipeline.gate.model else None})
    return to_yaml(pipeline.model_copy(update={"recipes": recipes, "publish": BUILT, "gate": gate}))


def _input(service: Service, id: str) -> Any:
    job = service.store.job(id)
    return service.folder(job.parent or id) / "input"


def _form(
    request: Request,
    identity: Identity,
    service: Service,
    text: str,
    source: str | None,
    *,
    key: str | None = None,
    priority: int = jobs.NORMAL,
    problem: Problem | None = None,
    status: int = 200,
) -> Response:
    return render(
        request,
        "new.html",
        identity,
        status=status,
        text=text,
        source=source,
        files=sent_files(_input(service, source)) if source else [],
        # Sent twice, the form makes one job.
        key=key or secrets.token_hex(16),
        priority=priority,
        most=9 if identity.may("admin") else jobs.NORMAL,
        problem=problem,
        folders=[str(folder) for folder in service.settings.folders],
        namespaces=service.settings.namespaces,
    )


@router.post("/new")
def submit(request: Request, response: Response, identity: Runner, service: The, form: Form) -> Response:
    """Queues a run; where something is wrong the form comes back with it."""
    text, source = field(form, "pipeline").replace("\r\n", "\n"), field(form, "from") or None
    key, priority = field(form, "key") or None, field(form, "priority", str(jobs.NORMAL))
    number = int(priority) if priority.isdecimal() and len(priority) < 3 else -1
    try:
        files = _copied(service, source) | _uploaded(form)
        wanted = {"pipeline": text, "files": files, "priority": number, "key": key}
        job = jobs.submit(parse_document(jobs.Submission, wanted, "form"), identity, service, response)
    except MechmergeError as error:
        if isinstance(error, ServiceError) and error.status == 404:
            raise
        return _form(
            request,
            identity,
            service,
            text,
            source,
            key=None if isinstance(error, KeyTakenError) else key,  # what was changed in the form is a request of its own
            priority=number,
            problem=problem_of(error),
            status=status_of(error),
        )
    return RedirectResponse(f"/runs/{job.id}", status_code=303)


def _copied(service: Service, source: str | None) -> dict[str, str]:
    if source is None:
        return {}
    if len(source) != 16 or not source.isalnum():
        raise ServiceError(404, "from", expected="a job of this server", found="none")
    folder = _input(service, source)
    return {name: read_text(folder / name) for name in sent_files(folder)}


def _uploaded(form: FormData) -> dict[str, str]:
    """Files by name. A browser sends an empty one where none was chosen."""
    found = {}
    for upload in form.getlist("files"):
        if isinstance(upload, UploadFile) and upload.filename:
            try:
                found[upload.filename] = upload.file.read().decode("utf-8")
            except UnicodeDecodeError:
                raise InputError(f"file {upload.filename[:100]!r}", expected="text in UTF-8", found="something else") from None
    return found
