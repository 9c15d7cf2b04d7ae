"""Components and the tensor slices that they own.

Names: `L7.attention`, `L7.mlp`, `L7.norms`, `L7.head.3`, `L7.kv.1`, `L7.neuron.512`, `L7.attention.rest`, `L7.mlp.rest`,
`L7`, and outside the layers `embed`, `final_norm`, `lm_head`. A head owns its query rows and output columns; key and
value rows belong to its KV group; a neuron owns its gate row, up row and down column; biases go with their rows. Output
biases and shared q/k norms are `rest`. The finest components (head, kv, neuron, rest, norms and the three outside)
partition the parameters; attention = heads + kv + rest, mlp = neurons + rest.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mechmerge.errors import InputError
from mechmerge.models.families import Architecture

Kind = Literal["layer", "attention", "mlp", "head", "kv", "neuron", "attention.rest", "mlp.rest", "norms"]
UNIT_KINDS: tuple[Kind, ...] = ("head", "kv", "neuron")
"""Kinds that a budget counts and that policies choose among."""
SCORED_KINDS: tuple[Kind, ...] = ("layer", "attention", "mlp", "head", "kv", "neuron")
"""Kinds of a score file."""
LEAF_KINDS: tuple[Kind, ...] = ("head", "kv", "neuron", "attention.rest", "mlp.rest", "norms")
"""Kinds that partition a layer's parameters."""
OUTSIDE = ("embed", "final_norm", "lm_head")
PARTS: dict[str, tuple[Kind, ...]] = {
    "layer": LEAF_KINDS,
    "attention": ("head", "kv", "attention.rest"),
    "mlp": ("neuron", "mlp.rest"),
}
"""What a coarse kind consists of."""

_NAME = re.compile(r"L(\d+)(?:\.(attention\.rest|mlp\.rest|attention|mlp|norms)|\.(head|kv|neuron)\.(\d+))?")


@dataclass(frozen=True, order=True)
class Component:
    """One component: a layer's (`layer`, `kind`, `unit`), or one outside the layers (`layer` is -1, `kind` its name)."""

    layer: int
    kind: str
    unit: int = 0

    def __str__(self) -> str:
        if self.layer < 0:
            return self.kind
        if self.kind == "layer":
            return f"L{self.layer}"
        return f"L{self.layer}.{self.kind}" + (f".{self.unit}" if self.kind in UNIT_KINDS else "")


def parse_component(text: str, arch: Architecture | None = None) -> Component:
    """Parses a component's name and, given an architecture, checks that it exists there.

    Raises:
        InputError: not a name, out of range, or a tied `lm_head`, which cannot be named.
    """
    if text in OUTSIDE:
        if text == "lm_head" and arch is not None and arch.tied:
            raise InputError(text, expected="an untied language head", found="one tied to the embeddings", fix="name embed")
        return Component(-1, text)
    match = _NAME.fullmatch(text)
    if match is None:
        raise InputError(
            f"component {text!r}", expected="L7, L7.attention, L7.mlp, L7.head.3, L7.kv.1, L7.neuron.512, L7.norms, embed, ..."
        )
    layer, part, unit_kind, unit = match.groups()
    component = Component(int(layer), unit_kind or part or "layer", int(unit or 0))
    if arch is not None:
        if component.layer >= arch.layers:
            raise InputError(f"component {text!r}", expected=f"a layer below {arch.layers}", found=str(component.layer))
        if component.unit >= arch.units(component.kind):
            raise InputError(
                f"component {text!r}",
                expected=f"a {component.kind} below {arch.units(component.kind)}",
                found=str(component.unit),
            )
    return component


@dataclass(frozen=True)
class Block:
    """Where the units of one kind and layer live in one tensor.

    Unit u owns the indices offset + u·stride ... + width along `dim`; with `dim` None the whole tensor belongs to
    the single unit.
    """

    tensor: str
    dim: int | None
    offset: int = 0
    stride: int = 0
    width: int = 0
    units: int = 1

    def indices(self, unit: int) -> slice:
        """The unit's index range along `dim`."""
        start = self.offset + unit * self.stride
        return slice(start, start + self.width)


