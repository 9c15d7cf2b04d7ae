"""Models of several evaluation files side by side, paired on the prompts that all of them answered.

Only what is comparable is compared: the same suites (by digest) and the same decoding, batch plan included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mechmerge.errors import InputError
from mechmerge.evaluate.assembly import Done, assemble
from mechmerge.evaluate.record import Evaluation, ModelResult

DECODING = ("dtype", "batch", "exact", "backend", "thinking", "device")
"""Settings that answers and verdicts depend on."""


def compare(files: Mapping[str, Evaluation], against: Sequence[str] = ()) -> Evaluation:
    """One evaluation of all models of several files, with every pair tested anew and corrected together.

    Args:
        files: by the name that a model is told from another of its name with.
        against: models that the others are compared with (default: the first).

    Raises:
        InputError: no common suite, a suite that was asked otherwise, other decoding settings, or an unknown name.
    """
    (first_name, first), *rest = files.items()
    for name, other in rest:
        for setting in DECODING:
            here, there = getattr(first.settings, setting), getattr(other.settings, setting)
            if here != there:
                raise InputError(f"{name}: {setting}", expected=f"{here}, as in {first_name}", found=str(there))
    suites = {name: suite for name, suite in first.suites.items() if all(name in other.suites for _, other in rest)}
    if not suites:
        raise InputError("evaluations", expected="a suite that all of them have", found="none")
    for name, other in rest:
        for suite, record in suites.items():
            if other.suites[suite].digest != record.digest:
                raise InputError(f"{name}: suite {suite}", expected=f"the prompts of {first_name}", found="other prompts")
    counts = [model for evaluation in files.values() for model in evaluation.models]
    models: dict[str, tuple[Evaluation, ModelResult]] = {}
    for name, evaluation in files.items():
        for model, result in evaluation.models.items():
            if model in models and models[model][1] == result:
                continue  # the same parent in both files
            models[f"{name}.{model}" if counts.count(model) > 1 and model in models else model] = (evaluation, result)
    for name in against:
        if name not in models:
            raise InputError("--against", expected=f"one of {', '.join(models)}", found=name)
    done = {
        name: (
            result.id,
            {
                s: Done(result.suites[s], {m: evaluation.column(_own(evaluation, result), m) for m in result.suites[s].metrics})
                for s in suites
            },
        )
        for name, (evaluation, result) in models.items()
    }
    return assemble(done, suites, against or tuple(models)[:1], first.settings)


def _own(evaluation: Evaluation, result: ModelResult) -> str:
    return next(name for name, held in evaluation.models.items() if held is result)
