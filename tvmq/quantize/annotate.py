"""Inserts QDQ: explicit quantize and dequantize pairs that say what becomes integer, and roundings to 16 bits.

    y = conv2d(x, w)   ->   q = quantize(x, s, z);  d = dequantize(q, s, z);  y = conv2d(d, dequantize(w_q, s_w, 0))
    y = conv2d(x, w)   ->   h = astype(x, bfloat16);  d = astype(h, float32);  y = conv2d(d, astype(w_h, float32))

What a layer with int16 activations reads has a pair of int16, behind the kernel that makes it or before the layer. A
linear layer with dynamic precision reads rows that are quantized and dequantized (one pair for all layers that read the
tensor); a layer with weight-only precision reads its input as it is, and a weight that is dequantized by groups. What
becomes of products of two activations, products.py tells.

The result is a float program: run as it is, it simulates quantization. It depends on the recipe and the table, not on
the target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvmq import ir
from tvmq.graph import fusion
from tvmq.graph.fusion import AddBias, Chain
from tvmq.graph.pairs import CHANNEL_AXIS
from tvmq.graph.products import has_attention_kernel
from tvmq.quantize import numerics, products, weights
from tvmq.quantize.coded import coded
from tvmq.quantize.kept import as_product
from tvmq.quantize.plan import Plan
from tvmq.quantize.products import Pairs
from tvmq.quantize.weights import Chosen
from tvmq.recipe import Recipe
from tvmq.recipe_values import Precision

Array = npt.NDArray[Any]
Pair = Callable[[ir.Rewrite, Any, Any], Any]


def annotate(
    module: tvm.IRModule,
    plan: Plan,
    recipe: Recipe,
    seen: Mapping[str, Array] | None = None,
    chosen: Chosen | None = None,
) -> tvm.IRModule:
    """The module with a QDQ pair on each planned tensor and each planned constant weight.

    seen: by an anchor's name, what GPTQ wants to know of its inputs. chosen: weights that others have asked for before.
    """
    seen, chosen = seen or {}, chosen or Chosen()
    twins: dict[Any, Any] = {}  # old variable -> its dequantized twin
    wide: dict[Any, Any] = {}  # old variable -> its twin that went through int16
    pairs = Pairs()
    rounded: dict[Any, Any] = {}  # old variable -> its twin that went through 16 bits
    integer = _readers(plan, plan.integer, plan.qparams.keys())
    narrow = _readers(plan, plan.narrow, plan.stored)
    chained = {member for chain in plan.chains for member in chain.members}
    weighted = {chain.anchor: chain for chain in plan.chains if chain.kind in CHANNEL_AXIS}
    reads_wide = {chain.anchor: {chain.x} for chain in plan.chains if chain.anchor in plan.wide_layers}

    def pair(state: ir.Rewrite, old: Any, new: Any) -> Any:
        if old not in twins:
            twins[old] = pairs.by_tensor(state, str(old.name), new, plan.qparams[old])
        return twins[old]

    def wide_pair(state: ir.Rewrite, old: Any, new: Any) -> Any:
        if old not in wide:
            wide[old] = pairs.by_wide_tensor(state, str(old.name), new, plan.wide[old])
        return wide[old]

    def through_half(state: ir.Rewrite, old: Any, new: Any) -> Any:
        if old not in rounded:
            half = state.emit(relax.op.astype(new, plan.half), f"{old.name}_{plan.half.replace('float', 'f')}")
            rounded[old] = state.emit(relax.op.astype(half, "float32"), f"{old.name}_f32")
        return rounded[old]

    def visit(state: ir.Rewrite, name: str, value: Any) -> Any:
        old = state.current
        new = value
        if old in integer and ir.is_call(value):
            read = value if old in chained else as_product(value)
            new = ir.substitute(read, _twins(state, read, integer[old] - plan.produced, pair))
        elif old in narrow and ir.is_call(value):
            new = ir.substitute(value, _twins(state, value, narrow[old] - plan.narrow, through_half))
        if old in reads_wide:
            new = ir.substitute(new, _twins(state, new, reads_wide[old] - plan.made_wide, wide_pair))
        chain = weighted.get(old)
        if chain is not None and chain.end in plan.integer:
            weight = _static(chain, ir.to_numpy(new.args[1]), plan, recipe, seen, chosen)
            new = relax.Call(new.op, [new.args[0], state.emit(weight, f"{name}_weight")], new.attrs)
        elif chain is not None and chain.end in plan.narrow:
            weight = relax.op.astype(ir.constant(numerics.to_half(ir.to_numpy(new.args[1]), plan.half)), "float32")
            new = relax.Call(new.op, [new.args[0], state.emit(weight, f"{name}_weight")], new.attrs)
        elif old in plan.float_ends:
            layer = plan.recipes.get(old, recipe)
            new = _linear(state, name, new, plan.float_ends[old], layer, pairs, seen.get(str(old.name)))
        elif old in plan.embeddings:
            new = _embedding(state, name, new)
        elif old in plan.products:
            new = _product(state, name, value, new, plan, pairs)
        if old in plan.made_wide:
            return wide_pair(state, old, state.emit(new, name))
        if old in plan.produced:
            return pair(state, old, state.emit(new, name))
        if old in plan.narrow and old in plan.stored:
            return through_half(state, old, state.emit(new, name))
        return new if new is not value else None

    return ir.rewrite(module, visit)


def _readers(plan: Plan, computed: AbstractSet[Any], stored: AbstractSet[Any]) -> dict[Any, AbstractSet[Any]]:
    """Variables in `computed` (chain members included) -> the tensors of `stored` that they read as such."""
    readers: dict[Any, AbstractSet[Any]] = {}
    for chain in plan.chains:
        if chain.end in computed:
            # A float tensor that is only added or mapped stays float, even where somebody else reads it stored.
            pulled = {chain.x} if chain.kind in CHANNEL_AXIS and chain.anchor not in plan.wide_layers else set()
            kept = {x for x in chain.activations if x in computed and not (x in plan.wide and reads_int16(chain, x))}
            read = {x for x in (*kept, *pulled) if x in stored}
            readers.update(dict.fromkeys(chain.members, read))
    for var in computed:
        readers.setdefault(var, stored)
    return readers


def reads_int16(chain: Chain, x: Any) -> bool:
    """Whether the kernel of `chain` can read its activation `x` as int16."""
    return not x.same_as(chain.x) or chain.kind in (*CHANNEL_AXIS, *fusion.BINARY, "unary")


def _twins(state: ir.Rewrite, value: Any, tensors: AbstractSet[Any], pair: Pair) -> dict[Any, Any]:
    """The operands of `value` that stand for `tensors` (made by float operators), and their dequantized twins."""
    origins = {operand: state.old_of.get(operand, operand) for operand in ir.operands(value)}
    return {operand: pair(state, old, operand) for operand, old in origins.items() if old in tensors}


def _static(chain: Chain, weight: Array, plan: Plan, recipe: Recipe, seen: Mapping[str, Array], chosen: Chosen) -> Any:
    """The weight of an integer layer."""
    floor = 0.0 if chain.anchor in plan.wide_layers else weight_floor(chain, plan.qparams[chain.x].scale)
    name, axis, layer = str(chain.anchor.name), CHANNEL_AXIS[chain.kind], plan.recipes.get(chain.anchor, recipe)
    return _dequantized(*chosen.choose(name, weight, axis, layer, floor=floor, products=seen.get(name)), axis)


def _linear(
    state: ir.Rewrite,
    name: str,
    call: Any,
    precision: Precision,
    recipe: Recipe,
    pairs: Pairs,
    seen: Array | None,
) -> Any:
    """The layer `call` with dynamic or weight-only precision; `pairs` keeps the twins of what it reads."""
    x, weight = call.args[0], ir.to_numpy(call.args[1])
    if precision is Precision.INT8_DYNAMIC:
        twin = _dequantized(*weights.choose(weight, 1, recipe, products=seen), 1)
        x = pairs.by_row(state, x)
    else:
        twin = coded(weight, precision, recipe, seen)
    return relax.Call(call.op, [x, state.emit(twin, f"{name}_weight")], call.attrs)


def _embedding(state: ir.Rewrite, name: str, call: Any) -> Any:
    """The lookup `call` in a table of int8 with a scale a row."""
    table = ir.to_numpy(call.args[0])
    scales = numerics.weight_scales(table, 0)
    parts = (numerics.quantize_weight(table, scales, 0), scales, np.zeros(scales.shape, np.int8))
    twin = relax.op.dequantize(*(ir.constant(part) for part in parts), axis=0)
    return relax.Call(call.op, [state.emit(twin, f"{name}_table"), call.args[1]], call.attrs)


def _product(state: ir.Rewrite, name: str, value: Any, call: Any, plan: Plan, pairs: Pairs) -> Any:
    """The product of activations `call`, whose operands have their pairs; `value` is what it was without."""
    static = plan.products[state.current] is Precision.INT8
    if has_attention_kernel(value):
        return products.attention(call) if static else products.written_out(state, name, call, pairs)
    origins = [state.old_of.get(operand, operand) for operand in value.args]
    return products.matmul(state, call, [plan.qparams.get(x) if static else None for x in origins], pairs)


def weight_floor(chain: Chain, x_scale: float) -> Array:
    """What the scales of a chain's weight may not fall below, so that its bias can be expressed in them."""
    bias = chain.followers[0].value if chain.followers and isinstance(chain.followers[0], AddBias) else np.zeros(1)
    return numerics.bias_floor(bias, x_scale)


def _dequantized(quantized: Array, scales: Array, axis: int) -> Any:
    """dequantize(int8 weight, scales, 0)."""
    zero_points = np.zeros(scales.shape, np.int8)
    return relax.op.dequantize(ir.constant(quantized), ir.constant(scales), ir.constant(zero_points), axis=axis)
