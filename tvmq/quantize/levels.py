"""Weights rounded to few levels, in NumPy: named quantizers whose weights are multiplied, and stored, as floats.

    w [K, N]  ->  [K, N] float32, each group of rows and column (of codebooks: the whole weight) with 2**bits values

uniform      multiples of a scale, the largest magnitude at the end of the range
asymmetric   multiples of a scale from an offset: the range of each group
log2         zero and powers of two, with signs: D. Miyashita et al., "Convolutional Neural Networks using Logarithmic
             Data Representation", 2016
normal_float quantiles of a normal distribution: T. Dettmers et al., "QLoRA", NeurIPS 2023, appendix E
codebook     the means of clusters: S. Han et al., "Deep Compression", ICLR 2016, section 3
vector_codebook  the same of pairs of inputs, 2**bits pairs: Y. Gong et al., "Compressing Deep Convolutional Networks
             using Vector Quantization", 2014
stochastic   uniform, rounded up with the probability of the rest: S. Gupta et al., "Deep Learning with Limited
             Numerical Precision", ICML 2015
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvmq import ir
from tvmq.graph.pairs import CHANNEL_AXIS
from tvmq.quantize import rounding, tables
from tvmq.quantize.decisions import simulated_levels
from tvmq.quantize.input_products import input_products
from tvmq.quantize.plan import Plan
from tvmq.recipe import Recipe
from tvmq.recipe_values import Algorithm, WeightLevels

Array = npt.NDArray[Any]


def layers_with(plan: Plan, recipe: Recipe) -> dict[Any, Recipe]:
    """The anchors of a plan whose weights are rounded to levels and stay floats, and the recipes that say how."""
    asked = {
        chain.anchor: plan.recipes.get(chain.anchor, recipe) for chain in plan.chains if chain.kind in CHANNEL_AXIS
    }
    return {anchor: layer for anchor, layer in asked.items() if simulated_levels(layer) is not None}


def levelled(
    module: tvm.IRModule, plan: Plan, recipe: Recipe, samples: Callable[[], Iterable[tuple[Array, ...]]]
) -> tvm.IRModule:
    """The module with the constant weights of float convolutions and linear layers rounded as the recipe asks.

    samples: begins the inputs of inferences anew, for GPTQ, which is for uniform levels, as CLIP_WEIGHTS is.
    """
    layers = layers_with(plan, recipe)
    if not layers:
        return module
    wanting = {
        a for a, r in layers.items() if r.weight_levels is WeightLevels.UNIFORM and Algorithm.GPTQ in r.algorithms
    }
    chains = [chain for chain in plan.chains if chain.anchor in wanting]
    products = input_products(module, chains, samples()) if chains else {}
    axes = {chain.anchor: CHANNEL_AXIS[chain.kind] for chain in plan.chains if chain.anchor in layers}

    def visit(state: ir.Rewrite, _name: str, value: Any) -> Any:
        layer = layers.get(state.current)
        if layer is None or not ir.is_constant(value.args[1]):
            return None
        weight, axis = ir.to_numpy(value.args[1]), axes[state.current]
        matrix = np.moveaxis(weight, axis, -1)
        flat = matrix.reshape(-1, weight.shape[axis])
        if layer.weight_levels is WeightLevels.UNIFORM:
            clips = Algorithm.CLIP_WEIGHTS in layer.algorithms
            made = evenly(flat, layer.weight_bits, layer.group_size, clips, products.get(str(state.current.name)))
        else:
            made = rounded(flat, layer.weight_levels, layer.weight_bits, layer.group_size)
        back = np.ascontiguousarray(np.moveaxis(made.reshape(matrix.shape), -1, axis))
        return relax.Call(value.op, [value.args[0], ir.constant(back)], value.attrs)

    return ir.rewrite(module, visit)


def evenly(weight: Array, bits: int, group: int | None, clips: bool = False, products: Array | None = None) -> Array:
    """A weight [K, N] on uniform levels, float32; clips and products: see `levelled` and `rounding.gptq`."""
    size, (low, high) = group or weight.shape[0], _range(bits)
    steps = np.empty(weight.shape)
    for i in range(0, len(weight), size):
        part = weight[i : i + size].astype(np.float64)
        scale = _scale(part, bits)
        steps[i : i + size] = rounding.clipped_scales(part, scale, low, high) if clips else scale
    if products is None:
        return np.asarray(np.clip(np.rint(weight / steps), low, high) * steps, np.float32)
    return np.asarray(rounding.gptq(weight, steps, products, low, high) * steps, np.float32)


def rounded(weight: Array, levels: WeightLevels, bits: int, group: int | None, seed: int = 0) -> Array:
    """A weight [K, N] on its levels, float32.

    group: rows that share a scale, the last ones fewer; None means all. seed: of stochastic rounding.
    """
    if levels is WeightLevels.VECTOR_CODEBOOK:
        return _vector_codebook(weight, bits)
    if levels is WeightLevels.CODEBOOK:
        return _codebook(weight, bits)
    if levels is WeightLevels.UNIFORM:
        return evenly(weight, bits, group)
    rng = np.random.default_rng(seed)
    size = group or weight.shape[0]
    parts = [_ROUND[levels](weight[i : i + size].astype(np.float64), bits, rng) for i in range(0, len(weight), size)]
    return np.concatenate(parts).astype(np.float32)


def _stochastic(w: Array, bits: int, rng: np.random.Generator) -> Array:
    scale = _scale(w, bits)
    return np.clip(rounding.stochastic(w / scale, rng), *_range(bits)) * scale


def _scale(w: Array, bits: int) -> Array:
    """The largest magnitude is the lowest integer, of which there is one more below zero; scales may be negative."""
    largest = np.take_along_axis(w, np.abs(w).argmax(axis=0)[None], axis=0)[0]
    return np.where(largest == 0, 1.0, largest / -(2 ** (bits - 1)))


def _range(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def _asymmetric(w: Array, bits: int, _rng: np.random.Generator) -> Array:
    low, high = np.minimum(w.min(axis=0), 0.0), np.maximum(w.max(axis=0), 0.0)
    top = 2**bits - 1
    scale = np.where(high > low, (high - low) / top, 1.0)
    zero = np.rint(-low / scale)
    return np.asarray((np.clip(np.rint(w / scale) + zero, 0, top) - zero) * scale)


def _log2(w: Array, bits: int, _rng: np.random.Generator) -> Array:
    largest = np.abs(w).max(axis=0)
    scale = np.where(largest > 0, 2.0 ** np.rint(np.log2(np.maximum(largest, 1e-30))), 1.0)
    return np.asarray(tables.nearest(w / scale, tables.power_levels(bits)) * scale)


def _normal_float(w: Array, bits: int, _rng: np.random.Generator) -> Array:
    largest = np.abs(w).max(axis=0)
    scale = np.where(largest > 0, largest, 1.0)
    return np.asarray(tables.nearest(w / scale, tables.normal_levels(bits)) * scale)


def _codebook(weight: Array, bits: int) -> Array:
    """Clusters from the levels of `normal_float`, to whose last ones the rare large weights belong."""
    flat = weight.astype(np.float64).ravel()
    levels = tables.means(flat, np.ones_like(flat), tables.normal_levels(bits) * np.abs(flat).max())
    return tables.nearest(flat, levels).reshape(weight.shape).astype(np.float32)


def _vector_codebook(weight: Array, bits: int) -> Array:
    """Pairs of rows that follow each other; the last of an odd number is beside zeros."""
    even = np.concatenate([weight, np.zeros((len(weight) % 2, weight.shape[1]), weight.dtype)]).astype(np.float64)
    pairs = tables.tuples(even, 2)
    levels = tables.vector_means(pairs, np.ones(len(pairs)), 2**bits)
    found = levels[tables.nearest_vectors(pairs, levels)].reshape(len(even) // 2, -1, 2)
    return np.moveaxis(found, 2, 1).reshape(even.shape)[: len(weight)].astype(np.float32)


_ROUND: dict[WeightLevels, Callable[[Array, int, np.random.Generator], Array]] = {
    WeightLevels.ASYMMETRIC: _asymmetric,
    WeightLevels.LOG2: _log2,
    WeightLevels.NORMAL_FLOAT: _normal_float,
    WeightLevels.STOCHASTIC: _stochastic,
}
