"""The effect matrix: what every component of every expert does to every behaviour.

For a behaviour with loss ℓ (negative log-likelihood of its expert's own answers, nats per answer token) and the straight
path θ(t) from the base to base + Σ_e δ_e, the integrated gradient ∫₀¹ −⟨∂ℓ/∂θ_c at θ(t), δ_{e,c}⟩ dt is component c's
share of the drop in loss; over all experts and components the shares add up to the whole drop (completeness: Sundararajan
et al. 2017, https://arxiv.org/abs/1703.01365). Using it across experts to decide a merge is ours.

Nodes are adaptive: each interval of the path has two Gauss-Legendre nodes, the loss at its ends is known, so the error of
each interval is exact; the worst one is halved until the completeness error is small enough or the nodes run out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from mechmerge.artifacts import Document, Units, digest
from mechmerge.behaviors.chat import chat_template_of, render
from mechmerge.behaviors.generation import generate
from mechmerge.behaviors.schema import Behavior
from mechmerge.behaviors.verifiers import check_verifier, verify
from mechmerge.errors import InputError, LocalizeError
from mechmerge.localize.bench import Bench
from mechmerge.localize.effect_file import EFFECT_KINDS, BehaviorEffect, EffectFile, EffectMetadata
from mechmerge.localize.gradients import DeltaProbe
from mechmerge.models.components import OUTSIDE
from mechmerge.models.deltas import delta_of, unit_parameters
from mechmerge.models.load import load_model
from mechmerge.models.pair import PositionRule, VocabularyRule, align, check_pair
from mechmerge.models.references import Model
from mechmerge.progress import SILENT, Progress
from mechmerge.versions import versions

Array = np.ndarray
COMPLETENESS_FLOOR = 0.05
"""Nats: smaller changes of loss are not divided by."""
FIRST_INTERVALS = (0.0, 0.0625, 0.25, 1.0)
"""Most of the loss falls near the base, so the path starts out divided there."""


class EffectSettings(Document):
    """Settings of the effects stage."""

    prompts: int = Field(default=48, ge=4)
    """Calibration prompts a behaviour (shared equally by a group's members)."""
    tolerance: float = Field(default=0.05, gt=0)
    """Completeness error at which no more nodes are added."""
    max_nodes: int = Field(default=10, ge=4)
    """Most points of the path at which gradients are taken."""
    batch: int = Field(default=16, ge=1)
    """Examples a forward pass with gradients."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    device: str = "cpu"
    seed: int = 0
    vocabulary: VocabularyRule = "same"
    positions: PositionRule = "same"


@dataclass(frozen=True)
class BehaviorRow:
    """A row of the matrix: a behaviour, or a group of behaviours whose mean it is."""

    name: str
    members: tuple[Behavior, ...]
    expert: str
    """The expert that answers for it."""
    weight: float = 1.0


@dataclass(frozen=True)
class Example:
    """A prompt with an expert's answer, tokenized."""

    row: int
    member: int
    half: int
    """0 or 1: which half of the calibration prompts it belongs to (by topic)."""
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def measure_effects(
    base: Model,
    experts: Mapping[str, Model],
    rows: Sequence[BehaviorRow],
    out: Path,
    settings: EffectSettings | None = None,
    progress: Progress = SILENT,
) -> EffectFile:
    """Measures the effect matrix and writes it to `out`.

    Args:
        base: the base model.
        experts: experts by name, in the order in which a recipe sums them.
        rows: the behaviours.
        out: the effect file.
        settings: see `EffectSettings`.
        progress: told of every unit.

    Raises:
        InputError: no behaviours, or one of an expert that is not given.
        PairError: the models cannot be compared.
        LocalizeError: an expert has no answer that passes its behaviour's verifier.
    """
    settings = settings or EffectSettings()
    if not rows:
        raise InputError("effects", expected="at least one behaviour NAME=EXPERT", found="none")
    for row in rows:
        if row.expert not in experts:
            raise InputError(f"behaviour {row.name}", expected=f"an expert of {', '.join(experts)}", found=row.expert)
        for member in row.members:
            if member.verifier is not None:
                check_verifier(member.verifier)
    # Aligned copies are measured under the identities of the experts that were given: a recipe aligns them again.
    aligned = {name: Model(id=e.id, path=align(base, e, settings.vocabulary).path) for name, e in experts.items()}
    for expert in aligned.values():
        check_pair(base.checkpoint(), expert.checkpoint(), positions=settings.positions)
    call = _Effects(base, aligned, rows, out, settings, progress)
    file = call.run()
    file.write(out)
    call.units.discard()
    return file


class _Effects:
    """One call of `measure_effects`."""

    def __init__(
        self,
        base: Model,
        experts: Mapping[str, Model],
        rows: Sequence[BehaviorRow],
        out: Path,
        settings: EffectSettings,
        progress: Progress,
    ) -> None:
        self.base, self.experts, self.rows, self.settings, self.progress = base, experts, rows, settings, progress
        self.checkpoint = base.checkpoint()
        self.opened = {name: expert.checkpoint() for name, expert in experts.items()}
        inputs = {
            "base": base.id.shards,
            # A list: the order of the experts is a dimension of the tensors, and digests do not see the order of a mapping.
            "experts": [[name, expert.id.shards] for name, expert in experts.items()],
            "rows": [[row.name, row.expert, [member.digest for member in row.members]] for row in rows],
            "settings": settings.model_dump(mode="json", exclude={"tolerance", "max_nodes"}),
            "versions": versions(),
            "threads": torch.get_num_threads(),
        }
        self.units = Units(out.parent / f".{out.stem}.units", inputs)
        self._bench: Bench | None = None
        self._deltas: dict[str, list[torch.Tensor | None]] = {}

    @property
    def bench(self) -> Bench:
        if self._bench is None:
            self._bench = Bench(self.base, self.settings.dtype, self.settings.device)
        return self._bench

    # ------------------------------------------------------------------------------------------------------------- answers
    def examples(self) -> tuple[list[Example], dict[int, int]]:
        """All examples, and the number of prompts asked for each row."""
        asked: dict[int, int] = {}
        found: list[Example] = []
        for r, row in enumerate(self.rows):
            each = max(2, self.settings.prompts // len(row.members))
            for m, member in enumerate(row.members):
                pairs = member.pairs[:each]
                asked[r] = asked.get(r, 0) + len(pairs)
                kept = self.units.json(f"answers-{digest([row.name, member.name])[:12]}", lambda m=m, r=r: self._ask(r, m))  # type: ignore[misc]
                for index, prompt, answer in kept:
                    found.append(Example(r, m, index % 2, tuple(prompt), tuple(answer)))
            if not any(example.row == r for example in found):
                raise LocalizeError(
                    f"behaviour {row.name}",
                    expected=f"answers of {row.expert} that pass the verifier",
                    found=f"0 of {asked[r]}",
                )
        return found, asked

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
                ending = [tokenizer.eos_token_id] if answer.finished else []
                kept.append([i, prompt, [*answer.ids, *ending]])
        return kept

    def _expert(self, name: str) -> Any:
        if getattr(self, "_loaded", None) != name:
            self._model = load_model(self.experts[name].path, self.settings.dtype, self.settings.device)
            self._loaded = name
        return self._model

    # ---------------------------------------------------------------------------------------------------------------- loss
    def _batches(self, examples: Sequence[Example]) -> list[list[int]]:
        order = sorted(range(len(examples)), key=lambda i: (len(examples[i].prompt) + len(examples[i].answer), i))
        size = self.settings.batch
        return [order[i : i + size] for i in range(0, len(order), size)]

    def _loss(self, examples: Sequence[Example]) -> torch.Tensor:
        """Mean negative log-likelihood per answer token of each example, [n]."""
        bench, width = self.bench, max(len(e.prompt) + len(e.answer) for e in examples)
        keep = max(len(e.answer) for e in examples)
        ids = torch.full((len(examples), width), bench.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        labels = torch.full((len(examples), keep), -100)
        for i, example in enumerate(examples):
            tokens = example.prompt + example.answer
            ids[i, width - len(tokens) :] = torch.tensor(tokens)
            mask[i, width - len(tokens) :] = 1
            labels[i, keep - len(example.answer) :] = torch.tensor(example.answer)
        device = self.settings.device
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = bench.module(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            use_cache=False,
            logits_to_keep=keep + 1,
        ).logits[:, :-1]
        per_token = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.to(device).flatten(), reduction="none", ignore_index=-100
        )
        counts = torch.tensor([len(e.answer) for e in examples], device=device)
        return per_token.view(len(examples), keep).sum(1) / counts

    def _deltas_of(self, name: str) -> list[torch.Tensor | None]:
        if name not in self._deltas:
            found = [delta_of(self.checkpoint, expert, name) for expert in self.opened.values()]
            self._deltas[name] = [None if d is None else d.to(self.bench.module.dtype) for d in found]
        return self._deltas[name]

    def _move(self, t: float, only: str | None = None) -> None:
        """Sets the weights to base + t Σ δ (or to one expert's)."""

        def read(name: str) -> torch.Tensor:
            value = self.checkpoint.tensor(name).float()
            for expert, checkpoint in self.opened.items():
                if only in (None, expert) and t:
                    value = value + t * (checkpoint.tensor(name).float() - self.checkpoint.tensor(name).float())
            return value

        self.bench.load(read)

    def losses(self, examples: Sequence[Example], t: float, only: str | None = None) -> Array:
        """Loss of every example at a point of the path (or of one expert), [n]."""

        def compute() -> dict[str, Array]:
            self._move(t, only)
            values = np.zeros(len(examples))
            with torch.no_grad():
                for batch in self._batches(examples):
                    values[batch] = self._loss([examples[i] for i in batch]).double().cpu().numpy()
                    self.progress.advance(len(batch))
            return {"loss": values}

        self.progress.start(f"loss at {only or f'{t:.3f} of the path'}", len(examples))
        result: Array = self.units.arrays(f"loss-{only or 'path'}-{t:.6f}", compute)["loss"]
        self.progress.end()
        return result

    def gradients(self, examples: Sequence[Example], t: float) -> dict[str, Array]:
        """−⟨∂ℓ/∂θ, δ⟩ of every example at a point of the path: kind → float32 [E, n, layers, units]."""
        arch = self.checkpoint.arch

        def compute() -> dict[str, Array]:
            self._move(t)
            shapes = {kind: (1, 1) if kind in OUTSIDE else (arch.layers, arch.units(kind)) for kind in EFFECT_KINDS}
            found = {kind: np.zeros((len(self.experts), len(examples), *shape), np.float32) for kind, shape in shapes.items()}
            with DeltaProbe(self.bench, self._deltas_of, len(self.experts), below=arch.layers) as probe:
                for batch in self._batches(examples):
                    self._loss([examples[i] for i in batch]).sum().backward()
                    for (layer, kind), values in probe.take().items():
                        found[kind][:, batch, max(layer, 0)] = -values.numpy()
                    self.progress.advance(len(batch))
            return found

        self.progress.start(f"effects at {t:.3f} of the path", len(examples))
        result = self.units.arrays(f"node-{t:.6f}", compute)
        self.progress.end()
        return result

    # ---------------------------------------------------------------------------------------------------------------- path
    def run(self) -> EffectFile:
        examples, asked = self.examples()
        self._model = None
        weights = _example_weights(examples, self.rows)
        ends = {t: weights @ self.losses(examples, t) for t in FIRST_INTERVALS}  # each [R]
        intervals = {(a, b): self._interval(examples, a, b) for a, b in pairwise(FIRST_INTERVALS)}
        whole = ends[0.0] - ends[1.0]
        floor = np.maximum(np.abs(whole), COMPLETENESS_FLOOR)
        while True:
            errors = {(a, b): _total(values, weights) - (ends[a] - ends[b]) for (a, b), values in intervals.items()}
            error = np.abs(sum(errors.values())) / floor
            nodes = 2 * len(intervals)
            if error.max() <= self.settings.tolerance or nodes + 2 > self.settings.max_nodes:
                break
            a, b = max(errors, key=lambda interval: float((np.abs(errors[interval]) / floor).max()))
            middle = (a + b) / 2
            ends[middle] = weights @ self.losses(examples, middle)
            del intervals[(a, b)]
            intervals |= {half: self._interval(examples, *half) for half in ((a, middle), (middle, b))}
        own = {name: weights @ self.losses(examples, 1.0, only=name) for name in self.experts}
        summed = {kind: sum(values[kind] for values in intervals.values()) for kind in EFFECT_KINDS}
        records = tuple(
            BehaviorEffect(
                name=row.name,
                expert=row.expert,
                weight=row.weight,
                members=tuple(member.name for member in row.members),
                digests={member.name: member.digest for member in row.members},
                prompts=asked[r],
                answers=sum(e.row == r for e in examples),
                loss_start=float(ends[0.0][r]),
                loss_end=float(ends[1.0][r]),
                loss_expert=float(own[row.expert][r]),
                completeness_error=float(error[r]),
            )
            for r, row in enumerate(self.rows)
        )
        metadata = EffectMetadata(
            base=self.base.id,
            experts={name: expert.id for name, expert in self.experts.items()},
            behaviors=records,
            path="base→sum",
            nodes=tuple(sorted(t for interval in intervals for t in _nodes(*interval))),
            parameters=unit_parameters(self.checkpoint),
            dtype=self.settings.dtype,
            seed=self.settings.seed,
            versions=versions(),
        )
        return EffectFile(metadata, self._statistics(summed, examples, weights))

    def _interval(self, examples: Sequence[Example], a: float, b: float) -> dict[str, Array]:
        """Integrated effects of every example over an interval of the path."""
        first, second = (self.gradients(examples, t) for t in _nodes(a, b))
        return {kind: (first[kind] + second[kind]) * ((b - a) / 2) for kind in first}

    def _statistics(self, summed: Mapping[str, Any], examples: Sequence[Example], weights: Array) -> dict[str, Array]:
        arrays: dict[str, Array] = {}
        for kind, values in summed.items():
            if kind == "lm_head" and self.checkpoint.arch.tied:
                continue
            # [E, n, layers, units] → [R, E, layers, units]
            mean = np.einsum("rn,enlu->relu", weights, values)
            variance = np.zeros_like(mean)
            for r in range(len(self.rows)):
                own = [i for i, e in enumerate(examples) if e.row == r]
                w = weights[r, own]
                centred = values[:, own] - mean[r][:, None]
                variance[r] = np.einsum("n,enlu->elu", w**2, centred**2) * len(own) / max(len(own) - 1, 1)
            halves = []
            for half in (0, 1):
                part = _example_weights(examples, self.rows, half)
                halves.append(np.einsum("rn,enlu->relu", part, values))
            arrays[f"{kind}.effect"] = mean.astype(np.float32)
            arrays[f"{kind}.stderr"] = np.sqrt(variance).astype(np.float32)
            arrays[f"{kind}.half"] = np.stack(halves).astype(np.float32)
        return arrays


def _nodes(a: float, b: float) -> tuple[float, float]:
    """The two Gauss-Legendre nodes of [a, b]."""
    middle, half = (a + b) / 2, (b - a) / 2
    return middle - half / 3**0.5, middle + half / 3**0.5


def _example_weights(examples: Sequence[Example], rows: Sequence[BehaviorRow], half: int | None = None) -> Array:
    """[R, n]: a row is the mean of its members, a member the mean of its examples (of one half, if told)."""
    weights = np.zeros((len(rows), len(examples)))
    for r in range(len(rows)):
        members: dict[int, list[int]] = {}
        for i, example in enumerate(examples):
            if example.row == r and half in (None, example.half):
                members.setdefault(example.member, []).append(i)
        for own in members.values():
            weights[r, own] = 1 / len(members) / len(own)
    return weights


def _total(values: Mapping[str, Array], weights: Array) -> Array:
    """Sum of the effects over experts and components, [R]."""
    per_example = sum(array.sum((0, 2, 3), dtype=np.float64) for array in values.values())
    total: Array = weights @ per_example
    return total
