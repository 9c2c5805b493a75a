"""What a source quantized between operators of one kernel: pairs of a quantize and its dequantize that round a value.

    quantize(add(dequantize(quantize(conv2d(x, w), s, z), s, z), y))  ->  one chain of conv2d: rounded, a tensor added

tvmq's own quantizer never writes such a pair: it asks where chains end first.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm

from tvmq import ir

Values = Mapping[Any, Any]
Readers = Mapping[Any, list[Any]]

# The axis of a weight that holds its output channels.
CHANNEL_AXIS = {"conv2d": 0, "matmul": 1}
# Operators that move elements, whatever these are.
_MOVES = ("reshape", "permute_dims", "squeeze", "expand_dims", "flatten", "strided_slice", "take", "flip")
# Operators that have a form, or are part of a kernel, that reads integers.
_READ_INTEGERS = (
    *("nn.conv2d", "matmul", "nn.avg_pool2d", "nn.adaptive_avg_pool2d", "mean", "sum", "nn.layer_norm", "nn.softmax"),
    "nn.group_norm",
    *(
        "add",
        "subtract",
        "multiply",
        "nn.relu",
        "nn.leakyrelu",
        "clip",
        "nn.gelu",
        "nn.gelu_tanh",
        "nn.silu",
        "sigmoid",
        "tanh",
    ),
    *("nn.max_pool2d", "image.resize2d", "nn.pad", "concat", "quantize", "tvmq.attention"),
)


@dataclass(frozen=True)
class Rounded:
    """To integers of `dtype` and back: `dequantize(quantize(v, scale, zero_point), scale, zero_point)`."""

    scale: float
    zero_point: int
    dtype: str


def find(running: Any, values: Values, readers: Readers) -> tuple[list[Any], Rounded] | None:
    """The quantize of `running` and its dequantize, of one scale, which alone read what is before them; else None."""
    quantized = ir.only_reader(readers, running)
    dequantized = ir.only_reader(readers, quantized)
    first: Any = values.get(quantized)
    second: Any = values.get(dequantized)
    if not ir.is_call(first, "quantize") or not ir.is_call(second, "dequantize") or not alike(first, second):
        return None
    scale, zero_point = (ir.to_numpy(arg) for arg in first.args[1:])
    if scale.size != 1 or ir.dtype_of(second) != "float32":
        return None
    return [quantized, dequantized], Rounded(float(scale.item()), int(zero_point.item()), ir.dtype_of(first))


def alike(call: Any, other: Any) -> bool:
    """Whether two calls of quantize or dequantize have the same scale and zero point, and the same integers."""
    of_integers = {ir.dtype_of(one if ir.is_call(one, "quantize") else one.args[0]) for one in (call, other)}
    parts = zip(call.args[1:3], other.args[1:3], strict=True)
    constant = all(ir.is_constant(arg) for one in (call, other) for arg in one.args[1:3])
    return constant and len(of_integers) == 1 and all(np.array_equal(ir.to_numpy(a), ir.to_numpy(b)) for a, b in parts)


def is_quantized_again(var: Any, values: Values, readers: Readers) -> bool:
    """Whether the one reader of `var` is a quantize."""
    return ir.is_call(values.get(ir.only_reader(readers, var)), "quantize")


def gives_floats(var: Any, values: Values, readers: Readers, dropped: Container[Any] = ()) -> bool:
    """Whether no reader of the dequantized `var` has a use for integers: then it is better stored as floats.

    dropped: variables that are dequantized, but need not be.
    """
    for reader in readers.get(var, []):
        call: Any = values.get(reader)
        if ir.is_call(call, "quantize") and all(other in dropped for other in readers.get(reader, [None])):
            continue
        if ir.is_call(call, *_READ_INTEGERS):
            return False
        if ir.is_call(call, *_MOVES) and not gives_floats(reader, values, readers, dropped):
            return False
    return True


def without_repeats(module: tvm.IRModule) -> tvm.IRModule:
    """The module in which what moves between floats is quantized once.

    dequantize(quantize(reshape(dequantize(q, s, z)), s, z))  ->  reshape(dequantize(q, s, z))

    The same values: integers that are dequantized and quantized are the same. Where somebody computes on the integers,
    the pair stays.
    """
    values, readers = dict(ir.bindings(module)), ir.users(module)
    dropped: set[Any] = set()
    for var, call in reversed(list(ir.calls(module))):
        if _repeats(call, values) and gives_floats(var, values, readers, dropped):
            dropped.add(var)

    def visit(state: ir.Rewrite, _name: str, value: Any) -> Any:
        quantized: Any = state.value(value.args[0]) if state.current in dropped else None
        return None if quantized is None else quantized.args[0]

    return ir.rewrite(module, visit) if dropped else module


def _repeats(call: Any, values: Values) -> bool:
    """Whether a dequantize undoes a quantize of moved values that had its scale before."""
    again: Any = values.get(call.args[0]) if ir.is_call(call, "dequantize") else None
    if not ir.is_call(again, "quantize") or not alike(call, again):
        return False
    first: Any = values.get(again.args[0])
    if not ir.is_call(first, *_MOVES):
        return False
    while ir.is_call(first, *_MOVES):
        first = values.get(first.args[0])
    return ir.is_call(first, "dequantize") and alike(call, first)


def has_one_answer(kind: str, call: Any, values: Values) -> bool:
    """Whether an anchor sums integers, or in a fixed order: each machine would round other sums in its own way."""
    if kind not in (*CHANNEL_AXIS, "avg_pool2d"):
        return True
    x: Any = values.get(call.args[0])
    if not ir.is_call(x, "dequantize") or not ir.is_call(values.get(x.args[0]), "quantize"):
        return False
    if kind == "avg_pool2d":
        return True
    weight = values.get(call.args[1])
    return ir.is_call(weight, "dequantize") and is_symmetric(weight, CHANNEL_AXIS[kind])


def is_symmetric(weight: Any, axis: int) -> bool:
    """Whether a dequantize is of constant int8 without zero points, with one scale or one an element of `axis`."""
    if not all(ir.is_constant(arg) for arg in weight.args) or ir.dtype_of(weight.args[0]) != "int8":
        return False
    scales, zero_points = (ir.to_numpy(arg) for arg in weight.args[1:3])
    along = scales.size == 1 or int(weight.attrs.axis) % len(ir.shape_of(weight)) == axis
    return bool(along and not zero_points.any())
