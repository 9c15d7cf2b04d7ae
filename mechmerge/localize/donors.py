"""What another model would write in place of one component: by its weights, or by its activations.

By weights, a component computes from the patched model's own input. One pass of the attention with all query rows replaced
gives the values z' of every head, since what a head computes does not depend on other heads' queries; one with all key and
value rows gives those of every KV group; one of the MLP gives every neuron's activation. Where a norm spans all heads
(`Family.joint_heads`) the attention runs once for each head or group.

By activations (ours where the paper's notes are silent): heads, neurons, attention and MLP bring what they write towards the
residual stream, the expert's output weights included; KV groups their keys and values; a layer the residual stream after it.
All positions of the prompts are carried over.

Shapes: n prompts, P prefix tokens, T tokens behind it, D residual width, F neurons, H heads.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from mechmerge.localize.bench import Bench, Stop, hooked
from mechmerge.localize.resume import Keys, Prompts, Stream, standing_in
from mechmerge.models.components import PARTS, Block, Component

Source = Callable[[str], torch.Tensor]
Place = Literal["attention", "mlp", "layer"]
"""Whose output changes: the attention's, the MLP's, or the layer's as a whole."""


class Part(NamedTuple):
    """What an attention or an MLP computes."""

    values: Stream
    """Before the output projection: H heads side by side, or F activations."""
    output: Stream
    """Width D."""
    keys: tuple[Keys, Keys]
    """The attention's keys and values: of the prefix, and of the rest."""


@dataclass(frozen=True)
class Change:
    """What one component's change makes of the output of its place."""

    place: Place
    make: Callable[[], Stream]
    """The new output, V = 1, width D; called when it is needed, so that many changes take no memory."""


