"""Statistics of samples of runs: summary, confidence interval of the mean, ratio of spreads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Summary:
    """Statistics of a sample.

    Attributes
    ----------
    count : int
    mean, median, largest, least, deviation : float
        The deviation is that of the sample (division by count - 1); 0 for one value.
    low, high : float
        Limits of the 95 % confidence interval of the mean, by Student's t.
    """

    count: int
    mean: float
    median: float
    largest: float
    least: float
    deviation: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Of at least one finite value."""
        import numpy as np
        from scipy.stats import t  # takes its time to load

        sample = np.asarray(values, dtype=float)
        if not len(sample) or not np.all(np.isfinite(sample)):
            raise ValueError(f"values={list(values)[:5]} must be finite numbers, at least one")
        count, mean = len(sample), float(sample.mean())
        deviation = float(sample.std(ddof=1)) if count > 1 else 0.0
        half = float(t.ppf(0.975, count - 1)) * deviation / math.sqrt(count) if count > 1 else 0.0
        return cls(
            count,
            mean,
            float(np.median(sample)),
            float(sample.max()),
            float(sample.min()),
            deviation,
            mean - half,
            mean + half,
        )

    @property
    def half_width(self) -> float:
        """Of the confidence interval."""
        return (self.high - self.low) / 2


def deviation_ratio(a: Sequence[float], b: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """Ratio of the standard deviations of two samples, and its 95 % interval by 10,000 bootstrap samples."""
    import numpy as np

    rng = np.random.default_rng(seed)

    def spread(values: Sequence[float]) -> np.ndarray:
        sample = np.asarray(values, dtype=float)
        return sample[rng.integers(len(sample), size=(10_000, len(sample)))].std(axis=1, ddof=1)

    top, bottom = spread(a), spread(b)
    ratios = top[bottom > 0] / bottom[bottom > 0]
    low, high = np.quantile(ratios, (0.025, 0.975)) if len(ratios) else (math.nan, math.nan)
    whole = np.std(b, ddof=1)
    return float(np.std(a, ddof=1) / whole) if whole else math.nan, float(low), float(high)
