"""Pairs of a quantize and its dequantize inside of chains: which are taken in, and that they stay what they were."""

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relax

from tvmq import ir, ops
from tvmq.graph.fusion import AddBias, AddTensor, Apply, Limit, find_chains
from tvmq.graph.pairs import Rounded, without_repeats
from tvmq.kernels.task import task_of
from tvmq.oracle import interpret
from tvmq.quantize.decisions import source_decisions
from tvmq.quantize.realize import realize
from tvmq.recipe_values import Precision

SHAPE = (1, 4, 5, 4)
RNG = np.random.default_rng(0)
WEIGHT = RNG.integers(-127, 128, (4, 1, 1, 4)).astype(np.int8)
SCALES = (RNG.random(4) * 0.01 + 0.005).astype(np.float32)
BIAS = RNG.standard_normal(4).astype(np.float32)
X = RNG.standard_normal(SHAPE).astype(np.float32)
op = relax.op
Emit = Callable[[object, str], object]


def _pair(emit: Emit, x: object, name: str, scale: float = 0.05, zero: int = 7, back: float | None = None) -> object:
    """`x` through integers."""
    q = emit(_quantize(x, scale, zero), f"{name}_q")
    return emit(_dequantize(q, scale if back is None else back, zero), name)


def _quantize(x: object, scale: float, zero: int) -> object:
    return op.quantize(x, relax.const(scale, "float32"), relax.const(zero, "int8"), axis=-1, out_dtype="int8")


def _dequantize(q: object, scale: float, zero: int) -> object:
    return op.dequantize(q, relax.const(scale, "float32"), relax.const(zero, "int8"), axis=-1)


def _conv(emit: Emit, x: object, name: str, zeros: int | None = 0) -> object:
    """A convolution of integers, with a bias; zeros: None for a weight of floats."""
    if zeros is None:
        weight = relax.const(WEIGHT * SCALES.reshape(4, 1, 1, 1))
    else:
        parts = [relax.const(part) for part in (WEIGHT, SCALES, np.full(4, zeros, np.int8))]
        weight = emit(op.dequantize(*parts, axis=0), f"{name}_weight")
    y = op.nn.conv2d(x, weight, data_layout="NHWC", kernel_layout="OHWI", out_layout="NHWC")
    return emit(op.add(emit(y, f"{name}_sum"), relax.const(BIAS)), name)


def _residual(emit: Emit, x: object) -> object:
    """What XNNPACK's quantizer makes of a residual block: the sum's operand is rounded before."""
    d = _pair(emit, x, "d", 0.02, -3)
    c = _pair(emit, _conv(emit, d, "conv"), "rounded", 0.03, 11)
    a = emit(op.nn.relu(emit(op.add(c, d), "a")), "r")
    return _pair(emit, a, "y", 0.04, -20)


def _chains(module: tvm.IRModule) -> dict[str, list[type]]:
    return {str(chain.end.name): [type(follower) for follower in chain.followers] for chain in find_chains(module)}


def _kinds(module: tvm.IRModule) -> list[str]:
    return [ir.op_name(call).removeprefix("tvmq.") for _, call in ir.calls(module)]


def test_a_chain_goes_on_beyond_integers(graph) -> None:
    module = graph(_residual, SHAPE)
    assert _chains(module) == {"y": [AddBias, Rounded, AddTensor, Limit, Rounded]}
    (chain,) = find_chains(module)
    assert chain.followers[1] == Rounded(np.float32(0.03), 11, "int8")
    assert _kinds(realize(module)) == ["map", "conv2d"]


@pytest.mark.parametrize("storage", ["int8", "uint8"])
def test_the_integers_are_those_of_two_kernels(graph, storage: str) -> None:
    """Where somebody else reads what is between, it is stored; the sum is the same, bit for bit."""

    def apart(emit: Emit, x: object) -> object:
        d = _pair(emit, x, "d", 0.02, -3)
        q = emit(_quantize(_conv(emit, d, "conv"), 0.03, 11), "q")
        a = emit(op.nn.relu(emit(op.add(emit(_dequantize(q, 0.03, 11), "c"), d), "a")), "r")
        return _pair(emit, a, "y", 0.04, -20), emit(_dequantize(q, 0.03, 11), "other")

    together, both = (realize(graph(body, SHAPE), storage) for body in (_residual, apart))
    assert len(_kinds(both)) == len(_kinds(together)) + 2
    (y,) = interpret.run(together, [X])
    np.testing.assert_array_equal(y, interpret.run(both, [X])[0])
    simulated = interpret.run(graph(_residual, SHAPE), [X])[0]
    assert np.abs(y - simulated).max() <= 0.0401 and (y == simulated).mean() > 0.95
    assert len(np.unique(y)) > 20


