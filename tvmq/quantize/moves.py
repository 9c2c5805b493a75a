"""QDQ -> integer operators, of those that move stored elements, join them, or pick or weigh some of them.

quantize(max_pool2d(dequantize(x, s, z)), s, z)                        ->  tvmq.max_pool2d(x)
quantize(concat(dequantize(x, s, z), dequantize(y, t, u)), s, z)       ->  tvmq.concat(x, y; y rescaled)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import relax

from tvmq import ir, op_calls, ops
from tvmq.quantize import numerics
from tvmq.quantize.epilogues import Stored
from tvmq.quantize.kept import factor, scaled
from tvmq.quantize.narrow import no_stored_form


def kept(call: Any, x: Stored | None, out: Stored) -> Any:
    """What makes `out` of the elements `x` of which it is made; None where it has others, or no form on them."""
    if x is None or no_stored_form(call, integer=out.is_integer):
        return None
    if not dataclasses.replace(x, scale=scaled(x.scale, call)).like(out):
        return None
    if factor(call) != 1.0:
        return x.var
    if ir.is_call(call, "nn.max_pool2d"):
        return max_pool(call, x.var, out.dtype)
    if ir.is_call(call, "image.resize2d") and str(call.attrs.method) == "linear":
        mode = str(call.attrs.coordinate_transformation_mode)
        return op_calls.resize2d(x.var, mode=mode, out_shape=ir.shape_of(call))
    if ir.is_call(call, "nn.pad"):
        value = out.element(float(call.attrs.pad_value)) if out.is_integer else 0.0
        return relax.op.nn.pad(x.var, call.attrs.pad_width, "constant", value)
    return relax.Call(call.op, [x.var, *call.args[1:]], call.attrs)


def concat(call: Any, found: Sequence[Stored | None], out: Stored) -> Any:
    """`tvmq.concat` of stored tensors as `out`; None where some are not stored so."""
    sources = [source for source in found if source is not None and source.dtype == out.dtype]
    if len(sources) < len(found):
        return None
    epilogues = [_rescale(source, out) for source in sources]
    tensors = [source.var for source in sources]
    axis = int(call.attrs.axis) % len(ir.shape_of(call))
    return op_calls.concat(tensors, epilogues, axis=axis, out_shape=ir.shape_of(call), out_dtype=out.dtype)


def cubic(call: Any, x: Stored | None, out: Stored) -> Any:
    """`tvmq.cubic2d` of the integers `x` as `out`; None where there are none, or no kernel for them."""
    if x is None or x.dtype not in numerics.INT_RANGE or not out.is_integer or no_stored_form(call, integer=True):
        return None
    return op_calls.cubic2d(
        x.var,
        (ops.Multiply(float(np.float32(x.scale / out.scale))), out.to_integer()),
        mode=str(call.attrs.coordinate_transformation_mode),
        alpha=float(call.attrs.cubic_alpha),
        x_zero_point=x.zero_point,
        out_shape=ir.shape_of(call),
        out_dtype=out.dtype,
    )


def max_pool(call: Any, x: Any, dtype: str) -> Any:
    """`tvmq.max_pool2d` of x."""
    a = call.attrs
    geometry = {
        "pool": [int(v) for v in a.pool_size],
        "strides": [int(v) for v in a.strides],
        "padding": [int(v) for v in a.padding],
        "dilation": [int(v) for v in a.dilation],
    }
    return op_calls.max_pool2d(x, **geometry, out_shape=ir.shape_of(call), out_dtype=dtype)


def _rescale(x: Stored, out: Stored) -> ops.Epilogue:
    if x.like(out):
        return ()
    return ops.Dequantize(float(np.float32(x.scale / out.scale)), x.zero_point), out.to_integer()
