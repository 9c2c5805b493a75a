"""The algorithms of a recipe, in order: those that reshape the float model before ranges are taken, and those that
choose weights and biases once a plan is made.

equalize, smooth        ->  a module with the same results, easier to quantize
gptq, bias_correction   ->  what annotate needs to know of inputs, and a module with other biases
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm

from tvmq import ir
from tvmq.quantize import weights
from tvmq.quantize.annotate import CHANNEL_AXIS, weight_floor
from tvmq.quantize.bias_correction import corrected, mean_errors
from tvmq.quantize.channels import Channels
from tvmq.quantize.equalize import equalize
from tvmq.quantize.input_products import input_products
from tvmq.quantize.plan import Plan
from tvmq.quantize.smooth import smooth
from tvmq.recipe import Algorithm, Precision, Recipe

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
    """What GPTQ wants to know of the inputs of planned layers; nothing where the recipe does not ask for it."""
    if Algorithm.GPTQ not in recipe.algorithms:
        return {}
    planned = [c for c in plan.chains if c.kind in CHANNEL_AXIS and (c.end in plan.integer or c.anchor in plan.linear)]
    return input_products(module, planned, samples())


def with_corrected_biases(
    module: tvm.IRModule, plan: Plan, recipe: Recipe, products: dict[str, Array], samples: Samples
) -> tvm.IRModule:
    """The module with biases that make up for mean errors, where the recipe asks for it."""
    empirical = Algorithm.BIAS_CORRECTION in recipe.algorithms
    if not empirical and Algorithm.BIAS_CORRECTION_ANALYTIC not in recipe.algorithms:
        return module
    chains = [chain for chain in plan.chains if chain.kind in CHANNEL_AXIS and chain.end in plan.integer]
    chosen = {}
    for chain in chains:
        axis = CHANNEL_AXIS[chain.kind]
        q, scales = weights.choose(
            ir.to_numpy(chain.call.args[1]),
            axis,
            recipe,
            floor=weight_floor(chain, plan.qparams[chain.x].scale),
            products=products.get(str(chain.anchor.name)),
        )
        chosen[chain.anchor] = np.asarray(weights.dequantized(q, scales, axis))
    errors = mean_errors(module, chains, chosen, plan.qparams, samples(), empirical=empirical)
    return corrected(module, chains, errors)


def unused_algorithms(module: tvm.IRModule, plan: Plan, recipe: Recipe) -> tuple[str, ...]:
    """The algorithms of a recipe that find nothing to do in `module`, as it is after `reshaped`, and `plan`."""
    weighted = [chain for chain in plan.chains if chain.kind in CHANNEL_AXIS]
    static = any(chain.end in plan.integer for chain in weighted)
    by_channel = static or Precision.INT8_DYNAMIC in plan.linear.values()
    useful = {
        Algorithm.EQUALIZE: lambda: bool(Channels(module).groups),
        Algorithm.SMOOTH: lambda: bool(Channels(module).groups),
        Algorithm.CLIP_WEIGHTS: lambda: by_channel,
        Algorithm.SQUANT: lambda: by_channel,
        Algorithm.GPTQ: lambda: static or bool(plan.linear),
        Algorithm.BIAS_CORRECTION: lambda: static,
        Algorithm.BIAS_CORRECTION_ANALYTIC: lambda: static,
    }
    return tuple(algorithm.value for algorithm in recipe.algorithms if not useful[algorithm]())
