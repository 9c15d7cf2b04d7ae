"""Weight patching, knockout and cross-model activation patching of many components at once, each by itself.

Weight patching (arXiv 2604.13694 §III-C) puts the expert's weights of one component into the base: sufficiency. Knockout puts
the base's into the expert: necessity. Activation patching puts into the base what a component of the expert computes on the
same tokens: where the signal passes. All three run a model in which one component writes something else, and differ in what
that is (localize/donors.py). Resumed and batched (ours):

- everything below the patched layer is the model's own residual stream, kept once;
- a head changes the attention's output by z' W'_O − z W_O over its columns, a neuron the MLP's by a' w'_down − a w_down;
- from there on variants run side by side, the tokens that all prompts share once each (localize/resume.py).

Scores equal those of whole models with swapped weights; only the order of sums differs.

Shapes: V variants, n prompts, D residual width.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mechmerge.localize.bench import Bench
from mechmerge.localize.donors import Change, Donor, Place, Site, graft, swap
from mechmerge.localize.resume import Prompts, Readout, Stream, standing_in
from mechmerge.models.components import Component
from mechmerge.models.families import Architecture

Array = np.ndarray
Source = Callable[[str], torch.Tensor]
BATCH_BYTES = 170_000_000
"""Most memory of a batch of variants (6000 tokens of SmolLM2-135M in float32)."""
CPU_BATCH_BYTES = 40_000_000
"""The same on a CPU with all weights in memory, where what a layer makes of a batch should fit into the caches."""


def token_bytes(arch: Architecture) -> int:
    """About what one token of a variant takes while a layer runs, in bytes (float32)."""
    return 4 * (4 * arch.hidden + 3 * arch.neurons)


@dataclass(frozen=True)
class Run:
    """A model's own pass over the prompts."""

    residual: list[Stream]
    """Before every layer below the readout, V = 1."""
    state: Array
    """The readout, float64 [n]."""


