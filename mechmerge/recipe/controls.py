"""Controls: recipes of the same shares as another, chosen without looking at what components do.

A policy is worth something only where it beats these at equal counts of each kind for each expert. `random_like` shuffles
the coefficients (a permutation test's null, https://en.wikipedia.org/wiki/Permutation_test); `magnitude_like` gives the
largest ones to the largest deltas, the assumption behind magnitude pruning and TIES (https://arxiv.org/abs/2306.01708).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mechmerge.errors import InputError
from mechmerge.recipe.schema import Array, Masks


def random_like(masks: Masks, seed: int, per_layer: bool = False) -> Masks:
    """The same coefficients of each expert and kind, shuffled over all layers, or within each layer.

    Args:
        masks: `<expert>.<kind>` → [layers, units].
        seed: of numpy's PCG64; the masks are shuffled in the order of their names.
        per_layer: keep each layer's count as well.
    """
    generator = np.random.default_rng(seed)
    shuffled: Masks = {}
    for name in sorted(masks):
        if per_layer:
            shuffled[name] = generator.permuted(masks[name], axis=1)
        else:
            shuffled[name] = generator.permutation(masks[name].ravel()).reshape(masks[name].shape)
    return {name: shuffled[name] for name in masks}


def magnitude_like(masks: Masks, delta_norms: Mapping[str, Array], per_layer: bool = False) -> Masks:
    """The same coefficients of each expert and kind, the largest given to the components whose delta is largest.

    So a recipe that drops n neurons becomes one that drops the n with the *smallest* delta; ties go by layer, then unit.

    Args:
        masks: `<expert>.<kind>` → [layers, units].
        delta_norms: `<expert>.<kind>` → Frobenius norms of expert − base, [layers, units].
        per_layer: keep each layer's count as well.

    Raises:
        InputError: norms of a mask are missing, of another shape, or not numbers.
    """
    result: Masks = {}
    for name, mask in masks.items():
        norms = delta_norms.get(name)
        if norms is None or norms.shape != mask.shape or not np.isfinite(norms).all():
            found = "none" if norms is None else f"{list(norms.shape)}, some of them not numbers"
            raise InputError(f"delta norms of {name}", expected=f"norms of shape {list(mask.shape)}", found=found)
        rows, by = (mask, norms) if per_layer else (mask.reshape(1, -1), norms.reshape(1, -1))
        order = np.argsort(-by, axis=1, kind="stable")
        ranked = np.empty_like(rows)
        np.put_along_axis(ranked, order, -np.sort(-rows, axis=1), axis=1)
        result[name] = ranked.reshape(mask.shape)
    return result
