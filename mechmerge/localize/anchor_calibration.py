"""Calibration on anchors: −s(θ; x)/gap along the anchor of each prompt's behaviour in the expert that answers for it.

The state s is that of weight patching (arXiv 2604.13694 §III-B), the gap the anchor's own: between expert and base on prompts
that did not make the vector (localize/anchor.py). What such a value loses on the way from the base is recovery: 0 at the base,
1 at the expert alone. Using it across experts and behaviours is ours. No answer is needed, and the layers from the anchor on
do not run: components there have exactly 0.

Topics are divided into two halves, as `localize` does: one makes the vector, and only prompts of the other are measured.
Where a row has several members, each has an anchor of its own, mostly at another layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field

from mechmerge.artifacts import Units
from mechmerge.behaviors.schema import Behavior
from mechmerge.errors import InputError, LocalizeError
from mechmerge.localize.anchor import halves
from mechmerge.localize.anchoring import AnchorFinder, topics_of
from mechmerge.localize.asked import ask
from mechmerge.localize.bench import Bench
from mechmerge.localize.calibration import BehaviorRow, Calibration, CalibrationSettings, Example, Passes
from mechmerge.localize.measure import Anchor
from mechmerge.localize.plan import Plan
from mechmerge.localize.plan_steps import plan_anchor_effects
from mechmerge.localize.scores import AnchorRecord
from mechmerge.localize.settings import LocalizeSettings, ScoreSource
from mechmerge.localize.stage import used
from mechmerge.models.references import Model
from mechmerge.progress import SILENT, Progress

ANCHOR_TOPICS = 12
"""Topics in each half that an anchor is found on, at least, where there are so many; as `localize` has them."""


class AnchorCalibrationSettings(CalibrationSettings):
    """What a calibration that may be on anchors is measured with."""

    metric: ScoreSource = "loss"
    """`loss` of the experts' own answers (all components), or their state along the `anchor` (components below it)."""
    on_invalid: Literal["refuse", "report"] = "refuse"
    """What happens when an anchor fails its validity check: an error, or a file that says so."""
    steering_prompts: int = Field(default=8, ge=0)
    """Prompts answered in an anchor's steering check; 0 leaves it out."""
    anchor_layer: int | None = Field(default=None, ge=1)
    """The layer of every anchor; chosen by validity when None."""


class Member(NamedTuple):
    """A behaviour of a row, as it is used here."""

    expert: str
    behavior: Behavior
    """With the prompts that its anchor is found on."""
    measured: list[int]
    """Numbers of the prompts that are measured: of the half that does not make the vector."""


