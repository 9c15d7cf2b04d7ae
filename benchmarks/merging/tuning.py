"""The control of equal information: the sum of the experts, fine-tuned on the very answers that the policies measure.

All weights are trained by AdamW (https://arxiv.org/abs/1711.05101) on the weighted loss that rounds lower
(localize/rounds.py), as long as measuring took. Cost is counted in forward-equivalents (tokens through all layers, over those
of the examples), as localize/effects.py does: at a node a policy takes 1 forward, 1 backward to the activations and a product
with the deltas of each of E experts, 2 + E; where only losses are looked at, 1. A step of training takes 1 forward and 2
backward (activations, weights); AdamW's own work on the weights, and the choice of the step size on the develop split, are not
charged, which is in its favour.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mechmerge.artifacts import atomic_folder
from mechmerge.localize.effect_file import PATHS, EffectMetadata, Tokens
from mechmerge.localize.effects import FIRST_INTERVALS
from mechmerge.localize.rounds_file import RoundsMetadata
from mechmerge.models.adapters import copy_side_files
from mechmerge.models.load import load_model, load_tokenizer, quiet
from mechmerge.progress import SILENT, Progress, track

BATCH = 16
NODES_A_ROUND = 5
"""Points at which a round takes gradients: where it starts, and four on the way to what it proposes."""
TRAINING_COST = 3
"""Forward-equivalents of an example in a step."""


class Cost(NamedTuple):
    """What a measurement took, in passes of examples."""

    nodes: int
    """Examples that went forward and backward."""
    points: int
    """Examples that went forward alone."""
    experts: int

    @property
    def forward(self) -> int:
        """Forward-equivalents, in examples."""
        return self.nodes * (2 + self.experts) + self.points


class Sample(NamedTuple):
    """An answer to be learned."""

    prompt: Sequence[int]
    answer: Sequence[int]
    weight: float
    """Of its loss; the weights of all samples have the mean 1."""
    shares: Sequence[float] | None = None
    """Of every token of the answer in its loss, with the sum 1; all alike when None."""


def cost_of_effects(metadata: EffectMetadata) -> Cost:
    """The cost of an effect matrix: its nodes, and losses at the ends of all intervals and at each expert.

    From the base there are two nodes an interval, and those of the intervals that were halved, which the file no longer names:
    every halving makes one interval more of the first ones. From the sum there are four, and one where the proposal is made.
    """
    examples, experts = sum(b.answers for b in metadata.behaviors), len(metadata.experts)
    intervals = len(metadata.nodes) // 2
    from_base = metadata.path == PATHS["base"]
    halved = max(0, intervals - (len(FIRST_INTERVALS) - 1)) if from_base else 0
    nodes = len(metadata.nodes) + (2 * halved if from_base else 1)
    # From the sum losses are told at both ends of the path and at the base; from the base, at the ends of each interval.
    points = (intervals + 1 if from_base else 3) + experts + _weighing(metadata.tokens, experts)
    return Cost(nodes * examples, points * examples, experts)


def cost_of_rounds(metadata: RoundsMetadata, max_rounds: int) -> Cost:
    """The cost of rounds: their nodes, and the losses of the base, the experts, the sum, and where each round ends.

    Where fewer rounds are told than were allowed, and the last one was kept, one more was begun in which nothing agreed: it is
    charged whole, though it costs one node alone where nothing was proposed.

    Args:
        metadata: of the rounds file.
        max_rounds: the rounds that were allowed.
    """
    examples, experts, rounds = sum(b.answers for b in metadata.behaviors), len(metadata.experts), len(metadata.rounds)
    untold = rounds < max_rounds and all(told.accepted for told in metadata.rounds)
    nodes = (rounds + untold) * NODES_A_ROUND
    points = 2 + experts + rounds + _weighing(metadata.tokens, experts)
    return Cost(nodes * examples, points * examples, experts)


def _weighing(tokens: Tokens, experts: int) -> int:
    """Losses of every token, at the base and at each expert, that say which are contested."""
    return 1 + experts if tokens == "contested" else 0


def steps_of(cost: Cost, batch: int = BATCH) -> int:
    """Steps of training that cost as much, rounded up."""
    return math.ceil(cost.forward / (TRAINING_COST * batch))


def batches(examples: int, steps: int, batch: int, seed: int) -> list[list[int]]:
    """Which examples each step takes: every example once before any is taken again, in an order that is drawn anew."""
    generator, queue = random.Random(seed), list[int]()
    made: list[list[int]] = []
    for _ in range(steps):
        taken: list[int] = []
        while len(taken) < min(batch, examples):
            if not queue:
                queue = list(range(examples))
                generator.shuffle(queue)
            taken.append(queue.pop())
        made.append(taken)
    return made


def tune(
    start: Path,
    base: Path,
    samples: Sequence[Sample],
    out: Path,
    *,
    steps: int,
    rate: float,
    batch: int = BATCH,
    seed: int = 0,
    progress: Progress = SILENT,
) -> dict[str, Any]:
    """Trains a model on samples and saves it in bf16 to `out`; returns what was done.

    Args:
        start: folder of the model that training starts from.
        base: folder that tokenizer, template and generation settings are copied from.
        samples: what is learned.
        out: folder of the trained model; it appears whole or not at all.
        steps: of AdamW, without weight decay; a tenth of them warm up, then the step size falls linearly to 0.
        rate: largest step size.
        batch: samples a step.
        seed: of the order of the samples.
        progress: told of every step.
    """
    model, pad = load_model(start).train().requires_grad_(True), load_tokenizer(start).pad_token_id
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    warm = max(1, steps // 10)
    losses: list[float] = []
    plan = batches(len(samples), steps, batch, seed)
    for step, taken in track(enumerate(plan), f"fine-tuning at {rate:g}", steps, progress):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / warm) * (1 - step / steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = weighted_loss(model, [samples[i] for i in taken], pad)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 5))
    with quiet(), atomic_folder(out) as partial:
        model.eval().to(torch.bfloat16).save_pretrained(partial)
        copy_side_files(base, partial)
    passes = sum(map(len, plan))
    return {"steps": steps, "batch": batch, "rate": rate, "examples forward and backward": passes,
            "forward-equivalents": TRAINING_COST * passes, "loss": losses}  # fmt: skip


def weighted_loss(model: Any, samples: Sequence[Sample], pad: int) -> torch.Tensor:
    """Mean of the samples' losses, nats per answer token (by its shares), each times its weight."""
    width = max(len(s.prompt) + len(s.answer) for s in samples)
    ids = torch.full((len(samples), width), pad)
    labels = torch.full((len(samples), width), -100)
    shares = torch.zeros((len(samples), width))
    mask = torch.zeros((len(samples), width), dtype=torch.long)
    for i, sample in enumerate(samples):
        start, end = len(sample.prompt), len(sample.prompt) + len(sample.answer)
        ids[i, :end] = torch.tensor([*sample.prompt, *sample.answer])
        labels[i, start:end] = torch.tensor(sample.answer)
        shares[i, start:end] = 1 / len(sample.answer) if sample.shares is None else torch.tensor(list(sample.shares))
        mask[i, :end] = 1
    logits = model(ids, attention_mask=mask).logits[:, :-1]
    told = labels[:, 1:]
    per_token = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), told.flatten(), reduction="none", ignore_index=-100
    ).view(told.shape)
    each = (per_token * shares[:, 1:]).sum(1)
    weights = torch.tensor([sample.weight for sample in samples])
    return (each * weights).mean()
