import numpy as np
import pytest
import torch
import tvm
from torch import nn
from torch.nn import functional
from tvm import relax

from tvmq import ir, op_calls, ops
from tvmq.oracle import interpret
from tvmq.quantize import numerics
from tvmq.quantize.realize import realize
from tvmq.recipe import Recipe
from tvmq.recipe_rules import Rule

INT8 = Recipe(precision="int8")
RECIPES = [
    INT8,
    Recipe(precision="int8", symmetric=True, per_channel=False, observer="percentile", percentile=99.5),
    Recipe(precision="int8", observer="moving_average", kinds=("conv2d", "matmul")),
    Recipe(precision="int8", rules=[Rule("conv2d", "fp32")]),
]
SHAPE = (1, 4, 4, 2)
op = relax.op


# --- every model ---


def test_a_float_module_keeps_its_results(any_case):
    for reference, got in zip(any_case.reference(), any_case.run(realize(any_case.module)), strict=True):
        assert got.dtype == np.float32 and got.shape == reference.shape
        np.testing.assert_allclose(got, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES, ids=range(len(RECIPES)))
def test_integers_agree_with_their_simulation(any_case, recipe: Recipe):
    simulated = any_case.run(any_case.qdq(recipe))
    stored = any_case.run(any_case.realized(recipe))
    for a, b in zip(simulated, stored, strict=True):
        assert a.shape == b.shape and b.dtype == np.float32
        assert numerics.sqnr_db(a, b) > 40
    # What is stored is a property of the lowering, not of the semantics.
    for a, b in zip(stored, any_case.run(any_case.realized(recipe, storage="uint8")), strict=True):
        assert (a == b).all()


def test_integers_are_near_the_float_model(any_case):
    for reference, got in zip(any_case.reference(), any_case.run(any_case.realized()), strict=True):
        assert numerics.sqnr_db(reference, got) > 30


def test_no_qdq_and_no_unfused_operator_is_left(any_case):
    fused = ("quantize", "dequantize", "nn.conv2d", "nn.relu", "clip", "nn.gelu", "sigmoid", "tanh")
    for recipe in RECIPES:
        module = any_case.realized(recipe)
        assert not [ir.op_name(call) for _, call in ir.calls(module) if ir.is_call(call, *fused)]
        relax.analysis.well_formed(relax.transform.Normalize()(module))


def test_what_the_plan_calls_integer_is_integer(any_case):
    calls = {str(var.name): call for var, call in ir.calls(any_case.realized())}
    for decision in any_case.plan().decisions:
        if decision.kind in ("conv2d", "matmul", "avg_pool2d") and decision.name in calls:
            x = calls[decision.name].args[0]
            assert ir.dtype_of(x) == ("int8" if decision.precision.value == "int8" else "float32"), decision
        if decision.kind == "concat" and decision.precision.value == "int8":
            assert ir.op_name(calls[decision.name]) == "tvmq.concat"


def test_realization_is_deterministic(any_case):
    assert realize(any_case.qdq()).script() == realize(any_case.qdq()).script()


# --- structure ---


def _conv(x: object, weight: object) -> object:
    return op.nn.conv2d(x, weight, data_layout="NHWC", kernel_layout="OHWI", out_layout="NHWC")


WEIGHT = np.array([[1, -2], [3, 4], [5, 6]], np.int8).reshape(3, 1, 1, 2)
SCALES = np.array([0.5, 0.25, 2.0], np.float32)
BIAS = np.array([1.0, -1.0, 6.0], np.float32)


def _q(emit, value: object, scale: float, zero_point: int, name: str) -> object:
    q = op.quantize(value, relax.const(scale, "float32"), relax.const(zero_point, "int8"), axis=-1, out_dtype="int8")
    return emit(q, name)


def _dq(emit, value: object, scale: float, zero_point: int, name: str) -> object:
    return emit(op.dequantize(value, relax.const(scale, "float32"), relax.const(zero_point, "int8"), axis=-1), name)


def _weight(emit, zero_points: np.ndarray | None = None, axis: int = 0) -> object:
    zeros = np.zeros(3, np.int8) if zero_points is None else zero_points
    return emit(op.dequantize(relax.const(WEIGHT), relax.const(SCALES), relax.const(zeros), axis=axis), "w")


def _conv_bias_relu_qdq(emit, x):
    d = _dq(emit, _q(emit, x, 0.5, -3, "x_q"), 0.5, -3, "x_dq")
    y = emit(op.add(emit(_conv(d, _weight(emit)), "c"), relax.const(BIAS)), "b")
    y = _q(emit, emit(op.nn.relu(y), "r"), 2.0, 5, "r_q")
    return _dq(emit, y, 2.0, 5, "r_dq")


