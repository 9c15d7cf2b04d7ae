"""From an answer to its row in the samples file: every instruction judged, in every reading of the suite.

A verifier that cannot run is written down with its answer; the instruction counts as not followed and the row stays in every
denominator. With `thinking: strip` what stands in `<think>…</think>` is no part of the answer that is judged (an opening
tag that is never closed makes all that follows thought, so that such an answer is empty).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from mechmerge.behaviors.verifiers import verify
from mechmerge.errors import MissingError
from mechmerge.evaluate.answers import Said
from mechmerge.evaluate.record import EvaluateSettings
from mechmerge.evaluate.suites import Suite, SuitePrompt
from mechmerge.progress import Progress

_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)


def spoken(answer: str, thinking: str) -> str:
    """The part of an answer that is judged; `thinking` is `keep` or `strip`."""
    return answer if thinking == "keep" else _THOUGHT.sub("", answer).strip()


def judge_row(prompt: SuitePrompt, said: Said, suite: Suite, settings: EvaluateSettings, *, key: str) -> dict[str, Any]:
    """One line of a samples file.

    Args:
        prompt: what was asked.
        said: what was answered.
        suite: says which readings are made.
        settings: say what becomes of thoughts.
        key: key of the answers: a samples file says of itself which model, prompts and decoding it holds.

    Returns:
        `passed` is the strict verdict on all instructions; `strict` (and `loose`) hold one verdict an instruction; `error`
        is there where a verifier failed to run.

    Raises:
        MissingError: a verifier needs something that is not on this machine.
    """
    text = spoken(said.text, settings.thinking)
    verdicts: dict[str, list[bool]] = {reading: [] for reading in suite.readings}
    problem = None
    for instruction in prompt.instructions:
        for reading in suite.readings:
            try:
                followed = verify(instruction.verifier, prompt.prompt, text, instruction.arguments, loose=reading == "loose")
            except MissingError:
                raise
            except Exception as error:  # whatever a checker stumbles over is shown with its answer
                followed = False
                problem = problem or " ".join(f"{instruction.verifier.name}: {type(error).__name__}: {error}".split())[:300]
            verdicts[reading].append(followed)
    row = {
        "id": prompt.id,
        "group": prompt.group,
        "tier": prompt.tier,
        "topic": prompt.topic,
        "prompt": prompt.prompt,
        "answer": said.text,
        "passed": all(verdicts["strict"]),
        "instructions": [instruction.verifier.name for instruction in prompt.instructions],
        **verdicts,
        "tokens": said.tokens,
        "finished": said.finished,
        "answers": key,
    }
    return row if problem is None else row | {"error": problem}


def note_errors(name: str, suite: Suite, rows: Sequence[dict[str, Any]], progress: Progress) -> None:
    """Says how many answers could not be judged, and shows the first."""
    failed = [row for row in rows if "error" in row]
    if failed:
        progress.note(
            f"{name}: {suite.name}: {len(failed)} of {len(rows)} answers could not be judged and count as not passed; "
            f"first {failed[0]['id']}: {failed[0]['error']}"
        )
