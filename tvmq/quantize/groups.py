"""Weight-only quantization of layers in NumPy: integers of 8 or 4 bits with a scale a group of inputs.

    w [K, N]  ->  q int8 [K, N], scales bfloat16 [K / group, N],  w ~ q * scales[k // group]
    asymmetric:   zero points int8 [K / group, N] besides,        w ~ (q - zero_points[k // group]) * scales[k // group]

Scales are bfloat16, since a group of 32 4-bit weights would spend a fifth of its bytes on a float32; q is chosen after
the scale was rounded, so that rounding costs no accuracy. The layer is `x @ (q * scales)` in float32, in any order. The
matrix of a convolution has its taps and channels along K, and rows of zeros that make the last group whole.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq.quantize import rounding
from tvmq.quantize.numerics import F32, TINY_SCALE, to_bfloat16, widened

Array = npt.NDArray[Any]
# The integers of each width. 8 bits are symmetric; 4 use all of their 16.
RANGE = {8: (-127, 127), 4: (-8, 7)}
# Those with zero points use all of either.
ASYMMETRIC_RANGE = {8: (-128, 127), 4: (-8, 7)}


def matrix_of(weight: Array, group: int | None) -> Array:
    """A weight as [K, N]: a linear layer's is that; a convolution's [O, kh, kw, I] has zeros up to whole groups."""
    if weight.ndim == 2:
        return weight
    matrix = weight.reshape(len(weight), -1).T
    return np.pad(matrix, ((0, -len(matrix) % (group or 1)), (0, 0)))


def weight_of(matrix: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `matrix_of`, for a weight of `shape`."""
    return matrix if len(shape) == 2 else np.ascontiguousarray(matrix[: math.prod(shape[1:])].T).reshape(shape)


def group_scales(weight: Array, bits: int, group: int) -> Array:
    """A scale for each `group` rows of a weight [K, N], K a multiple of it: bfloat16 [K / group, N].

    8 bits: max |w| / 127. 4 bits: the w of largest magnitude, over -8, so that it becomes -8 exactly and the scale may
    be negative: one more step than a symmetric range, a decibel less noise. A group of zeros has scale 1.
    """
    grouped = weight.reshape(-1, group, weight.shape[1])
    at = np.abs(grouped).argmax(axis=1)[:, None, :]
    largest = np.take_along_axis(grouped, at, axis=1)[:, 0, :].astype(F32)
    scales = np.abs(largest) / F32(127) if bits == 8 else largest / F32(-8)
    return to_bfloat16(np.where(np.abs(scales) > TINY_SCALE, scales, F32(1)))


def clipped(weight: Array, scales: Array, bits: int) -> Array:
    """`scales`, each shrunk as `rounding.clipped_scales` says."""
    count, channels = scales.shape
    columns = np.moveaxis(weight.reshape(count, -1, channels), 1, 0).reshape(-1, count * channels)
    found = rounding.clipped_scales(columns, widened(scales).ravel(), *RANGE[bits])
    return to_bfloat16(found.reshape(scales.shape))


def quantize_groups(weight: Array, scales: Array, bits: int, *, stochastic: bool = False) -> Array:
    """`clip(nearbyint(w / s))`, int8 [K, N]; stochastic: see `rounding.stochastic`."""
    low, high = RANGE[bits]
    grouped = weight.reshape(scales.shape[0], -1, weight.shape[1]).astype(F32)
    units = grouped / widened(scales)[:, None]
    whole = rounding.stochastic(units, np.random.default_rng(0)) if stochastic else np.rint(units)
    return np.asarray(np.clip(whole, low, high), np.int8).reshape(weight.shape)


def dequantize_groups(q: Array, scales: Array) -> Array:
    """`float32(q) * s`, float32 [K, N]."""
    grouped = q.reshape(scales.shape[0], -1, q.shape[1]).astype(F32)
    return np.asarray(grouped * widened(scales)[:, None], F32).reshape(q.shape)


def asymmetric_groups(weight: Array, bits: int, group: int) -> tuple[Array, Array]:
    """Scales and zero points for each `group` rows of a weight [K, N]: bfloat16 and int8 [K / group, N].

    A group's range, with zero in it, is 2**bits - 1 steps. A group of zeros has scale 1.
    """
    grouped = weight.reshape(-1, group, weight.shape[1]).astype(F32)
    low, high = np.minimum(grouped.min(axis=1), F32(0)), np.maximum(grouped.max(axis=1), F32(0))
    first, last = ASYMMETRIC_RANGE[bits]
    steps = (high - low) / F32(last - first)
    scales = to_bfloat16(np.where(steps > TINY_SCALE, steps, F32(1)))
    return scales, np.asarray(np.clip(np.rint(first - low / widened(scales)), first, last), np.int8)


def quantize_asymmetric(weight: Array, scales: Array, zero_points: Array, bits: int) -> Array:
    """`clip(nearbyint(w / s) + z)`, int8 [K, N]."""
    first, last = ASYMMETRIC_RANGE[bits]
    units = np.rint(weight.astype(F32) / each(scales, weight)) + each(zero_points, weight)
    return np.asarray(np.clip(units, first, last), np.int8)


def dequantize_asymmetric(q: Array, scales: Array, zero_points: Array) -> Array:
    """`float32(q - z) * s`, float32 [K, N]."""
    return np.asarray((q.astype(F32) - each(zero_points, q)) * each(scales, q), F32)


def each(scales: Array, weight: Array) -> Array:
    """The scale, or zero point, of each element of `weight` [K, N], float32, from those of groups."""
    return np.asarray(np.repeat(widened(scales), weight.shape[0] // scales.shape[0], axis=0), F32)
