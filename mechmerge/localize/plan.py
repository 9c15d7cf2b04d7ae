"""What a measurement takes (forward passes, bytes read, memory, time), told before it starts, and whether it is streamed.

Pure: from sizes, steps and limits to a plan. What the steps of a stage are stands in localize/plan_steps.py. Memory is what
the tensors that are alive at once take, plus a constant for the libraries; time is work over rates measured for a moment on
the machine (`measure_rates`), so it is an estimate. One forward-equivalent is a forward pass of all layers over one prompt.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mechmerge.errors import InputError
from mechmerge.models.checkpoint import Checkpoint

FIXED = 750_000_000
"""Bytes that Python, torch and transformers take without a model."""
KEPT = 512_000_000
"""Most bytes of layer inputs that a streamed pass keeps in memory."""
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}
STORED = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def parse_size(text: str) -> int:
    """`4GB`, `512MB`, `1.5GiB` … in bytes.

    Raises:
        InputError: anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B)\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * UNITS[found[2].upper()]) if found else 0
    if size <= 0:
        raise InputError("memory", expected="a size such as 4GB or 512MB", found=repr(text))
    return size


def show_size(size: float) -> str:
    """Bytes as `1.9 GB` or `350 MB`, rounded up so that it would do as a limit."""
    return f"{math.ceil(size / 1e8) / 10:.1f} GB" if size > 999e6 else f"{math.ceil(size / 1e6)} MB"


def free_memory(device: str = "cpu", root: Path = Path("/")) -> int:
    """Bytes that are free for a process: of the device, or of this machine and of the container it runs in, without swapping.

    Args:
        device: torch device.
        root: where `proc` and `sys` are.
    """
    kind = device.partition(":")[0]
    if kind == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    if kind == "mps":
        import torch

        # Shared with the machine: what Metal recommends to use at most, less what it has given out.
        return max(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory(), 1)
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError, ValueError):
        found.append(_fields(root / "proc/meminfo")["MemAvailable:"] * 1024)
    with contextlib.suppress(OSError, ValueError, KeyError):
        group = root / "sys/fs/cgroup"
        # Pages of files count as used, and are given back when memory runs short. Without a limit, `max` is no number.
        used = int((group / "memory.current").read_text()) - _fields(group / "memory.stat")["inactive_file"]
        found.append(int((group / "memory.max").read_text()) - used)
    return max(min(found), 1)


def _fields(path: Path) -> dict[str, int]:
    """The first number of each line of a file, by its first word."""
    return {words[0]: int(words[1]) for line in path.read_text().splitlines() if len(words := line.split()) > 1}


@dataclass(frozen=True)
class Sizes:
    """What a checkpoint weighs."""

    layers: int
    hidden: int
    neurons: int
    layer: int
    """Parameters of the largest layer."""
    tensor: int
    """Parameters of the largest tensor of a layer."""
    vocabulary: int
    """Rows of the token embedding."""
    total: int
    """All parameters."""
    stored: int
    """Bytes of all tensors on disk."""

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Sizes:
        """The sizes of a checkpoint, from its headers."""
        arch, counts = checkpoint.arch, {name: math.prod(shape) for name, shape in checkpoint.shapes.items()}
        by_layer = [
            [count for name, count in counts.items() if name.startswith(f"{arch.family.layers}.{layer}.")]
            for layer in range(arch.layers)
        ]
        stored = sum(counts[name] * STORED[entry["dtype"]] for name, entry in checkpoint.entries.items())
        return cls(
            layers=arch.layers,
            hidden=arch.hidden,
            neurons=arch.neurons,
            layer=max(map(sum, by_layer)),
            tensor=max(map(max, by_layer)),
            vocabulary=arch.vocabulary,
            total=sum(counts.values()),
            stored=stored,
        )

    @property
    def head(self) -> int:
        """Parameters of the language head."""
        return self.vocabulary * self.hidden


@dataclass(frozen=True)
class Step:
    """A part of a stage."""

    name: str
    tokens: float
    """Tokens through all layers: a forward pass counts its tokens once, a backward pass and the scoring of one expert's
    weights once more each.
    """
    again: float = 0.0
    """Tokens through all layers more where the model is streamed (layers run again for the backward pass)."""
    reads: float = 0.0
    """Times that all weights of a model are read from disk where the model is streamed."""
    loads: float = 0.0
    """Times that all weights of a model are read from disk where it is in memory."""
    tokens_one_by_one: float = 0.0
    """Forward passes of a single position, which take as long as reading the weights from memory."""