def members_of(rows: Sequence[BehaviorRow], prompts: int) -> dict[tuple[int, int], Member]:
    """The members of rows by (row, number).

    Args:
        rows: the behaviours.
        prompts: calibration prompts that are measured of each, shared equally by its members.
    """
    found = {}
    for r, row in enumerate(rows):
        each = max(2, prompts // len(row.members))
        cut = used(row.members, LocalizeSettings(prompts=max(each, ANCHOR_TOPICS)))
        for m, behavior in enumerate(cut):
            found[r, m] = Member(row.expert, behavior, halves(topics_of(behavior))[1][:each])
    return found


class Found(NamedTuple):
    """The anchor of a member."""

    record: AnchorRecord
    anchor: Anchor


class AnchorCalibration(Calibration):
    """A calibration whose values are states along anchors.

    Args: see `Calibration`.

    Raises:
        InputError: two behaviours of one name for one expert, and what `Calibration` raises.
        PairError: the models cannot be compared.
    """

    metric: ClassVar[ScoreSource] = "anchor"
    settings: AnchorCalibrationSettings

    def __init__(
        self,
        base: Model,
        experts: Mapping[str, Model],
        rows: Sequence[BehaviorRow],
        folder: Path,
        settings: AnchorCalibrationSettings,
        progress: Progress = SILENT,
    ) -> None:
        if settings.tokens != "all":
            raise InputError("tokens", expected="all: states along anchors have no answers", found=settings.tokens)
        super().__init__(base, experts, rows, folder, settings, progress)
        self.settings = settings
        layers = self.checkpoint.arch.layers
        if settings.anchor_layer is not None and settings.anchor_layer > layers:
            raise LocalizeError("anchor layer", expected=f"1 … {layers}", found=str(settings.anchor_layer))
        told = {name: getattr(settings, name) for name in ("steering_prompts", "anchor_layer")}
        self.inputs |= {"metric": self.metric, "anchors": told}
        self.units = Units(folder, self.inputs, self.check)
        self._folder = folder
        self.members = members_of(rows, settings.prompts)
        for name in experts:
            of = {b.name: b.digest for b in self._behaviors(name)}
            for behavior in self._behaviors(name):
                if of[behavior.name] != behavior.digest:
                    raise InputError(f"behaviours of {name}", expected="each name once", found=f"{behavior.name} twice")

    @cached_property
    def plan(self) -> Plan:
        """Whether the model is streamed."""
        return plan_anchor_effects(self.checkpoint, len(self.experts), list(self.members.values()), self.settings)

    # ------------------------------------------------------------------------------------------------------------ anchors
    def _behaviors(self, expert: str) -> list[Behavior]:
        """The behaviours that an expert answers for, each once."""
        return list({one.behavior.digest: one.behavior for one in self.members.values() if one.expert == expert}.values())

    def _anchor_units(self, expert: str, behavior: Behavior) -> Units:
        """Where the units of an anchor are kept."""
        return Units(self._folder, [self.inputs, expert, behavior.digest], self.check)

    def _base(self) -> Bench:
        return self.bench

    @cached_property
    def anchors(self) -> dict[tuple[int, int], Found]:
        """The anchor of every member (row, number). Found before any weight is moved, so the bench is the base.

        Raises:
            LocalizeError: fewer than four topics, an anchor that is not valid where such are refused, or one without a gap.
        """
        found: dict[tuple[int, int], Found] = {}
        for expert, checkpoint in self.opened.items():
            behaviors = self._behaviors(expert)
            units = partial(self._anchor_units, expert)
            finder = AnchorFinder(self.base, checkpoint, self._base, units, self.settings, self.progress)
            finder.prepare(behaviors)
            for behavior in behaviors:
                record, vector = finder.find(behavior)
                one = Found(record, Anchor(record.layer, torch.from_numpy(vector).to(self.settings.device)))
                same = [at for at, own in self.members.items() if own[:2] == (expert, behavior)]
                found |= dict.fromkeys(same, one)
        self._judge(found)
        return found

    def _judge(self, found: Mapping[tuple[int, int], Found]) -> None:
        for (r, m), (record, _) in sorted(found.items()):
            row = self.rows[r]
            where = f"behaviour {row.name}, expert {row.expert}"
            said = f"{row.members[m].name}: the anchor at layer {record.layer} is not valid: {'; '.join(record.reasons)}"
            if not record.gap_low > 0:
                # A gap that may be 0 cannot be divided by, and states in two units cannot be summed.
                raise LocalizeError(where, expected="expert and base apart along the anchor", found=said,
                                    fix="leave the behaviour out, use more prompts, or --metric loss")  # fmt: skip
            if not record.valid and self.settings.on_invalid == "refuse":
                raise LocalizeError(where, expected="valid anchors", found=said,
                                    fix="use --invalid-anchor report to measure all the same, or --metric loss")  # fmt: skip
            if not record.valid:
                self.progress.note(f"note: {where}: {said}")

    def anchors_of(self, row: int) -> dict[str, AnchorRecord]:
        """The anchor of each member of a row."""
        members = self.rows[row].members
        return {members[m].name: found.record for (r, m), found in self.anchors.items() if r == row}

    def discard(self) -> None:
        """Removes the units, those of the anchors too."""
        for expert in self.experts:
            for behavior in self._behaviors(expert):
                self._anchor_units(expert, behavior).discard()
        super().discard()

    # ----------------------------------------------------------------------------------------------------------- examples
    @cached_property
    def examples(self) -> list[Example]:
        """The prompts that are measured: none of them made its behaviour's vector.

        Raises:
            LocalizeError: see `anchors`.
        """
        ready = self.anchors
        found: list[Example] = []
        for (r, m), (expert, behavior, measured) in self.members.items():
            self.asked[r] = self.asked.get(r, 0) + ready[r, m].record.prompts + len(measured)
            units = self._anchor_units(expert, behavior)
            tokens = units.json(f"prompts-{len(measured)}", partial(self._tokens, behavior, measured))
            topics = topics_of(behavior)
            _, second = halves([topics[i] for i in measured])
            about = [behavior.pairs[i].topic or "" for i in measured]
            found += [Example(r, m, int(i in second), tuple(ids), topic=about[i]) for i, ids in enumerate(tokens)]
        return found

    def _tokens(self, behavior: Behavior, measured: Sequence[int]) -> Any:
        return ask(self.bench, behavior, [behavior.pairs[i] for i in measured]).prompts(self.bench)

    # -------------------------------------------------------------------------------------------------------------- values
    def passes(self) -> list[Passes]:
        """Batches of one anchor's prompts each, those of one layer together: they run up to their anchor."""
        by_layer: dict[int, list[tuple[Found, list[int]]]] = {}
        for (r, m), found in self.anchors.items():
            own = [i for i, example in enumerate(self.examples) if (example.row, example.member) == (r, m)]
            by_layer.setdefault(found.record.layer, []).extend((found, batch) for batch in self.batches(own))
        return [self._pass(layer, told) for layer, told in sorted(by_layer.items())]

    def _pass(self, layer: int, told: Sequence[tuple[Found, list[int]]]) -> Passes:
        run = [self.bench.batch([self.examples[i].prompt for i in batch]) for _, batch in told]

        def value(i: int, residual: torch.Tensor) -> torch.Tensor:
            record, anchor = told[i][0]
            return -anchor.state(residual) / record.gap

        return Passes(layer, [batch for _, batch in told], run, value)
