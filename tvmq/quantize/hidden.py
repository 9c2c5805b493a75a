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

Array = npt.NDArray[Any]
# One copy for so many units: products cost one percent more at most.
UNITS = 128
# Copies are made where they leave less than this share of the squares of weights' steps: it is a few layers that gain.
WORTH = 0.5


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


def copied(read: Array) -> Array:
    """The units [K] of weights [K, N], then again those that get copies, where these are worth it, in order.

    Each copy is of the unit whose weights are the largest then.
    """
    units = np.arange(len(read))
    largest, counts = np.abs(read).max(axis=1), np.ones(len(read))
    chosen = []
    for _ in range(len(read) // UNITS):
        chosen.append(int((largest / counts).argmax()))
        counts[chosen[-1]] += 1
    extended = np.append(units, np.sort(np.array(chosen, units.dtype)))
    before, after = (np.square(np.abs(w).max(axis=0), dtype=np.float64).sum() for w in (read, split(read, extended)))
    return extended if after < WORTH * before else units


def split(read: Array, units: Array) -> Array:
    """The weights [K, N] of `units`: each copy of one has its share of them."""
    return np.asarray(read[units] / np.bincount(units)[units, None].astype(np.float32))


def joined(weights: Array, units: Array) -> Array:
    """The weights [K, N] that those of copies amount to."""
    whole = weights[: int(units.max()) + 1].copy()
    np.add.at(whole, units[len(whole) :], weights[len(whole) :])
    return whole


def read_by(module: tvm.IRModule, layers: Iterable[Any]) -> Array:
    """The weights [K, N] of linear layers side by side, in the order of their names."""
    values = dict(ir.bindings(module))
    ordered = sorted(layers, key=lambda layer: str(layer.name))
    return np.concatenate([ir.to_numpy(values[layer].args[1]) for layer in ordered], axis=1)


def multiplied(read: Array, factors: Array) -> Array:
    """The weights [K, N] that make up for inputs divided by factors [K]."""
    return read * factors[:, None].astype(np.float32)


def rescaled(module: tvm.IRModule, factors: Mapping[str, Array], *, copies: bool) -> tvm.IRModule:
    """The module, computing the same, with hidden units of these names divided by factors, and copied where `copies`.

    Both is for their readers alone, which are linear layers.
    """
    values, made_by = dict(ir.bindings(module)), makers(module) if copies else {}
    units: dict[Any, Array] = {}
    for var, readers in hidden_units(module).items():
        if (name := str(var.name)) in factors:
            weights = multiplied(read_by(module, readers), factors[name])
            units[var] = copied(weights) if var in made_by else np.arange(len(weights))
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
        weight = split(multiplied(ir.to_numpy(old.args[1]), factors[str(var.name)]), units[var])
        return relax.Call(old.op, [twins[var], ir.constant(weight)], old.attrs)

    return ir.rewrite(module, visit) if units else module


def _is_pruned(weight: Array) -> bool:
    return bool(np.count_nonzero(weight) < 0.75 * weight.size)
