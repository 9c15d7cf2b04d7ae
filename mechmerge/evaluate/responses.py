"""Answers made elsewhere: JSON Lines with `prompt`, `response` and, if there is one, `key`.

A row belongs to the prompt of its key or, without one, to the prompt of the very same words; `loose` also pairs what is left
over on both sides by likeness of words (difflib's ratio, most alike first, at least `LIKENESS`). Rows that belong to no prompt
are reported; prompts without a row count as failed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mechmerge.artifacts import lock, parse_json, read_text, sha256_file
from mechmerge.errors import SchemaError
from mechmerge.evaluate.answers import Said
from mechmerge.evaluate.assembly import Done, assemble, suite_done, suite_record, write_samples
from mechmerge.evaluate.judging import judge_row, note_errors
from mechmerge.evaluate.record import EvaluateSettings, Evaluation, ResponsesId
from mechmerge.evaluate.run import check_names, samples_file
from mechmerge.evaluate.suites import Suite
from mechmerge.progress import SILENT, Progress

LIKENESS = 0.8
"""Least likeness, 0 … 1, of two wordings of one prompt."""


class Joined(NamedTuple):
    """Rows with the prompts that they belong to."""

    answers: dict[int, str | None]
    """By place of the prompt; None for a row without a response."""
    unmatched: list[int]
    """Line numbers of rows that belong to no prompt."""
    how: Literal["key", "prompt", "loose"]
    alike: list[tuple[int, str]]
    """(line number, id of the prompt) of what was paired by likeness."""


def join(path: Path, suite: Suite, loose: bool) -> Joined:
    """Finds the prompt of every row of a file.

    Raises:
        SchemaError: a row that is no object with a prompt or key, or two rows for one prompt.
    """
    rows = [(i, parse_json(line, f"{path}: line {i}")) for i, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]
    if not rows:
        raise SchemaError(str(path), expected="one answer a line", found="none")
    by_id = {prompt.id: place for place, prompt in enumerate(suite.prompts)}
    by_text: dict[str, int] = {prompt.prompt: place for place, prompt in enumerate(suite.prompts)}
    answers: dict[int, str | None] = {}
    left: list[tuple[int, dict[str, Any]]] = []
    keyed = False
    for line, row in rows:
        if not isinstance(row, dict) or not (isinstance(row.get("prompt"), str) or row.get("key") is not None):
            raise SchemaError(
                f"{path}: line {line}", expected="an object with prompt (or key) and response", found=repr(row)[:60]
            )
        key = None if row.get("key") is None else str(row["key"])
        keyed = keyed or key is not None
        place = by_id.get(key) if key is not None else by_text.get(row["prompt"])
        if place is None:
            left.append((line, row))
            continue
        if place in answers:
            twice = f"a second one to {suite.prompts[place].id}"
            raise SchemaError(f"{path}: line {line}", expected="one answer a prompt", found=twice)
        answers[place] = _response(row)
    alike: list[tuple[int, str]] = []
    if loose and left:
        for line, row, place in _alike(left, [p for p in range(len(suite.prompts)) if p not in answers], suite):
            answers[place] = _response(row)
            alike.append((line, suite.prompts[place].id))
    paired = {line for line, _ in alike}
    unmatched = [line for line, _ in left if line not in paired]
    return Joined(answers, unmatched, "loose" if alike else "key" if keyed else "prompt", alike)


def evaluate_responses(
    files: Mapping[str, Path],
    suite: Suite,
    out: Path,
    settings: EvaluateSettings,
    *,
    loose_join: bool = False,
    against: Sequence[str] = (),
    progress: Progress = SILENT,
) -> Evaluation:
    """Judges answers that were made elsewhere and writes `out`, as `run.evaluate` does for models.

    Args:
        files: by name, a file of answers.
        suite: what was asked.
        out: the evaluation file; samples go beside it.
        settings: of the statistics, and `thinking`.
        loose_join: also pair prompts by likeness.
        against: names that all others are compared with.
        progress: told of every file.

    Raises:
        SchemaError: a file is not in the format.
        InputError: a name that is not plain, or unknown in `against`.
    """
    check_names(list(files), [suite.name], against)
    joined = {name: join(path, suite, loose_join) for name, path in files.items()}
    samples = out.parent / "samples"
    samples.mkdir(parents=True, exist_ok=True)
    models: dict[str, tuple[ResponsesId, dict[str, Done]]] = {}
    with lock(out.with_name(f".{out.name}.lock"), f"evaluation {out}"):
        for name, path in files.items():
            found = joined[name]
            key = sha256_file(path)
            missing = [place for place in range(len(suite.prompts)) if found.answers.get(place) is None]
            _note(name, suite, found, len(missing), progress)
            progress.start(f"{name}: judging {suite.name}", len(suite.prompts))
            rows = []
            for place, prompt in enumerate(suite.prompts):
                text = found.answers.get(place)
                row = judge_row(prompt, Said(text or "", 0, True), suite, settings, key=key)
                rows.append(row if text is not None else row | {"missing": True})
                progress.advance()
            progress.end()
            write_samples(samples_file(samples, name, suite.name), rows)
            note_errors(name, suite, rows, progress)
            size = len(found.answers) + len(found.unmatched)
            what = ResponsesId(name=path.name, sha256=key, rows=size, unmatched=len(found.unmatched), joined=found.how)
            done = suite_done(suite, rows, settings, template="none", key=key, missing=len(missing))
            models[name] = (what, {suite.name: done})
        evaluation = assemble(models, {suite.name: suite_record(suite)}, against, settings)
        evaluation.write(out)
    return evaluation


def _response(row: Mapping[str, Any]) -> str | None:
    value = row.get("response")
    return value if isinstance(value, str) else None


def _alike(
    rows: Sequence[tuple[int, dict[str, Any]]], places: Sequence[int], suite: Suite
) -> list[tuple[int, dict[str, Any], int]]:
    """One-to-one pairs of rows and prompts, the most alike first."""
    scored = []
    for r, (_, row) in enumerate(rows):
        words = str(row.get("prompt", "")).lower().split()
        for place in places:
            matcher = difflib.SequenceMatcher(None, words, suite.prompts[place].prompt.lower().split(), autojunk=False)
            if matcher.quick_ratio() >= LIKENESS and (ratio := matcher.ratio()) >= LIKENESS:
                scored.append((-ratio, r, place))
    taken_rows: set[int] = set()
    taken_places: set[int] = set()
    pairs = []
    for _, r, place in sorted(scored):
        if r not in taken_rows and place not in taken_places:
            taken_rows.add(r)
            taken_places.add(place)
            pairs.append((*rows[r], place))
    return pairs


def _note(name: str, suite: Suite, found: Joined, missing: int, progress: Progress) -> None:
    for line, key in found.alike:
        progress.note(f"{name}: line {line} was paired with prompt {key}, which is worded a little differently")
    if found.unmatched:
        shown = ", ".join(map(str, found.unmatched[:5])) + (" …" if len(found.unmatched) > 5 else "")
        progress.note(f"{name}: {len(found.unmatched)} rows belong to no prompt of {suite.name} (lines {shown})")
    if missing:
        progress.note(f"{name}: {missing} of {len(suite.prompts)} prompts have no answer and count as failed")
