"""Lowering rules of images whose outputs read windows that differ: adaptive pooling, bilinear resizing."""

from __future__ import annotations

from typing import Any

import numpy as np

from tvmq import ir, ops
from tvmq.kernels.adaptive_pool import AdaptivePool
from tvmq.kernels.lowering import SHORT, Lowering, declared, dtype_of
from tvmq.kernels.resize import Resize
from tvmq.quantize import anchors, numerics, resampling


def adaptive_pool(lowering: Lowering, state: ir.Rewrite, name: str, call: Any) -> Any:
    """`tvmq.adaptive_avg_pool2d`."""
    x, *operands = call.args
    a, shape, dtype = ops.attributes(call), ir.shape_of(call), dtype_of(x)
    rows, columns = (anchors.adaptive_windows(*sizes) for sizes in zip(ir.shape_of(x)[1:3], shape[1:3], strict=True))
    counts = np.outer([stop - start for start, stop in rows], [stop - start for start, stop in columns])
    spec = AdaptivePool(
        ir.shape_of(x),  # type: ignore[arg-type]
        dtype,
        shape,  # type: ignore[arg-type]
        a["out_dtype"],
        ops.epilogue_of(call),
        declared(operands),
        a["x_zero_point"],
        lowering.float.lanes,
    )
    title = f"{SHORT[a['out_dtype']]}-{SHORT[dtype]}-adaptivepool2d"
    lowering.names[name] = title
    shares = ir.constant(np.asarray(numerics.reciprocal(counts)).ravel())
    return lowering.call(spec, title, [x, *lowering.lift(state, name, [shares, *operands])], shape, a["out_dtype"])


def resize(lowering: Lowering, state: ir.Rewrite, name: str, call: Any) -> Any:
    """`tvmq.resize2d`."""
    (x,) = call.args
    shape, dtype, mode = ir.shape_of(call), dtype_of(x), ops.attributes(call)["mode"]
    sizes = zip(ir.shape_of(x)[1:3], shape[1:3], strict=True)
    tables = [ir.constant(table) for extent, output in sizes for table in resampling.places(extent, output, mode)]
    spec = Resize(ir.shape_of(x), dtype, shape, lowering.float.lanes)  # type: ignore[arg-type]
    title = f"{SHORT[dtype]}-{SHORT[dtype]}-resize2d"
    lowering.names[name] = title
    return lowering.call(spec, title, [x, *lowering.lift(state, name, tables)], shape, dtype)
