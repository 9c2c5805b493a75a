"""Max pooling of any number of dimensions with the places of the maxima, from the taps of its windows.

The place is the flat index into the image without padding; of equal maxima the first counts (torch.nn.MaxPool2d with
return_indices=True).
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import fx
from tvm import relax

from tvmq import ir

Array = npt.NDArray[Any]
_op = relax.op


def are_read(node: fx.Node) -> bool:
    """Whether someone reads the second result of `node`."""
    return any(user.target is operator.getitem and user.args[1] == 1 for user in node.users)


def max_pool(
    importer: Any,
    x: Any,
    outputs: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Any:
    """(maxima, int64 places) of `x` [..., *extents], with `outputs` windows along each of the last axes."""
    shape, dims = ir.shape_of(x), len(outputs)
    extents = shape[-dims:]
    sizes = list(zip(extents, outputs, kernel, stride, padding, dilation, strict=True))
    after = [max((m - 1) * s + d * (k - 1) + 1 - n - p, 0) for n, m, k, s, p, d in sizes]
    if any(padding) or any(after):
        sides = [0] * (2 * (len(shape) - dims)) + [side for pair in zip(padding, after, strict=True) for side in pair]
        x = importer.block_builder.emit(_op.nn.pad(x, sides, pad_value=float(np.finfo(ir.dtype_of(x)).min)))
    axes = list(range(len(shape) - dims, len(shape)))
    best, places = None, None
    for tap in itertools.product(*(range(k) for k in kernel)):
        begin = [t * d for t, d in zip(tap, dilation, strict=True)]
        end = [b + (m - 1) * s + 1 for b, m, s in zip(begin, outputs, stride, strict=True)]
        value = importer.block_builder.emit(_op.strided_slice(x, axes, begin, end, list(stride)))
        offsets = [b - p for b, p in zip(begin, padding, strict=True)]
        place = ir.constant(_places(extents, outputs, stride, offsets))
        if best is None:
            lead = importer.block_builder.emit(_op.broadcast_to(place, ir.shape_of(value)))
            best, places = value, lead
            continue
        wins = importer.block_builder.emit(_op.greater(value, best))
        if any(padding):  # the first tap of a window may be padding, which wins over nothing
            padded = importer.block_builder.emit(_op.less(places, relax.const(0, "int64")))
            wins = importer.block_builder.emit(_op.logical_or(wins, padded))
        best = importer.block_builder.emit(_op.where(wins, value, best))
        places = importer.block_builder.emit(_op.where(wins, place, places))
    return relax.Tuple([best, places])


def _places(extents: Sequence[int], outputs: Sequence[int], stride: Sequence[int], offsets: Sequence[int]) -> Array:
    """The flat place of a tap of every window, -1 where it is outside of the image."""
    positions = [np.arange(m) * s + o for m, s, o in zip(outputs, stride, offsets, strict=True)]
    flat, inside = np.zeros((), np.int64), np.ones((), bool)
    for position, extent in zip(positions, extents, strict=True):
        flat = flat[..., None] * extent + position
        inside = inside[..., None] & (position >= 0) & (position < extent)
    return np.where(inside, flat, -1).astype(np.int64)


def adaptive_max_pool(importer: Any, x: Any, outputs: Sequence[int]) -> Any:
    """(maxima, int64 places) of windows from floor(i * n / m) to ceil((i + 1) * n / m), one window after the other."""
    shape, dims = ir.shape_of(x), len(outputs)
    extents, lead = shape[-dims:], shape[:-dims]
    axes = list(range(len(lead), len(shape)))
    values, places = [], []
    for window in itertools.product(*(range(m) for m in outputs)):
        sizes = list(zip(window, extents, outputs, strict=True))
        begin, end = [i * n // m for i, n, m in sizes], [-(-(i + 1) * n // m) for i, n, m in sizes]
        part = importer.block_builder.emit(_op.strided_slice(x, axes, begin, end))
        flat = importer.block_builder.emit(_op.reshape(part, [*lead, -1]))
        values.append(importer.block_builder.emit(_op.max(flat, axis=[-1], keepdims=True)))
        winner = importer.block_builder.emit(_op.argmax(flat, axis=-1, keepdims=True))
        known = np.arange(np.prod(extents), dtype=np.int64).reshape(extents)
        inside = known[tuple(slice(b, e) for b, e in zip(begin, end, strict=True))].reshape(-1)
        places.append(importer.block_builder.emit(_op.take(ir.constant(inside), winner)))
    joined = [importer.block_builder.emit(_op.concat(parts, axis=-1)) for parts in (values, places)]
    return relax.Tuple([importer.block_builder.emit(_op.reshape(part, [*lead, *outputs])) for part in joined])
