"""Whether one of two things measured in turns is faster: the sign test of the rounds' ratios.

Ratios of a round have what slows down both (a clock, a neighbour) in numerator and denominator. Their distribution is
unknown, and outliers are the rule: so only their order counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from tvmq.deploy.latency import CONFIDENCE, median_interval

# A standard deviation in median absolute deviations, of a normal distribution.
_MAD = 1.4826


@dataclass(frozen=True)
class Comparison:
    """A bundle's time divided by the baseline's, over rounds: below 1 it is faster.

    ratio: the median. low, high: its confidence interval, None with too few rounds. p: of the sign test, two-sided.
    noise: how far a round's ratio is from the median, as a share of it (a robust standard deviation).
    """

    baseline: str
    bundle: str
    rounds: int
    faster_rounds: int
    ratio: float
    low: float | None
    high: float | None
    p: float
    confidence: float
    noise: float

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out that both are as fast."""
        return self.low is not None and self.high is not None and not self.low <= 1 <= self.high

    @property
    def noisy(self) -> bool:
        """Whether a single round may show more than the difference."""
        return self.noise > abs(self.ratio - 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "significant": self.significant, "noisy": self.noisy}

    def __str__(self) -> str:
        sure = f"{100 * self.confidence:.4g} %"
        if self.low is None or self.high is None:
            return f"{self.bundle}: {self.rounds} rounds are too few to compare at {sure} confidence; raise --repeat"
        span = f"time x {self.ratio:.3f} [{self.low:.3f}, {self.high:.3f}]"
        won = f"faster in {self.faster_rounds} of {self.rounds} rounds, p = {self.p:.2g}"
        word = "faster" if self.ratio < 1 else "slower"
        verdict = f"significantly {word} than" if self.significant else "no significant difference to"
        return f"{self.bundle}: {verdict} {self.baseline} at {sure} confidence: {span}, {won}"

    @property
    def warning(self) -> str | None:
        """What to say of the noise."""
        if not self.noisy:
            return None
        return (
            f"warning: {self.bundle}: rounds differ by {100 * self.noise:.1f} %, more than the difference of "
            f"{100 * abs(self.ratio - 1):.1f} %; raise --repeat or --min-repeat-ms, or calm the machine"
        )


def compare(named: Sequence[tuple[str, Sequence[float]]]) -> list[Comparison]:
    """Each of the others with the first, from names and the times of the same rounds.

    All verdicts together hold with CONFIDENCE (Bonferroni): three comparisons are made at 98.3 % each.
    """
    (baseline, first), *others = named
    confidence = 1 - (1 - CONFIDENCE) / max(1, len(others))
    return [_compare(baseline, name, np.divide(times, first).tolist(), confidence) for name, times in others]


def _compare(baseline: str, bundle: str, ratios: list[float], confidence: float) -> Comparison:
    faster, slower = (sum(ratio * sign < sign for ratio in ratios) for sign in (1, -1))
    ratio = float(np.median(ratios))
    low, high = median_interval(ratios, confidence) or (None, None)
    # Rounds without a difference say nothing.
    p = float(stats.binomtest(faster, faster + slower).pvalue) if faster + slower else 1.0
    noise = _MAD * float(np.median(np.abs(np.subtract(ratios, ratio)))) / ratio
    return Comparison(baseline, bundle, len(ratios), faster, ratio, low, high, p, confidence, noise)
