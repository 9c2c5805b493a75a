"""The algorithms of a recipe, in order: those that reshape the float model before ranges are taken, and those that
choose weights and biases once a plan is made.

equalize, smooth        ->  a module with the same results, easier to quantize; by default where channels are uneven
gptq, bias_correction   ->  what annotate needs to know of inputs, and a module with other biases
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any

import numpy.typing as npt
import tvm

from tvmq import ir
from tvmq.graph.fusion import Chain, find_chains
from tvmq.graph.pairs import CHANNEL_AXIS
from tvmq.quantize import packed, weights
from tvmq.quantize.annotate import weight_floor
from tvmq.quantize.bias_correction import analytic_errors, corrected, empirical_errors
from tvmq.quantize.channels import Channels
from tvmq.quantize.equalize import UNEVEN, equalize
from tvmq.quantize.input_means import InputMeans
from tvmq.quantize.input_products import input_products
from tvmq.quantize.levels import layers_with
from tvmq.quantize.mean_errors import MeanErrors, fingerprint
from tvmq.quantize.plan import Plan
from tvmq.quantize.smooth import divided, divisions, smooth
from tvmq.quantize.smoothed import Smoothed
from tvmq.quantize.weights import Chosen
from tvmq.recipe import Recipe, wanted_precisions
from tvmq.recipe_values import WEIGHT_ONLY, Algorithm, Precision, WeightLevels

Array = npt.NDArray[Any]
Samples = Callable[[], Iterable[tuple[Array, ...]]]
CORRECTIONS = (Algorithm.BIAS_CORRECTION_ANALYTIC, Algorithm.BIAS_CORRECTION)


def reshaped(
    module: tvm.IRModule, recipe: Recipe, samples: Samples, known: Mapping[str, Smoothed] | None = None
) -> tuple[tvm.IRModule, dict[str, Smoothed]]:
    """The float module after equalization and smoothing, and by what tensors were smoothed by default.

    known: that, of a table, whose ranges are of such tensors; None where the recipe decides.
    """
    by_default = Algorithm.AUTO in recipe.algorithms and bool(
        wanted_precisions(recipe) & {Precision.INT8, Precision.AUTO, Precision.INT8_DYNAMIC}
    )
    if Algorithm.EQUALIZE in recipe.algorithms:
        module = equalize(module)
    elif by_default:
        module = equalize(module, UNEVEN)
    if Algorithm.SMOOTH in recipe.algorithms:
        return smooth(module, samples(), recipe.smoothing), {}
    if known is None and by_default:
        known = {name: Smoothed.of(division) for name, division in divisions(module, samples(), recipe).items()}
    smoothed = dict(known or {})
    return divided(module, {name: found.division() for name, found in smoothed.items()}, recipe), smoothed


def products_of(module: tvm.IRModule, plan: Plan, recipe: Recipe, samples: Samples) -> dict[str, Array]:
    """What GPTQ wants to know of the inputs of planned layers; nothing where the recipe asks for it nowhere."""
    planned = [c for c in _weighted(plan) if c.end in plan.integer or c.anchor in plan.float_ends]
    asked = [chain for chain in planned if Algorithm.GPTQ in plan.recipes.get(chain.anchor, recipe).algorithms]
    asked = [chain for chain in asked if _one_by_one(plan.recipes.get(chain.anchor, recipe))]
    return input_products(module, asked, samples()) if asked else {}


def means_for(module: tvm.IRModule, recipe: Recipe) -> InputMeans:
    """What is to learn the means of what layers read, with their ranges; of no layer where the recipe wants none."""
    analytic = Algorithm.BIAS_CORRECTION_ANALYTIC
    wanted = recipe.asks(analytic) or analytic in recipe.all_algorithms
    return InputMeans(chain for chain in find_chains(module) if wanted and chain.kind in CHANNEL_AXIS)


def mean_errors_of(
    module: tvm.IRModule,
    plan: Plan,
    recipe: Recipe,
    products: Mapping[str, Array],
    samples: Samples,
    means: InputMeans,
    known: Mapping[str, MeanErrors],
    chosen: Chosen | None = None,
) -> dict[str, MeanErrors]:
    """The mean errors of the layers whose biases are to be corrected, by the names of their anchors.

    means: of what layers read; samples: what errors are measured on instead, where the recipe asks for that. known:
    those that a table has, which are not found again where they are of the same integers. chosen: learns the weights
    that are looked at. Layers without any of these are left out.
    """
    found: dict[str, MeanErrors] = {}
    chosen = chosen or Chosen()
    for algorithm in CORRECTIONS:
        chains = to_correct(plan, recipe, algorithm)
        parts = {chain.anchor: _as_chosen(chain, plan, recipe, products, chosen) for chain in chains}
        empirical = algorithm is Algorithm.BIAS_CORRECTION
        read = {chain.anchor: plan.qparams[chain.x] if empirical else None for chain in chains}
        of = {anchor: fingerprint(*parts[anchor], read[anchor]) for anchor in parts}
        new = []
        for chain in chains:
            name = str(chain.anchor.name)
            if name in known and known[name].fits(of[chain.anchor], ir.shape_of(chain.call)[-1]):
                found[name] = known[name]
            else:
                new.append(chain)
        weights_of = {
            chain.anchor: weights.dequantized(*parts[chain.anchor], CHANNEL_AXIS[chain.kind]) for chain in new
        }
        if not new:
            continue
        if empirical:
            errors = empirical_errors(module, new, weights_of, plan.qparams, samples())
        else:
            errors = analytic_errors(new, weights_of, means)
        found |= {str(anchor.name): MeanErrors(of[anchor], packed.pack(values)) for anchor, values in errors.items()}
    return found


def to_correct(plan: Plan, recipe: Recipe, algorithm: Algorithm) -> list[Chain]:
    """The integer layers whose biases `algorithm` is to correct."""
    static = [c for c in _weighted(plan) if c.end in plan.integer and c.anchor not in plan.wide_layers]
    return [chain for chain in static if plan.recipes.get(chain.anchor, recipe).asks(algorithm)]


def without_errors(
    plan: Plan, recipe: Recipe, errors: Mapping[str, MeanErrors], known: Container[str]
) -> tuple[str, ...]:
    """The bias corrections that are asked for a layer without mean errors, but for those `known` to be unused."""
    lacking = []
    for algorithm in CORRECTIONS:
        asked = [str(chain.anchor.name) for chain in to_correct(plan, recipe, algorithm)]
        if algorithm.value not in known and not all(anchor in errors for anchor in asked):
            lacking.append(algorithm.value)
    return tuple(lacking)


def with_corrected_biases(module: tvm.IRModule, plan: Plan, errors: Mapping[str, MeanErrors]) -> tvm.IRModule:
    """The module with biases that make up for the mean errors of layers, given by the names of their anchors."""
    chains = [chain for chain in _weighted(plan) if str(chain.anchor.name) in errors]
    by_anchor = {chain.anchor: errors[str(chain.anchor.name)].values() for chain in chains}
    return corrected(module, chains, by_anchor) if chains else module


def _as_chosen(
    chain: Chain, plan: Plan, recipe: Recipe, products: Mapping[str, Array], chosen: Chosen
) -> tuple[Array, Array]:
    """The integers and the scales of the weight of an integer layer."""
    return chosen.choose(
        str(chain.anchor.name),
        ir.to_numpy(chain.call.args[1]),
        CHANNEL_AXIS[chain.kind],
        plan.recipes.get(chain.anchor, recipe),
        floor=weight_floor(chain, plan.qparams[chain.x].scale),
        products=products.get(str(chain.anchor.name)),
    )


def _one_by_one(layer: Recipe) -> bool:
    """Whether a weight's inputs are rounded one by one, as GPTQ does it."""
    return layer.weight_levels is not WeightLevels.VECTOR_CODEBOOK


