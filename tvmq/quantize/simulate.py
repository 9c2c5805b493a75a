"""QDQ -> a float program that rounds to integers and back, for recipes that ask for a simulation.

    dequantize(quantize(x, s, z), s, z)  ->  tvmq.map(x; epilogue = multiply(1 / s), quantize(z), dequantize(s, z))
    dequantize(w_int8, s_w, 0)           ->  its float32 values

Requires explicit pairs, as `annotate` makes them. What is computed on integers otherwise is computed in float32.
"""

from __future__ import annotations

from typing import Any

import tvm

from tvmq import ir, op_calls, ops
from tvmq.oracle import interpret
from tvmq.quantize import numerics


def simulated(module: tvm.IRModule) -> tvm.IRModule:
    """The module without integer tensors between its operators."""

    def visit(state: ir.Rewrite, _name: str, value: Any) -> Any:
        if not ir.is_call(value, "dequantize"):
            return None
        if all(ir.is_constant(arg) for arg in value.args):
            return ir.constant(interpret.evaluate(value, {}))
        pair = state.value(value.args[0])
        if not ir.is_call(pair, "quantize"):
            return None
        scale, zero_point = float(ir.to_numpy(pair.args[1])), int(ir.to_numpy(pair.args[2]))
        dtype = ir.dtype_of(pair)
        steps = (
            ops.Multiply(float(numerics.reciprocal(scale))),
            ops.Quantize(zero_point, *numerics.INTEGERS[dtype], dtype),
            ops.Dequantize(scale, zero_point),
        )
        return op_calls.elementwise(pair.args[0], (), steps, out_shape=ir.shape_of(value), out_dtype="float32")

    return ir.rewrite(module, visit)
