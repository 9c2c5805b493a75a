"""Calls of tvmq's Relax operators: a function an operator, whose attributes and operands `tvmq.ops` describes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvmq.ir import Expr
from tvmq.ops import PREFIX, Epilogue, QuantizeRows, RowScale, call, encode


def conv2d(
    x: Expr,
    weight: Expr,
    operands: Sequence[Expr],
    epilogue: Epilogue,
    *,
    strides: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    x_zero_point: int = 0,
    out_shape: Sequence[int],
    out_dtype: str,
) -> Any:
    """`tvmq.conv2d`; padding is (top, left, bottom, right) and holds `x_zero_point`."""
    attrs = {
        "strides": list(strides),
        "padding": list(padding),
        "dilation": list(dilation),
        "groups": groups,
        "x_zero_point": x_zero_point,
    }
    return _call("conv2d", [x, weight, *operands], attrs, epilogue, out_shape=out_shape, out_dtype=out_dtype)


def matmul(
    x: Expr,
    weight: Expr,
    operands: Sequence[Expr],
    epilogue: Epilogue,
    *,
    x_zero_point: int = 0,
    out_shape: Sequence[int],
    out_dtype: str,
) -> Any:
    """`tvmq.matmul`."""
    attrs = {"x_zero_point": x_zero_point}
    return _call("matmul", [x, weight, *operands], attrs, epilogue, out_shape=out_shape, out_dtype=out_dtype)


def grouped_matmul(
    x: Expr,
    weight: Expr,
    scales: Expr,
    operands: Sequence[Expr],
    epilogue: Epilogue,
    *,
    bits: int,
    out_shape: Sequence[int],
    out_dtype: str,
) -> Any:
    """`tvmq.grouped_matmul`: a product with a weight of `bits`-bit integers that have a scale a group along K."""
    args = [x, weight, scales, *operands]
    return _call("grouped_matmul", args, {"bits": bits}, epilogue, out_shape=out_shape, out_dtype=out_dtype)


def dequantize_groups(weight: Expr, scales: Expr, *, bits: int, shape: Sequence[int] = ()) -> Any:
    """`tvmq.dequantize_groups`: each element of `weight` int8 [K, N] times the scale of its group and column.

    shape: [N, kh, kw, I] of the convolution's weight that this is the matrix of, as `groups.matrix_of` makes it.
    """
    shape = shape or [int(n) for n in weight.ty.shape.values]
    return _call("dequantize_groups", [weight, scales], {"bits": bits}, (), out_shape=shape, out_dtype="float32")


def asymmetric_matmul(
    x: Expr,
    weight: Expr,
    scales: Expr,
    zero_points: Expr,
    operands: Sequence[Expr],
    epilogue: Epilogue,
    *,
    bits: int,
    out_shape: Sequence[int],
    out_dtype: str,
) -> Any:
    """`tvmq.asymmetric_matmul`: as `grouped_matmul`, with a zero point a group."""
    args = [x, weight, scales, zero_points, *operands]
    return _call("asymmetric_matmul", args, {"bits": bits}, epilogue, out_shape=out_shape, out_dtype=out_dtype)


def dequantize_asymmetric(
    weight: Expr, scales: Expr, zero_points: Expr, *, bits: int, shape: Sequence[int] = ()
) -> Any:
    """`tvmq.dequantize_asymmetric`: each element of `weight` int8 [K, N] less its zero point, times its scale.

    shape: see `dequantize_groups`.
    """
    shape, args = shape or [int(n) for n in weight.ty.shape.values], [weight, scales, zero_points]
    return _call("dequantize_asymmetric", args, {"bits": bits}, (), out_shape=shape, out_dtype="float32")


def embedding(indices: Expr, table: Expr, scales: Expr) -> Any:
    """`tvmq.embedding`: rows of `table`, each times its scale; indices outside of it take its first or last row."""
    shape = (*(int(n) for n in indices.ty.shape.values), int(table.ty.shape.values[1]))
    return _call("embedding", [indices, table, scales], {}, (), out_shape=shape, out_dtype="float32")


def lookup_matmul(
    x: Expr,
    weight: Expr,
    scales: Expr,
    table: Expr,
    operands: Sequence[Expr],
    epilogue: Epilogue,
    *,
    out_shape: Sequence[int],
    out_dtype: str,
) -> Any:
    """`tvmq.lookup_matmul`: a product with a weight of places in `table`, times the scales of groups along K."""
    args = [x, weight, scales, table, *operands]
    return _call("lookup_matmul", args, {}, epilogue, out_shape=out_shape, out_dtype=out_dtype)


def dequantize_places(weight: Expr, scales: Expr, table: Expr, *, shape: Sequence[int] = ()) -> Any:
    """`tvmq.dequantize_places`: the columns of `table` that a weight's elements name, times their groups' scales.

    shape: see `dequantize_groups`.
    """
    (rows, channels), (width, _) = ([int(n) for n in each.ty.shape.values] for each in (weight, table))
    shape = shape or [rows * width, channels]
    return _call("dequantize_places", [weight, scales, table], {}, (), out_shape=shape, out_dtype="float32")


def avg_pool2d(
    x: Expr,
    operands: Sequence[Expr],
    epilogue: Epilogue,
    *,
    pool: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[int],
    count_include_pad: bool,
    x_zero_point: int = 0,
    read: Epilogue = (),
    out_shape: Sequence[int],
    out_dtype: str,
) -> Any:
    """`tvmq.avg_pool2d`: the sum over each window times float32(1 / count), count being the elements it averages.

    read: what becomes of each element of float32 x first; steps without operands that keep zeros, which padding holds.
    """
    attrs = {
        "pool": list(pool),
        "strides": list(strides),
        "padding": list(padding),
        "count_include_pad": bool(count_include_pad),
        "x_zero_point": x_zero_point,
    }
    if read:
        attrs["read"] = encode(read)
    return _call("avg_pool2d", [x, *operands], attrs, epilogue, out_shape=out_shape, out_dtype=out_dtype)


def max_pool2d(
    x: Expr,
    *,
    pool: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out_shape: Sequence[int],
    out_dtype: str,
) -> Any:
    """`tvmq.max_pool2d`: padding never wins."""
    attrs = {"pool": list(pool), "strides": list(strides), "padding": list(padding), "dilation": list(dilation)}
    return _call("max_pool2d", [x], attrs, (), out_shape=out_shape, out_dtype=out_dtype)


def adaptive_avg_pool2d(
    x: Expr,
    operands: Sequence[Expr],
    epilogue: Epilogue,
    *,
    x_zero_point: int = 0,
    out_shape: Sequence[int],
    out_dtype: str,
) -> Any:
    """`tvmq.adaptive_avg_pool2d`: as `avg_pool2d`, over windows from floor(i h / oh) to ceil((i + 1) h / oh)."""
    attrs = {"x_zero_point": x_zero_point}
    return _call("adaptive_avg_pool2d", [x, *operands], attrs, epilogue, out_shape=out_shape, out_dtype=out_dtype)


def resize2d(x: Expr, *, mode: str, out_shape: Sequence[int]) -> Any:
    """`tvmq.resize2d` of 8-bit x: bilinear, as `resampling.bilinear` computes it; mode: one of `resampling.MODES`."""
    return _call("resize2d", [x], {"mode": mode}, (), out_shape=out_shape, out_dtype=str(x.ty.dtype))


def cubic2d(
    x: Expr,
    epilogue: Epilogue,
    *,
    mode: str,
    alpha: float,
    x_zero_point: int,
    out_shape: Sequence[int],
    out_dtype: str,
) -> Any:
    """`tvmq.cubic2d` of 8-bit x, as `resampling.bicubic` computes it; the epilogue has no tensor operands."""
    attrs = {"mode": mode, "alpha": alpha, "x_zero_point": x_zero_point}
    return _call("cubic2d", [x], attrs, epilogue, out_shape=out_shape, out_dtype=out_dtype)


def elementwise(
    x: Expr, operands: Sequence[Expr], epilogue: Epilogue, *, out_shape: Sequence[int], out_dtype: str
) -> Any:
    """`tvmq.map`: an epilogue on its own."""
    return _call("map", [x, *operands], {}, epilogue, out_shape=out_shape, out_dtype=out_dtype)


def quantize_rows(x: Expr, *, zero_point: int = 0, dtype: str = "int8") -> Any:
    """A map that only quantizes rows: results (q, scales)."""
    shape = [int(n) for n in x.ty.shape.values]
    return elementwise(x, (), (QuantizeRows(False, zero_point, dtype),), out_shape=shape, out_dtype=dtype)


def dequantize_rows(q: Expr, scales: Expr) -> Any:
    """A map that undoes `quantize_rows` into int8: float32(q) times its row's scale."""
    shape = [int(n) for n in q.ty.shape.values]
    return elementwise(q, [scales], (RowScale(),), out_shape=shape, out_dtype="float32")


