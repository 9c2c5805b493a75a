"""How a weight becomes integers once its scales are known, better than by rounding each element alone: in NumPy.

squant  data-free, a closed form of what AdaRound learns: errors of a kernel and of a channel cancel
gptq    with the products of a layer's inputs: each input's error is made up for by those that follow
stochastic  up with the probability of the rest, so that errors are none on average
clipped_scales  scales of least squared error, which may cut a weight's largest elements
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq.quantize import tables

Array = npt.NDArray[Any]


def squant(units: Array, low: int, high: int) -> Array:
    """int8 [O, I, taps] of a weight in units of its scales, float [O, I, taps].

    Elements are rounded, then as few as needed are rounded the other way, those that cost least, so that the sum of the
    errors of each kernel (and then of each output channel) is at most a half: C. Guo et al., "SQuant: On-the-Fly
    Data-Free Quantization via Diagonal Hessian Approximation", ICLR 2022, algorithm 1.
    """
    units = np.ascontiguousarray(units)  # so that what is reshaped is no copy
    rounded = np.clip(np.rint(units), low, high)
    for kernel in (units.shape[-1], units.shape[1] * units.shape[2]):
        if kernel > 1:  # the error of one element is at most a half
            _flip(rounded.reshape(-1, kernel), units.reshape(-1, kernel), low, high)
    return np.asarray(rounded, np.int8)


def _flip(rounded: Array, units: Array, low: int, high: int) -> None:
    """Move elements of `rounded` [rows, elements] by one, so that errors of a row sum to a half at most."""
    errors = rounded - units
    total = errors.sum(axis=1, keepdims=True)
    direction = np.sign(total)
    # Only elements that were rounded in the direction of the sum, and so change sign by less than one when moved back.
    movable = (errors * direction > 0) & (rounded - direction >= low) & (rounded - direction <= high)
    cost = np.where(movable, -errors * direction, np.inf)
    left = np.rint(np.abs(total[:, 0]))
    rows = np.flatnonzero(left > 0)
    while rows.size:
        cheapest = cost[rows].argmin(axis=1)
        found = np.isfinite(cost[rows, cheapest])
        rows, cheapest = rows[found], cheapest[found]
        rounded[rows, cheapest] -= direction[rows, 0]
        cost[rows, cheapest] = np.inf
        left[rows] -= 1
        rows = rows[left[rows] > 0]


def gptq(
    weight: Array,
    scales: Array,
    products: Array,
    low: int,
    high: int,
    damping: float = 0.01,
    table: Array | None = None,
    zero_points: Array | float = 0.0,
) -> Array:
    """int8 [K, N] of a weight [K, N] with `scales` (of that shape, or one that broadcasts to it).

    products: the sum of x^T x over inputs x of the layer, [K, K]. Inputs are rounded from the largest on; what each
    leaves is made up for by those that follow, as the inverse of `products` says: E. Frantar et al., "GPTQ: Accurate
    Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023, algorithm 1. table: what the
    integers from `low` to `high` stand for, rising; None: themselves, less `zero_points`, which broadcast as scales do.
    """
    size = weight.shape[0]
    order = np.argsort(-np.diag(products), kind="stable")
    hessian = products[np.ix_(order, order)].astype(np.float64)
    dead = np.diag(hessian) <= 0
    hessian[dead, dead] = 1.0
    hessian[np.diag_indices(size)] += damping * float(np.diag(hessian).mean())
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    remaining = weight[order].astype(np.float64)
    steps = np.broadcast_to(scales, weight.shape)[order].astype(np.float64)
    zeros = np.broadcast_to(zero_points, weight.shape)[order]
    result = np.empty(weight.shape, np.int8)
    for k in range(size):
        units = remaining[k] / steps[k]
        q = np.clip(np.rint(units) + zeros[k], low, high) if table is None else tables.places(units, table) + low
        meant = q - zeros[k] if table is None else table[q - low]
        error = (remaining[k] - meant * steps[k]) / upper[k, k]
        remaining[k + 1 :] -= np.outer(upper[k, k + 1 :], error)
        result[order[k]] = q
    return result


def stochastic(units: Array, rng: np.random.Generator) -> Array:
    """A weight in units of its scales, rounded up with the probability of the rest, float."""
    return np.asarray(np.floor(units + rng.random(units.shape)))


def clipped_scales(weight: Array, scales: Array, low: int, high: int, least: float = 0.5) -> Array:
    """`scales` [N] of a weight [K, N], each shrunk to the share in [least, 1] of least squared error."""
    best, found = np.full(scales.shape, np.inf), scales.astype(np.float64)
    for share in np.linspace(1.0, least, 26):
        tried = scales.astype(np.float64) * share
        error = np.square(np.clip(np.rint(weight / tried), low, high) * tried - weight).sum(axis=0)
        found = np.where(error < best, tried, found)
        best = np.minimum(error, best)
    return np.asarray(found, np.float32)
