"""What a benchmark found: the statistics of its times, with a confidence interval that assumes no distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

# Of every interval and every test.
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Latency:
    """Milliseconds an inference, over the repeats of a benchmark; times_ms: of each repeat, in their order.

    low_ms, high_ms: the median's 95 % confidence interval (see `median_interval`), None with too few repeats.
    """

    mean_ms: float
    median_ms: float
    low_ms: float | None
    high_ms: float | None
    p90_ms: float
    min_ms: float
    max_ms: float
    std_ms: float
    repeat: int
    number: int
    threads: int
    times_ms: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.median_ms:.3f} ms median, {self.p90_ms:.3f} p90 ({self.repeat} repeats, {self.threads} threads)"


def latency(times_ms: npt.ArrayLike, number: int, threads: int) -> Latency:
    """The statistics of a list of times in milliseconds, each the mean of `number` inferences."""
    times = np.asarray(times_ms, np.float64)
    low, high = median_interval(times.tolist()) or (None, None)
    return Latency(
        mean_ms=float(times.mean()),
        median_ms=float(np.median(times)),
        low_ms=low,
        high_ms=high,
        p90_ms=float(np.percentile(times, 90)),
        min_ms=float(times.min()),
        max_ms=float(times.max()),
        std_ms=float(times.std()),
        repeat=times.size,
        number=number,
        threads=threads,
        times_ms=tuple(times.tolist()),
    )


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Two of the values that hold the median between them with at least `confidence`; None where there are too few.

    As many values lie below the median as a fair coin has heads: the interval is the sign test's, exact for independent
    values of any distribution (Thompson, Ann. Math. Stat. 7, 1936). 95 % needs six values.
    """
    # Ranks from either end that the median has with less than half of what is left of confidence.
    outside = int(stats.binom.ppf((1 - confidence) / 2, len(values), 0.5))
    ordered = sorted(values)
    return (ordered[outside - 1], ordered[-outside]) if outside else None
