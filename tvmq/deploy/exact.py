"""Which operators have one right answer, bit for bit, on every machine; the rest are compared within a tolerance.

Exact: integer anchors with any epilogue, averages of what is rounded first, element-wise maps, row-wise functions in
their fixed order, and operators that only move or compare elements. Not exact: float convolutions, matmuls and
averages, whose sums take the order that a machine likes, and whatever arithmetic TVM legalizes.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from tvmq import ir, ops

# Operators of Relax whose results hold elements of their operands, or are found by comparing them.
_MOVES = [
    "reshape",
    "permute_dims",
    "squeeze",
    "expand_dims",
    "flatten",
    "strided_slice",
    "take",
    "concat",
    "split",
    "nn.pad",
    "nn.max_pool2d",
    "broadcast_to",
    "repeat",
    "tile",
    "flip",
    "gather_elements",
    "gather_nd",
    "where",
    "greater",
    "greater_equal",
    "less",
    "less_equal",
    "equal",
    "not_equal",
    "logical_and",
    "logical_or",
    "logical_not",
    "argmax",
    "argmin",
    "max",
    "min",
    "maximum",
    "minimum",
    "nn.relu",
    "clip",
    "full",
    "zeros",
    "ones",
    "full_like",
    "zeros_like",
    "ones_like",
    "arange",
    "tril",
    "triu",
    "negative",
    "abs",
    "floor",
    "ceil",
    "round",
    "sign",
    "topk",
    "sort",
    "argsort",
]
_NARROW = ("bfloat16", "float16", "int8", "uint8")
_OURS = (
    "tvmq.map",
    "tvmq.max_pool2d",
    "tvmq.resize2d",
    "tvmq.cubic2d",
    "tvmq.embedding",
    "tvmq.concat",
    "tvmq.layer_norm",
    "tvmq.group_norm",
    "tvmq.softmax",
)


def is_exact(call: Any) -> bool:
    """Whether the result of an operator call follows from its operands bit for bit."""
    if ir.is_call(call, "tvmq.conv2d", "tvmq.matmul"):
        return ir.dtype_of(call.args[1]) == "int8"
    if ir.is_call(call, "tvmq.avg_pool2d") and any(isinstance(step, ops.Round) for step in ops.read_steps(call)):
        return True
    if ir.is_call(call, "tvmq.avg_pool2d", "tvmq.adaptive_avg_pool2d", "tvmq.batch_matmul", "tvmq.attention"):
        return "float" not in ir.dtype_of(call.args[0])
    if ir.is_call(call, "astype"):
        return not ir.dtype_of(call).startswith(("float16", "bfloat16"))
    return ir.is_call(call, *_MOVES, *_OURS) or not any(_is_float(expr) for expr in (call, *call.args))


def _is_float(expr: Any) -> bool:
    return isinstance(expr.ty, relax.TensorType) and "float" in ir.dtype_of(expr)


def is_exact_graph(module: tvm.IRModule) -> bool:
    """Whether every output of a realized module follows from its inputs bit for bit."""
    return all(is_exact(call) for _, call in ir.calls(module))


def rounds_inexact(module: tvm.IRModule) -> bool:
    """Whether floats that may differ a little are rounded to 16 or 8 bits: later ones may differ by a step."""
    inexact: set[Any] = set()
    for var, value in ir.bindings(module):
        if (ir.is_call(value) and not is_exact(value)) or any(operand in inexact for operand in ir.operands(value)):
            inexact.add(var)
            if _rounds(value):
                return True
            parts = var.ty.fields if isinstance(var.ty, relax.TupleType) else [var.ty]
            if any(isinstance(part, relax.TensorType) and str(part.dtype) in _NARROW for part in parts):
                return True
    return False


def _rounds(value: Any) -> bool:
    """Whether an operator rounds to whole numbers on its way."""
    if not ir.is_call(value) or not ir.op_name(value).startswith(ops.PREFIX):
        return False
    return any(isinstance(step, ops.Round) for step in (*ops.read_steps(value), *ops.epilogue_of(value)))
