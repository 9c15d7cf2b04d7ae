"""The gate of every merge of a run, and publishing one that it accepts.

The verdicts are those that publishing asks for again, on the sha256 of the very weights (publish/source.py): the button is
there to be pressed only where they pass, and pressing it is no way around them.
"""

from __future__ import annotations

import functools
import secrets
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from fastapi import Query, Request, Response
from fastapi.responses import RedirectResponse

from mechmerge.artifacts import parse_document, read_document
from mechmerge.errors import GateRefused, MechmergeError
from mechmerge.evaluate.gate import Gate, GateResult, check_gate
from mechmerge.evaluate.record import Evaluation
from mechmerge.publish.source import gate_of_run
from mechmerge.service.access import Publisher, Reader, The
from mechmerge.service.api import jobs
from mechmerge.service.api.jobs import Id, view
from mechmerge.service.pages.jobs import heading
from mechmerge.service.pages.reading import results_of
from mechmerge.service.pages.render import render
from mechmerge.service.pages.route import Form, field, page_router
from mechmerge.service.pages.rows import row_of
from mechmerge.service.problems import KeyTakenError, Problem, ServiceError, problem_of, status_of
from mechmerge.service.service import Service
from mechmerge.service.tokens import Identity

router = page_router()
EMPTY: dict[str, Any] = {
    "repo": "", "mode": "main", "branch": "", "tag": "", "license": "", "key": "", "private": False, "dry_run": False,
}  # fmt: skip
"""What the form begins with."""


class Verdict(NamedTuple):
    """What the gate says of one merge."""

    model: str
    result: GateResult | None
    problem: str
    """Why it refuses without a rule that failed; empty where the rules decided."""

    @property
    def passed(self) -> bool:
        """Whether it may be published."""
        return not self.problem and self.result is not None and self.result.passed


def verdicts(service: Service, id: str) -> list[Verdict]:
    """The gate's verdict on every merge of a run, that of the published one first.

    Raises:
        ServiceError: nothing was evaluated yet (404).
    """
    results = results_of(service, id)
    path = results.files.evaluation
    if path is None:
        raise ServiceError(404, f"gate of run {id}", expected="an evaluation", found="none yet", fix="wait for it")
    run = service.run(id)
    rules = gate_of_run(run)
    published = results.files.publish
    names = sorted(results.run.recipes, key=lambda name: name != published)
    stamp = path.stat()
    said = "" if rules is None else rules.model_dump_json()
    return [_verdict(path, stamp.st_mtime_ns, said, name) for name in names]


@functools.lru_cache(maxsize=64)
def _verdict(path: Path, modified: int, rules: str, name: str) -> Verdict:
    """Intervals are drawn again and again: kept for as long as evaluation and rules stay the same."""
    if not rules:
        return Verdict(name, None, "the run has no gate")
    record = read_document(Evaluation, path)
    if name not in record.models:
        return Verdict(name, None, "it was not evaluated")
    result = check_gate(record, Gate.model_validate_json(rules), name)
    about = any(rule.model == name for rule in result.rules)
    return Verdict(name, result, "" if about else f"no rule is about {name}")


@router.get("/runs/{id}/gate")
def gate(
    request: Request, id: Id, identity: Reader, service: The, model: Annotated[str | None, Query(max_length=200)] = None
) -> Response:
    """What the gate says, rule by rule, and the form that publishes."""
    return _page(request, id, identity, service, model, {})


def _page(
    request: Request,
    id: str,
    identity: Identity,
    service: Service,
    model: str | None,
    given: dict[str, Any],
    problem: Problem | None = None,
    status: int = 200,
) -> Response:
    found = verdicts(service, id)
    chosen = _chosen(found, model)
    why = []
    if not chosen.passed:
        why.append(f"The gate refuses {chosen.model}.")
    if not identity.may("publish"):
        why.append(f"Publishing needs the role publish; yours is {identity.role}.")
    if service.store.job(id).state != "done":
        why.append("The run is not done.")
    if not service.settings.publish_to:
        why.append("This server publishes to no namespace (mechmerge serve --publish-to OWNER).")
    publications = [row_of(view(service, one)) for one in service.store.jobs(parent=id)[0]]
    return render(
        request,
        "gate.html",
        identity,
        status=status,
        **heading(service, id, "gate"),
        verdicts=found,
        chosen=chosen,
        why=why,
        owners=service.settings.publish_to,
        key=given.get("key") or secrets.token_hex(16),
        given=EMPTY | given,
        publications=publications,
        problem=problem,
    )


def _chosen(found: list[Verdict], model: str | None) -> Verdict:
    names = [verdict.model for verdict in found]
    if not names:
        raise ServiceError(404, "merges of the run", expected="one", found="none")
    if model is not None and model not in names:
        raise ServiceError(404, f"model {model[:100]!r}", expected=f"one of {', '.join(names)}", found="none of this name")
    return found[0 if model is None else names.index(model)]


@router.post("/runs/{id}/publish")
def publish(request: Request, response: Response, id: Id, identity: Publisher, service: The, form: Form) -> Response:
    """Publishes a merge that the gate accepts: a job of its own, which asks the gate again."""
    given = {name: field(form, name).strip() for name in ("repo", "model", "mode", "branch", "tag", "license", "key")}
    wanted: dict[str, Any] = {name: value for name, value in given.items() if value}
    wanted |= {name: field(form, name) == "yes" for name in ("private", "dry_run")}
    try:
        verdict = _chosen(verdicts(service, id), given["model"] or None)
        if not verdict.passed:
            failed = "; ".join(rule.line for rule in verdict.result.failed) if verdict.result else ""
            raise GateRefused(
                f"gate of {verdict.model}", expected="every rule to pass", found=verdict.problem or failed,
                fix="nothing was published",
            )  # fmt: skip
        job = jobs.publish(id, parse_document(jobs.Publication, wanted, "form"), identity, service, response)
    except MechmergeError as error:
        if status_of(error) == 404:
            raise
        if isinstance(error, KeyTakenError):
            del given["key"], wanted["key"]  # what was changed in the form is a request of its own
        return _page(
            request, id, identity, service, given["model"] or None, given | wanted, problem_of(error), status_of(error)
        )
    return RedirectResponse(f"/runs/{job.id}", status_code=303)
