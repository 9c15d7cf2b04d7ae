"""What the stages that measure will run: their steps and largest passes, counted from behaviours, prompts and settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from mechmerge.behaviors.chat import chat_template_of, render
from mechmerge.behaviors.schema import Behavior
from mechmerge.localize.anchor import STEERING_STRENGTHS, halves
from mechmerge.localize.patching import BATCH_BYTES
from mechmerge.localize.plan import Demand, Plan, Rates, Sizes, Step, free_memory, make_plan, measure_rates
from mechmerge.localize.scoring import ROUTERS
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.models.components import UNIT_KINDS
from mechmerge.models.families import Architecture
from mechmerge.models.load import load_tokenizer

ASSUMED_DEPTH = 0.75
"""Of an anchor whose layer is not chosen yet, as a share of the layers."""
SHARES = 7
"""Points of a set curve."""
ROUND_NODES = 20
"""Most points where the rounds take gradients: five a round, four rounds."""
AUTO_SHARE = 0.1
"""Neurons that `--verify auto` is taken to replace; it may take all of them."""
CANDIDATES = 3
"""Layers that the steering check chooses from."""


class LocalizeOptions(Protocol):
    """The settings of the localize stage that cost depends on."""

    sources: Any
    measures: Any
    output_prompts: int
    anchor_layer: int | None
    verify: int | Literal["auto"]
    top: int
    steering_prompts: int
    curves: bool
    curve_seeds: int
    curve_output_shares: Any
    curve_pass_prompts: int
    batch: int
    dtype: Any
    device: str
    memory: int | None


@dataclass(frozen=True)
class Prompts:
    """A behaviour's prompts as tokens."""

    behavior: Behavior
    asking: list[int]
    """Tokens of each prompt that asks for the behaviour."""
    plain: list[int]
    """Tokens of each prompt that does not."""

    @classmethod
    def of(cls, behavior: Behavior, tokenizer: Any) -> Prompts:
        """Renders and tokenizes all of them."""
        template = chat_template_of(tokenizer, behavior.chat_template)

        def count(texts: Sequence[str]) -> list[int]:
            rendered = [render(tokenizer, text, template) for text in texts]
            return [len(ids) for ids in tokenizer(rendered, add_special_tokens=template is None).input_ids]

        return cls(behavior, count([pair.with_ for pair in behavior.pairs]), count([pair.without for pair in behavior.pairs]))


def plan_localize(base: Checkpoint, behaviors: Sequence[Behavior], settings: LocalizeOptions, *, timed: bool = False) -> Plan:
    """The plan of `localize` for behaviours cut to their prompts.

    Args:
        timed: whether rates are measured (half a second); without, seconds mean nothing.
    """
    tokenizer = load_tokenizer(base.folder)
    found: list[Step] = []
    largest = kept = positions = held = 0
    lengths: list[int] = []
    for behavior in behaviors:
        prompts = Prompts.of(behavior, tokenizer)
        lengths += prompts.asking
        found += _localize_steps(prompts, settings, base.arch)
        _, held_out = halves([pair.topic or str(i) for i, pair in enumerate(behavior.pairs)])
        longest = max(prompts.asking) + (behavior.answer_tokens if "loss" in settings.sources else 0)
        held = max(held, 2 * len(held_out) * longest)
        largest = max(largest, min(settings.batch, len(held_out)) * longest)
        kept = max(kept, sum(prompts.asking), len(held_out) * longest)
        if (
            settings.curves
            or settings.output_prompts
            or "loss" in settings.sources
            or (behavior.verifier is not None and settings.steering_prompts)
        ):
            positions = max(positions, len(held_out), behavior.answer_tokens)
    demand = Demand(graph=largest, kept=kept, positions=positions, held=held, variants=BATCH_BYTES)
    return _finish(base, found, demand, sum(lengths) / max(len(lengths), 1), settings, timed)


def _localize_steps(prompts: Prompts, settings: LocalizeOptions, arch: Architecture) -> list[Step]:
    behavior, name, layers = prompts.behavior, prompts.behavior.name, arch.layers
    mean, answer = sum(prompts.asking) / len(prompts.asking), behavior.answer_tokens
    n = len(halves([pair.topic or str(i) for i, pair in enumerate(behavior.pairs)])[1])
    steps: list[Step] = []
    for source in settings.sources:
        if source == "anchor":
            both = 2 * sum(prompts.asking) + sum(prompts.plain)
            steps.append(Step(f"{name}: states of base and expert", both, reads=3, loads=3))
            if behavior.verifier is not None and settings.steering_prompts:
                tries = 1 + len(STEERING_STRENGTHS) + (0 if settings.anchor_layer else CANDIDATES)
                steps.append(_answers(f"{name}: steering check", tries, min(n, settings.steering_prompts), mean, behavior))
            below = settings.anchor_layer or max(1, round(ASSUMED_DEPTH * layers))
            steps += _source_steps(name, settings, arch, below, n, mean)
            if asked := min(n, settings.output_prompts):
                steps.append(_answers(f"{name}: expert's answers", 1, asked, mean, behavior))
                above = (layers - below) / layers
                patches, half = 3 * (layers - below), above / 2
                tokens = asked * (mean + answer)
                steps.append(Step(f"{name}: output", patches * tokens * half + tokens, reads=patches * half + 1, loads=above))
        else:
            steps.append(_answers(f"{name}: expert's answers", 1, n, mean, behavior))
            steps += _source_steps(f"{name} by loss", settings, arch, layers, n, mean + answer)
        if settings.curves:
            told = name if source == "anchor" else f"{name} by loss"
            steps += _curve_steps(told, settings, below / layers if source == "anchor" else 1.0, n, mean, behavior)
    return steps


