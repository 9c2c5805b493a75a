"""Weights rounded to few levels, in NumPy: named quantizers whose weights are multiplied, and stored, as floats.

    w [K, N]  ->  [K, N] float32, each group of rows and column (of `codebook`: the whole weight) with 2**bits values

uniform      multiples of a scale, the largest magnitude at the end of the range
asymmetric   multiples of a scale from an offset: the range of each group
log2         zero and powers of two, with signs: D. Miyashita et al., "Convolutional Neural Networks using Logarithmic
             Data Representation", 2016
normal_float quantiles of a normal distribution: T. Dettmers et al., "QLoRA", NeurIPS 2023, appendix E
codebook     the means of clusters: S. Han et al., "Deep Compression", ICLR 2016, section 3
stochastic   uniform, rounded up with the probability of the rest: S. Gupta et al., "Deep Learning with Limited
             Numerical Precision", ICML 2015
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvmq import ir
from tvmq.graph.fusion import find_chains
from tvmq.quantize import rounding
from tvmq.quantize.annotate import CHANNEL_AXIS
from tvmq.quantize.input_products import input_products
from tvmq.recipe import Algorithm, Recipe, WeightLevels

Array = npt.NDArray[Any]
# Lloyd's algorithm ends where no entry moves by more than this share of the range, or after so many turns.
_SETTLED, _TURNS = 1e-4, 100
# The first and last quantile of the normal distribution in bitsandbytes' NF4: halfway between its two estimates.
_TAIL = 0.9677083


# What may be done for uniform levels: scales of least squared error, and errors that the next inputs make up for.
ALGORITHMS = (Algorithm.CLIP_WEIGHTS, Algorithm.GPTQ)


def unused(recipe: Recipe) -> tuple[str, ...]:
    """The algorithms of a float recipe that find nothing to do."""
    used = ALGORITHMS if recipe.weight_levels is WeightLevels.UNIFORM else ()
    return tuple(algorithm.value for algorithm in recipe.algorithms if algorithm not in used)


def levelled(module: tvm.IRModule, recipe: Recipe, samples: Callable[[], Iterable[tuple[Array, ...]]]) -> tvm.IRModule:
    """The module with the constant weights of convolutions and linear layers rounded as the recipe asks.

    samples: begins the inputs of inferences anew, for GPTQ.
    """
    if recipe.weight_levels is WeightLevels.NONE:
        return module
    uniform = recipe.weight_levels is WeightLevels.UNIFORM
    chains = [chain for chain in find_chains(module) if chain.kind in CHANNEL_AXIS]
    wants = uniform and Algorithm.GPTQ in recipe.algorithms
    products = input_products(module, chains, samples()) if wants else {}
    clips = Algorithm.CLIP_WEIGHTS in recipe.algorithms
    anchors = {chain.anchor: CHANNEL_AXIS[chain.kind] for chain in chains}
    bits, group = recipe.weight_bits, recipe.group_size

    def visit(state: ir.Rewrite, _name: str, value: Any) -> Any:
        axis = anchors.get(state.current)
        if axis is None or not ir.is_constant(value.args[1]):
            return None
        weight = ir.to_numpy(value.args[1])
        matrix = np.moveaxis(weight, axis, -1)
        flat = matrix.reshape(-1, weight.shape[axis])
        if uniform:
            made = evenly(flat, bits, group, clips, products.get(str(state.current.name)))
        else:
            made = rounded(flat, recipe.weight_levels, bits, group)
        back = np.ascontiguousarray(np.moveaxis(made.reshape(matrix.shape), -1, axis))
        return relax.Call(value.op, [value.args[0], ir.constant(back)], value.attrs)

    return ir.rewrite(module, visit)


def described(recipe: Recipe) -> str | None:
    """What `explain` says of a layer whose weights `levelled` rounded; None where it rounds none."""
    if recipe.weight_levels is WeightLevels.NONE:
        return None
    group = "a channel" if recipe.group_size is None else f"groups of {recipe.group_size}"
    scale = "one table a layer" if recipe.weight_levels is WeightLevels.CODEBOOK else f"a scale for {group}"
    levels = f"{recipe.weight_levels.value} levels of {recipe.weight_bits} bits"
    return f"simulated: weights are rounded to {levels}, {scale}, and stored as floats"


def evenly(weight: Array, bits: int, group: int | None, clips: bool = False, products: Array | None = None) -> Array:
    """A weight [K, N] on uniform levels, float32; clips and products: see `ALGORITHMS` and `rounding.gptq`."""
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
    return np.clip(np.floor(w / scale + rng.random(w.shape)), *_range(bits)) * scale


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
    powers = 2.0 ** -np.arange(2 ** (bits - 1) - 1)
    largest = np.abs(w).max(axis=0)
    scale = np.where(largest > 0, 2.0 ** np.rint(np.log2(np.maximum(largest, 1e-30))), 1.0)
    return np.asarray(nearest(w / scale, np.concatenate([-powers, [0.0], powers])) * scale)


def _normal_float(w: Array, bits: int, _rng: np.random.Generator) -> Array:
    largest = np.abs(w).max(axis=0)
    scale = np.where(largest > 0, largest, 1.0)
    return np.asarray(nearest(w / scale, normal_levels(bits)) * scale)


def normal_levels(bits: int) -> Array:
    """2**bits levels in [-1, 1], zero among them, one more above it than below."""
    half, normal = 2 ** (bits - 1), NormalDist()
    above = [normal.inv_cdf(p) for p in np.linspace(_TAIL, 0.5, half + 1)[:-1]]
    below = [-normal.inv_cdf(p) for p in np.linspace(_TAIL, 0.5, half)[:-1]]
    levels = np.sort(np.array([*above, 0.0, *below]))
    return np.asarray(levels / np.abs(levels).max())


def nearest(values: Array, levels: Array) -> Array:
    """The level nearest to each value."""
    levels = np.sort(levels)
    return np.asarray(levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, values)])


def _codebook(weight: Array, bits: int) -> Array:
    """Lloyd's algorithm from the levels of `normal_float`, to whose last ones the rare large weights belong."""
    flat, entries = weight.astype(np.float64).ravel(), 2**bits
    means = normal_levels(bits) * np.abs(flat).max()
    for _ in range(_TURNS):
        cluster = np.searchsorted((means[1:] + means[:-1]) / 2, flat)
        counts = np.bincount(cluster, minlength=entries)
        sums = np.bincount(cluster, flat, minlength=entries)
        moved = np.sort(np.where(counts > 0, sums / np.maximum(counts, 1), means))
        settled = np.abs(moved - means).max() <= _SETTLED * np.abs(moved).max()
        means = moved
        if settled:
            break
    return nearest(flat, means).reshape(weight.shape).astype(np.float32)


_ROUND: dict[WeightLevels, Callable[[Array, int, np.random.Generator], Array]] = {
    WeightLevels.ASYMMETRIC: _asymmetric,
    WeightLevels.LOG2: _log2,
    WeightLevels.NORMAL_FLOAT: _normal_float,
    WeightLevels.STOCHASTIC: _stochastic,
}
