"""Canonical form: what each stage rewrites, and when it declines."""

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from tvm import relax

from tvmq import ir
from tvmq.importer.canonical import canonicalize, commute_constants, drop_no_ops, fold_batch_norm, fold_constants
from tvmq.importer.torch_export import export, translate
from tvmq.oracle import interpret

op = relax.op


def _module(build, *shapes: tuple[int, ...], dtype: str = "float32") -> tvm.IRModule:
    """`build(emit, *params)` returns the output; `emit` binds an expression."""
    builder = relax.BlockBuilder()
    params = [relax.Var(f"x{i}", relax.TensorType(shape, dtype)) for i, shape in enumerate(shapes)]
    with builder.function("main", params):
        with builder.dataflow():
            result = build(builder.emit, *params)
            output = builder.emit_output(relax.Tuple(list(result) if isinstance(result, tuple) else [result]))
        builder.emit_func_output(output)
    return ir.rewrite(builder.get(), lambda *_: None)


def _const(*values: object, dtype: str = "float32") -> relax.Expr:
    return ir.constant(np.array(values, dtype))


def _ops(module: tvm.IRModule) -> list[str]:
    return [ir.op_name(call) for _, call in ir.calls(module)]


def _run(module: tvm.IRModule, *inputs: np.ndarray) -> np.ndarray:
    return interpret.run(module, inputs)[0]


def _same(a: tvm.IRModule, b: tvm.IRModule) -> None:
    tvm.ir.assert_structural_equal(a, b, map_free_vars=True)


class TestDropNoOps:
    @pytest.mark.parametrize(
        "build",
        [
            lambda emit, x: emit(op.reshape(x, (2, 3))),
            lambda emit, x: emit(op.astype(x, "float32")),
            lambda emit, x: emit(op.broadcast_to(x, (2, 3))),
            lambda emit, x: emit(op.squeeze(x, [])),
            lambda emit, x: emit(op.permute_dims(x, [0, 1])),
            lambda emit, x: emit(op.strided_slice(x, [0], [0], [2])),
            lambda emit, x: emit(op.strided_slice(x, [0], [0], [2], [1])),
        ],
    )
    def test_drops(self, build) -> None:
        before = _module(lambda emit, x: emit(op.nn.relu(build(emit, x))), (2, 3))
        _same(drop_no_ops(before), _module(lambda emit, x: emit(op.nn.relu(x)), (2, 3)))

    @pytest.mark.parametrize(
        "build",
        [
            lambda emit, x: emit(op.reshape(x, (9,))),
            lambda emit, x: emit(op.astype(x, "int32")),
            lambda emit, x: emit(op.permute_dims(x, [1, 0])),
            lambda emit, x: emit(op.permute_dims(x)),
            lambda emit, x: emit(op.strided_slice(x, [0], [-1], [-4], [-1])),
            lambda emit, x: emit(op.strided_slice(x, [0], [1], [3])),
            lambda emit, x: emit(op.broadcast_to(x, (2, 3, 3))),
            lambda emit, x: emit(op.nn.relu(x)),
        ],
    )
    def test_declines(self, build) -> None:
        before = _module(build, (3, 3))
        _same(drop_no_ops(before), before)

    def test_dropout(self) -> None:
        before = _module(lambda emit, x: emit(op.nn.relu(emit(relax.TupleGetItem(emit(op.nn.dropout(x)), 0)))), (2,))
        assert _ops(drop_no_ops(before)) == ["nn.relu"]


class TestFoldConstants:
    def test_folds_what_depends_on_constants_only(self) -> None:
        before = _module(lambda emit, x: emit(op.add(x, emit(op.sqrt(emit(op.add(_const(1, 2), _const(3, 7))))))), (2,))
        after = _module(lambda emit, x: emit(op.add(x, _const(2, 3))), (2,))
        _same(fold_constants(before), after)

    @pytest.mark.parametrize("dtype", ["int64", "int32", "float64", "float16", "bool"])
    def test_keeps_dtypes(self, dtype: str) -> None:
        before = _module(lambda emit, x: (x, emit(op.concat([_const(1, 0, dtype=dtype)] * 2, 0))), (2,))
        result = interpret.run(fold_constants(before), [np.ones(2, np.float32)])[1]
        assert str(result.dtype) == dtype and result.tolist() == [1, 0, 1, 0]

    def test_folds_what_tvm_has_to_compute(self) -> None:
        folded = fold_constants(_module(lambda emit, x: (x, emit(op.cumsum(_const(1, 2, 3), 0))), (2,)))
        assert _ops(folded) == [] and interpret.run(folded, [np.ones(2)])[1].tolist() == [1, 3, 6]

    def test_declines_where_an_input_is_read(self) -> None:
        before = _module(lambda emit, x: emit(op.add(x, _const(1, 2))), (2,))
        _same(fold_constants(before), before)


