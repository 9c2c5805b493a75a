"""What the source model quantized, in the form that `quantize.realize` reads: int8, weights as dequantized constants.

dequantize(quantize(x, s, z: uint8), s, z)  ->  dequantize(quantize(x, s, z - 128: int8), s, z - 128)
permute_dims(dequantize(w: constant, s, z)) ->  dequantize(w', s, z), w' the transposed constant
astype(w: constant int8 matrix, float32)    ->  dequantize(w, 1, 0)
reshape(quantize(x))                        ->  quantize(reshape(dequantize(quantize(x))))
quantize(clip(dequantize(quantize(x))))     ->  quantize(clip(x)), where scales are the same
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from tvmq import ir
from tvmq.graph.pairs import alike

_SHIFT = 128
# Operators whose results are elements of what they read.
_MOVES = ("reshape", "permute_dims", "squeeze", "expand_dims", "flatten", "strided_slice", "nn.max_pool2d")


def is_quantized(module: tvm.IRModule) -> bool:
    """Whether a module holds quantize or dequantize operators."""
    names = ("quantize", "dequantize", "tvmq.dequantize_groups")
    return any(ir.is_call(call, *names) for _, call in ir.calls(module))


def moved_as_floats(module: tvm.IRModule) -> tvm.IRModule:
    """What moves integers, as ONNX's QOperator form does, moves the floats that they stand for: the same integers.

    reshape(quantize(x, s, z))  ->  quantize(reshape(dequantize(quantize(x, s, z), s, z)), s, z)
    """

    def visit(state: ir.Rewrite, name: str, value: Any) -> Any:
        if not ir.is_call(value, *_MOVES) or ir.dtype_of(value) not in ("int8", "uint8"):
            return None
        first: Any = state.value(value.args[0])
        if not ir.is_call(first, "quantize") or ir.to_numpy(first.args[1]).size != 1:
            return None
        _, scale, zero = first.args
        floats = state.emit(relax.op.dequantize(value.args[0], scale, zero, axis=first.attrs.axis), f"{name}_floats")
        moved = state.emit(relax.Call(value.op, [floats, *value.args[1:]], value.attrs), f"{name}_moved")
        return relax.op.quantize(moved, scale, zero, axis=first.attrs.axis, out_dtype=first.attrs.out_dtype)

    return ir.rewrite(module, visit)


def signed(module: tvm.IRModule) -> tvm.IRModule:
    """uint8 tensors that are only dequantized become int8: the values that they stand for stay."""
    readers, values = ir.users(module), dict(ir.bindings(module))
    shifted: set[Any] = set()

    def visit(state: ir.Rewrite, _name: str, value: Any) -> Any:
        old = state.current
        if ir.is_call(value, "quantize") and str(value.attrs.out_dtype) == "uint8":
            if not all(reader is not None and ir.is_call(values[reader], "dequantize") for reader in readers[old]):
                return None
            shifted.add(old)
            x, scale, zero = value.args
            return relax.op.quantize(x, scale, _shifted(zero), axis=value.attrs.axis, out_dtype="int8")
        if ir.is_call(value, "dequantize") and values[old].args[0] in shifted:
            q, scale, zero = value.args
            return relax.op.dequantize(q, scale, _shifted(zero), axis=value.attrs.axis)
        return None

    return ir.rewrite(module, visit)


def limits_first(module: tvm.IRModule) -> tvm.IRModule:
    """A limit between two quantizes with one scale goes before the first, into the kernel that makes the tensor.

    quantize(clip(dequantize(quantize(x)))) -> quantize(clip(x)), where nobody else reads what is between.
    The same integers: rounding is monotonic, so that limits and rounded values keep their order.
    """
    readers = ir.users(module)

    def alone(state: ir.Rewrite, var: Any) -> Any:
        """The call behind a variable that has one reader, else None."""
        return state.value(var) if len(readers.get(state.old_of.get(var), ())) == 1 else None

    def visit(state: ir.Rewrite, name: str, value: Any) -> Any:
        if not ir.is_call(value, "quantize"):
            return None
        limit: Any = alone(state, value.args[0])
        wide: Any = alone(state, limit.args[0]) if ir.is_call(limit, "clip", "nn.relu") else None
        first: Any = alone(state, wide.args[0]) if ir.is_call(wide, "dequantize") else None
        if not ir.is_call(first, "quantize") or not alike(value, wide) or not alike(value, first):
            return None
        limited = state.emit(relax.Call(limit.op, [first.args[0], *limit.args[1:]], limit.attrs), f"{name}_limited")
        return relax.Call(value.op, [limited, *value.args[1:]], value.attrs)

    return ir.rewrite(module, visit)


def _shifted(zero: Any) -> Any:
    return ir.constant((ir.to_numpy(zero).astype(np.int32) - _SHIFT).astype(np.int8))


def is_weight(value: Any) -> bool:
    """Whether a call dequantizes a constant of two or more axes."""
    return (
        ir.is_call(value, "dequantize")
        and all(ir.is_constant(arg) for arg in value.args)
        and len(ir.shape_of(value.args[0])) > 1
    )


def transposed(call: Any, axes: list[int]) -> Any:
    """`permute_dims(call, axes)` of a dequantized constant, as another one."""
    weight, scales, zeros = call.args
    axis = int(call.attrs.axis) % len(axes)
    constant = ir.constant(ir.to_numpy(weight).transpose(axes))
    return relax.op.dequantize(constant, scales, zeros, axis=axes.index(axis))


def is_widened(value: Any) -> bool:
    """Whether a call converts an int8 constant matrix to float32."""
    return (
        ir.is_call(value, "astype")
        and ir.is_constant(value.args[0])
        and (ir.dtype_of(value.args[0]), ir.dtype_of(value)) == ("int8", "float32")
        and len(ir.shape_of(value)) == 2
    )


def dequantized(weight: Any) -> Any:
    """An int8 constant matrix as it is, dequantized with a scale of 1 a column."""
    columns = ir.shape_of(weight)[1]
    scales, zeros = ir.constant(np.ones(columns, np.float32)), ir.constant(np.zeros(columns, np.int8))
    return relax.op.dequantize(weight, scales, zeros, axis=1)
