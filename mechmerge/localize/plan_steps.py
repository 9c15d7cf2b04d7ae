"""What the stages that measure will run: their steps and largest passes, counted from behaviours, prompts and settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mechmerge.behaviors.chat import chat_template_of, render
from mechmerge.behaviors.schema import Behavior
from mechmerge.localize.anchor import STEERING_STRENGTHS, halves
from mechmerge.localize.anchoring import topics_of
from mechmerge.localize.curve_sets import SHARES
from mechmerge.localize.patching import BATCH_BYTES, token_bytes
from mechmerge.localize.plan import Demand, Plan, Rates, Sizes, Step, free_memory, make_plan, measure_rates
from mechmerge.localize.scoring import ROUTERS
from mechmerge.localize.settings import LocalizeSettings
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.models.load import load_tokenizer

ASSUMED_DEPTH = 0.75
"""Of an anchor whose layer is not chosen yet, as a share of the layers."""
AUTO = 4
"""Components that `--verify auto` is assumed to replace for each that it looks for."""
SHORT_NODES = 5
"""Points at which effects from the sum take gradients: where they start, and four along the short path."""
ROUND_NODES = 20
"""Most points where the rounds take gradients: five a round, four rounds."""
CANDIDATES = 3
"""Layers that the steering check chooses from."""
PUSHES = max(CANDIDATES, 1 + len(STEERING_STRENGTHS))
"""Answers to a prompt in one batch of the steering check, at most."""


@dataclass(frozen=True)
class Prompts:
    """A behaviour's prompts as tokens."""

    behavior: Behavior
    asking: list[int]
    """Tokens of each prompt that asks for the behaviour."""
    plain: list[int]
    """Tokens of each prompt that does not."""
    shared: int
    """Tokens that all those that ask begin with."""

    @classmethod
    def of(cls, behavior: Behavior, tokenizer: Any) -> Prompts:
        """Renders and tokenizes all of them."""
        template = chat_template_of(tokenizer, behavior.chat_template)

        def encode(texts: Sequence[str]) -> list[list[int]]:
            rendered = [render(tokenizer, text, template) for text in texts]
            ids: list[list[int]] = tokenizer(rendered, add_special_tokens=template is None).input_ids
            return ids

        asking, plain = (encode([getattr(p, side) for p in behavior.pairs]) for side in ("with_", "without"))
        # What the first and the last in order share, all share.
        first, last = min(asking), max(asking)
        shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        return cls(behavior, [len(ids) for ids in asking], [len(ids) for ids in plain], shared)

    @property
    def mean(self) -> float:
        """Mean tokens of a prompt that asks."""
        return sum(self.asking) / len(self.asking)

    @property
    def held_out(self) -> int:
        """How many of them scores are measured on."""
        return len(halves(topics_of(self.behavior))[1])