def _source_steps(name: str, settings: LocalizeOptions, arch: Architecture, below: int, n: int, mean: float) -> list[Step]:
    """Screening and patching of `n` texts of `mean` tokens below a layer; tokens that prompts share are counted for each."""
    depth = below / arch.layers
    batches = -(-n // settings.batch)
    steps = [Step(f"{name}: screening", 3 * n * mean * depth, again=n * mean * depth, reads=3 * depth, loads=batches * depth)]
    grouped = arch.heads + arch.kv_groups
    if settings.verify == "auto":
        units = below * grouped + AUTO_SHARE * below * arch.neurons
    else:
        units = sum(min(settings.verify, below * arch.units(kind)) for kind in UNIT_KINDS)
        if "activation" in settings.measures and settings.verify:
            units += min(ROUTERS, below) * grouped
    half = (depth + 1 / arch.layers) / 2
    titles = {"sufficiency": "weight patching", "necessity": "knockout", "activation": "activation patching"}
    for measure, title in titles.items():
        if measure == "sufficiency" or measure in settings.measures:
            patches = 3 * below + units
            steps.append(Step(f"{name}: {title}", patches * n * mean * half, reads=patches * half + depth, loads=depth))
    return steps


def _curve_steps(name: str, settings: LocalizeOptions, depth: float, n: int, mean: float, behavior: Behavior) -> list[Step]:
    orders, shares, answer = 2 + settings.curve_seeds, len(settings.curve_output_shares), behavior.answer_tokens
    points = orders * (SHARES - 1) + 2
    outputs = orders * max(shares - 1, 0) + 2
    tokens = n * mean * depth * points + n * (mean + answer) * outputs
    steps = [Step(f"{name}: set curves", tokens, reads=points * depth + outputs, loads=orders * depth)]
    steps.append(_answers(f"{name}: expert's answers to the curves' prompts", 1, n, mean, behavior))
    if behavior.verifier is not None and settings.curve_pass_prompts:
        asked = min(n, settings.curve_pass_prompts)
        steps.append(_answers(f"{name}: curves' pass rates", 1 + 2 * shares, asked, mean, behavior))
    return steps


def _answers(name: str, tries: int, prompts: int, mean: float, behavior: Behavior) -> Step:
    """Answers of `prompts` prompts, all in one batch, `tries` times."""
    answer = behavior.answer_tokens
    return Step(name, tries * prompts * (mean + answer), reads=tries * answer, tokens_one_by_one=tries * answer)


class EffectOptions(Protocol):
    """The settings of effects and rounds that cost depends on."""

    prompts: int
    batch: int
    dtype: Any
    device: str
    memory: int | None


def plan_effects(
    base: Checkpoint,
    experts: int,
    rows: Sequence[tuple[str, Sequence[Behavior]]],
    settings: EffectOptions,
    *,
    timed: bool = False,
) -> Plan:
    """The plan of `effects`, with all nodes that it may take and every prompt answered by its expert.

    Args:
        experts: how many there are.
        rows: (expert, members) of each behaviour.
        timed: whether rates are measured (half a second); without, seconds mean nothing.
    """
    tokenizer = load_tokenizer(base.folder)
    answers: list[Step] = []
    lengths: list[int] = []
    longest = positions = total = 0
    for expert, members in rows:
        for behavior in members:
            each = max(2, settings.prompts // len(members))
            prompts = Prompts.of(behavior.model_copy(update={"pairs": behavior.pairs[:each]}), tokenizer)
            n, mean = len(prompts.asking), sum(prompts.asking) / len(prompts.asking)
            lengths += prompts.asking
            answers.append(_answers(f"{behavior.name}: answers of {expert}", 1, n, mean, behavior))
            total += sum(prompts.asking) + n * behavior.answer_tokens
            longest = max(longest, max(prompts.asking) + behavior.answer_tokens)
            positions = max(positions, n, settings.batch * (behavior.answer_tokens + 1))
    e, nodes = experts, getattr(settings, "max_nodes", ROUND_NODES)
    losses = nodes // 2 + 1 + len({expert for expert, _ in rows})
    batches = -(-len(lengths) // settings.batch)
    point = 1 + e
    steps = [
        *answers,
        Step("losses along the path", losses * total, reads=losses * point, loads=losses * point),
        Step(
            f"effects at {nodes} nodes", nodes * total * (2 + e), again=nodes * total, reads=nodes * 3 * point,
            loads=nodes * point + point,
        ),
    ]  # fmt: skip
    rows_of = min(settings.batch, max(len(lengths), 1))
    demand = Demand(
        graph=rows_of * longest, kept=batches * rows_of * longest, positions=positions, experts=e, whole_deltas=True
    )
    return _finish(base, steps, demand, sum(lengths) / max(len(lengths), 1), settings, timed)


def _finish(
    base: Checkpoint,
    steps: Sequence[Step],
    demand: Demand,
    mean: float,
    settings: LocalizeOptions | EffectOptions,
    timed: bool,
) -> Plan:
    rates = measure_rates(base, settings.dtype, settings.device) if timed else Rates(1.0, 1.0, 1.0)
    limit = free_memory(settings.device) if settings.memory is None else settings.memory
    return make_plan(Sizes.of(base), steps, demand, mean, settings.dtype, settings.batch, limit, rates)
