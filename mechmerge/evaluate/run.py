"""The evaluation itself: every model answers every suite, verifiers judge, statistics compare.

evaluation.json                       the result          timings.jsonl           how long it took
samples/MODEL.SUITE.jsonl             every prompt, answer and verdict, in the order of the suite
samples/MODEL.SUITE.partial.jsonl     the same while it grows, batch by batch
samples/.answers/                     kept answers: a call that was killed goes on at the batch where it stopped
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mechmerge.artifacts import lock
from mechmerge.errors import InputError
from mechmerge.evaluate.answers import Said, Speaker
from mechmerge.evaluate.assembly import Done, assemble, packed, suite_done, suite_record, units_of, write_samples
from mechmerge.evaluate.judging import judge_row, note_errors
from mechmerge.evaluate.record import NAME, EvaluateSettings, Evaluation, SuiteRecord, SuiteResult
from mechmerge.evaluate.scoring import metric
from mechmerge.evaluate.suites import TASK, Suite
from mechmerge.models.references import Model
from mechmerge.progress import SILENT, Progress


def evaluate(
    models: Mapping[str, Model],
    suites: Sequence[Suite],
    out: Path,
    settings: EvaluateSettings,
    progress: Progress = SILENT,
    *,
    against: Sequence[str] = (),
    overwrite: bool = False,
    tasks: Sequence[str] = (),
    limit: int | None = None,
) -> Evaluation:
    """Evaluates models and writes `out`, with every answer under `samples/` beside it.

    A call that was killed goes on at the batch where it stopped; answers that are there already are not made again.

    Args:
        models: resolved models by name.
        suites: what is asked; names differ.
        out: the evaluation file.
        settings: decoding and statistics.
        progress: told of every prompt.
        against: names of models that all others are compared with (parents, references).
        overwrite: whether samples of another model or of other settings, left by an earlier call, may be replaced.
        tasks: tasks of lm-eval, by name.
        limit: at most this many documents of each task.

    Raises:
        InputError: no model, a name that is not plain, an unknown name in `against`, two suites of one name, an unknown
            device, samples of another model or other settings in the place of these, or another process at work on `out`.
        MissingError: a verifier needs something that is not on this machine.
    """
    check_names(list(models), [*(suite.name for suite in suites), *map(task_name, tasks)], against)
    _check_device(settings.device)
    samples = out.parent / "samples"
    samples.mkdir(parents=True, exist_ok=True)
    done: dict[str, dict[str, Done]] = {}
    records = {suite.name: suite_record(suite) for suite in suites}
    with lock(out.with_name(f".{out.name}.lock"), f"evaluation {out}"):
        if not overwrite:
            for name, model in models.items():
                speaker = Speaker(name, model, samples, settings, progress)
                for suite in suites:
                    check_samples(samples_file(samples, name, suite.name), speaker.key(suite))
        for name, model in models.items():
            speaker = Speaker(name, model, samples, settings, progress)
            done[name] = {suite.name: _one(name, speaker, suite, samples, settings, progress) for suite in suites}
            if tasks:
                found = _tasks(speaker, tasks, limit, samples, overwrite)
                done[name] |= {task: one for task, (one, _) in found.items()}
                records |= {task: record for task, (_, record) in found.items()}
            speaker.close()
        evaluation = assemble(
            {name: (model.id, done[name]) for name, model in models.items()},
            records,
            against,
            settings,
        )
        evaluation.write(out)
    return evaluation


def samples_file(samples: Path, model: str, suite: str) -> Path:
    """Where the rows of a model and a suite stand."""
    return samples / f"{model}.{suite}.jsonl"


def task_name(task: str) -> str:
    """The name that a task of lm-eval has as a suite."""
    return task.removeprefix(TASK)


def _tasks(
    speaker: Speaker, tasks: Sequence[str], limit: int | None, samples: Path, overwrite: bool
) -> dict[str, tuple[Done, SuiteRecord]]:
    """What a model does in tasks of lm-eval, with the weights that answered its suites."""
    from mechmerge.evaluate.harness import run_tasks

    settings, progress = speaker.settings, speaker.progress
    found: dict[str, tuple[Done, SuiteRecord]] = {}
    outcomes = run_tasks(tasks, speaker.model, settings, samples, limit=limit, loaded=speaker.weights, progress=progress)
    for task, outcome in outcomes.items():
        path = samples_file(samples, speaker.name, task)
        if not overwrite:
            check_samples(path, outcome.key)
        write_samples(path, [row | {"answers": outcome.key} for row in outcome.samples])
        for note in outcome.notes:
            progress.note(f"note: {task}: {note}")
        record = SuiteRecord(
            digest=outcome.digest, split="lm-eval", prompts=outcome.n, chat_template="none", groups=outcome.tasks,
            units={flat: units_of(column) for flat, column in outcome.columns.items()}, limited=limit is not None,
        )  # fmt: skip
        result = SuiteResult(
            metrics={flat: metric(column, settings) for flat, column in outcome.columns.items()},
            outcomes={flat: packed(column) for flat, column in outcome.columns.items()},
            errors=0, tokens=0, unfinished=0, template="none", answers=outcome.key,
        )  # fmt: skip
        found[task] = Done(result, outcome.columns), record
    return found


def check_samples(path: Path, key: str) -> None:
    """A samples file that is there already holds the answers of this very model, suite and decoding.

    Raises:
        InputError: it holds others.
    """
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as handle:
        first = handle.readline()
    try:
        found = str(json.loads(first)["answers"])
    except (ValueError, KeyError, TypeError, RecursionError):
        found = "no key"
    if found != key:
        raise InputError(
            str(path),
            expected="samples of this model and these settings",
            found=f"those of another model, suite or decoding ({found[:12]}…)",
            fix="choose another --out, or pass --overwrite",
        )


def _one(name: str, speaker: Speaker, suite: Suite, samples: Path, settings: EvaluateSettings, progress: Progress) -> Done:
    """A model's rows in one suite, judged batch by batch as they are made."""
    path = samples_file(samples, name, suite.name)
    partial = path.with_suffix(".partial.jsonl")
    key = speaker.key(suite)
    rows: dict[int, dict[str, Any]] = {}
    with partial.open("w", encoding="utf-8") as handle:

        def told(places: Sequence[int], answers: Sequence[Said]) -> None:
            for place, said in zip(places, answers, strict=True):
                rows[place] = judge_row(suite.prompts[place], said, suite, settings, key=key)
                handle.write(json.dumps(rows[place], ensure_ascii=False) + "\n")
            handle.flush()

        try:
            said = speaker.answers(suite, told)
        except BaseException:
            if not rows:  # nothing that anyone could look at
                partial.unlink()
            raise
    ordered = [rows[place] for place in range(len(suite.prompts))]
    speaker.check()
    write_samples(path, ordered)
    partial.unlink()
    note_errors(name, suite, ordered, progress)
    return suite_done(suite, ordered, settings, template=said.template, key=said.key)


def check_names(models: Sequence[str], suites: Sequence[str], against: Sequence[str]) -> None:
    """Names of models and suites are there, plain, and known.

    Raises:
        InputError: none of either, a name that is not plain, an unknown name in `against`, or two suites of one name.
    """
    if not models or not suites:
        raise InputError("evaluation", expected="at least one model and one suite", found=f"{len(models)} and {len(suites)}")
    for name in models:
        if not re.fullmatch(NAME, name):
            raise InputError(f"model name {name!r}", expected="letters, digits, _ . -", found="others")
    for name in against:
        if name not in models:
            raise InputError("against", expected=f"one of {', '.join(models)}", found=name)
    for name in suites:
        if suites.count(name) > 1:
            raise InputError("suites", expected="each name once", found=f"{name} twice")


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError("device", expected="a torch device of this machine", found=f"{device} ({error})") from None
