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
    scales = _scales(weight, axis, recipe, floor)
    return _rounded(weight, axis, scales, recipe, products), scales


class Chosen:
    """Weights that were chosen for layers, of one recipe and one model: none is rounded twice with the same scales."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Array, Array]] = {}

    def choose(
        self, name: str, weight: Array, axis: int, recipe: Recipe, *, floor: Array | float, products: Array | None
    ) -> tuple[Array, Array]:
        """As `choose`, of the layer `name`."""
        scales = _scales(weight, axis, recipe, floor)
        # A bias that was corrected may have another floor.
        if name not in self._known or not np.array_equal(self._known[name][1], scales):
            self._known[name] = _rounded(weight, axis, scales, recipe, products), scales
        return self._known[name]


def _matrix(weight: Array, axis: int) -> Array:
    """[K, channels]."""
    return np.moveaxis(weight, axis, -1).reshape(-1, weight.shape[axis])


def _scales(weight: Array, axis: int, recipe: Recipe, floor: Array | float) -> Array:
    power_of_two = recipe.power_of_two in (PowerOfTwo.WEIGHTS, PowerOfTwo.ALL)
    scales = numerics.weight_scales(weight, axis, floor, bits=recipe.weight_bits, power_of_two=power_of_two)
    if Algorithm.CLIP_WEIGHTS in recipe.algorithms and not power_of_two:
        top = numerics.largest_integer(recipe.weight_bits)
        clipped = rounding.clipped_scales(_matrix(weight, axis), scales, -top, top)
        scales = np.maximum(clipped, np.asarray(floor, np.float32))
    return scales if recipe.per_channel else np.full_like(scales, scales.max())


def _rounded(weight: Array, axis: int, scales: Array, recipe: Recipe, products: Array | None) -> Array:
    """The integers, with these scales."""
    matrix, top = _matrix(weight, axis), numerics.largest_integer(recipe.weight_bits)
    if Algorithm.GPTQ in recipe.algorithms and products is not None:
        return _unfolded(rounding.gptq(matrix, scales, products, -top, top), weight, axis)
    # By default of kernels alone: inputs of linear layers have little in common that errors could cancel over.
    kernels_only = Algorithm.AUTO in recipe.algorithms and axis == 0 and math.prod(weight.shape[1:-1]) > 1
    if Algorithm.SQUANT in recipe.algorithms or kernels_only:
        units = (matrix / scales).T
        # [O, taps, I] -> [O, I, taps]: a kernel is the taps of one input channel.
        inputs = weight.shape[-1] if axis == 0 else matrix.shape[0]
        kernels = np.moveaxis(units.reshape(len(units), -1, inputs), 1, 2)
        rounded = np.moveaxis(rounding.squant(kernels, -top, top), 2, 1).reshape(units.shape).T
        return _unfolded(rounded, weight, axis)
    return np.clip(numerics.quantize_weight(weight, scales, axis), -top, top)


def dequantized(q: Array, scales: Array, axis: int) -> Array:
    """`float32(q) * s`."""
    shape = [1] * q.ndim
    shape[axis] = -1
    return np.asarray(q.astype(np.float32) * scales.reshape(shape))


def _unfolded(matrix: Array, weight: Array, axis: int) -> Array:
    others = [extent for i, extent in enumerate(weight.shape) if i != axis]
    return np.ascontiguousarray(np.moveaxis(matrix.reshape(*others, -1), -1, axis))
