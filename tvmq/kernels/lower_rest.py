"""Lowering rules of operators without constant weights: pools, maps, concat, row-wise operators, products."""

from __future__ import annotations

import math
from typing import Any

from tvm import relax

from tvmq import ir, ops
from tvmq.kernels import lookup
from tvmq.kernels.batch_matmul import BatchMatmul
from tvmq.kernels.builder import FLOAT
from tvmq.kernels.elementwise import Concat, Map
from tvmq.kernels.embedding import Embedding
from tvmq.kernels.lowering import SHORT, Lowering, Packing, declared, dtype_of
from tvmq.kernels.micro import Micro
from tvmq.kernels.pool import Pool, lowest, reciprocal_counts
from tvmq.kernels.rowwise import Rowwise
from tvmq.quantize import numerics


def pool(lowering: Lowering, state: ir.Rewrite, name: str, call: Any) -> Any:
    """`tvmq.avg_pool2d` and `tvmq.max_pool2d`."""
    a = ops.attributes(call)
    x, *operands = call.args
    kind = "max" if ir.is_call(call, "tvmq.max_pool2d") else "avg"
    dtype = dtype_of(x)
    zero_point = a.get("x_zero_point", 0)
    fill = lowest(dtype) if kind == "max" else zero_point
    padded = lowering.pad(state, name, x, a["padding"], ir.shape_of(x)[3], fill, dtype)
    shape = ir.shape_of(x)
    window, strides, dilation = a["pool"], a["strides"], a.get("dilation", (1, 1))
    height, width = (
        (padded_extent - (size - 1) * step - 1) // stride + 1
        for padded_extent, size, step, stride in zip(ir.shape_of(padded)[1:3], window, dilation, strides, strict=True)
    )
    out = (shape[0], height, width, shape[3])
    counts = []
    if kind == "avg":
        counts = [ir.constant(reciprocal_counts(shape[1:3], window, strides, a["padding"], a["count_include_pad"]))]  # type: ignore[arg-type]
    spec = Pool(
        kind,
        ir.shape_of(padded),  # type: ignore[arg-type]
        dtype,
        window,
        strides,
        dilation,
        out,
        a["out_dtype"],
        ops.epilogue_of(call),
        declared(operands),
        zero_point,
        _pool_lanes(lowering, dtype),
        ops.read_steps(call),
    )
    title = f"{SHORT[a['out_dtype']]}-{kind}pool2d-{window[0]}x{window[1]}"
    lowering.names[name] = title
    args = [padded, *lowering.lift(state, name, [*counts, *operands])]
    result = lowering.call(spec, title, args, out, a["out_dtype"])
    return (
        result if out == ir.shape_of(call) else relax.op.reshape(state.emit(result, f"{name}_image"), ir.shape_of(call))
    )


def _pool_lanes(lowering: Lowering, dtype: str) -> int:
    """Channels at a time: of 8 bits as many as a register of 128 bits holds, at least."""
    lanes = lowering.float.lanes
    return max(lanes, 16) if dtype in numerics.INT_RANGE else lanes


def elementwise(lowering: Lowering, state: ir.Rewrite, name: str, call: Any) -> Any:
    """`tvmq.map`; one that quantizes rows is a row-wise operator."""
    if ops.row_quantizer(call) is not None:
        return rowwise(lowering, state, name, call)
    x, *operands = call.args
    out_dtype = ir.dtype_of(call)
    dtype = dtype_of(x)
    if lookup.is_looked_up(call, dtype):
        return _looked_up(lowering, state, name, call)
    spec = Map(ir.shape_of(x), dtype, out_dtype, ops.epilogue_of(call), declared(operands), lowering.float.lanes)
    title = f"{SHORT[out_dtype]}-{SHORT[dtype]}-map"
    lowering.names[name] = title
    return lowering.call(spec, title, [x, *lowering.lift(state, name, operands)], ir.shape_of(call), out_dtype)


def _looked_up(lowering: Lowering, state: ir.Rewrite, name: str, call: Any) -> Any:
    """A map of 8 bits to 8 bits by its table."""
    x, dtype, out_dtype = call.args[0], dtype_of(call.args[0]), ir.dtype_of(call)
    entries = lowering.parameter(state, f"{name}_table", lookup.table(ops.epilogue_of(call), dtype))
    spec = lookup.Lookup(ir.shape_of(x), dtype, out_dtype, lookup.permute_llvm(lowering.target.isa))
    title = f"{SHORT[out_dtype]}-{SHORT[dtype]}-lookup"
    lowering.names[name] = title
    return lowering.call(spec, title, [x, entries], ir.shape_of(call), out_dtype)