def test_kernels_are_tuned_as_without(graph) -> None:
    def plain(emit: Emit, x: object) -> object:
        d = _pair(emit, x, "d", 0.02, -3)
        a = emit(op.nn.relu(emit(op.add(_conv(emit, d, "conv"), d), "a")), "r")
        return _pair(emit, a, "y", 0.04, -20)

    rounded, other = (
        next(call for _, call in ir.calls(realize(graph(body, SHAPE))) if ir.is_call(call, "tvmq.conv2d"))
        for body in (_residual, plain)
    )
    assert any(isinstance(step, ops.Round) for step in ops.epilogue_of(rounded))
    assert task_of(rounded) == task_of(other)


@pytest.mark.parametrize(
    ("activate", "follower"),
    [(op.nn.gelu, Apply), (lambda x: op.clip(x, -0.5, 0.5), Limit), (lambda x: op.add(x, relax.const(BIAS)), AddBias)],
)
def test_what_follows_is_computed_on_what_was_rounded(graph, activate: Callable, follower: type) -> None:
    def build(emit: Emit, x: object) -> object:
        c = _pair(emit, _conv(emit, _pair(emit, x, "d", 0.02, -3), "conv"), "rounded", 0.1, 3)
        return emit(activate(c), "y")

    module = graph(build, SHAPE)
    assert _chains(module) == {"y": [AddBias, Rounded, follower]}
    assert _kinds(realize(module)) == ["map", "conv2d"]
    np.testing.assert_allclose(interpret.run(realize(module), [X])[0], interpret.run(module, [X])[0], atol=1e-6)


def test_what_only_floats_read_is_stored_as_floats(graph) -> None:
    def build(emit: Emit, x: object) -> object:
        c = _pair(emit, _conv(emit, _pair(emit, x, "d", 0.02, -3), "conv"), "rounded", 0.1, 3)
        return emit(op.exp(emit(op.reshape(c, (20, 4)), "moved")), "y")

    module = graph(build, SHAPE)
    realized = realize(module)
    assert _kinds(realized) == ["map", "conv2d", "reshape", "exp"]
    (steps,) = (ops.epilogue_of(call) for _, call in ir.calls(realized) if ir.is_call(call, "tvmq.conv2d"))
    assert steps[-2:] == (ops.Round(-131, 124), ops.Multiply(float(np.float32(0.1))))
    np.testing.assert_allclose(interpret.run(realized, [X])[0], interpret.run(module, [X])[0], rtol=1e-6)
    assert [(d.name, d.precision) for d in source_decisions(module) if d.kind == "conv2d"] == [
        ("rounded", Precision.INT8)
    ]


def test_integers_that_a_layer_norm_reads_are_stored(graph) -> None:
    def build(emit: Emit, x: object) -> object:
        c = _pair(emit, _conv(emit, _pair(emit, x, "d", 0.02, -3), "conv"), "rounded", 0.1, 3)
        return emit(op.nn.layer_norm(c, relax.const(SCALES), relax.const(BIAS), axes=[-1]), "y")

    assert _kinds(realize(graph(build, SHAPE))) == ["map", "conv2d", "layer_norm"]
    assert _chains(graph(build, SHAPE))["conv"] == [AddBias]


def test_a_change_of_scale_is_part_of_the_kernel_before(graph) -> None:
    def build(emit: Emit, x: object) -> object:
        c = _pair(emit, _conv(emit, _pair(emit, x, "d", 0.02, -3), "conv"), "rounded", 0.1, 3)
        return _pair(emit, c, "y", 0.15, 0)

    realized = realize(graph(build, SHAPE))
    assert _kinds(realized) == ["map", "conv2d"]
    np.testing.assert_array_equal(interpret.run(realized, [X])[0], interpret.run(graph(build, SHAPE), [X])[0])


