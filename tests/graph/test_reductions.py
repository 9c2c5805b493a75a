"""Means and sums over the last axes keep them; who computes them from floats, and from integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.ir import assert_structural_equal

from tvmq import ir
from tvmq.graph.fusion import find_chains
from tvmq.graph.reductions import keep_last, terms
from tvmq.oracle import interpret
from tvmq.quantize.realize import realize

SHAPE = (2, 3, 4, 5)
X = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
op = relax.op


def _reduced(reduce: Callable, axis: object, *, keepdims: bool = False) -> Callable:
    return lambda emit, x: (emit(reduce(x, axis, keepdims), "y"),)


def _kept(reduce: Callable, axis: object, shape: tuple[int, ...]) -> Callable:
    def build(emit: Callable, x: object) -> tuple[object]:
        return (emit(op.reshape(emit(reduce(x, axis, True), "y_kept"), shape), "y"),)

    return build


@pytest.mark.parametrize(
    ("reduce", "axis", "shape"),
    [(op.mean, [-1], (2, 3, 4)), (op.sum, [3, 1, 2], (2,)), (op.mean, None, ())],
)
def test_the_last_axes_are_kept(graph, reduce: Callable, axis: object, shape: tuple[int, ...]) -> None:
    module = keep_last(graph(_reduced(reduce, axis), SHAPE))
    assert_structural_equal(module, graph(_kept(reduce, axis, shape), SHAPE))
    assert [chain.kind for chain in find_chains(module)] == ["avg_pool2d"]


@pytest.mark.parametrize(
    ("reduce", "axis", "keepdims"),
    [(op.mean, [3], True), (op.mean, [1, 3], False), (op.max, [3], False), (op.sum, [2], False)],
)
def test_declines(graph, reduce: Callable, axis: list[int], keepdims: bool) -> None:
    module = graph(_reduced(reduce, axis, keepdims=keepdims), SHAPE)
    assert_structural_equal(keep_last(module), module)


def test_an_epilogue_without_a_channel_axis_is_none(graph) -> None:
    assert not find_chains(graph(_reduced(op.mean, [3]), SHAPE))


def _through(dtype: str, reduce: Callable, axis: list[int]) -> Callable:
    """The reduction of what was stored as `dtype`, limited, as floats."""

    def build(emit: Callable, x: object) -> tuple[object]:
        if dtype == "int8":
            zero = relax.const(-9, "int8")
            q = emit(op.quantize(x, relax.const(0.03, "float32"), zero, axis=-1, out_dtype="int8"), "q")
            read = emit(op.dequantize(q, relax.const(0.03, "float32"), zero, axis=-1), "read")
        elif dtype == "bfloat16":
            read = emit(op.astype(emit(op.astype(x, dtype), "half"), "float32"), "read")
        else:
            read = x
        return (emit(op.nn.relu(emit(reduce(read, axis, True), "y")), "z"),)

    return build


def _kinds(module: tvm.IRModule) -> list[str]:
    return [ir.op_name(call) for _, call in ir.calls(module) if ir.is_call(call, "tvmq.avg_pool2d", "mean", "sum")]


@pytest.mark.parametrize("axis", [[3], [2, 3], [1]])
@pytest.mark.parametrize("reduce", [op.mean, op.sum])
@pytest.mark.parametrize("dtype", ["int8", "bfloat16", "float32"])
def test_kernels_reduce_what_is_stored(graph, dtype: str, reduce: Callable, axis: list[int]) -> None:
    module = graph(_through(dtype, reduce, axis), SHAPE)
    realized = realize(module)
    name = "mean" if reduce is op.mean else "sum"
    tvm_does = dtype == "float32" and not (name == "mean" and axis == [1])
    assert _kinds(realized) == ([name] if tvm_does else ["tvmq.avg_pool2d"])
    want, got = (interpret.run(m, [X])[0] for m in (module, realized))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_sum_is_as_many_averages_as_it_has_elements(graph) -> None:
    for reduce, count in ((op.sum, 20), (op.mean, 1)):
        ((_, call),) = ir.calls(graph(_reduced(reduce, [2, 3]), SHAPE))
        assert terms(call) == count
