"""Weights of weight-only layers, as a recipe chooses them: integers, or places in a table, with scales of groups.

w [K, N]           ->  dequantize_groups(q, s), dequantize_asymmetric(q, s, z) or dequantize_places(q, s, table)
w [O, kh, kw, I]   ->  the same of its matrix [kh * kw * I, O], with rows of zeros up to whole groups
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq import ir, op_calls
from tvmq.quantize import groups, rounding, tables
from tvmq.recipe import Recipe
from tvmq.recipe_values import Algorithm, Precision, WeightLevels

Array = npt.NDArray[Any]
# Inputs that kernels decode together: a word of 4 bits, of pairs.
_STEP = 16


def coded(weight: Array, precision: Precision, recipe: Recipe, products: Array | None = None) -> Any:
    """The call that gives `weight` back, nearly: a linear layer's [K, N], or a convolution's [O, kh, kw, I].

    products: of the layer's inputs [K, K], for GPTQ; None rounds without it.
    """
    bits, group = 4 if precision is Precision.INT4_WEIGHT else 8, recipe.weight_group(precision)
    if weight.ndim > 2 and group is not None:
        group = min(group, -(-weight[0].size // _STEP) * _STEP)
    matrix = groups.matrix_of(weight, group)
    if products is not None:
        products = np.pad(products, (0, len(matrix) - len(products)))
    group = group or len(matrix)
    if recipe.weight_levels in tables.LOOKED_UP:
        return _places(matrix, group, recipe, products, weight.shape)
    if recipe.weight_levels is WeightLevels.ASYMMETRIC:
        return _asymmetric(matrix, bits, group, products, weight.shape)
    scales = groups.group_scales(matrix, bits, group)
    if Algorithm.CLIP_WEIGHTS in recipe.algorithms:
        scales = groups.clipped(matrix, scales, bits)
    if products is not None:
        quantized = rounding.gptq(matrix, groups.each(scales, matrix), products, *groups.RANGE[bits])
    else:
        stochastic = recipe.weight_levels is WeightLevels.STOCHASTIC
        quantized = groups.quantize_groups(matrix, scales, bits, stochastic=stochastic)
    return op_calls.dequantize_groups(ir.constant(quantized), ir.constant(scales), bits=bits, shape=weight.shape)


def _asymmetric(matrix: Array, bits: int, group: int, products: Array | None, shape: tuple[int, ...]) -> Any:
    scales, zero_points = groups.asymmetric_groups(matrix, bits, group)
    if products is not None:
        limits, zeros = groups.ASYMMETRIC_RANGE[bits], groups.each(zero_points, matrix)
        quantized = rounding.gptq(matrix, groups.each(scales, matrix), products, *limits, zero_points=zeros)
    else:
        quantized = groups.quantize_asymmetric(matrix, scales, zero_points, bits)
    parts = (ir.constant(part) for part in (quantized, scales, zero_points))
    return op_calls.dequantize_asymmetric(*parts, bits=bits, shape=shape)


def _places(matrix: Array, group: int, recipe: Recipe, products: Array | None, shape: tuple[int, ...]) -> Any:
    scales = tables.table_scales(matrix, recipe.weight_levels, group)
    depth = math.prod(shape[1:]) if len(shape) > 2 else None
    table = tables.table_of(matrix, scales, recipe.weight_levels, depth)
    if products is not None:
        limits = groups.RANGE[4]
        quantized = rounding.gptq(matrix, groups.each(scales, matrix), products, *limits, table=table[0])
    else:
        quantized = tables.quantize(matrix, scales, table)
    return op_calls.dequantize_places(*(ir.constant(part) for part in (quantized, scales, table)), shape=shape)
