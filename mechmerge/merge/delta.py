"""What a recipe adds to one tensor of the base: Σ over experts, in the recipe's order, of c ⊙ (expert − base), in float32.

The one place where coefficients meet weights; merge/reference.py is its plain twin.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mechmerge.errors import MechmergeError
from mechmerge.recipe.coefficients import Coefficients, Owners, tensor_coefficient


def coefficient_of(name: str, delta: torch.Tensor, owners: Owners, found: Coefficients, expert: str) -> torch.Tensor:
    """An expert's coefficients of a tensor: one value, or one a row or column, in a shape that multiplies `delta` (float32).

    Args:
        name: full name of the tensor.
        delta: the expert's delta; its shape and device are looked at.
        owners: the components that share the tensor.
        found: the recipe's coefficients.
        expert: its name in the recipe.
    """
    dim, values = tensor_coefficient(name, tuple(delta.shape), owners, found, expert)
    shape = [1] * delta.dim()
    if dim is not None:
        shape[dim] = -1
    return torch.from_numpy(values.copy()).to(delta.device).reshape(shape)


def summed_delta(
    name: str, base: torch.Tensor, experts: Mapping[str, torch.Tensor], owners: Owners, found: Coefficients
) -> torch.Tensor:
    """The sum of the experts' weighted deltas, of the shape of `base`, in float32.

    Args:
        name: full name of the tensor.
        base: the base's tensor, float32.
        experts: the experts' tensors by name, float32, in the recipe's order.
        owners: the components that share the tensor.
        found: the recipe's coefficients.

    Raises:
        MechmergeError: no experts.
    """
    total = None
    for which, tensor in experts.items():
        delta = tensor - base
        delta *= coefficient_of(name, delta, owners, found, which)
        total = delta if total is None else total.add_(delta)
    if total is None:
        raise MechmergeError(name, expected="experts", found="none")
    return total
