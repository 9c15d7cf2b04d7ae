"""The localize stage: what carries each behaviour of one expert, measured on an anchor, on the loss of its answers, or both.

Work is divided into units that are written when they are done (a behaviour's states, its anchor, its screening, the
patches of each layer, each point of its set curves), so an interrupted call goes on where it stopped and ends with the
same file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mechmerge.artifacts import Units, digest
from mechmerge.behaviors.chat import chat_template_of, template_digest
from mechmerge.behaviors.schema import Behavior
from mechmerge.behaviors.verifiers import check_verifier
from mechmerge.errors import InputError, LocalizeError, PairError
from mechmerge.localize.adaptive import VerificationRecord
from mechmerge.localize.anchor import halves, mean_low
from mechmerge.localize.anchoring import AnchorFinder, topics_of
from mechmerge.localize.asked import Asked, ask
from mechmerge.localize.bench import Bench
from mechmerge.localize.curve_bench import CurveBench
from mechmerge.localize.curve_record import SetCurves
from mechmerge.localize.curves import fresh_prompts, measure_curves
from mechmerge.localize.measure import Anchor
from mechmerge.localize.outputs import Agreement, AnswerLoss, Answers, ask_expert, discard_answers
from mechmerge.localize.patching import Patcher
from mechmerge.localize.plan_steps import plan_localize
from mechmerge.localize.roles import summarize
from mechmerge.localize.scores import LossRecord, ScoreFile, ScoreMetadata
from mechmerge.localize.scoring import MODULE_KINDS, Controls, Scorer, Subject, score_arrays
from mechmerge.localize.settings import MEASURES, NAMED, LocalizeSettings, Measure, score_file
from mechmerge.localize.stream import open_bench
from mechmerge.models.components import SCORED_KINDS, Component
from mechmerge.models.deltas import delta_norms
from mechmerge.models.pair import align, check_pair
from mechmerge.models.references import Model
from mechmerge.progress import SILENT, Progress
from mechmerge.versions import versions

Array = np.ndarray


def localize(
    base: Model,
    expert: Model,
    behaviors: Sequence[Behavior],
    out: Path,
    settings: LocalizeSettings | None = None,
    progress: Progress = SILENT,
) -> list[Path]:
    """Localizes behaviours in an expert: writes `out/BEHAVIOR.safetensors` (scores on the anchor) and `out/anchors/…`, or
    `out/BEHAVIOR.loss.safetensors` (scores on the loss), or both, for each.

    Args:
        base: the base model.
        expert: the expert, of the same architecture.
        behaviors: what to localize.
        out: folder of the score files.
        settings: see `LocalizeSettings`.
        progress: told of every unit.

    Returns:
        The score files, in the order of the behaviours, each behaviour's in the order of the sources.

    Raises:
        PairError: the models cannot be compared, or have equal weights.
        LocalizeError: an anchor is invalid (with `on_invalid="refuse"`), or a control or score is not what it must be.
    """
    settings = settings or LocalizeSettings()
    names = [behavior.name for behavior in behaviors]
    if not names or len(set(names)) < len(names):
        raise InputError("behaviours", expected="at least one, each name once", found=", ".join(names) or "none")
    if not settings.sources or len(set(settings.sources)) < len(settings.sources):
        raise InputError("sources", expected="anchor, loss or both", found=", ".join(settings.sources) or "none")
    for behavior in behaviors:
        if behavior.verifier is not None:
            check_verifier(behavior.verifier)
    # An aligned copy is measured under the identity of the expert that was given: a recipe aligns it again.
    expert = Model(id=expert.id, path=align(base, expert, settings.vocabulary).path)
    check_pair(base.checkpoint(), expert.checkpoint(), positions=settings.positions)
    if base.id.shards == expert.id.shards:
        raise PairError(
            f"{expert.id.name} against {base.id.name}", expected="another model than the base", found="equal weights"
        )
    if settings.anchor_layer is not None and settings.anchor_layer > base.checkpoint().arch.layers:
        raise LocalizeError(
            "anchor layer",
            expected=f"1 … {base.checkpoint().arch.layers}",
            found=str(settings.anchor_layer),
            fix="name a lower layer",
        )
    return _Localizer(base, expert, out, settings, progress).run(behaviors)


class _Localizer:
    """One call of `localize`: the bench is loaded only when a unit needs it."""

    def __init__(self, base: Model, expert: Model, out: Path, settings: LocalizeSettings, progress: Progress) -> None:
        self.base, self.expert, self.out, self.settings, self.progress = base, expert, out, settings, progress
        self._bench: Bench | None = None
        self.behaviors: list[Behavior] = []
        self.checkpoint = expert.checkpoint()
        self.arch = base.checkpoint().arch
        self.facts: dict[str, Array] = {}

    def bench(self) -> Bench:
        """The base, loaded once."""
        if self._bench is None:
            plan = plan_localize(self.base.checkpoint(), self.behaviors, self.settings)
            self._bench = open_bench(self.base, self.settings.dtype, self.settings.device, plan)
        return self._bench

    def units(self, behavior: Behavior) -> Units:
        """Where the units of a behaviour are kept."""
        inputs = {
            "base": self.base.id.shards,
            "expert": self.expert.id.shards,
            "sides": self.base.sides,
            "behavior": behavior.digest,
            "settings": self.settings.model_dump(mode="json", exclude=set(NAMED)),
            "versions": versions(),
            "threads": torch.get_num_threads(),
        }
        return Units(self.out / ".units", inputs)

    def run(self, given: Sequence[Behavior]) -> list[Path]:
        """The score files of all behaviours."""
        self.behaviors = behaviors = used(given, self.settings)
        finder = AnchorFinder(self.base, self.checkpoint, self.bench, self.units, self.settings, self.progress)
        if "anchor" in self.settings.sources:
            finder.prepare(behaviors)
        norms = self.units(behaviors[0]).arrays("norms", lambda: delta_norms(self.base.checkpoint(), self.checkpoint))
        self.facts = self._facts(norms)
        paths = []
        for behavior, whole in zip(behaviors, given, strict=True):
            for source in self.settings.sources:
                one = _Localization(self, behavior, whole)
                file = one.by_anchor(finder) if source == "anchor" else one.by_loss()
                path = self.out / score_file(behavior.name, source)
                file.write(path)
                paths.append(path)
        for behavior in behaviors:
            self.units(behavior).discard()
        return paths

    def _facts(self, norms: dict[str, Array]) -> dict[str, Array]:
        base = self.base.checkpoint()
        layout, shapes = base.layout, base.shapes
        facts: dict[str, Array] = {f"{kind}.delta_norm": norms[kind] for kind in SCORED_KINDS}
        for kind in SCORED_KINDS:
            counts = [layout.unit_parameters(layer, kind, shapes) for layer in range(self.arch.layers)]
            facts[f"{kind}.parameters"] = np.array(counts, dtype=np.int64)
        return facts


class _Localization:
    """One behaviour of one expert."""

    def __init__(self, stage: _Localizer, behavior: Behavior, whole: Behavior) -> None:
        self.stage, self.behavior, self.whole = stage, behavior, whole
        self.settings, self.progress, self.units = stage.settings, stage.progress, stage.units(behavior)
        self.base, self.expert = stage.base.checkpoint(), stage.checkpoint
        self.name = f"behaviour {behavior.name}"
        _, self.held_out = halves(topics_of(behavior))

    # ------------------------------------------------------------------------------------------------------------- anchor
    def by_anchor(self, finder: AnchorFinder) -> ScoreFile:
        """Scores on the behaviour's anchor.

        Raises:
            LocalizeError: the anchor is not valid, and such are refused.
        """
        record, vector = finder.find(self.behavior)
        if not record.valid:
            message = f"{self.name}: the anchor at layer {record.layer} is not valid: {'; '.join(record.reasons)}"
            if self.settings.on_invalid == "refuse":
                raise LocalizeError(message, fix="use --invalid-anchor report to measure all the same")
            self.progress.note(f"note: {message}")
        finder.write(self.stage.out / "anchors" / f"{self.behavior.name}.safetensors", record, vector)
        anchor = Anchor(record.layer, torch.from_numpy(vector).to(self.settings.device))

        def subject() -> Subject:
            asked = self._asked(self.held_out)
            return Subject(asked.prompts(self.stage.bench()), list(asked.topics), anchor, lambda _: anchor)

        scale = record.gap if record.gap_low > 0 else 1.0
        scorer = self._scorer(subject, record.layer, "anchor")
        arrays, controls, told = self._scores(scorer, scale)
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
            bench = self.stage.bench()
            answers = ask_expert(bench, self.base, self.expert, self._asked(rows), self.units, "output")
            patcher = Patcher(bench, answers.texts, Agreement(bench, answers))
            run = patcher.run()
            tried = [Component(layer, kind) for layer in range(below, self.base.arch.layers) for kind in MODULE_KINDS]
            return {"base": run.state, **patcher.patch(run, tried, self.expert.tensor)}

        found = self.units.arrays(f"output-{below}-{digest(rows)[:12]}", compute)
        discard_answers(self.units, "output")
        divergence = -found.pop("base")
        arrays: dict[str, Array] = {}
        for kind in MODULE_KINDS:
            arrays[f"{kind}.output"], arrays[f"{kind}.output.stderr"] = (
                np.full((self.base.arch.layers, 1), np.nan, np.float32) for _ in range(2)
            )
            for layer in range(below, self.base.arch.layers):
                change = found[str(Component(layer, kind))] / divergence.mean()
                arrays[f"{kind}.output"][layer] = change.mean()
                arrays[f"{kind}.output.stderr"][layer] = change.std(ddof=1) / np.sqrt(len(change))
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
            bench = self.stage.bench()
            answers = self._answers().some(kept)
            topics = [self._asked(self.held_out).topics[i] for i in kept]
            return Subject(
                answers.texts, topics, AnswerLoss(bench, answers), lambda rows: AnswerLoss(bench, answers.some(list(rows)))
            )

        layers = self.base.arch.layers
        scorer = self._scorer(subject, layers, "loss")
        controls = scorer.controls()
        gaps = controls.expert - controls.base
        low = mean_low(gaps, self.settings.seed)
        record = LossRecord(
            base=-float(controls.base.mean()),
            expert=-float(controls.expert.mean()),
            gap=float(gaps.mean()),
            gap_low=low,
            prompts=len(self.held_out),
            answers=len(kept),
        )
        arrays, _, told = self._scores(scorer, record.gap if low > 0 else 1.0)
        told |= {"loss": record, "scale": "recovery" if low > 0 else "difference"}
        file = self._with_curves(self._file(arrays, controls, told), "loss-curve", self._loss_of)
        discard_answers(self.units, "held")
        return file

    @staticmethod
    def _loss_of(bench: Bench, _asked: Asked, answers: Answers) -> tuple[list[list[int]], AnswerLoss]:
        return answers.texts, AnswerLoss(bench, answers)

    def _answers(self) -> Answers:
        return ask_expert(self.stage.bench(), self.base, self.expert, self._asked(self.held_out), self.units, "held")

    def _passing(self) -> list[int]:
        answers = self._answers()
        return [i for i in range(len(answers.answers)) if not answers.passed or answers.passed[i]]

    # -------------------------------------------------------------------------------------------------------------- scores
    def _asked(self, rows: Sequence[int]) -> Asked:
        return ask(self.stage.bench(), self.behavior, [self.behavior.pairs[i] for i in rows])

    def _scorer(self, subject: Any, below: int, key: str) -> Scorer:
        key = f"{key}-{below}"
        return Scorer(self.stage.bench, self.base, self.expert, subject, below, self.units, key, self.name, self.progress)

    def _scores(self, scorer: Scorer, scale: float) -> tuple[dict[str, Array], Controls, dict[str, Any]]:
        """The tensors, the controls, and what the file's document says of how they were chosen."""
        settings, below, others = self.settings, scorer.below, [m for m in MEASURES[1:] if m in self.settings.measures]
        passes = below * (1 + len(others)) + 2
        self.progress.start(f"{self.behavior.name}: screening and patching below layer {below}", passes)
        try:
            controls = scorer.controls()
            self.progress.advance()
            screened = scorer.screened(settings.batch, settings.integrate)
            self.progress.advance()
            means = {kind: values.mean(0) for kind, values in screened.items()}
            verification: dict[str, VerificationRecord] = {}
            if settings.verify == "auto":
                chosen, verification = scorer.settled(means, scale, settings.top, settings.confidence, settings.seed)
            else:
                chosen = scorer.best(means, settings.verify)
            measured: dict[Measure, dict[str, Array]] = {"sufficiency": {}}
            wanted = [*scorer.modules(), *chosen]
            if "activation" in others:
                measured["activation"] = scorer.patched("activation", scorer.modules())
                routers = scorer.routers(measured["activation"]) if settings.verify else []
                measured["activation"] |= scorer.patched("activation", {*chosen, *routers})
                wanted += routers
            measured["sufficiency"] = scorer.patched("sufficiency", wanted)
            if "necessity" in others:
                measured["necessity"] = scorer.patched("necessity", wanted)
        finally:
            self.progress.end()
        arrays = score_arrays(screened, measured, scale, below) | self.stage.facts
        verified = {kind: sum(c.kind == kind for c in set(wanted)) for kind in SCORED_KINDS}
        return arrays, controls, {"verified": verified, "verification": verification}

    def _file(self, arrays: dict[str, Array], controls: Controls, told: dict[str, Any]) -> ScoreFile:
        stage = self.stage
        anchored = told.get("anchor")
        thirds = None
        if "activation" in self.settings.measures:
            below = anchored.layer if anchored is not None else self.base.arch.layers
            thirds = summarize(arrays, below, told["scale"], self.settings.roles)
        metadata = ScoreMetadata(
            base=stage.base.id,
            expert=stage.expert.id,
            behavior=self.behavior.name,
            behavior_digest=self.whole.digest,
            chat_template=self.units.json("template", self._template),
            state_base=float(controls.base.mean()),
            state_expert=float(controls.expert.mean()),
            identity_control=controls.identity,
            dtype=self.settings.dtype,
            seed=self.settings.seed,
            integrate=self.settings.integrate,
            roles=thirds,
            versions=versions(),
            **told,
        )
        return ScoreFile(metadata, arrays)

    def _template(self) -> str:
        return template_digest(chat_template_of(self.stage.bench().tokenizer, self.behavior.chat_template))

    # -------------------------------------------------------------------------------------------------------------- curves
    def _with_curves(self, file: ScoreFile, key: str, readout: Any) -> ScoreFile:
        """The file with its set curves, measured on prompts that the scores have not seen, where there are enough."""
        settings = self.settings
        if not settings.curves:
            return file
        told = digest([settings.curve_seeds, settings.curve_output_shares, settings.curve_pass_prompts])
        scored = digest({kind: file.score(kind).tobytes().hex() for kind in SCORED_KINDS})[:12]

        def measure() -> dict[str, Any]:
            bench = self.stage.bench()
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


def used(behaviors: Sequence[Behavior], settings: LocalizeSettings) -> list[Behavior]:
    """The behaviours with the pairs that are used."""
    return [_first_topics(behavior, 2 * settings.prompts) for behavior in behaviors]


def _first_topics(behavior: Behavior, count: int) -> Behavior:
    """The behaviour with the pairs of its first `count` topics."""
    topics = topics_of(behavior)
    kept = set(list(dict.fromkeys(topics))[:count])
    pairs = tuple(pair for pair, topic in zip(behavior.pairs, topics, strict=True) if topic in kept)
    return behavior.model_copy(update={"pairs": pairs})
