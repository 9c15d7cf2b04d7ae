"""A bench that holds one layer of the model at a time, for models that do not fit into memory.

Forward, all batches go through a layer before the next one is read; what a layer was given is kept, in memory or in a
temporary file. Backward, layers are read again from the top down, run again with a graph, and the gradient of a layer's
output becomes that of its input (rematerialisation: Chen et al. 2016, https://arxiv.org/abs/1604.06174, with every layer a
segment; reading the weights a second time is ours). So the model is read twice whatever the number of batches, and runs
forward twice and backward once. Operations and their order are those of the model in memory.

Outside the layers, only the rows of the embeddings that prompts use are filled; final norm and language head are whole while
they run. Shapes: B prompts, T tokens, D residual width.
"""

from __future__ import annotations

import contextlib
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, overload

import numpy as np
import torch

from mechmerge.localize.bench import Arguments, Batch, Bench, Place, Trace
from mechmerge.localize.plan import KEPT, Plan
from mechmerge.models.checkpoint import Checkpoint
from mechmerge.models.load import empty_model
from mechmerge.models.references import Model

TOP = -1
"""Number of what stands above the layers: final norm and language head."""
Source = Callable[[str], torch.Tensor]


class StreamedBench(Bench):
    """A model whose layers are read from its safetensors when they run, and dropped when another one does.

    A gradient comes from `backward` alone: a graph over several layers would need them all.

    Args:
        model: the model whose weights are used first (the base).
        dtype: dtype of weights and activations.
        device: torch device.
        kept: bytes of layer inputs that one pass keeps in memory; more go to a temporary file.
    """

    open = staticmethod(empty_model)
    resident = False

    def __init__(self, model: Model, dtype: str = "float32", device: str = "cpu", kept: int = KEPT) -> None:
        super().__init__(model, dtype, device)
        self.kept = kept
        self.most = 0
        """Most layers that were in memory at once."""
        self._read: Source = self.checkpoint.tensor
        self._replacements: dict[str, list[tuple[Place, Source]]] = {}
        self._resident: dict[int, list[str]] = {}
        self._spare: dict[str, torch.Tensor] = {}
        """Memory of the layer dropped last, by name within the layer: new memory would cost as much time as reading."""
        self._filled: dict[str, torch.Tensor] = {}
        """Which rows of an embedding are there."""
        self._passed = self._stepping = False
        self._empty = {name: parameter.data for name, parameter in self.parameters.items()}
        family, names = self.checkpoint.arch.family, list(self.parameters)

        def under(*modules: str) -> list[str]:
            return [name for name in names if name.startswith(tuple(f"{module}." for module in modules))]

        self._names = {i: under(f"{family.layers}.{i}") for i in range(len(self.layers))}
        head = family.embed[0] if self.checkpoint.arch.tied else family.head
        self._layer_of = {name: i for i, own in self._names.items() for name in own}
        self._names[TOP] = under(family.final_norm, head)
        for i, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(partial(self._before_layer, i))
        for module in (family.final_norm, self.loaded(family.head)):
            self.module.get_submodule(module).register_forward_pre_hook(lambda *_: self._fetch(TOP))
        for module in family.embed:
            hook = partial(self._before_embedding, f"{module}.weight")
            self.module.get_submodule(module).register_forward_pre_hook(hook)

    # ----------------------------------------------------------------------------------------------------------- residency
    def _before_layer(self, i: int, _module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if self._passed:
            return
        if (
            torch.is_grad_enabled()
            and not self._stepping
            and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)
        ):
            raise RuntimeError("a streamed model has no graph over its layers: use Bench.backward")
        self._fetch(i)

    @torch.no_grad()
    def _fetch(self, number: int) -> None:
        """Puts a layer, or the top, into memory, and drops what else is there."""
        if number in self._resident:
            return
        for other in list(self._resident):
            self._drop(other)
        self._resident[number] = self._names[number]
        self.most = max(self.most, len(self._resident))
        if number == TOP:
            self._spare.clear()
        for name in self._names[number]:
            self._filled.pop(name, None)
            self.parameters[name].data = self._value(name, self._spare.pop(self._within(number, name), None))

    def _drop(self, number: int) -> None:
        for name in self._resident.pop(number):
            if number != TOP:
                self._spare[self._within(number, name)] = self.parameters[name].data
            self.parameters[name].data = self._empty[name]

    def _within(self, number: int, name: str) -> str:
        return name.removeprefix(f"{self.checkpoint.arch.family.layers}.{number}.")

    @torch.no_grad()
    def _before_embedding(self, name: str, _module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if any(name in names for names in self._resident.values()):
            return
        parameter, rows = self.parameters[name], inputs[0].unique()
        if name not in self._filled:
            # Memory that is not written into is not resident: the table costs its filled rows.
            parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.device)
            self._filled[name] = torch.zeros(len(parameter), dtype=torch.bool, device=self.device)
        rows = rows[~self._filled[name][rows]]
        if len(rows):
            value = self._value(name) if self._replacements.get(name) else self._read(name)
            parameter.data[rows] = value[rows.to(value.device)].to(parameter.device, parameter.dtype)
            self._filled[name][rows] = True

    def _value(self, name: str, memory: torch.Tensor | None = None) -> torch.Tensor:
        """A parameter's value, read anew, in the given memory if it fits."""
        empty = self._empty[name]
        if memory is None or memory.shape != empty.shape:
            memory = torch.empty(empty.shape, dtype=empty.dtype, device=self.device)
        value = memory.copy_(self._read(name))
        for place, source in self._replacements.get(name, ()):
            place.put(value, place.get(source(name)))
        return value

    def _forget(self, names: Iterable[str]) -> None:
        """Drops what holds any of these parameters: it is read again when it is needed."""
        names = set(names)
        for number in [n for n, own in self._resident.items() if names.intersection(own)]:
            self._drop(number)
        for name in names.intersection(self._filled):
            del self._filled[name]
            self.parameters[name].data = self._empty[name]

    # ------------------------------------------------------------------------------------------------------------- weights
    def load(self, source: Checkpoint | Source) -> None:
        """Weights come from a checkpoint, or a function of the tensor's name, from now on: it is asked when a layer runs."""
        self._read = source.tensor if isinstance(source, Checkpoint) else source
        self._forget(self.parameters)

    @torch.no_grad()
    def weight(self, name: str) -> torch.Tensor:
        if name not in self._layer_of:
            return self._value(name)
        self._fetch(self._layer_of[name])  # whoever asks for one tensor of a layer asks for others, or runs it
        return self.parameters[name].detach()

    @contextlib.contextmanager
    def _replaced(self, places: Sequence[tuple[str, Place]], source: Source) -> Iterator[None]:
        names = [name for name, _ in places]
        self._forget(names)
        for name, place in places:
            self._replacements.setdefault(name, []).append((place, source))
        try:
            yield
        finally:
            for name in reversed(names):
                self._replacements[name].pop()
            self._forget(names)

    # ------------------------------------------------------------------------------------------------------------- forward
    @contextlib.contextmanager
    def passing(self, residual: torch.Tensor | None = None) -> Iterator[None]:
        self._passed = True
        try:
            with super().passing(residual):
                yield
        finally:
            self._passed = False

    def _entry(self, batch: Batch, stop: int) -> tuple[torch.Tensor, list[Arguments]]:
        """The first layer's input, and what each of the first `stop` layers is called with, without running any."""
        with self.passing(), self.recorder(stop) as (inputs, arguments):
            self.run(batch, stop)
        return inputs[0], arguments

    @torch.no_grad()
    def _sweep(self, batches: Sequence[Batch], stop: int, kept: _Kept | None) -> list[Trace]:
        """Takes all batches through a layer before the next; without `kept`, traces hold the end alone."""
        entries = [self._entry(batch, stop) for batch in batches]
        streams = [x for x, _ in entries]
        found: list[list[Callable[[], torch.Tensor]]] = [[] for _ in batches]
        for layer in range(stop):
            for i, (_, arguments) in enumerate(entries):
                if kept is not None:
                    found[i].append(kept.keep(streams[i]))
                streams[i] = self.step(layer, streams[i], arguments[layer])
        return [
            Trace(_Residuals([*loads, partial(_same, x)]), arguments)
            for loads, x, (_, arguments) in zip(found, streams, entries, strict=True)
        ]

    def residuals(self, batches: Sequence[Batch], stop: int) -> Iterator[torch.Tensor]:
        return (trace.residual[-1] for trace in self._sweep(batches, stop, None))

    def traces(self, batches: Sequence[Batch], stop: int) -> Iterator[Trace]:
        return iter(self._sweep(batches, stop, _Kept(self.kept)))

    # ------------------------------------------------------------------------------------------------------------ backward
    def backward(
        self,
        batches: Sequence[Batch],
        stop: int,
        scalar: Callable[[int, torch.Tensor], torch.Tensor],
        turn: Callable[[int], None],
    ) -> None:
        traces = self._sweep(batches, stop, _Kept(self.kept))
        gradients = []
        for i, trace in enumerate(traces):
            turn(i)
            x = trace.residual[-1].detach().requires_grad_(True)
            gradients.append(_gradient(scalar(i, x).sum(), x, None))
        self._stepping = True
        try:
            for layer in reversed(range(stop)):
                for i, trace in enumerate(traces):
                    turn(i)
                    x = trace.residual[layer].detach().requires_grad_(True)
                    gradients[i] = _gradient(self.step(layer, x, trace.arguments[layer]), x, gradients[i])
        finally:
            self._stepping = False
        for i, batch in enumerate(batches):
            turn(i)
            x, _ = self._entry(batch, stop)
            if x.requires_grad:  # a hook on the embeddings started a graph
                x.backward(gradients[i])