def _has_steps(layer: Recipe) -> bool:
    """Whether the scales of a weight-only layer may be clipped."""
    return layer.weight_levels in (WeightLevels.NONE, WeightLevels.UNIFORM, WeightLevels.STOCHASTIC)


def _weighted(plan: Plan) -> list[Chain]:
    return [chain for chain in plan.chains if chain.kind in CHANNEL_AXIS]


def unused_algorithms(module: tvm.IRModule, plan: Plan, recipe: Recipe) -> tuple[str, ...]:
    """The algorithms of a recipe and its rules that find nothing to do.

    module, plan: before weights are rounded to levels, and after `reshaped`.
    """
    layers = {chain.anchor: plan.recipes.get(chain.anchor, recipe) for chain in _weighted(plan)}
    simulated = layers_with(plan, recipe)
    planned = [chain.anchor for chain in _weighted(plan) if chain.end in plan.integer]
    static = [layers[anchor] for anchor in planned if anchor not in plan.wide_layers]
    dynamic = (anchor for anchor, given in plan.float_ends.items() if given is Precision.INT8_DYNAMIC)
    by_channel = [layers[anchor] for anchor in (*planned, *dynamic)]
    grouped = [layers[a] for a, given in plan.float_ends.items() if given in WEIGHT_ONLY and _has_steps(layers[a])]
    uniform = [layer for layer in simulated.values() if layer.weight_levels is WeightLevels.UNIFORM]
    useful = {
        Algorithm.CLIP_WEIGHTS: [*by_channel, *grouped, *uniform],
        Algorithm.SQUANT: by_channel,
        Algorithm.GPTQ: [*(layers[a] for a in (*planned, *plan.float_ends) if _one_by_one(layers[a])), *uniform],
        **dict.fromkeys(CORRECTIONS, static),
    }

    def used(algorithm: Algorithm) -> bool:
        if algorithm is Algorithm.AUTO:
            return True  # it does what there is to do
        if algorithm in useful:
            return any(algorithm in layer.algorithms for layer in useful[algorithm])
        return bool(planned or plan.float_ends or simulated) and bool(Channels(module).groups)

    return tuple(algorithm.value for algorithm in recipe.all_algorithms if not used(algorithm))
