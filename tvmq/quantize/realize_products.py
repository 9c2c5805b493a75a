"""QDQ -> integer products of two activations: `tvmq.batch_matmul` and `tvmq.attention` for `realize`.

    matmul(dequantize(x), dequantize(y)) * c      ->  tvmq.batch_matmul(x, y; epilogue = multiply(s_x * s_y * c))
    matmul(dequantize_rows(q, s), dequantize(y))  ->  tvmq.batch_matmul(q, y, s; epilogue = multiply(s_y), row scale)
    tvmq.attention(dequantize(q, k, v))           ->  tvmq.attention(q, k, v; epilogue = multiply(s_v))

A product of floats becomes one too. One number that multiplies all of a product is a step of its kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tvmq import ir, op_calls, ops
from tvmq.graph.products import has_attention_kernel, has_batch_matmul_kernel
from tvmq.quantize import numerics, products
from tvmq.quantize.epilogues import Stored


@dataclass(frozen=True)
class Products:
    """What products are realized with: the old graph's values and readers, and what stands for its tensors.

    chained: the variables of fusion chains. source: the stored tensor behind an old variable; source_rows: the one
    whose rows it dequantizes.
    """

    values: Mapping[Any, Any]
    readers: Mapping[Any, list[Any]]
    chained: Container[Any]
    source: Callable[[Any], Stored | None]
    source_rows: Callable[[ir.Rewrite, Any], Stored | None]

    def of(self, state: ir.Rewrite, var: Any, out: Stored | None) -> Any:
        """The operator for an old variable, made as `out` or float32; None where it is no product of activations."""
        if self._is_product(var):
            return self._batch_matmul(state, self.values[var], 1.0, out)
        factor = self._factor(var)
        if factor is not None:
            return self._batch_matmul(state, self.values[self.values[var].args[0]], factor, out)
        call: Any = self.values.get(var)
        if ir.is_call(call, "tvmq.attention"):
            return self._integer_attention(state, call, out)
        return self._attention(state, call, out) if has_attention_kernel(call) else None

    def is_scaled(self, var: Any) -> bool:
        """Whether `var` is a product whose one reader multiplies it by a number, and so stands for it."""
        readers = self.readers.get(var, [])
        return len(readers) == 1 and self._is_product(var) and self._factor(readers[0]) is not None

    def _is_product(self, var: Any) -> bool:
        return var not in self.chained and has_batch_matmul_kernel(self.values.get(var))

    def _factor(self, var: Any) -> float | None:
        """The number that `var` multiplies a product by which nobody else reads; None where it is something else."""
        call: Any = self.values.get(var)
        if not ir.is_call(call, "multiply", "divide") or not ir.is_constant(call.args[1]):
            return None
        product, constant = call.args[0], ir.to_numpy(call.args[1])
        if (
            not self._is_product(product)
            or len(self.readers[product]) != 1
            or ir.shape_of(product) != ir.shape_of(call)
        ):
            return None
        if constant.size != 1 or constant.dtype != np.float32 or not constant.item():
            return None
        number = float(constant.item())
        return number if ir.is_call(call, "multiply") else float(numerics.reciprocal(number))

    def _batch_matmul(self, state: ir.Rewrite, call: Any, factor: float, out: Stored | None) -> Any:
        x, y = call.args
        transposed = products.swaps_last_two(self.values.get(y))
        if transposed:
            y = self.values[y].args[0]
        common: dict[str, Any] = {"out_shape": ir.shape_of(call), "out_dtype": "float32" if out is None else out.dtype}
        left, right = self._integers(state, x), self._integers(state, y)
        deep = ir.shape_of(x)[-1] > numerics.MOST_DEPTH
        # Scales of rows of y are those of columns where it is transposed only.
        if left is None or right is None or deep or (right.rows is not None and not transposed):
            x, y = (state.new_of.get(operand, operand) for operand in (x, y))
            return op_calls.batch_matmul(x, y, (), _float_steps(factor, out), transposed=transposed, **common)
        var = right.var
        if not transposed and (columns := products.columns_of(state, var)) is not None:
            var, transposed = columns, True
        steps, scales = _integer_steps(left, right, factor, out)
        common |= {"x_zero_point": left.zero_point, "y_zero_point": right.zero_point}
        return op_calls.batch_matmul(left.var, var, scales, steps, transposed=transposed, **common)

    def _integers(self, state: ir.Rewrite, var: Any) -> Stored | None:
        """The 8-bit tensor or rows behind an old variable."""
        stored = self.source(var) or self.source_rows(state, var)
        return stored if stored is not None and stored.is_integer and not stored.is_wide else None

    def _integer_attention(self, state: ir.Rewrite, call: Any, out: Stored | None) -> Any:
        """`tvmq.attention` for one of operands that were quantized; of floats where a simulation left no integers."""
        sources = [self._integers(state, arg) for arg in call.args]
        scale = ops.attributes(call)["scale"]
        common: dict[str, Any] = {"out_shape": ir.shape_of(call), "out_dtype": "float32" if out is None else out.dtype}
        quantized = [source for source in sources if source is not None]
        if len(quantized) < len(sources):
            query, key, value = (state.new_of.get(arg, arg) for arg in call.args)
            return op_calls.attention(query, key, value, _float_steps(1.0, out), scale=scale, **common)
        q, k, v = quantized
        steps, _ = _integer_steps(v, Stored(None, v.dtype), 1.0, out)
        common |= {"scale": float(np.float64(q.scale) * k.scale * scale)}
        return op_calls.attention(q.var, k.var, v.var, steps, zero_points=[x.zero_point for x in quantized], **common)

    def _attention(self, state: ir.Rewrite, call: Any, out: Stored | None) -> Any:
        """`tvmq.attention` for an old call: on 16 bits where all three operands are stored so."""
        if out is not None and out.is_integer:
            return None
        sources = [self.source(arg) for arg in call.args]
        args = [source.var for source in sources if source is not None and not source.is_integer]
        if len(args) < len(sources):
            args = [state.new_of.get(arg, arg) for arg in call.args]
        scale = products.attention_scale(call)
        out_dtype = out.dtype if out is not None else "float32"
        return op_calls.attention(*args, scale=scale, out_shape=ir.shape_of(call), out_dtype=out_dtype)


def _float_steps(factor: float, out: Stored | None) -> ops.Epilogue:
    steps: ops.Epilogue = () if factor == 1.0 else (ops.Multiply(factor),)
    if out is None or not out.is_integer:
        return steps
    return (*steps, ops.Multiply(float(numerics.reciprocal(out.scale))), out.to_integer())


def _integer_steps(x: Stored, y: Stored, factor: float, out: Stored | None) -> tuple[ops.Epilogue, list[Any]]:
    """int32 sums to values, in units of the output's scale; and the scales of rows and columns."""
    quantized = out if out is not None and out.is_integer else None
    unit = quantized.scale if quantized is not None else 1.0
    steps: list[ops.Step] = [ops.Multiply(float(np.float32(np.float64(x.scale) * y.scale * factor / unit)))]
    scales = []
    if x.rows is not None:
        steps.append(ops.RowScale())
        scales.append(x.rows)
    if y.rows is not None:
        steps.append(ops.ColumnScale())
        scales.append(y.rows)
    if quantized is not None:
        steps.append(quantized.to_integer())
    return tuple(steps), scales
