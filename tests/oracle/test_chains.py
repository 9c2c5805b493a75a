"""Float convolutions with what follows them as one step of a program."""

import numpy as np
import pytest
import torch
from tvm import relax

from tvmq import ir
from tvmq.graph.fusion import find_chains
from tvmq.oracle.interpret import Program

op = relax.op
RNG = np.random.default_rng(0)
SHAPE = (1, 7, 5, 8)


def _const(*shape: int):
    return relax.const(RNG.standard_normal(shape).astype(np.float32))


def _conv(x, padding=(1, 1, 1, 1), groups: int = 1, kernel: int = 3, stride: int = 1):
    weight = _const(8, kernel, kernel, 8 // groups)
    return op.nn.conv2d(x, weight, (stride, stride), padding, (1, 1), groups, "NHWC", "OHWI", "NHWC")


def _after(emit, x, *functions):
    for index, function in enumerate(functions):
        x = emit(function(x), f"v{index}")
    return x


def _bias(x):
    return op.add(x, _const(8))


# What is written one by one -> the variables that steps compute.
PROGRAMS = {
    "bias": (lambda emit, x: _after(emit, x, _conv, _bias), ["v1"]),
    "bias, relu": (lambda emit, x: _after(emit, x, _conv, _bias, op.nn.relu), ["v2"]),
    "bias, clip": (lambda emit, x: _after(emit, x, _conv, _bias, lambda y: op.clip(y, -0.5, 1)), ["v2"]),
    "bias, tensor, relu": (
        lambda emit, x: _after(emit, x, _conv, _bias, lambda y: op.add(x, y), op.nn.relu),
        ["v3"],
    ),
    "a clip of a sum": (
        lambda emit, x: _after(emit, x, _conv, lambda y: op.add(x, y), lambda y: op.clip(y, 0, 1)),
        ["v1", "v2"],
    ),
    "stride, no padding": (lambda emit, x: _after(emit, x, lambda y: _conv(y, (0, 0, 0, 0), stride=2), _bias), ["v1"]),
    "depthwise, pointwise": (
        lambda emit, x: _after(emit, x, lambda y: _conv(y, groups=8), op.nn.relu, lambda y: _conv(y, (0,) * 4, 1, 1)),
        ["v1", "v2"],
    ),
    "a tensor, then a bias": (lambda emit, x: _after(emit, x, _conv, lambda y: op.add(x, y), _bias), ["v1", "v2"]),
    "a difference": (lambda emit, x: _after(emit, x, _conv, lambda y: op.subtract(y, x)), ["v0", "v1"]),
    "an open side": (lambda emit, x: _after(emit, x, _conv, lambda y: op.clip(y, 1, float("inf"))), ["v0", "v1"]),
    "two limits": (lambda emit, x: _after(emit, x, _conv, op.nn.relu, lambda y: op.clip(y, 0, 1)), ["v1", "v2"]),
    "uneven padding": (lambda emit, x: _after(emit, x, lambda y: _conv(y, (0, 0, 1, 1)), _bias), ["v0", "v1"]),
    "two readers": (lambda emit, x: _after(emit, x, _conv, lambda y: op.add(y, y)), ["v0", "v1"]),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_steps_and_results(graph, name: str):
    body, steps = PROGRAMS[name]
    module = graph(body, SHAPE)
    x = RNG.standard_normal(SHAPE).astype(np.float32)
    fused = Program(module, frozenset())
    assert [step.name for step in fused.steps if step.name != "x0"][: len(steps)] == steps
    (expected,), (got,) = Program(module).run([x]), fused.run([x])
    assert got.flags.c_contiguous and (got.shape, got.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_sum_waits_for_the_tensor_that_is_added(graph):
    def body(emit, x):
        first, late = emit(_conv(x), "first"), emit(op.negative(x), "late")
        return emit(op.nn.relu(emit(op.add(first, late), "sum")), "end")

    module = graph(body, SHAPE)
    fused = Program(module, frozenset())
    assert [step.name for step in fused.steps][:2] == ["late", "end"]
    x = RNG.standard_normal(SHAPE).astype(np.float32)
    np.testing.assert_allclose(fused.run([x])[0], Program(module).run([x])[0], rtol=1e-5, atol=1e-5)


def test_a_tensor_that_is_watched_ends_its_step(graph):
    module = graph(lambda emit, x: _after(emit, x, _conv, _bias, op.nn.relu), SHAPE)
    seen: dict[str, np.ndarray] = {}
    program = Program(module, {"v1"})
    assert [step.name for step in program.steps][:2] == ["v1", "v2"]
    result = program.run([np.ones(SHAPE, np.float32)], lambda name, value: seen.update({name: value}))
    assert list(seen) == ["v1"] and (seen["v1"] < 0).any()
    assert (result[0] == np.maximum(seen["v1"], 0)).all()


def test_without_onednn_nothing_is_fused(graph, monkeypatch: pytest.MonkeyPatch):
    module = graph(lambda emit, x: _after(emit, x, _conv, _bias), SHAPE)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert [step.name for step in Program(module, frozenset()).steps][:2] == ["v0", "v1"]


def test_models_compute_the_same_at_the_ends_of_chains(any_case):
    watched = {str(chain.end.name) for chain in find_chains(any_case.module)}
    expected: dict[str, np.ndarray] = {}
    Program(any_case.module).run(any_case.inputs, lambda name, value: expected.update({name: value.copy()}))
    seen: dict[str, np.ndarray] = {}
    Program(any_case.module, watched).run(any_case.inputs, lambda name, value: seen.update({name: value.copy()}))
    assert set(seen) == watched & {str(var.name) for var, _ in ir.bindings(any_case.module)} & set(expected)
    for name, value in seen.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
