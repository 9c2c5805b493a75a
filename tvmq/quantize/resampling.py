"""Bilinear and bicubic resizing of 8-bit images in NumPy: what the compiled kernels must equal, bit for bit.

    lerp(a, b, w) = fma(float32(b - a), w, a)
    y = nearbyint(lerp(lerp(x00, x10, wy), lerp(x01, x11, wy), wx))

A mean of elements needs neither scale nor zero point: y has those of x. A bicubic sum reaches beyond its elements, and
goes through an epilogue into a scale of its own:

    cubic(a, w) = fma(a3, w3, fma(a2, w2, fma(a1, w1, float32(a0 * w0))))
    v = cubic(cubic(float32(x - zero_point) of four rows, wy) of four columns, wx)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq import functions
from tvmq.importer.interpolation import cubic as cubic_weight

Array = npt.NDArray[Any]
F32 = np.float32
# Of relax.image.resize2d: what the importers make of PyTorch's and ONNX's.
MODES = ("half_pixel", "align_corners")


def places(extent: int, output: int, mode: str) -> tuple[Array, Array]:
    """int32 [output, 2]: the neighbours that each output lies between, and float32 [output]: the second one's share.

    See `_positions` for where an output lies.
    """
    position = np.clip(_positions(extent, output, mode), 0, extent - 1)
    left = np.minimum(position.astype(np.int32), max(extent - 2, 0))
    both = np.stack([left, np.minimum(left + 1, extent - 1)], axis=1)
    return both.astype(np.int32), (position - left).astype(F32)


def cubic_places(extent: int, output: int, mode: str, alpha: float) -> tuple[Array, Array]:
    """int32 [output, 4]: the neighbours of each output, those at the ends repeated, and float32: their weights."""
    position = _positions(extent, output, mode)[:, None]
    neighbours = np.floor(position) + np.arange(-1, 3)
    weights = cubic_weight(position - neighbours, alpha)
    return np.clip(neighbours, 0, extent - 1).astype(np.int32), weights.astype(F32)


def _positions(extent: int, output: int, mode: str) -> Array:
    """Where outputs lie in the input, float64 [output].

    half_pixel: output i lies at (i + 1/2) * extent / output - 1/2; align_corners: at i * (extent - 1) / (output - 1).
    """
    i = np.arange(output, dtype=np.float64)
    return (i + 0.5) * extent / output - 0.5 if mode == "half_pixel" else i * (extent - 1) / max(output - 1, 1)


def bicubic(x: Array, output: Sequence[int], mode: str, alpha: float, x_zero_point: int) -> Array:
    """8-bit NHWC x, less its zero point, resized to [N, *output, C], float32."""
    m = functions.NumPyMath()
    (rows, down), (columns, across) = (
        cubic_places(extent, size, mode, alpha) for extent, size in zip(x.shape[1:3], output, strict=True)
    )

    def weighed(taps: Sequence[Array], weights: Sequence[Array]) -> Any:
        total = m.mul(taps[0], weights[0])
        for tap, weight in zip(taps[1:], weights[1:], strict=True):
            total = m.fma(tap, weight, total)
        return total

    image = (x.astype(np.int32) - x_zero_point).astype(F32)
    tall = weighed([image[:, rows[:, tap]] for tap in range(4)], [down[:, tap, None, None] for tap in range(4)])
    wide = weighed([tall[:, :, columns[:, tap]] for tap in range(4)], [across[:, tap, None] for tap in range(4)])
    return np.asarray(wide, F32)


def bilinear(x: Array, output: Sequence[int], mode: str) -> Array:
    """8-bit NHWC x resized to [N, *output, C]."""
    m = functions.NumPyMath()
    (rows, down), (columns, across) = (
        places(extent, size, mode) for extent, size in zip(x.shape[1:3], output, strict=True)
    )

    def lerp(a: Array, b: Array, share: Array) -> Any:
        return m.fma(m.sub(b, a), share, a)

    image = x.astype(F32)
    above, below = (image[:, rows[:, side]] for side in (0, 1))
    tall = lerp(above, below, down[:, None, None])
    left, right = (tall[:, :, columns[:, side]] for side in (0, 1))
    return np.asarray(np.rint(lerp(left, right, across[:, None])), x.dtype)