@pytest.mark.parametrize(("storage", "offset"), [("int8", 0), ("uint8", 128)])
def test_conv_bias_relu_becomes_one_operator(graph, storage: str, offset: int):
    low, high = numerics.INT_RANGE[storage]

    def expected(emit, x):
        to_int = (ops.Multiply(2.0), ops.Quantize(-3 + offset, low, high, storage))
        q = emit(op_calls.elementwise(x, (), to_int, out_shape=SHAPE, out_dtype=storage), "x_q")
        # Bias in units of 0.5 * scale; multipliers 0.5 * scale / 2; relu is the lower limit, at the zero point.
        bias = relax.const(np.array([4, -8, 6], np.int32))
        multiplier = relax.const(np.array([0.125, 0.0625, 0.5], np.float32))
        # Only floats are read: integers 5 to 127 are rounded to, and multiplied by the scale at once.
        steps = (ops.Bias(), ops.Scale(), ops.Round(0, 122), ops.Multiply(2.0))
        y = op_calls.conv2d(
            q, relax.const(WEIGHT), [bias, multiplier], steps, strides=(1, 1), padding=(0,) * 4, dilation=(1, 1),
            groups=1, x_zero_point=-3 + offset, out_shape=(1, 4, 4, 3), out_dtype="float32",
        )  # fmt: skip
        return emit(y, "r_dq")

    after = realize(graph(_conv_bias_relu_qdq, SHAPE), storage)
    tvm.ir.assert_structural_equal(after, graph(expected, SHAPE))


def test_a_float_chain_becomes_one_operator(graph):
    weight = np.ones((3, 1, 1, 2), np.float32)

    def before(emit, x, y):
        c = emit(op.add(emit(_conv(x, relax.const(weight)), "c"), relax.const(BIAS)), "b")
        return emit(op.clip(emit(op.add(c, y), "a"), 0, 6), "r")

    def expected(emit, x, y):
        steps = (ops.Bias(), ops.Residual(), ops.Clip(0.0, 6.0))
        return emit(
            op_calls.conv2d(
                x, relax.const(weight), [relax.const(BIAS), y], steps, strides=(1, 1), padding=(0,) * 4,
                dilation=(1, 1), groups=1, out_shape=(1, 4, 4, 3), out_dtype="float32",
            ),
            "r",
        )  # fmt: skip

    shapes = (SHAPE, (1, 4, 4, 3))
    tvm.ir.assert_structural_equal(realize(graph(before, *shapes)), graph(expected, *shapes))


@pytest.mark.parametrize("limited", [False, True])
def test_floats_scaled_by_channel_alone_are_left_to_tvm(graph, limited: bool):
    def build(emit, x):
        moved = emit(op.flip(x, 1), "moved")
        scaled = emit(op.multiply(moved, relax.const(np.array([0.5, -2], np.float32))), "scaled")
        added = emit(op.add(scaled, relax.const(np.array([0, 3], np.float32))), "added")
        return emit(op.nn.relu(added), "limited") if limited else added

    realized = realize(module := graph(build, SHAPE))
    names = [ir.op_name(call) for _, call in ir.calls(realized)]
    assert names == (["flip", "tvmq.map"] if limited else ["flip", "multiply", "add"])
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    np.testing.assert_array_equal(interpret.run(realized, [x])[0], interpret.run(module, [x])[0])


def _epilogues(case, recipe: Recipe = INT8) -> dict[str, list[str]]:
    return {
        str(var.name): [type(step).__name__ for step in ops.epilogue_of(call)]
        for var, call in ir.calls(case.realized(recipe))
        if ir.op_name(call).startswith(ops.PREFIX)
    }


def test_a_linear_chain_is_computed_in_units_of_its_output(model_of):
    # relu6 before the residual add stays a step of its own; the limits at the end become the integer range.
    epilogues = _epilogues(model_of("clips"))
    assert epilogues["clamp"] == ["Bias", "Scale", "Quantize"]
    assert epilogues["add"] == ["Bias", "Scale", "Clip", "Residual", "Quantize"]
    assert epilogues["clamp_4"] == ["Bias", "Scale", "Clip", "Clip", "Clip"]  # a float result: clips stay steps