def layer_norm(
    x: Expr,
    gamma: Expr,
    beta: Expr,
    operands: Sequence[Expr],
    epilogue: Epilogue,
    *,
    epsilon: float,
    x_scale: float = 1.0,
    x_zero_point: int = 0,
    out_shape: Sequence[int],
    out_dtype: str,
) -> Any:
    """`tvmq.layer_norm` over the last axis of x, as `functions.layer_norm` computes it.

    8-bit x is dequantized with `x_scale` and `x_zero_point` as it is read; all arithmetic is of float32.
    """
    attrs = {"epsilon": epsilon, "x_scale": x_scale, "x_zero_point": x_zero_point}
    args = [x, gamma, beta, *operands]
    return _call("layer_norm", args, attrs, epilogue, out_shape=out_shape, out_dtype=out_dtype)


def group_norm(
    x: Expr,
    gamma: Expr,
    beta: Expr,
    operands: Sequence[Expr],
    epilogue: Epilogue,
    *,
    groups: int,
    epsilon: float,
    x_scale: float = 1.0,
    x_zero_point: int = 0,
    out_shape: Sequence[int],
    out_dtype: str,
) -> Any:
    """`tvmq.group_norm` of x [N, H, W, C], as `functions.group_norm` computes it; of 8-bit x see `layer_norm`."""
    attrs = {"groups": groups, "epsilon": epsilon, "x_scale": x_scale, "x_zero_point": x_zero_point}
    args = [x, gamma, beta, *operands]
    return _call("group_norm", args, attrs, epilogue, out_shape=out_shape, out_dtype=out_dtype)