class TestCommute:
    @pytest.mark.parametrize("name", ["add", "multiply", "maximum", "minimum"])
    def test_constants_go_right(self, name: str) -> None:
        binary = getattr(op, name)
        before = _module(lambda emit, x: emit(binary(_const(1, 2), x)), (2,))
        _same(commute_constants(before), _module(lambda emit, x: emit(binary(x, _const(1, 2))), (2,)))

    @pytest.mark.parametrize("name", ["subtract", "divide"])
    def test_others_stay(self, name: str) -> None:
        before = _module(lambda emit, x: emit(getattr(op, name)(_const(1, 2), x)), (2,))
        _same(commute_constants(before), before)


WEIGHT = np.random.default_rng(0).standard_normal((4, 3, 3, 3)).astype(np.float32)
IMAGE = (1, 3, 6, 6)


def _norm(emit, x, channels: int = 4, axis: int = 1, **attrs):
    rng = np.random.default_rng(1)
    gamma, beta, mean, var = (rng.uniform(0.5, 2, channels).astype(np.float32) for _ in range(4))
    call = op.nn.batch_norm(x, *map(ir.constant, (gamma, beta, mean, var)), axis=axis, training=False, **attrs)
    return emit(relax.TupleGetItem(emit(call), 0))


def _check_fold(build, shape: tuple[int, ...], expected: list[str]) -> tvm.IRModule:
    before = _module(build, shape)
    after = fold_batch_norm(before)
    assert _ops(after) == expected
    x = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    for a, b in zip(interpret.run(after, [x]), interpret.run(before, [x]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    return after


def _conv(emit, x):
    return emit(op.nn.conv2d(x, ir.constant(WEIGHT)))


def _both(value, first, second=lambda value: value):
    """Two outputs that read one value."""
    return first(value), second(value)


class TestFoldBatchNorm:
    def test_into_a_convolution(self) -> None:
        _check_fold(lambda emit, x: _norm(emit, _conv(emit, x)), IMAGE, ["nn.conv2d", "add"])

    @pytest.mark.parametrize("shape", [(1, 4, 1, 1), (4, 1, 1), (1,), ()])
    def test_into_a_convolution_with_bias(self, shape: tuple[int, ...]) -> None:
        bias = ir.constant(np.full(shape, 0.5, np.float32))
        _check_fold(lambda emit, x: _norm(emit, emit(op.add(_conv(emit, x), bias))), IMAGE, ["nn.conv2d", "add"])

    def test_into_a_grouped_convolution(self) -> None:
        def build(emit, x):
            weight = ir.constant(WEIGHT[:, :1].repeat(2, 0)[:6])
            return _norm(emit, emit(op.nn.conv2d(x, weight, groups=3)), 6)

        _check_fold(build, IMAGE, ["nn.conv2d", "add"])

    def test_into_a_matrix_product(self) -> None:
        def build(emit, x):
            product = emit(op.matmul(x, ir.constant(WEIGHT[:, :, 0, 0].T)))
            return _norm(emit, emit(op.add(product, _const(1, 2, 3, 4))))

        _check_fold(build, (2, 3), ["matmul", "add"])

    @pytest.mark.parametrize("attrs", [{"scale": False}, {"center": False}, {"epsilon": 0.5}])
    def test_attributes_count(self, attrs: dict) -> None:
        _check_fold(lambda emit, x: _norm(emit, _conv(emit, x), **attrs), IMAGE, ["nn.conv2d", "add"])

    def test_names_stay(self) -> None:
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
        module = canonicalize(translate(export(net, (torch.ones(IMAGE),))).module)
        assert [str(var.name) for var, _ in ir.calls(module)] == ["_0", "_1"]

    def test_keeps_dtypes(self) -> None:
        before = _module(
            lambda emit, x: emit(
                relax.TupleGetItem(
                    emit(op.nn.batch_norm(x, *[_const(1, 2, dtype="float64")] * 4, axis=1, training=False)), 0
                )
            ),
            (3, 2),
            dtype="float64",
        )
        assert {ir.dtype_of(call) for _, call in ir.calls(fold_batch_norm(before))} == {"float64"}

    @pytest.mark.parametrize(
        ("build", "expected"),
        [
            # The convolution has another reader.
            (
                lambda emit, x: _both(_conv(emit, x), lambda c: _norm(emit, c), lambda c: emit(op.nn.relu(c))),
                ["nn.conv2d", "multiply", "add", "nn.relu"],
            ),
            # The biased convolution has another reader.
            (
                lambda emit, x: _both(emit(op.add(_conv(emit, x), _const(1.0))), lambda c: _norm(emit, c)),
                ["nn.conv2d", "add", "multiply", "add"],
            ),
            # The convolution before the bias has another reader.
            (
                lambda emit, x: _both(_conv(emit, x), lambda c: _norm(emit, emit(op.add(c, _const(1.0))))),
                ["nn.conv2d", "add", "multiply", "add"],
            ),
            # The convolution is returned too.
            (lambda emit, x: _both(_conv(emit, x), lambda c: _norm(emit, c)), ["nn.conv2d", "multiply", "add"]),
            # No layer before it.
            (lambda emit, x: _norm(emit, x, 3), ["multiply", "add"]),
            (lambda emit, x: _norm(emit, emit(op.nn.relu(x)), 3), ["nn.relu", "multiply", "add"]),
            # A batch norm over the width, and a bias along it.
            (lambda emit, x: _norm(emit, _conv(emit, x), axis=3), ["nn.conv2d", "multiply", "add"]),
            (
                lambda emit, x: _norm(emit, emit(op.add(_conv(emit, x), _const(1, 2, 3, 4)))),
                ["nn.conv2d", "add", "multiply", "add"],
            ),
            # A weight that is no constant.
            (
                lambda emit, x: _norm(emit, emit(op.nn.conv2d(x, emit(op.reshape(x, (4, 3, 3, 3))))), 4),
                ["reshape", "nn.conv2d", "multiply", "add"],
            ),
        ],
    )
    def test_declines(self, build, expected: list[str]) -> None:
        _check_fold(build, IMAGE, expected)

    def test_declines_batches_statistics_and_variable_ones(self) -> None:
        def training(emit, x):
            norm = op.nn.batch_norm(x, *[_const(1, 1, 1)] * 4, axis=1, training=True)
            return emit(relax.TupleGetItem(emit(norm), 0))

        def variable(emit, x, mean):
            one = _const(1, 1, 1)
            norm = op.nn.batch_norm(x, one, one, mean, one, axis=1, training=False)
            return emit(relax.TupleGetItem(emit(norm), 0))

        def second(emit, x):
            norm = op.nn.batch_norm(x, *[_const(1, 1, 1)] * 4, axis=1, training=False)
            return emit(relax.TupleGetItem(emit(norm), 1))

        for before in (_module(training, (2, 3)), _module(variable, (2, 3), (3,)), _module(second, (2, 3))):
            _same(fold_batch_norm(before), before)


def test_canonical_form_of_a_network() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = nn.functional.dropout(torch.relu(self.norm(self.conv(x))), training=self.training)
            return 1 + self.fc(y.float().amax((2, 3)).reshape(-1, 4))

    before = translate(export(Net(), (torch.ones(IMAGE),))).module
    after = canonicalize(before)
    assert _ops(after) == ["nn.conv2d", "add", "nn.relu", "max", "matmul", "add", "add"]
    x = np.random.default_rng(0).standard_normal(IMAGE).astype(np.float32)
    np.testing.assert_allclose(_run(after, x), _run(before, x), atol=1e-5)
    _same(canonicalize(after), after)
