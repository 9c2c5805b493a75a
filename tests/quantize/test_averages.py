"""Averages that round what they read, where a tensor is needed as floats too."""

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relax

from tvmq import ir, ops
from tvmq.deploy.exact import is_exact_graph
from tvmq.oracle import interpret
from tvmq.quantize import averages
from tvmq.quantize.realize import realize

SHAPE = (2, 6, 4, 5)
X = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32) * 3
op = relax.op


def _pair(emit: Callable, x: object, name: str, back: float = 0.03) -> tuple[object, object]:
    zero = relax.const(-9, "int8")
    q = emit(op.quantize(x, relax.const(0.03, "float32"), zero, axis=-1, out_dtype="int8"), f"{name}_q")
    return q, emit(op.dequantize(q, relax.const(back, "float32"), zero, axis=-1), name)


def _excited(also: str = "", size: tuple[int, int] = (1, 1), back: float = 0.03) -> Callable:
    """A squeeze-and-excite block whose product reads floats: `also` what reads the integers besides."""

    def build(emit: Callable, x: object) -> object:
        y = emit(op.nn.gelu(x), "y")
        q, read = _pair(emit, y, "read", back)
        pooled = emit(op.nn.adaptive_avg_pool2d(read, size, layout="NHWC", out_layout="NHWC"), "pooled")
        outputs = [_pair(emit, pooled, "squeezed")[1], emit(op.exp(y), "floats")]
        if also:
            outputs.append(emit(op.sigmoid(read) if also == "map" else op.astype(q, "int32"), "other"))
        return tuple(outputs)

    return build


def _average(module: tvm.IRModule) -> object:
    (call,) = (call for _, call in ir.calls(module) if "avg_pool2d" in ir.op_name(call))
    return call


@pytest.mark.parametrize("storage", ["int8", "uint8"])
def test_the_average_is_that_of_integers(graph, storage: str) -> None:
    rounded, stored = (realize(graph(_excited(also), SHAPE), storage) for also in ("", "map"))
    assert ir.dtype_of(_average(rounded).args[0]) == "float32" and ir.dtype_of(_average(stored).args[0]) == storage
    assert ops.read_steps(_average(rounded))[1] == ops.Round(-119, 136) and not ops.read_steps(_average(stored))
    assert sum(ir.is_call(call, "tvmq.map") for _, call in ir.calls(rounded)) == 1  # gelu
    value, expected = interpret.run(rounded, [X])[0], interpret.run(stored, [X])[0]
    np.testing.assert_array_equal(value, expected)
    assert len(np.unique(value)) > 4


@pytest.mark.parametrize(
    "body", [_excited("map"), _excited("integers"), _excited(size=(4, 4)), _excited(back=0.04)], ids=range(4)
)
def test_declines(graph, body: Callable) -> None:
    """Other readers, windows of several sizes, another scale after than before."""
    module = graph(body, SHAPE)
    realized = realize(module)
    assert ir.dtype_of(_average(realized).args[0]) == "int8"
    for value, expected in zip(interpret.run(realized, [X]), interpret.run(module, [X]), strict=True):
        np.testing.assert_allclose(value, expected, atol=0.031)


def test_sums_that_floats_do_not_hold(graph, monkeypatch) -> None:
    monkeypatch.setattr(averages, "MOST_ROUNDED", 23)
    assert ir.dtype_of(_average(realize(graph(_excited(), SHAPE))).args[0]) == "int8"


def test_such_averages_are_exact(graph) -> None:
    def build(emit: Callable, x: object) -> object:
        y = emit(op.nn.relu(x), "y")
        _, read = _pair(emit, y, "read")
        pooled = emit(op.nn.adaptive_avg_pool2d(read, (1, 1), layout="NHWC", out_layout="NHWC"), "pooled")
        return pooled, emit(op.reshape(y, (2, 120)), "floats")

    assert is_exact_graph(realize(graph(build, SHAPE)))
