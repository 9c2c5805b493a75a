"""What anchors sum, in NumPy: convolutions, products of matrices and pools, exact in int32 for integers.

An epilogue runs on each result: see `numerics.epilogue`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq.quantize.numerics import F32, reciprocal

Array = npt.NDArray[Any]


def conv2d(
    x: Array,
    weight: Array,
    *,
    strides: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_zero_point: int = 0,
) -> Array:
    """Convolution of NHWC x with [O, kh, kw, I / groups] weights; int32 for integers, float32 for floats.

    Integers: sum of `(x - x_zero_point) * w`, padding counts as zero. Exact: products and sums stay below 2**53.
    """
    geometry = {"strides": strides, "padding": padding, "dilation": dilation}
    image = windows(_wide(x, x_zero_point), weight.shape[1:3], pad_value=0.0, **geometry)

    def multiply(taps: Array, part: Array) -> Array:
        return np.asarray(taps.reshape(len(taps), -1) @ part.reshape(len(part), -1).T.astype(taps.dtype))

    return _narrow(group_by_group(image, weight, groups, multiply), x)


def group_by_group(image: Array, weight: Array, groups: int, multiply: Callable[[Array, Array], Array]) -> Array:
    """The convolution [n, oh, ow, O] of windows [n, oh, ow, kh, kw, c] with [O, kh, kw, I / groups] weights.

    multiply: [M, O'] of what a group reads, [M, kh * kw, I / groups], and its weight, [O', kh * kw, I / groups].
    """
    n, oh, ow = image.shape[:3]
    out_channels, kh, kw, per_group = weight.shape
    results = []
    for g in range(groups):
        taps = image[..., g * per_group : (g + 1) * per_group].reshape(n * oh * ow, kh * kw, per_group)
        part = weight[g * (out_channels // groups) : (g + 1) * (out_channels // groups)]
        results.append(multiply(taps, part.reshape(len(part), kh * kw, per_group)))
    return np.concatenate(results, axis=1).reshape(n, oh, ow, out_channels)


def matmul(x: Array, weight: Array, *, x_zero_point: int = 0) -> Array:
    """`x @ weight` in int32 (of `x - x_zero_point`) for integers, float32 for floats."""
    wide = _wide(x, x_zero_point)
    return _narrow(wide @ weight.astype(wide.dtype), x)


def batch_matmul(
    x: Array, y: Array, *, transposed: bool = False, x_zero_point: int = 0, y_zero_point: int = 0
) -> Array:
    """The products of matrices `x - x_zero_point` and `y - y_zero_point`, int32 for integers, float32 for floats."""
    y = np.swapaxes(y, -1, -2) if transposed else y
    return _narrow(np.asarray(np.matmul(_wide(x, x_zero_point), _wide(y, y_zero_point))), x)


def avg_pool2d(
    x: Array,
    *,
    pool: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[int],
    count_include_pad: bool,
    x_zero_point: int = 0,
) -> Array:
    """`float32(sum of x - x_zero_point) * float32(1 / count)` over each window of NHWC x."""
    geometry = {"strides": strides, "padding": padding, "dilation": (1, 1)}
    image = windows(_wide(x, x_zero_point), pool, pad_value=0.0, **geometry)
    total = _narrow(image.sum(axis=(3, 4)), x).astype(F32)
    ones = np.ones((1, *x.shape[1:3], 1))
    counted = windows(ones, pool, pad_value=1.0 if count_include_pad else 0.0, **geometry).sum(axis=(3, 4))
    return np.asarray(total * reciprocal(counted), F32)


def adaptive_avg_pool2d(x: Array, output: Sequence[int], *, x_zero_point: int = 0) -> Array:
    """As `avg_pool2d`, over windows from floor(i h / oh) to ceil((i + 1) h / oh), and likewise across."""
    rows, columns = (adaptive_windows(*sizes) for sizes in zip(x.shape[1:3], output, strict=True))
    wide = _wide(x, x_zero_point)
    sums = [[wide[:, top:bottom, left:right].sum(axis=(1, 2)) for left, right in columns] for top, bottom in rows]
    counts = np.array([[(bottom - top) * (right - left) for left, right in columns] for top, bottom in rows])
    total = _narrow(np.moveaxis(np.array(sums), 2, 0), x).astype(F32)
    return np.asarray(total * reciprocal(counts)[:, :, None], F32)


def adaptive_windows(extent: int, output: int) -> list[tuple[int, int]]:
    """The windows that an adaptive pool has along one axis: the first element of each, and the one after its last."""
    return [(i * extent // output, -(-(i + 1) * extent // output)) for i in range(output)]


def max_pool2d(
    x: Array, *, pool: Sequence[int], strides: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Array:
    """The largest element of each window of NHWC x; padding never wins."""
    lowest = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    image = windows(x, pool, strides=strides, padding=padding, dilation=dilation, pad_value=lowest)
    return np.asarray(image.max(axis=(3, 4)))


def _wide(x: Array, zero_point: int) -> Array:
    """Integers as exact float64, whose matmul is fast and exact; floats unchanged."""
    return x if x.dtype.kind == "f" else x.astype(np.float64) - zero_point


def _narrow(result: Array, x: Array) -> Array:
    """Exact float64 sums as int32 where x was an integer."""
    return result if x.dtype.kind == "f" else result.astype(np.int64).astype(np.int32)


def windows(
    x: Array,
    window: Sequence[int],
    *,
    strides: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    pad_value: float,
) -> Array:
    """The sliding windows of NHWC x: [n, oh, ow, kh, kw, c], a view of the padded image."""
    top, left, bottom, right = padding
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=pad_value)
    kh, kw = window
    extent = ((kh - 1) * dilation[0] + 1, (kw - 1) * dilation[1] + 1)
    view = np.lib.stride_tricks.sliding_window_view(padded, extent, axis=(1, 2))
    view = view[:, :: strides[0], :: strides[1], :, :: dilation[0], :: dilation[1]]
    return view.transpose(0, 1, 2, 4, 5, 3)
