"""Settings of the localize stage. No torch: pipelines are checked with them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mechmerge.artifacts import MOST_SEED, Document
from mechmerge.localize.curve_sets import OUTPUT_SHARES, Shares
from mechmerge.localize.roles import RoleThresholds
from mechmerge.models.pair import PositionRule, VocabularyRule

ScoreSource = Literal["anchor", "loss"]
Measure = Literal["sufficiency", "necessity", "activation"]
MEASURES: tuple[Measure, ...] = ("sufficiency", "necessity", "activation")
CALLED: dict[str, str] = {
    "sufficiency": "weight patching",
    "necessity": "knockout",
    "activation": "activation patching",
}
"""What readers know each measure as."""
_CURVES = ("curves", "curve_seeds", "curve_output_shares", "curve_pass_prompts")
NAMED = (
    "sources",
    "integrate",
    "measures",
    "verify",
    "top",
    "confidence",
    "roles",
    "output_prompts",
    "on_invalid",
    "memory",
    *_CURVES,
)
"""Settings whose units are named by what they hold, so that changing them keeps everything else."""


class LocalizePlan(Document):
    """What a pipeline may say of localization."""

    sources: tuple[ScoreSource, ...] = ("anchor",)
    """What scores are measured on: the `anchor`; the `loss` of the expert's own answers (all layers, no anchor needed)."""
    anchor_layer: int | None = Field(default=None, ge=1)
    """The anchor's layer; chosen by validity when None."""
    integrate: int = Field(default=0, ge=0, le=64)
    """Steps of the path from base to expert that screening is averaged over; 0 screens at the base (localize/path.py)."""
    measures: tuple[Measure, ...] = MEASURES
    """Beside the screen: `sufficiency` (weight patching, always measured), `necessity` (knockout), `activation` (patching)."""
    verify: int | Literal["auto"] = 16
    """Best heads, KV groups and neurons (each) by screening that are really replaced; `auto` goes on until the `top` best are
    known at the stated confidence. Modules and layers always are, and the heads and KV groups of the attentions that pass on
    most.
    """
    top: int = Field(default=8, ge=1)
    """Heads, KV groups and neurons (each) that `auto` looks for."""
    confidence: float = Field(default=0.9, gt=0, lt=1)
    """Confidence that `auto` stops at."""
    roles: RoleThresholds = RoleThresholds()
    """What counts as high and low where components are given roles."""
    prompts: int = Field(default=12, ge=2)
    """Topics in each half: those that make the anchor, and those that validity and scores are measured on."""
    steering_prompts: int = Field(default=8, ge=0)
    """Held-out prompts answered in the steering check; 0 leaves it out."""
    output_prompts: int = Field(default=6, ge=0)
    """Held-out prompts on which modules after the anchor are judged by the output; 0 leaves that out."""
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
    dtype: Literal["float32", "bfloat16"] = "float32"


class LocalizeSettings(LocalizePlan):
    """All settings of the localize stage."""

    batch: int = Field(default=4, ge=1)
    """Prompts a forward pass with gradients."""
    device: str = "cpu"
    memory: int | None = Field(default=None, ge=1)
    """Bytes that may be used; what is free when None. Below what the whole model takes, its layers are streamed from disk,
    which changes no score.
    """
    seed: int = Field(default=0, ge=0, le=MOST_SEED)
    vocabulary: VocabularyRule = "same"
    positions: PositionRule = "same"


def loss_of_rounds(metric: object) -> object:
    """The metric of the rounds, which is the loss.

    Raises:
        ValueError: another.
    """
    if metric != "loss":
        raise ValueError(
            f"{metric!r}: rounds are measured on the loss alone, since they settle all components by what the output says; "
            "`effects` can be measured on the anchor"
        )
    return metric


def score_file(behavior: str, source: ScoreSource) -> str:
    """Name of the score file of a behaviour."""
    return f"{behavior}.safetensors" if source == "anchor" else f"{behavior}.loss.safetensors"
