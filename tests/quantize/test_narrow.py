"""Which operators become bfloat16, what is stored so, and the graph that comes of it."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from tvmq import ir
from tvmq.quantize import numerics
from tvmq.recipe import Recipe
from tvmq.recipe_rules import Rule
from tvmq.recipe_values import Precision

BF16 = Recipe(precision="bf16")
MIXED = [
    BF16,
    Recipe(precision="bf16", rules=[Rule("conv2d", "fp32")]),
    Recipe(precision="bf16", rules=[Rule("conv2d", "int8"), Rule("add", "fp32")]),
    Recipe(precision="int8", rules=[Rule("matmul", "bf16"), Rule("*second*", "bf16")]),
    Recipe(rules=[Rule("*2*", "bf16")]),
]
op = relax.op


def _conv(x: object, channels: int = 2) -> object:
    weight = np.ones((channels, 1, 1, ir.shape_of(x)[3]), np.float32)
    return op.nn.conv2d(x, relax.const(weight), data_layout="NHWC", kernel_layout="OHWI", out_layout="NHWC")


def _stored(module) -> dict[str, str]:
    return {str(var.name): ir.dtype_of(var) for var, _ in ir.calls(module)}


# --- every model ---


@pytest.mark.parametrize("recipe", MIXED, ids=range(len(MIXED)))
def test_what_is_stored_agrees_with_its_simulation(any_case, recipe: Recipe) -> None:
    """Any mixture of precisions: the realized graph computes what the conversions in float say."""
    simulated, stored = any_case.run(any_case.qdq(recipe)), any_case.run(any_case.realized(recipe))
    for a, b in zip(simulated, stored, strict=True):
        assert a.shape == b.shape and b.dtype == np.float32
        assert numerics.sqnr_db(a, b) > 35


def test_bfloat16_is_near_the_float_model(any_case) -> None:
    for reference, got in zip(any_case.reference(), any_case.run(any_case.realized(BF16)), strict=True):
        assert numerics.sqnr_db(reference, got) > 35


def test_no_conversion_is_left_to_tvm(any_case) -> None:
    """Conversions end in operators of tvmq, or in maps; what TVM compiles only moves bfloat16."""
    moves = ("reshape", "permute_dims", "squeeze", "expand_dims", "flatten", "strided_slice", "nn.pad")
    for recipe in MIXED:
        module = any_case.realized(recipe)
        for _, call in ir.calls(module):
            assert not ir.is_call(call, "quantize", "dequantize")
            if any("bfloat16" in str(arg.ty) for arg in call.args if isinstance(arg, relax.Var)):
                assert ir.op_name(call).startswith("tvmq.") or ir.is_call(call, *moves), call
        assert all(ir.dtype_of(output) != "bfloat16" for output in ir.outputs(module))


def test_every_decision_is_what_was_asked_or_has_a_reason(any_case) -> None:
    for decision in any_case.plan(BF16).decisions:
        assert (decision.precision is Precision.BF16) == (decision.reason == ""), decision


def test_no_data_is_needed(any_case) -> None:
    assert not any_case.plan(BF16).qparams


# --- one rule each ---


def _plan(graph, body, recipe: Recipe = BF16, shape: tuple[int, ...] = (1, 4, 4, 2)):
    from tvmq.quantize.annotate import annotate
    from tvmq.quantize.plan import make_plan
    from tvmq.quantize.realize import realize

    module = graph(body, shape)
    plan = make_plan(module, None, recipe, {})
    return {d.name: d for d in plan.decisions}, realize(annotate(module, plan, recipe))


def test_between_two_convolutions_everything_is_stored_narrow(graph) -> None:
    def body(emit, x):
        first = emit(op.nn.relu(emit(_conv(x), "c")), "first")
        pooled = emit(op.nn.max_pool2d(first, (2, 2), (2, 2), layout="NHWC"), "pooled")
        moved = emit(op.reshape(pooled, (1, 1, 4, 2)), "moved")
        return emit(_conv(moved), "second")

    decisions, realized = _plan(graph, body)
    assert {name: d.precision.value for name, d in decisions.items()} == dict.fromkeys(
        ("first", "pooled", "moved", "second"), "bf16"
    )
    assert _stored(realized) == {
        "x0_bf16": "bfloat16",
        "first": "bfloat16",
        "pooled": "bfloat16",
        "moved": "bfloat16",
        "second": "float32",
    }


def test_a_result_that_is_read_and_returned_is_rounded_once(graph) -> None:
    def body(emit, x):
        first = emit(_conv(x), "first")
        return emit(_conv(first), "second"), first

    _, realized = _plan(graph, body)
    assert _stored(realized)["first"] == "bfloat16"
    returned = dict(ir.bindings(realized))[ir.outputs(realized)[1]]
    assert ir.is_call(returned, "tvmq.map")
    assert ir.dtype_of(returned) == "float32"


def test_a_residual_is_read_as_it_is_stored(graph) -> None:
    def body(emit, x):
        first = emit(_conv(x), "first")
        return emit(_conv(emit(op.add(emit(_conv(first), "c"), first), "sum")), "last")

    _, realized = _plan(graph, body)
    (call,) = (value for var, value in ir.calls(realized) if str(var.name) == "sum")
    assert [ir.dtype_of(arg) for arg in call.args] == ["bfloat16"] * 3


def test_float_tensors_are_added_without_a_conversion(graph) -> None:
    def body(emit, x):
        root = emit(op.sqrt(x), "root")
        return emit(_conv(emit(op.add(root, emit(_conv(x), "c")), "sum")), "last")

    decisions, realized = _plan(graph, body)
    (call,) = (value for var, value in ir.calls(realized) if str(var.name) == "sum")
    assert [ir.dtype_of(arg) for arg in call.args] == ["bfloat16", "bfloat16", "float32"]
    assert decisions["root"].reason == "no integer or 16-bit kernel for this operator"


@pytest.mark.parametrize(
    ("body", "name", "reason"),
    [
        (
            lambda emit, x: emit(op.nn.softmax(x), "s"),
            "s",
            "neither what it reads nor what it makes is stored in 16 bits",
        ),
        (
            lambda emit, x: emit(_conv(emit(op.nn.max_pool2d(x, (2, 2), layout="NHWC"), "p")), "c"),
            "p",
            "its input 'x0' is float32",
        ),
        (
            lambda emit, x: emit(op.nn.max_pool2d(emit(_conv(x), "c"), (2, 2), layout="NHWC"), "p"),
            "p",
            "nobody reads its result in 16 bits",
        ),
        (
            lambda emit, x: emit(
                _conv(emit(op.nn.max_pool2d(emit(_conv(x), "c"), (2, 2), layout="NHWC", ceil_mode=True), "p")), "d"
            ),
            "p",
            "max pooling in this layout or with ceil_mode has no kernel",
        ),
    ],
)
def test_what_stays_float_has_its_reason(graph, body, name: str, reason: str) -> None:
    decisions, _ = _plan(graph, body)
    assert (decisions[name].precision, decisions[name].reason) == (Precision.FP32, reason)