def test_a_chain_with_an_activation_is_computed_in_real_units(build):
    class GeluAfter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 9), nn.Linear(9, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(functional.gelu(self.up(x)))

    case = build(GeluAfter(), (7, 8))
    assert _epilogues(case)["gelu"] == ["Bias", "Scale", "Activate", "Multiply", "Quantize"]
    assert numerics.sqnr_db(case.run(case.qdq())[0], case.run(case.realized())[0]) > 40


def test_a_float_residual_is_added_in_real_units(model_of, without):
    case = model_of("residual")
    table = without(case.table(), "a2_1")  # the shortcut's result stays float
    module = case.realized(table=table)
    calls = {str(var.name): call for var, call in ir.calls(module)}
    steps = ops.epilogue_of(calls["relu_3"])
    assert steps[2] == ops.Residual() and isinstance(steps[-2], ops.Multiply | ops.Clip)
    assert ir.dtype_of(calls["a2_1"]) == "float32" and ir.dtype_of(calls["a2_1"].args[0]) == "int8"
    assert numerics.sqnr_db(case.run(case.qdq(table=table))[0], case.run(module)[0]) > 40


def test_a_float_convolution_between_integer_ones_is_fused(model_of):
    recipe = Recipe(precision="int8", rules=[Rule("a1*", "fp32")])
    calls = {str(var.name): call for var, call in ir.calls(model_of("residual").realized(recipe))}
    assert ir.op_name(calls["relu_2"]) == "tvmq.conv2d"
    assert [ir.dtype_of(arg) for arg in calls["relu_2"].args] == ["float32"] * 3


def test_the_bias_of_a_dead_channel_survives(model_of):
    case = model_of("dead_channels")
    watched: dict[str, np.ndarray] = {}
    interpret.run(case.realized(), case.inputs, lambda name, value: watched.update({name: value}))
    params = next(p for var, p in case.plan().qparams.items() if str(var.name) == "relu")
    values = numerics.dequantize(watched["relu"], params.scale, params.zero_point)
    for channel, bias in ((0, 0.7), (1, 1.3)):
        assert np.abs(values[..., channel] - bias).max() <= 0.51 * params.scale


@pytest.mark.parametrize("count_include_pad", [True, False])
def test_an_integer_average_counts_padding_as_pytorch_does(build, count_include_pad: bool):
    class Average(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = functional.avg_pool2d(self.first(x) + 3.0, 3, 2, 1, count_include_pad=count_include_pad)
            return self.last(x)

    case = build(Average(), (1, 3, 7, 7))
    (pool,) = (call for _, call in ir.calls(case.realized()) if ir.is_call(call, "tvmq.avg_pool2d"))
    assert ir.dtype_of(pool.args[0]) == "int8"
    assert numerics.sqnr_db(case.reference()[0], case.run(case.realized())[0]) > 35


@pytest.mark.parametrize("value", [0.0, 1.3, -2.25, 1e9, float("-inf")])
def test_padding_is_quantized(graph, value: float):
    def body(emit, x):
        d = _dq(emit, _q(emit, x, 0.5, -3, "x_q"), 0.5, -3, "x_dq")
        padded = emit(op.nn.pad(d, [0, 0, 1, 0, 0, 2, 0, 0], "constant", value), "p")
        return _dq(emit, _q(emit, padded, 0.5, -3, "p_q"), 0.5, -3, "p_dq")

    module = graph(body, SHAPE)
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    for storage in ("int8", "uint8"):
        realized = realize(module, storage)
        (pad,) = (call for _, call in ir.calls(realized) if ir.is_call(call, "nn.pad"))
        assert ir.dtype_of(pad) == storage
        assert (interpret.run(realized, [x])[0] == interpret.run(module, [x])[0]).all()


# --- declines: QDQ that tvmq's planner does not write, but a model may bring ---


def _same_results(module: tvm.IRModule) -> tvm.IRModule:
    x = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    after = realize(module)
    for a, b in zip(interpret.run(module, [x]), interpret.run(after, [x]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    return after


@pytest.mark.parametrize("zero_points", [[1, 0, 0], [0, 0, -5]])
def test_an_asymmetric_weight_is_not_taken_for_a_symmetric_one(graph, zero_points):
    def body(emit, x):
        d = _dq(emit, _q(emit, x, 0.5, -3, "x_q"), 0.5, -3, "x_dq")
        return emit(_conv(d, _weight(emit, np.array(zero_points, np.int8))), "c")

    after = _same_results(graph(body, SHAPE))
    assert "nn.conv2d" in [ir.op_name(call) for _, call in ir.calls(after)]


def test_a_weight_scaled_along_another_axis_is_not_taken(graph):
    def body(emit, x):
        d = _dq(emit, _q(emit, x, 0.5, -3, "x_q"), 0.5, -3, "x_dq")
        w = op.dequantize(relax.const(WEIGHT), relax.const(SCALES[:2]), relax.const(np.zeros(2, np.int8)), axis=3)
        return emit(_conv(d, emit(w, "w")), "c")

    after = _same_results(graph(body, SHAPE))
    assert "nn.conv2d" in [ir.op_name(call) for _, call in ir.calls(after)]


def test_a_weight_with_one_scale_is_taken(graph):
    def body(emit, x):
        d = _dq(emit, _q(emit, x, 0.5, -3, "x_q"), 0.5, -3, "x_dq")
        w = op.dequantize(relax.const(WEIGHT), relax.const(np.float32(0.5)), relax.const(np.int8(0)), axis=-1)
        return emit(op.add(emit(_conv(d, emit(w, "w")), "c"), relax.const(BIAS)), "b")

    after = _same_results(graph(body, SHAPE))
    assert [ir.op_name(call) for _, call in ir.calls(after)] == ["tvmq.map", "tvmq.conv2d"]


def test_an_integer_weight_alone_does_not_make_an_integer_product(graph):
    after = _same_results(graph(lambda emit, x: emit(_conv(x, _weight(emit)), "c"), SHAPE))
    assert "nn.conv2d" in [ir.op_name(call) for _, call in ir.calls(after)]


@pytest.mark.parametrize(
    "move",
    [
        lambda x: op.nn.pad(x, [0, 0, 1, 1, 1, 1, 0, 0], "reflect"),
        lambda x: op.nn.max_pool2d(x, (3, 3), (2, 2), ceil_mode=True, layout="NHWC", out_layout="NHWC"),
        lambda x: op.nn.max_pool2d(x, (2, 2), (2, 2)),
    ],
    ids=["pad-reflect", "ceil_mode", "NCHW"],
)
def test_moves_without_an_integer_form_stay_float(graph, move):
    def body(emit, x):
        d = _dq(emit, _q(emit, x, 0.5, -3, "x_q"), 0.5, -3, "x_dq")
        return _dq(emit, _q(emit, emit(move(d), "m"), 0.5, -3, "m_q"), 0.5, -3, "m_dq")

    after = _same_results(graph(body, SHAPE))
    (moved,) = (call for _, call in ir.calls(after) if ir.is_call(call, "nn.pad", "nn.max_pool2d"))
    assert ir.dtype_of(moved) == "float32"


def test_a_move_that_changes_the_scale_is_requantized(graph):
    def body(emit, x):
        d = _dq(emit, _q(emit, x, 0.5, -3, "x_q"), 0.5, -3, "x_dq")
        return _dq(emit, _q(emit, emit(op.reshape(d, (32,)), "m"), 0.25, 4, "m_q"), 0.25, 4, "m_dq")

    _same_results(graph(body, SHAPE))


def test_a_concat_with_a_float_operand_is_computed_in_float(graph):
    def body(emit, x):
        d = _dq(emit, _q(emit, x, 0.5, -3, "x_q"), 0.5, -3, "x_dq")
        joined = emit(op.concat([d, relax.const(np.ones((1, 4, 4, 3), np.float32))], 3), "j")
        return _dq(emit, _q(emit, joined, 0.5, -3, "j_q"), 0.5, -3, "j_dq")

    after = _same_results(graph(body, SHAPE))
    assert "concat" in [ir.op_name(call) for _, call in ir.calls(after)]


def test_a_tensor_quantized_twice_is_computed_once_in_float(graph):
    def body(emit, x):
        d = _dq(emit, _q(emit, x, 0.5, -3, "x_q"), 0.5, -3, "x_dq")
        c = emit(_conv(d, _weight(emit)), "c")
        return tuple(_dq(emit, _q(emit, c, s, 0, f"q{s}"), s, 0, f"d{s}") for s in (0.5, 0.25))

    after = _same_results(graph(body, SHAPE))
    assert [ir.op_name(call) for _, call in ir.calls(after)].count("tvmq.conv2d") == 1


def test_limits_that_limit_nothing_are_no_steps(graph):
    module = graph(lambda emit, x: emit(op.clip(x, float("-inf"), float("inf")), "l"), SHAPE)
    (call,) = (call for _, call in ir.calls(realize(module)))
    assert ops.epilogue_of(call) == ()
    _same_results(module)
