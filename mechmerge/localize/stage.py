"""The localize stage: anchors, screening and weight patching of one expert for any number of behaviours.

Work is divided into units that are written when they are done (a behaviour's states, its anchor, its screening, the
patches of each layer, each point of its set curves), so an interrupted call goes on where it stopped and ends with the
same file.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from mechmerge.artifacts import Document, Units, digest, read_arrays, write_arrays
from mechmerge.behaviors.chat import chat_template_of, render, template_digest
from mechmerge.behaviors.schema import Behavior
from mechmerge.behaviors.verifiers import check_verifier
from mechmerge.errors import InputError, LocalizeError, PairError
from mechmerge.localize.anchor import STEERING_STRENGTHS, States, best_layers, direction, halves, judge
from mechmerge.localize.asked import ask
from mechmerge.localize.bench import Batch, Bench, Trace, layer_source
from mechmerge.localize.curve_bench import CurveBench, discard_expert
from mechmerge.localize.curve_record import SetCurves
from mechmerge.localize.curve_sets import OUTPUT_SHARES, Shares
from mechmerge.localize.curves import fresh_prompts, measure_curves
from mechmerge.localize.measure import Anchor, best_units, identity_control, patch_layer, screen
from mechmerge.localize.scores import AnchorRecord, ScoreFile, ScoreMetadata
from mechmerge.localize.steering import Steering
from mechmerge.models.components import SCORED_KINDS, Component, parse_component
from mechmerge.models.deltas import delta_norms
from mechmerge.models.pair import PositionRule, VocabularyRule, align, check_pair
from mechmerge.models.references import Model
from mechmerge.progress import SILENT, Progress, track
from mechmerge.versions import versions

Array = np.ndarray
MODULE_KINDS = ("attention", "mlp", "layer")
_CURVES = ("curves", "curve_seeds", "curve_output_shares", "curve_pass_prompts")
"""Settings that name their own units, so that changing them keeps everything else."""


class LocalizeSettings(Document):
    """Settings of the localize stage."""

    anchor_layer: int | None = Field(default=None, ge=1)
    """The anchor's layer; chosen by validity when None."""
    verify: int = Field(default=16, ge=0)
    """Best heads, KV groups and neurons (each) by screening that are really patched; modules and layers always are."""
    prompts: int = Field(default=12, ge=2)
    """Topics in each half: those that make the anchor, and those that validity and scores are measured on."""
    steering_prompts: int = Field(default=8, ge=0)
    """Held-out prompts answered in the steering check; 0 leaves it out."""
    curves: bool = True
    """Whether set curves are measured beside their controls."""
    curve_seeds: int = Field(default=3, ge=2)
    """Random orders that the score order is compared with; two at least, since their spread is part of the verdict."""
    curve_output_shares: Shares = OUTPUT_SHARES
    """Shares (of .01, .02, .05, .1, .2, .5, 1) at which the curves' sets are compared on the output."""
    curve_pass_prompts: int = Field(default=8, ge=0)
    """Prompts of the curves that patched models answer for pass rates; 0 leaves them out (they take most of the time)."""
    on_invalid: Literal["refuse", "report"] = "refuse"
    """What happens when an anchor fails its validity check: an error, or a file that says so."""
    batch: int = Field(default=4, ge=1)
    """Prompts a forward pass with gradients."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    seed: int = 0
    vocabulary: VocabularyRule = "same"
    positions: PositionRule = "same"


class _Unit(Document):
    """Metadata of a vector file beside the scores."""

    anchor: AnchorRecord


def localize(
    base: Model,
    expert: Model,
    behaviors: Sequence[Behavior],
    out: Path,
    settings: LocalizeSettings | None = None,
    progress: Progress = SILENT,
) -> list[Path]:
    """Localizes behaviours in an expert: writes `out/BEHAVIOR.safetensors` and `out/anchors/BEHAVIOR.safetensors` for each.

    Args:
        base: the base model.
        expert: the expert, of the same architecture.
        behaviors: what to localize.
        out: folder of the score files.
        settings: see `LocalizeSettings`.
        progress: told of every unit.

    Returns:
        The score files, in the order of the behaviours.

    Raises:
        PairError: the models cannot be compared, or have equal weights.
        LocalizeError: an anchor is invalid (with `on_invalid="refuse"`), or a control or score is not what it must be.
    """
    settings = settings or LocalizeSettings()
    names = [behavior.name for behavior in behaviors]
    if not names or len(set(names)) < len(names):
        raise InputError("behaviours", expected="at least one, each name once", found=", ".join(names) or "none")
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
        self.checkpoint = expert.checkpoint()
        self.arch = base.checkpoint().arch

    @property
    def bench(self) -> Bench:
        if self._bench is None:
            self._bench = Bench(self.base, self.settings.dtype, self.settings.device)
        return self._bench

    def units(self, behavior: Behavior) -> Units:
        fixed = self.settings.model_dump(mode="json", exclude={"on_invalid", "verify", *_CURVES})
        inputs = {
            "base": self.base.id.shards,
            "expert": self.expert.id.shards,
            "sides": self.base.sides,
            "behavior": behavior.digest,
            "settings": fixed,
            "versions": versions(),
            "threads": torch.get_num_threads(),
        }
        return Units(self.out / ".units", inputs)

    def run(self, given: Sequence[Behavior]) -> list[Path]:
        behaviors = [_first_topics(behavior, 2 * self.settings.prompts) for behavior in given]
        self.digests = {behavior.name: behavior.digest for behavior in given}
        self._states(behaviors)
        norms = self._norms(behaviors[0])
        paths = []
        for behavior, whole in zip(behaviors, given, strict=True):
            path = self.out / f"{behavior.name}.safetensors"
            file, anchor = self._one(behavior, norms)
            if self.settings.curves:
                curves = self._curves(behavior, whole, file, anchor)
                file = ScoreFile(file.metadata.model_copy(update={"curves": curves}), file.arrays)
            file.write(path)
            paths.append(path)
        for behavior in behaviors:
            self.units(behavior).discard()
        return paths

    # ------------------------------------------------------------------------------------------------------------- prompts
    def _rendered(self, behavior: Behavior) -> tuple[list[str], list[str], str | None]:
        template = chat_template_of(self.bench.tokenizer, behavior.chat_template)
        positive = [render(self.bench.tokenizer, pair.with_, template) for pair in behavior.pairs]
        negative = [render(self.bench.tokenizer, pair.without, template) for pair in behavior.pairs]
        return positive, negative, template

    def _batches(self, texts: Sequence[str], template: str | None) -> list[Batch]:
        size = self.settings.batch
        return [self.bench.encode(texts[i : i + size], special_tokens=template is None) for i in range(0, len(texts), size)]

    def _split(self, behavior: Behavior) -> tuple[list[int], list[int]]:
        made, held_out = halves(_topics(behavior))
        if min(len(made), len(held_out)) < 2:
            raise LocalizeError(f"behaviour {behavior.name}", expected="prompts on at least 4 topics", found="fewer")
        return made, held_out

    # -------------------------------------------------------------------------------------------------------------- states
    def _states(self, behaviors: Sequence[Behavior]) -> None:
        missing = [b for b in behaviors if not (self.units(b).folder / "states.safetensors").exists()]
        if not missing:
            return
        found: dict[str, dict[str, Array]] = {b.name: {} for b in missing}
        texts = {b.name: self._rendered(b) for b in missing}
        for behavior in track(missing, "states of the base", len(missing), self.progress):
            positive, _, template = texts[behavior.name]
            found[behavior.name]["base_with"] = self._last(positive, template)
        self.bench.load(self.checkpoint)
        for behavior in track(missing, "states of the expert", len(missing), self.progress):
            positive, negative, template = texts[behavior.name]
            found[behavior.name]["expert_with"] = self._last(positive, template)
            found[behavior.name]["expert_without"] = self._last(negative, template)
        self.bench.load(self.base.checkpoint())
        for behavior in missing:
            self.units(behavior).arrays("states", lambda name=behavior.name: found[name])  # type: ignore[misc]

    def _last(self, texts: Sequence[str], template: str | None) -> Array:
        """Residual stream at the last token of every prompt, [L + 1, n, D]."""
        rows = []
        for trace in self.bench.traces(self._batches(texts, template), self.arch.layers):
            rows.append(torch.stack([x[:, -1].float() for x in trace.residual]).cpu().numpy())
        return np.concatenate(rows, axis=1)

    def _norms(self, behavior: Behavior) -> dict[str, Array]:
        return self.units(behavior).arrays("norms", lambda: delta_norms(self.base.checkpoint(), self.checkpoint))

    # -------------------------------------------------------------------------------------------------------- one behaviour
    def _one(self, behavior: Behavior, norms: dict[str, Array]) -> tuple[ScoreFile, Anchor]:
        units, settings = self.units(behavior), self.settings
        made, held_out = self._split(behavior)
        states = States(**units.arrays("states", dict))
        record, vector = self._anchor(behavior, states, made, held_out)
        if not record.valid:
            message = f"behaviour {behavior.name}: the anchor at layer {record.layer} is not valid: {'; '.join(record.reasons)}"
            if settings.on_invalid == "refuse":
                raise LocalizeError(message, fix="use --invalid-anchor report to measure all the same")
            self.progress.note(f"note: {message}")
        anchors = self.out / "anchors" / f"{behavior.name}.safetensors"
        write_arrays(anchors, {"vector": vector}, _Unit(anchor=record))
        positive, _, template = self._rendered(behavior)
        anchor = Anchor(record.layer, torch.from_numpy(vector).to(settings.device))
        texts = [positive[i] for i in held_out]
        source = layer_source(self.checkpoint)

        scale = record.gap if record.gap_low > 0 else 1.0
        self.progress.start(f"{behavior.name}: screening and patching below layer {record.layer}", record.layer + 1)
        screened = units.arrays("screen", lambda: screen(self.bench, self._batches(texts, template), anchor, source))
        self.progress.advance()
        means = {kind: values.mean(0) for kind, values in screened.items()}
        chosen = [Component(layer, kind) for layer in range(record.layer) for kind in MODULE_KINDS]
        chosen += best_units(means, record.layer, settings.verify)

        @cache
        def trace() -> Trace:
            return self.bench.trace(self.bench.encode(texts, special_tokens=template is None), record.layer)

        patched: dict[str, Array] = {}
        for layer in range(record.layer):
            here = [c for c in chosen if c.layer == layer]

            def patch(components: list[Component] = here) -> dict[str, Array]:
                return patch_layer(self.bench, trace(), anchor, components, source)

            patched |= units.arrays(f"patch-{settings.verify}-{layer}", patch)
            self.progress.advance()
        self.progress.end()

        def control() -> dict[str, Array]:
            state = anchor.state(trace().residual[-1]).double().cpu().numpy()
            return {"state": state, "identity": np.array([identity_control(self.bench, trace(), anchor)])}

        controlled = units.arrays("control", control)
        if controlled["identity"][0] != 0:
            raise LocalizeError(
                f"behaviour {behavior.name}",
                expected="0 for the base patched with itself",
                found=str(controlled["identity"][0]),
            )
        arrays = self._arrays(screened, patched, controlled["state"], scale, record.layer) | self._facts(norms)
        if not all(np.isfinite(a[: record.layer]).all() for n, a in arrays.items() if n.endswith(".screen")):
            raise LocalizeError(f"behaviour {behavior.name}", expected="finite scores", found="NaN", fix="try --dtype float32")
        unit_vector = states.expert_with[record.layer, held_out] @ vector
        metadata = ScoreMetadata(
            base=self.base.id,
            expert=self.expert.id,
            behavior=behavior.name,
            behavior_digest=self.digests[behavior.name],
            chat_template=template_digest(template),
            anchor=record,
            scale="recovery" if record.gap_low > 0 else "difference",
            state_base=float(controlled["state"].mean()),
            state_expert=float(unit_vector.mean()),
            identity_control=float(controlled["identity"][0]),
            dtype=settings.dtype,
            seed=settings.seed,
            verified={kind: sum(c.kind == kind for c in chosen) for kind in SCORED_KINDS},
            versions=versions(),
        )
        return ScoreFile(metadata, arrays), anchor

    def _curves(self, behavior: Behavior, whole: Behavior, file: ScoreFile, anchor: Anchor) -> SetCurves:
        """The set curves of one score file; `whole` is the behaviour with all its pairs."""
        settings, units = self.settings, self.units(behavior)
        key = f"curve-{settings.verify}"

        def measure() -> dict[str, Any]:
            fresh = fresh_prompts(_topics(whole), 2 * settings.prompts, settings.prompts)
            pairs = [whole.pairs[i] for i in fresh] or [behavior.pairs[i] for i in self._split(behavior)[1]]
            asked = ask(self.bench, behavior, pairs)
            base, answered = self.base.checkpoint(), settings.curve_pass_prompts
            bench = CurveBench(self.bench, base, self.checkpoint, anchor, asked, answered, units, key)
            seeds = range(settings.seed, settings.seed + settings.curve_seeds)
            shares = settings.curve_output_shares
            curves = measure_curves(bench, file, seeds, shares, bool(fresh), settings.seed, self.progress)
            return curves.model_dump(mode="json")

        told = digest([settings.curve_seeds, settings.curve_output_shares, settings.curve_pass_prompts])
        curves = SetCurves.model_validate(units.json(f"{key}-all-{told[:12]}", measure))
        discard_expert(units)
        if not curves.above_controls:
            self.progress.note(f"note: behaviour {behavior.name}: {curves.verdict}")
        return curves

    def _anchor(self, behavior: Behavior, states: States, made: list[int], held_out: list[int]) -> tuple[AnchorRecord, Array]:
        units = self.units(behavior)
        layer = self.settings.anchor_layer or int(units.json("layer", lambda: self._choose(behavior, states, made)))

        def compute() -> dict[str, Any]:
            steer = self._steering(behavior, held_out)
            v = direction(states, layer, made)
            rates = (
                None if steer is None else (steer.best_rate(layer, v, (0.0,)), steer.best_rate(layer, v, STEERING_STRENGTHS))
            )
            vector, record = judge(states, layer, made, held_out, rates, self.settings.seed)
            write_arrays(units.folder / "anchor-file.safetensors", {"vector": vector.astype(np.float32)}, _Unit(anchor=record))
            return record.model_dump(mode="json")

        record = AnchorRecord.model_validate(units.json("anchor", compute))
        vector = read_arrays(units.folder / "anchor-file.safetensors", _Unit)[0]["vector"]
        return record, vector

    def _choose(self, behavior: Behavior, states: States, made: list[int]) -> int:
        """The candidate whose steering raises the base's pass rate most (the deepest of equals), on the vector's own
        prompts.
        """
        candidates = best_layers(states, made)
        steer = self._steering(behavior, made)
        if steer is None:
            return candidates[-1]
        rates = [steer.best_rate(layer, direction(states, layer, made), STEERING_STRENGTHS[-1:]) for layer in candidates]
        return max(zip(rates, candidates, strict=True))[1]

    def _steering(self, behavior: Behavior, prompts: list[int]) -> Steering | None:
        """The steering check on the first of the given prompts, or None where nothing judges answers."""
        count = self.settings.steering_prompts
        if behavior.verifier is None or count == 0:
            return None
        asked = ask(self.bench, behavior, [behavior.pairs[i] for i in prompts[:count]])
        return Steering(self.bench, asked, self.progress)

    # -------------------------------------------------------------------------------------------------------------- arrays
    def _arrays(
        self, screened: dict[str, Array], patched: dict[str, Array], start: Array, scale: float, anchor_layer: int
    ) -> dict[str, Array]:
        arrays: dict[str, Array] = {}
        n = len(start)
        for kind, values in screened.items():
            arrays[f"{kind}.screen"] = values.mean(0) / scale
            arrays[f"{kind}.screen.stderr"] = values.std(0, ddof=1) / np.sqrt(n) / abs(scale)
            mean = np.full(values.shape[1:], np.nan)
            mean[anchor_layer:] = 0.0
            arrays[f"{kind}.sufficiency"], arrays[f"{kind}.sufficiency.stderr"] = mean, mean.copy()
        for name, states in patched.items():
            component = parse_component(name)
            change = (states - start) / scale
            place = (component.layer, component.unit)
            arrays[f"{component.kind}.sufficiency"][place] = change.mean()
            arrays[f"{component.kind}.sufficiency.stderr"][place] = change.std(ddof=1) / np.sqrt(n)
        return {name: array.astype(np.float32) for name, array in arrays.items()}

    def _facts(self, norms: dict[str, Array]) -> dict[str, Array]:
        base = self.base.checkpoint()
        layout, shapes = base.layout, base.shapes
        facts: dict[str, Array] = {f"{kind}.delta_norm": norms[kind] for kind in SCORED_KINDS}
        for kind in SCORED_KINDS:
            counts = [layout.unit_parameters(layer, kind, shapes) for layer in range(self.arch.layers)]
            facts[f"{kind}.parameters"] = np.array(counts, dtype=np.int64)
        return facts


def _topics(behavior: Behavior) -> list[str]:
    return [pair.topic or str(i) for i, pair in enumerate(behavior.pairs)]


def _first_topics(behavior: Behavior, count: int) -> Behavior:
    """The behaviour with the pairs of its first `count` topics."""
    topics = _topics(behavior)
    kept = set(list(dict.fromkeys(topics))[:count])
    pairs = tuple(pair for pair, topic in zip(behavior.pairs, topics, strict=True) if topic in kept)
    return behavior.model_copy(update={"pairs": pairs})
