"""Bias correction: the mean error that quantization gives each output channel is taken off its bias.

    E[y_q - y] = sum over taps and inputs of w_q E[x_q] - w E[x]        with the means over all that a tap multiplies

empirical  x_q are the quantized inputs, in another pass over the data; sees clipping and rounding of inputs
analytic   x_q are the inputs themselves: the error that is due to weights alone, from means that came with the ranges

M. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.2 and
appendix D, with the means of calibration data. A sum of products is linear in both, so that means of inputs tell the
mean of results exactly, padding included, and no product of whole tensors is computed.
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
from tvmq.quantize.input_means import InputMeans
from tvmq.quantize.numerics import QParams

Array = npt.NDArray[Any]


def analytic_errors(chains: Sequence[Chain], weights: Mapping[Any, Array], means: InputMeans) -> dict[Any, Array]:
    """The mean error of each output channel that is due to weights, float64 [channels], by the anchors of `chains`.

    weights: the dequantized weight of each anchor. Layers whose inputs were not seen are left out.
    """
    errors = {}
    for chain in chains:
        if (mean := means.of(chain)) is not None:
            off = weights[chain.anchor].astype(np.float64) - ir.to_numpy(chain.call.args[1])
            errors[chain.anchor] = _products(tap_means(mean, chain.call), off, chain)
    return errors


def empirical_errors(
    module: tvm.IRModule,
    chains: Sequence[Chain],
    weights: Mapping[Any, Array],
    qparams: Mapping[Any, QParams],
    samples: Iterable[tuple[Array, ...]],
) -> dict[Any, Array]:
    """As `analytic_errors`, with what rounding and clipping of inputs adds.

    qparams: how what a layer reads is quantized. There are no errors without samples.
    """
    read = {str(chain.x.name): qparams[chain.x] for chain in chains}
    plain, met = InputMeans(chains), InputMeans(chains)

    def watch(name: str, value: Array) -> None:
        plain.see(name, value)
        met.see(name, _rounded(value, read[name]))

    program = interpret.Program(module, read)
    for inputs in samples:
        program.run(inputs, watch)
    errors = {}
    for chain in chains:
        wanted, seen = plain.of(chain), met.of(chain)
        if wanted is not None and seen is not None:
            weight = ir.to_numpy(chain.call.args[1])
            want = _products(tap_means(wanted, chain.call), weight, chain)
            errors[chain.anchor] = _products(tap_means(seen, chain.call), weights[chain.anchor], chain) - want
    return errors


def tap_means(x: Array, call: Any) -> Array:
    """The mean of what each tap of a weight multiplies, over all results, zeros of padding included.

    Float64 [1, 1, K] for a linear layer that reads x [.., K]; [kh, kw, C] for a convolution of NHWC x.
    """
    if ir.is_call(call, "matmul"):
        return np.asarray(x.reshape(-1, x.shape[-1]).mean(0, dtype=np.float64).reshape(1, 1, -1))
    a = call.attrs
    taps, results = ir.shape_of(call.args[1])[1:3], ir.shape_of(call)[1:3]
    picture = x.sum(axis=0, dtype=np.float64)
    rows, columns = (
        [
            _met(outside + tap * int(a.dilation[axis]), int(a.strides[axis]), results[axis], x.shape[1 + axis])
            for tap in range(taps[axis])
        ]
        for axis, outside in enumerate((-int(a.padding[0]), -int(a.padding[1])))
    )
    sums = [[strip[across].sum(axis=0) for across in columns] for strip in (picture[down].sum(axis=0) for down in rows)]
    return np.asarray(np.array(sums) / (x.shape[0] * results[0] * results[1]))


def _met(start: int, stride: int, count: int, extent: int) -> slice:
    """Those of `count` places from `start` on that lie within an axis; the others are padding."""
    end = start + stride * (count - 1) + 1
    return slice(start if start >= 0 else start % stride, max(0, min(extent, end)), stride)


def _products(means: Array, weight: Array, chain: Chain) -> Array:
    """The sum over taps and inputs of a weight times the means of what it multiplies: float64 [channels]."""
    if chain.kind == "matmul":
        return np.asarray(means.reshape(-1) @ weight.astype(np.float64))
    groups = int(chain.call.attrs.groups)
    by_group = weight.astype(np.float64).reshape(groups, -1, *weight.shape[1:])
    parts = np.einsum("gohwi,hwgi->go", by_group, means.reshape(*means.shape[:2], groups, -1))
    return np.asarray(parts.reshape(-1))


def _rounded(x: Array, params: QParams) -> Array:
    """What the integers of x stand for."""
    q = numerics.quantize(x, params.scale, params.zero_point, qmin=params.qmin, qmax=params.qmax)
    return numerics.dequantize(q, params.scale, params.zero_point)


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
