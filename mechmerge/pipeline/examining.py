"""Merges asked the development prompts, chunk by chunk, without a checkpoint on disk: one evaluation of a search.

A chunk holds a fair part of every suite, so that a merge can be given up before all prompts are asked. Answers are kept by what
they depend on (evaluate/answers.py): what was asked once is not asked again, and a search that was killed goes on
at the batch where it stopped. The test split is out of reach here: a suite that is not for development is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mechmerge.artifacts import digest
from mechmerge.errors import InputError
from mechmerge.evaluate.answers import Speaker
from mechmerge.evaluate.assembly import Done, assemble, suite_done, suite_record
from mechmerge.evaluate.gate import Gate
from mechmerge.evaluate.judging import judge_row, note_errors
from mechmerge.evaluate.record import EvaluateSettings
from mechmerge.evaluate.suites import Suite, dealt, is_task, part_of
from mechmerge.merge.engine import open_models
from mechmerge.merge.in_memory import merge_id, merged_model
from mechmerge.models.references import Model, ModelId
from mechmerge.pipeline.ranking import Judged, judged
from mechmerge.pipeline.run import suites_of
from mechmerge.pipeline.schema import Pipeline
from mechmerge.progress import SILENT, Progress
from mechmerge.recipe.schema import Masks, Policy, Recipe, RecipeExpert

SPLITS = ("develop", "file")
"""What a search may ask: the development split of built-in suites, and files, which have no splits."""
Stop = Callable[[Mapping[int, bool]], bool]
"""Told, between chunks, which prompts passed (by place among all suites' prompts); True gives the merge up."""


class Examined(NamedTuple):
    """What a merge did."""

    passed: dict[int, bool]
    """Strict verdicts by place among all suites' prompts; fewer than all where the merge was given up."""
    judged: Judged | None
    """None where the merge was given up."""


class _Part(NamedTuple):
    """Some prompts of one suite, asked together."""

    suite: Suite
    places: tuple[int, ...]
    """Where they stand among all suites' prompts."""


def check_development(suites: Sequence[Suite], names: Sequence[str] = (), fix: str | None = None) -> None:
    """What is chosen is chosen on development prompts.

    Args:
        suites: what is to be asked.
        names: names of suites as they were given, tasks of lm-eval among them.
        fix: what to do about it.

    Raises:
        InputError: a task of lm-eval, or a suite whose prompts are for testing.
    """
    found = [(name, "a benchmark's task, which is for testing") for name in names if is_task(name)]
    found += [(suite.name, f"the split {suite.split}") for suite in suites if suite.split not in SPLITS]
    for name, what in found:
        raise InputError(f"suite {name}", expected="development prompts", found=what, fix=fix)


def development_suites(pipeline: Pipeline, folder: Path, fix: str, progress: Progress = SILENT) -> list[Suite]:
    """The suites of a pipeline, for choosing.

    Args:
        pipeline: its split is `develop`.
        folder: of the pipeline file.
        fix: what to do about a suite that is for testing.
        progress: told of suites that have no splits.

    Raises:
        InputError: see `check_development`; or a suite that cannot be loaded.
    """
    check_development((), pipeline.evaluate.suites, fix)  # before a benchmark's data is looked for
    loaded = suites_of(pipeline, folder)
    check_development(loaded, fix=fix)
    for suite in loaded:
        if suite.split == "file":
            progress.note(f"note: {suite.name} has no splits: its prompts are development prompts from now on")
    return loaded


class Examiner:
    """Asks merges of one base and its experts.

    Args:
        base: the base.
        experts: by name, in the order in which recipes sum them.
        suites: development prompts.
        gate: by which merges are judged; it may name the base, the experts, and the gate's own model for the merge.
        settings: how answers are made.
        out: folder for kept answers (`samples/`) and times.
        like: a recipe of these models, whose rules for vocabulary and positions hold.
        chunk: about so many prompts of the longest suite are asked at a time.
        progress: told of every prompt.

    Raises:
        InputError: a suite is not for development, or the recipe does not fit the models.
        PairError: a model cannot be merged with the base.
    """

    def __init__(
        self,
        base: Model,
        experts: Mapping[str, Model],
        suites: Sequence[Suite],
        gate: Gate,
        settings: EvaluateSettings,
        out: Path,
        *,
        like: Mapping[str, Any],
        chunk: int,
        progress: Progress = SILENT,
    ) -> None:
        check_development(suites)
        self.base, self.suites, self.gate, self.settings, self.progress = base, tuple(suites), gate, settings, progress
        self.samples = out / "samples"
        self.samples.mkdir(parents=True, exist_ok=True)
        plain = Recipe(
            base=base.id,
            experts={name: RecipeExpert(model=expert.id) for name, expert in experts.items()},
            policy=Policy(name="plain"),
            **like,
        )
        self.opened, self.opened_experts = open_models(plain, {"base": base.path} | {n: e.path for n, e in experts.items()})
        self.chunks = _chunks(self.suites, chunk)
        self.records = {suite.name: suite_record(suite) for suite in self.suites}
        self.done: dict[str, tuple[ModelId, dict[str, Done]]] = {}
        """The base and the experts."""
        for name, model in {"base": base, **experts}.items():
            rows, keys = self._asked(name, Speaker(name, model, self.samples, settings, progress), None)
            self.done[name] = (model.id, self._suites_done(name, rows, keys))

    @property
    def prompts(self) -> int:
        """Prompts of all suites."""
        return sum(len(suite.prompts) for suite in self.suites)

    def reference(self, name: str) -> Judged:
        """The base or an expert, judged as a merge would be."""
        return self._judged(name, *self.done[name])

    def examine(self, name: str, recipe: Recipe, masks: Masks, stop: Stop | None = None) -> Examined:
        """Makes a merge in memory and asks it all prompts, or as many as `stop` lets it.

        Args:
            name: what the merge is called in messages.
            recipe: what is merged.
            masks: its masks.
            stop: see `Stop`.

        Raises:
            InputError: the recipe does not fit the models, or the merge's logits are not finite.
        """
        identity = merge_id(name, recipe, masks, self.opened)
        load = partial(merged_model, recipe, masks, self.opened, self.opened_experts, self.settings.dtype, self.settings.device)
        # Tokenizer, template and generation settings of a merge are the base's.
        model = Model(id=identity, path=self.base.path)
        speaker = Speaker(name, model, self.samples, self.settings, self.progress, load=load)
        rows, keys = self._asked(name, speaker, stop)
        passed = {place: bool(row["passed"]) for place, row in rows.items()}
        if len(rows) < self.prompts:
            return Examined(passed, None)
        return Examined(passed, self._judged(name, identity, self._suites_done(name, rows, keys)))

    def _asked(
        self, name: str, speaker: Speaker, stop: Stop | None
    ) -> tuple[dict[int, dict[str, Any]], dict[str, tuple[str, list[str]]]]:
        """Judged rows by place, and the template and keys of the answers by suite."""
        rows: dict[int, dict[str, Any]] = {}
        keys: dict[str, tuple[str, list[str]]] = {}
        try:
            for number, parts in enumerate(self.chunks):
                if number and stop is not None and stop({place: bool(row["passed"]) for place, row in rows.items()}):
                    break
                for part in parts:
                    said = speaker.answers(part.suite)
                    keys.setdefault(part.suite.name, (said.template, []))[1].append(said.key)
                    for place, prompt, answer in zip(part.places, part.suite.prompts, said.answers, strict=True):
                        rows[place] = judge_row(prompt, answer, part.suite, self.settings, key=said.key)
        finally:
            speaker.close()
        return rows, keys

    def _suites_done(
        self, name: str, rows: Mapping[int, dict[str, Any]], keys: Mapping[str, tuple[str, list[str]]]
    ) -> dict[str, Done]:
        done, start = {}, 0
        for suite in self.suites:
            own = [rows[start + i] for i in range(len(suite.prompts))]
            start += len(own)
            note_errors(name, suite, own, self.progress)
            template, parts = keys[suite.name]
            done[suite.name] = suite_done(suite, own, self.settings, template=template, key=digest(parts))
        return done

    def _judged(self, name: str, identity: ModelId, done: Mapping[str, Done]) -> Judged:
        models = self.done | {name: (identity, done)}
        return judged(assemble(models, self.records, (), self.settings), self.gate, name, {name: identity})


def _chunks(suites: Sequence[Suite], size: int) -> list[list[_Part]]:
    """Every suite dealt into equally many parts."""
    count = max(1, -(-max(len(suite.prompts) for suite in suites) // size))
    chunks: list[list[_Part]] = [[] for _ in range(count)]
    start = 0
    for suite in suites:
        order, n = dealt(suite), len(suite.prompts)
        for c, chunk in enumerate(chunks):
            if own := sorted(order[c * n // count : (c + 1) * n // count]):
                chunk.append(_Part(part_of(suite, own), tuple(start + i for i in own)))
        start += n
    return chunks
