"""Effects integrated over a piece of a straight path between two points: two Gauss-Legendre nodes a piece."""

from __future__ import annotations

import numpy as np

from mechmerge.localize.calibration import Calibration, Point

Array = np.ndarray


def integrate(calibration: Calibration, start: Point, end: Point, a: float, b: float) -> dict[str, Array]:
    """−∫⟨∂ℓ/∂θ, δ⟩ dt of every example over [a, b] of the path from `start` to `end`: kind → float32 [E, n, layers, units]."""
    first, second = (calibration.gradients(start.between(end, t), f"{t:.3f} of the path") for t in gauss_legendre(a, b))
    return {kind: (first[kind] + second[kind]) * ((b - a) / 2) for kind in first}


def gauss_legendre(a: float, b: float) -> tuple[float, float]:
    """The two Gauss-Legendre nodes of [a, b]."""
    middle, half = (a + b) / 2, (b - a) / 2
    return middle - half / 3**0.5, middle + half / 3**0.5
