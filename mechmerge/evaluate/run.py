"""The evaluation itself: every model answers every suite, verifiers judge, statistics compare.

evaluation.json                    the result          samples/MODEL.SUITE.jsonl   every prompt, answer and verdict
samples/.answers/                  kept answers        timings.jsonl               how long it took
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from mechmerge.artifacts import lock, write_text
from mechmerge.behaviors.verifiers import verify
from mechmerge.errors import InputError, MissingError
from mechmerge.evaluate.answers import Said, Speaker, SuiteAnswers
from mechmerge.evaluate.record import EvaluateSettings, Evaluation, ModelResult, PairTest, SuiteRecord, SuiteResult
from mechmerge.evaluate.scoring import Verdicts, pair_tests, score
from mechmerge.evaluate.suites import Suite, SuitePrompt
from mechmerge.models.references import Model
from mechmerge.progress import SILENT, Progress
from mechmerge.versions import versions

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
JUDGES = ("lm_eval", "langdetect", "scipy")
"""Packages that verdicts and statistics depend on."""


def evaluate(
    models: Mapping[str, Model],
    suites: Sequence[Suite],
    out: Path,
    settings: EvaluateSettings,
    progress: Progress = SILENT,
    *,
    against: Sequence[str] = (),
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

    Raises:
        InputError: no model, a name that is not plain, an unknown name in `against`, two suites of one name, an unknown
            device, or another process at work on `out`.
        MissingError: a verifier needs something that is not on this machine.
    """
    _check(models, suites, against, settings)
    samples = out.parent / "samples"
    samples.mkdir(parents=True, exist_ok=True)
    results: dict[str, ModelResult] = {}
    verdicts: dict[str, dict[str, list[bool]]] = {}
    with lock(out.with_name(f".{out.name}.lock"), f"evaluation {out}"):
        for name, model in models.items():
            speaker = Speaker(name, model, samples, settings, progress)
            done, verdicts[name] = {}, {}
            for suite in suites:
                said = speaker.answers(suite)
                rows = [_judge(prompt, answer) for prompt, answer in zip(suite.prompts, said.answers, strict=True)]
                write_text(
                    samples / f"{name}.{suite.name}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
                )
                verdicts[name][suite.name] = [row["passed"] for row in rows]
                done[suite.name] = _result(suite, rows, said, settings)
                _note_errors(name, suite, rows, progress)
            speaker.close()
            results[name] = ModelResult(id=model.id, suites=done)
        evaluation = Evaluation(
            suites={suite.name: _record(suite) for suite in suites},
            models=results,
            against=tuple(against),
            pairs=_pairs(verdicts, suites, against, settings),
            settings=settings,
            versions=versions() | {package: metadata.version(package) for package in JUDGES},
        )
        evaluation.write(out)
    return evaluation


def _check(models: Mapping[str, Model], suites: Sequence[Suite], against: Sequence[str], settings: EvaluateSettings) -> None:
    if not models or not suites:
        raise InputError("evaluation", expected="at least one model and one suite", found=f"{len(models)} and {len(suites)}")
    for name in models:
        if not NAME.fullmatch(name):
            raise InputError(f"model name {name!r}", expected="letters, digits, _ . -", found="others")
    for name in against:
        if name not in models:
            raise InputError("against", expected=f"one of {', '.join(models)}", found=name)
    names = [suite.name for suite in suites]
    for name in names:
        if names.count(name) > 1:
            raise InputError("suites", expected="each name once", found=f"{name} twice")
    import torch

    try:
        torch.empty(0, device=settings.device)
    except (RuntimeError, AssertionError) as error:
        raise InputError("device", expected="a torch device of this machine", found=f"{settings.device} ({error})") from None


# ---------------------------------------------------------------------------------------------------------------- judging
def _judge(prompt: SuitePrompt, said: Said) -> dict[str, Any]:
    """The row of one answer. A verifier that cannot run is written down and counts as not passed."""
    row = {
        "id": prompt.id,
        "group": prompt.group,
        "tier": prompt.tier,
        "topic": prompt.topic,
        "prompt": prompt.prompt,
        "answer": said.text,
        "passed": False,
        "tokens": said.tokens,
        "finished": said.finished,
    }
    try:
        row["passed"] = verify(prompt.verifier, prompt.prompt, said.text, prompt.arguments)
    except MissingError:
        raise
    except Exception as error:  # whatever a checker stumbles over is shown with its answer
        row["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return row


def _note_errors(name: str, suite: Suite, rows: Sequence[dict[str, Any]], progress: Progress) -> None:
    failed = [row for row in rows if "error" in row]
    if failed:
        progress.note(
            f"{name}: {suite.name}: {len(failed)} of {len(rows)} answers could not be judged and count as not passed; "
            f"first {failed[0]['id']}: {failed[0]['error']}"
        )


def _result(suite: Suite, rows: Sequence[dict[str, Any]], said: SuiteAnswers, settings: EvaluateSettings) -> SuiteResult:
    return SuiteResult(
        metrics=score(Verdicts(suite, [row["passed"] for row in rows]), settings),
        errors=sum("error" in row for row in rows),
        tokens=sum(answer.tokens for answer in said.answers),
        unfinished=sum(not answer.finished for answer in said.answers),
        template=said.template,
        answers=said.key,
    )


def _record(suite: Suite) -> SuiteRecord:
    return SuiteRecord(
        digest=suite.digest,
        split=suite.split,
        prompts=len(suite.prompts),
        answer_tokens=suite.answer_tokens,
        chat_template=suite.chat_template,
        groups=suite.groups,
        limited=suite.limited,
    )


def _pairs(
    verdicts: Mapping[str, Mapping[str, list[bool]]],
    suites: Sequence[Suite],
    against: Sequence[str],
    settings: EvaluateSettings,
) -> tuple[PairTest, ...]:
    """Every model against each reference; of two references only the later against the earlier."""
    wanted = [
        (model, other)
        for model in verdicts
        for other in against
        if model != other and not (model in against and against.index(model) < against.index(other))
    ]
    by_suite = {name: {s.name: Verdicts(s, judged[s.name]) for s in suites} for name, judged in verdicts.items()}
    return pair_tests(wanted, by_suite, settings)
