"""The record of set curves: what moving the best components does, beside random and magnitude sets of the same size.

Shares are of the components below the anchor (heads, KV groups and neurons). The x axis of every area is the share of
components, linear from 0 to 1, so a lift is the mean advantage over all sizes, in the units of recovery. Recovery beyond the
expert's own state earns no lift: the components that push furthest along a direction carry the state past the expert, which
is not the expert's behaviour. Whether the output comes nearer to the expert's as well is judged apart, by KL divergence.
"""

from __future__ import annotations

from typing import Literal

from mechmerge.artifacts import Document

MIN_TOPICS = 6
"""Least topics for a verdict: with five, chance alone puts the score order ahead on all of them once in 32 times."""
PAST = 0.2
"""Recovery above 1 by more than this is said in the verdict."""


class CurvePoint(Document):
    """The base with one set of the expert's components moved in."""

    share: float
    """Share of all components below the anchor that was asked for, 0 … 1 (0 is the base)."""
    components: int
    """Heads, KV groups and neurons moved: the share rounded, at least one."""
    parameters: int
    """Parameters of those components; the same at one share for every order."""
    recovery: float | None
    """Mean recovery of the state (0 base, 1 expert), or its mean raw change where the curves' scale is `difference`; None
    where it was not measured.
    """
    kl: float | None
    """KL(expert ‖ patched) of the next-token distribution over the expert's own answers, nats per token; None where not
    measured.
    """
    pass_rate: float | None
    """Share of the patched model's answers that the behaviour's verifier passes, 0 … 1; None where not measured."""


class Lift(Document):
    """An advantage of the score order over a control, with its 95 % interval."""

    value: float
    low: float
    high: float


class SetCurve(Document):
    """One order of the components, and the points at growing shares of it."""

    order: Literal["score", "random", "magnitude"]
    """`score`: by the score file. `random` and `magnitude` (largest delta norm first): controls, filled kind by kind to the
    score set's counts.
    """
    seed: int | None
    """Seed of a random order; None for the others."""
    points: tuple[CurvePoint, ...]
    """By growing share, from 0 to 1; at 1 all orders are the same set."""


class SetCurves(Document):
    """The curves of one expert and behaviour, and whether the scores find more than their controls do."""

    curves: tuple[SetCurve, ...]
    """The score order first, then the random ones, then the magnitude order."""
    scale: Literal["recovery", "difference"]
    """Units of recovery and lifts: `difference` (raw change of the state) where the gap on the curves' own prompts, or the
    score file's, is not above 0.
    """
    lift: float
    """Area between the score curve of recovery and the mean of the random ones, over share 0 … 1 (linear); on each prompt,
    recovery counts up to the expert's own.
    """
    lift_low: float
    """Lower end of the lift's 95 % interval: paired bootstrap over topics, and how far one more random order would lie off."""
    lift_high: float
    """Upper end of the same."""
    magnitude_lift: float
    """The same against the magnitude curve."""
    magnitude_lift_low: float
    """Lower end of its 95 % interval (paired bootstrap over topics)."""
    magnitude_lift_high: float
    """Upper end of the same."""
    above_controls: bool
    """Both lower ends are above 0, on at least `MIN_TOPICS` topics, and there is a gap to recover (`scale` is `recovery`).
    Where it is False the localization shows no more than its controls and is labelled so.
    """
    kl_lift: Lift | None = None
    """KL of the random sets less that of the score's, mean over the shares below 1 where KL was measured, nats per token:
    above 0 where the score's sets bring the output nearer to the expert's. None where KL was not measured there.
    """
    magnitude_kl_lift: Lift | None = None
    """The same against the magnitude order."""
    prompts: int
    """Prompts that recovery and KL are measured on; none of them made the anchor."""
    topics: int
    """Topics of those prompts, which the bootstrap draws."""
    unseen: bool
    """Whether no score was measured on these prompts either; where False, they are the ones that ordered the components,
    which flatters the score order.
    """
    base_kl: float | None
    """KL(expert ‖ base) over the expert's own answers, nats per token; None where not measured."""
    base_pass_rate: float | None
    """Pass rate of the base's answers; None where not measured."""
    expert_pass_rate: float | None
    """Pass rate of the expert's answers to the same prompts; None where not measured."""

    @property
    def output_behind(self) -> tuple[str, ...]:
        """Controls whose sets bring the output as near to the expert's as the score's do, by KL; empty where not measured."""
        named = {"random sets": self.kl_lift, "the largest deltas": self.magnitude_kl_lift}
        return tuple(name for name, lift in named.items() if lift is not None and lift.low <= 0)

    @property
    def label(self) -> str:
        """The verdict in a few words."""
        if not self.above_controls:
            return "NOT ABOVE ITS CONTROLS"
        return "above its controls on the anchor's state ONLY" if self.output_behind else "above its controls"

    @property
    def doubt(self) -> str | None:
        """The label where it is not good news, as captions write it; None where the output is above its controls as well."""
        return self.label.lower() if self.output_behind or not self.above_controls else None

    @property
    def verdict(self) -> str:
        """The label with its figures, in one line: what stands wherever the localization is shown."""
        gap = "" if self.scale == "recovery" else " (no gap between expert and base to recover)"
        few = f" (only {self.topics} topics, {MIN_TOPICS} are needed)" if self.topics < MIN_TOPICS else ""
        seen = "" if self.unseen else ", on the prompts that ordered the components"
        peak = max((point.recovery or 0.0 for point in self.curves[0].points), default=0.0)
        past = f"; passes the expert's state by {peak - 1:.2f}" if self.scale == "recovery" and peak > 1 + PAST else ""
        behind = self.output_behind
        output = f"; output NOT nearer to the expert's than with {' and '.join(behind)}" if behind else ""
        if self.kl_lift is not None and not behind:
            output = "; output nearer to the expert's as well"
        return (
            f"{self.label}{gap}{few}: lift {self.lift:.3f} ({self.lift_low:.3f} … {self.lift_high:.3f}) over random sets, "
            f"{self.magnitude_lift:.3f} ({self.magnitude_lift_low:.3f} … {self.magnitude_lift_high:.3f}) over the largest "
            f"deltas{seen}{past}{output}"
        )
