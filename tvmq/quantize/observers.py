"""Observers: the range of a tensor from a stream of samples, in memory that does not grow with their number."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tvmq.recipe import Observer, Recipe

Array = npt.NDArray[Any]


class RangeObserver(Protocol):
    """Sees samples of one tensor, and estimates its range."""

    def see(self, sample: Array) -> None:
        """Take one sample: any shape, float, finite, not empty."""

    def range(self) -> tuple[float, float]:
        """(low, high) of what was seen."""


def make(recipe: Recipe) -> RangeObserver:
    """The observer that the recipe names."""
    if recipe.observer is Observer.MIN_MAX:
        return MinMax()
    if recipe.observer is Observer.MOVING_AVERAGE:
        return MovingAverage(recipe.momentum)
    return Percentile(recipe.percentile)


class MinMax:
    """The smallest and the largest element of all samples."""

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf

    def see(self, sample: Array) -> None:
        """Widen the range to hold `sample`."""
        self.low = min(self.low, float(sample.min()))
        self.high = max(self.high, float(sample.max()))

    def range(self) -> tuple[float, float]:
        """(smallest, largest)."""
        return self.low, self.high


class MovingAverage:
    """An exponential moving average of each sample's smallest and largest element; the first sample starts it."""

    def __init__(self, momentum: float) -> None:
        self.momentum = momentum
        self.low = self.high = np.nan

    def see(self, sample: Array) -> None:
        """`range += momentum * (range of sample - range)`."""
        low, high = float(sample.min()), float(sample.max())
        if np.isnan(self.low):
            self.low, self.high = low, high
        self.low += self.momentum * (low - self.low)
        self.high += self.momentum * (high - self.high)

    def range(self) -> tuple[float, float]:
        """The averages."""
        return self.low, self.high


class Percentile:
    """The range that holds `percent` of all elements, cutting (100 - percent) / 2 % at either end.

    Elements are counted in a histogram that doubles its range when a sample falls outside, merging bins two by two;
    the estimate is exact to one bin. A one-sided tensor (all elements >= 0 or <= 0) is cut at its far end only.
    """

    BINS = 8192
    # Narrower ranges get no scale of their own (`numerics.choose_qparams`), and their reciprocal would overflow.
    NARROWEST = 1e-30

    def __init__(self, percent: float) -> None:
        self.percent = percent
        self.counts = np.zeros(self.BINS, np.int64)
        self.bound: float = 0.0
        self.low, self.high = np.inf, -np.inf

    def see(self, sample: Array) -> None:
        """Count the elements of `sample`."""
        low, high = float(sample.min()), float(sample.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        reach = max(-low, high)
        if self.bound == 0.0:
            self.bound = max(reach, self.NARROWEST)
        while reach > self.bound:
            self._double()
        # Scaled to bins before the shift: `sample + bound` may overflow where either alone does not.
        scaled = sample.ravel() * (self.BINS / (2.0 * self.bound)) + self.BINS / 2
        self.counts += np.bincount(np.clip(scaled.astype(np.int64), 0, self.BINS - 1), minlength=self.BINS)

    def range(self) -> tuple[float, float]:
        """The cut range, never wider than what was seen."""
        total = int(self.counts.sum())
        if total == 0 or self.low == self.high:
            return self.low, self.high
        tail = (100.0 - self.percent) / 100.0 * total
        one_sided = self.low >= 0.0 or self.high <= 0.0
        cut = tail if one_sided else tail / 2.0
        cumulative = np.cumsum(self.counts)
        edges = np.linspace(-self.bound, self.bound, self.BINS + 1)
        first = int(np.searchsorted(cumulative, cut, side="right"))
        last = int(np.searchsorted(cumulative, total - cut, side="left"))
        low = self.low if self.low >= 0.0 else max(self.low, float(edges[first]))
        high = self.high if self.high <= 0.0 else min(self.high, float(edges[min(last, self.BINS - 1) + 1]))
        return low, high

    def _double(self) -> None:
        half = self.counts.reshape(-1, 2).sum(axis=1)
        quarter = self.BINS // 4
        self.counts = np.concatenate([np.zeros(quarter, np.int64), half, np.zeros(quarter, np.int64)])
        self.bound *= 2.0
