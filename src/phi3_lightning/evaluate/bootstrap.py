"""Bootstrap intervals: rows are resampled with replacement, the same ones for base and tuned model.

See Efron and Tibshirani 1993, An Introduction to the Bootstrap (percentile intervals), and for paired draws Koehn 2004,
https://aclanthology.org/W04-3250.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Statistics = NDArray[np.float64]
LEVEL_PERCENT = 95.0
"""The percentage of the resampled values that an interval holds."""

MIN_SIGNIFICANT_ROWS = 20
"""With fewer rows, bootstrap intervals are too narrow to tell a difference from chance."""


@dataclass(frozen=True)
class Estimate:
    """A value and its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """A metric of base and tuned model on the same rows, and tuned minus base."""

    base: Estimate
    tuned: Estimate
    difference: Estimate
    rows: int
    """Number of rows that were compared."""

    @property
    def too_few(self) -> bool:
        """Whether there are too few rows to call any difference significant."""
        return self.rows < MIN_SIGNIFICANT_ROWS

    @property
    def significant(self) -> bool:
        """Whether the interval of the difference excludes 0, with enough rows."""
        return not self.too_few and (self.difference.low > 0 or self.difference.high < 0)


def compare(
    base: Statistics, tuned: Statistics, value: Callable[[list[float]], float], resamples: int, seed: int = 0
) -> Comparison:
    """Compare two models by a metric that is a function of sums over rows.

    Args:
        base: Statistics of each row, shape (rows, width), at least one row; ``tuned`` has those of the same rows.
        value: The metric, from the sum of the statistics.
        resamples: Number of bootstrap draws.
    """

    def measure(times: Statistics) -> tuple[float, float]:
        return value((times @ base).tolist()), value((times @ tuned).tolist())

    return compare_weighted(measure, len(base), resamples, seed)


def compare_weighted(
    measure: Callable[[Statistics], tuple[float, float]], rows: int, resamples: int, seed: int = 0
) -> Comparison:
    """Compare two models by any metric of rows.

    Args:
        measure: The metrics of base and tuned model, from how often each row counts, shape (rows,). Draws for which
            they are NaN are left out.
        rows: Number of rows, at least one.
        resamples: Number of bootstrap draws.
    """
    rng = np.random.default_rng(seed)
    times = (rng.multinomial(rows, np.full(rows, 1 / rows)).astype(np.float64) for _ in range(resamples))
    draws = np.array([measure(each) for each in times])
    values = measure(np.ones(rows))
    return Comparison(
        base=_estimate(values[0], draws[:, 0]),
        tuned=_estimate(values[1], draws[:, 1]),
        difference=_estimate(values[1] - values[0], draws[:, 1] - draws[:, 0]),
        rows=rows,
    )


def _estimate(value: float, draws: Statistics) -> Estimate:
    low, high = np.nanpercentile(draws, [50 - LEVEL_PERCENT / 2, 50 + LEVEL_PERCENT / 2])
    return Estimate(value, float(low), float(high))
