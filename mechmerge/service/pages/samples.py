"""Answers of two models side by side, each with its verdict, prompt by prompt."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from fastapi import Query, Request, Response

from mechmerge.report.pack import digits
from mechmerge.service.access import Reader, The
from mechmerge.service.api.jobs import Id
from mechmerge.service.pages.jobs import heading
from mechmerge.service.pages.reading import results_of
from mechmerge.service.pages.render import render
from mechmerge.service.pages.route import page_router
from mechmerge.service.problems import ServiceError

router = page_router()
PAGE = 20
"""Prompts on one page."""
LONGEST = 20_000
"""Characters of an answer that are shown."""
Show = Literal["all", "differ", "lost", "won", "failed"]
SHOWS: dict[str, str] = {
    "all": "all prompts",
    "differ": "verdicts that differ",
    "lost": "only the second passes",
    "won": "only the first passes",
    "failed": "both fail",
}


class Answer(NamedTuple):
    """What one model answered."""

    text: str
    passed: bool | None
    """None where the task has no verdict for a single answer."""
    instructions: list[tuple[str, bool]]
    """Each instruction with whether it was followed."""
    notes: list[str]
    """Length, whether it was cut off, and what kept a verifier from running."""


class Pair(NamedTuple):
    """A prompt with both answers; one is missing where a file holds none."""

    id: str
    group: str
    prompt: str
    answers: tuple[Answer | None, Answer | None]


@router.get("/runs/{id}/samples")
def samples(
    request: Request,
    id: Id,
    identity: Reader,
    service: The,
    suite: Annotated[str | None, Query(max_length=200)] = None,
    first: Annotated[str | None, Query(max_length=200)] = None,
    second: Annotated[str | None, Query(max_length=200)] = None,
    show: Annotated[Show, Query()] = "all",
    start: Annotated[int, Query(ge=0, le=10**6)] = 0,
) -> Response:
    """Answers side by side."""
    results = results_of(service, id)
    record = results.run.evaluation
    if record is None:
        raise ServiceError(404, f"samples of run {id}", expected="an evaluation", found="none yet", fix="wait for it")
    names, suites = list(record.models), list(record.suites)
    first = first or (results.files.publish if results.files.publish in names else names[-1])
    second = second or next((name for name in names if name != first), first)
    suite = suite or suites[0]
    for value, known, what in ((first, names, "model"), (second, names, "model"), (suite, suites, "suite")):
        if value not in known:
            raise ServiceError(404, f"{what} {value[:100]!r}", expected=f"one of {', '.join(known)}", found="none of this name")
    folder = service.run(id) / "samples"
    found = [pair for pair in pairs(folder, suite, first, second) if _is_shown(pair, show)]
    return render(
        request,
        "samples.html",
        identity,
        **heading(service, id, "samples"),
        names=names,
        suites=suites,
        shows=SHOWS,
        suite=suite,
        first=first,
        second=second,
        show=show,
        count=len(found),
        start=start,
        page=PAGE,
        pairs=found[start : start + PAGE],
    )


def pairs(folder: Path, suite: str, first: str, second: str) -> Iterator[Pair]:
    """The prompts of a suite with the answers of two models, in the suite's order."""
    files = [folder / f"{model}.{suite}.jsonl" for model in (first, second)]
    rows = [{str(row.get("id", number)): row for number, row in enumerate(_rows(path))} for path in files]
    for key in dict.fromkeys([*rows[0], *rows[1]]):
        held = [one.get(key) for one in rows]
        known: dict[str, Any] = held[0] or held[1] or {}
        yield Pair(
            key,
            str(known.get("group", known.get("task", ""))),
            str(known.get("prompt", "")),
            (_answer(held[0]), _answer(held[1])),
        )


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        with path.open(encoding="utf-8") as handle:
            for line in handle:
                yield json.loads(line)


def _answer(row: dict[str, Any] | None) -> Answer | None:
    if row is None:
        return None
    value = row.get("answer", "")
    text = value if isinstance(value, str) else json.dumps(value)
    notes = [f"{name} {digits(float(number))}" for name, number in row.get("metrics", {}).items()]
    if row.get("tokens") is not None:
        notes.append(f"{row['tokens']} tokens" + ("" if row.get("finished", True) else ", cut off"))
    if not text.strip():
        notes.append("nothing but white space" if text else "empty")
    if "target" in row:
        notes.append(f"expected {row['target']}")
    if "error" in row:
        notes.append(f"could not be judged: {row['error']}")
    if len(text) > LONGEST:
        text, notes = text[:LONGEST], [*notes, f"shown up to {LONGEST} characters"]
    strict = row.get("strict", [])
    instructions = [(str(name), bool(followed)) for name, followed in zip(row.get("instructions", []), strict, strict=False)]
    passed = row.get("passed")
    return Answer(text, None if passed is None else bool(passed), instructions, notes)


def _is_shown(pair: Pair, show: str) -> bool:
    one, other = (answer is not None and answer.passed is True for answer in pair.answers)
    return {
        "all": True,
        "differ": one != other,
        "lost": other and not one,
        "won": one and not other,
        "failed": not one and not other,
    }[show]