class Site:
    """One layer of a model's pass: its input, and what its attention and MLP compute there."""

    def __init__(self, bench: Bench, prompts: Prompts, layer: int, x: Stream) -> None:
        self.bench, self.prompts, self.layer, self.x = bench, prompts, layer, x
        self.family, self.layout = bench.checkpoint.arch.family, bench.checkpoint.layout
        within = bench.layers[layer]
        self.output_module, self.down_module = (within.get_submodule(name) for name in (self.family.output, self.family.down))
        self.attention_module, self.mlp_module = (
            within.get_submodule(name.rpartition(".")[0]) for name in (self.family.output, self.family.down)
        )

    @functools.cached_property
    def attention(self) -> Part:
        """The model's own attention."""
        return self.attend()

    @functools.cached_property
    def mlp(self) -> Part:
        """The model's own MLP."""
        return self.activate()

    def own(self, place: Place) -> Stream:
        """What the model itself puts out at a place, V = 1."""
        if place == "layer":
            return self.prompts.step(self.layer, self.x)
        return self.attention.output if place == "attention" else self.mlp.output

    def attend(self, x: Stream | None = None, instead: tuple[Keys, Keys] | None = None) -> Part:
        """The attention with the weights as they stand.

        Args:
            x: the residual stream before the layer (the site's own by default).
            instead: whose keys and values are attended to (its own by default).
        """
        x = x or self.x
        keys = [Keys(instead=None if instead is None else instead[0].own)]
        keys.append(Keys(instead=None if instead is None else instead[1].own))

        def run(prefix: bool) -> None:
            if not prefix and self.prompts.prefix:
                keys[1].before, keys[1].prompts = keys[0].given, self.prompts.n
            self.prompts.call(self.layer, x.prefix if prefix else x.rest, keys[0 if prefix else 1], prefix)

        values, output = self._captured(self.output_module, self.attention_module, run)
        return Part(values, output, (keys[0], keys[1]))

    def activate(self, x: Stream | None = None, attention: Stream | None = None) -> Part:
        """The MLP with the weights as they stand, behind the given output of the attention (its own by default)."""
        x, before = x or self.x, attention or self.attention.output

        def run(prefix: bool) -> None:
            own = before.prefix if prefix else before.rest
            with standing_in(self.attention_module, lambda *_, **__: (own, None)):
                self.prompts.call(self.layer, x.prefix if prefix else x.rest, Keys(), prefix)

        values, output = self._captured(self.down_module, self.mlp_module, run)
        return Part(values, output, (Keys(), Keys()))

    def _captured(self, inner: torch.nn.Module, outer: torch.nn.Module, run: Callable[[bool], None]) -> tuple[Stream, Stream]:
        """What goes into `inner` and comes out of `outer` in both parts of a pass, which ends there."""
        into: list[torch.Tensor] = []
        out: list[torch.Tensor] = []

        def before(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            into.append(inputs[0])

        def after(_module: Any, _inputs: Any, output: Any) -> None:
            out.append(output[0] if isinstance(output, tuple) else output)
            raise Stop

        with hooked(inner.register_forward_pre_hook(before)), hooked(outer.register_forward_hook(after)):
            for prefix in (True, False) if self.prompts.prefix else (False,):
                with contextlib.suppress(Stop):
                    run(prefix)
        if not self.prompts.prefix:
            into.insert(0, into[0].new_zeros(1, 0, into[0].shape[-1]))
            out.insert(0, out[0].new_zeros(1, 0, out[0].shape[-1]))
        return Stream(*into), Stream(*out)

    def blocks(self, kinds: Iterable[str], *, writing: bool | None = None) -> list[tuple[Block, None]]:
        """The blocks of some leaf kinds, all units: those that write to the stream (output and down), the others, or both."""
        found = [block for kind in kinds for block in self.layout.blocks(self.layer, kind)]
        return [(block, None) for block in found if writing is None or self._writes(block) == writing]

    def _writes(self, block: Block) -> bool:
        module = block.tensor.rpartition(".")[0]
        return module.endswith((f".{self.family.output}", f".{self.family.down}"))

    def columns(self, kind: str, unit: int, read: Source) -> torch.Tensor:
        """What a head or neuron writes with, [its width, D], float32."""
        (block,) = (b for b, _ in self.blocks([kind], writing=True))
        part = read(block.tensor).narrow(block.dim or 0, block.indices(unit).start, block.width)
        return (part.T if block.dim == 1 else part).to(self.x.rest.device, torch.float32)


@dataclass(frozen=True)
class Donor:
    """The changes that another model's components make at a site."""

    change: Callable[[Component], Change]


def swap(site: Site, source: Source) -> Donor:
    """Changes by weights: each component's from `source`, on the model's own input."""
    bench = site.bench

    @functools.cache
    def part(kinds: tuple[str, ...], writing: bool | None, mlp: bool) -> Part:
        with bench.patched(site.blocks(kinds, writing=writing), source):
            return site.activate() if mlp else site.attend()

    def alone(component: Component) -> Stream:
        with bench.patched(site.layout.component_blocks(component), source):
            return site.attend().output

    def after(component: Component) -> Stream:
        with bench.patched(site.layout.component_blocks(component), source):
            return site.prompts.step(site.layer, site.x)

    def change(component: Component) -> Change:
        kind, unit = component.kind, component.unit
        if kind in ("head", "kv") and site.family.joint_heads:
            return Change("attention", lambda: alone(component))
        if kind == "head":
            return Change("attention", lambda: _heads(site, part(("head",), False, False).values, [unit], source))
        if kind == "kv":
            return Change(
                "attention", lambda: _heads(site, part(("kv",), None, False).values, _group(site, unit), bench.weight)
            )
        if kind == "neuron":
            return Change("mlp", lambda: _neuron(site, part(PARTS["mlp"], None, True).values, unit, source))
        if kind in ("attention", "attention.rest"):
            return Change("attention", lambda: part(PARTS.get(kind, (kind,)), None, False).output)
        if kind in ("mlp", "mlp.rest"):
            return Change("mlp", lambda: part(PARTS.get(kind, (kind,)), None, True).output)
        return Change("layer", lambda: after(component))

    return Donor(change)


def graft(site: Site, others: Sequence[Stream], source: Source) -> Donor:
    """Changes by activations: each component's output in another model's pass, whose residual streams are `others`."""
    x = others[site.layer]

    @functools.cache
    def theirs() -> tuple[Part, Part]:
        with site.bench.patched(site.blocks(PARTS["layer"]), source):
            attention = site.attend(x)
            return attention, site.activate(x, attention.output)

    @functools.cache
    def attended() -> Stream:
        """The model's own queries on the other's keys and values."""
        return site.attend(instead=theirs()[0].keys).values

    def after() -> Stream:
        if site.layer + 1 < len(others):
            return others[site.layer + 1]
        with site.bench.patched(site.blocks(PARTS["layer"]), source):
            return site.prompts.step(site.layer, x)

    def change(component: Component) -> Change:
        kind, unit = component.kind, component.unit
        match kind:
            case "head":
                return Change("attention", lambda: _heads(site, theirs()[0].values, [unit], source))
            case "kv":
                return Change("attention", lambda: _heads(site, attended(), _group(site, unit), site.bench.weight))
            case "neuron":
                return Change("mlp", lambda: _neuron(site, theirs()[1].values, unit, source))
            case "attention":
                return Change("attention", lambda: theirs()[0].output)
            case "mlp":
                return Change("mlp", lambda: theirs()[1].output)
            case "layer":
                return Change("layer", after)
        raise ValueError(f"{component} has no activation of its own")

    return Donor(change)


def _group(site: Site, unit: int) -> list[int]:
    """The heads that attend to a KV group."""
    arch = site.bench.checkpoint.arch
    each = arch.heads // arch.kv_groups
    return list(range(unit * each, (unit + 1) * each))


def _heads(site: Site, values: Stream, heads: Sequence[int], read: Source) -> Stream:
    """The attention's output where some heads have these values [.., H·width] and write with the weights of `read`."""
    own, width = site.attention, site.bench.checkpoint.arch.head_dim
    old, new = (torch.cat([site.columns("head", h, of) for h in heads]) for of in (site.bench.weight, read))

    def part(output: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        was, now = (torch.cat([v[..., h * width : (h + 1) * width] for h in heads], -1).float() for v in (before, after))
        return (output.float() + (now @ new - was @ old)).to(output.dtype)

    return Stream(*(part(*three) for three in zip(own.output, own.values, values, strict=True)))


def _neuron(site: Site, values: Stream, unit: int, read: Source) -> Stream:
    """The MLP's output where one neuron has these activations [.., F] and writes with the weights of `read`."""
    own = site.mlp
    old, new = (site.columns("neuron", unit, of) for of in (site.bench.weight, read))

    def part(output: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        was, now = (v[..., unit : unit + 1].float() for v in (before, after))
        return (output.float() + (now * new - was * old)).to(output.dtype)

    return Stream(*(part(*three) for three in zip(own.output, own.values, values, strict=True)))
