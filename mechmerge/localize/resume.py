"""Layers of a bench run on many variants of the same prompts at once, from any layer to a readout.

Three things make this cheaper than whole forward passes (ours; nothing about it is approximate):

- the tokens that all prompts begin with (a chat template's system prompt) are computed once a variant, not once a prompt;
- at the last layer only the positions that are read run through attention and MLP; the others give their keys and values;
- variants stand side by side in one batch.

Every product is made by transformers' own modules. They are given a cache that hands out the prefix's keys and values, and
masks and positions that the model's own code made for a batch of this size.

Shapes: V variants, n prompts, P prefix tokens, T tokens behind it (left-padded), K positions read, D residual width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from transformers import Cache, DynamicCache

from mechmerge.behaviors.kv_cache import begin, shareable
from mechmerge.errors import LocalizeError
from mechmerge.localize.bench import Bench, Stop, hooked

SHORTEST_PREFIX = 2
"""Shared tokens below which the prompts are run whole."""


class Stream(NamedTuple):
    """Values of some variants at every token: a residual stream, or what a module makes of it."""

    prefix: torch.Tensor
    """[V, P, width]"""
    rest: torch.Tensor
    """[V·n, T, width], the prompts of the first variant first"""

    def repeated(self, variants: int) -> Stream:
        """One variant, as often as told."""
        return Stream(self.prefix.expand(variants, -1, -1), self.rest.repeat(variants, 1, 1))


class Readout(Protocol):
    """What is measured of a forward pass."""

    @property
    def layer(self) -> int:
        """The residual stream after this many layers is read."""

    @property
    def positions(self) -> int:
        """How many of the last positions are read (K)."""

    def needs(self, prompt: int) -> int:
        """How many of them belong to this prompt: 1 … K (what stands before a shorter one is read and not looked at)."""

    def read(self, residual: torch.Tensor) -> torch.Tensor:
        """One number a prompt and variant, [V, n], from the residual stream [V, n, K, D]."""


class Keys:
    """One layer's keys and values in place of transformers' cache: what the prefix left, then the caller's own.

    Args:
        before: (keys, values) [V, heads, tokens, width] that stand before the caller's own; None for none.
        prompts: how many rows of the caller each of them is for.
        stop: whether the forward pass ends once the caller's own are known.
        instead: (keys, values) that are handed out in place of the caller's own.
    """

    def __init__(
        self,
        before: tuple[torch.Tensor, torch.Tensor] | None = None,
        prompts: int = 1,
        stop: bool = False,
        instead: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        self.before, self.prompts, self.stop, self.instead = before, prompts, stop, instead
        self.own: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes the caller's keys and values, [rows, heads, new, width], and returns all it attends to."""
        self.own = (key, value)
        if self.stop:
            raise Stop
        return self.given if self.before is None else joined(self.before, self.prompts, self.given)

    @property
    def given(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that are handed out for the caller's own tokens, once it has called."""
        given = self.own if self.instead is None else self.instead
        if given is None:
            raise RuntimeError("the layer never asked for its cache")
        return given


def joined(
    before: tuple[torch.Tensor, torch.Tensor], prompts: int, own: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of prefixes, [V, heads, P, width], each before those of its prompts, [V·prompts, heads, T, width]."""
    keys, values = (torch.cat([a.repeat_interleave(prompts, 0), b], 2) for a, b in zip(before, own, strict=True))
    return keys, values


class Prompts:
    """Some prompts on a bench, and the layers run on variants of them.

    Args:
        bench: the model; its weights may change between calls.
        ids: token ids of each prompt.
        readout: where runs end.

    Raises:
        LocalizeError: no prompts, or one that does not fit into the model's context.
    """

    def __init__(self, bench: Bench, ids: Sequence[Sequence[int]], readout: Readout) -> None:
        self.bench, self.readout, self.n = bench, readout, len(ids)
        if not ids or not all(ids):
            raise LocalizeError("prompts", expected="at least one, none empty", found=str(len(ids)))
        bench.check_length(max(map(len, ids)))
        self.prefix = self._shared(ids)
        width = max(map(len, ids)) - self.prefix
        pad = bench.tokenizer.pad_token_id
        self.ids = torch.tensor([[pad] * (width - len(own) + self.prefix) + list(own[self.prefix :]) for own in ids])
        lengths = [len(own) - self.prefix for own in ids]
        self.mask = torch.tensor([[1] * self.prefix + [0] * (width - length) + [1] * length for length in lengths])
        self.first = torch.tensor([list(ids[0][: self.prefix])], dtype=torch.long)
        self.tokens = self.prefix + self.n * width
        """Tokens of one variant."""
        self._arguments: dict[tuple[int, bool], list[Arguments]] = {}

    def _shared(self, ids: Sequence[Sequence[int]]) -> int:
        """How many tokens all prompts begin with, those that are read left out; 0 where the model cannot start behind them."""
        low, high = min(map(list, ids)), max(map(list, ids))
        shared = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
        spare = min(len(own) - self.readout.needs(i) for i, own in enumerate(ids))
        shared = min(shared, spare, max(map(len, ids)) - self.readout.positions)
        config = self.bench.module.config
        return shared if self.n > 1 and shared >= SHORTEST_PREFIX and shareable(config, max(map(len, ids))) else 0

    # ----------------------------------------------------------------------------------------------------------- arguments
    def arguments(self, layer: int, variants: int, prefix: bool) -> Arguments:
        """What a layer is called with for a batch of so many variants."""
        key = (variants, prefix)
        if key not in self._arguments:
            self._arguments = {k: v for k, v in self._arguments.items() if k[0] in (1, variants)}
            self._arguments[key] = self._dry(variants, prefix)[1]
        return self._arguments[key][layer]

    def embedded(self) -> Stream:
        """The residual stream before the first layer, V = 1."""
        prefix = self._dry(1, True)[0] if self.prefix else self._nothing()
        return Stream(prefix, self._dry(1, False)[0])

    def _nothing(self) -> torch.Tensor:
        arch = self.bench.checkpoint.arch
        return torch.zeros(1, 0, arch.hidden, device=self.bench.device, dtype=self.bench.module.dtype)

    @torch.no_grad()
    def _dry(self, variants: int, prefix: bool) -> tuple[torch.Tensor, list[Arguments]]:
        """Calls the model with layers that do nothing: what goes into the first layer, and each layer's other arguments."""
        device, module = self.bench.device, self.bench.module
        cache = DynamicCache(config=module.config)
        if prefix:
            ids, mask = self.first.repeat(variants, 1), torch.ones(variants, self.prefix, dtype=torch.long)
        else:
            ids, mask = self.ids.repeat(variants, 1), self.mask.repeat(variants, 1)
            if self.prefix:
                arch = self.bench.checkpoint.arch
                blank = torch.zeros(1, arch.kv_groups, self.prefix, arch.head_dim, device=device, dtype=module.dtype)
                begin(cache, [(blank, blank)] * len(cache.layers), len(ids))
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]

        def stop(*_: Any) -> None:
            raise Stop

        end = self.bench.layers[self.readout.layer - 1].register_forward_hook(stop)
        with hooked(end), self.bench.passing(), self.bench.recorder(self.readout.layer) as (entered, found):
            with contextlib.suppress(Stop):
                module(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    position_ids=positions.to(device),
                    past_key_values=cache,
                    use_cache=True,
                )
            return entered[0], [Arguments(*arguments) for arguments in found]

    # -------------------------------------------------------------------------------------------------------------- layers
    def call(self, layer: int, x: torch.Tensor, keys: Keys, prefix: bool = False) -> torch.Tensor:
        """One layer on the prefix [V, P, D] or on what stands behind it [V·n, T, D]; `keys` takes the place of its cache."""
        variants = len(x) if prefix else len(x) // self.n
        return self._call(layer, x, self.arguments(layer, variants, prefix), keys)

    @torch.no_grad()
    def step(self, layer: int, x: Stream) -> Stream:
        """One layer on every token of every variant."""
        before = Keys()
        prefix = self.call(layer, x.prefix, before, prefix=True) if self.prefix else x.prefix
        return Stream(prefix, self.call(layer, x.rest, Keys(before.own, self.n)))

    @torch.no_grad()
    def last(self, layer: int, x: Stream) -> torch.Tensor:
        """The last layer's output at the positions that are read, [V·n, K, D]."""
        variants, k = len(x.rest) // self.n, self.readout.positions
        arguments = self.arguments(layer, variants, False)
        if x.rest.shape[1] == k or (k > 1 and not arguments.masked):
            return self.step(layer, x).rest[:, -k:]
        before = self._keys(layer, x.prefix, self.arguments(layer, variants, True)) if self.prefix else None
        early = self._keys(layer, x.rest[:, :-k], arguments.at(slice(None, -k)))
        early = early if before is None else joined(before, self.n, early)
        return self._call(layer, x.rest[:, -k:], arguments.at(slice(-k, None)), Keys(early))

    def idle(self, layer: int, x: torch.Tensor, prefix: bool = False) -> torch.Tensor:
        """One layer whose attention something else stands in for: its masks are not looked at, so any of the tokens will do."""
        variants = len(x) if prefix else len(x) // self.n
        return self._call(layer, x, self.arguments(layer, variants, prefix), Keys())

    def _keys(self, layer: int, x: torch.Tensor, arguments: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
        keys = Keys(stop=True)
        with contextlib.suppress(Stop):
            self._call(layer, x, arguments, keys)
        return keys.given

    def _call(self, layer: int, x: torch.Tensor, arguments: Arguments, keys: Keys) -> torch.Tensor:
        return self.bench.step(layer, x, arguments.with_cache(keys))

    # ----------------------------------------------------------------------------------------------------------------- run
    def run(self) -> list[Stream]:
        """The residual stream before every layer below the readout, V = 1, with the weights as they stand."""
        found = [self.embedded()]
        for layer in range(self.readout.layer - 1):
            found.append(self.step(layer, found[-1]))
        return found

    def state(self, x: Stream, start: int) -> torch.Tensor:
        """The readout of every variant, float64 [V, n] on the CPU, from the residual stream before layer `start`."""
        for layer in range(start, self.readout.layer - 1):
            x = self.step(layer, x)
        end = self.last(self.readout.layer - 1, x) if start < self.readout.layer else x.rest[:, -self.readout.positions :]
        return self.read(end)

    @torch.no_grad()
    def read(self, end: torch.Tensor) -> torch.Tensor:
        """The readout, float64 [V, n] on the CPU, of the residual stream at the positions that are read, [V·n, K, D]."""
        return self.readout.read(end.unflatten(0, (-1, self.n))).double().cpu()


class Arguments(NamedTuple):
    """What a layer is called with beside the residual stream."""

    positional: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def masked(self) -> bool:
        """Whether there is a mask; without one attention is causal by itself, which is right for whole texts alone."""
        return any(isinstance(v, torch.Tensor) and v.dim() == 4 for v in (*self.positional, *self.keywords.values()))

    def with_cache(self, keys: Keys) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same, with `keys` in place of the cache."""

        def own(value: Any) -> Any:
            return keys if isinstance(value, Cache) else value

        return tuple(map(own, self.positional)), {name: own(value) for name, value in self.keywords.items()}

    def at(self, tokens: slice) -> Arguments:
        """The same for some of the tokens: masks [rows, 1, T, slots], rotary tables [rows, T, width], positions [rows, T]."""

        def part(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(part, value))
            if not isinstance(value, torch.Tensor):
                return value
            return value[:, :, tokens] if value.dim() == 4 else value[tokens] if value.dim() == 1 else value[:, tokens]

        return Arguments(tuple(map(part, self.positional)), {name: part(value) for name, value in self.keywords.items()})


@contextlib.contextmanager
def standing_in(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Calls `forward` in place of the module's own inside the `with`; its hooks still run."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
