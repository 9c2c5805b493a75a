"""Where the interpreter uses a NumPy rule, TVM computes the same: not-a-number, infinities and integers too."""

import numpy as np
import pytest
from tvm import relax

from tvmq import ir
from tvmq.errors import ModelError
from tvmq.oracle import by_tvm, interpret, relax_operators

op = relax.op
RNG = np.random.default_rng(0)
PLAIN = RNG.standard_normal((2, 4, 5, 5)).astype(np.float32)
ODD = np.array([np.nan, -1.0, np.inf, -np.inf, 0.5, -0.5, 2.5, -0.0, 300.7, -3.2], np.float32)
ONES = np.array([1, np.nan, 1, 1, 1, 1, 1, 0, 1, 1], np.float32)
INTEGERS = np.array([-7, 7, -1, 2**40, 3])


def _c(value: np.ndarray) -> relax.Expr:
    return ir.constant(value)


def _weight(*shape: int) -> relax.Expr:
    return _c(RNG.standard_normal(shape).astype(np.float32))


def _norm(**attrs: object) -> relax.Expr:
    stats = [_c(RNG.uniform(0.5, 2, 4).astype(np.float32)) for _ in range(4)]
    return op.nn.batch_norm(_c(PLAIN), *stats, axis=1, **attrs)


