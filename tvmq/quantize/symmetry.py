"""Whether a tensor's integers have a zero point: never, always where its range wants one, or where that pays.

A symmetric scale is at least as wide as an asymmetric one of the same range, and the noise of rounding, `scale**2 / 12`
an element (B. Widrow and I. Kollár, "Quantization Noise", 2008), grows with it by `20 log10(symmetric / asymmetric)`
decibels: 0.03 for [-1, 1] in 8 bits, 1.2 for [-1, 0.75], 6.1 for what a rectifier leaves.
"""

from __future__ import annotations

import math

from tvmq.quantize.numerics import QParams, choose_qparams
from tvmq.recipe import Recipe
from tvmq.recipe_values import PowerOfTwo


def choose(low: float, high: float, recipe: Recipe) -> QParams:
    """The parameters of an activation with values in [low, high], symmetric where `recipe` says so."""
    symmetric, asymmetric = (_qparams(low, high, recipe, symmetric=kind) for kind in (True, False))
    if recipe.symmetric or recipe.symmetric_loss is None:
        return symmetric if recipe.symmetric else asymmetric
    return symmetric if loss_db(symmetric, asymmetric) <= recipe.symmetric_loss else asymmetric


def loss_db(symmetric: QParams, asymmetric: QParams) -> float:
    """What the noise of rounding grows by, in dB, where a range is quantized without a zero point."""
    return 20.0 * math.log10(symmetric.scale / asymmetric.scale)


def _qparams(low: float, high: float, recipe: Recipe, *, symmetric: bool) -> QParams:
    power_of_two = recipe.power_of_two in (PowerOfTwo.ACTIVATIONS, PowerOfTwo.ALL)
    bits, narrow = recipe.activation_bits, recipe.narrow_range
    return choose_qparams(low, high, symmetric=symmetric, bits=bits, power_of_two=power_of_two, narrow=narrow)
