import numpy as np
import pytest
import tvm
from tvm import relax

from tvmq import ir, ops
from tvmq.quantize import numerics
from tvmq.quantize.annotate import annotate
from tvmq.quantize.numerics import QParams
from tvmq.quantize.plan import make_plan
from tvmq.quantize.table import CalibrationTable, Entry
from tvmq.recipe import Recipe
from tvmq.recipe_rules import Rule

INT8 = Recipe(precision="int8")
SHAPE = (1, 4, 4, 2)
WEIGHT = np.array([[127.0, -1.0], [0.5, 0.25], [-2.0, 1.0]], np.float32).reshape(3, 1, 1, 2)
BIAS = np.array([1.0, 2.0, 3.0], np.float32)
op = relax.op


def _conv(x: object, weight: object) -> object:
    return op.nn.conv2d(x, weight, data_layout="NHWC", kernel_layout="OHWI", out_layout="NHWC")


def _before(emit, x):
    y = emit(op.add(emit(_conv(x, relax.const(WEIGHT)), "c"), relax.const(BIAS)), "b")
    return emit(op.nn.relu(y), "r")


def _table(*names: str) -> CalibrationTable:
    return CalibrationTable("", "min_max", 1, {name: Entry(-1.0, 1.0, QParams(0.5, 3)) for name in names})


def _pair(emit, value: object, name: str) -> object:
    scale, zero = relax.const(0.5, "float32"), relax.const(3, "int8")
    return emit(op.dequantize(emit(op.quantize(value, scale, zero, axis=-1, out_dtype="int8"), "q"), scale, zero), name)


def _quantized_weight(emit, scales: np.ndarray) -> object:
    q = numerics.quantize_weight(WEIGHT, scales, 0)
    return emit(op.dequantize(relax.const(q), relax.const(scales), relax.const(np.zeros(3, np.int8)), axis=0), "w")


@pytest.mark.parametrize("per_channel", [True, False])
def test_one_convolution(graph, per_channel: bool):
    scales = np.array([127.0, 0.5, 2.0] if per_channel else [127.0] * 3, np.float32) / np.float32(127)

    def expected(emit, x):
        y = emit(
            op.add(emit(_conv(_pair(emit, x, "dq"), _quantized_weight(emit, scales)), "c"), relax.const(BIAS)), "b"
        )
        return emit(op.nn.relu(y), "r")

    before = graph(_before, SHAPE)
    recipe = Recipe(precision="int8", per_channel=per_channel)
    after = annotate(before, make_plan(before, _table("x0"), recipe, {}), recipe)
    tvm.ir.assert_structural_equal(after, graph(expected, SHAPE))


def test_an_integer_producer_is_quantized_once_for_all_its_readers(graph):
    """One pair behind the producer: the integer reader, the float reader and the output read the same twin."""

    def body(emit, x):
        first = _before(emit, x)
        second = emit(_conv(first, relax.const(np.ones((2, 1, 1, 3), np.float32))), "second")
        return second, first, emit(op.nn.softmax(first), "s")

    before = graph(body, SHAPE)
    after = annotate(before, make_plan(before, _table("x0", "r"), INT8, {}), INT8)
    values = dict(ir.bindings(after))
    (twin,) = (var for var, value in values.items() if str(var.name) == "r_dq")
    assert [str(v.name) for v in ir.users(after)[twin] if v is not None] == ["second", "s", "outputs"]
    assert ir.outputs(after)[1].same_as(twin)
    assert [ir.op_name(v) for _, v in ir.calls(after)].count("quantize") == 2


def test_a_float_producer_is_quantized_for_integer_readers_only(graph):
    def body(emit, x):
        y = emit(op.sqrt(x), "y")
        weight = relax.const(np.ones((3, 1, 1, 2), np.float32))
        return emit(_conv(y, weight), "a"), emit(_conv(y, weight), "b"), emit(op.nn.softmax(y), "s")

    before = graph(body, SHAPE)
    after = annotate(before, make_plan(before, _table("y"), INT8, {}), INT8)
    readers = {str(var.name): [str(v.name) for v in users if v is not None] for var, users in ir.users(after).items()}
    assert readers["y"] == ["y_q", "s"]
    assert readers["y_dq"] == ["a", "b"]  # one pair for both


def test_nothing_planned_is_nothing_changed(any_case):
    tvm.ir.assert_structural_equal(any_case.qdq(Recipe(precision="fp32")), any_case.module)


def test_a_kept_layer_keeps_its_weight(model_of):
    case = model_of("conv_bn_relu")
    qdq = case.qdq(Recipe(precision="int8", rules=[Rule("second*", "fp32")]))
    weights = [call.args[1] for _, call in ir.calls(qdq) if ir.is_call(call, "nn.conv2d")]
    assert [ir.is_constant(weight) for weight in weights] == [False, True]


def test_the_same_constant_in_two_layers_is_quantized_for_both(model_of):
    qdq = model_of("shared_weights").qdq()
    values = dict(ir.bindings(qdq))
    weights = [values[call.args[1]] for _, call in ir.calls(qdq) if ir.is_call(call, "nn.conv2d")]
    assert len(weights) == 2 and all(ir.is_call(weight, "dequantize") for weight in weights)
    assert (ir.to_numpy(weights[0].args[0]) == ir.to_numpy(weights[1].args[0])).all()


def test_simulation_is_near_the_float_model(any_case):
    for reference, simulated in zip(any_case.reference(), any_case.run(any_case.qdq()), strict=True):
        assert numerics.sqnr_db(reference, simulated) > 30


def test_per_channel_is_nearer_than_per_tensor(model_of):
    case = model_of("conv_bn_relu")
    (reference,) = case.reference()
    errors = [
        numerics.sqnr_db(reference, case.run(case.qdq(Recipe(precision="int8", per_channel=per_channel)))[0])
        for per_channel in (True, False)
    ]
    assert errors[0] > errors[1]


def test_the_graph_and_its_names_are_deterministic(any_case):
    assert annotate(any_case.module, any_case.plan(), INT8).script() == any_case.qdq().script()


def test_tensors_of_fewer_bits_are_limited_by_the_kernel_that_makes_them(model_of):
    case = model_of("residual")
    realized = case.realized(Recipe(precision="int8", activation_bits=4, weight_bits=4))
    ours = [call for _, call in ir.calls(realized) if ir.op_name(call).startswith(ops.PREFIX)]
    assert not [call for _, call in ir.calls(realized) if ir.is_call(call, "clip")]
    convolutions = [call for call in ours if ir.is_call(call, "tvmq.conv2d")]  # the input is limited as a float
    ranges = [(s.qmin, s.qmax) for call in convolutions for s in ops.epilogue_of(call) if isinstance(s, ops.Quantize)]
    assert ranges and all(-8 <= low <= high <= 7 for low, high in ranges)
    weights = [np.abs(ir.to_numpy(call.args[1])).max() for call in convolutions]
    assert weights == [7] * len(weights)