def concat(lowering: Lowering, _state: ir.Rewrite, name: str, call: Any) -> Any:
    """`tvmq.concat`."""
    shapes = tuple(ir.shape_of(arg) for arg in call.args)
    dtype, out_dtype = dtype_of(call.args[0]), ir.dtype_of(call)
    axis = ops.attributes(call)["axis"]
    spec = Concat(shapes, dtype, ir.shape_of(call), out_dtype, axis, ops.concat_epilogues(call), lowering.float.lanes)
    title = f"{SHORT[out_dtype]}-{SHORT[dtype]}-concat"
    lowering.names[name] = title
    return lowering.call(spec, title, list(call.args), ir.shape_of(call), out_dtype)


def embedding(lowering: Lowering, state: ir.Rewrite, name: str, call: Any) -> Any:
    """`tvmq.embedding`."""
    indices, *constants = call.args
    arrays = [ir.to_numpy(constant) for constant in constants]
    rows, width = arrays[0].shape
    spec = Embedding(ir.shape_of(indices), dtype_of(indices), rows, width, lowering.float.lanes)
    title = "f32-s8-embedding"
    lowering.names[name] = title
    weights = lowering.pack(state, name, [(array, Packing("plain", array.shape, 0, 1, 0, 0)) for array in arrays])
    return lowering.call(spec, title, [indices, *weights], ir.shape_of(call), "float32")


def rowwise(lowering: Lowering, state: ir.Rewrite, name: str, call: Any) -> Any:
    """`tvmq.layer_norm`, `tvmq.softmax`, and what quantizes rows."""
    kind = ir.op_name(call).removeprefix(ops.PREFIX)
    a = ops.attributes(call)
    epsilon = a.get("epsilon", 0.0)
    operands = call.args[3:] if kind == "layer_norm" else call.args[1:]
    dtype, results = dtype_of(call.args[0]), ops.results(call)
    shape = ir.shape_of(call.args[0])
    integer = dtype in numerics.INT_RANGE and kind != "map"
    read = (ops.Dequantize(a["x_scale"], a["x_zero_point"]),) if integer else ()
    spec = Rowwise(kind, shape, dtype, read, tuple(results), epsilon, ops.epilogue_of(call), declared(operands))
    last = ops.row_quantizer(call)
    made, rows = (last.dtype, "-rows") if last else (results[0][1], "")
    title = f"{SHORT[made]}-{SHORT[dtype]}-{kind}{rows}"
    lowering.names[name] = title
    return lowering.call_for(spec, title, lowering.lift(state, name, call.args), results)


def batch_matmul(lowering: Lowering, state: ir.Rewrite, name: str, call: Any) -> Any:
    """`tvmq.batch_matmul`: one y for all rows makes one product of them all."""
    x, y, *operands = call.args
    a, shape, depth = ops.attributes(call), ir.shape_of(call), ir.shape_of(x)[-1]
    dtype, zero_points = dtype_of(y), (0, 0)
    m = lowering.float if dtype == FLOAT else lowering.int8.by_words()
    batch_x, batch_y = math.prod(ir.shape_of(x)[:-2]), math.prod(ir.shape_of(y)[:-2])
    rows, columns = shape[-2], shape[-1]
    if dtype != FLOAT:
        x = _whole_words(lowering, state, name, x, a["x_zero_point"], m)
        zero_points = (0 if m.widened else a["x_zero_point"], a["y_zero_point"] - (128 if dtype == "uint8" else 0))
    if batch_y == 1:
        batch_x, rows = 1, batch_x * rows
    # Two vectors of columns leave most registers to rows, which share their loads; sums of rows take one more.
    vectors = min(2, -(-columns // m.lanes))
    most = (m.registers - vectors - 1 - m.single.temporaries) // (vectors + bool(zero_points[1]))
    tile = -(-rows // -(-rows // min(rows, most)))
    spec = BatchMatmul(
        (ir.shape_of(x), ir.shape_of(y), shape),
        dtype,
        a["out_dtype"],
        batch_y,
        rows,
        depth,
        columns,
        batch_x < batch_y,
        a["transposed"],
        zero_points,
        m,
        tile,
        vectors,
        ops.epilogue_of(call),
        declared(operands),
    )
    title = f"{SHORT[a['out_dtype']]}-{SHORT[m.w_dtype]}-batch_matmul-{tile}x{vectors * m.lanes}-{m.name}"
    lowering.names[name] = title
    return lowering.call(spec, title, [x, y, *lowering.lift(state, name, operands)], shape, a["out_dtype"])


def _whole_words(lowering: Lowering, state: ir.Rewrite, name: str, x: Any, zero_point: int, m: Micro) -> Any:
    """8-bit rows as `m` reads them: as long as whole steps are, and widened where it multiplies int16."""
    depth = ir.shape_of(x)[-1]
    wide = -(-depth // m.kr) * m.kr
    if wide == depth and dtype_of(x) == m.a_dtype:
        return x
    image = state.emit(relax.op.reshape(x, (1, 1, math.prod(ir.shape_of(x)[:-1]), depth)), f"{name}_rows")
    return lowering.pad(state, name, image, (0, 0, 0, 0), wide, zero_point, m.a_dtype)
