"""The interpreter on whole programs: models, TVM as a fallback, watching, and what becomes an output."""

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from torch.nn import functional
from tvm import relax

from tvmq import ir, op_calls, ops
from tvmq.errors import ModelError
from tvmq.oracle import by_tvm, interpret, relax_operators
from tvmq.oracle.interpret import Program

op = relax.op
RNG = np.random.default_rng(0)
SHAPE = (2, 5, 6, 4)
X = RNG.standard_normal(SHAPE).astype(np.float32)
VECTOR = relax.const(np.linspace(0.5, 2, 4).astype(np.float32))


# Defined by tvmq: TVM's lowering divides where tvmq multiplies by the reciprocal, so that a tie may fall the other way.
OPERATORS = {
    "quantize": lambda x: op.quantize(x, relax.const(np.float32(0.02)), relax.const(np.int8(5)), axis=-1),
    "quantize by channel": lambda x: op.quantize(x, VECTOR, relax.const(np.arange(4, dtype=np.int8)), axis=3),
    "dequantize by channel": lambda x: op.dequantize(
        op.astype(op.multiply(x, relax.const(np.float32(9))), "int8"), VECTOR, relax.const(np.zeros(4, np.int8)), axis=3
    ),
}


def _by_tvm(module: object, *inputs: np.ndarray) -> np.ndarray:
    executable = relax.build(module, target="llvm")
    machine = relax.VirtualMachine(executable, tvm.cpu())
    return machine["main"](*(tvm.runtime.tensor(x) for x in inputs))[0].numpy()


@pytest.mark.parametrize("name", OPERATORS)
def test_qdq_is_what_tvm_compiles_but_for_ties(graph, name: str):
    module = graph(lambda emit, x: emit(OPERATORS[name](x), "y"), SHAPE)
    (got,) = interpret.run(module, [X])
    expected = _by_tvm(relax.transform.Normalize()(module), X)
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    if got.dtype.kind == "f":
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    else:
        assert np.abs(got.astype(int) - expected).max() <= 1


def test_a_float_model_agrees_with_pytorch(any_case):
    for reference, got in zip(any_case.reference(), any_case.run(any_case.module), strict=True):
        assert (got.shape, got.dtype) == (reference.shape, reference.dtype)
        np.testing.assert_allclose(got, reference, rtol=1e-5, atol=1e-5)


