"""Factors of channels, and copies of some, with which rounding a tensor and the weights that multiply it adds least.

A tensor x [.., K] and weights w [K, N] that read it become x / s and w * s; a channel with n copies is n channels, each
with one n-th of its weights. What rounding adds to all results of a row is expected to be

    step(x / s)**2 / 12 * sum_k (s_k |w_k|)**2  +  ALIKE * sum_k var_k / s_k**2 * sum_j step_j(w * s / n)**2 / 12

The errors of a row's elements are alike, and each meets its weights; those of weights meet what channels differ by
from their means, as mean errors are taken off biases. Copies hold the same integers; their weights differ so that they
sum up to a weight that is rounded once (`hidden.split`). The logarithm is convex in those of factors, once P-norms
stand for the extremes that steps come from, so that there is one optimum.

That such factors may be chosen at all: G. Xiao et al., "SmoothQuant", ICML 2023. Copies: R. Zhao et al., "Improving
Neural Network Quantization without Retraining using Outlier Channel Splitting", ICML 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

from tvmq.quantize.numerics import largest_integer
from tvmq.quantize.seen import ChannelsSeen
from tvmq.recipe import Recipe

Array = npt.NDArray[Any]
# A tensor is left as it is unless its best factors leave less than two thirds of the noise.
LOUD = 1.5
# Rounding errors of activations differ from row to row, and mostly cancel where rows are mixed and averaged, as by
# attention and pooling; those of weights are alike in all rows. By trial: 1 to 6 give a sentence encoder the same.
ALIKE = 2.0
# One copy for so many channels: products cost one percent more at most.
CHANNELS = 128
# Copies are made where they leave less than this share of the noise: it is a few layers that gain.
WORTH = 0.7
# The norm that stands for the largest element; a power of two.
P = 16
# Factors are between this and its reciprocal.
_LARGEST = 1000.0
_STEPS, _STEPS_OF_A_COPY = 60, 20


@dataclass(frozen=True)
class Division:
    """What channels [K] of a tensor are divided by, and a channel for each copy of one."""

    factors: Array
    copies: tuple[int, ...] = ()


def best_division(seen: ChannelsSeen, read: Array, recipe: Recipe, *, copies: bool = False) -> Division | None:
    """The division of a tensor that leaves the least noise; None where that is not worth it.

    read: the weights [K, N] that multiply the channels. copies: whether channels may get some.
    """
    if not 0.0 < seen.largest.max(initial=0.0) < np.inf or not read.any():
        return None  # nothing to divide; calibration refuses what overflows
    noise = _Noise(seen, read, recipe)
    as_it_is = np.zeros(len(read))
    counts = np.ones(len(read))
    logs, least = noise.minimum(as_it_is, counts, _STEPS)
    if copies and len(read) >= CHANNELS:
        with_copies = noise.with_copies(logs, len(read) // CHANNELS)
        if with_copies[-1] < WORTH * least:
            logs, counts, least = with_copies
    if noise.of(as_it_is, np.ones(len(read))) <= LOUD * least:
        return None
    named = np.repeat(np.arange(len(read)), counts.astype(np.int64) - 1)
    return Division(np.exp(logs).astype(np.float32), tuple(int(channel) for channel in named))


class _Noise:
    """The expected noise, of the logarithms of factors and of how many of each channel there are."""

    def __init__(self, seen: ChannelsSeen, read: Array, recipe: Recipe) -> None:
        self._below, self._above = np.maximum(-seen.low, 0.0), np.maximum(seen.high, 0.0)
        if recipe.symmetric:
            self._below = self._above = seen.largest
        self._variance = seen.variance
        self._steps = 2.0**recipe.activation_bits - 1.0
        self._gain = np.square(read).sum(axis=1, dtype=np.float64)
        # Columns that share a step; powers of their elements, of the largest one.
        magnitudes = np.abs(read) if recipe.per_channel else np.abs(read).max(axis=1, keepdims=True)
        largest = magnitudes.max(axis=0)
        self._powers = (magnitudes / np.where(largest > 0, largest, 1.0)).astype(np.float32) ** P
        columns = read.shape[1] // magnitudes.shape[1]
        self._unit = columns * np.square(largest.astype(np.float64) / largest_integer(recipe.weight_bits))

    def minimum(self, logs: Array, counts: Array, steps: int) -> tuple[Array, float]:
        """(the best logarithms of factors, the noise that they leave), from `logs`."""
        fixed = (self._below + self._above == 0) | (self._gain == 0)
        bound = np.where(fixed, 0.0, np.log(_LARGEST))
        found = minimize(
            self._logarithm,
            np.where(fixed, 0.0, logs),
            args=(counts,),
            jac=True,
            method="L-BFGS-B",
            bounds=np.stack([-bound, bound], axis=1),
            options={"maxiter": steps},
        )
        return np.asarray(found.x), float(np.exp(found.fun))

    def of(self, logs: Array, counts: Array) -> float:
        """The noise."""
        by_rows, by_weights, *_ = self._parts(logs, counts)
        return float(by_rows.sum() + by_weights)

    def with_copies(self, logs: Array, most: int) -> tuple[Array, Array, float]:
        """(the best logarithms of factors, how many of each channel there are, the noise that is left)."""
        counts, least = np.ones_like(logs), np.inf
        for _ in range(most):
            counts[self._next_copy(logs, counts)] += 1
            logs, least = self.minimum(logs, counts, _STEPS_OF_A_COPY)
        return logs, counts, least

    def _next_copy(self, logs: Array, counts: Array) -> int:
        """The channel one more copy of which saves most, to first order."""
        _, _, of_weights, _, _ = self._parts(logs, counts)
        return int((of_weights * np.log1p(1.0 / counts)).argmax())

    def _logarithm(self, logs: Array, counts: Array) -> tuple[float, Array]:
        """The logarithm of the noise, and its gradient."""
        by_rows, by_weights, of_weights, of_rows, of_range = self._parts(logs, counts)
        total = by_rows.sum() + by_weights
        slope = 2.0 * (by_rows - by_rows.sum() * of_range + by_weights * (of_weights - of_rows))
        return float(np.log(total)), slope / total

    def _parts(self, logs: Array, counts: Array) -> tuple[Array, float, Array, Array, Array]:
        """Noise of the tensor's rounding [K], and of the weights', and shares of channels [K] that sum to 1: in the
        weights' steps, in what meets their errors, and in the tensor's range."""
        factors = np.exp(logs)
        below, of_below = _norm(self._below / factors)
        above, of_above = _norm(self._above / factors)
        step = (below + above) / self._steps
        by_rows = step**2 / 12.0 * factors**2 * self._gain
        powers = (factors / counts) ** P
        scale = powers.max()
        relative = (powers / scale).astype(np.float32)
        columns = (relative @ self._powers).astype(np.float64)
        squares = self._unit * (columns * scale) ** (2.0 / P) / 12.0
        each = (squares / np.maximum(columns, np.finfo(np.float32).tiny)).astype(np.float32)
        met = self._variance / factors**2
        by_weights = ALIKE * met.sum() * squares.sum()
        of_weights = relative * (self._powers @ each) / squares.sum()
        of_range = (below * of_below + above * of_above) / (below + above)
        return by_rows, by_weights, of_weights, met / max(met.sum(), np.finfo(np.float64).tiny), of_range


def _norm(x: Array) -> tuple[float, Array]:
    """(the P-norm of numbers of at least 0, the share that each has in it)."""
    largest = x.max()
    if largest == 0:
        return 0.0, np.zeros_like(x)
    powers = (x / largest) ** P
    return float(largest * powers.sum() ** (1.0 / P)), powers / powers.sum()
