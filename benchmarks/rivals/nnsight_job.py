"""The job with nnsight (0.8): one trace of all prompts for every swapped head.

- `traced`: the model runs whole;
- `stopped`: `tracer.stop()` ends the pass at the anchor;
- `skipped`: besides, the layers below the swapped head do not run (`skip`): the base's residual stream, kept from one
  trace, takes their place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import nnsight
import torch
from nnsight import TransformersModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.rivals.job import Job, Measure, serve


def load(job: Job) -> Mapping[str, Measure]:
    """The variants on a wrapped transformers model."""
    module: Any = AutoModelForCausalLM.from_pretrained(job.base, dtype=torch.float32).eval()
    model: Any = TransformersModel(module, tokenizer=AutoTokenizer.from_pretrained(job.base), task="text-generation")
    layers, top, experts = model.model.layers, job.anchor - 1, job.experts()
    prompts = {"input_ids": job.ids, "attention_mask": job.mask, "position_ids": job.positions()}

    @contextlib.contextmanager
    def swapped(layer: int, head: int) -> Iterator[None]:
        """The expert's weights of a head inside the `with`."""
        attention = module.model.layers[layer].self_attn
        own = slice(head * job.width, (head + 1) * job.width)
        query, output = attention.q_proj.weight[own], attention.o_proj.weight[:, own]
        before = query.clone(), output.clone()
        query.copy_(experts[layer][0][own])
        output.copy_(experts[layer][1][:, own])
        try:
            yield
        finally:
            query.copy_(before[0])
            output.copy_(before[1])

    def trace() -> list[torch.Tensor]:
        """The base's residual stream after every layer below the last one that runs."""
        with model.trace(prompts):
            found = nnsight.save([layers[layer].output for layer in range(top)])
        return list(found)

    residual = trace()

    def traced(layer: int, head: int) -> torch.Tensor:
        with swapped(layer, head), model.trace(prompts):
            end: torch.Tensor = layers[top].output[:, -1].save()
        return end  # nnsight runs the body of the `with` elsewhere

    def stopped(layer: int, head: int) -> torch.Tensor:
        with swapped(layer, head), model.trace(prompts) as tracer:
            end: torch.Tensor = layers[top].output[:, -1].save()
            tracer.stop()
        return end

    def skipped(layer: int, head: int) -> torch.Tensor:
        with swapped(layer, head), model.trace(prompts) as tracer:
            for below in range(layer):
                layers[below].skip(residual[below])
            end: torch.Tensor = layers[top].output[:, -1].save()
            tracer.stop()
        return end

    return {"traced": traced, "stopped": stopped, "skipped": skipped}


if __name__ == "__main__":
    serve("nnsight", load)
