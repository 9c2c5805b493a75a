"""Hidden units: what an activation function makes and linear layers alone read; they are divided, and some are copied.

    y = gelu(x @ v + b);  a = y @ w
      ->  y = gelu(x @ v[:, u] + b[u]);  y' = y * (1 / s)[u];  a = y' @ (w * s / n)[u]     u: all units, some n times

A unit that reaches far beyond all others, and is read by weights as large, as trained transformers have a few of,
leaves other units few steps, or, once it is divided, other weights. Each of its copies has one n-th of its weights:
R. Zhao et al., "Improving Neural Network Quantization without Retraining using Outlier Channel Splitting", ICML 2019.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvmq import ir
from tvmq.graph.fusion import ACTIVATIONS
from tvmq.quantize.channels import is_linear
from tvmq.quantize.least_noise import Division

Array = npt.NDArray[Any]


def hidden_units(module: tvm.IRModule) -> dict[Any, tuple[Any, ...]]:
    """Results of activation functions that linear layers alone read -> these."""
    values, readers = dict(ir.bindings(module)), ir.users(module)
    found = {}
    for var, call in values.items():
        if ir.is_call(call, *ACTIVATIONS) and ir.is_static(call) and ir.shape_of(call):
            reading = tuple(dict.fromkeys(readers.get(var, [])))
            if reading and all(is_linear(values.get(reader)) for reader in reading):
                found[var] = reading
    return found


def makers(module: tvm.IRModule) -> dict[Any, tuple[Any, ...]]:
    """Hidden units that may have copies -> the linear layer that makes them alone, then the addition of a bias, if any.

    Pruned weights keep their shape, which blocks of zeros fit.
    """
    values, readers = dict(ir.bindings(module)), ir.users(module)

    def maker(var: Any) -> tuple[Any, ...]:
        found = [values[var].args[0]]
        call: Any = values.get(found[0])
        if ir.is_call(call, "add") and ir.is_constant(call.args[1]):
            if ir.to_numpy(call.args[1]).shape != ir.shape_of(call)[-1:]:
                return ()
            found.insert(0, call.args[0])
        alone = all(ir.only_reader(readers, member) is not None for member in found)
        return tuple(found) if alone and is_linear(values.get(found[0])) else ()

    candidates = {var: (maker(var), reading) for var, reading in hidden_units(module).items()}
    return {
        var: found
        for var, (found, reading) in candidates.items()
        if found and not any(_is_pruned(ir.to_numpy(values[layer].args[1])) for layer in (found[0], *reading))
    }


def split(read: Array, units: Array, largest_integer: int) -> Array:
    """The weights [K, N] of `units`: each copy of one has its share of them, and some of a step more or less.

    So rounded to multiples of steps, which are a column's largest magnitude / `largest_integer`, the shares of n copies
    sum up to what rounding the whole gives: sum_i floor(x + i / n) = floor(n x) for i from 0 to n - 1.
    """
    counts = np.bincount(units)[units]
    shares = read[units] / counts[:, None].astype(np.float32)
    steps = np.abs(shares).max(axis=0) / np.float32(largest_integer)
    copy = np.array([int((units[:at] == unit).sum()) for at, unit in enumerate(units)])
    return np.asarray(shares + ((copy - (counts - 1) / 2) / counts).astype(np.float32)[:, None] * steps)


def read_by(module: tvm.IRModule, layers: Iterable[Any]) -> Array:
    """The weights [K, N] of linear layers side by side, in the order of their names."""
    values = dict(ir.bindings(module))
    ordered = sorted(layers, key=lambda layer: str(layer.name))
    return np.concatenate([ir.to_numpy(values[layer].args[1]) for layer in ordered], axis=1)


def multiplied(read: Array, factors: Array) -> Array:
    """The weights [K, N] that make up for inputs divided by factors [K]."""
    return read * factors[:, None].astype(np.float32)


def rescaled(module: tvm.IRModule, chosen: Mapping[str, Division], largest_integer: int) -> tvm.IRModule:
    """The module, computing the same, with hidden units of these names divided, and copied where that is chosen.

    Both is for their readers alone, which are linear layers. Only units of `makers` may have copies.
    largest_integer: of weights.
    """
    values, made_by = dict(ir.bindings(module)), makers(module)
    factors = {name: division.factors for name, division in chosen.items()}
    units: dict[Any, Array] = {
        var: np.array([*range(len(factors[name])), *chosen[name].copies])
        for var in hidden_units(module)
        if (name := str(var.name)) in chosen
    }
    twins: dict[Any, Any] = {}

    def twin(state: ir.Rewrite, var: Any) -> Any:
        """The hidden units that are taken, divided."""
        taken, new = units[var], state.new_of[var]
        if len(taken) > len(factors[str(var.name)]):
            new = state.new_of[values[made_by[var][0]].args[0]]
            for member in (*made_by[var], var):
                call = values[member]
                constants = [ir.constant(ir.to_numpy(arg)[..., taken]) for arg in call.args[1:]]
                new = state.emit(relax.Call(call.op, [new, *constants], call.attrs), str(member.name))
        shares = ir.constant((1.0 / factors[str(var.name)][taken]).astype(np.float32))
        return state.emit(relax.op.multiply(new, shares), f"{var.name}_smoothed")

    def visit(state: ir.Rewrite, _name: str, value: Any) -> Any:
        old = values[state.current]
        if not is_linear(old) or (var := old.args[0]) not in units:
            return None
        if var not in twins:
            twins[var] = twin(state, var)
        weight = split(multiplied(ir.to_numpy(old.args[1]), factors[str(var.name)]), units[var], largest_integer)
        return relax.Call(old.op, [twins[var], ir.constant(weight)], old.attrs)

    return ir.rewrite(module, visit) if units else module


def _is_pruned(weight: Array) -> bool:
    return bool(np.count_nonzero(weight) < 0.75 * weight.size)
