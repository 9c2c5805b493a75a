"""Attention of 8-bit integers in NumPy: what every compiled kernel must equal, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq import functions
from tvmq.quantize import anchors

Array = npt.NDArray[Any]
F32 = np.float32
# The power of a query's largest score: all of 8 bits.
LARGEST = 255.0


def attention(query: Array, key: Array, value: Array, *, scale: float, zero_points: Sequence[int]) -> Array:
    """Float32 [N, S, heads, depth] from 8-bit tensors of that shape, in units of the scale of values.

    With scores `s = sum (q - z_q) (k - z_k)` in int32, and `scale` the product of the scales of queries and keys and of
    attention's own: `p = nearbyint(255 * 2**(float32(s - max s) * float32(scale * log2 e)))`, the power as
    `functions.power_of_two` computes it; results are `float32(sum p (v - z_v)) * (1 / float32(sum p))`.
    """
    m = functions.NumPyMath()
    q, k, v = (np.swapaxes(x, 1, 2) for x in (query, key, value))
    z_q, z_k, z_v = zero_points
    scores = anchors.batch_matmul(q, k, transposed=True, x_zero_point=z_q, y_zero_point=z_k)
    below = (scores - scores.max(axis=-1, keepdims=True)).astype(F32)
    powers = functions.power_of_two(m, m.mul(below, F32(scale * functions.LOG2_E)))
    whole = np.rint(m.mul(powers, F32(LARGEST))).astype(np.int32)
    total = anchors.batch_matmul(whole, v, y_zero_point=z_v).astype(F32)
    inverse = m.div(F32(1.0), whole.sum(axis=-1, keepdims=True, dtype=np.int32).astype(F32))
    return np.ascontiguousarray(np.swapaxes(m.mul(total, inverse), 1, 2))
