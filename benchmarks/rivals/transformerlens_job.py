"""The job with TransformerLens (4.3): one pass of all prompts through a `TransformerBridge` for every swapped head.

The bridge runs the transformers model with its weights as they are (no folding, no centring).

- `hooked`: the model runs whole, a hook reads the residual stream;
- `stopped`: `stop_at_layer` ends the pass at the anchor.

`start_at_layer` saves nothing: the layers below it still run, and what they give is discarded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from benchmarks.rivals.job import Job, Measure, serve


def load(job: Job) -> Mapping[str, Measure]:
    """The variants on a bridge."""
    bridge: Any = TransformerBridge.boot_transformers(job.base, device="cpu", dtype=torch.float32)
    experts = job.experts()
    prompts = {"attention_mask": job.mask, "position_ids": job.positions()}

    @contextlib.contextmanager
    def swapped(layer: int, head: int) -> Iterator[None]:
        """The expert's weights of a head inside the `with`: views [head, D, width] and [head, width, D] of the projections."""
        attention = bridge.blocks[layer].attn
        own = slice(head * job.width, (head + 1) * job.width)
        query, output = attention.W_Q[head], attention.W_O[head]
        before = query.clone(), output.clone()
        query.copy_(experts[layer][0][own].T)
        output.copy_(experts[layer][1][:, own].T)
        try:
            yield
        finally:
            query.copy_(before[0])
            output.copy_(before[1])

    def hooked(layer: int, head: int) -> torch.Tensor:
        found: list[torch.Tensor] = []

        def keep(residual: torch.Tensor, hook: Any) -> None:
            found.append(residual[:, -1])

        with swapped(layer, head):
            bridge.run_with_hooks(job.ids, fwd_hooks=[(f"blocks.{job.anchor - 1}.hook_out", keep)], **prompts)
        return found[0]

    def stopped(layer: int, head: int) -> torch.Tensor:
        with swapped(layer, head):
            end: torch.Tensor = bridge(job.ids, stop_at_layer=job.anchor, **prompts)
        return end[:, -1]

    return {"hooked": hooked, "stopped": stopped}


if __name__ == "__main__":
    serve("transformer-lens", load)
