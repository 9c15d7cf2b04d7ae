"""What each planted component really contributes: the truth that rankings are held against.

A component's cost is the loss that the expert's behaviour takes when the component is put back to the base's weights, averaged
over when that happens: planted components are reverted one after the other in random orders, each order also backwards (the
Shapley value, sampled; https://doi.org/10.1016/j.cor.2008.04.004). Reverting one alone would call two that do the same work
idle. Costs of one order add up to the whole gain of what was planted. They are nats a token of right answers, on prompts that
neither anchor nor scores use, so the truth shares no measurement with what it judges.

Positive: costs at least `SHARE` of an even share of the gain. Planted but below it: idle, left out. Everything else is
negative, except a distractor that costs as much when it is reverted alone: it came to serve the behaviour, and is left out too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from benchmarks.planted.training import Tokens
from mechmerge.localize.bench import Bench
from mechmerge.models.components import Component

Array = np.ndarray
SHARE = 0.25
"""Least cost of a positive, as a share of gain / number planted."""


def loss(bench: Bench, examples: Sequence[Tokens]) -> float:
    """Mean over examples of the answer's negative log-likelihood, nats a token."""
    batch, labels = bench.encode_answers(examples)
    with torch.no_grad():
        return float(bench.answer_losses(batch, labels).mean())


def costs(
    bench: Bench,
    examples: Sequence[Tokens],
    expert: Mapping[str, torch.Tensor],
    planted: Sequence[Component],
    pairs: int,
    seed: int,
) -> tuple[Array, Array]:
    """Sampled Shapley costs of reverting the planted components of the expert, [planted], and their standard errors.

    Args:
        bench: the base; it holds the same weights afterwards.
        examples: prompts with right answers.
        expert: its tensors that differ from the base.
        planted: the components, none twice.
        pairs: random orders, each also taken backwards.
        seed: of the orders.
    """
    draw = np.random.default_rng(seed)
    orders = [order for _ in range(pairs) for order in _both(draw.permutation(len(planted)))]
    found = np.zeros((len(orders), len(planted)))
    base = {name: bench.parameters[name].detach().clone() for name in expert}
    try:
        for row, order in zip(found, orders, strict=True):
            _set(bench, expert.__getitem__, expert)
            before = loss(bench, examples)
            for place in order:
                _revert(bench, planted[place], base)
                after = loss(bench, examples)
                row[place], before = after - before, after
    finally:
        _set(bench, base.__getitem__, expert)
    by_pair = found.reshape(pairs, 2, len(planted)).mean(1)
    return found.mean(0), by_pair.std(0, ddof=1) / np.sqrt(pairs) if pairs > 1 else np.full(len(planted), np.nan)


def alone(
    bench: Bench, examples: Sequence[Tokens], expert: Mapping[str, torch.Tensor], components: Sequence[Component]
) -> Array:
    """What reverting each component of the expert costs while all others stay, [components]; the bench holds the base."""
    base = {name: bench.parameters[name].detach().clone() for name in expert}
    found = []
    try:
        _set(bench, expert.__getitem__, expert)
        before = loss(bench, examples)
        for component in components:
            with bench.patched(bench.checkpoint.layout.component_blocks(component), base.__getitem__):
                found.append(loss(bench, examples) - before)
    finally:
        _set(bench, base.__getitem__, expert)
    return np.array(found)


def _both(order: Array) -> tuple[Array, Array]:
    return order, order[::-1]


def least(cost: Array) -> float:
    """The least cost of a positive, from the costs of all that was planted."""
    return SHARE * float(cost.sum()) / len(cost)


def _set(bench: Bench, source: Callable[[str], torch.Tensor], names: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name in names:
            bench.parameters[name].copy_(source(name))


def _revert(bench: Bench, component: Component, base: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for block, unit in bench.checkpoint.layout.component_blocks(component):
            target = bench.parameters[block.tensor]
            where = tuple(block.indices(unit or 0) if d == block.dim else slice(None) for d in range(target.dim()))
            target[where] = base[block.tensor][where]
