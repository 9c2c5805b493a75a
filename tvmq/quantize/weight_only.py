"""Weights that a model's source quantized, and multiplies floats by, as those of tvmq's weight-only linear layers.

    dequantize(w: int8 [K, N], s, 0)                               ->  dequantize_groups(w, s: bfloat16 [1, N])
    permute(reshape(dequantize(w: [N * G, K / G], s, 0), [N, K]))  ->  dequantize_groups(w', s': bfloat16 [G, N])
    matmul(x, dequantize_groups(w, 1)) * s                         ->  matmul(x, dequantize_groups(w, s))

Scales are rounded to bfloat16, which moves an element by at most a quarter of a step. Groups of other sizes than tvmq's
kernels have, and weights with zero points, become float constants: what the source says.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import relax

from tvmq import ir, op_calls, ops
from tvmq.oracle import interpret
from tvmq.quantize.groups import RANGE
from tvmq.quantize.numerics import to_bfloat16, widened
from tvmq.recipe_values import GROUP_SIZES

Array = npt.NDArray[Any]
_WORD = 8  # inputs of 4 bits in a word


def groups_of(state: ir.Rewrite, weight: Any) -> Any:
    """The twin of a dequantized weight [K, N] for a weight-only layer; None for what is no such weight."""
    value: Any = state.value(weight)
    if ir.is_call(value, "permute_dims") and len(ir.shape_of(value)) == 2:
        reshaped: Any = state.value(value.args[0])
        rows: Any = state.value(reshaped.args[0]) if ir.is_call(reshaped, "reshape") else None
        if not _is_dequantized(rows) or int(rows.attrs.axis) % 2 != 0:
            return None
        depth, columns = ir.shape_of(value)
        if ir.to_numpy(rows.args[0]).shape[0] % columns == 0:
            matrix = ir.to_numpy(rows.args[0]).reshape(columns, depth).T
            scales = ir.to_numpy(rows.args[1]).reshape(columns, -1).T
            if (found := _grouped(matrix, scales, ir.to_numpy(rows.args[2]))) is not None:
                return found
        floats = interpret.evaluate(relax.Call(rows.op, list(rows.args), rows.attrs), {})
        return ir.constant(np.ascontiguousarray(floats.reshape(columns, depth).T))
    if not _is_dequantized(value):
        return None
    scales = np.broadcast_to(ir.to_numpy(value.args[1]).reshape(1, -1), (1, ir.shape_of(value)[1]))
    return _grouped(ir.to_numpy(value.args[0]), scales, ir.to_numpy(value.args[2])) if _has_columns(value) else None


def with_columns(state: ir.Rewrite, product: Any) -> Any:
    """`matmul(x, weight with a scale of 1 a column) * s` with the scales in the weight; None for other products."""
    matmul, factor = state.value(product.args[0]), product.args[1]
    if not ir.is_call(matmul, "matmul") or not ir.is_constant(factor):
        return None
    weight: Any = state.value(matmul.args[1])
    if not ir.is_call(weight, "tvmq.dequantize_groups") or not (widened(ir.to_numpy(weight.args[1])) == 1).all():
        return None
    scales, shape = ir.to_numpy(factor), ir.shape_of(weight.args[1])
    if shape[0] != 1 or scales.size not in (1, shape[1]) or ir.shape_of(product) != ir.shape_of(matmul):
        return None
    if scales.size > 1 and scales.shape[-1] != shape[1]:
        return None
    columns = to_bfloat16(np.broadcast_to(scales.reshape(1, -1), shape))
    twin = op_calls.dequantize_groups(weight.args[0], ir.constant(columns), bits=ops.attributes(weight)["bits"])
    name = state.names[product.args[0]]
    return relax.Call(matmul.op, [matmul.args[0], state.emit(twin, f"{name}_weight")], matmul.attrs)


def _is_dequantized(value: Any) -> bool:
    matrix = ir.is_call(value, "dequantize") and len(ir.shape_of(value)) == 2
    return matrix and all(ir.is_constant(arg) for arg in value.args) and ir.dtype_of(value.args[0]) == "int8"


def _has_columns(value: Any) -> bool:
    return ir.to_numpy(value.args[1]).size == 1 or int(value.attrs.axis) % 2 == 1


def _grouped(weight: Array, scales: Array, zeros: Array) -> Any:
    """`dequantize_groups` of a weight [K, N] with scales [G, N]; None where the kernels have no such groups."""
    depth, count = weight.shape[0], scales.shape[0]
    group = depth // count
    low, high = int(weight.min()), int(weight.max())
    narrow = low >= RANGE[4][0] and high <= RANGE[4][1] and group in GROUP_SIZES and depth % _WORD == 0
    if zeros.any() or depth % count or (group not in GROUP_SIZES and count > 1):
        return None
    packed = ir.constant(np.ascontiguousarray(weight))
    return op_calls.dequantize_groups(packed, ir.constant(to_bfloat16(scales)), bits=4 if narrow else 8)
