"""What a model's source quantized while it runs, or only in its weights, as tvmq's own linear layers.

    matmul((clip(round(x / s) + z) - z) * s, dequantize(w))        s, z from the extremes of x, or of its rows
      ->  matmul(dequantize_rows(quantize_rows(x)), dequantize(w))
    astype(matmul(astype(q) - z, w: int32), float32) * (s * s_w)   ->  the same, of dequantize(w: int8, s_w)

Each row gets a symmetric scale of its own, which the kernel that makes the row finds: at most 255 / 127 steps of the
source's, so that an element is at most one of the source's steps away from its value; where rows differ in size, much
closer. Weights of a source that has a zero point for them, so that they need 9 bits, are rounded in the same way. Other
widths than 8 bits, convolutions, scales that are not made from extremes alone, and weights that are no int8 constants
with a scale an output channel (or one) are left as the floats that they say. `weight_only` tells what becomes of
weights that floats are multiplied by; where they have groups, x stays float though the source quantizes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvmq import ir
from tvmq.importer import quantized
from tvmq.oracle import interpret
from tvmq.quantize import weight_only
from tvmq.quantize.products import through_rows

Array = npt.NDArray[Any]
_RANGES = ((-128, 127), (-127, 127), (0, 255))
# What the extremes of 8-bit integers are divided by, at half and at whole width.
_STEPS = (127.0, 127.5, 254.0, 255.0)
# What scales are made of, besides the extremes.
_OF_SCALES = (
    *("clip", "subtract", "divide", "multiply", "maximum", "minimum", "negative", "abs"),
    *("astype", "reshape", "expand_dims", "squeeze", "equal", "where", "full_like"),
)
_EXTREMES = ("min", "max")
_CONVOLUTIONS = ("nn.conv1d", "nn.conv2d", "nn.conv3d")


def with_own_rows(module: tvm.IRModule) -> tvm.IRModule:
    """The module with the linear layers that its source quantizes dynamically in the form that `realize` reads."""
    rows: dict[Any, Any] = {}

    def read(state: ir.Rewrite, x: Any, like: Any) -> Any:
        x = _in_shape(state, x, like)
        if x not in rows:
            rows[x] = through_rows(state, x)
        return rows[x]

    def visit(state: ir.Rewrite, name: str, value: Any) -> Any:
        if ir.is_call(value, "matmul") and ir.dtype_of(value) == "float32":
            return _linear(state, name, value, read)
        if ir.is_call(value, *_CONVOLUTIONS):
            return _float_convolution(state, value)
        if not ir.is_call(value, "multiply"):
            return None
        if (scaled := weight_only.with_columns(state, value)) is not None:
            return scaled
        found = _integer_product(state, value)
        if found is None:
            return None
        weight = relax.op.dequantize(*(ir.constant(part) for part in found.weight), axis=1)
        return relax.op.matmul(read(state, found.x, found.q), state.emit(weight, f"{name}_weight"))

    return ir.rewrite(module, visit)


def _linear(state: ir.Rewrite, name: str, call: Any, read: Callable[[ir.Rewrite, Any, Any], Any]) -> Any:
    """A linear layer of floats by its weight: rows of integers, or floats by groups; None where it stays as it is."""
    x = _dequantized(state, call.args[0])
    if x is not None and _is_weight(state.value(call.args[1])):
        return relax.Call(call.op, [read(state, x, call.args[0]), call.args[1]], call.attrs)
    whole = ir.is_call(state.value(call.args[1]), "dequantize")
    integers = ir.is_call(state.value(call.args[0]), "dequantize")
    # A weight of groups is multiplied by floats, also where its source rounds these.
    twin = None if integers and whole else weight_only.groups_of(state, call.args[1])
    if twin is None:
        return None
    x = call.args[0] if x is None else _in_shape(state, x, call.args[0])
    return relax.Call(call.op, [x, state.emit(twin, f"{name}_weight")], call.attrs)


def _float_convolution(state: ir.Rewrite, call: Any) -> Any:
    """A convolution of floats, or of what is quantized dynamically, by weights that are floats as well.

    conv2d(x, dequantize(w: constant)) -> conv2d(x, w'), where x is no tensor of static integers

    Of what is quantized dynamically x is what it was before, half of a step away.
    """
    x, weight = state.value(call.args[0]), state.value(call.args[1])
    if ir.is_call(x, "dequantize") or not quantized.is_weight(weight):
        return None
    constant, before = ir.constant(interpret.evaluate(weight, {})), _dequantized(state, call.args[0])
    operand = call.args[0] if before is None else _in_shape(state, before, call.args[0])
    return relax.Call(call.op, [operand, constant], call.attrs)


def _in_shape(state: ir.Rewrite, x: Any, like: Any) -> Any:
    """`x` in the shape of `like`, which has the same rows."""
    if ir.shape_of(x) == ir.shape_of(like):
        return x
    return state.emit(relax.op.reshape(x, list(ir.shape_of(like))), f"{state.names.get(x, x.name)}_rows")


def _is_weight(value: Any) -> bool:
    """Whether a value is an int8 constant [K, N], dequantized with a scale a column or one."""
    if not ir.is_call(value, "dequantize") or not all(ir.is_constant(arg) for arg in value.args):
        return False
    weight, scales, zeros = value.args
    if ir.dtype_of(weight) != "int8" or len(ir.shape_of(weight)) != 2 or ir.to_numpy(zeros).any():
        return False
    return ir.to_numpy(scales).size == 1 or int(value.attrs.axis) % 2 == 1


def _dequantized(state: ir.Rewrite, var: Any) -> Any:
    """The x behind `(q - z) * s` of an x that is quantized dynamically; None for anything else."""
    product = state.value(_plain(state, var))
    if not ir.is_call(product, "multiply"):
        return None
    for steps, scale in (product.args, product.args[::-1]):
        x = _quantized(state, steps)
        if x is not None and _is_scale(state, scale, x):
            return x
    return None


def _quantized(state: ir.Rewrite, var: Any) -> Any:
    """The x behind `q - z`, or `q`: x rounded to 8 bits with a scale of its own."""
    value: Any = state.value(_plain(state, var))
    if ir.is_call(value, "subtract"):
        value = state.value(_plain(state, value.args[0]))
    if not ir.is_call(value, "clip") or tuple(int(limit) for limit in ir.clip_limits(value)) not in _RANGES:
        return None
    steps: Any = state.value(value.args[0])
    if ir.is_call(steps, "add"):
        steps = state.value(steps.args[0])
    scaled: Any = state.value(steps.args[0]) if ir.is_call(steps, "round") else None
    if not ir.is_call(scaled, "multiply", "divide"):
        return None
    x = _plain(state, scaled.args[0])
    is_rows = isinstance(x, relax.Var) and ir.is_static(x) and ir.dtype_of(x) == "float32" and len(ir.shape_of(x)) > 1
    return x if is_rows and _is_scale(state, scaled.args[1], x) else None


def _plain(state: ir.Rewrite, var: Any) -> Any:
    """`var` before conversions, and reshapes that keep its rows."""
    while ir.is_call(value := state.value(var), "astype") or _keeps_rows(value):
        var = value.args[0]
    return var


def _keeps_rows(value: Any) -> bool:
    if not ir.is_call(value, "reshape") or not (ir.is_static(value) and ir.is_static(value.args[0])):
        return False
    before, after = ir.shape_of(value.args[0]), ir.shape_of(value)
    return len(before) > 1 and len(after) > 1 and before[-1] == after[-1]


def _is_scale(state: ir.Rewrite, var: Any, x: Any) -> bool:
    """Whether `var`, one number or one a row of x, is made of the extremes of x alone, for 8 bits."""
    shape = ir.shape_of(var)
    if math.prod(shape) != 1 and (shape[-1] != 1 or math.prod(shape) != math.prod(ir.shape_of(x)[:-1])):
        return False
    calls = list(_behind(state, var, x))
    divisors = [
        ir.to_numpy(call.args[1]) for call in calls if ir.is_call(call, "divide") and ir.is_constant(call.args[1])
    ]
    of_eight_bits = any(divisor.size == 1 and float(divisor.item()) in _STEPS for divisor in divisors)
    extremes = [call for call in calls if ir.is_call(call, *_EXTREMES)]
    return of_eight_bits and bool(extremes) and all(ir.is_call(call, *_OF_SCALES, *_EXTREMES) for call in calls)


def _behind(state: ir.Rewrite, var: Any, x: Any) -> Iterator[Any]:
    """The calls between x and `var`; what reaches back to another input is no call."""
    pending, seen = [var], {x}
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        value = state.value(current)
        yield value
        if isinstance(value, relax.Call):
            pending.extend(ir.operands(value))


@dataclass(frozen=True)
class _Product:
    """What a product of integers multiplies: x in the shape of q, and int8 [K, N], scales [N], zeros [N]."""

    x: Any
    q: Any
    weight: tuple[Array, Array, Array]


def _integer_product(state: ir.Rewrite, value: Any) -> _Product | None:
    """`astype(matmul(q - z, w)) * s * s_w` with the factors in any order; None for anything else."""
    factors = list(_factors(state, value))
    constants = [ir.to_numpy(factor) for factor in factors if ir.is_constant(factor)]
    variables = [factor for factor in factors if not ir.is_constant(factor)]
    products = [product for factor in variables if (product := _integer_matmul(state, state.value(factor))) is not None]
    if len(products) != 1 or len(variables) != 2:
        return None
    q, weight = products[0]
    x = _quantized(state, q)
    if x is None or not any(_is_scale(state, factor, x) for factor in variables):
        return None
    columns = weight.shape[1]
    if any(constant.size not in (1, columns) for constant in constants):
        return None
    weight, scale = _bytes(weight)
    for constant in constants:
        if constant.size > 1 and constant.shape[-1] != columns:
            return None
        scale = scale * constant.reshape(-1).astype(np.float32)
    return _Product(x, q, (weight, scale, np.zeros(columns, np.int8)))


def _bytes(weight: Array) -> tuple[Array, Array]:
    """Integers [K, N] as int8 and a scale a column, which is 1 unless a column has larger ones."""
    largest = np.abs(weight + 0.5).max(axis=0)
    scale = np.where(largest < 128, 1.0, np.abs(weight).max(axis=0) / 127.0).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale


def _factors(state: ir.Rewrite, value: Any) -> Iterator[Any]:
    """The factors of a tree of products, before conversions."""
    for arg in value.args:
        inner = state.value(arg)
        if ir.is_call(inner, "multiply"):
            yield from _factors(state, inner)
        else:
            yield arg if ir.is_constant(arg) else _plain(state, arg)


def _integer_matmul(state: ir.Rewrite, value: Any) -> tuple[Any, Array] | None:
    """What a product of integers [.., K] by a constant [K, N] multiplies; None for anything else.

    Also `matmul(q + n, w) - n * sum(w)`, with n the difference between int8 and uint8, which is the same.
    """
    if ir.is_call(value, "subtract") and ir.is_constant(value.args[1]):
        inner: Any = state.value(value.args[0])
        shifted: Any = state.value(_plain(state, inner.args[0])) if ir.is_call(inner, "matmul") else None
        found = _integer_matmul(state, inner)
        if found is None or not ir.is_call(shifted, "add") or not ir.is_constant(shifted.args[1]):
            return None
        undone = ir.to_numpy(shifted.args[1]) * found[1].sum(axis=0)
        return (shifted.args[0], found[1]) if np.array_equal(undone, ir.to_numpy(value.args[1]).reshape(-1)) else None
    whole = ir.is_call(value, "matmul") and ir.dtype_of(value) == "int32" and ir.is_constant(value.args[1])
    if not whole or len(ir.shape_of(value.args[1])) != 2:
        return None
    return value.args[0], ir.to_numpy(value.args[1])
