"""Set curves with known values, for the tests of what shows them."""

from __future__ import annotations

from typing import Any

from mechmerge.localize.curve_record import CurvePoint, Lift, SetCurve, SetCurves


def set_curves(*, above: bool, kl_low: float | None = None) -> SetCurves:
    """Curves of three points: the score order, two random ones and the magnitude order.

    Args:
        above: whether the state is above both controls.
        kl_low: lower end of the KL lift over the largest deltas (None: KL was not compared).
    """

    def order(name: Any, seed: int | None, middle: float) -> SetCurve:
        values = {0.0: 0.0, 0.5: middle, 1.0: 1.0}
        points = [
            CurvePoint(share=x, components=int(8 * x), parameters=int(80 * x), recovery=y, kl=1 - y, pass_rate=None)
            for x, y in values.items()
        ]
        return SetCurve(order=name, seed=seed, points=tuple(points))

    return SetCurves(
        curves=(order("score", None, 0.75), order("random", 1, 0.25), order("random", 2, 0.5), order("magnitude", None, 0.625)),
        scale="recovery",
        lift=0.19,
        lift_low=0.1 if above else -0.1,
        lift_high=0.3,
        magnitude_lift=0.06,
        magnitude_lift_low=0.01,
        magnitude_lift_high=0.12,
        kl_lift=None if kl_low is None else Lift(value=0.2, low=0.1, high=0.3),
        magnitude_kl_lift=None if kl_low is None else Lift(value=kl_low + 0.1, low=kl_low, high=kl_low + 0.2),
        above_controls=above,
        prompts=24,
        topics=12,
        unseen=True,
        base_kl=1.0,
        base_pass_rate=None,
        expert_pass_rate=None,
    )
