"""The localize stage: what carries each behaviour of one expert, measured on an anchor, on the loss of its answers, or both.

Work is divided into units that are written when they are done (a behaviour's states, its anchor, its screening, the
patches of each layer, each point of its set curves), so an interrupted call goes on where it stopped and ends with the
same file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from mechmerge.artifacts import Units, lock
from mechmerge.behaviors.schema import Behavior
from mechmerge.behaviors.verifiers import check_verifier
from mechmerge.errors import InputError, LocalizeError, PairError
from mechmerge.localize.anchoring import AnchorFinder, topics_of
from mechmerge.localize.bench import Bench
from mechmerge.localize.localization import Localization, Pair
from mechmerge.localize.plan_steps import plan_localize
from mechmerge.localize.settings import NAMED, LocalizeSettings, score_file
from mechmerge.localize.stream import open_bench
from mechmerge.models.components import SCORED_KINDS
from mechmerge.models.deltas import delta_norms
from mechmerge.models.pair import align, check_pair
from mechmerge.models.references import Model, unchanged
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
    with lock(out / ".lock", f"score files in {out}"):
        return _Localizer(base, expert, out, settings, progress).run(behaviors)


class _Localizer:
    """One call of `localize`: the bench is loaded only when a unit needs it."""

    def __init__(self, base: Model, expert: Model, out: Path, settings: LocalizeSettings, progress: Progress) -> None:
        self.base, self.expert, self.out, self.settings, self.progress = base, expert, out, settings, progress
        self._bench: Bench | None = None
        self.behaviors: list[Behavior] = []
        self.checkpoint = expert.checkpoint()
        self.arch = base.checkpoint().arch
        self.check = unchanged(base, expert)

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
        return Units(self.out / ".units", inputs, self.check)

    def run(self, given: Sequence[Behavior]) -> list[Path]:
        """The score files of all behaviours."""
        self.behaviors = behaviors = used(given, self.settings)
        finder = AnchorFinder(self.base, self.checkpoint, self.bench, self.units, self.settings, self.progress)
        if "anchor" in self.settings.sources:
            finder.prepare(behaviors)
        norms = self.units(behaviors[0]).arrays("norms", lambda: delta_norms(self.base.checkpoint(), self.checkpoint))
        pair = Pair(self.base, self.expert, self.bench, self._facts(norms), self.settings, self.progress)
        paths = []
        for behavior, whole in zip(behaviors, given, strict=True):
            for source in self.settings.sources:
                one = Localization(pair, behavior, whole, self.units(behavior))
                file = one.by_anchor(finder, self.out / "anchors") if source == "anchor" else one.by_loss()
                path = self.out / score_file(behavior.name, source)
                self.check()
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


def used(behaviors: Sequence[Behavior], settings: LocalizeSettings) -> list[Behavior]:
    """The behaviours with the pairs that are used."""
    return [_first_topics(behavior, 2 * settings.prompts) for behavior in behaviors]


def _first_topics(behavior: Behavior, count: int) -> Behavior:
    """The behaviour with the pairs of its first `count` topics."""
    topics = topics_of(behavior)
    kept = set(list(dict.fromkeys(topics))[:count])
    pairs = tuple(pair for pair, topic in zip(behavior.pairs, topics, strict=True) if topic in kept)
    return behavior.model_copy(update={"pairs": pairs})
