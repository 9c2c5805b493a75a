"""Products of two activations with explicit pairs: what `annotate` makes of them.

    matmul(x, y)        ->  matmul(x', y')             each with one scale a tensor, or one a row of x, a column of y
    attention(q, k, v)  ->  tvmq.attention(q', k', v')                                    with one scale a tensor each
                        ->  softmax(matmul(q', k'^T) * scale)', times v'                        where rows have scales

A scale a row is found while running, by the kernel that makes the row. Softmax always gets those: its rows have no
range that calibration could know, since they sum to one, few large elements or many small ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tvm import relax

from tvmq import ir, op_calls
from tvmq.quantize import wide
from tvmq.quantize.numerics import QParams

# [N, S, heads, depth] <-> [N, heads, S, depth]
_HEADS = (0, 2, 1, 3)


@dataclass
class Pairs:
    """Makes pairs. `rows`: tensors -> their twins whose rows were quantized and dequantized, for all readers."""

    rows: dict[Any, Any] = field(default_factory=dict)

    def by_tensor(self, state: ir.Rewrite, name: str, x: Any, params: QParams) -> Any:
        """The twin of `x`, named after `name`, quantized with the scale of `params` and dequantized."""
        scale, zero_point = relax.const(params.scale, "float32"), relax.const(params.zero_point, "int8")
        if params.limits is not None:
            x = state.emit(relax.op.clip(x, *params.limits), f"{name}_limited")
        q = state.emit(relax.op.quantize(x, scale, zero_point, axis=-1, out_dtype="int8"), f"{name}_q")
        return state.emit(relax.op.dequantize(q, scale, zero_point, axis=-1), f"{name}_dq")

    def by_wide_tensor(self, state: ir.Rewrite, name: str, x: Any, scale: float) -> Any:
        """The twin of `x` that went through int16."""
        step, zero_point = relax.const(scale, "float32"), relax.const(0, "int8")
        q = state.emit(relax.op.quantize(x, step, zero_point, axis=-1, out_dtype=wide.DTYPE), f"{name}_q16")
        return state.emit(relax.op.dequantize(q, step, zero_point, axis=-1), f"{name}_dq16")

    def by_row(self, state: ir.Rewrite, x: Any) -> Any:
        """The twin of float32 x whose rows were quantized and dequantized."""
        if x not in self.rows:
            self.rows[x] = through_rows(state, x)
        return self.rows[x]

    def by_column(self, state: ir.Rewrite, y: Any) -> Any:
        """The twin of float32 y [..., K, N] whose columns were: the rows of its transpose."""
        name, source, axes = state.names.get(y) or str(y.name), state.value(y), _swapped(len(ir.shape_of(y)))
        if ir.is_call(source, "permute_dims"):
            before = _axes_of(source)
            y, axes = source.args[0], tuple(before[axis] for axis in axes)
        if axes != tuple(range(len(axes))):
            y = state.emit(relax.op.permute_dims(y, axes), f"{name}_columns")
        return state.emit(relax.op.permute_dims(self.by_row(state, y), _swapped(len(axes))), f"{name}_dq")


def matmul(state: ir.Rewrite, call: Any, params: Sequence[QParams | None], pairs: Pairs) -> Any:
    """The product `call`: an operand without parameters goes through rows or columns, the others have their pair."""
    x, y = call.args
    x = pairs.by_row(state, x) if params[0] is None else x
    y = pairs.by_column(state, y) if params[1] is None else y
    return relax.Call(call.op, [x, y], call.attrs)


def attention(call: Any) -> Any:
    """The attention `call`, whose operands have their pairs."""
    shape = (*ir.shape_of(call.args[0])[:3], ir.shape_of(call.args[2])[3])
    return op_calls.attention(*call.args, scale=attention_scale(call), out_shape=shape)


def written_out(state: ir.Rewrite, name: str, call: Any, pairs: Pairs) -> Any:
    """The attention `call` as two products, by rows and columns."""

    def emit(value: Any, part: str) -> Any:
        return state.emit(value, f"{name}_{part}")

    query, key, value = (emit(relax.op.permute_dims(x, _HEADS), part) for x, part in zip(call.args, "qkv", strict=True))
    turned = emit(relax.op.permute_dims(key, _swapped(4)), "kt")
    products = emit(matmul(state, relax.op.matmul(query, turned), (None, None), pairs), "products")
    scores = emit(relax.op.multiply(products, relax.const(attention_scale(call), "float32")), "scores")
    powers = emit(relax.op.nn.softmax(scores, -1), "powers")
    mixed = emit(matmul(state, relax.op.matmul(powers, value), (None, None), pairs), "mixed")
    return relax.op.permute_dims(mixed, _HEADS)


def attention_scale(call: Any) -> float:
    """What a relax.nn.attention multiplies its scores by."""
    depth = ir.shape_of(call.args[0])[3]
    return float(np.float32(depth**-0.5)) if call.attrs.scale is None else float(call.attrs.scale)


def depth_of(call: Any) -> int:
    """The most products that a sum of a matmul or attention has."""
    x, y = (ir.shape_of(arg) for arg in call.args[:2])
    return max(x[3], y[1]) if ir.is_call(call, "nn.attention") else x[-1]


def through_rows(state: ir.Rewrite, x: Any) -> Any:
    """The twin of float32 x whose rows were quantized and dequantized."""
    name = state.names.get(x) or str(x.name)
    results = state.emit(op_calls.quantize_rows(x), f"{name}_rows")
    parts = [state.emit(relax.TupleGetItem(results, i), f"{name}_{part}") for i, part in enumerate(("q", "scale"))]
    return state.emit(op_calls.dequantize_rows(*parts), f"{name}_dq")


def columns_of(state: ir.Rewrite, y: Any) -> Any:
    """What y [..., K, N] is the transpose of, where its columns lie in memory as they are; else None."""
    moved = state.value(y)
    if not ir.is_call(moved, "permute_dims") or (axes := _axes_of(moved))[-2] != len(axes) - 1:
        return None
    swapped = tuple(axes[axis] for axis in _swapped(len(axes)))
    if swapped == tuple(range(len(axes))):
        return moved.args[0]
    return state.emit(relax.op.permute_dims(moved.args[0], swapped), f"{state.names[y]}_columns")


def swaps_last_two(call: Any) -> bool:
    """Whether a value is a permute_dims that swaps the last two axes."""
    return ir.is_call(call, "permute_dims") and _axes_of(call) == _swapped(len(ir.shape_of(call)))


def _axes_of(call: Any) -> tuple[int, ...]:
    ndim = len(ir.shape_of(call))
    return tuple(range(ndim))[::-1] if call.attrs.axes is None else tuple(int(axis) % ndim for axis in call.attrs.axes)


def _swapped(ndim: int) -> tuple[int, ...]:
    return (*range(ndim - 2), ndim - 1, ndim - 2)
