"""Controls: recipes of the same shares as another, chosen without looking at what components do.

A policy is worth something only where it beats these at equal counts of each kind for each expert. `random_like` shuffles
the coefficients (a permutation test's null, https://en.wikipedia.org/wiki/Permutation_test), within each layer if told;
`norm_matched` shuffles only among components of one layer whose deltas are about as large, so that as much is moved, and left
out, as by the policy and all that differs is *which* components; `magnitude_like` gives the largest coefficients to the largest
deltas, the assumption behind magnitude pruning and TIES (https://arxiv.org/abs/2306.01708).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mechmerge.errors import InputError
from mechmerge.recipe.schema import Array, Masks

TOLERANCE = 0.01
"""By which the moved norm of a norm-matched shuffle may differ."""
LEFT_OUT = 5
"""So many times that, the norm of what it leaves out may: often few components, which make leaps."""
STRATA = (64, 16, 8, 4, 2)
DRAWS = 20
"""Shuffles that are tried of each size of strata."""


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
        norms = _checked(name, mask, delta_norms)
        rows, by = (mask, norms) if per_layer else (mask.reshape(1, -1), norms.reshape(1, -1))
        order = np.argsort(-by, axis=1, kind="stable")
        ranked = np.empty_like(rows)
        np.put_along_axis(ranked, order, -np.sort(-rows, axis=1), axis=1)
        result[name] = ranked.reshape(mask.shape)
    return result


def norm_matched(masks: Masks, delta_norms: Mapping[str, Array], seed: int, tolerance: float = TOLERANCE) -> Masks:
    """The same coefficients of each expert, kind and layer, shuffled among components whose deltas are about as large.

    The components of a layer are sorted by the norm of their delta and cut into strata, and each stratum is shuffled. Of
    shuffles of ever finer strata (64 components, 16, 8, 4, 2) the first is taken that moves as much of every expert and kind,
    √Σ (c · ‖δ‖)², and leaves as much out, √Σ ((1 − c) · ‖δ‖)², as the given masks do. The finer they are, the more often a
    component keeps its own coefficient (`coinciding` says how often).

    Args:
        masks: `<expert>.<kind>` → [layers, units].
        delta_norms: `<expert>.<kind>` → Frobenius norms of expert − base, [layers, units].
        seed: of numpy's PCG64.
        tolerance: largest relative difference of the moved norm; that of what is left out may be `LEFT_OUT` times it.

    Raises:
        InputError: norms of a mask are missing, of another shape, or not numbers; or no shuffle is within the tolerances.
    """
    norms = {name: _checked(name, mask, delta_norms) for name, mask in masks.items()}
    generator = np.random.default_rng(seed)
    made = {name: _matched(name, masks[name], norms[name], generator, tolerance) for name in sorted(masks)}
    return {name: made[name] for name in masks}


def _matched(name: str, mask: Array, norms: Array, generator: np.random.Generator, tolerance: float) -> Array:
    least = np.inf
    for size in STRATA:
        for _ in range(DRAWS):
            drawn = _within_strata(mask, norms, size, generator)
            off = max(_off(drawn, mask, norms), _off(1 - drawn, 1 - mask, norms) / LEFT_OUT)
            least = min(least, off)
            if off <= tolerance:
                return drawn
    raise InputError(
        f"shuffle of {name}",
        expected=f"norms within {tolerance:g} (moved) and {LEFT_OUT * tolerance:g} (left out) of the recipe's",
        found=f"{least:.3g} at best", fix="compare with `per_layer` shuffles",
    )  # fmt: skip


def _off(drawn: Array, mask: Array, norms: Array) -> float:
    """The relative difference of the moved norms."""
    wanted = moved_norm([mask], [norms])
    found = moved_norm([drawn], [norms])
    return abs(found - wanted) / wanted if wanted > 0 else 0.0 if found == 0 else np.inf


def coinciding(masks: Masks, drawn: Masks) -> dict[str, float]:
    """`<expert>.<kind>` → the share of components that keep their coefficient, of those without their mask's most common one.

    Masks of one coefficient alone are left out.
    """
    found = {}
    for name, mask in masks.items():
        values, counts = np.unique(mask, return_counts=True)
        unlike = mask != values[counts.argmax()]
        if unlike.any():
            found[name] = float((drawn[name] == mask)[unlike].mean())
    return found


def moved_norm(masks: Sequence[Array], norms: Sequence[Array]) -> float:
    """√Σ (coefficient · ‖δ‖)² over components."""
    return float(np.sqrt(sum(float(np.square(m * n, dtype=np.float64).sum()) for m, n in zip(masks, norms, strict=True))))


def _within_strata(mask: Array, norms: Array, size: int, generator: np.random.Generator) -> Array:
    """Each layer's coefficients, shuffled among `size` neighbours in the order of their norms (where strata begin is drawn)."""
    result = mask.copy()
    for layer, order in enumerate(np.argsort(norms, axis=1, kind="stable")):
        start = int(generator.integers(size))
        for stratum in np.split(order, range(start, len(order), size)):
            result[layer, stratum] = generator.permutation(mask[layer, stratum])
    return result


def _checked(name: str, mask: Array, delta_norms: Mapping[str, Array]) -> Array:
    norms = delta_norms.get(name)
    if norms is None or norms.shape != mask.shape or not np.isfinite(norms).all():
        found = "none" if norms is None else f"{list(norms.shape)}, some of them not numbers"
        raise InputError(f"delta norms of {name}", expected=f"norms of shape {list(mask.shape)}", found=found)
    return norms
