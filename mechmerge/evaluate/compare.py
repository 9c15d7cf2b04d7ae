"""Models of several evaluation files side by side, paired on the prompts that all of them answered.

Only what is comparable is compared: the same suites (by digest), the same decoding, batch plan included. Suites that are
left out, and versions that differ, are said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mechmerge.errors import InputError
from mechmerge.evaluate.assembly import JUDGES, Done, assemble
from mechmerge.evaluate.record import Evaluation, ModelResult, ResponsesId, SuiteRecord
from mechmerge.progress import SILENT, Progress

DECODING = ("dtype", "batch", "exact", "backend", "device")
"""Settings that answers depend on."""
JUDGING = ("thinking",)
"""Settings that verdicts depend on."""


def compare(files: Mapping[str, Evaluation], against: Sequence[str] = (), progress: Progress = SILENT) -> Evaluation:
    """One evaluation of all models of several files, with every pair tested anew and corrected together.

    A model that several files hold alike (the same parent) stands once; another model of a name that is taken is FILE.MODEL.

    Args:
        files: by the name that a model is told from another of its name with.
        against: models that the others are compared with (default: every pair).
        progress: told of suites that not all files have, and of versions that differ.

    Raises:
        InputError: no common suite, a suite that was asked otherwise, other decoding settings, fewer than two models, or an
            unknown or taken name.
    """
    _check_settings(files)
    suites = _suites(files, progress)
    _note_versions(files, progress)
    models: dict[str, tuple[Evaluation, str]] = {}
    for name, evaluation in files.items():
        for model, result in evaluation.models.items():
            if model in models and _same(_result(models[model]), result, suites):
                continue
            shown = f"{name}.{model}" if model in models else model
            if shown in models:
                raise InputError(f"{name}: model {model}", expected="a name that is free", found=f"{shown} in an earlier file")
            models[shown] = (evaluation, model)
    if len(models) < 2:
        raise InputError("evaluations", expected="at least two models", found=", ".join(models))
    for name in against:
        if name not in models:
            raise InputError("--against", expected=f"one of {', '.join(models)}", found=name)
    done = {}
    for shown, (evaluation, model) in models.items():
        held = {name: evaluation.models[model].suites[name] for name in suites}
        columns = {name: {flat: evaluation.column(model, flat) for flat in one.metrics} for name, one in held.items()}
        done[shown] = (evaluation.models[model].id, {name: Done(one, columns[name]) for name, one in held.items()})
    first = next(iter(files.values()))
    return assemble(done, suites, tuple(against) or tuple(models), first.settings)


def _result(found: tuple[Evaluation, str]) -> ModelResult:
    return found[0].models[found[1]]


def _same(one: ModelResult, other: ModelResult, suites: Mapping[str, SuiteRecord]) -> bool:
    """Whether two files hold the same weights (or answers) with the same outcomes; suites that are left out do not count."""
    return one.id == other.id and all(one.suites[name].outcomes == other.suites[name].outcomes for name in suites)


def _check_settings(files: Mapping[str, Evaluation]) -> None:
    # Answers made elsewhere were not decoded here.
    generated = {
        name: evaluation
        for name, evaluation in files.items()
        if not all(isinstance(model.id, ResponsesId) for model in evaluation.models.values())
    }
    for settings, held in ((DECODING, generated), (JUDGING, files)):
        for setting in settings:
            found = {name: getattr(evaluation.settings, setting) for name, evaluation in held.items()}
            for name, value in found.items():
                first, wanted = next(iter(found.items()))
                if value != wanted:
                    raise InputError(
                        f"{name}: {setting}",
                        expected=f"{wanted}, as in {first}",
                        found=str(value),
                        fix="evaluate the models alike",
                    )


def _suites(files: Mapping[str, Evaluation], progress: Progress) -> dict[str, SuiteRecord]:
    (first_name, first), *rest = files.items()
    suites = {name: suite for name, suite in first.suites.items() if all(name in other.suites for _, other in rest)}
    if not suites:
        raise InputError("evaluations", expected="a suite that all of them have", found="none")
    differ = [
        f"{suite} ({first_name} and {name})"
        for name, other in rest
        for suite, record in suites.items()
        if other.suites[suite].digest != record.digest
    ]
    if differ:
        raise InputError("suites", expected="the same prompts in every file", found=f"others in {', '.join(differ)}")
    for name, evaluation in files.items():
        left = [suite for suite in evaluation.suites if suite not in suites]
        if left:
            progress.note(f"{name}: {', '.join(left)} left out: not every file has it")
    return suites


def _note_versions(files: Mapping[str, Evaluation], progress: Progress) -> None:
    for package in ("torch", "transformers", *JUDGES):
        found = {name: evaluation.versions.get(package, "none") for name, evaluation in files.items()}
        if len(set(found.values())) > 1:
            said = ", ".join(f"{version} in {name}" for name, version in found.items())
            progress.note(f"answers and verdicts may differ by version: {package} {said}")
