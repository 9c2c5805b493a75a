"""From the histogram of a tensor to the range that its integers should stand for: the mathematics, in NumPy.

Each function returns (low, high), never wider than what was seen. A range that cuts outliers off makes the step between
integers smaller: the noise of rounding, `step**2 / 12` an element, is exchanged for the noise of clipping.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import lambertw

from tvmq.quantize.histogram import Histogram

Array = npt.NDArray[Any]
Range = tuple[float, float]


def percentile(seen: Histogram, percent: float) -> Range:
    """The range that holds `percent` of all elements, cutting (100 - percent) / 2 % at either end; exact to a bin.

    A one-sided tensor (all elements >= 0 or <= 0) is cut at its far end only.
    """
    total = seen.total
    if seen.low >= seen.high:
        return seen.low, seen.high
    tail = (100.0 - percent) / 100.0 * total
    cut = tail if _one_sided(seen) else tail / 2.0
    cumulative = np.cumsum(seen.counts)
    first = int(np.searchsorted(cumulative, cut, side="right"))
    last = int(np.searchsorted(cumulative, total - cut, side="left"))
    edges = seen.edges
    low = seen.low if seen.low >= 0.0 else max(seen.low, float(edges[first]))
    high = seen.high if seen.high <= 0.0 else min(seen.high, float(edges[min(last, seen.BINS - 1) + 1]))
    return low, high


def mse(seen: Histogram, bits: int, *, symmetric: bool) -> Range:
    """The range of least mean squared error, by a search over both ends (one, if symmetric or one-sided).

    Moments of the histogram's tails are cumulative sums, so that a candidate costs a few look-ups; the search runs over
    a grid of 64 cuts an end, then over a finer one around the best.
    """
    if seen.low >= seen.high:
        return seen.low, seen.high
    tails = _Tails(seen)
    low, high = min(seen.low, 0.0), max(seen.high, 0.0)
    if symmetric:
        low, high = -max(-low, high), max(-low, high)
    shares, width = np.linspace(0.02, 1.0, 64), 0.98
    lows = highs = shares
    best = (1.0, 1.0)
    for _ in range(3):
        a, b = (lows, highs) if symmetric else (grid.ravel() for grid in np.meshgrid(lows, highs, indexing="ij"))
        steps = (high * b - low * a) / (2.0**bits - 1.0)
        error = tails.inside(low * a, high * b) * steps**2 / 12.0 + tails.clipped(low * a, high * b)
        at = int(error.argmin())
        best = (float(a[at]), float(b[at]))
        width /= 16.0
        lows, highs = (np.clip(np.linspace(share - width, share + width, 64), 0.001, 1.0) for share in best)
    return max(seen.low, low * best[0]), min(seen.high, high * best[1])


def octav(seen: Histogram, bits: int) -> Range:
    """[-s, s] (or its half) with the s of least mean squared error, by a fixed point of Newton's method.

    s = E|x|[|x| > s] / (c P(0 < |x| <= s) + P(|x| > s)), c = 4**-bits / 3, or a quarter of that for one-sided tensors:
    C. Sakr et al., "Optimal Clipping and Magnitude-aware Differentiation", ICML 2022, equation 6.
    """
    sizes, counts = _magnitudes(seen)
    if not len(sizes):
        return seen.low, seen.high
    noise = 4.0**-bits / (12.0 if _one_sided(seen) else 3.0)
    above = np.concatenate([np.cumsum(counts[::-1])[::-1], [0.0]])
    weighted = np.concatenate([np.cumsum((counts * sizes)[::-1])[::-1], [0.0]])
    bound = weighted[0] / above[0]
    for _ in range(64):
        at = int(np.searchsorted(sizes, bound, side="right"))
        wanted = weighted[at] / (noise * (above[0] - above[at]) + above[at]) if above[at] else bound
        if abs(wanted - bound) <= 1e-6 * bound:
            break
        bound = wanted
    return max(seen.low, -bound), min(seen.high, bound)


def aciq(seen: Histogram, bits: int) -> Range:
    """The range of least mean squared error for a Laplace distribution of the tensor's mean and mean deviation b.

    Its half width a solves `a / b * exp(a / b) = 3 * 4**bits`, 12 * 4**bits for one-sided tensors, which start at 0:
    R. Banner et al., "Post training 4-bit quantization of convolutional networks", NeurIPS 2019, section 3.
    """
    sizes, counts = _magnitudes(seen)
    if not len(sizes):
        return seen.low, seen.high
    if _one_sided(seen):
        reach = float(np.average(sizes, weights=counts) * lambertw(12.0 * 4.0**bits).real)
        return max(seen.low, -reach), min(seen.high, reach)
    mean = float(np.average(seen.centers, weights=seen.counts))
    deviation = float(np.average(np.abs(seen.centers - mean), weights=seen.counts))
    reach = deviation * float(lambertw(3.0 * 4.0**bits).real)
    return max(seen.low, mean - reach), min(seen.high, mean + reach)


def entropy(seen: Histogram, bits: int) -> Range:
    """[-t, t] (or its half) whose quantized distribution loses least information, by Kullback-Leibler divergence.

    S. Migacz, "8-bit inference with TensorRT", GTC 2017: elements beyond t join the last bin, and the bins of a level
    share its count evenly. 128 thresholds are tried.
    """
    sizes, counts = _magnitudes(seen)
    if not len(sizes):
        return seen.low, seen.high
    levels = 2**bits if _one_sided(seen) else 2 ** (bits - 1)
    bins = seen.BINS // 2
    found = np.bincount(np.minimum((sizes / seen.width).astype(np.intp), bins - 1), counts, minlength=bins)
    top = int(np.flatnonzero(found)[-1]) + 1
    thresholds = np.unique(np.linspace(min(levels, top), top, 128).astype(int))
    losses = [_divergence(found, threshold, levels) for threshold in thresholds]
    bound = float(thresholds[int(np.argmin(losses))] * seen.width)
    return max(seen.low, -bound), min(seen.high, bound)


def _divergence(counts: Array, threshold: int, levels: int) -> float:
    """KL(p || q) of the counts below `threshold`, with what is above in the last bin, and their `levels` averages."""
    kept = counts[:threshold].astype(np.float64)
    clipped = kept.copy()
    clipped[-1] += counts[threshold:].sum()
    level = np.arange(threshold) * levels // threshold
    occupied = kept > 0
    if not occupied.any():
        return np.inf  # all elements are beyond it
    sums, members = (np.bincount(level, values, minlength=levels) for values in (kept, occupied))
    spread = np.where(occupied, (sums / np.maximum(members, 1))[level], 0.0)
    p, q = clipped / clipped.sum(), spread / spread.sum()
    both = (p > 0) & (q > 0)
    # What q rules out altogether costs as much as if q had a millionth there.
    missing = float((p[(p > 0) & ~both] * np.log(p[(p > 0) & ~both] / 1e-6)).sum())
    return float((p[both] * np.log(p[both] / q[both])).sum()) + missing


class _Tails:
    """How many elements lie inside a range, and the squared error of moving the others to its ends."""

    def __init__(self, seen: Histogram) -> None:
        self.edges = seen.edges
        centers, counts = seen.centers, seen.counts.astype(np.float64)
        zeros = np.where(centers == 0.0, 0.0, counts)  # are exact, whatever the step
        self.below = [np.concatenate([[0.0], np.cumsum(c)]) for c in (zeros, counts, counts * centers)]
        self.squares = np.concatenate([[0.0], np.cumsum(counts * centers**2)])

    def inside(self, low: Array, high: Array) -> Array:
        """Elements in [low, high] that are not zero."""
        return np.asarray(self._at(self.below[0], high) - self._at(self.below[0], low))

    def clipped(self, low: Array, high: Array) -> Array:
        """The sum of (x - low)**2 below low and of (x - high)**2 above high."""
        _, count, total = self.below
        under = self._at(self.squares, low) - 2.0 * low * self._at(total, low) + low**2 * self._at(count, low)
        counts, sums, squares = (whole[-1] - self._at(whole, high) for whole in (count, total, self.squares))
        return np.asarray(under + squares - 2.0 * high * sums + high**2 * counts)

    def _at(self, cumulative: Array, x: Array) -> Array:
        return np.interp(x, self.edges, cumulative)


def _one_sided(seen: Histogram) -> bool:
    return seen.low >= 0.0 or seen.high <= 0.0


def _magnitudes(seen: Histogram) -> tuple[Array, Array]:
    """|x| of the bins that are occupied and not about zero, rising, and their counts; none of a constant tensor."""
    if seen.low >= seen.high:  # or nothing seen
        return np.zeros(0), np.zeros(0)
    half = seen.BINS // 2
    sizes, counts = seen.centers[half + 1 :], (seen.counts[::-1][half + 1 :] + seen.counts[half + 1 :]).astype(float)
    occupied = counts > 0
    return sizes[occupied], counts[occupied]
