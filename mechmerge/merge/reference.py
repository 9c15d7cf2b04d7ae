"""The formula of a recipe, written out plainly: what both engines' tensors are verified and tested against.

    merged = base + Σ over experts, in the recipe's order, of c ⊙ (expert − base)

in float32, with c written element by element, component after component. The direct writer differs in two points: it copies
where there is nothing to sum, and it leaves out experts whose coefficient is 0, which may change the sign of a zero.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch

from mechmerge.models.checkpoint import Checkpoint
from mechmerge.models.components import Component
from mechmerge.recipe.coefficients import Coefficients


def coefficient_tensor(name: str, base: Checkpoint, found: Coefficients, expert: str) -> torch.Tensor:
    """One expert's coefficient of every element of a tensor, float32, NaN where no component owns it."""
    result = torch.full(base.shapes[name], float("nan"))
    for layer, kind, block in base.layout.owners()[name]:
        for unit in range(block.units):
            value = found.of(expert, Component(layer, kind, unit))
            if block.dim is None:
                result.fill_(value)
            else:
                part = block.indices(unit)
                result.narrow(block.dim, part.start, part.stop - part.start).fill_(value)
    return result


def merged_tensor(name: str, base: Checkpoint, experts: Mapping[str, Checkpoint], found: Coefficients) -> torch.Tensor:
    """One merged tensor in float32, before it is rounded to the output dtype.

    Args:
        name: full name of a tensor of the base.
        base: the base.
        experts: by name, in the recipe's order.
        found: the recipe's coefficients.
    """
    start = base.tensor(name).float()
    parts = [
        coefficient_tensor(name, base, found, expert) * (checkpoint.tensor(name).float() - start)
        for expert, checkpoint in experts.items()
    ]
    return start + functools.reduce(torch.add, parts)


def direct_tensor(
    name: str, base: Checkpoint, experts: Mapping[str, Checkpoint], found: Coefficients, dtype: torch.dtype
) -> torch.Tensor:
    """One merged tensor of the direct writer, in the output dtype; arguments as for `merged_tensor`."""
    start = base.tensor(name)
    values = {expert: checkpoint.tensor(name) for expert, checkpoint in experts.items()}
    shares = {expert: coefficient_tensor(name, base, found, expert) for expert in experts}
    entering = torch.stack([share != 0 for share in shares.values()]).sum(0)
    # −0.0 is what can be added without changing a bit: not even +0.0 is.
    parts = [
        torch.where(share != 0, share * (values[expert].float() - start.float()), -0.0) for expert, share in shares.items()
    ]
    merged = (start.float() + functools.reduce(torch.add, parts)).to(dtype)
    for expert, share in shares.items():
        merged = torch.where((share == 1) & (entering == 1), values[expert].float().to(dtype), merged)
    return torch.where(entering == 0, start.float().to(dtype), merged)
