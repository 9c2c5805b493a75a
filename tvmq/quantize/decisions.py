"""What was decided for each operator: its kind, its precision, and why; also of models that nothing is planned for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tvm

from tvmq import ir, ops
from tvmq.graph.fusion import Chain, find_chains
from tvmq.graph.products import has_batch_matmul_kernel, has_embedding_kernel
from tvmq.quantize import tables
from tvmq.recipe import Recipe
from tvmq.recipe_values import WEIGHT_ONLY, Precision, WeightLevels


@dataclass(frozen=True)
class Decision:
    """What was decided for one operator: the variable of its result, its kind, its precision, and why."""

    name: str
    kind: str
    precision: Precision
    reason: str


def kind_of(call: Any) -> str:
    """The kind of an operator that is no chain."""
    if has_embedding_kernel(call):
        return "embedding"
    return "batch_matmul" if has_batch_matmul_kernel(call) else ir.op_name(call)


def source_decisions(module: tvm.IRModule) -> tuple[Decision, ...]:
    """The decisions for a module that its source quantized: what reads or makes quantized tensors only is integer."""
    chains = {chain.end: chain for chain in find_chains(module)}
    inside = {member for chain in chains.values() for member in chain.members[:-1]}
    values = dict(ir.bindings(module))
    found = []
    for var, call in ir.calls(module):
        chain = chains.get(var)
        if var in inside or (chain is None and ir.is_call(call, "quantize", "dequantize", "tvmq.dequantize_groups")):
            continue
        tensors = chain.activations if chain else list(ir.operands(call))
        if ops.is_row_quantizer(call) or ops.is_row_dequantizer(call):
            continue
        precision = Precision.FP32
        if chain is not None and ops.is_row_dequantizer(values.get(chain.x)):
            precision = Precision.INT8_DYNAMIC
        elif chain is not None and ir.is_call(weight := values.get(chain.call.args[-1]), "tvmq.dequantize_groups"):
            precision = Precision.INT4_WEIGHT if ops.attributes(weight)["bits"] == 4 else Precision.INT8_WEIGHT
        elif tensors and all(ir.is_call(values.get(tensor), "dequantize") for tensor in tensors):
            precision = Precision.INT8
        reason = "its source reads floats here" if precision is Precision.FP32 else "quantized by its source"
        found.append(Decision(str(var.name), chain.kind if chain else kind_of(call), precision, reason))
    return tuple(found)


def float_decisions(
    module: tvm.IRModule, reason: str, recipe: Recipe, recipes: Mapping[Any, Recipe]
) -> tuple[Decision, ...]:
    """The decisions for a module that stays float: one an operator that becomes a kernel.

    recipes: what rules make of `recipe` for the weights of anchors.
    """
    chains = {chain.end: chain for chain in find_chains(module)}
    inside = {member for chain in chains.values() for member in chain.members[:-1]}
    return tuple(
        Decision(
            str(var.name),
            chains[var].kind if var in chains else kind_of(call),
            Precision.FP32,
            with_levels(reason, chains.get(var), recipe, recipes),
        )
        for var, call in ir.calls(module)
        if var not in inside
    )


def with_levels(reason: str, chain: Chain | None, recipe: Recipe, recipes: Mapping[Any, Recipe]) -> str:
    """`reason`, and what becomes of the weights of a chain that stays float; None is an operator that is none."""
    if chain is None or chain.kind not in ("conv2d", "matmul"):
        return reason
    said = simulated_levels(recipes.get(chain.anchor, recipe))
    return f"{reason}; {said}" if said else reason


def not_coded(chain: Chain, precision: Precision, recipe: Recipe) -> str | None:
    """Why the weight of a layer with dynamic or weight-only precision stays float32; None where it does not."""
    shape, group = ir.shape_of(chain.call.args[1]), recipe.weight_group(precision)
    if precision is Precision.INT8_DYNAMIC:
        return None
    if chain.kind == "conv2d":
        return "its channels read one channel each: such few weights stay floats" if shape[3] == 1 else None
    if group is not None and shape[0] % group:
        return f"its {shape[0]} inputs are no multiple of the group size, {group}"
    return None


def coding_of(chain: Chain, precision: Precision, recipe: Recipe) -> str:
    """What `explain` says of a layer with dynamic or weight-only precision."""
    said = []
    if precision in WEIGHT_ONLY:
        if recipe.weight_levels in tables.LOOKED_UP:
            said.append(f"{recipe.weight_levels.value} levels, from a table")
        elif recipe.weight_levels is WeightLevels.ASYMMETRIC:
            said.append("asymmetric: groups have zero points")
        elif recipe.weight_levels is WeightLevels.STOCHASTIC:
            said.append("stochastic rounding")
        if chain.kind == "conv2d":
            said.append("weights become float32 once, when the bundle is loaded")
    return "; ".join(said)


def simulated_levels(recipe: Recipe) -> str | None:
    """What `explain` says of a layer whose weights are rounded, and stay floats; None where `recipe` rounds none."""
    if recipe.weight_levels is WeightLevels.NONE or recipe.precision is not Precision.FP32:
        return None
    group = "a channel" if recipe.group_size is None else f"groups of {recipe.group_size}"
    tabled = recipe.weight_levels in (WeightLevels.CODEBOOK, WeightLevels.VECTOR_CODEBOOK)
    scale = "one table a layer" if tabled else f"a scale for {group}"
    levels = f"{recipe.weight_levels.value} levels of {recipe.weight_bits} bits"
    return f"simulated: weights are rounded to {levels}, {scale}, and stored as floats"