CALLS = {
    "relu": op.nn.relu(_c(ODD)),
    "relu of integers": op.nn.relu(_c(INTEGERS)),
    "silu": op.nn.silu(_c(ODD)),
    "gelu": op.nn.gelu(_c(ODD)),
    "gelu, tanh": op.nn.gelu_tanh(_c(ODD)),
    "clip": op.clip(_c(ODD), -0.7, 1.5),
    "clip of integers": op.clip(_c(INTEGERS), -2, 5),
    "maximum": op.maximum(_c(ODD), _c(ONES)),
    "minimum": op.minimum(_c(ONES), _c(ODD)),
    "add": op.add(_c(ODD), _c(ONES)),
    "multiply of integers": op.multiply(_c(INTEGERS), _c(INTEGERS)),
    "divide": op.divide(_c(ODD), _c(ONES)),
    "divide of integers": op.divide(_c(INTEGERS), _c(np.array([2, -2, 2, 3, -2]))),
    "sqrt": op.sqrt(_c(ODD)),
    "rsqrt": op.rsqrt(_c(ODD)),
    "negative": op.negative(_c(ODD)),
    "to bool": op.astype(_c(ODD), "bool"),
    "to uint8": op.astype(_c(ODD), "uint8"),
    "to int8": op.astype(_c(ODD), "int8"),
    "to float16": op.astype(_c(ODD), "float16"),
    "integers to int8": op.astype(_c(INTEGERS), "int8"),
    "integers to bool": op.astype(_c(INTEGERS), "bool"),
    "mean": op.mean(_c(PLAIN), axis=[-1, 1]),
    "mean, kept": op.mean(_c(PLAIN), axis=[2], keepdims=True),
    "mean of all": op.mean(_c(PLAIN)),
    "mean of integers": op.mean(_c(np.array([1, 2, 5])), axis=[0]),
    "leaky relu": op.nn.leakyrelu(_c(PLAIN), 0.125),
    "softmax": op.nn.softmax(_c(PLAIN), axis=1),
    "layer norm": op.nn.layer_norm(_c(PLAIN), _weight(5, 5), _weight(5, 5), axes=[-2, -1]),
    "batch norm": _norm(training=False),
    "batch norm without scale": _norm(training=False, scale=False),
    "batch norm without center": _norm(training=False, center=False),
    "batch norm of the batch": _norm(training=True),
    "conv2d": op.nn.conv2d(_c(PLAIN), _weight(6, 2, 3, 3), (2, 1), (1, 0, 2, 1), (1, 2), groups=2),
    "conv2d, channels last": op.nn.conv2d(_c(PLAIN), _weight(6, 3, 3, 5), data_layout="NHWC", kernel_layout="OHWI"),
    "conv2d, another kernel layout": op.nn.conv2d(_c(PLAIN), _weight(3, 3, 4, 6), kernel_layout="HWIO"),
    "attention": op.nn.attention(*(_weight(2, n, 3, 4) for n in (5, 7, 7))),
    "attention with a scale": op.nn.attention(*(_weight(1, n, 2, 4) for n in (3, 3, 3)), scale=0.25),
    "attention, causal": op.nn.attention(*(_weight(1, n, 2, 4) for n in (3, 3, 3)), causal_mask="TopLeft"),
    "max pool": op.nn.max_pool2d(_c(PLAIN), (3, 2), (2, 1), (1, 1), (1, 2), layout="NHWC"),
    "max pool of not-a-number": op.nn.max_pool2d(_c(ODD.reshape(1, 2, 5, 1)), (2, 2), layout="NHWC"),
    "max pool, more padding below": op.nn.max_pool2d(_c(PLAIN), (3, 3), (2, 2), (0, 0, 1, 1), layout="NHWC"),
    "matmul": op.matmul(_c(PLAIN), _weight(5, 3)),
    "matmul of integers": op.matmul(_c(np.full((2, 3), 100, np.int8)), _c(np.full((3, 2), 100, np.int8)), "int32"),
    "permute": op.permute_dims(_c(PLAIN), [0, 2, 3, 1]),
    "reverse": op.permute_dims(_c(PLAIN)),
    "reshape": op.reshape(_c(PLAIN), (2, -1, 10)),
    "expand": op.expand_dims(_c(PLAIN), [0, -1]),
    "squeeze": op.squeeze(_c(PLAIN[:1, :, :1]), [0, 2]),
    "flatten": op.flatten(_c(PLAIN)),
    "concat": op.concat([_c(PLAIN), _c(PLAIN)], -1),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rules_agree_with_tvm(name: str) -> None:
    call = relax.BlockBuilder().normalize(CALLS[name])
    args = [interpret._fetcher(arg)({}) for arg in call.args]
    ours, tvms = interpret._apply(call, args), by_tvm.compute(call, args)
    for a, b in zip(*((v if isinstance(v, tuple) else (v,)) for v in (ours, tvms)), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_a_transposed_matrix_is_multiplied_by_as_it_is() -> None:
    weight = RNG.standard_normal((3, 5)).astype(np.float32)
    call = relax.BlockBuilder().normalize(op.matmul(_c(PLAIN), _c(weight.T)))
    turned = interpret.evaluate(relax.BlockBuilder().normalize(op.permute_dims(_c(weight))), {})
    assert not turned.flags.c_contiguous
    got = relax_operators.RULES["matmul"](call, [PLAIN, turned])
    np.testing.assert_allclose(got, by_tvm.compute(call, [PLAIN, weight.T]), rtol=2e-5, atol=2e-5)
    backwards = relax_operators.RULES["matmul"](call, [PLAIN, turned[::-1]])
    np.testing.assert_allclose(backwards, PLAIN @ weight.T[::-1], rtol=2e-5, atol=2e-5)


def test_every_rule_is_held_against_tvm() -> None:
    own = {"quantize", "dequantize"}  # defined by tvmq, not by TVM
    tested = {ir.op_name(call) for call in CALLS.values()} | {"subtract"}
    assert set(relax_operators.RULES) - own == tested & set(relax_operators.RULES)


def test_operators_that_index_have_no_rule() -> None:
    assert not {"take", "strided_slice", "gather_elements", "index_tensor"} & set(relax_operators.RULES)


def test_watch_sees_each_tensor_once() -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2,), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(op.nn.relu(x), "y")
            z = builder.emit(op.topk(y, 1), "z")
            out = builder.emit_output(relax.Tuple([y, z[0]]))
        builder.emit_func_output(out)
    seen: dict[str, list[float]] = {}
    interpret.run(
        builder.get(), [np.array([-1, 2], np.float32)], lambda name, value: seen.update({name: value.tolist()})
    )
    assert seen["x"] == [-1, 2] and seen["y"] == [0, 2]
    assert "z" not in seen


def test_operator_that_tvm_cannot_compile() -> None:
    call = relax.BlockBuilder().normalize(op.power(_c(INTEGERS), _c(INTEGERS)))
    with pytest.raises(ModelError, match=r"^TVM cannot compile relax.power \(a constant\): saw "):
        interpret.evaluate(call, {})
