"""The job that every tool gets, and the loop in which it does parts of it: `python -m benchmarks.rivals.TOOL_job JOB.npz`.

The job: put the expert's weights of one attention head (its query rows and output columns) into the base, run the prompts, and
read s = ⟨h, v⟩, where h is the residual stream at the last prompt token after some layers.

A tool loads the base, says on stdout (one line of JSON) which variants of the job it offers, and then does what each line on
stdin asks for: {"variant": NAME, "heads": [[layer, head], …], "states": PATH}. It writes the states, float64 [heads, prompts],
to that path and answers {"seconds": S}. Loading the model and reading the expert's weights is not timed.

Shapes: n prompts, T tokens (padded on the left), D residual width.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open

Measure = Callable[[int, int], torch.Tensor]
"""(layer, head) → the residual stream at the last prompt token with that head swapped, [n, D]."""


class Job(NamedTuple):
    """What there is to do."""

    base: str
    """Model folder."""
    expert: str
    """Model folder of the same architecture."""
    anchor: int
    """The residual stream after this many layers is read."""
    width: int
    """Of a head."""
    threads: int
    ids: torch.Tensor
    """[n, T]"""
    mask: torch.Tensor
    """[n, T], 1 where there is a token."""
    vector: torch.Tensor
    """v, [D]."""

    def save(self, path: Path) -> None:
        """Writes it as an npz file."""
        values: dict[str, Any] = self._asdict()
        np.savez(path, **values)

    @classmethod
    def load(cls, path: str) -> Job:
        """Reads what `save` wrote."""
        with np.load(path) as found:
            arrays = [found[name] for name in cls._fields]
        values: list[Any] = [torch.from_numpy(array) if array.ndim else array.item() for array in arrays]
        return cls(*values)

    def positions(self) -> torch.Tensor:
        """[n, T] position of each token in its own prompt."""
        return (self.mask.cumsum(-1) - 1).clamp(min=0)

    def experts(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The expert's weights of the query and output projections of every layer below the anchor."""
        with safe_open(Path(self.expert) / "model.safetensors", "pt") as file:
            names = [f"model.layers.{layer}.self_attn.{{}}_proj.weight" for layer in range(self.anchor)]
            return [(file.get_tensor(name.format("q")), file.get_tensor(name.format("o"))) for name in names]


@torch.no_grad()
def serve(package: str, load: Callable[[Job], Mapping[str, Measure]]) -> None:
    """Does the job of argv[1] as asked for on stdin.

    Args:
        package: the distribution whose version is told.
        load: loads the models and returns the variants of the job by name.
    """
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = Job.load(sys.argv[1])
    torch.set_num_threads(job.threads)
    variants = load(job)
    versions = {name: metadata.version(name) for name in (package, "torch", "transformers")}
    print(json.dumps({"variants": list(variants), "versions": versions}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        seconds, states = timed(variants[asked["variant"]], asked["heads"], job.vector)
        np.save(asked["states"], states)
        print(json.dumps({"seconds": seconds}), file=answers, flush=True)


def timed(measure: Measure, heads: Sequence[tuple[int, int]], vector: torch.Tensor) -> tuple[float, np.ndarray]:
    """Seconds, and states [heads, n], of one head after the other."""
    start = time.perf_counter()
    states = torch.stack([measure(layer, head).float() @ vector for layer, head in heads])
    return time.perf_counter() - start, states.double().numpy()
