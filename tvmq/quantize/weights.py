"""The int8 form of a constant weight, as a recipe's algorithms choose it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq.quantize import numerics, rounding
from tvmq.recipe import Recipe
from tvmq.recipe_values import Algorithm, PowerOfTwo

Array = npt.NDArray[Any]


def choose(
    weight: Array, axis: int, recipe: Recipe, *, floor: Array | float = 0.0, products: Array | None = None
) -> tuple[Array, Array]:
    """(q int8 of the shape of `weight`, scales float32 [channels]); `axis` holds the output channels.

    floor: what no scale falls below, see `numerics.bias_floor`. products: of the layer's inputs [K, K], for GPTQ, K
    running through the other axes in order; None rounds without it.
    """
    power_of_two = recipe.power_of_two in (PowerOfTwo.WEIGHTS, PowerOfTwo.ALL)
    scales = numerics.weight_scales(weight, axis, floor, bits=recipe.weight_bits, power_of_two=power_of_two)
    top = 2 ** (recipe.weight_bits - 1) - 1
    matrix = np.moveaxis(weight, axis, -1).reshape(-1, weight.shape[axis])
    if Algorithm.CLIP_WEIGHTS in recipe.algorithms and not power_of_two:
        scales = np.maximum(rounding.clipped_scales(matrix, scales, -top, top), np.asarray(floor, np.float32))
    if not recipe.per_channel:
        scales = np.full_like(scales, scales.max())
    if Algorithm.GPTQ in recipe.algorithms and products is not None:
        return _unfolded(rounding.gptq(matrix, scales, products, -top, top), weight, axis), scales
    # By default of kernels alone: inputs of linear layers have little in common that errors could cancel over.
    kernels_only = Algorithm.AUTO in recipe.algorithms and axis == 0 and math.prod(weight.shape[1:-1]) > 1
    if Algorithm.SQUANT in recipe.algorithms or kernels_only:
        units = (matrix / scales).T
        # [O, taps, I] -> [O, I, taps]: a kernel is the taps of one input channel.
        inputs = weight.shape[-1] if axis == 0 else matrix.shape[0]
        kernels = np.moveaxis(units.reshape(len(units), -1, inputs), 1, 2)
        rounded = np.moveaxis(rounding.squant(kernels, -top, top), 2, 1).reshape(units.shape).T
        return _unfolded(rounded, weight, axis), scales
    return np.clip(numerics.quantize_weight(weight, scales, axis), -top, top), scales


def dequantized(q: Array, scales: Array, axis: int) -> Array:
    """`float32(q) * s`."""
    shape = [1] * q.ndim
    shape[axis] = -1
    return np.asarray(q.astype(np.float32) * scales.reshape(shape))


def _unfolded(matrix: Array, weight: Array, axis: int) -> Array:
    others = [extent for i, extent in enumerate(weight.shape) if i != axis]
    return np.ascontiguousarray(np.moveaxis(matrix.reshape(*others, -1), -1, axis))
