"""SmoothQuant: outlying channels of activations are divided down, and the weights that read them multiplied up.

s = max |x|**alpha / max |w|**(1 - alpha) a channel: G. Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training
Quantization for Large Language Models", ICML 2023, equation 4. The division goes into the layer norm or the layer that
makes the activation. A layer norm whose result is also read by others, as by the residual addition after it in a
post-norm transformer, gets a twin for its linear readers alone: the others read what they read before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvmq import ir
from tvmq.oracle import interpret
from tvmq.quantize.channels import Channels, balanced, is_linear, is_scalable_norm

Array = npt.NDArray[Any]


def smooth(module: tvm.IRModule, samples: Iterable[tuple[Array, ...]], alpha: float) -> tvm.IRModule:
    """The module, computing the same, smoothed over the activations that `samples` (inputs of inferences) give."""
    module = with_twin_norms(module)
    channels = Channels(module)
    largest = channel_maxima(module, samples, {str(var.name) for g in channels.groups.values() for var in g.read})
    factors: dict[Any, Any] = {}
    for root, group in channels.groups.items():
        read = np.max([channels.read_range(var) for var in group.readers], axis=0)
        seen = np.max([largest[str(var.name)] for var in group.read], axis=0)
        factors[root] = balanced(lambda _var, seen=seen: seen, read, group, alpha)  # type: ignore[misc]
    return channels.rescaled(factors)


def with_twin_norms(module: tvm.IRModule) -> tvm.IRModule:
    """Layer norms that linear layers and others read, twice: once for the linear layers, once for the others.

    y = norm(x);  a = y @ w;  b = y + z   ->   y = norm(x);  y' = norm(x);  a = y' @ w;  b = y + z
    """
    values, readers = dict(ir.bindings(module)), ir.users(module)
    linear: dict[Any, set[Any]] = {}
    for var, call in values.items():
        if is_scalable_norm(call):
            found = {reader for reader in readers.get(var, []) if is_linear(values.get(reader))}
            if found and len(found) < len(set(readers[var])):
                linear[var] = found
    readers_of_twins = {reader: values[reader].args[0] for found in linear.values() for reader in found}
    twins: dict[Any, Any] = {}

    def visit(state: ir.Rewrite, name: str, value: Any) -> Any:
        if state.current in linear:
            twins[state.current] = state.emit(value, f"{name}_smoothed")
        elif state.current in readers_of_twins:
            return relax.Call(value.op, [twins[readers_of_twins[state.current]], *value.args[1:]], value.attrs)
        return None

    return ir.rewrite(module, visit) if linear else module


def channel_maxima(module: tvm.IRModule, samples: Iterable[tuple[Array, ...]], names: set[str]) -> dict[str, Array]:
    """max |x| of each channel (last axis) of the tensors `names`, over all samples."""
    found: dict[str, Array] = {}

    def watch(name: str, value: Array) -> None:
        here = np.abs(value.reshape(-1, value.shape[-1])).max(0)
        found[name] = np.maximum(found.get(name, 0.0), here)

    program = interpret.Program(module, names)
    for inputs in samples:
        program.run(inputs, watch)
    return found
