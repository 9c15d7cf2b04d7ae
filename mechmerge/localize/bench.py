"""One loaded model whose weights can be set, patched and put back: the bench that every measurement works on.

A single copy of the weights is in memory (localize/stream.py: two layers of it); the other model is read from its
safetensors tensor by tensor. Shapes: B prompts, T tokens, D residual width, L layers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mechmerge.errors import LocalizeError
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.models.components import Block
from mechmerge.models.load import load_model, load_tokenizer
from mechmerge.models.references import Model


class Stop(Exception):
    """Ends a forward pass once the layers of interest have run."""


@dataclass(frozen=True)
class Batch:
    """Left-padded token ids of some prompts, with what each decoder layer is called with."""

    ids: torch.Tensor
    """[B, T]"""
    mask: torch.Tensor
    """[B, T], 1 where there is a token"""

    @property
    def positions(self) -> torch.Tensor:
        """[B, T] position of each token in its own prompt."""
        return (self.mask.cumsum(-1) - 1).clamp(min=0)


class Bench:
    """A model with settable weights.

    Args:
        model: the model whose weights are loaded first (the base).
        dtype: dtype of weights and activations.
        device: torch device.
    """

    open: Callable[..., Any] = staticmethod(load_model)
    """Makes the transformers model of a folder, a dtype and a device."""
    resident = True
    """Whether all weights stay in memory; if not, every pass through the layers reads them."""

    def __init__(self, model: Model, dtype: str = "float32", device: str = "cpu") -> None:
        self.checkpoint = model.checkpoint()
        self.module: Any = self.open(model.path, dtype, device)
        self.folder, self.device = model.path, device
        self.layers: list[torch.nn.Module] = list(self.module.get_submodule(self.checkpoint.arch.family.layers))
        loaded = dict(self.module.named_parameters())
        self.parameters: dict[str, torch.nn.Parameter] = {name: loaded[self.loaded(name)] for name in self.checkpoint.entries}

    @functools.cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return load_tokenizer(self.folder)

    def loaded(self, name: str) -> str:
        """The name that a checkpoint's tensor or module has in the loaded model."""
        return self.checkpoint.arch.family.loaded_name(name)

    # -------------------------------------------------------------------------------------------------------------- tokens
    def encode(self, texts: Iterable[str], *, special_tokens: bool = False) -> Batch:
        """Tokenizes rendered prompts into one left-padded batch.

        Raises:
            LocalizeError: a prompt is longer than the model's context.
        """
        encoded = self.tokenizer(list(texts), return_tensors="pt", padding=True, add_special_tokens=special_tokens)
        self.check_length(encoded.input_ids.shape[1])
        return Batch(encoded.input_ids.to(self.device), encoded.attention_mask.to(self.device))

    def batch(self, ids: Sequence[Sequence[int]]) -> Batch:
        """Puts token ids of some texts into one left-padded batch."""
        self.check_length(max(map(len, ids)))
        width, pad = max(map(len, ids)), self.tokenizer.pad_token_id
        rows = torch.tensor([[pad] * (width - len(own)) + list(own) for own in ids])
        mask = torch.tensor([[0] * (width - len(own)) + [1] * len(own) for own in ids])
        return Batch(rows.to(self.device), mask.to(self.device))

    def check_length(self, tokens: int) -> None:
        """Refuses a prompt of so many tokens that does not fit into the model's context.

        Raises:
            LocalizeError: it does not.
        """
        limit = getattr(self.module.config, "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            raise LocalizeError("prompts", expected=f"at most {limit} tokens (the model's context)", found=str(tokens))

    def encode_answers(self, examples: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[Batch, torch.Tensor]:
        """Puts (prompt, answer) token ids into one left-padded batch.

        Returns:
            The batch, and the answers' ids as labels [B, K] on the right, -100 where an answer is shorter than the longest.
        """
        width, keep = max(len(p) + len(a) for p, a in examples), max(len(a) for _, a in examples)
        ids = torch.full((len(examples), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        labels = torch.full((len(examples), keep), -100)
        for i, (prompt, answer) in enumerate(examples):
            ids[i, width - len(prompt) - len(answer) :] = torch.tensor([*prompt, *answer])
            mask[i, width - len(prompt) - len(answer) :] = 1
            labels[i, keep - len(answer) :] = torch.tensor(answer)
        return Batch(ids.to(self.device), mask.to(self.device)), labels.to(self.device)

    # ------------------------------------------------------------------------------------------------------------- forward
    def answer_logits(self, batch: Batch, labels: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Logits that predict the labels of `encode_answers`, [B, K, vocabulary].

        Args:
            residual: the residual stream after all layers, [B, T, D], where it is known: only norm and head run then.
        """
        with contextlib.nullcontext() if residual is None else self.passing(residual):
            logits: torch.Tensor = self._call(batch, logits_to_keep=labels.shape[1] + 1).logits
        return logits[:, :-1]

    def answer_losses(
        self,
        batch: Batch,
        labels: torch.Tensor,
        residual: torch.Tensor | None = None,
        weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Mean negative log-likelihood per answer token of each example of `encode_answers`, [B], in nats.

        Args:
            residual: as in `answer_logits`.
            weights: of the tokens in the mean, [B, K], with the sum 1 in every row; all alike when None.
        """
        losses = self.token_losses(batch, labels, residual)
        return losses.sum(1) / (labels >= 0).sum(1) if weights is None else (losses * weights).sum(1)

    def token_losses(self, batch: Batch, labels: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Negative log-likelihood of every label of `encode_answers`, [B, K], in nats; 0 where there is none."""
        logits = self.answer_logits(batch, labels, residual)
        per_token = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=-100
        )
        return per_token.view(labels.shape)

    def logits(self, residual: torch.Tensor) -> torch.Tensor:
        """Logits [B, K, vocabulary] of a residual stream after all layers, [B, K, D]: final norm and head alone."""
        ids = torch.zeros(residual.shape[:2], dtype=torch.long, device=residual.device)
        with self.passing(residual):
            found: torch.Tensor = self._call(Batch(ids, torch.ones_like(ids))).logits
        return found

    def run(self, batch: Batch, stop: int) -> torch.Tensor:
        """The residual stream after `stop` layers, [B, T, D]; the layers above and the language head do not run."""
        found: list[torch.Tensor] = []

        def after(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)
            raise Stop

        with hooked(self.layers[stop - 1].register_forward_hook(after)), contextlib.suppress(Stop):
            self._call(batch)
        return found[0]

    def _call(self, batch: Batch, **options: Any) -> Any:
        return self.module(
            input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False, **options
        )

    @contextlib.contextmanager
    def passing(self, residual: torch.Tensor | None = None) -> Iterator[None]:
        """Inside the `with`, layers hand on what they get, or the residual stream given."""

        def forward(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            return hidden_states if residual is None else residual

        for layer in self.layers:
            layer.forward = forward
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    def residuals(self, batches: Sequence[Batch], stop: int) -> Iterator[torch.Tensor]:
        """The residual stream after `stop` layers of each batch, [B, T, D]."""
        return (self.run(batch, stop) for batch in batches)

    def traces(self, batches: Sequence[Batch], stop: int) -> Iterator[Trace]:
        """`trace` of each batch."""
        return (self._record(batch, stop) for batch in batches)

    def trace(self, batch: Batch, stop: int) -> Trace:
        """Runs `stop` layers and keeps what is needed to resume at any of them."""
        return next(iter(self.traces([batch], stop)))

    @torch.no_grad()
    def _record(self, batch: Batch, stop: int) -> Trace:
        with self.recorder(stop) as (inputs, arguments):
            inputs.append(self.run(batch, stop))
        return Trace(inputs, arguments)

    @contextlib.contextmanager
    def recorder(self, stop: int) -> Iterator[tuple[list[torch.Tensor], list[Arguments]]]:
        """Lists that fill with what the first `stop` layers are called with."""
        inputs: list[torch.Tensor] = []
        arguments: list[Arguments] = []

        def before(_module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            inputs.append(args[0] if args else kwargs["hidden_states"])
            arguments.append((args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}))

        with contextlib.ExitStack() as stack:
            for layer in self.layers[:stop]:
                stack.enter_context(hooked(layer.register_forward_pre_hook(before, with_kwargs=True)))
            yield inputs, arguments

    @torch.no_grad()
    def resume(self, trace: Trace, start: int) -> torch.Tensor:
        """The residual stream at the trace's end, [B, T, D], computed anew from layer `start` with the current weights."""
        x = trace.residual[start]
        for layer in range(start, len(trace.arguments)):
            x = self.step(layer, x, trace.arguments[layer])
        return x

    def step(self, layer: int, x: torch.Tensor, arguments: Arguments) -> torch.Tensor:
        """One layer's output, [B, T, D], from its input and the arguments of a trace."""
        output: Any = self.layers[layer](x, *arguments[0], **arguments[1])
        after: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return after

    # ------------------------------------------------------------------------------------------------------------ backward
    def backward(
        self,
        batches: Sequence[Batch],
        stop: int,
        scalar: Callable[[int, torch.Tensor], torch.Tensor],
        turn: Callable[[int], None],
    ) -> None:
        """Sends the gradient of a scalar of each prompt back through the layers, so that hooks on modules see it.

        Args:
            batches: the prompts.
            stop: layers that run.
            scalar: (number of a batch, its residual stream after `stop` layers [B, T, D]) → [B].
            turn: told the number of a batch before each part of its gradient flows.
        """
        for i, batch in enumerate(batches):
            turn(i)
            scalar(i, self.run(batch, stop)).sum().backward()

    # ------------------------------------------------------------------------------------------------------------- weights
    @torch.no_grad()
    def load(self, source: Checkpoint | Callable[[str], torch.Tensor]) -> None:
        """Sets every weight from a checkpoint, or from a function of the tensor's name."""
        read = source.tensor if isinstance(source, Checkpoint) else source
        for name, parameter in self.parameters.items():
            parameter.copy_(read(name))

    def weight(self, name: str) -> torch.Tensor:
        """A parameter as it stands, without a gradient; valid until the next forward pass, and not to be written into."""
        return self.parameters[name].detach()

    def patched(
        self, blocks: Iterable[tuple[Block, int | None]], source: Callable[[str], torch.Tensor]
    ) -> contextlib.AbstractContextManager[None]:
        """Replaces the given blocks' units by those of `source` inside the `with`; afterwards every bit is as before.

        Args:
            blocks: (block, unit) pairs; unit None takes all units of the block.
            source: the other model's tensor by name.
        """
        return self._replaced([(block.tensor, _Units(block, unit)) for block, unit in blocks], source)

    def patched_units(
        self, units: Iterable[tuple[int, str, Sequence[int]]], source: Callable[[str], torch.Tensor]
    ) -> contextlib.AbstractContextManager[None]:
        """Replaces many units at once by those of `source` inside the `with`; afterwards every bit is as before.

        Args:
            units: (layer, leaf kind, units of that kind) triples, each (layer, kind) at most once.
            source: the other model's tensor by name.
        """
        places: list[tuple[str, Place]] = []
        for layer, kind, chosen in units:
            for block in self.checkpoint.layout.blocks(layer, kind):
                starts = block.offset + torch.as_tensor(chosen).unsqueeze(1) * block.stride
                places.append((block.tensor, _Rows(block.dim or 0, (starts + torch.arange(block.width)).flatten())))
        return self._replaced(places, source)

    @contextlib.contextmanager
    def _replaced(self, places: Sequence[tuple[str, Place]], source: Callable[[str], torch.Tensor]) -> Iterator[None]:
        """Inside the `with`, places of parameters hold the values of `source`."""
        saved: list[tuple[torch.Tensor, Place, torch.Tensor]] = []
        try:
            with torch.no_grad():
                for name, place in places:
                    target = self.parameters[name].data
                    saved.append((target, place, place.get(target).clone()))
                    place.put(target, place.get(source(name)))
            yield
        finally:
            for target, place, before in reversed(saved):
                place.put(target, before)


class Place(Protocol):
    """Some elements of a tensor."""

    def get(self, tensor: torch.Tensor) -> torch.Tensor:
        """Their values, as a copy or a view."""

    def put(self, tensor: torch.Tensor, values: torch.Tensor) -> None:
        """Writes the values of another tensor's `get` there, in this tensor's dtype and on its device."""


@dataclass(frozen=True)
class _Units:
    """A block's unit, or all its units."""

    block: Block
    unit: int | None

    def get(self, tensor: torch.Tensor) -> torch.Tensor:
        return _view(tensor, self.block, self.unit)

    def put(self, tensor: torch.Tensor, values: torch.Tensor) -> None:
        _view(tensor, self.block, self.unit).copy_(values)


@dataclass(frozen=True)
class _Rows:
    """Indices along a dimension."""

    dim: int
    where: torch.Tensor

    def get(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.index_select(self.dim, self.where.to(tensor.device))

    def put(self, tensor: torch.Tensor, values: torch.Tensor) -> None:
        tensor.index_copy_(self.dim, self.where.to(tensor.device), values.to(tensor.device, tensor.dtype))


Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a layer is called with beside the residual stream (masks, rotary tables)."""


@dataclass(frozen=True)
class Trace:
    """A forward pass that can be resumed: inputs and call arguments of each layer."""

    residual: Sequence[torch.Tensor]
    """Residual stream before each layer and, last, at the end; each [B, T, D]."""
    arguments: Sequence[Arguments]
    """What each layer was called with beside it."""


@contextlib.contextmanager
def hooked(handle: Any) -> Iterator[None]:
    """Removes a hook at the end of the `with`."""
    try:
        yield
    finally:
        handle.remove()


def _view(tensor: torch.Tensor, block: Block, unit: int | None) -> torch.Tensor:
    """The part of `tensor` that a block's unit owns, or all its units, as a view."""
    if block.dim is None:
        return tensor
    if unit is not None:
        where = block.indices(unit)
        return tensor.narrow(block.dim, where.start, block.width)
    part = tensor.narrow(block.dim, block.offset, (block.units - 1) * block.stride + block.width)
    return part.unfold(block.dim, block.width, block.stride)


def layer_source(checkpoint: Checkpoint) -> Callable[[str], torch.Tensor]:
    """A reader that keeps the tensors last read, so that patches of one layer read the file once (about one layer's bytes)."""
    return functools.lru_cache(maxsize=16)(checkpoint.tensor)
