"""Bilinear resizing of 8-bit images in NumPy: what the compiled kernel must equal, bit for bit.

    lerp(a, b, w) = fma(float32(b - a), w, a)
    y = nearbyint(lerp(lerp(x00, x01, wx), lerp(x10, x11, wx), wy))

A mean of elements needs neither scale nor zero point: y has those of x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq import functions

Array = npt.NDArray[Any]
F32 = np.float32
# Of relax.image.resize2d: what the importers make of PyTorch's and ONNX's.
MODES = ("half_pixel", "align_corners")


def places(extent: int, output: int, mode: str) -> tuple[Array, Array]:
    """int32 [output, 2]: the neighbours that each output lies between, and float32 [output]: the second one's share.

    half_pixel: output i lies at (i + 1/2) * extent / output - 1/2; align_corners: at i * (extent - 1) / (output - 1).
    """
    i = np.arange(output, dtype=np.float64)
    position = (i + 0.5) * extent / output - 0.5 if mode == "half_pixel" else i * (extent - 1) / max(output - 1, 1)
    position = np.clip(position, 0, extent - 1)
    left = np.minimum(position.astype(np.int32), max(extent - 2, 0))
    both = np.stack([left, np.minimum(left + 1, extent - 1)], axis=1)
    return both.astype(np.int32), (position - left).astype(F32)


def bilinear(x: Array, output: Sequence[int], mode: str) -> Array:
    """8-bit NHWC x resized to [N, *output, C]."""
    m = functions.NumPyMath()
    (rows, down), (columns, across) = (
        places(extent, size, mode) for extent, size in zip(x.shape[1:3], output, strict=True)
    )

    def lerp(a: Array, b: Array, share: Array) -> Any:
        return m.fma(m.sub(b, a), share, a)

    image = x.astype(F32)
    left, right = (image[:, :, columns[:, side]] for side in (0, 1))
    wide = lerp(left, right, across[:, None])
    top, bottom = (wide[:, rows[:, side]] for side in (0, 1))
    return np.asarray(np.rint(lerp(top, bottom, down[:, None, None])), x.dtype)
