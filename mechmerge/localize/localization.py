"""One behaviour of one expert, measured on its anchor or on the loss of the expert's answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mechmerge.artifacts import Units, digest
from mechmerge.behaviors.chat import chat_template_of, template_digest
from mechmerge.behaviors.schema import Behavior
from mechmerge.errors import LocalizeError
from mechmerge.localize.adaptive import VerificationRecord
from mechmerge.localize.anchor import mean_low, standard_error
from mechmerge.localize.anchoring import AnchorFinder, split, topics_of
from mechmerge.localize.asked import Asked, ask
from mechmerge.localize.bench import Bench
from mechmerge.localize.curve_bench import CurveBench, MakeReadout
from mechmerge.localize.curve_record import SetCurves
from mechmerge.localize.curves import fresh_prompts, measure_curves
from mechmerge.localize.measure import Anchor
from mechmerge.localize.outputs import Agreement, AnswerLoss, Answers, ask_expert, discard_answers
from mechmerge.localize.patching import Patcher
from mechmerge.localize.roles import summarize
from mechmerge.localize.scores import AnchorRecord, LossRecord, ScoreFile, ScoreMetadata
from mechmerge.localize.scoring import MODULE_KINDS, Controls, Scorer, Subject, score_arrays
from mechmerge.localize.settings import MEASURES, LocalizeSettings
from mechmerge.models.components import SCORED_KINDS, Component, parse_component
from mechmerge.models.references import Model
from mechmerge.progress import Progress
from mechmerge.versions import versions

Array = np.ndarray


@dataclass(frozen=True)
class Pair:
    """A base and an expert, and what all behaviours share."""

    base: Model
    expert: Model
    bench: Callable[[], Bench]
    """The bench, loaded once; it holds the base's weights before and after every call."""
    facts: dict[str, Array]
    """Delta norms and numbers of parameters, as score files hold them."""
    settings: LocalizeSettings
    progress: Progress


