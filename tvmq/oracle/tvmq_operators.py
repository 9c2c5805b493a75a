"""What tvmq's own operators compute, in NumPy: the oracle that kernels are held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq import functions, ir, ops
from tvmq.quantize import anchors, groups, numerics, resampling, tables, wide
from tvmq.quantize.attention import attention as integer_attention

Array = npt.NDArray[Any]
Value = Any  # an array, or a tuple of values


def _conv2d(call: Any, args: list[Array]) -> Value:
    geometry = _only(call, "strides", "padding", "dilation", "groups")
    if args[0].dtype == wide.DTYPE:
        product = wide.conv2d(args[0], args[1], **geometry)
    else:
        product = anchors.conv2d(args[0], args[1], **geometry, **_only(call, "x_zero_point"))
    return numerics.epilogue(product, args[2:], ops.epilogue_of(call))


def _matmul(call: Any, args: list[Array]) -> Value:
    if args[0].dtype == wide.DTYPE:
        product = wide.matmul(*args[:2])
    else:
        product = anchors.matmul(*args[:2], **_only(call, "x_zero_point"))
    return numerics.epilogue(product, args[2:], ops.epilogue_of(call))


def _dequantize_groups(call: Any, args: list[Array]) -> Array:
    return groups.weight_of(groups.dequantize_groups(*args), ir.shape_of(call))


def _grouped_matmul(call: Any, args: list[Array]) -> Value:
    product = anchors.matmul(args[0], groups.dequantize_groups(args[1], args[2]))
    return numerics.epilogue(product, args[3:], ops.epilogue_of(call))


def _dequantize_asymmetric(call: Any, args: list[Array]) -> Array:
    return groups.weight_of(groups.dequantize_asymmetric(*args), ir.shape_of(call))


def _asymmetric_matmul(call: Any, args: list[Array]) -> Value:
    product = anchors.matmul(args[0], groups.dequantize_asymmetric(*args[1:4]))
    return numerics.epilogue(product, args[4:], ops.epilogue_of(call))


def _embedding(_call: Any, args: list[Array]) -> Array:
    indices, table, scales = args
    rows = np.clip(indices, 0, len(table) - 1)
    return numerics.dequantize(table[rows], scales[rows][..., None], 0)


def _dequantize_places(call: Any, args: list[Array]) -> Array:
    return groups.weight_of(tables.dequantize(*args), ir.shape_of(call))


def _lookup_matmul(call: Any, args: list[Array]) -> Value:
    product = anchors.matmul(args[0], tables.dequantize(*args[1:4]))
    return numerics.epilogue(product, args[4:], ops.epilogue_of(call))


def _avg_pool2d(call: Any, args: list[Array]) -> Value:
    attrs = _only(call, "pool", "strides", "padding", "count_include_pad", "x_zero_point")
    read = numerics.epilogue(args[0], (), ops.read_steps(call))
    pooled = anchors.avg_pool2d(read, **attrs).reshape(ir.shape_of(call))
    return numerics.epilogue(pooled, args[1:], ops.epilogue_of(call))


def _max_pool2d(call: Any, args: list[Array]) -> Array:
    return anchors.max_pool2d(args[0], **_only(call, "pool", "strides", "padding", "dilation"))


def _adaptive_avg_pool2d(call: Any, args: list[Array]) -> Value:
    pooled = anchors.adaptive_avg_pool2d(args[0], ir.shape_of(call)[1:3], **_only(call, "x_zero_point"))
    return numerics.epilogue(pooled, args[1:], ops.epilogue_of(call))


def _resize2d(call: Any, args: list[Array]) -> Array:
    return resampling.bilinear(args[0], ir.shape_of(call)[1:3], ops.attributes(call)["mode"])


def _cubic2d(call: Any, args: list[Array]) -> Value:
    sizes = ir.shape_of(call)[1:3]
    resized = resampling.bicubic(args[0], sizes, **_only(call, "mode", "alpha", "x_zero_point"))
    return numerics.epilogue(resized, (), ops.epilogue_of(call))


def _map(call: Any, args: list[Array]) -> Value:
    result = numerics.epilogue(args[0], args[1:], ops.epilogue_of(call))
    # A bias has one element even where the tensor is a scalar.
    return result if ops.row_quantizer(call) else result.reshape(ir.shape_of(call))


def _concat(call: Any, args: list[Array]) -> Array:
    parts = [numerics.epilogue(x, (), steps) for x, steps in zip(args, ops.concat_epilogues(call), strict=True)]
    return np.concatenate(parts, axis=ops.attributes(call)["axis"])


def _layer_norm(call: Any, args: list[Array]) -> Value:
    x, gamma, beta = _float_rows(call, args[0]), *args[1:3]
    result = functions.layer_norm(x, gamma, beta, epsilon=ops.attributes(call)["epsilon"])
    return numerics.epilogue(result, args[3:], ops.epilogue_of(call))


def _group_norm(call: Any, args: list[Array]) -> Value:
    x, gamma, beta = _float_rows(call, args[0]), *args[1:3]
    result = functions.group_norm(x, gamma, beta, **_only(call, "groups", "epsilon"))
    return numerics.epilogue(result, args[3:], ops.epilogue_of(call))


def _softmax(call: Any, args: list[Array]) -> Value:
    return numerics.epilogue(functions.softmax(_float_rows(call, args[0])), args[1:], ops.epilogue_of(call))


def _float_rows(call: Any, x: Array) -> Array:
    """What a row-wise operator computes on: 8-bit x as the floats that it stands for."""
    a = ops.attributes(call)
    return x if x.dtype.kind == "f" else numerics.dequantize(x, a["x_scale"], a["x_zero_point"])


def _attention(call: Any, args: list[Array]) -> Value:
    if args[0].dtype.kind in "iu":
        result = integer_attention(*args, **_only(call, "scale", "zero_points"))
        return numerics.epilogue(result, (), ops.epilogue_of(call))
    query, key, value = (np.swapaxes(arg, 1, 2) for arg in args)
    scores, scale = np.matmul(query, np.swapaxes(key, 2, 3)), ops.attributes(call)["scale"]
    extreme = scores.max(axis=-1, keepdims=True) if scale >= 0 else scores.min(axis=-1, keepdims=True)
    powers = functions.decay(functions.NumPyMath(), scores, extreme, scale)
    # Keys one after the other, and a product with the reciprocal, as the kernels do it: in an int8 model, a last place
    # that differs here turns a rounding there.
    inverse = np.float32(1.0) / np.cumsum(powers, axis=-1, dtype=np.float32)[..., -1:]
    if ir.dtype_of(call.args[0]) == "bfloat16":
        # Powers are as precise as the values that they multiply; their sum is of those before.
        powers = numerics.widened(numerics.to_bfloat16(powers))
    result = np.swapaxes(np.matmul(powers, value) * inverse, 1, 2)
    return numerics.epilogue(np.ascontiguousarray(result), (), ops.epilogue_of(call))


def _batch_matmul(call: Any, args: list[Array]) -> Value:
    product = anchors.batch_matmul(*args[:2], **_only(call, "transposed", "x_zero_point", "y_zero_point"))
    return numerics.epilogue(product, args[2:], ops.epilogue_of(call))


def _only(call: Any, *names: str) -> dict[str, Any]:
    attrs = ops.attributes(call)
    return {name: attrs[name] for name in names}


# The value of a call of each operator, from its operands as float32 where they are floats.
RULES: dict[str, Callable[[Any, list[Any]], Value]] = {
    "conv2d": _conv2d,
    "matmul": _matmul,
    "dequantize_groups": _dequantize_groups,
    "grouped_matmul": _grouped_matmul,
    "dequantize_asymmetric": _dequantize_asymmetric,
    "asymmetric_matmul": _asymmetric_matmul,
    "embedding": _embedding,
    "dequantize_places": _dequantize_places,
    "lookup_matmul": _lookup_matmul,
    "avg_pool2d": _avg_pool2d,
    "max_pool2d": _max_pool2d,
    "adaptive_avg_pool2d": _adaptive_avg_pool2d,
    "resize2d": _resize2d,
    "cubic2d": _cubic2d,
    "map": _map,
    "concat": _concat,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "softmax": _softmax,
    "attention": _attention,
    "batch_matmul": _batch_matmul,
}