def test_a_sum_belongs_to_the_convolution_that_is_not_rounded(graph) -> None:
    """As X86's quantizer writes a block with a shortcut: else the other convolution would have to store floats."""

    def build(emit: Emit, x: object) -> object:
        d = _pair(emit, x, "d", 0.02, -3)
        plain = _conv(emit, d, "plain")
        rounded = _pair(emit, _conv(emit, d, "conv"), "rounded", 0.03, 11)
        return _pair(emit, emit(op.add(plain, rounded), "a"), "y", 0.04, -20)

    module = graph(build, SHAPE)
    assert _chains(module) == {"y": [AddBias, AddTensor, Rounded], "conv": [AddBias]}
    assert _kinds(realize(module)) == ["map", "conv2d", "conv2d"]


@pytest.mark.parametrize("difference", ["scale", "zeros", "floats", "reader"])
def test_declines(graph, difference: str) -> None:
    """Another scale after than before, weights that no integer kernel reads, sums of floats, another reader."""

    def build(emit: Emit, x: object) -> object:
        d = _pair(emit, x, "d", 0.02, -3)
        conv = _conv(emit, d, "conv", zeros={"zeros": 1, "floats": None}.get(difference, 0))
        c = _pair(emit, conv, "c", 0.05, 7, 0.06 if difference == "scale" else None)
        y = emit(op.nn.relu(c), "y")
        return (y, c) if difference == "reader" else y

    module = graph(build, SHAPE)
    assert _chains(module) == {"conv": [AddBias], "y": [Limit]}
    for value, expected in zip(interpret.run(realize(module), [X]), interpret.run(module, [X]), strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-5)


@pytest.mark.parametrize(("scale", "last", "count"), [(0.05, "exp", 1), (0.06, "exp", 2), (0.05, "conv", 2)])
def test_what_only_moves_is_quantized_once(graph, scale: float, last: str, count: int) -> None:
    def build(emit: Emit, x: object) -> object:
        moved = emit(op.permute_dims(_pair(emit, x, "d"), (0, 2, 1, 3)), "moved")
        y = _pair(emit, moved, "again", scale)
        return emit(op.exp(y), "y") if last == "exp" else _conv(emit, y, "y")

    module = graph(build, SHAPE)
    after = without_repeats(module)
    assert sum(ir.is_call(call, "quantize") for _, call in ir.calls(after)) == count
    np.testing.assert_array_equal(interpret.run(after, [X])[0], interpret.run(module, [X])[0])


def test_repeats_of_repeats(graph) -> None:
    def build(emit: Emit, x: object) -> object:
        y = _pair(emit, x, "d")
        for index in range(3):
            y = _pair(emit, emit(op.permute_dims(y, (0, 2, 1, 3)), f"moved{index}"), f"again{index}")
        return emit(op.exp(y), "y")

    after = without_repeats(graph(build, SHAPE))
    assert _kinds(after) == ["quantize", "dequantize", *["permute_dims"] * 3, "exp"]


@pytest.mark.parametrize("storage", ["int8", "uint8"])
def test_constants_that_are_added_are_stored_as_integers(graph, storage: str) -> None:
    """As XNNPACK's quantizer writes positions that are added to patches."""
    positions = RNG.integers(-128, 128, SHAPE).astype(np.int8)

    def build(emit: Emit, x: object) -> object:
        constant = emit(_dequantize(relax.const(positions), 0.03, 5), "positions")
        a = emit(op.add(_pair(emit, x, "d", 0.02, -3), constant), "a")
        return _pair(emit, a, "y", 0.05, 2), emit(op.exp(constant), "floats")

    module = graph(build, SHAPE)
    realized = realize(module, storage)
    assert _kinds(realized) == ["map", "map", "exp"]
    added = [call for _, call in ir.calls(realized) if len(call.args) == 2]
    assert [ir.dtype_of(call.args[1]) for call in added] == [storage] and ir.is_constant(added[0].args[1])
    for value, expected in zip(interpret.run(realized, [X]), interpret.run(module, [X]), strict=True):
        np.testing.assert_allclose(value, expected, atol=0.0501)