def plan_localize(base: Checkpoint, behaviors: Sequence[Behavior], settings: LocalizeSettings, *, timed: bool = False) -> Plan:
    """The plan of `localize` for behaviours cut to their prompts.

    Args:
        timed: whether rates are measured (half a second); without, seconds mean nothing.
    """
    tokenizer = load_tokenizer(base.folder)
    found: list[Step] = []
    demands: list[Demand] = []
    lengths: list[int] = []
    for behavior in behaviors:
        prompts = Prompts.of(behavior, tokenizer)
        lengths += prompts.asking
        found += _Localization(prompts, settings, base).steps()
        answered = behavior.answer_tokens if "loss" in settings.sources else 0
        n, longest = prompts.held_out, max(prompts.asking) + answered
        steered = PUSHES * min(n, settings.steering_prompts)
        says = settings.curves or settings.output_prompts or "loss" in settings.sources
        demands.append(
            Demand(
                graph=min(settings.batch, n) * longest,
                kept=max(sum(prompts.asking), n * longest),
                positions=max(n, steered, behavior.answer_tokens + 1) if says or behavior.verifier is not None else 0,
                together=max(BATCH_BYTES // token_bytes(base.arch), n * longest),
                runs=2 * n * longest,
            )
        )
    largest = Demand(**{key: max(getattr(demand, key) for demand in demands) for key in vars(demands[0])})
    return _finish(base, found, largest, sum(lengths) / len(lengths), settings, timed)


class _Localization:
    """The steps of one behaviour."""

    def __init__(self, prompts: Prompts, settings: LocalizeSettings, base: Checkpoint) -> None:
        self.prompts, self.settings, self.arch = prompts, settings, base.arch
        self.behavior, self.n = prompts.behavior, prompts.held_out

    def steps(self) -> Iterator[Step]:
        settings, prompts, name, layers = self.settings, self.prompts, self.behavior.name, self.arch.layers
        if "anchor" in settings.sources:
            both = 2 * sum(prompts.asking) + sum(prompts.plain)
            yield Step(f"{name}: states of base and expert", both, reads=3, loads=3)
            if self.behavior.verifier is not None and settings.steering_prompts:
                yield from _steering(name, settings.anchor_layer, min(self.n, settings.steering_prompts), prompts)
            depth = (settings.anchor_layer or max(1, round(ASSUMED_DEPTH * layers))) / layers
            yield from self._scores("anchor", depth, 0)
            if settings.output_prompts:
                asked = min(self.n, settings.output_prompts)
                yield _answers(f"{name}: expert's answers on the output", 1, asked, prompts)
                patches = round(3 * (1 - depth) * layers)
                yield self._patches(f"{name}: output after the anchor", patches, asked, depth, 1, self.behavior.answer_tokens)
        if "loss" in settings.sources:
            yield _answers(f"{name}: expert's answers", 1, self.n, prompts)
            yield from self._scores("loss", 1.0, self.behavior.answer_tokens)

    def _scores(self, source: str, depth: float, answer: int) -> Iterator[Step]:
        settings, n, layers, arch = self.settings, self.n, self.arch.layers, self.arch
        name, length = f"{self.behavior.name} on the {source}", self.prompts.mean + answer
        tokens, batches = n * length * depth, -(-n // settings.batch)
        yield Step(f"{name}: screening", 3 * tokens, again=tokens, reads=3 * depth, loads=batches * depth)
        verified = 3 * (AUTO * settings.top if settings.verify == "auto" else settings.verify)
        routers = min(ROUTERS, layers) * (arch.heads + arch.kv_groups) if verified and "activation" in settings.measures else 0
        patches = round(3 * depth * layers) + verified + routers
        for measure in dict.fromkeys(("sufficiency", *settings.measures)):
            yield self._patches(f"{name}: {measure}", patches, n, 0.0, depth, answer)
        if settings.curves:
            yield from self._curves(name, depth, answer)

    def _patches(self, name: str, count: int, n: int, start: float, stop: float, answer: int) -> Step:
        """Single patches spread evenly over the layers between two depths, each run from its layer to the end."""
        variant = self.prompts.shared + n * (self.prompts.mean + answer - self.prompts.shared)
        layers = max(1, round((stop - start) * self.arch.layers))
        half = (stop - start + 1 / self.arch.layers) / 2
        passes = layers * -(-count // (layers * max(1, int(BATCH_BYTES // (token_bytes(self.arch) * variant)))))
        return Step(name, count * variant * half, reads=2 * (passes * half + layers / self.arch.layers), loads=stop - start)

    def _curves(self, name: str, depth: float, answer: int) -> Iterator[Step]:
        settings, n, said = self.settings, self.n, self.behavior.answer_tokens
        orders, shares = 2 + settings.curve_seeds, len(settings.curve_output_shares)
        points, outputs = orders * (len(SHARES) - 1) + 2, orders * max(shares - 1, 0) + 2
        tokens = n * (self.prompts.mean + answer) * depth * points + n * (self.prompts.mean + said) * outputs
        yield Step(f"{name}: set curves", tokens, reads=points * depth + outputs, loads=orders * depth)
        yield _answers(f"{name}: expert's answers on the curves", 1, n, self.prompts)
        if self.behavior.verifier is not None and settings.curve_pass_prompts:
            asked = min(n, settings.curve_pass_prompts)
            yield _answers(f"{name}: curves' pass rates", 1 + 2 * shares, asked, self.prompts)


def _answers(name: str, times: int, asked: int, prompts: Prompts, pushes: int = 1) -> Step:
    """Answers to so many prompts, under so many pushes, all in one batch, so many times."""
    answer = prompts.behavior.answer_tokens
    return Step(
        name, times * pushes * asked * (prompts.mean + answer), reads=times * answer, tokens_one_by_one=times * answer
    )  # fmt: skip


def _steering(name: str, layer: int | None, asked: int, prompts: Prompts) -> list[Step]:
    """The steering check, and before it the choice of the layer where none is given."""
    check = _answers(f"{name}: steering check", 1, asked, prompts, 1 + len(STEERING_STRENGTHS))
    return [check] if layer else [_answers(f"{name}: steering for the layer", 1, asked, prompts, CANDIDATES), check]


class EffectOptions(Protocol):
    """The settings of effects and rounds that cost depends on."""

    prompts: int
    batch: int
    dtype: Any
    device: str
    memory: int | None
    tokens: Any


def _most_nodes(settings: EffectOptions) -> tuple[int, int]:
    """Points at which gradients are taken at most, a halved interval's two being given up for four; and ends of intervals."""
    if getattr(settings, "origin", "base") == "sum":
        return SHORT_NODES, SHORT_NODES // 2 + 1
    kept: int | None = getattr(settings, "max_nodes", None)
    if kept is None:
        return ROUND_NODES, ROUND_NODES // 2 + 1
    halved = (kept - 6) // 2
    return 6 + 4 * halved, 4 + halved


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
            n = len(prompts.asking)
            lengths += prompts.asking
            answers.append(_answers(f"{behavior.name}: answers of {expert}", 1, n, prompts))
            total += sum(prompts.asking) + n * behavior.answer_tokens
            longest = max(longest, max(prompts.asking) + behavior.answer_tokens)
            positions = max(positions, n, settings.batch * (behavior.answer_tokens + 1))
    e, (nodes, ends) = experts, _most_nodes(settings)
    losses = ends + len({expert for expert, _ in rows}) + getattr(settings, "check", 0)
    losses += 1 + experts if settings.tokens == "contested" else 0
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


def plan_anchor_effects(
    base: Checkpoint,
    experts: int,
    members: Sequence[tuple[str, Behavior, Sequence[int]]],
    settings: EffectOptions,
    *,
    timed: bool = False,
) -> Plan:
    """The plan of `effects` on anchors, with all nodes that it may take.

    Args:
        experts: how many there are.
        members: (expert, behaviour with the prompts its anchor is found on, numbers of those that are measured).
        timed: whether rates are measured (half a second); without, seconds mean nothing.
    """
    tokenizer, layers = load_tokenizer(base.folder), base.arch.layers
    chosen, steering = getattr(settings, "anchor_layer", None), getattr(settings, "steering_prompts", 0)
    steps: list[Step] = []
    lengths: list[int] = []
    depth = (chosen or max(1, round(ASSUMED_DEPTH * layers))) / layers
    longest = positions = states = batches = 0
    for expert, behavior, measured in members:
        prompts = Prompts.of(behavior, tokenizer)
        own = [prompts.asking[i] for i in measured]
        both = 2 * sum(prompts.asking) + sum(prompts.plain)
        steps.append(Step(f"{behavior.name} of {expert}: states of base and expert", both, reads=3, loads=3))
        asked = 0 if behavior.verifier is None else min(len(prompts.asking) - len(own), steering)
        if asked:
            steps += _steering(f"{behavior.name} of {expert}", chosen, asked, prompts)
            positions = max(positions, PUSHES * asked, behavior.answer_tokens)
        lengths += own
        batches += -(-len(own) // settings.batch)
        longest = max(longest, max(prompts.asking) + (behavior.answer_tokens if asked else 0))
        states = max(states, sum(prompts.asking), sum(prompts.plain))
    (nodes, ends), point, total = _most_nodes(settings), 1 + experts, sum(lengths)
    values = ends + len({expert for expert, _, _ in members})
    steps += [
        Step("states along the path", values * total * depth, reads=values * point * depth, loads=values * point),
        Step(
            f"effects at {nodes} nodes", nodes * total * (2 + experts) * depth, again=nodes * total * depth,
            reads=nodes * 3 * point * depth, loads=nodes * point + point,
        ),
    ]  # fmt: skip
    rows = min(settings.batch, max(len(lengths), 1))
    demand = Demand(
        graph=rows * longest, kept=max(batches * rows * longest, states), positions=positions, experts=experts,
        whole_deltas=True,
    )  # fmt: skip
    return _finish(base, steps, demand, total / max(len(lengths), 1), settings, timed)


def _finish(
    base: Checkpoint,
    steps: Sequence[Step],
    demand: Demand,
    mean: float,
    settings: LocalizeSettings | EffectOptions,
    timed: bool,
) -> Plan:
    rates = measure_rates(base, settings.dtype, settings.device) if timed else Rates(1.0, 1.0, 1.0)
    limit = free_memory(settings.device) if settings.memory is None else settings.memory
    return make_plan(Sizes.of(base), steps, demand, mean, settings.dtype, settings.batch, limit, rates)
