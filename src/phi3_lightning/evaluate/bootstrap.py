"""Intervals by the bootstrap: rows are drawn again with repetition, for base and tuned model the same ones.

See Efron and Tibshirani 1993, An Introduction to the Bootstrap (percentile intervals), and for paired draws Koehn 2004,
https://aclanthology.org/W04-3250.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Statistics = NDArray[np.float64]
LEVEL = 95.0
"""The share of draws, in per cent, that an interval holds."""

FEWEST_ROWS = 20
"""Below these an interval of resampled rows is too narrow to tell chance from a difference."""


@dataclass(frozen=True)
class Estimate:
    """A value, and the interval that holds 95% of its draws."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A metric of base and tuned model on the same rows, and tuned less base."""

    base: Estimate
    tuned: Estimate
    difference: Estimate
    rows: int
    """How many rows were compared."""

    @property
    def too_few(self) -> bool:
        """Whether there are too few rows to tell."""
        return self.rows < FEWEST_ROWS

    @property
    def significant(self) -> bool:
        """Whether the interval of the difference is on one side of 0, and of rows enough to tell."""
        return not self.too_few and (self.difference.low > 0 or self.difference.high < 0)


def compare(
    base: Statistics, tuned: Statistics, value: Callable[[list[float]], float], resamples: int, seed: int = 0
) -> Comparison:
    """Compare two models by a metric that follows from sums over rows.

    Args:
        base: Statistics of each row, shape (rows, width), at least one row.
        tuned: Those of the same rows by the other model.
        value: The metric, from the sum of the statistics.
        resamples: How often rows are drawn again.
        seed: Decides the draws.
    """
    rng = np.random.default_rng(seed)
    rows = len(base)
    drawn = np.empty((resamples, 2))
    for index in range(resamples):
        times = rng.multinomial(rows, np.full(rows, 1 / rows)).astype(np.float64)
        drawn[index] = value((times @ base).tolist()), value((times @ tuned).tolist())
    values = value(base.sum(0).tolist()), value(tuned.sum(0).tolist())
    return Comparison(
        base=_estimate(values[0], drawn[:, 0]),
        tuned=_estimate(values[1], drawn[:, 1]),
        difference=_estimate(values[1] - values[0], drawn[:, 1] - drawn[:, 0]),
        rows=rows,
    )


def _estimate(value: float, drawn: Statistics) -> Estimate:
    low, high = np.percentile(drawn, [50 - LEVEL / 2, 50 + LEVEL / 2])
    return Estimate(value, float(low), float(high))
