"""Bias correction: the mean error that quantization gives each output channel is taken off its bias.

analytic   E[y_q - y] = sum over inputs of (w_q - w) E[x]: M. Nagel et al., "Data-Free Quantization Through Weight
           Equalization and Bias Correction", ICCV 2019, section 4.2, with the means of calibration data
empirical  the mean of y_q - y itself, y_q from quantized inputs too; sees padding and clipping (ibid., appendix D)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax

from tvmq import ir
from tvmq.graph.fusion import AddBias, Chain
from tvmq.oracle import interpret
from tvmq.quantize import numerics
from tvmq.quantize.numerics import QParams

Array = npt.NDArray[Any]


def mean_errors(
    module: tvm.IRModule,
    chains: Sequence[Chain],
    weights: Mapping[Any, Array],
    qparams: Mapping[Any, QParams],
    samples: Iterable[tuple[Array, ...]],
    *,
    empirical: bool,
) -> dict[Any, Array]:
    """The mean error of each output channel of the anchors in `chains`, float64 [channels], by anchor.

    weights: the dequantized weight of each anchor; qparams: how what it reads is quantized.
    """
    by_tensor: dict[str, list[Chain]] = {}
    for chain in chains:
        by_tensor.setdefault(str(chain.x.name), []).append(chain)
    totals: dict[Any, Array] = {}
    count = 0

    def watch(name: str, value: Array) -> None:
        for chain in by_tensor[name]:
            if empirical:
                found = _difference(chain, value, weights[chain.anchor], qparams[chain.x])
            else:
                found = value.reshape(-1, value.shape[-1]).mean(0, dtype=np.float64)
            totals[chain.anchor] = totals.get(chain.anchor, 0.0) + found

    program = interpret.Program(module, by_tensor)
    for inputs in samples:
        program.run(inputs, watch)
        count += 1
    means = {anchor: total / count for anchor, total in totals.items()}
    if empirical:
        return means
    return {c.anchor: _propagated(c, weights[c.anchor], means[c.anchor]) for c in chains if c.anchor in means}


def corrected(module: tvm.IRModule, chains: Sequence[Chain], errors: Mapping[Any, Array]) -> tvm.IRModule:
    """The module with `errors` taken off the biases of anchors; those without a bias get one. Names stay."""
    biased = {chain.members[1]: chain for chain in chains if _has_bias(chain)}
    plain = {chain.anchor: chain for chain in chains if not _has_bias(chain)}

    def visit(state: ir.Rewrite, name: str, value: Any) -> Any:
        old = state.current
        if old in plain and old in errors:
            return relax.op.add(state.emit(value, f"{name}_sum"), ir.constant((-errors[old]).astype(np.float32)))
        if old not in biased or biased[old].anchor not in errors:
            return None
        bias, error = biased[old].followers[0], errors[biased[old].anchor]
        assert isinstance(bias, AddBias)
        x = value.args[1] if ir.is_constant(value.args[0]) else value.args[0]
        return relax.op.add(x, ir.constant((bias.value - error).astype(np.float32)))

    return ir.rewrite(module, visit)


def _has_bias(chain: Chain) -> bool:
    return bool(chain.followers) and isinstance(chain.followers[0], AddBias)


def _difference(chain: Chain, x: Array, weight: Array, params: QParams) -> Array:
    """The mean of y_q - y over all but channels."""
    call = chain.call
    rounded = numerics.quantize(x, params.scale, params.zero_point, qmin=params.qmin, qmax=params.qmax)
    seen = numerics.dequantize(rounded, params.scale, params.zero_point)
    quantized = relax.Call(call.op, [call.args[0], ir.constant(weight)], call.attrs, call.ty_args)
    quantized = relax.BlockBuilder().normalize(quantized)
    error = interpret.evaluate(quantized, {call.args[0]: seen}) - interpret.evaluate(call, {call.args[0]: x})
    return np.asarray(error.reshape(-1, error.shape[-1]).mean(0, dtype=np.float64))


def _propagated(chain: Chain, weight: Array, mean: Array) -> Array:
    error = weight.astype(np.float64) - ir.to_numpy(chain.call.args[1])
    if chain.kind == "matmul":
        return np.asarray(mean @ error)
    taps = error.sum(axis=(1, 2))  # [O, I / groups]
    groups = int(chain.call.attrs.groups)
    inputs = np.repeat(mean.reshape(groups, -1), len(taps) // groups, axis=0)
    return np.asarray((taps * inputs).sum(axis=1))
