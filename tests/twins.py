"""Plain twins of the fast paths: slow, one step at a time, and right by inspection."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from mechmerge.localize.bench import Bench, Trace
from mechmerge.localize.measure import Anchor
from mechmerge.models.components import Component


def patch_state(
    bench: Bench, trace: Trace, anchor: Anchor, component: Component, source: Callable[[str], torch.Tensor]
) -> np.ndarray:
    """State of every prompt, [n], with the component's weights swapped for those of `source`, resumed from its layer."""
    with bench.patched(bench.checkpoint.layout.component_blocks(component), source):
        return anchor.state(bench.resume(trace, component.layer)).double().cpu().numpy()