def softmax(
    x: Expr,
    operands: Sequence[Expr],
    epilogue: Epilogue,
    *,
    x_scale: float = 1.0,
    x_zero_point: int = 0,
    out_shape: Sequence[int],
    out_dtype: str,
) -> Any:
    """`tvmq.softmax` over the last axis of x, as `functions.softmax` computes it; of 8-bit x see `layer_norm`."""
    attrs = {"x_scale": x_scale, "x_zero_point": x_zero_point}
    return _call("softmax", [x, *operands], attrs, epilogue, out_shape=out_shape, out_dtype=out_dtype)


def attention(
    query: Expr,
    key: Expr,
    value: Expr,
    epilogue: Epilogue = (),
    *,
    scale: float,
    zero_points: Sequence[int] = (0, 0, 0),
    out_shape: Sequence[int],
    out_dtype: str = "float32",
) -> Any:
    """`tvmq.attention`: softmax(query @ key^T * scale) @ value for each head, computed in float32.

    On bfloat16, the powers of the softmax are rounded to it before they multiply values; their sum is of those before.
    On 8-bit integers with `zero_points` it is what `quantize.attention` says, in units of the scale of values. The
    epilogue has no tensor operands.
    """
    attrs = {"scale": scale, "zero_points": [int(zero) for zero in zero_points]}
    return _call("attention", [query, key, value], attrs, epilogue, out_shape=out_shape, out_dtype=out_dtype)


def batch_matmul(
    x: Expr,
    y: Expr,
    operands: Sequence[Expr] = (),
    epilogue: Epilogue = (),
    *,
    transposed: bool,
    x_zero_point: int = 0,
    y_zero_point: int = 0,
    out_shape: Sequence[int],
    out_dtype: str = "float32",
) -> Any:
    """`tvmq.batch_matmul`: the product of two activations, both float32 or both 8-bit; transposed: y is [..., N, K].

    Leading axes are equal, or those of one operand are all of extent 1. The epilogue has scales of rows and columns,
    and steps without operands. Of integers K is `numerics.MOST_DEPTH` at most.
    """
    attrs = {"transposed": bool(transposed), "x_zero_point": x_zero_point, "y_zero_point": y_zero_point}
    args = [x, y, *operands]
    return _call("batch_matmul", args, attrs, epilogue, out_shape=out_shape, out_dtype=out_dtype)


def concat(
    tensors: Sequence[Expr], epilogues: Sequence[Epilogue], *, axis: int, out_shape: Sequence[int], out_dtype: str
) -> Any:
    """`tvmq.concat`: each tensor through its own epilogue (without tensor operands), joined along `axis`."""
    attrs = {"axis": axis, "epilogues": [encode(epilogue) for epilogue in epilogues]}
    return _call("concat", list(tensors), attrs, (), out_shape=out_shape, out_dtype=out_dtype)


def _call(
    name: str, args: list[Expr], attrs: dict[str, Any], epilogue: Epilogue, *, out_shape: Sequence[int], out_dtype: str
) -> Any:
    plain = {**attrs, "epilogue": encode(epilogue), "out_shape": [int(n) for n in out_shape], "out_dtype": out_dtype}
    return call(PREFIX + name, args, plain)
