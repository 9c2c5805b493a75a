import json

import hypothesis.strategies as st
import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from tvm import relax
from tvm_ffi import structural_equal, structural_hash

from tvmq import ir, op_calls, ops
from tvmq.ops import Activate, Bias, Clip, Dequantize, Multiply, Quantize, Residual, Scale
from tvmq.oracle import interpret

ALL_STEPS = (
    Bias(),
    Scale(),
    Dequantize(0.25, -3),
    Multiply(1e-30),
    Residual(),
    Residual(0.1, 7),
    ops.Minus(),
    ops.ChannelLeak(),
    ops.Times(),
    ops.Times(0.1, 7),
    Clip(),
    Clip(0.0, None),
    Clip(None, 6.0),
    Activate("gelu_tanh"),
    ops.Round(-125, 130),
    Quantize(3, -128, 127, "int8"),
)

_float = st.floats(allow_nan=False, width=32)
_int = st.integers(-(2**31), 2**31 - 1)
_steps = st.one_of(
    st.just(Bias()),
    st.just(Scale()),
    st.builds(Dequantize, _float, _int),
    st.builds(Multiply, _float),
    st.builds(Residual, st.none() | _float, _int),
    st.builds(Clip, st.none() | _float, st.none() | _float),
    st.builds(Activate, st.sampled_from(["gelu", "silu", "tanh"])),
    st.builds(ops.Round, _int, _int),
    st.builds(Quantize, _int, _int, _int, st.sampled_from(["int8", "uint8"])),
)


def _map(steps: ops.Epilogue) -> object:
    x = relax.Var("x", relax.TensorType((2, 3), "float32"))
    return op_calls.elementwise(x, (), steps, out_shape=(2, 3), out_dtype="float32")


@given(st.lists(_steps, max_size=6).map(tuple))
@settings(max_examples=100, deadline=None)
def test_encode_and_decode_are_inverse(epilogue: ops.Epilogue):
    assert ops.decode(ops.encode(epilogue)) == epilogue
    assert ops.decode(json.loads(json.dumps(ops.encode(epilogue)))) == epilogue
    assert ops.epilogue_of(_map(epilogue)) == epilogue


def test_types_survive_a_tvm_attribute():
    for step, back in zip(ALL_STEPS, ops.epilogue_of(_map(ALL_STEPS)), strict=True):
        assert back == step
        for name, value in vars(step).items():
            assert type(getattr(back, name)) is type(value), (step, name)


def test_none_is_spelled_out():
    assert ops.encode((Clip(0.0, None), Bias())) == [["clip", 0.0, "none"], ["bias"]]


def test_an_unknown_step_is_refused():
    with pytest.raises(KeyError):
        ops.decode([["swish"]])


def test_modules_print_hash_and_compare_by_their_epilogue():
    def module(high: float) -> tvm.IRModule:
        builder = relax.BlockBuilder()
        x = relax.Var("x", relax.TensorType((2, 3), "float32"))
        with builder.function("main", [x]):
            with builder.dataflow():
                clipped = op_calls.elementwise(x, (), (Clip(0.0, high),), out_shape=(2, 3), out_dtype="float32")
                out = builder.emit_output((builder.emit(clipped),))
            builder.emit_func_output(out)
        return builder.get()

    tvm.ir.assert_structural_equal(module(6.0), module(6.0))
    assert structural_hash(module(6.0)) == structural_hash(module(6.0)) != structural_hash(module(5.0))
    assert not structural_equal(module(6.0), module(5.0))
    assert '["clip", 0.0, 6.0]' in module(6.0).script()
    tvm.ir.assert_structural_equal(tvm.ir.load_json(tvm.ir.save_json(module(6.0))), module(6.0))


def _tensor(name: str, shape: tuple[int, ...], dtype: str = "float32") -> relax.Var:
    return relax.Var(name, relax.TensorType(shape, dtype))


def test_attributes_are_python_values():
    x, w = _tensor("x", (1, 5, 5, 4), "int8"), _tensor("w", (8, 3, 3, 4), "int8")
    call = op_calls.conv2d(
        x, w, [_tensor("b", (8,), "int32")], (Bias(),), strides=(2, 1), padding=(1, 0, 1, 0), dilation=(1, 1), groups=1,
        x_zero_point=-5, out_shape=(1, 3, 3, 8), out_dtype="int32",
    )  # fmt: skip
    assert ops.attributes(call) == {
        "strides": (2, 1),
        "padding": (1, 0, 1, 0),
        "dilation": (1, 1),
        "groups": 1,
        "x_zero_point": -5,
        "out_shape": (1, 3, 3, 8),
        "out_dtype": "int32",
    }
    assert ops.epilogue_of(call) == (Bias(),)
    pool = op_calls.avg_pool2d(
        x, (), (), pool=(2, 2), strides=(2, 2), padding=(0, 0, 0, 0), count_include_pad=True, out_shape=(1, 2, 2, 4),
        out_dtype="float32",
    )  # fmt: skip
    assert ops.attributes(pool)["count_include_pad"] is True


def test_result_types_are_inferred():
    x = _tensor("x", (2, 7), "uint8")
    call = relax.BlockBuilder().normalize(
        op_calls.matmul(x, _tensor("w", (7, 3), "int8"), (), (), x_zero_point=9, out_shape=(2, 3), out_dtype="int32")
    )
    assert (ir.shape_of(call), ir.dtype_of(call), ir.op_name(call)) == ((2, 3), "int32", "tvmq.matmul")


def test_a_concat_has_an_epilogue_a_tensor():
    epilogues = ((), (Dequantize(0.5, 1), Quantize(2, -128, 127, "int8")))
    xs = [_tensor("a", (1, 2), "int8"), _tensor("b", (1, 3), "int8")]
    call = op_calls.concat(xs, epilogues, axis=1, out_shape=(1, 5), out_dtype="int8")
    assert ops.concat_epilogues(call) == epilogues
    values = {xs[0]: np.array([[1, 2]], np.int8), xs[1]: np.array([[1, 2, 4]], np.int8)}
    # (q - 1) * 0.5 = 0, 0.5, 1.5; ties to even, plus 2.
    assert interpret.evaluate(call, values).tolist() == [[1, 2, 2, 2, 4]]
