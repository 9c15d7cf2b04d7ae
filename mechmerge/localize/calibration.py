"""Calibration: a value of every behaviour that falls where it gains, and its gradient, at any point between the models. Here
it is the loss on its expert's own verified answers; localize/anchor_calibration.py has the state along the anchor.

A point is base + Σ_e c_e ∘ δ_e, with one coefficient for every head, KV group and neuron of every expert and one for all
the rest of an expert. Everything that is computed is a unit: written when it is done, and read when it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from mechmerge.artifacts import MOST_SEED, Document, Units, digest
from mechmerge.behaviors.chat import chat_template_of, render
from mechmerge.behaviors.generation import generate
from mechmerge.behaviors.schema import Behavior
from mechmerge.behaviors.verifiers import check_verifier, verify
from mechmerge.errors import InputError, LocalizeError
from mechmerge.localize.anchor import halves
from mechmerge.localize.anchoring import topics_of
from mechmerge.localize.bench import Batch, Bench
from mechmerge.localize.effect_file import EFFECT_KINDS, Tokens
from mechmerge.localize.gradients import DeltaProbe
from mechmerge.localize.plan import Plan
from mechmerge.localize.plan_steps import plan_effects
from mechmerge.localize.scores import AnchorRecord
from mechmerge.localize.settings import ScoreSource
from mechmerge.localize.stream import open_bench
from mechmerge.models.components import OUTSIDE, UNIT_KINDS, Block
from mechmerge.models.deltas import delta_of
from mechmerge.models.pair import PositionRule, VocabularyRule, align, check_pair
from mechmerge.models.references import Model, unchanged
from mechmerge.progress import SILENT, Progress
from mechmerge.versions import versions

Array = np.ndarray
BASE = "base"
"""Who answers for a protected behaviour; no expert may be called so."""
DELTAS_KEPT = 16
"""Tensors whose deltas are kept where the model is streamed: about a layer's."""


class CalibrationSettings(Document):
    """What effects and rounds are measured with."""

    prompts: int = Field(default=48, ge=4)
    """Calibration prompts a behaviour (shared equally by a group's members)."""
    batch: int = Field(default=16, ge=1)
    """Examples a forward pass with gradients."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    device: str = "cpu"
    memory: int | None = Field(default=None, ge=1)
    """Bytes that may be used; what is free when None. Below what the whole model takes, its layers are streamed from disk,
    which changes no score.
    """
    tokens: Tokens = "all"
    """Which tokens of an answer its loss is the mean over."""
    seed: int = Field(default=0, ge=0, le=MOST_SEED)
    vocabulary: VocabularyRule = "same"
    positions: PositionRule = "same"


@dataclass(frozen=True)
class BehaviorRow:
    """A row of the matrix: a behaviour, or a group of behaviours whose mean it is."""

    name: str
    members: tuple[Behavior, ...]
    expert: str
    """The expert that answers for it, or `base`: a behaviour of the base's own, which a merge is to leave as it is."""
    weight: float = 1.0

    @property
    def protected(self) -> bool:
        """Whether its answers are the base's own, so that no expert gains on it."""
        return self.expert == BASE


@dataclass(frozen=True)
class Example:
    """A prompt, with an expert's answer where the metric needs one, tokenized."""

    row: int
    member: int
    half: int
    """0 or 1: which half of the calibration prompts it belongs to (by topic)."""
    prompt: tuple[int, ...]
    answer: tuple[int, ...] = ()
    topic: str = ""
    """What the prompt is about; examples of one topic are no independent ones. Empty: a topic of its own."""


@dataclass(frozen=True)
class Passes:
    """Batches that run through the same layers, and what is read there."""

    stop: int
    """Layers that run."""
    examples: list[list[int]]
    """Numbers of the examples in each batch."""
    batches: list[Batch]
    value: Callable[[int, torch.Tensor], torch.Tensor]
    """(number of a batch, its residual stream after `stop` layers [B, T, D]) → the value of each of its examples, [B]."""