def test_operators_without_a_rule_are_compiled_by_tvm(build):
    class Rare(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            parts = x.chunk(3, 1)
            return torch.cumsum(x, 1), functional.leaky_relu(parts[1]), torch.sin(x).argmax(-1), x[:, ::2]

    case = build(Rare(), (2, 9, 4))
    assert any(ir.op_name(call) not in relax_operators.RULES for _, call in ir.calls(case.module))
    for reference, got in zip(case.reference(), case.run(case.module), strict=True):
        assert got.dtype == reference.dtype
        np.testing.assert_allclose(got, reference, rtol=1e-5, atol=1e-5)


def test_one_compilation_serves_equal_operators(graph, monkeypatch: pytest.MonkeyPatch):
    builds = []
    original = relax.build
    monkeypatch.setattr(by_tvm.relax, "build", lambda *a, **k: builds.append(1) or original(*a, **k))

    def body(emit, x):
        a = emit(op.sin(x), "a")
        return emit(op.sin(a), "b"), emit(op.sin(emit(op.sin(x), "c")), "d")

    module = graph(body, (3, 11))
    x = RNG.standard_normal((3, 11)).astype(np.float32)
    a, b = interpret.run(module, [x])
    assert len(builds) == 1
    np.testing.assert_allclose(a, np.sin(np.sin(x)), rtol=1e-6)
    assert (a == b).all()


def test_what_tvm_cannot_compile_is_named(graph, monkeypatch: pytest.MonkeyPatch):
    def broken(*_args: object, **_kwargs: object) -> object:
        raise ValueError("no such\nlowering")

    module = graph(lambda emit, x: emit(op.cos(x), "layer"), (3, 13))
    monkeypatch.setattr(by_tvm.relax, "build", broken)
    with pytest.raises(ModelError) as info:
        interpret.run(module, [np.zeros((3, 13), np.float32)])
    assert "relax.cos" in str(info.value) and "layer" in str(info.value) and "\n" not in str(info.value)


def test_watch_sees_inputs_and_results_in_order(graph):
    def body(emit, x, y):
        parts = emit(op.split(emit(op.add(x, y), "sum"), 2, 1), "parts")
        return emit(relax.TupleGetItem(parts, 1), "right")

    seen: list[tuple[str, tuple[int, ...]]] = []
    shapes = ((2, 4), (2, 4))
    inputs = [np.ones(s, np.float32) for s in shapes]
    (out,) = interpret.run(graph(body, *shapes), inputs, lambda name, value: seen.append((name, value.shape)))
    assert seen == [("x0", (2, 4)), ("x1", (2, 4)), ("sum", (2, 4)), ("right", (2, 2))]
    assert out.tolist() == [[2, 2], [2, 2]]


def test_an_input_and_a_constant_may_be_outputs(graph):
    module = graph(lambda emit, x: (x, VECTOR, emit(op.negative(x), "n"), x), (4,))
    x = np.ones(4, np.float32)
    same, constant, negative, again = interpret.run(module, [x])
    assert (same == x).all() and (again == x).all() and (negative == -x).all()
    assert constant.tolist() == ir.to_numpy(VECTOR).tolist()


def test_a_program_runs_often_and_forgets_what_nobody_reads(graph):
    def body(emit, x):
        for index in range(5):
            x = emit(op.negative(x), f"n{index}")
        return x

    program = Program(graph(body, (3,)))
    assert [len(step.dead) for step in program.steps[:5]] == [1] * 5  # each reads the one before for the last time
    for value in (1.0, 2.0):
        assert program.run([np.full(3, value, np.float32)])[0].tolist() == [-value] * 3


def test_inputs_are_not_changed(any_case):
    before = [x.copy() for x in any_case.inputs]
    any_case.run(any_case.realized())
    assert all((x == y).all() for x, y in zip(before, any_case.inputs, strict=True))


def test_the_number_of_inputs_is_checked(graph):
    with pytest.raises(ValueError):
        interpret.run(graph(lambda emit, x: emit(op.negative(x), "n"), (3,)), [])


def test_one_expression_on_its_own():
    x = relax.Var("x", relax.TensorType((3,), "float32"))
    call = relax.BlockBuilder().normalize(op.add(x, relax.const(np.float32(2))))
    assert interpret.evaluate(call, {x: np.arange(3, dtype=np.float32)}).tolist() == [2, 3, 4]


def test_tvmq_operators_are_computed_by_the_oracle(graph):
    def body(emit, x):
        q = emit(
            op_calls.elementwise(
                x, (), (ops.Multiply(10.0), ops.Quantize(1, -128, 127, "int8")), out_shape=SHAPE, out_dtype="int8"
            ),
            "q",
        )
        pooled = op_calls.max_pool2d(
            q, pool=(2, 2), strides=(2, 2), padding=(0,) * 4, dilation=(1, 1), out_shape=(2, 2, 3, 4), out_dtype="int8"
        )
        mean = op_calls.avg_pool2d(
            emit(pooled, "p"), (), (ops.Multiply(0.1),), pool=(2, 3), strides=(2, 3), padding=(0,) * 4,
            count_include_pad=False, x_zero_point=1, out_shape=(2, 4), out_dtype="float32",
        )  # fmt: skip
        return emit(mean, "m")

    (got,) = interpret.run(graph(body, SHAPE), [X])
    q = np.clip(np.rint(X * np.float32(10)), -129, 126)
    expected = q[:, :4].reshape(2, 2, 2, 3, 2, 4).max((2, 4)).mean((1, 2)) * 0.1
    assert got.shape == (2, 4)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_a_residual_after_a_global_mean(build):
    class MeanAdd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x).mean((2, 3)) + self.b(x).mean((2, 3))

    case = build(MeanAdd(), (2, 3, 5, 5))
    for module in (case.realized(), case.realized(storage="uint8")):
        np.testing.assert_allclose(case.run(module)[0], case.reference()[0], atol=0.05)
