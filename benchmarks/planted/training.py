"""Masked training: only the slices of chosen components move, by equal norms, each ready to act without the others.

Each step leaves out a random half of the components (they are the base's in that step, and get no gradient), as dropout does
with activations (https://jmlr.org/papers/v15/srivastava14a.html): without it one component does all the work and the others
idle, and components come to need each other.

The first half of the steps is free; then the norm of each component's change is held at one value for its kind (projected after
every step): the median of the free norms, or the value given. So nothing can be told from a change's size.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mechmerge.localize.bench import Bench
from mechmerge.models.components import Block, Component, Layout
from mechmerge.models.deltas import square_sums

Tokens = tuple[Sequence[int], Sequence[int]]
"""Token ids of a prompt and of its answer."""
Chosen = dict[tuple[int, str], list[int]]
"""(layer, kind) → units"""


@dataclass(frozen=True)
class Settings:
    """How an expert is trained."""

    steps: int
    batch: int
    rate: float
    """Largest learning rate of AdamW (no weight decay); a tenth of the steps warm up, then it falls linearly."""
    dropped: float = 0.5
    """Chance of each component to be the base's in a step."""
    autocast: bool = False
    """Whether products are made in bfloat16."""


@dataclass(frozen=True)
class Trained:
    """Changes of some components."""

    values: dict[str, torch.Tensor]
    """By tensor: the new values where the components' mask is true, in its order."""
    norms: dict[str, float]
    """By kind: the norm of every component's change."""
    losses: tuple[float, ...]
    """Nats a token, each step."""


def grouped(components: Iterable[Component]) -> Chosen:
    """Heads, KV groups or neurons by layer and kind."""
    found: Chosen = {}
    for component in sorted(components):
        found.setdefault((component.layer, component.kind), []).append(component.unit)
    return found


def masks(layout: Layout, shapes: Mapping[str, tuple[int, ...]], components: Iterable[Component]) -> dict[str, torch.Tensor]:
    """For each tensor that the components own a part of: true where they do."""
    found: dict[str, torch.Tensor] = {}
    for component in components:
        for block, unit in layout.component_blocks(component):
            mask = found.setdefault(block.tensor, torch.zeros(shapes[block.tensor], dtype=torch.bool))
            for u in range(block.units) if unit is None else (unit,):
                mask[_where(mask, block, u)] = True
    return found


def _where(tensor: torch.Tensor, block: Block, unit: int) -> tuple[slice, ...]:
    return tuple(block.indices(unit) if d == block.dim else slice(None) for d in range(tensor.dim()))


def norms(layout: Layout, changes: Mapping[str, torch.Tensor], chosen: Chosen) -> dict[tuple[int, str], torch.Tensor]:
    """Frobenius norm of each chosen unit's change, by (layer, kind)."""
    return {
        (layer, kind): torch.stack([square_sums(changes[block.tensor], block) for block in layout.blocks(layer, kind)])
        .sum(0)[units]
        .sqrt()
        for (layer, kind), units in chosen.items()
    }


def equalise(layout: Layout, changes: Mapping[str, torch.Tensor], chosen: Chosen, wanted: Mapping[str, float]) -> None:
    """Rescales each chosen unit's change in place to the norm of its kind; a change of norm 0 stays."""
    for (layer, kind), now in norms(layout, changes, chosen).items():
        factors = torch.where(now > 0, wanted[kind] / now.clamp(min=1e-30), torch.ones_like(now))
        for block in layout.blocks(layer, kind):
            for unit, factor in zip(chosen[layer, kind], factors, strict=True):
                changes[block.tensor][_where(changes[block.tensor], block, unit)] *= factor


def train(
    bench: Bench,
    components: Sequence[Component],
    examples: Sequence[Tokens],
    settings: Settings,
    wanted: Mapping[str, float] | None = None,
) -> Trained:
    """Trains the components alone, from the weights on the bench, which holds the same weights again afterwards.

    Args:
        bench: the base.
        components: heads, KV groups or neurons that may move.
        examples: prompts and answers; the loss is over answers alone. They are taken in turns.
        settings: see `Settings`.
        wanted: the norm of a component's change, by kind; the median of the freely trained ones by default.
    """
    layout, chosen = bench.checkpoint.layout, grouped(components)
    mask = masks(layout, bench.checkpoint.shapes, components)
    before = {name: bench.parameters[name].detach().clone() for name in mask}
    moving = [bench.parameters[name].requires_grad_(True) for name in mask]
    optimizer = torch.optim.AdamW(moving, lr=settings.rate, weight_decay=0.0)
    turns, losses, draw = itertools.cycle(examples), [], random.Random(0)
    try:
        for step in range(settings.steps):
            warm = min(1.0, (step + 1) / (0.1 * settings.steps))
            optimizer.param_groups[0]["lr"] = settings.rate * warm * (1 - step / settings.steps)
            dropped = [component for component in components if draw.random() < settings.dropped]
            units = [(layer, kind, units) for (layer, kind), units in grouped(dropped).items()]
            with bench.patched_units(units, before.__getitem__):
                losses.append(_step(bench, [next(turns) for _ in range(settings.batch)], settings))
            off = masks(layout, bench.checkpoint.shapes, dropped)
            for name in mask:
                kept = mask[name] & ~off[name] if name in off else mask[name]
                gradient = bench.parameters[name].grad
                assert gradient is not None
                gradient.mul_(kept)
            torch.nn.utils.clip_grad_norm_(moving, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step + 1 >= settings.steps / 2:
                with torch.no_grad():
                    changes = {name: (bench.parameters[name] - before[name]) * mask[name] for name in mask}
                    wanted = wanted or _medians(layout, changes, chosen)
                    equalise(layout, changes, chosen, wanted)
                    for name in mask:
                        bench.parameters[name].copy_(before[name] + changes[name])
        values = {name: bench.parameters[name].detach()[mask[name]].clone() for name in mask}
        return Trained(values, dict(wanted or {}), tuple(losses))
    finally:
        for name, parameter in zip(mask, moving, strict=True):
            parameter.requires_grad_(False)
            parameter.grad = None
            parameter.copy_(before[name])


def _step(bench: Bench, examples: Sequence[Tokens], settings: Settings) -> float:
    """One backward pass; the mean loss in nats a token."""
    batch, labels = bench.encode_answers(examples)
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.autocast):
        logits = bench.answer_logits(batch, labels)
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)
    loss.backward()
    return float(loss.detach())


def _medians(layout: Layout, changes: Mapping[str, torch.Tensor], chosen: Chosen) -> dict[str, float]:
    """Median norm of the changes, by kind."""
    found: dict[str, list[float]] = {}
    for (_, kind), values in norms(layout, changes, chosen).items():
        found.setdefault(kind, []).extend(values.tolist())
    return {kind: float(np.median(values)) for kind, values in found.items()}


def installed(bench: Bench, parts: Iterable[tuple[Sequence[Component], Mapping[str, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """The tensors of an expert that differ from the base on the bench: base + the changes of every part.

    Args:
        bench: the base.
        parts: components, none twice, with their values as in `Trained`.
    """
    tensors: dict[str, torch.Tensor] = {}
    for components, values in parts:
        for name, mask in masks(bench.checkpoint.layout, bench.checkpoint.shapes, components).items():
            tensor = tensors.setdefault(name, bench.parameters[name].detach().clone())
            tensor[mask] = values[name]
    return tensors
