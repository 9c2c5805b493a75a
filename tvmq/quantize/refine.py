"""The algorithms of a recipe, in order: those that reshape the float model before ranges are taken, and those that
choose weights and biases once a plan is made.

equalize, smooth        ->  a module with the same results, easier to quantize
gptq, bias_correction   ->  what annotate needs to know of inputs, and a module with other biases
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy.typing as npt
import tvm

from tvmq import ir
from tvmq.graph.fusion import Chain
from tvmq.graph.pairs import CHANNEL_AXIS
from tvmq.quantize import weights
from tvmq.quantize.annotate import weight_floor
from tvmq.quantize.bias_correction import corrected, mean_errors
from tvmq.quantize.channels import Channels
from tvmq.quantize.equalize import equalize
from tvmq.quantize.input_products import input_products
from tvmq.quantize.levels import layers_with
from tvmq.quantize.plan import Plan
from tvmq.quantize.smooth import smooth
from tvmq.recipe import Recipe
from tvmq.recipe_values import Algorithm, Precision, WeightLevels

Array = npt.NDArray[Any]
Samples = Callable[[], Iterable[tuple[Array, ...]]]


def reshaped(module: tvm.IRModule, recipe: Recipe, samples: Samples) -> tvm.IRModule:
    """The float module after equalization and smoothing, where the recipe asks for them."""
    if Algorithm.EQUALIZE in recipe.algorithms:
        module = equalize(module)
    if Algorithm.SMOOTH in recipe.algorithms:
        module = smooth(module, samples(), recipe.smoothing)
    return module


def products_of(module: tvm.IRModule, plan: Plan, recipe: Recipe, samples: Samples) -> dict[str, Array]:
    """What GPTQ wants to know of the inputs of planned layers; nothing where the recipe asks for it nowhere."""
    planned = [c for c in _weighted(plan) if c.end in plan.integer or c.anchor in plan.linear]
    asked = [chain for chain in planned if Algorithm.GPTQ in plan.recipes.get(chain.anchor, recipe).algorithms]
    asked = [chain for chain in asked if _one_by_one(plan.recipes.get(chain.anchor, recipe))]
    return input_products(module, asked, samples()) if asked else {}


def with_corrected_biases(
    module: tvm.IRModule, plan: Plan, recipe: Recipe, products: dict[str, Array], samples: Samples
) -> tvm.IRModule:
    """The module with biases that make up for mean errors, where the recipe asks for it."""
    static = [chain for chain in _weighted(plan) if chain.end in plan.integer]
    errors: dict[Any, Array] = {}
    for algorithm in (Algorithm.BIAS_CORRECTION_ANALYTIC, Algorithm.BIAS_CORRECTION):
        chains = [chain for chain in static if algorithm in plan.recipes.get(chain.anchor, recipe).algorithms]
        if chains:
            chosen = {chain.anchor: _as_chosen(chain, plan, recipe, products) for chain in chains}
            empirical = algorithm is Algorithm.BIAS_CORRECTION
            errors |= mean_errors(module, chains, chosen, plan.qparams, samples(), empirical=empirical)
    return corrected(module, static, errors) if errors else module


def _as_chosen(chain: Chain, plan: Plan, recipe: Recipe, products: dict[str, Array]) -> Array:
    """The weight of an integer layer as its integers stand for it, float32."""
    axis = CHANNEL_AXIS[chain.kind]
    q, scales = weights.choose(
        ir.to_numpy(chain.call.args[1]),
        axis,
        plan.recipes.get(chain.anchor, recipe),
        floor=weight_floor(chain, plan.qparams[chain.x].scale),
        products=products.get(str(chain.anchor.name)),
    )
    return weights.dequantized(q, scales, axis)


def _one_by_one(layer: Recipe) -> bool:
    """Whether a weight's inputs are rounded one by one, as GPTQ does it."""
    return layer.weight_levels is not WeightLevels.VECTOR_CODEBOOK


def _weighted(plan: Plan) -> list[Chain]:
    return [chain for chain in plan.chains if chain.kind in CHANNEL_AXIS]


def unused_algorithms(module: tvm.IRModule, plan: Plan, recipe: Recipe) -> tuple[str, ...]:
    """The algorithms of a recipe and its rules that find nothing to do.

    module, plan: before weights are rounded to levels, and after `reshaped`.
    """
    layers = {chain.anchor: plan.recipes.get(chain.anchor, recipe) for chain in _weighted(plan)}
    simulated = layers_with(plan, recipe)
    static = [layers[chain.anchor] for chain in _weighted(plan) if chain.end in plan.integer]
    by_channel = [*static, *(layers[a] for a, given in plan.linear.items() if given is Precision.INT8_DYNAMIC)]
    uniform = [layer for layer in simulated.values() if layer.weight_levels is WeightLevels.UNIFORM]
    useful = {
        Algorithm.CLIP_WEIGHTS: [*by_channel, *uniform],
        Algorithm.SQUANT: by_channel,
        Algorithm.GPTQ: [*static, *(layers[a] for a in plan.linear if _one_by_one(layers[a])), *uniform],
        Algorithm.BIAS_CORRECTION: static,
        Algorithm.BIAS_CORRECTION_ANALYTIC: static,
    }

    def used(algorithm: Algorithm) -> bool:
        if algorithm in useful:
            return any(algorithm in layer.algorithms for layer in useful[algorithm])
        return bool(static or plan.linear or simulated) and bool(Channels(module).groups)

    return tuple(algorithm.value for algorithm in recipe.all_algorithms if not used(algorithm))
