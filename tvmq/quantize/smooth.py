"""SmoothQuant: outlying channels of activations are divided down, and the weights that read them multiplied up.

    smooth            s = max |x|**alpha / max |w|**(1 - alpha) a channel
    divisions         the s, and copies of hidden units, that leave the least noise (`least_noise`); done by default

G. Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", ICML 2023,
whose equation 4 is the first. The division goes into the layer norm or the layer that makes the activation. A layer
norm whose result is also read by others, as by the residual addition after it in a post-norm transformer, gets a twin
for its linear readers alone: the others read what they read before. For hidden units see `hidden`.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvmq import ir
from tvmq.errors import CalibrationError
from tvmq.quantize import hidden
from tvmq.quantize.channels import Channels, Group, balanced, is_linear, is_scalable_norm
from tvmq.quantize.data import first
from tvmq.quantize.least_noise import Division, best_division
from tvmq.quantize.numerics import largest_integer
from tvmq.quantize.seen import Samples, channels_seen, largest_seen
from tvmq.recipe import Recipe, wanted_precisions
from tvmq.recipe_values import Precision

Array = npt.NDArray[Any]


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


def divisions(module: tvm.IRModule, samples: Samples, recipe: Recipe) -> dict[str, Division]:
    """What channels of tensors are divided by, where that is worth it for their linear readers, by name.

    Of layer norms, and of hidden units. Looks at the `first` of the samples; nothing without any.
    """
    found = {**_linear_readers(module), **hidden.hidden_units(module)}
    seen = channels_seen(module, first(samples), {str(var.name) for var in found}) if found else {}
    made = hidden.makers(module) if with_copies(recipe) else {}
    best = {
        name: best_division(seen[name], hidden.read_by(module, readers), recipe, copies=var in made)
        for var, readers in found.items()
        if (name := str(var.name)) in seen
    }
    return {name: division for name, division in best.items() if division is not None}


def with_copies(recipe: Recipe) -> bool:
    """Whether hidden units may have copies: weights of groups fit the numbers that models have."""
    return not wanted_precisions(recipe) & {Precision.INT8_WEIGHT, Precision.INT4_WEIGHT}


def divided(module: tvm.IRModule, chosen: Mapping[str, Division], recipe: Recipe) -> tvm.IRModule:
    """The module, computing the same, with the tensors of these names divided for their linear readers.

    Raises CalibrationError for a name that is none of `divisions`, for factors that are not one above 0 a channel, and
    for copies of channels that can have none.
    """
    if not chosen:
        return module
    norms, units = _linear_readers(module), hidden.hidden_units(module)
    known = {str(var.name): ir.shape_of(var)[-1] for var in (*norms, *units)}
    copied = {str(var.name): known[str(var.name)] for var in hidden.makers(module)} if with_copies(recipe) else {}
    for name, division in chosen.items():
        where, factors = f"calibration table: smoothed {name!r}", division.factors
        if len(factors) != known.get(name) or not (factors > 0).all():
            seen = f"{len(factors)} numbers, the least {factors.min(initial=np.inf):g}"
            which = f"a layer norm or an activation function of the model, {known.get(name, 0)} channels"
            expected = f"a number above 0 for each channel of {which}"
            raise CalibrationError(where, expected=expected, seen=seen)
        beyond = [channel for channel in division.copies if not 0 <= channel < copied.get(name, 0)]
        if beyond:
            expected = f"copies of {copied.get(name, 0)} channels"
            raise CalibrationError(where, expected=expected, seen=f"one of channel {beyond[0]}", hint="calibrate anew")
    of_units = {name: chosen[name] for name in chosen if name in {str(var.name) for var in units}}
    module = hidden.rescaled(module, of_units, largest_integer(recipe.weight_bits))
    return divided_norms(module, {name: chosen[name].factors for name in chosen if name not in of_units})


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
