"""int16 activations times int8 weights in NumPy: what every compiled kernel of them must equal, bit for bit.

    s_b = sum of x * w over the products of block b                        exact in int32
    v   = ((float32(s_0) + float32(s_1)) + float32(s_2)) + ...             float32, block after block

x is symmetric: its zero point is 0. A block has `MOST_PRODUCTS` at most, since 32767 * 128 * 512 < 2**31; `blocks` says
which. What follows (scales, biases) is float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq.quantize import numerics
from tvmq.quantize.anchors import group_by_group, windows
from tvmq.quantize.numerics import QParams

Array = npt.NDArray[Any]
DTYPE = "int16"
MOST_PRODUCTS = 512


def scale_of(params: QParams, *, power_of_two: bool = False) -> float:
    """The scale with which int16 holds all that `params` can stand for: the largest magnitude over 32767.

    power_of_two: rounded up to one.
    """
    reach = max(params.qmax - params.zero_point, params.zero_point - params.qmin) * params.scale
    scale = max(reach / numerics.INTEGERS[DTYPE][1], numerics.TINY_SCALE)
    return float(np.float32(2.0 ** np.ceil(np.log2(scale)) if power_of_two else scale))


def blocks(kh: int, kw: int, channels: int) -> tuple[int, int]:
    """(taps, channels) of a block of a kernel of kh x kw taps: all of it, else a row of taps, a tap, or part of one.

    Blocks follow each other in the order [kh, kw, channels]; the last one of a tap may be smaller.
    """
    for taps in (kh * kw, kw, 1):
        if taps * channels <= MOST_PRODUCTS:
            return taps, channels
    return 1, MOST_PRODUCTS


def conv2d(
    x: Array,
    weight: Array,
    *,
    strides: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Array:
    """Convolution of int16 NHWC x with int8 [O, kh, kw, I / groups] weights: float32, as said above."""
    geometry = {"strides": strides, "padding": padding, "dilation": dilation}
    image = windows(x.astype(np.float64), weight.shape[1:3], pad_value=0.0, **geometry)
    block = blocks(*weight.shape[1:])
    return group_by_group(image, weight, groups, lambda taps, part: _sums(taps, part, *block))


def matmul(x: Array, weight: Array) -> Array:
    """int16 x [..., K] times int8 weight [K, N]: float32, as said above."""
    depth, channels = weight.shape
    rows = x.reshape(-1, 1, depth).astype(np.float64)
    return _sums(rows, weight.T[:, None], *blocks(1, 1, depth)).reshape(*x.shape[:-1], channels)


def _sums(x: Array, weight: Array, taps: int, channels: int) -> Array:
    """The sums [M, N] of x [M, taps, C] and weight [N, taps, C]; a block is `taps` by `channels` of them."""
    total = np.zeros((len(x), len(weight)), np.float32)
    for tap in range(0, x.shape[1], taps):
        for first in range(0, x.shape[2], channels):
            part = slice(None), slice(tap, tap + taps), slice(first, first + channels)
            # Sums below 2**31 are exact in float64, and rounded once.
            block = x[part].reshape(len(x), -1) @ weight[part].reshape(len(weight), -1).T.astype(np.float64)
            total = total + block.astype(np.float32)
    return total
