"""How a recipe's coefficients lie in one tensor: one value for every row, or for every column, of every expert.

A tensor is seen as a matrix of its first dimension by all others; where one value holds for all of it, all rows have it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mechmerge.errors import MechmergeError
from mechmerge.recipe.coefficients import Coefficients, Owners, tensor_coefficient
from mechmerge.recipe.schema import Array


@dataclass(frozen=True)
class Cut:
    """The coefficients of one tensor."""

    rows: int
    columns: int
    dim: int
    """0 where coefficients belong to rows, 1 where they belong to columns."""
    values: Array
    """float32 [experts in the recipe's order, rows or columns]."""

    @property
    def untouched(self) -> bool:
        """Whether no expert enters: the tensor is the base's."""
        return not self.values.any()


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """(rows, columns) of a tensor seen as a matrix."""
    rows = shape[0] if shape else 1
    return rows, math.prod(shape[1:])


def cut_of(name: str, shape: tuple[int, ...], owners: Owners, found: Coefficients, experts: Sequence[str]) -> Cut:
    """The coefficients of a tensor.

    Args:
        name: full name of the tensor.
        shape: its shape.
        owners: the blocks that share it.
        found: the recipe's coefficients.
        experts: names in the recipe's order.
    """
    rows, columns = matrix_shape(shape)
    parts = [tensor_coefficient(name, shape, owners, found, expert) for expert in experts]
    dims = {dim for dim, _ in parts if dim is not None}
    if len(dims) > 1 or (dims and len(shape) > 2):
        raise MechmergeError(
            name, expected="a matrix cut along one dimension", found=f"dimensions {sorted(dims)} of {list(shape)}"
        )
    dim = dims.pop() if dims else 0
    size = (rows, columns)[dim]
    return Cut(rows, columns, dim, np.stack([np.broadcast_to(values, (size,)) for _, values in parts]))


def copied_from(values: Array) -> Array:
    """For every row (or column), who is copied there: −1 the base (all coefficients 0), k the expert k (its coefficient is 1,
    all others are 0), −2 nobody (a sum).

    Args:
        values: float32 [experts, n].
    """
    entering = values != 0
    number = entering.sum(0)
    who = entering.argmax(0)
    alone = (number == 1) & (np.take_along_axis(values, who[None], 0)[0] == 1)
    return np.where(number == 0, -1, np.where(alone, who, -2))