class Patcher:
    """Readouts of some prompts with one component at a time taken from another model.

    Args:
        bench: the model that is patched; it holds its own weights again after every call.
        ids: token ids of each prompt.
        readout: what is measured (an `Anchor`, for one).
        variants: how many run side by side; as many as fit into `BATCH_BYTES` or `CPU_BATCH_BYTES` when None.
    """

    def __init__(self, bench: Bench, ids: Sequence[Sequence[int]], readout: Readout, variants: int | None = None) -> None:
        self.bench, self.prompts, self.readout = bench, Prompts(bench, ids, readout), readout
        self.single = bench.module.dtype == torch.float32
        """Rounding is fine enough that the model's own readout need not be computed anew in every batch."""
        size = token_bytes(bench.checkpoint.arch) * self.prompts.tokens
        room = CPU_BATCH_BYTES if bench.device == "cpu" and bench.resident else BATCH_BYTES
        self.variants = max(1, room // size) if variants is None else variants

    @torch.no_grad()
    def run(self) -> Run:
        """The pass of the model as it stands on the bench."""
        residual, top = self.prompts.run(), self.readout.layer - 1
        return Run(residual, self.prompts.read(self.prompts.last(top, residual[top]))[0].numpy())

    def patch(self, run: Run, components: Sequence[Component], source: Source) -> dict[str, Array]:
        """Weight patching: the readout with each component's weights taken from `source`, and nothing else.

        Args:
            run: the pass of the model on the bench.
            components: any kinds of layers below the readout.
            source: the other model's tensor by name.

        Returns:
            The change of the readout by component name, float64 [n] each: exactly 0 where a component equals its own. In half
            precision it is the change from the model's own in the same batch.
        """
        return self._measure(run, components, lambda site: swap(site, source))

    def transplant(self, run: Run, other: Run, components: Sequence[Component], source: Source) -> dict[str, Array]:
        """Activation patching: the readout with each component's output taken from another model's pass.

        Args:
            run: the pass of the model on the bench.
            other: the other model's pass over the same prompts.
            components: heads, KV groups, neurons, attentions, MLPs and layers below the readout.
            source: the other model's tensor by name.
        """
        return self._measure(run, components, lambda site: graft(site, other.residual, source))

    # ------------------------------------------------------------------------------------------------------------ variants
    @torch.no_grad()
    def _measure(self, run: Run, components: Sequence[Component], donor: Callable[[Site], Donor]) -> dict[str, Array]:
        found: dict[str, Array] = {}
        for layer in sorted({component.layer for component in components}):
            site = Site(self.bench, self.prompts, layer, run.residual[layer])
            given = donor(site)
            here = [(str(component), given.change(component)) for component in components if component.layer == layer]
            here.sort(key=lambda item: item[1].place)
            for start in range(0, len(here), self.variants):
                batch = here[start : start + self.variants]
                changes = self._changes(run, site, [change for _, change in batch])
                found |= {name: change for (name, _), change in zip(batch, changes, strict=True)}
        return {str(component): found[str(component)] for component in components}

    def _changes(self, run: Run, site: Site, changes: Sequence[Change]) -> list[Array]:
        """What each change of a batch does to the readout, float64 [n]; those of one place stand together.

        An output that equals the model's own to the bit changes nothing: in a batch, rounding depends on a row's place.
        """
        found: list[Array | None] = []
        ends: list[Stream] = []
        for place, group in itertools.groupby(changes, key=lambda change: change.place):
            own = site.own(place)
            made = [change.make() for change in group]
            differs = [not all(map(torch.equal, m, own)) for m in made]
            found += [None if d else np.zeros(self.prompts.n) for d in differs]
            variants = list(itertools.compress(made, differs))
            if variants:
                # The model itself is a variant of its own, the first: what the batch's rounding does cancels out. In single
                # precision that is less than what two ways to run the same model differ by.
                variants = variants if self.single else [own, *variants]
                stacked = Stream(torch.cat([v.prefix for v in variants]), torch.cat([v.rest for v in variants]))
                ends.append(self._beyond(site, place, stacked))
        measured = iter(self._read(run, site.layer, ends) if ends else ())
        return [next(measured) if change is None else change for change in found]

    def _read(self, run: Run, layer: int, ends: Sequence[Stream]) -> Iterator[Array]:
        """The readouts of some groups of variants after a layer, each less the model's own (the group's first or the run's)."""
        x = Stream(torch.cat([end.prefix for end in ends]), torch.cat([end.rest for end in ends]))
        above = layer == self.readout.layer - 1
        states = (self.prompts.read(x.rest) if above else self.prompts.state(x, layer + 1)).numpy()
        if self.single:
            yield from states - run.state
            return
        start = 0
        for end in ends:
            own, start = start, start + len(end.rest) // self.prompts.n
            yield from (states[own + 1 : start] - states[own])

    def _beyond(self, site: Site, place: Place, output: Stream) -> Stream:
        """The stream after a layer whose attention, MLP or whole gives this output; at the last layer only what is read."""
        if site.layer == self.readout.layer - 1:
            output = Stream(output.prefix[:, :0], output.rest[:, -self.readout.positions :])
        if place == "layer":
            return output
        tokens, variants = output.rest.shape[1], len(output.rest) // self.prompts.n
        x, prefix = site.x.repeated(variants), output.prefix
        if prefix.shape[1]:
            with self._writing(site, place, prefix, prefix=True):
                prefix = self.prompts.idle(site.layer, x.prefix, prefix=True)
        with self._writing(site, place, output.rest):
            return Stream(prefix, self.prompts.idle(site.layer, x.rest[:, -tokens:]))

    @contextlib.contextmanager
    def _writing(self, site: Site, place: Place, output: torch.Tensor, prefix: bool = False) -> Iterator[None]:
        """Lets the attention write `output` [rows, tokens, D]; or the MLP, behind the attention's own output."""
        with contextlib.ExitStack() as stack:
            if place == "attention":
                stack.enter_context(standing_in(site.attention_module, lambda *_, **__: (output, None)))
            else:
                own = site.attention.output.prefix if prefix else site.attention.output.rest
                rows, tokens = output.shape[:2]
                before = own[:, -tokens:].repeat(rows // len(own), 1, 1)
                stack.enter_context(standing_in(site.attention_module, lambda *_, **__: (before, None)))
                stack.enter_context(standing_in(site.mlp_module, lambda *_, **__: output))
            yield
