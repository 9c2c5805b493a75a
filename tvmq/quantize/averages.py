"""Windows of averages and sums, their images, and averages over floats of which they read the integers.

    mean(dequantize(quantize(y, s, z), s, z)), y read by others  ->  tvmq.avg_pool2d(y; read = multiply(1 / s), round)

as in a squeeze-and-excite block whose product a source leaves float: the average rounds what it reads, instead of a
kernel that stores integers for it alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from tvmq import ir, ops
from tvmq.graph.fusion import Chain
from tvmq.graph.pairs import alike
from tvmq.graph.reductions import REDUCTIONS, axes_of, is_for_integers
from tvmq.quantize import numerics
from tvmq.quantize.epilogues import Stored

# Sums of this many 8-bit integers are exact as floats: 255 * 2**16 < 2**24.
MOST_ROUNDED = 2**16


def is_uneven(call: Any) -> bool:
    """Whether a window mean has windows of several sizes."""
    if not ir.is_call(call, "nn.adaptive_avg_pool2d"):
        return False
    return any(n % m for n, m in zip(ir.shape_of(call.args[0])[1:3], ir.shape_of(call)[1:3], strict=True))


def image_of(call: Any) -> tuple[int, ...]:
    """The channels-last image [N, H, W, C] whose windows are averaged: what `call` reads, or that in another shape.

    A mean or sum of [..., rest, C] along some axes before `rest` is over the height of [..., axes, rest, C]; one along
    the last axes over that of [..., axes, 1, 1].
    """
    shape = ir.shape_of(call.args[0])
    if not ir.is_call(call, *REDUCTIONS) or _is_of_images(call):
        return shape
    axes = axes_of(call)
    *rest, channels = shape[axes[-1] + 1 :] or (1,)
    parts = shape[: axes[0]], shape[axes[0] : axes[-1] + 1], rest
    return (*(math.prod(part) for part in parts), channels)


def _is_of_images(call: Any) -> bool:
    """Whether a mean or sum is over height and width of images."""
    return len(ir.shape_of(call.args[0])) == 4 and axes_of(call) == [1, 2]


def window(call: Any) -> dict[str, Any]:
    """The pooling geometry of a window mean or sum that is not uneven, of `image_of` it."""
    height, width = image_of(call)[1:3]
    if ir.is_call(call, *REDUCTIONS):
        width = width if _is_of_images(call) else 1
        pool = strides = (height, width)
    elif ir.is_call(call, "nn.adaptive_avg_pool2d"):
        out_height, out_width = ir.shape_of(call)[1:3]
        pool = strides = (height // out_height, width // out_width)
    else:
        a = call.attrs
        return {
            "pool": [int(v) for v in a.pool_size],
            "strides": [int(v) for v in a.strides],
            "padding": [int(v) for v in a.padding],
            "count_include_pad": bool(a.count_include_pad),
        }
    return {"pool": pool, "strides": strides, "padding": (0, 0, 0, 0), "count_include_pad": False}


def only_averaged(
    quantized: Any, values: Mapping[Any, Any], readers: Mapping[Any, list[Any]], anchors: Mapping[Any, Chain]
) -> bool:
    """Whether the integers of a quantize are read by averages alone. anchors: the chains by their anchor."""
    for reader in readers.get(quantized, []):
        call: Any = values.get(reader)
        if not ir.is_call(call, "dequantize") or not alike(call, values[quantized]):
            return False
        chains = [anchors.get(last) for last in readers.get(reader, [])]
        if not all(chain is not None and _can_round(chain) for chain in chains):
            return False
    return True


def rounded_when_read(var: Any, out: Stored) -> Stored:
    """The integers `out` of the float tensor `var`, made by who reads them."""
    whole = out.to_integer()
    low, high = whole.qmin - whole.zero_point, whole.qmax - whole.zero_point
    read = (ops.Multiply(float(numerics.reciprocal(out.scale))), ops.Round(low, high))
    return dataclasses.replace(out, var=var, zero_point=0, read=read)


def _can_round(chain: Chain) -> bool:
    if chain.kind != "avg_pool2d" or is_uneven(chain.call) or is_for_integers(chain.call):
        return False
    return bool(math.prod(window(chain.call)["pool"]) <= MOST_ROUNDED)