def open_bench(model: Model, dtype: str, device: str, plan: Plan) -> Bench:
    """A bench that keeps within a plan's memory."""
    return StreamedBench(model, dtype, device, plan.kept) if plan.streamed else Bench(model, dtype, device)


def _gradient(y: torch.Tensor, x: torch.Tensor, above: torch.Tensor | None) -> torch.Tensor:
    (found,) = torch.autograd.grad(y, x, above)
    return found


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class _Kept:
    """Tensors kept in memory up to a number of bytes, and in a nameless temporary file beyond.

    The file is read and written, not mapped: mapped pages would count as the process's memory.
    """

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._file: Any = None

    def keep(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """A function that gives the tensor back."""
        self._left -= tensor.nbytes
        if self._left >= 0:
            return partial(_same, tensor)
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the last tensor's function is gone
            weakref.finalize(self, self._file.close)
        start = self._file.seek(0, 2)
        self._file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return partial(self._load, start, tensor.shape, tensor.dtype, tensor.device)

    def _load(self, start: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        self._file.seek(start)
        data = np.empty(shape.numel() * dtype.itemsize, np.uint8)
        self._file.readinto(data)
        return torch.from_numpy(data).view(dtype).view(shape).to(device)


class _Residuals(Sequence[torch.Tensor]):
    """Tensors that are loaded when they are asked for."""

    def __init__(self, loads: Sequence[Callable[[], torch.Tensor]]) -> None:
        self._loads = loads

    def __len__(self) -> int:
        return len(self._loads)

    @overload
    def __getitem__(self, index: int) -> torch.Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> _Residuals: ...
    def __getitem__(self, index: int | slice) -> torch.Tensor | _Residuals:
        return _Residuals(self._loads[index]) if isinstance(index, slice) else self._loads[index]()
