"""SmoothQuant: outlying channels of activations are divided down, and the weights that read them multiplied up.

s = max |x|**alpha / max |w|**(1 - alpha) a channel: G. Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training
Quantization for Large Language Models", ICML 2023, equation 4. The division goes into the layer norm or the layer that
makes the activation. A layer norm whose result is also read by others, as by the residual addition after it in a
post-norm transformer, gets a twin for its linear readers alone: the others read what they read before.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvmq import ir
from tvmq.errors import CalibrationError
from tvmq.oracle import interpret
from tvmq.quantize.channels import Channels, Group, balanced, is_linear, is_scalable_norm
from tvmq.quantize.data import first

Array = npt.NDArray[Any]
Samples = Iterable[tuple[Array, ...]]
# By default a layer norm is left as it is unless smoothing leaves less than half of the noise, see `noise`.
LOUD = 2.0


def smooth(module: tvm.IRModule, samples: Samples, alpha: float) -> tvm.IRModule:
    """The module, computing the same, smoothed over the activations that `samples` (inputs of inferences) give."""
    module = with_twin_norms(module)
    channels = Channels(module)
    largest = channel_maxima(module, samples, {str(var.name) for g in channels.groups.values() for var in g.read})
    factors: dict[Any, Any] = {}
    for root, group in channels.groups.items():
        seen = np.max([largest[str(var.name)] for var in group.read], axis=0)
        factors[root] = _balanced(channels, group, seen, alpha)
    return channels.rescaled(factors)


def norm_factors(module: tvm.IRModule, samples: Samples, alpha: float) -> dict[str, Array]:
    """What channels of layer norms are divided by, where that is worth it for their linear readers, by name.

    Looks at the `first` of the samples; nothing without any.
    """
    channels, found = Channels(module), _linear_readers(module)
    largest = channel_maxima(module, first(samples), {str(var.name) for var in found}) if found else {}
    factors = {}
    for var, readers in found.items():
        seen = largest.get(str(var.name))
        group = Group(ir.shape_of(var)[-1], (var,), tuple(readers), (var,))
        if seen is not None:
            read, divided = _read(channels, group), _balanced(channels, group, seen, alpha)
            if noise(seen, read) > LOUD * noise(seen / divided, read * divided):
                factors[str(var.name)] = divided
    return factors


def noise(seen: Array, read: Array) -> float:
    """What rounding to integers adds to the sums of products of a tensor and weights, in a unit of its own.

    The step of the tensor goes by its largest channel, `max(seen)`, and meets all weights; that of weights by
    `max(read)`, and meets all channels: `max(seen)**2 * sum(read**2) + max(read)**2 * sum(seen**2)`, as all errors of a
    step are alike.
    """
    m, r = seen.astype(np.float64), read.astype(np.float64)
    return float(m.max() ** 2 * np.square(r).sum() + r.max() ** 2 * np.square(m).sum())


def smooth_norms(module: tvm.IRModule, factors: Mapping[str, Array]) -> tvm.IRModule:
    """The module, computing the same, with the layer norms of these names divided by factors for their linear readers.

    Raises CalibrationError for a name that is no such norm, and for factors that are not one above 0 a channel.
    """
    known = {str(var.name): ir.shape_of(var)[-1] for var in _linear_readers(module)} if factors else {}
    for name, values in factors.items():
        if len(values) != known.get(name) or not (values > 0).all():
            seen = f"{len(values)} numbers, the least {values.min(initial=np.inf):g}"
            expected = f"a number above 0 for each of the {known.get(name, 0)} channels of a layer norm of the model"
            raise CalibrationError(f"calibration table: smoothed {name!r}", expected=expected, seen=seen)
    if not factors:
        return module
    channels = Channels(with_twin_norms(module, factors))
    divided = {name: factors[norm] for norm in factors for name in (norm, _twin(norm))}
    chosen = {root: group for root, group in channels.groups.items() if len(group.makers) == 1}
    makers = {root: str(group.makers[0].name) for root, group in chosen.items()}
    return channels.rescaled({root: divided[name] for root, name in makers.items() if name in divided})


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


def channel_maxima(module: tvm.IRModule, samples: Samples, names: set[str]) -> dict[str, Array]:
    """max |x| of each channel (last axis) of the tensors `names`, over all samples."""
    found: dict[str, Array] = {}

    def watch(name: str, value: Array) -> None:
        here = np.abs(value.reshape(-1, value.shape[-1])).max(0)
        found[name] = np.maximum(found.get(name, 0.0), here)

    program = interpret.Program(module, names)
    for inputs in samples:
        program.run(inputs, watch)
    return found


def _linear_readers(module: tvm.IRModule) -> dict[Any, set[Any]]:
    """Layer norms that can be rescaled -> the linear layers that read them, where there are any."""
    values, readers = dict(ir.bindings(module)), ir.users(module)
    norms = [var for var, call in values.items() if is_scalable_norm(call)]
    found = {var: {reader for reader in readers.get(var, []) if is_linear(values.get(reader))} for var in norms}
    return {var: linear for var, linear in found.items() if linear}


def _twin(name: str) -> str:
    return f"{name}_smoothed"


def _read(channels: Channels, group: Group) -> Array:
    return np.asarray(np.max([channels.read_range(var) for var in group.readers], axis=0))


def _balanced(channels: Channels, group: Group, seen: Array, alpha: float) -> Array:
    return balanced(lambda _var: seen, _read(channels, group), group, alpha)
