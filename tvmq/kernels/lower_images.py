"""Lowering rules of images whose outputs read windows that differ, or all: adaptive pooling, resizing, group norm."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq import ir, ops
from tvmq.kernels.adaptive_pool import AdaptivePool
from tvmq.kernels.group_norm import GroupNorm
from tvmq.kernels.lowering import SHORT, Lowering, declared, dtype_of
from tvmq.kernels.resize import Resize
from tvmq.quantize import anchors, numerics, resampling

Array = npt.NDArray[Any]


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
    """`tvmq.resize2d`: what lies between integers is rounded to one."""
    whole = ops.Quantize(0, *numerics.INT_RANGE[ir.dtype_of(call)], ir.dtype_of(call))
    return _resized(lowering, state, name, call, 2, 0, (whole,), resampling.places)


def cubic(lowering: Lowering, state: ir.Rewrite, name: str, call: Any) -> Any:
    """`tvmq.cubic2d`."""
    a = ops.attributes(call)
    places = functools.partial(resampling.cubic_places, alpha=a["alpha"])
    return _resized(lowering, state, name, call, 4, a["x_zero_point"], ops.epilogue_of(call), places)


def _resized(
    lowering: Lowering,
    state: ir.Rewrite,
    name: str,
    call: Any,
    taps: int,
    zero_point: int,
    epilogue: ops.Epilogue,
    places: Callable[[int, int, str], tuple[Array, Array]],
) -> Any:
    """A resize; places: of an axis of an extent, for its outputs, by mode, the neighbours of each and their weights."""
    (x,) = call.args
    shape, dtype, mode = ir.shape_of(call), dtype_of(x), ops.attributes(call)["mode"]
    sizes = zip(ir.shape_of(x)[1:3], shape[1:3], strict=True)
    tables = [table.reshape(output, -1) for extent, output in sizes for table in places(extent, output, mode)]
    lanes = lowering.float.lanes
    spec = Resize(ir.shape_of(x), dtype, shape, ir.dtype_of(call), zero_point, epilogue, taps, lanes)  # type: ignore[arg-type]
    title = f"{SHORT[ir.dtype_of(call)]}-{SHORT[dtype]}-{ir.op_name(call).removeprefix(ops.PREFIX)}"
    lowering.names[name] = title
    args = [x, *lowering.lift(state, name, [ir.constant(table) for table in tables])]
    return lowering.call(spec, title, args, shape, ir.dtype_of(call))


def group_norm(lowering: Lowering, state: ir.Rewrite, name: str, call: Any) -> Any:
    """`tvmq.group_norm`."""
    x, *constants = call.args
    a, shape, dtype = ops.attributes(call), ir.shape_of(call), dtype_of(x)
    spec = GroupNorm(
        shape,  # type: ignore[arg-type]
        dtype,
        a["out_dtype"],
        a["groups"],
        a["epsilon"],
        (ops.Dequantize(a["x_scale"], a["x_zero_point"]),) if dtype in numerics.INT_RANGE else (),
        ops.epilogue_of(call),
        declared(constants[2:]),
        lowering.float.lanes,
    )
    title = f"{SHORT[a['out_dtype']]}-{SHORT[dtype]}-group_norm"
    lowering.names[name] = title
    return lowering.call(spec, title, [x, *lowering.lift(state, name, constants)], shape, a["out_dtype"])
