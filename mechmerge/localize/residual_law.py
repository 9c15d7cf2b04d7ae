"""What replacing a component may turn out to do, given what the screen says of it: the law of x given s.

x = α + β·s + σ(s)·ε with σ(s)² = a² + (c·|s|)² and Student's t for ε (ν degrees of freedom; ours). The line is a weighted least
squares fit; a, c and ν are averaged over a grid by their likelihood under a flat prior, so that few measurements leave heavy
tails likely and many can rule them out. Heavy tails matter: what is asked of the law is how probable a value is that lies
further out than anything measured so far.

No law sees what its sample has not met. If three components in ten thousand do much that the screen says nothing of, a sample
of a few hundred will most likely hold none of them, and the law then promises too much: hence the bound of `most_left`, which
rests on the draw alone.
"""

from __future__ import annotations

import numpy as np

Array = np.ndarray
FREEDOM = (1.5, 2.0, 3.0, 4.0, 6.0, 10.0, 20.0, 100.0)
"""Grid of ν: from tails without a variance to all but normal ones."""
FLOORS = 2.0 ** np.arange(-3, 2.51, 0.5)
"""Grid of a, in units of the residuals' robust spread."""
SLOPES = (0.0, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.0)
"""Grid of c, in units of |β| or of the residuals' size relative to the screen's, whichever is larger."""
BINS = 96
"""Groups of components with like screens that probabilities are computed for together."""


class ResidualLaw:
    """The law fitted to measured components.

    Args:
        screen: what the screen said of them, [m].
        value: what replacing them did, [m], in the same or another unit.
    """

    def __init__(self, screen: Array, value: Array) -> None:
        from scipy.special import gammaln

        self.intercept, self.slope = _line(screen, value)
        residual = value - self.mean(screen)
        # A perfect screen leaves no spread: then what counts is how finely its values were stored.
        least = 1e-7 * max(float(np.abs(value).max()), float(np.abs(screen).max()), 1e-30)
        spread = max(1.4826 * float(np.median(np.abs(residual))), least)
        size = float(np.sqrt(np.mean(screen**2)))
        ratio = max(abs(self.slope), float(np.sqrt(np.mean(residual**2))) / size if size > 0 else 0.0)
        floor, slope, freedom = (
            part.ravel() for part in np.meshgrid(FLOORS * spread, np.array(SLOPES) * ratio, FREEDOM, indexing="ij")
        )
        scale = np.sqrt(floor[:, None] ** 2 + (slope[:, None] * np.abs(screen)) ** 2)
        z = residual / scale
        constant = gammaln((freedom + 1) / 2) - gammaln(freedom / 2) - 0.5 * np.log(freedom * np.pi)
        loglik = (constant[:, None] - np.log(scale) - (freedom[:, None] + 1) / 2 * np.log1p(z**2 / freedom[:, None])).sum(1)
        weight = np.exp(loglik - loglik.max())
        weight /= weight.sum()
        kept = weight > 1e-5
        self.floor, self.relative, self.freedom = floor[kept], slope[kept], freedom[kept]
        self.weight = weight[kept] / weight[kept].sum()

    def mean(self, screen: Array) -> Array:
        """The line, [m]."""
        return np.asarray(self.intercept + self.slope * screen)

    def _above(self, screen: Array, level: float) -> tuple[Array, Array]:
        """Chance of each group of components to be above a level, [grid points, groups], and the groups' sizes.

        Components of one sign and of like size are a group, judged at the likeliest of them: chances err upwards.
        """
        from scipy.special import stdtr

        means, sizes, counts = [np.zeros(0)], [np.zeros(0)], [np.zeros(0)]
        for part in (screen[screen >= 0], screen[screen < 0]):
            if not part.size:
                continue
            size = -np.sort(-np.abs(part))
            mean = self.mean(size if part[0] >= 0 else -size)
            starts = np.unique(np.geomspace(1, len(size) + 1, BINS).astype(int) - 1)
            starts = starts[starts < len(size)]
            means.append(np.maximum.reduceat(mean, starts))
            sizes.append(size[starts])
            counts.append(np.diff([*starts, len(size)]))
        scale = np.sqrt(self.floor[:, None] ** 2 + (self.relative[:, None] * np.concatenate(sizes)) ** 2)
        return np.asarray(stdtr(self.freedom[:, None], (np.concatenate(means) - level) / scale)), np.concatenate(counts)

    def exceeding(self, screen: Array, level: float) -> tuple[Array, Array]:
        """How many of the components with these screens are expected above a level.

        Returns:
            Expected numbers, [grid points], and the grid points' probabilities.
        """
        above, counts = self._above(screen, level)
        return np.asarray((above * counts).sum(1)), self.weight

    def any_above(self, screen: Array, level: float) -> float:
        """Probability that at least one of the components with these screens is above a level."""
        above, counts = self._above(screen, level)
        with np.errstate(divide="ignore", invalid="ignore"):
            none = np.exp((np.log1p(-above) * counts).sum(1))
        return float(self.weight @ (1 - none))

    def most_above(self, screen: Array, level: float, tail: float) -> int:
        """A number that the count above the level exceeds with probability `tail` at most."""
        from scipy.special import pdtr

        expected, weight = self.exceeding(screen, level)
        low, high = 0, len(screen)
        while low < high:
            middle = (low + high) // 2
            if float(weight @ (1 - pdtr(middle, expected))) <= tail:
                high = middle
            else:
                low = middle + 1
        return low


def most_left(found: int, drawn: int, left: int, tail: float) -> int:
    """Upper bound of how many marked ones are among those left, from a random draw without replacement.

    Args:
        found: marked ones in the draw.
        drawn: size of the draw.
        left: how many were not drawn.
        tail: probability that the bound fails; it does not rest on any law of the values.

    Returns:
        The largest number left for which so few in the draw are not less probable than `tail` (hypergeometric, exact).
    """
    low, high = 0, left
    while low < high:
        middle = (low + high + 1) // 2
        if _few(found, middle + found, drawn, left + drawn) > tail:
            low = middle
        else:
            high = middle - 1
    return low


def _few(found: int, marked: int, drawn: int, total: int) -> float:
    """Probability of at most `found` marked ones in a draw."""
    from scipy.special import gammaln

    def choose(n: Array, k: Array) -> Array:
        return np.asarray(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1))

    counts = np.arange(max(0, drawn - (total - marked)), min(found, marked, drawn) + 1)
    if not counts.size:
        return 0.0
    total_log = choose(np.array(total), np.array(drawn))
    logs = choose(np.array(marked), counts) + choose(np.array(total - marked), drawn - counts) - total_log
    return float(np.exp(logs).sum())


def _line(screen: Array, value: Array) -> tuple[float, float]:
    """Intercept and slope by least squares, reweighted so that outliers do not turn the line (Cauchy's weights)."""
    weight = np.ones(len(screen))
    intercept, slope = 0.0, 0.0
    for _ in range(8):
        total = weight.sum()
        x, y = (weight @ screen) / total, (weight @ value) / total
        spread = float(weight @ (screen - x) ** 2)
        slope = float(weight @ ((screen - x) * (value - y))) / spread if spread > 0 else 0.0
        intercept = float(y - slope * x)
        residual = value - intercept - slope * screen
        typical = float(np.median(np.abs(residual)))
        if typical <= 0:
            break
        weight = 1 / (1 + (residual / (2.4 * 1.4826 * typical)) ** 2)
    return intercept, slope
