"""Inserts QDQ: explicit quantize and dequantize pairs that say what becomes integer.

    y = conv2d(x, w)   ->   q = quantize(x, s, z);  d = dequantize(q, s, z);  y = conv2d(d, dequantize(w_q, s_w, 0))

The result is a float program: run as it is, it simulates quantization. It depends on the recipe and the table, not on
the target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvmq import ir
from tvmq.graph.fusion import AddBias, Chain
from tvmq.quantize import numerics
from tvmq.quantize.numerics import QParams
from tvmq.quantize.plan import Plan
from tvmq.recipe import Recipe

Array = npt.NDArray[Any]
Pair = Callable[[ir.Rewrite, Any, Any], Any]
# The axis of a weight that holds its output channels.
CHANNEL_AXIS = {"conv2d": 0, "matmul": 1}


def annotate(module: tvm.IRModule, plan: Plan, recipe: Recipe) -> tvm.IRModule:
    """The module with a QDQ pair on each planned tensor and each planned constant weight."""
    pairs: dict[Any, Any] = {}  # old variable -> its dequantized twin
    readers = _integer_readers(plan)
    weights = {chain.anchor: chain for chain in plan.chains if chain.end in plan.integer and chain.kind in CHANNEL_AXIS}

    def pair(state: ir.Rewrite, old: Any, new: Any) -> Any:
        if old not in pairs:
            params, name = plan.qparams[old], str(old.name)
            scale, zero_point = _constants(params)
            q = state.emit(relax.op.quantize(new, scale, zero_point, axis=-1, out_dtype="int8"), f"{name}_q")
            pairs[old] = state.emit(relax.op.dequantize(q, scale, zero_point, axis=-1), f"{name}_dq")
        return pairs[old]

    def visit(state: ir.Rewrite, name: str, value: Any) -> Any:
        old = state.current
        new = value
        if old in readers and ir.is_call(value):
            new = ir.substitute(value, _twins(state, value, readers[old] - plan.produced, pair))
        if old in weights:
            chain = weights[old]
            weight = _weight(new.args[1], chain, plan.qparams[chain.x].scale, recipe.per_channel)
            new = relax.Call(new.op, [new.args[0], state.emit(weight, f"{name}_weight")], new.attrs)
        if old in plan.produced:
            return pair(state, old, state.emit(new, name))
        return new if new is not value else None

    return ir.rewrite(module, visit)


def _integer_readers(plan: Plan) -> dict[Any, set[Any]]:
    """Variables computed in integers (chain members included) -> the quantized tensors that they read."""
    readers: dict[Any, set[Any]] = {}
    for chain in plan.chains:
        if chain.end in plan.integer:
            for member in chain.members:
                # A float tensor that is added stays float, even where somebody else reads it quantized.
                added = [x for x in chain.activations[1:] if x in plan.integer]
                readers[member] = {x for x in (chain.x, *added) if x in plan.qparams}
    for var in plan.integer:
        readers.setdefault(var, set(plan.qparams))
    return readers


def _twins(state: ir.Rewrite, value: Any, tensors: set[Any], pair: Pair) -> dict[Any, Any]:
    """The operands of `value` that stand for `tensors` (made by float operators), and their dequantized twins."""
    origins = {operand: state.old_of.get(operand, operand) for operand in ir.operands(value)}
    return {operand: pair(state, old, operand) for operand, old in origins.items() if old in tensors}


def _weight(constant: Any, chain: Chain, x_scale: float, per_channel: bool) -> Any:
    """dequantize(int8 weight, scales, 0), with scales that the chain's bias can be expressed in."""
    weight, axis = ir.to_numpy(constant), CHANNEL_AXIS[chain.kind]
    bias = chain.followers[0].value if chain.followers and isinstance(chain.followers[0], AddBias) else np.zeros(1)
    scales = numerics.weight_scales(weight, axis, numerics.bias_floor(bias, x_scale))
    if not per_channel:
        scales = np.full_like(scales, scales.max())
    quantized = numerics.quantize_weight(weight, scales, axis)
    zero_points = np.zeros(scales.shape, np.int8)
    return relax.op.dequantize(ir.constant(quantized), ir.constant(scales), ir.constant(zero_points), axis=axis)


def _constants(params: QParams) -> tuple[Any, Any]:
    return relax.const(params.scale, "float32"), relax.const(params.zero_point, "int8")