@dataclass(frozen=True)
class Point:
    """A point between the models."""

    rest: tuple[float, ...]
    """Each expert's coefficient for all that `units` does not tell of."""
    units: Mapping[str, Array] | None = None
    """head, kv, neuron → float32 [experts, layers, units]."""

    @property
    def key(self) -> str:
        """Name of the point's units."""
        told = {kind: array.tobytes().hex() for kind, array in sorted((self.units or {}).items())}
        return digest([[f"{c:.9f}" for c in self.rest], told])[:16]

    def between(self, other: Point, t: float) -> Point:
        """The point at t (0 here, 1 there) of the straight path to another one with the same kinds."""
        rest = tuple((1 - t) * a + t * b for a, b in zip(self.rest, other.rest, strict=True))
        if self.units is None or other.units is None:
            return Point(rest)
        mixed = {k: ((1 - t) * self.units[k] + t * other.units[k]).astype(np.float32) for k in self.units}
        return Point(rest, mixed)


def rows_of(rows: Sequence[BehaviorRow]) -> list[tuple[str, tuple[Behavior, ...]]]:
    """(expert, members) of each row, as plans are made of."""
    return [(row.expert, row.members) for row in rows]


class Calibration:
    """The calibration of one base, its experts and behaviours.

    Args:
        base: the base model.
        experts: experts by name, in the order in which a recipe sums them.
        rows: the behaviours.
        folder: where the units are kept.
        settings: see `CalibrationSettings`.
        progress: told of every unit.

    Raises:
        InputError: no behaviours, or one of an expert that is not given.
        PairError: the models cannot be compared.
    """

    metric: ClassVar[ScoreSource] = "loss"

    def __init__(
        self,
        base: Model,
        experts: Mapping[str, Model],
        rows: Sequence[BehaviorRow],
        folder: Path,
        settings: CalibrationSettings,
        progress: Progress = SILENT,
    ) -> None:
        if not rows:
            raise InputError("effects", expected="at least one behaviour NAME=EXPERT", found="none")
        for names in ([row.name for row in rows], *([member.name for member in row.members] for row in rows)):
            if twice := sorted({name for name in names if names.count(name) > 1}):
                raise InputError("behaviours", expected="each name once", found=f"{twice[0]} twice")
        if BASE in experts:
            raise InputError("EXPERT", expected=f"another name than {BASE!r}", found=BASE, fix="write NAME=EXPERT")
        for row in rows:
            if not (np.isfinite(row.weight) and row.weight > 0):
                raise InputError(f"weight of {row.name}", expected="a positive number", found=str(row.weight))
            if row.protected and self.metric != "loss":
                raise InputError(f"protected behaviour {row.name}", expected="the metric loss", found=self.metric)
            if not row.protected and row.expert not in experts:
                raise InputError(f"behaviour {row.name}", expected=f"an expert of {', '.join(experts)}", found=row.expert)
            for member in row.members:
                if member.verifier is not None:
                    check_verifier(member.verifier)
        # Aligned copies are measured under the identities of the experts that were given: a recipe aligns them again.
        self.experts = {n: Model(id=e.id, path=align(base, e, settings.vocabulary).path) for n, e in experts.items()}
        for expert in self.experts.values():
            check_pair(base.checkpoint(), expert.checkpoint(), positions=settings.positions)
        self.base, self.rows, self.settings, self.progress = base, rows, settings, progress
        self.checkpoint = base.checkpoint()
        self.opened = {name: expert.checkpoint() for name, expert in self.experts.items()}
        self.inputs: dict[str, Any] = {
            "base": base.id.shards,
            # A list: the order of the experts is a dimension of the tensors, and digests do not see the order of a mapping.
            "experts": [[name, expert.id.shards] for name, expert in experts.items()],
            "rows": [[row.name, row.expert, [member.digest for member in row.members]] for row in rows],
            "settings": {name: getattr(settings, name) for name in CalibrationSettings.model_fields if name != "memory"},
            "sides": base.sides,
            "versions": versions(),
            "threads": torch.get_num_threads(),
        }
        self.check = unchanged(base, *self.experts.values())
        """Raises where a model's files are no longer those that were measured."""
        self.units = Units(folder, self.inputs, self.check)
        self.asked: dict[int, int] = {}
        """Prompts asked, by row."""
        self._deltas: dict[str, list[torch.Tensor | None]] = {}

    def discard(self) -> None:
        """Removes the units, once what they are for is written."""
        self.units.discard()

    def anchors_of(self, row: int) -> dict[str, AnchorRecord]:
        """The anchor of each member of a row, where the metric has one."""
        return {}

    @cached_property
    def bench(self) -> Bench:
        """The model whose weights are moved about; loaded when a unit is missing."""
        return open_bench(self.base, self.settings.dtype, self.settings.device, self.plan)

    @cached_property
    def plan(self) -> Plan:
        """Whether the model is streamed."""
        return plan_effects(self.checkpoint, len(self.experts), rows_of(self.rows), self.settings)

    def point(self, coefficient: float, only: str | None = None) -> Point:
        """One coefficient for everything of all experts, or of one of them alone."""
        return Point(tuple(coefficient if only in (None, name) else 0.0 for name in self.experts))

    # ------------------------------------------------------------------------------------------------------------- answers
    @cached_property
    def examples(self) -> list[Example]:
        """The experts' verified answers to the calibration prompts.

        Raises:
            LocalizeError: an expert has no answer that passes its behaviour's verifier.
        """
        asked = self.asked
        found: list[Example] = []
        for r, row in enumerate(self.rows):
            each = max(2, self.settings.prompts // len(row.members))
            for m, member in enumerate(row.members):
                pairs = member.pairs[:each]
                split = halves(topics_of(member.model_copy(update={"pairs": pairs})))
                asked[r] = asked.get(r, 0) + len(pairs)
                kept = self.units.json(f"answers-{digest([row.name, member.name])[:12]}", partial(self._ask, r, m))
                for index, prompt, answer in kept:
                    found.append(Example(r, m, int(index in split[1]), tuple(prompt), tuple(answer), pairs[index].topic or ""))
                for half in (0, 1):
                    if not any((e.row, e.member, e.half) == (r, m, half) for e in found):
                        raise LocalizeError(
                            f"behaviour {row.name}",
                            expected=f"answers of {row.expert} to {member.name} that pass, in both halves of the prompts",
                            found=f"0 of {len(split[half])} in half {half + 1}",
                            fix="use more prompts, or leave the behaviour out",
                        )
        self._model = None
        return found

    def _ask(self, r: int, m: int) -> list[Any]:
        """The expert's greedy answers that pass, as [index of the prompt, prompt tokens, answer tokens]."""
        row, member = self.rows[r], self.rows[r].members[m]
        pairs = member.pairs[: max(2, self.settings.prompts // len(row.members))]
        tokenizer = self.bench.tokenizer
        template = chat_template_of(tokenizer, member.chat_template)
        texts = [render(tokenizer, pair.with_, template) for pair in pairs]
        answers = generate(
            self._expert(row.expert),
            tokenizer,
            texts,
            max_new_tokens=member.answer_tokens,
            special_tokens=template is None,
            progress=self.progress,
            label=f"answers of {row.expert} to {member.name}",
        )
        kept = []
        for i, (pair, text, answer) in enumerate(zip(pairs, texts, answers, strict=True)):
            if member.verifier is None or verify(member.verifier, pair.with_, answer.text, pair.arguments):
                prompt = tokenizer(text, add_special_tokens=template is None).input_ids
                ending = [] if answer.end is None else [answer.end]
                kept.append([i, prompt, [*answer.ids, *ending]])
        return kept

    def _expert(self, name: str) -> Any:
        if getattr(self, "_loaded", None) != name:
            model = self.base if name == BASE else self.experts[name]
            self._model = open_bench(model, self.settings.dtype, self.settings.device, self.plan).module
            self._loaded = name
        return self._model

    # ---------------------------------------------------------------------------------------------------------------- loss
    def batches(self, examples: Sequence[int]) -> list[list[int]]:
        """Examples in batches of nearly equal lengths."""
        told = self.examples
        order = sorted(examples, key=lambda i: (len(told[i].prompt) + len(told[i].answer), i))
        size = self.settings.batch
        return [order[i : i + size] for i in range(0, len(order), size)]

    def passes(self) -> list[Passes]:
        """What is run at a point: every example once, in batches that stop where its value is read."""
        batches, encoded = self._encoded()
        shares: list[torch.Tensor | None] = [None] * len(batches)
        if self.token_shares is not None:
            for number, (batch, (_, labels)) in enumerate(zip(batches, encoded, strict=True)):
                share = torch.zeros(labels.shape)
                for row, i in enumerate(batch):
                    own = torch.from_numpy(self.token_shares[i])
                    share[row, labels.shape[1] - len(own) :] = own
                shares[number] = share.to(labels.device)

        def value(i: int, residual: torch.Tensor) -> torch.Tensor:
            return self.bench.answer_losses(*encoded[i], residual, shares[i])

        return [Passes(self.checkpoint.arch.layers, batches, [batch for batch, _ in encoded], value)]

    def _encoded(self) -> tuple[list[list[int]], list[tuple[Batch, torch.Tensor]]]:
        """Numbers of the examples in each batch, and the batches with their labels."""
        told, batches = self.examples, self.batches(range(len(self.examples)))
        return batches, [self.bench.encode_answers([(told[i].prompt, told[i].answer) for i in batch]) for batch in batches]

    @cached_property
    def token_shares(self) -> list[Array] | None:
        """The share of every token in the loss of its answer, [tokens] float32 with the sum 1 each; None: all alike.

        Where tokens are `contested`: in proportion to max(0, log p of the answer's own model − the least log p of the base and
        the other experts), all alike where no token is. Most of an answer's tokens follow from those before them under any of
        the models; a greedy answer of the merge keeps to its own expert or leaves it at the few that do not (ours; choosing
        tokens by the excess of one model's loss over another's is https://arxiv.org/abs/2404.07965).
        """
        if self.settings.tokens == "all":
            return None
        told = {BASE: self._token_losses(self.point(0.0), "the base")}
        told |= {name: self._token_losses(self.point(1.0, name), name) for name in self.experts}
        shares = []
        for i, example in enumerate(self.examples):
            own = self.rows[example.row].expert
            worst = np.max([losses[i] for name, losses in told.items() if name != own], axis=0)
            stake = np.maximum(worst - told[own][i], 0)
            share = stake / stake.sum() if stake.sum() > 0 else np.full(stake.shape, 1 / stake.size)
            shares.append(share.astype(np.float32))
        return shares

    def _token_losses(self, point: Point, label: str) -> list[Array]:
        """The loss of every answer token of every example at a point, float64 [tokens] each."""
        lengths = [len(example.answer) for example in self.examples]

        def compute() -> dict[str, Array]:
            batches, encoded = self._encoded()
            self._move(point)
            found = [np.zeros(length) for length in lengths]
            with torch.no_grad():
                for i, residual in enumerate(
                    self.bench.residuals([batch for batch, _ in encoded], self.checkpoint.arch.layers)
                ):
                    losses = self.bench.token_losses(*encoded[i], residual).double().cpu().numpy()
                    for row, number in enumerate(batches[i]):
                        found[number] = losses[row, losses.shape[1] - lengths[number] :]
                    self.progress.advance(len(batches[i]))
            return {"losses": np.concatenate(found)}

        self.progress.start(f"tokens at {label}", len(lengths))
        told = self.units.arrays(f"tokens-{point.key}", compute)["losses"]
        self.progress.end()
        return np.split(told, np.cumsum(lengths)[:-1])

    def _deltas_of(self, name: str) -> list[torch.Tensor | None]:
        if name not in self._deltas:
            if self.plan.streamed and len(self._deltas) >= DELTAS_KEPT:
                self._deltas.clear()
            found = [delta_of(self.checkpoint, expert, name) for expert in self.opened.values()]
            self._deltas[name] = [None if d is None else d.to(self.bench.module.dtype) for d in found]
        return self._deltas[name]

    def _move(self, point: Point) -> None:
        """Sets the weights to base + Σ c ∘ δ."""
        owners = self._owners

        def read(name: str) -> torch.Tensor:
            own = self.checkpoint.tensor(name).float()
            value = own
            for e, checkpoint in enumerate(self.opened.values()):
                if not point.rest[e] and point.units is None:
                    continue
                delta = checkpoint.tensor(name).float() - own
                if point.units is None:
                    value = value + point.rest[e] * delta
                    continue
                moved = delta * point.rest[e]
                for layer, kind, block in owners.get(name, ()):
                    if layer >= 0 and kind in UNIT_KINDS and block.dim is not None:
                        part = _units_of(moved, block)
                        shape = [1] * part.dim()
                        shape[block.dim] = block.units
                        part.copy_(_units_of(delta, block) * torch.from_numpy(point.units[kind][e, layer]).view(shape))
                value = value + moved
            return value

        self.bench.load(read)

    @cached_property
    def _owners(self) -> dict[str, list[tuple[int, str, Block]]]:
        return self.checkpoint.layout.owners()

    def losses(self, point: Point, label: str) -> Array:
        """Value of every example at a point, float64 [n]: what falls where its behaviour gains, in the metric's unit."""

        def compute() -> dict[str, Array]:
            self._move(point)
            values = np.zeros(len(self.examples))
            with torch.no_grad():
                for part in self.passes():
                    for i, residual in enumerate(self.bench.residuals(part.batches, part.stop)):
                        values[part.examples[i]] = part.value(i, residual).double().cpu().numpy()
                        self.progress.advance(len(part.examples[i]))
            return {"loss": values}

        _ = self.token_shares  # a step of progress of its own, and steps do not nest
        self.progress.start(f"{self.metric} at {label}", len(self.examples))
        result: Array = self.units.arrays(f"loss-{point.key}", compute)["loss"]
        self.progress.end()
        return result

    def gradients(self, point: Point, label: str) -> dict[str, Array]:
        """−⟨∂value/∂θ, δ⟩ of every example at a point: kind → float32 [E, n, layers, units]; positive helps, and components
        that a value does not depend on have exactly 0.
        """
        arch = self.checkpoint.arch

        def compute() -> dict[str, Array]:
            self._move(point)
            shapes = {kind: (1, 1) if kind in OUTSIDE else (arch.layers, arch.units(kind)) for kind in EFFECT_KINDS}
            n, experts = len(self.examples), len(self.experts)
            found = {kind: np.zeros((experts, n, *shape), np.float32) for kind, shape in shapes.items()}
            for part in self.passes():
                with DeltaProbe(self.bench, self._deltas_of, experts, below=part.stop) as probe:
                    self.bench.backward(part.batches, part.stop, partial(self._told, part), probe.turn)
                    for i, numbers in enumerate(part.examples):
                        for (layer, kind), values in probe.take(i).items():
                            found[kind][:, numbers, max(layer, 0)] = -values.numpy()
            return found

        _ = self.token_shares
        self.progress.start(f"effects at {label}", len(self.examples))
        result = self.units.arrays(f"node-{point.key}", compute)
        self.progress.end()
        return result

    def _told(self, part: Passes, i: int, residual: torch.Tensor) -> torch.Tensor:
        self.progress.advance(len(part.examples[i]))
        return part.value(i, residual)

    def weights(self, half: int | None = None) -> Array:
        """[R, n]: a row is the mean of its members, a member the mean of its examples (of one half, if told)."""
        examples, rows = self.examples, self.rows
        weights = np.zeros((len(rows), len(examples)))
        for r in range(len(rows)):
            members: dict[int, list[int]] = {}
            for i, example in enumerate(examples):
                if example.row == r and half in (None, example.half):
                    members.setdefault(example.member, []).append(i)
            for own in members.values():
                weights[r, own] = 1 / len(members) / len(own)
        return weights


def _units_of(tensor: torch.Tensor, block: Block) -> torch.Tensor:
    """A block's units as a view: the dimension that is cut becomes [units], the parts of a unit the last one."""
    part = tensor.narrow(block.dim or 0, block.offset, (block.units - 1) * block.stride + block.width)
    return part.unfold(block.dim or 0, block.width, block.stride)
