"""How a recipe's coefficients lie in one tensor: one value for every row, or for every column, of every expert.

A tensor is seen as a matrix of its first dimension by all others; where one value holds for all of it, all rows have it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mechmerge.errors import MechmergeError
from mechmerge.recipe.coefficients import Coefficients, Owners, tensor_coefficient
from mechmerge.recipe.schema import Array

BASE = -1
"""Beside an expert's number: whose values a row or column is (`copied_from`)."""


@dataclass(frozen=True)
class Cut:
    """The coefficients of one tensor."""

    rows: int
    columns: int
    dim: int
    """0 where coefficients belong to rows, 1 where they belong to columns."""
    values: Array
    """float32 [experts in the recipe's order, rows or columns]."""

    @functools.cached_property
    def who(self) -> Array:
        """`copied_from` of every row or column."""
        return copied_from(self.values)

    @functools.cached_property
    def share(self) -> float:
        """The share of rows or columns that any expert enters."""
        return float((self.who != BASE).mean()) if self.who.size else 0.0

    @property
    def untouched(self) -> bool:
        """Whether no expert enters: the tensor is the base's."""
        return self.share == 0


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
    """For every row (or column), where its values come from: `BASE` where all coefficients are 0; k where they are a copy of
    the expert k (its coefficient is 1, all others are 0); below `BASE` where they are a sum, with one number for every set of
    experts that enter.

    Args:
        values: float32 [experts, n].
    """
    entering = values != 0
    if len(values) < 62:
        sets = (entering * (1 << np.arange(len(values), dtype=np.int64))[:, None]).sum(0)
    else:
        sets = np.unique(entering, axis=1, return_inverse=True)[1].reshape(-1) + 1
    number, first = entering.sum(0), entering.argmax(0)
    alone = (number == 1) & (np.take_along_axis(values, first[None], 0)[0] == 1)
    return np.where(number == 0, BASE, np.where(alone, first, BASE - sets))
