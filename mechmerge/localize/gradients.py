"""First-order effects of replacing weights, per prompt and per component, from one forward and one backward pass.

For a scalar f of each prompt and a weight difference δ, the first-order change is ⟨∂f/∂θ, δ⟩ (weight patching's gradient
screening, arXiv 2604.13694 §III-D). The weight gradient itself is never formed. For a linear map y = W x

    ⟨∂f/∂W, δ⟩ restricted to row r    = Σ_t ∂f/∂y[t, r] · (δ x[t])[r]
    ⟨∂f/∂W, δ⟩ restricted to column c = Σ_t x[t, c] · (δᵀ ∂f/∂y[t])[c]

so one more matrix product a layer gives every head, KV group and neuron for every prompt of the batch (ours; standard
errors over prompts come for free, and memory stays at one model plus one tensor). Norms and embeddings are linear in
their weights too: for them f's change is ⟨∂f/∂y, y(θ+δ) − y(θ)⟩ exactly to first order.

Shapes: B prompts, T tokens, E experts, U units.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mechmerge.localize.bench import Bench
from mechmerge.models.components import Block

Deltas = Callable[[str], Sequence[torch.Tensor | None]]
"""The differences of a tensor, one an expert; None where an expert does not change it."""
Key = tuple[int, str]
"""(layer, leaf kind); layer is −1 outside the layers."""


class DeltaProbe:
    """Hooks that turn `Bench.backward`, told the probe's `turn`, into scores[(layer, kind)] of shape [E, B, U] of each batch.

    Args:
        bench: the model, at the weights where the gradient is wanted.
        deltas: the weight differences.
        experts: how many there are.
        below: only the first `below` layers are probed (components above an anchor score exactly 0).
    """

    def __init__(self, bench: Bench, deltas: Deltas, experts: int, below: int) -> None:
        self.bench, self.deltas, self.experts = bench, deltas, experts
        self.scores: dict[Key, torch.Tensor] = {}
        self._batches: dict[int, dict[Key, torch.Tensor]] = {}
        self._handles: list[Any] = []
        owners = bench.checkpoint.layout.owners()
        by_module: dict[str, dict[str, list[tuple[Key, Block]]]] = {}
        for tensor, owned in owners.items():
            keep = [((layer, kind), block) for layer, kind, block in owned if layer < below]
            if keep:
                module, _, parameter = tensor.rpartition(".")
                by_module.setdefault(module, {})[parameter] = keep
        arch = bench.checkpoint.arch
        if arch.tied:
            by_module[arch.family.head] = {"weight": [((-1, "embed"), Block(f"{arch.family.embed[0]}.weight", None))]}
        for name, owned_parameters in by_module.items():
            module = bench.module.get_submodule(bench.loaded(name))
            self._handles.append(module.register_forward_hook(self._watcher(owned_parameters)))

    def __enter__(self) -> DeltaProbe:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def turn(self, batch: int) -> None:
        """Gradients from now on are those of this batch."""
        self.scores = self._batches.setdefault(batch, {})

    def take(self, batch: int) -> dict[Key, torch.Tensor]:
        """The scores of a batch, float32 [E, B, U] on the CPU, and forgets them."""
        return self._batches.pop(batch)

    # --------------------------------------------------------------------------------------------------------------- hooks
    def _watcher(self, owned: dict[str, list[tuple[Key, Block]]]) -> Callable[..., Any]:
        def watch(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            if not torch.is_grad_enabled():
                return None
            replaced = None
            if isinstance(module, torch.nn.Embedding):
                # The graph starts here: no weight requires a gradient.
                output = replaced = output.detach().requires_grad_(True)
            x = inputs[0].detach()
            output.register_hook(lambda gradient: self._score(module, owned, x, gradient.detach()))
            return replaced

        return watch

    @torch.no_grad()
    def _score(
        self, module: torch.nn.Module, owned: dict[str, list[tuple[Key, Block]]], x: torch.Tensor, dy: torch.Tensor
    ) -> None:
        tensors = {p: self.deltas(blocks[0][1].tensor) for p, blocks in owned.items()}
        for e in range(self.experts):
            given = {p: delta for p, t in tensors.items() if (delta := t[e]) is not None}
            if given and _is_linear(module):
                self._linear(e, module, owned, given, x, dy)
            elif given:
                change = (dy.float() * _change(module, given, x)).flatten(1).sum(1)
                # All parameters of such a module belong to one component (norms, rest or embed).
                self._add(next(iter(owned.values()))[0][0], e, change[:, None])

    def _linear(
        self,
        e: int,
        module: torch.nn.Module,
        owned: dict[str, list[tuple[Key, Block]]],
        given: dict[str, torch.Tensor],
        x: torch.Tensor,
        dy: torch.Tensor,
    ) -> None:
        out_dim = 0 if isinstance(module, torch.nn.Linear) else 1
        for parameter, delta in given.items():
            delta = delta.to(dy.device, dy.dtype)
            along: dict[bool, torch.Tensor] = {}
            for key, block in owned[parameter]:
                rows = parameter == "bias" or block.dim in (None, out_dim)
                if rows not in along:
                    if parameter == "bias":
                        product = dy * delta  # [B, T, out]
                    elif rows:
                        product = dy * (x @ (delta.T if out_dim == 0 else delta))  # [B, T, out]
                    else:
                        product = x * (dy @ (delta if out_dim == 0 else delta.T))  # [B, T, in]
                    along[rows] = product.sum(1, dtype=torch.float32)
                values = along[rows]
                self._add(key, e, values.sum(-1, keepdim=True) if block.dim is None else per_unit(values, block))

    def _add(self, key: Key, e: int, values: torch.Tensor) -> None:
        if key not in self.scores:
            self.scores[key] = torch.zeros(self.experts, values.shape[0], values.shape[1])
        self.scores[key][e] += values.cpu()


def per_unit(along: torch.Tensor, block: Block) -> torch.Tensor:
    """Sums scores along a tensor's dimension, [B, size], into the block's units, [B, U]."""
    span = (block.units - 1) * block.stride + block.width
    return along[:, block.offset : block.offset + span].unfold(1, block.width, block.stride).sum(-1)


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _change(module: torch.nn.Module, given: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """How the output of a module that is linear in its weights changes when the differences are added (float32)."""
    deltas = {name: delta.to(x.device, torch.float32) for name, delta in given.items()}
    if isinstance(module, torch.nn.Embedding):
        looked_up: torch.Tensor = torch.func.functional_call(module, deltas, (x,))
        return looked_up
    own = {name: parameter.float() for name, parameter in module.named_parameters()}
    new = {name: value + deltas[name] if name in deltas else value for name, value in own.items()}
    before: torch.Tensor = torch.func.functional_call(module, own, (x.float(),))
    after: torch.Tensor = torch.func.functional_call(module, new, (x.float(),))
    return after - before