@dataclass(frozen=True)
class Demand:
    """The largest passes of a stage."""

    graph: int
    """Tokens (padding included) of the largest batch that a gradient is taken of."""
    kept: int
    """Tokens whose layer inputs one pass keeps."""
    positions: int
    """Most positions whose logits exist at once; 0 where no language head runs."""
    experts: int = 1
    """Experts whose deltas are scored in one backward pass."""
    together: int = 0
    """Most tokens that run through a layer at once without a gradient."""
    runs: int = 0
    """Tokens whose layer inputs stay in memory throughout."""
    whole_deltas: bool = False
    """Whether deltas of all tensors are kept where the model is in memory, and the head's are scored."""


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second."""

    operations: float
    """Floating-point operations of matrix products."""
    memory: float
    """Bytes of weights through a matrix-vector product."""
    disk: float
    """Bytes of weights read from the files and converted."""


@dataclass(frozen=True)
class Cost:
    """What a step costs."""

    name: str
    forwards: float
    """Forward-equivalents."""
    read: float
    """Bytes."""
    seconds: float
    """An estimate."""


@dataclass(frozen=True)
class Plan:
    """What a stage will take."""

    streamed: bool
    limit: int
    """Bytes that may be used."""
    peak: int
    """Bytes expected at the highest."""
    kept: int
    """Bytes of layer inputs kept in memory; more go to a temporary file."""
    batch: int
    """Prompts a forward pass with gradients."""
    costs: tuple[Cost, ...]

    @property
    def total(self) -> Cost:
        """All steps together."""
        return Cost("total", *(sum(getattr(c, key) for c in self.costs) for key in ("forwards", "read", "seconds")))


def in_memory_bytes(sizes: Sizes, demand: Demand, item: int) -> int:
    """Memory of a stage that holds the whole model, in bytes; `item` is the size of a weight."""
    deltas = sizes.total * demand.experts if demand.whole_deltas else sizes.layer
    graph = demand.graph * sizes.layers * _saved(sizes)
    kept = max(demand.kept, demand.runs) * (sizes.layers + 1) * sizes.hidden
    graph = max(graph, demand.together * _passing(sizes))
    # Loading reads a file's pages beside the weights made of them; later the other model's layer takes their place.
    return FIXED + item * (sizes.total + deltas + graph + kept) + sizes.stored // 2 + _logits(sizes, demand, item)


def streamed_bytes(sizes: Sizes, demand: Demand, item: int) -> int:
    """Least memory of a stage that streams the model, in bytes: all layer inputs go to disk."""
    stored = sizes.stored / sizes.total
    # A layer, one of deltas, and an expert's as it is stored; the tensor that is being read or subtracted; one layer's graph.
    layer = sizes.layer * (item * (1 + demand.experts) + stored) + sizes.tensor * (stored + 2 * item)
    layer += item * max(demand.graph * _saved(sizes), demand.together * _passing(sizes))
    top = sizes.head * (item + stored) if demand.positions else 0
    if demand.positions and demand.whole_deltas:
        top += sizes.head * (item * demand.experts + 2 * 4)
    rows = item * min(sizes.vocabulary, demand.kept) * sizes.hidden
    gradients = item * (2 * demand.kept + demand.runs * (sizes.layers + 1)) * sizes.hidden
    return FIXED + int(max(layer + rows, top + _logits(sizes, demand, item)) + gradients)


def _saved(sizes: Sizes) -> int:
    """Values that a layer's graph holds for each token."""
    return 14 * sizes.hidden + 6 * sizes.neurons


def _passing(sizes: Sizes) -> int:
    """Values that a layer holds at once for each token without a graph."""
    return 5 * sizes.hidden + 3 * sizes.neurons


def _logits(sizes: Sizes, demand: Demand, item: int) -> int:
    return demand.positions * sizes.vocabulary * (item + 8)


def make_plan(
    sizes: Sizes,
    steps: Sequence[Step],
    demand: Demand,
    mean_tokens: float,
    dtype: str,
    batch: int,
    limit: int,
    rates: Rates,
) -> Plan:
    """Chooses whether the model is streamed, and says what the steps cost.

    Args:
        sizes: the model.
        steps: what the stage does.
        demand: its largest passes.
        mean_tokens: tokens of a prompt: what a forward-equivalent is counted in.
        dtype: of weights and activations.
        batch: prompts a forward pass with gradients.
        limit: bytes that may be used.
        rates: of the machine.

    Raises:
        InputError: the limit is below what streaming takes; it says the least that would do.
    """
    item = ITEM[dtype]
    whole, least = in_memory_bytes(sizes, demand, item), streamed_bytes(sizes, demand, item)
    streamed = whole > limit
    if streamed and least > limit:
        raise InputError(
            "memory",
            expected=f"at least {show_size(least)} for this model in {dtype}",
            found=show_size(limit),
            fix="raise --memory, or use --dtype bfloat16 or fewer --prompts",
        )
    kept = min(KEPT, limit - least, item * demand.kept * (sizes.layers + 1) * sizes.hidden) if streamed else 0
    costs = []
    for step in steps:
        tokens = step.tokens + (step.again if streamed else 0)
        read = sizes.stored * (step.reads if streamed else step.loads)
        seconds = tokens * 2 * sizes.layer * sizes.layers / rates.operations + read / rates.disk
        seconds += step.tokens_one_by_one * sizes.total * item / rates.memory
        costs.append(Cost(step.name, tokens / mean_tokens, read, seconds))
    return Plan(streamed, limit, least + kept if streamed else whole, kept, batch, tuple(costs))


def measure_rates(checkpoint: Checkpoint, dtype: str, device: str = "cpu", seconds: float = 0.2) -> Rates:
    """Measures a machine's rates with products and a tensor of the model's own sizes, for about `seconds` each."""
    import torch

    from mechmerge.models.load import torch_dtype

    kind, arch = torch_dtype(dtype), checkpoint.arch
    weight = torch.ones(arch.neurons, arch.hidden, dtype=kind, device=device)

    def times(rows: int) -> float:
        x = torch.ones(rows, arch.hidden, dtype=kind, device=device)
        (x @ weight.T).sum().item()
        done, start = 0, time.perf_counter()
        while time.perf_counter() - start < seconds:
            (x @ weight.T).sum().item()
            done += 1
        return (time.perf_counter() - start) / done

    many, one = times(256), times(1)
    prefix = f"{arch.family.layers}.0."
    name = max((n for n in checkpoint.shapes if n.startswith(prefix)), key=lambda n: math.prod(checkpoint.shapes[n]))
    start = time.perf_counter()
    tensor = checkpoint.tensor(name)
    tensor.to(kind, copy=True)
    disk = tensor.nbytes / (time.perf_counter() - start)
    return Rates(2 * 256 * weight.numel() / many, weight.nbytes / one, disk)
