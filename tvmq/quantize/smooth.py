"""SmoothQuant: outlying channels of activations are divided down, and the weights that read them multiplied up.

    smooth            s = max |x|**alpha / max |w|**(1 - alpha) a channel
    channel_factors   s = max(1, max |x| / bound) a channel, with the bound that leaves least noise; done by default

G. Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML 2023,
whose equation 4 is the first. The division goes into the layer norm or the layer that makes the activation. A layer
norm whose result is also read by others, as by the residual addition after it in a post-norm transformer, gets a twin
for its linear readers alone: the others read what they read before. For hidden units see `hidden`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvmq import ir
from tvmq.errors import CalibrationError
from tvmq.quantize import hidden, weights
from tvmq.quantize.channels import Channels, Group, balanced, is_linear, is_scalable_norm
from tvmq.quantize.data import first
from tvmq.quantize.numerics import choose_qparams
from tvmq.quantize.seen import ChannelsSeen, Samples, channels_seen, largest_seen
from tvmq.recipe import Recipe, wanted_precisions
from tvmq.recipe_values import Precision

Array = npt.NDArray[Any]
# By default a tensor is left as it is unless smoothing leaves less than two thirds of the noise, see `noise`.
LOUD = 1.5
# Bounds that are tried, as shares of the largest channel, each half a bit below the one before: down to 6 bits.
SHARES = 2.0 ** (-0.5 * np.arange(1, 13))
# Rounding errors of activations differ from row to row, and mostly cancel where rows are mixed and averaged, as by
# attention and pooling; those of weights are alike in all rows. By trial on a sentence encoder, where 2 to 6 are alike.
ALIKE = 6.0


def smooth(module: tvm.IRModule, samples: Samples, alpha: float) -> tvm.IRModule:
    """The module, computing the same, smoothed over the activations that `samples` (inputs of inferences) give."""
    module = with_twin_norms(module)
    channels = Channels(module)
    seen = largest_seen(module, samples, {str(var.name) for g in channels.groups.values() for var in g.read})
    factors: dict[Any, Any] = {}
    for root, group in channels.groups.items():
        largest = np.max([seen[str(var.name)] for var in group.read], axis=0)
        factors[root] = _balanced(channels, group, largest, alpha)
    return channels.rescaled(factors)


def channel_factors(module: tvm.IRModule, samples: Samples, recipe: Recipe) -> dict[str, Array]:
    """What channels of tensors are divided by, where that is worth it for their linear readers, by name.

    Of layer norms, and of hidden units. Looks at the `first` of the samples; nothing without any.
    """
    found = {**_linear_readers(module), **hidden.hidden_units(module)}
    seen = channels_seen(module, first(samples), {str(var.name) for var in found}) if found else {}
    made = hidden.makers(module) if with_copies(recipe) else {}
    factors = {}
    for var, readers in found.items():
        if (name := str(var.name)) in seen:
            chosen = bounded(seen[name], hidden.read_by(module, readers), recipe, copies=var in made)
            if chosen is not None:
                factors[name] = chosen
    return factors


def with_copies(recipe: Recipe) -> bool:
    """Whether hidden units may have copies: weights of groups fit the numbers that models have."""
    return not wanted_precisions(recipe) & {Precision.INT8_WEIGHT, Precision.INT4_WEIGHT}


def bounded(seen: ChannelsSeen, read: Array, recipe: Recipe, *, copies: bool = False) -> Array | None:
    """Factors [K] that no channel of a tensor is above a bound with; None where they are not worth it.

    read: the weights [K, N] that multiply the channels. The bound is lowered until that adds more noise than it saves.
    """
    largest = seen.largest
    if not 0.0 < largest.max(initial=0.0) < np.inf:
        return None  # nothing to divide; calibration refuses what overflows
    plain = best = noise(seen, read, np.ones(largest.shape), recipe)
    chosen = None
    for bound in largest.max() * SHARES:
        factors = np.maximum(largest / bound, 1.0)
        if (left := noise(seen, read, factors, recipe, copies=copies)) >= best:
            break
        best, chosen = left, factors
    return chosen if plain > LOUD * best else None


def noise(seen: ChannelsSeen, read: Array, factors: Array, recipe: Recipe, *, copies: bool = False) -> float:
    """The squared error, summed over results, that rounding adds to a row `x / factors` times `read * factors`.

    All errors of the tensor's step are alike, `step**2 / 12`; those of weights [K, N] are known, and meet what channels
    differ by from their means, as mean errors are taken off biases: they count ALIKE times. copies: channels get them
    as hidden units do.
    """
    low, high = float((seen.low / factors).min()), float((seen.high / factors).max())
    step = choose_qparams(low, high, symmetric=recipe.symmetric, bits=recipe.activation_bits).scale
    wide = hidden.multiplied(read, factors)
    units = hidden.copied(wide) if copies else np.arange(len(wide))
    chosen = weights.choose(hidden.split(wide, units), 1, dataclasses.replace(recipe, algorithms=()))
    lost = wide - hidden.joined(weights.dequantized(*chosen, 1), units)
    by_weights = np.square(lost).sum(axis=1, dtype=np.float64) @ (seen.variance / factors**2)
    return float(step**2 / 12.0 * np.square(wide).sum(dtype=np.float64) + ALIKE * by_weights)


def divided(module: tvm.IRModule, factors: Mapping[str, Array], recipe: Recipe) -> tvm.IRModule:
    """The module, computing the same, with the tensors of these names divided by factors for their linear readers.

    Raises CalibrationError for a name that is none of `channel_factors`, and for factors that are not one above 0 a
    channel.
    """
    if not factors:
        return module
    norms, units = _linear_readers(module), hidden.hidden_units(module)
    known = {str(var.name): ir.shape_of(var)[-1] for var in (*norms, *units)}
    for name, values in factors.items():
        if len(values) != known.get(name) or not (values > 0).all():
            seen = f"{len(values)} numbers, the least {values.min(initial=np.inf):g}"
            which = f"a layer norm or an activation function of the model, {known.get(name, 0)} channels"
            expected = f"a number above 0 for each channel of {which}"
            raise CalibrationError(f"calibration table: smoothed {name!r}", expected=expected, seen=seen)
    of_units = {name: factors[name] for name in factors if name in {str(var.name) for var in units}}
    module = hidden.rescaled(module, of_units, copies=with_copies(recipe))
    return divided_norms(module, {name: factors[name] for name in factors if name not in of_units})


def divided_norms(module: tvm.IRModule, factors: Mapping[str, Array]) -> tvm.IRModule:
    """The module with the layer norms of these names divided by factors for their linear readers."""
    if not factors:
        return module
    channels = Channels(with_twin_norms(module, factors))
    of_makers = {name: factors[norm] for norm in factors for name in (norm, _twin(norm))}
    chosen = {root: group for root, group in channels.groups.items() if len(group.makers) == 1}
    makers = {root: str(group.makers[0].name) for root, group in chosen.items()}
    return channels.rescaled({root: of_makers[name] for root, name in makers.items() if name in of_makers})


def with_twin_norms(module: tvm.IRModule, chosen: Container[str] | None = None) -> tvm.IRModule:
    """Layer norms that linear layers and others read, twice: once for the linear layers, once for the others.

    y = norm(x);  a = y @ w;  b = y + z   ->   y = norm(x);  y' = norm(x);  a = y' @ w;  b = y + z

    chosen: only norms of these names; None: all.
    """
    values, readers = dict(ir.bindings(module)), ir.users(module)
    linear = {
        var: found
        for var, found in _linear_readers(module).items()
        if len(found) < len(set(readers[var])) and (chosen is None or str(var.name) in chosen)
    }
    readers_of_twins = {reader: values[reader].args[0] for found in linear.values() for reader in found}
    twins: dict[Any, Any] = {}

    def visit(state: ir.Rewrite, name: str, value: Any) -> Any:
        if state.current in linear:
            twins[state.current] = state.emit(value, _twin(name))
        elif state.current in readers_of_twins:
            return relax.Call(value.op, [twins[readers_of_twins[state.current]], *value.args[1:]], value.attrs)
        return None

    return ir.rewrite(module, visit) if linear else module


def _linear_readers(module: tvm.IRModule) -> dict[Any, set[Any]]:
    """Layer norms that can be rescaled -> the linear layers that read them, where there are any."""
    values, readers = dict(ir.bindings(module)), ir.users(module)
    norms = [var for var, call in values.items() if is_scalable_norm(call)]
    found = {var: {reader for reader in readers.get(var, []) if is_linear(values.get(reader))} for var in norms}
    return {var: linear for var, linear in found.items() if linear}


def _twin(name: str) -> str:
    return f"{name}_smoothed"


def _balanced(channels: Channels, group: Group, seen: Array, alpha: float) -> Array:
    read = np.asarray(np.max([channels.read_range(var) for var in group.readers], axis=0))
    return balanced(lambda _var: seen, read, group, alpha)