class Localization:
    """One behaviour of one expert: everything that is measured of it, and its score files.

    Args:
        pair: base and expert, and what all their behaviours share.
        behavior: the behaviour with the pairs that are used.
        whole: the same with all its pairs.
        units: where its units are kept.

    Raises:
        LocalizeError: fewer than four topics.
    """

    def __init__(self, pair: Pair, behavior: Behavior, whole: Behavior, units: Units) -> None:
        self.pair, self.behavior, self.whole, self.units = pair, behavior, whole, units
        self.settings, self.progress = pair.settings, pair.progress
        self.base, self.expert = pair.base.checkpoint(), pair.expert.checkpoint()
        self.name = f"behaviour {behavior.name}"
        _, self.held_out = split(behavior)
        topics = topics_of(behavior)
        self.topics = [topics[i] for i in self.held_out]

    # ------------------------------------------------------------------------------------------------------------- anchor
    def by_anchor(self, finder: AnchorFinder, anchors: Path) -> ScoreFile:
        """Scores on the behaviour's anchor, which is written into the folder `anchors`.

        Raises:
            LocalizeError: the anchor is not valid, and such are refused.
        """
        record, vector = finder.find(self.behavior)
        if not record.valid:
            message = f"{self.name}: the anchor at layer {record.layer} is not valid: {'; '.join(record.reasons)}"
            if self.settings.on_invalid == "refuse":
                raise LocalizeError(message, fix="use --invalid-anchor report to measure all the same")
            self.progress.note(f"note: {message}")
        finder.write(anchors / f"{self.behavior.name}.safetensors", record, vector)
        anchor = Anchor(record.layer, torch.from_numpy(vector).to(self.settings.device))

        def subject() -> Subject:
            asked = self._asked(self.held_out)
            return Subject(asked.prompts(self.pair.bench()), list(asked.topics), anchor, lambda _: anchor)

        scale = record.gap if record.gap_low > 0 else 1.0
        scorer = self._scorer(subject, record.layer, "anchor")
        arrays, controls, told = self._scores(scorer, scale, self.topics)
        arrays |= self._outputs(record.layer)
        told |= {"anchor": record, "scale": "recovery" if record.gap_low > 0 else "difference"}
        file = self._file(arrays, controls, told)
        return self._with_curves(file, "curve", lambda bench, asked, answers: (asked.prompts(bench), anchor))

    def _outputs(self, below: int) -> dict[str, Array]:
        """What modules at and after the anchor do to the output: the share of the base's divergence that each takes away."""
        if self.settings.output_prompts == 0:
            return {}
        rows = self.held_out[: self.settings.output_prompts]

        def compute() -> dict[str, Array]:
            bench = self.pair.bench()
            answers = ask_expert(bench, self.base, self.expert, self._asked(rows), self.units, "output")
            patcher = Patcher(bench, answers.texts, Agreement(bench, answers))
            run = patcher.run()
            tried = [Component(layer, kind) for layer in range(below, self.base.arch.layers) for kind in MODULE_KINDS]
            return {"base": run.state, **patcher.patch(run, tried, self.expert.tensor)}

        found = self.units.arrays(f"output-{below}-{digest(rows)[:12]}", compute)
        discard_answers(self.units, "output")
        divergence = -found.pop("base")
        if not divergence.mean() > 0:
            self.progress.note(f"note: {self.name}: the base says what the expert says, so nothing is judged by the output")
            return {}
        arrays: dict[str, Array] = {}
        for kind in MODULE_KINDS:
            arrays[f"{kind}.output"], arrays[f"{kind}.output.stderr"] = (
                np.full((self.base.arch.layers, 1), np.nan, np.float32) for _ in range(2)
            )
            for layer in range(below, self.base.arch.layers):
                change = found[str(Component(layer, kind))] / divergence.mean()
                arrays[f"{kind}.output"][layer] = change.mean()
                arrays[f"{kind}.output.stderr"][layer] = standard_error(change, self.topics[: len(change)])
        return arrays

    # --------------------------------------------------------------------------------------------------------------- loss
    def by_loss(self) -> ScoreFile:
        """Scores on the loss of the expert's own answers that pass its verifier.

        Raises:
            LocalizeError: fewer than two answers pass.
        """
        kept = self.units.json("loss-kept", self._passing)
        if len(kept) < 2:
            raise LocalizeError(
                self.name,
                expected="at least 2 answers of the expert that pass",
                found=f"{len(kept)} of {len(self.held_out)}",
                fix="use more prompts, or leave the loss out",
            )

        def subject() -> Subject:
            bench = self.pair.bench()
            answers = self._answers().some(kept)
            topics = [self._asked(self.held_out).topics[i] for i in kept]
            return Subject(
                answers.texts, topics, AnswerLoss(bench, answers), lambda rows: AnswerLoss(bench, answers.some(list(rows)))
            )

        layers = self.base.arch.layers
        scorer = self._scorer(subject, layers, "loss")
        controls = scorer.controls()
        gaps = controls.expert - controls.base
        topics = [self.topics[i] for i in kept]
        low = mean_low(gaps, topics, self.settings.seed)
        record = LossRecord(
            base=-float(controls.base.mean()),
            expert=-float(controls.expert.mean()),
            gap=float(gaps.mean()),
            gap_low=low,
            prompts=len(self.held_out),
            answers=len(kept),
        )
        arrays, _, told = self._scores(scorer, record.gap if low > 0 else 1.0, topics)
        told |= {"loss": record, "scale": "recovery" if low > 0 else "difference"}
        file = self._with_curves(self._file(arrays, controls, told), "loss-curve", self._loss_of)
        discard_answers(self.units, "held")
        return file

    @staticmethod
    def _loss_of(bench: Bench, _asked: Asked, answers: Answers) -> tuple[list[list[int]], AnswerLoss]:
        return answers.texts, AnswerLoss(bench, answers)

    def _answers(self) -> Answers:
        return ask_expert(self.pair.bench(), self.base, self.expert, self._asked(self.held_out), self.units, "held")

    def _passing(self) -> list[int]:
        answers = self._answers()
        return [i for i in range(len(answers.answers)) if not answers.passed or answers.passed[i]]

    # -------------------------------------------------------------------------------------------------------------- scores
    def _asked(self, rows: Sequence[int]) -> Asked:
        return ask(self.pair.bench(), self.behavior, [self.behavior.pairs[i] for i in rows])

    def _scorer(self, subject: Callable[[], Subject], below: int, key: str) -> Scorer:
        key = f"{key}-{below}"
        return Scorer(
            self.pair.bench, self.base, self.expert, subject, below, self.units, key, self.behavior.name, self.progress
        )

    def _scores(self, scorer: Scorer, scale: float, topics: Sequence[str]) -> tuple[dict[str, Array], Controls, dict[str, Any]]:
        """The tensors, the controls, and what the file's document says of how they were chosen."""
        settings, below, others = self.settings, scorer.below, [m for m in MEASURES[1:] if m in self.settings.measures]
        self.progress.start(f"{self.behavior.name}: screening below layer {below}", 1)
        try:
            controls = scorer.controls()
            screened = scorer.screened(settings.batch, settings.integrate)
            self.progress.advance()
        finally:
            self.progress.end()
        means = {kind: values.mean(0) for kind, values in screened.items()}
        verification: dict[str, VerificationRecord] = {}
        if settings.verify == "auto":
            chosen, verification = scorer.settled(means, scale, settings.top, settings.confidence, settings.seed)
        else:
            chosen = scorer.best(means, settings.verify)
        wanted = [*scorer.modules(), *chosen]
        if "activation" in others and settings.verify:
            wanted += scorer.routers(scorer.patched("activation", scorer.modules()))
        for measure in ("sufficiency", *others):
            scorer.patched(measure, wanted)
        measured = {measure: scorer.all_patched(measure) for measure in ("sufficiency", *others)}
        arrays = score_arrays(screened, measured, scale, below, topics) | self.pair.facts
        replaced = [parse_component(name) for name in measured["sufficiency"]]
        verified = {kind: sum(component.kind == kind for component in replaced) for kind in SCORED_KINDS}
        return arrays, controls, {"verified": verified, "verification": verification}

    def _file(self, arrays: dict[str, Array], controls: Controls, told: dict[str, Any]) -> ScoreFile:
        anchored: AnchorRecord | None = told.get("anchor")
        roles = None
        if "activation" in self.settings.measures:
            below = anchored.layer if anchored is not None else self.base.arch.layers
            roles = summarize(arrays, below, told["scale"], self.settings.roles)
        metadata = ScoreMetadata(
            base=self.pair.base.id,
            expert=self.pair.expert.id,
            behavior=self.behavior.name,
            behavior_digest=self.whole.digest,
            chat_template=self.units.json("template", self._template),
            state_base=float(controls.base.mean()),
            state_expert=float(controls.expert.mean()),
            identity_control=controls.identity,
            dtype=self.settings.dtype,
            seed=self.settings.seed,
            integrate=self.settings.integrate,
            roles=roles,
            versions=versions(),
            **told,
        )
        return ScoreFile(metadata, arrays)

    def _template(self) -> str:
        return template_digest(chat_template_of(self.pair.bench().tokenizer, self.behavior.chat_template))

    # -------------------------------------------------------------------------------------------------------------- curves
    def _with_curves(self, file: ScoreFile, key: str, readout: MakeReadout) -> ScoreFile:
        """The file with its set curves, measured on prompts that the scores have not seen, where there are enough."""
        settings = self.settings
        if not settings.curves:
            return file
        told = digest([settings.curve_seeds, settings.curve_output_shares, settings.curve_pass_prompts])
        scored = digest({kind: file.score(kind).tobytes().hex() for kind in SCORED_KINDS})[:12]

        def measure() -> dict[str, Any]:
            bench = self.pair.bench()
            fresh = fresh_prompts(topics_of(self.whole), 2 * settings.prompts, settings.prompts)
            pairs = [self.whole.pairs[i] for i in fresh] or [self.behavior.pairs[i] for i in self.held_out]
            asked = ask(bench, self.behavior, pairs)
            curve_bench = CurveBench(
                bench, self.base, self.expert, readout, asked, settings.curve_pass_prompts, self.units, f"{key}-{scored}"
            )
            seeds = range(settings.seed, settings.seed + settings.curve_seeds)
            shares = settings.curve_output_shares
            curves = measure_curves(curve_bench, file, seeds, shares, bool(fresh), settings.seed, self.progress)
            return curves.model_dump(mode="json")

        curves = SetCurves.model_validate(self.units.json(f"{key}-{scored}-all-{told[:12]}", measure))
        if self.settings.sources[-1] == file.metadata.source:
            discard_answers(self.units, "curve")
        if not curves.above_controls:
            self.progress.note(f"note: behaviour {file.metadata.label}: {curves.verdict}")
        return ScoreFile(file.metadata.model_copy(update={"curves": curves}), file.arrays)
