"""A matrix as the product of two thin ones: exactly where few rows or columns are not zero, else by truncated SVD.

A delta of k rows is (columns of the identity) × (the rows themselves), which is it bit for bit; so is one of k columns.
Anything else is projected onto its leading singular vectors, the nearest matrix of that rank (Eckart & Young 1936,
https://doi.org/10.1007/BF02288367). The vectors come from the smaller Gram matrix in float64: deltas are float32, so what
the squaring loses is beyond what they hold. The error is computed from the float32 factors that are kept, never from the
spectrum.

Shapes: o rows, i columns, r the rank.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

How = Literal["rows", "columns", "svd"]
NOTHING = 2.0**-20
"""Share of a matrix's norm below which what is left of it is taken for rounding, so that no rank is spent on it."""


class Factors(NamedTuple):
    """b @ a is the matrix, or the nearest to it."""

    b: torch.Tensor
    """float32 [o, r]."""
    a: torch.Tensor
    """float32 [r, i]."""
    how: How
    """`rows`, `columns`: exact; `svd`: truncated."""
    residual: float
    """Frobenius norm of what the product misses."""

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]


def factorise(matrix: torch.Tensor, rank: int) -> Factors:
    """Factors of a matrix that is not zero, of at most the given rank.

    Args:
        matrix: float32 [o, i], finite.
        rank: the largest r, at least 1.
    """
    rows, columns = (matrix.ne(0).any(dim).nonzero()[:, 0] for dim in (1, 0))
    if min(len(rows), len(columns)) <= rank:
        return _selected_rows(matrix, rows) if len(rows) <= len(columns) else _selected_columns(matrix, columns)
    b, a = _truncated(matrix[rows][:, columns].double(), rank)
    whole_b, whole_a = matrix.new_zeros(matrix.shape[0], b.shape[1]), matrix.new_zeros(a.shape[0], matrix.shape[1])
    whole_b[rows], whole_a[:, columns] = b.float(), a.float()
    residual = torch.linalg.norm(matrix.double() - whole_b.double() @ whole_a.double())
    return Factors(whole_b, whole_a, "svd", float(residual))


def _selected_rows(matrix: torch.Tensor, rows: torch.Tensor) -> Factors:
    b = matrix.new_zeros(matrix.shape[0], len(rows))
    b[rows, torch.arange(len(rows))] = 1
    return Factors(b, matrix[rows].contiguous(), "rows", 0.0)


def _selected_columns(matrix: torch.Tensor, columns: torch.Tensor) -> Factors:
    a = matrix.new_zeros(len(columns), matrix.shape[1])
    a[torch.arange(len(columns)), columns] = 1
    return Factors(matrix[:, columns].contiguous(), a, "columns", 0.0)


def _truncated(part: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 factors of a part [o, i]: its projection onto the leading singular vectors of its shorter side."""
    if part.shape[0] > part.shape[1]:
        left, right = _truncated(part.T, rank)
        return right.T, left.T
    values, vectors = torch.linalg.eigh(part @ part.T)
    left_over = values.clamp(min=0).cumsum(0)  # ascending: what is missed when the vectors up to here are left out
    unneeded = int((left_over <= NOTHING**2 * left_over[-1]).sum())
    chosen = vectors[:, max(unneeded, len(values) - rank) :].flip(1)
    # A vector's sign is the library's whim: its largest entry is made positive.
    chosen = chosen * chosen.gather(0, chosen.abs().argmax(0, keepdim=True)).sign()
    return chosen, chosen.T @ part
