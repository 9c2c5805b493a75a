"""Observers: the range of a tensor from a stream of samples: a statistic of samples, and how they are aggregated.

`pooled` takes the statistic of the elements of all samples together; the others take the range of each sample by
itself, and keep the widest, the mean, or a moving average of these. Memory does not grow with the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tvmq.quantize import ranges
from tvmq.quantize.histogram import Histogram
from tvmq.quantize.ranges import Range
from tvmq.recipe import Recipe
from tvmq.recipe_values import Aggregate, Observer

Array = npt.NDArray[Any]
Rule = Callable[[Histogram], Range]


class RangeObserver(Protocol):
    """Sees samples of one tensor, and estimates its range."""

    def see(self, sample: Array, low: float, high: float) -> None:
        """Take one sample (any shape, float, finite, not empty), whose smallest and largest elements are given."""

    def range(self) -> Range:
        """(low, high) of what was seen."""


def make(recipe: Recipe) -> RangeObserver:
    """The observer that the recipe names."""
    if recipe.observer is Observer.FIXED:
        return Fixed(recipe.fixed_range)
    rule = rule_of(recipe)
    if recipe.aggregate is Aggregate.POOLED:
        return MinMax() if rule is None else Pooled(rule)
    return Aggregated(rule, recipe.aggregate, recipe.momentum)


def rule_of(recipe: Recipe) -> Rule | None:
    """From a histogram to a range, as the recipe asks; None for the extremes, which need no histogram."""
    bits = recipe.activation_bits
    rules: dict[Observer, Rule] = {
        Observer.PERCENTILE: lambda seen: ranges.percentile(seen, recipe.percentile),
        Observer.ENTROPY: lambda seen: ranges.entropy(seen, bits),
        Observer.MSE: lambda seen: ranges.mse(seen, bits, symmetric=recipe.symmetric),
        Observer.OCTAV: lambda seen: ranges.octav(seen, bits),
        Observer.ACIQ: lambda seen: ranges.aciq(seen, bits),
    }
    return rules.get(recipe.observer)


class Fixed:
    """[-bound, bound], whatever is seen."""

    def __init__(self, bound: float) -> None:
        self.bound = bound

    def see(self, sample: Array, low: float, high: float) -> None:
        """Nothing to learn."""

    def range(self) -> Range:
        """What was given."""
        return -self.bound, self.bound


class MinMax:
    """The smallest and the largest element of all samples."""

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf

    def see(self, sample: Array, low: float, high: float) -> None:
        """Widen the range to hold `sample`."""
        self.low, self.high = min(self.low, low), max(self.high, high)

    def range(self) -> Range:
        """(smallest, largest)."""
        return self.low, self.high


class Pooled:
    """A rule on the histogram of all elements."""

    def __init__(self, rule: Rule) -> None:
        self.rule, self.histogram = rule, Histogram()

    def see(self, sample: Array, low: float, high: float) -> None:
        """Count the elements of `sample`."""
        self.histogram.see(sample, low, high)

    def range(self) -> Range:
        """What the rule says."""
        return self.rule(self.histogram)


class Aggregated:
    """The range of each sample by itself (by `rule`; None: its extremes), aggregated.

    widest: the smallest low and the largest high. mean: of lows, and of highs. moving_average:
    `range += momentum * (range of sample - range)`; the first sample starts it.
    """

    def __init__(self, rule: Rule | None, aggregate: Aggregate, momentum: float) -> None:
        self.rule, self.aggregate, self.momentum = rule, aggregate, momentum
        self.low = self.high = np.nan
        self.count = 0

    def see(self, sample: Array, low: float, high: float) -> None:
        """Take the range of `sample` into the aggregate."""
        if self.rule is not None:
            low, high = self.rule(Histogram.of(sample))
        self.count += 1
        if self.count == 1:
            self.low, self.high = low, high
        elif self.aggregate is Aggregate.WIDEST:
            self.low, self.high = min(self.low, low), max(self.high, high)
        else:
            share = self.momentum if self.aggregate is Aggregate.MOVING_AVERAGE else 1.0 / self.count
            self.low += share * (low - self.low)
            self.high += share * (high - self.high)

    def range(self) -> Range:
        """The aggregate."""
        return self.low, self.high