class Layout:
    """Resolves components of one architecture to blocks of its tensors.

    Args:
        arch: the architecture.
        tensors: names of all tensors of the checkpoint (which biases exist differs between models of a family).
    """

    def __init__(self, arch: Architecture, tensors: frozenset[str]) -> None:
        self.arch, self.tensors = arch, tensors

    @functools.cache  # noqa: B019 - layouts are few and live as long as the run
    def blocks(self, layer: int, kind: str) -> tuple[Block, ...]:
        """The blocks of a leaf kind in a layer, or of `embed`, `final_norm`, `lm_head` with layer -1."""
        arch, family = self.arch, self.arch.family
        if layer < 0:
            modules = {"embed": family.embed, "final_norm": (family.final_norm,), "lm_head": (family.head,)}[kind]
            return tuple(self._whole(name) for module in modules for name in self._parameters(module))
        prefix = f"{family.layers}.{layer}."
        rows, columns = (1, 0) if family.transposed else (0, 1)
        q, k = arch.heads * arch.head_dim, arch.kv_groups * arch.head_dim
        d = arch.head_dim
        found: list[Block] = []

        def add_rows(module: str, offset: int, stride: int, width: int, units: int) -> None:
            for name in self._parameters(prefix + module):
                dim = 0 if name.endswith(".bias") else rows
                found.append(Block(name, dim, offset, stride, width, units))

        def add_columns(module: str, width: int, units: int) -> None:
            found.append(Block(f"{prefix}{module}.weight", columns, 0, width, width, units))

        def add_whole(names: Iterator[str]) -> None:
            found.extend(self._whole(name) for name in names)

        match kind:
            case "head":
                if family.fused_qkv is None:
                    add_rows(family.query, 0, d, d, arch.heads)
                else:
                    add_rows(family.fused_qkv, 0, 3 * d if family.qkv_layout == "interleaved" else d, d, arch.heads)
                add_columns(family.output, d, arch.heads)
            case "kv":
                if family.fused_qkv is None:
                    add_rows(family.key, 0, d, d, arch.kv_groups)
                    add_rows(family.value, 0, d, d, arch.kv_groups)
                elif family.qkv_layout == "interleaved":
                    add_rows(family.fused_qkv, d, 3 * d, d, arch.kv_groups)
                    add_rows(family.fused_qkv, 2 * d, 3 * d, d, arch.kv_groups)
                else:
                    add_rows(family.fused_qkv, q, d, d, arch.kv_groups)
                    add_rows(family.fused_qkv, q + k, d, d, arch.kv_groups)
            case "neuron":
                if family.fused_gate_up is not None:
                    add_rows(family.fused_gate_up, 0, 1, 1, arch.neurons)
                    add_rows(family.fused_gate_up, arch.neurons, 1, 1, arch.neurons)
                else:
                    if family.gate is not None:
                        add_rows(family.gate, 0, 1, 1, arch.neurons)
                    add_rows(family.up, 0, 1, 1, arch.neurons)
                add_columns(family.down, 1, arch.neurons)
            case "attention.rest":
                add_whole(name for name in self._parameters(prefix + family.output) if name.endswith(".bias"))
                add_whole(name for module in family.attention_rest for name in self._parameters(prefix + module))
            case "mlp.rest":
                add_whole(name for name in self._parameters(prefix + family.down) if name.endswith(".bias"))
            case "norms":
                add_whole(name for module in family.norms for name in self._parameters(prefix + module))
            case _:
                raise ValueError(f"{kind!r} is not a leaf kind")
        return tuple(found)

    def _parameters(self, module: str) -> Iterator[str]:
        return (name for name in (f"{module}.weight", f"{module}.bias") if name in self.tensors)

    @staticmethod
    def _whole(name: str) -> Block:
        return Block(name, None)

    def leaves(self) -> Iterator[tuple[int, str]]:
        """All (layer, leaf kind), and (-1, name) outside the layers; together they own every parameter once."""
        for layer in range(self.arch.layers):
            for kind in LEAF_KINDS:
                yield layer, kind
        for name in OUTSIDE:
            if name != "lm_head" or not self.arch.tied:
                yield -1, name

    def component_blocks(self, component: Component) -> Iterator[tuple[Block, int | None]]:
        """(block, unit) pairs that a component owns; unit None means all units of the block."""
        if component.kind in UNIT_KINDS:
            for block in self.blocks(component.layer, component.kind):
                yield block, component.unit
            return
        for part in PARTS.get(component.kind, (component.kind,)):
            for block in self.blocks(component.layer, part):
                yield block, None

    def unit_parameters(self, layer: int, kind: str, shapes: dict[str, tuple[int, ...]]) -> int:
        """Number of parameters that one unit of a kind owns in a layer."""
        total = 0
        for part in PARTS.get(kind, (kind,)):
            for block in self.blocks(layer, part):
                count = 1
                for dim, size in enumerate(shapes[block.tensor]):
                    count *= block.width if dim == block.dim else size
                total += count * (block.units if part != kind and block.dim is not None else 1)
        return total

    def owners(self) -> dict[str, list[tuple[int, str, Block]]]:
        """For each tensor, the (layer, leaf kind, block) triples that share it."""
        result: dict[str, list[tuple[int, str, Block]]] = {}
        for layer, kind in self.leaves():
            for block in self.blocks(layer, kind):
                result.setdefault(block.tensor, []).append((layer, kind, block))
        return result
