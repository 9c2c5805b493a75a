"""A histogram of a stream of numbers whose range grows with them, in memory that does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Histogram:
    """Counts of elements in `BINS` bins of equal width over [-bound, bound].

    bound doubles when a sample falls outside, merging bins two by two; `low` and `high` are the exact extremes.
    """

    BINS = 8192
    # Narrower ranges get no scale of their own (`numerics.choose_qparams`), and their reciprocal would overflow.
    NARROWEST = 1e-30

    def __init__(self) -> None:
        self.counts = np.zeros(self.BINS, np.int64)
        self.bound: float = 0.0
        self.low, self.high = np.inf, -np.inf

    @classmethod
    def of(cls, sample: Array) -> Histogram:
        """The histogram of one sample."""
        made = cls()
        made.see(sample, float(sample.min()), float(sample.max()))
        return made

    def see(self, sample: Array, low: float, high: float) -> None:
        """Count the elements of `sample`, whose extremes are `low` and `high`."""
        self.low, self.high = min(self.low, low), max(self.high, high)
        reach = max(-low, high)
        if self.bound == 0.0:
            self.bound = max(reach, self.NARROWEST)
        while reach > self.bound:
            self._double()
        # Scaled to bins before the shift: `sample + bound` may overflow where either alone does not.
        scaled = sample.ravel() * np.float32(self.BINS / (2.0 * self.bound))
        scaled += np.float32(self.BINS / 2)
        # Rounding may give the largest element the index BINS; what is a rounding below 0 is cut to it.
        counted = np.bincount(scaled.astype(np.intp), minlength=self.BINS + 1)
        counted[-2] += counted[-1]
        self.counts += counted[:-1]

    @property
    def total(self) -> int:
        """How many elements were counted."""
        return int(self.counts.sum())

    @property
    def width(self) -> float:
        """The width of a bin."""
        return 2.0 * self.bound / self.BINS

    @property
    def edges(self) -> Array:
        """The edges of the bins, float64 [BINS + 1]."""
        return np.linspace(-self.bound, self.bound, self.BINS + 1)

    @property
    def centers(self) -> Array:
        """The middles of the bins, float64 [BINS]; 0 for the two that meet there: most of their elements are zeros."""
        middles = (np.arange(self.BINS) - self.BINS / 2 + 0.5) * self.width
        middles[self.BINS // 2 - 1 : self.BINS // 2 + 1] = 0.0
        return middles

    def _double(self) -> None:
        half = self.counts.reshape(-1, 2).sum(axis=1)
        quarter = self.BINS // 4
        self.counts = np.concatenate([np.zeros(quarter, np.int64), half, np.zeros(quarter, np.int64)])
        self.bound *= 2.0
