import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from tvm import relax

from tvmq import ir
from tvmq.model import Signature, TensorSpec
from tvmq.quantize.calibrate import calibrate
from tvmq.quantize.decisions import Decision, float_decisions
from tvmq.quantize.plan import make_plan
from tvmq.quantize.table import CalibrationTable
from tvmq.recipe import Recipe
from tvmq.recipe_rules import Rule
from tvmq.recipe_values import Precision

INT8 = Recipe(precision="int8")
UNWANTED = "nobody reads its result as integers"


def _precisions(case, recipe: Recipe = INT8) -> dict[str, str]:
    return {d.name: d.precision.value for d in case.plan(recipe).decisions}


@pytest.mark.parametrize(
    ("model", "integer"),
    [
        ("conv_bn_relu", ["relu conv2d", "relu_2 conv2d"]),
        (
            "residual",
            ["relu conv2d", "relu_2 conv2d", "a2_1 conv2d", "relu_3 conv2d", "relu_4 conv2d", "relu_5 conv2d"],
        ),
        ("depthwise_separable", ["hardtanh conv2d", "hardtanh_2 conv2d", "add conv2d"]),
        ("concat", ["relu conv2d", "right_1 conv2d", "cat concat", "last_1 conv2d"]),
        (
            "pools",
            [
                "relu conv2d",
                "nn.max_pool2d",
                "second_1 conv2d",
                "avg_pool2d",
                "avg_pool2d",
                "mean avg_pool2d",
                "matmul",
            ],
        ),
        ("flatten_linear", ["relu conv2d", "nn.max_pool2d", "permute_dims", "view reshape", "matmul", "matmul"]),
        ("pad_shortcut", ["relu conv2d", "strided_slice", "strided_slice", "nn.pad", "relu_2 conv2d", "relu_3 conv2d"]),
        ("returned_and_consumed", ["relu conv2d", "second_1 conv2d"]),
        ("forks", ["a_1 conv2d", "b_1 conv2d", "relu add", "add_4 conv2d"]),
        ("clips", ["clamp conv2d", "clamp_2 conv2d", "add conv2d", "clamp_4 conv2d"]),
        ("shared_weights", ["relu conv2d", "conv_2 conv2d"]),
    ],
)
def test_which_operators_become_integer(model_of, model, integer):
    decisions = [d for d in model_of(model).plan().decisions if d.precision is Precision.INT8]
    assert len(decisions) == len(integer)
    for decision, expected in zip(decisions, integer, strict=True):
        assert f"{decision.name} {decision.kind}".endswith(expected)


def test_a_transformer_block(model_of):
    decisions = model_of("transformer").plan().decisions
    by_kind: dict[str, set[str]] = {}
    for d in decisions:
        by_kind.setdefault(d.kind, set()).add(d.reason)
    matmuls = [d for d in decisions if d.kind == "matmul"]
    assert sum(d.precision is Precision.INT8 for d in matmuls) == 6
    assert by_kind["matmul"] == {""}
    assert by_kind["batch_matmul"] == {"the recipe's kinds leave out batch_matmul"}
    for kind, reasons in by_kind.items():
        if kind.endswith(("layer_norm", "softmax")):
            assert "" not in reasons


def test_every_operator_has_one_decision_and_every_float_one_a_reason(any_case):
    plan = any_case.plan()
    names = [d.name for d in plan.decisions]
    fused = {str(member.name) for chain in plan.chains for member in chain.members[:-1]}
    assert len(names) == len(set(names))
    assert set(names) | fused == {str(var.name) for var, _ in ir.calls(any_case.module)}
    assert not set(names) & fused
    for d in plan.decisions:
        assert bool(d.reason) == (d.precision is Precision.FP32)


def test_the_plan_is_deterministic(any_case):
    plans = [any_case.plan() for _ in range(3)]
    assert all(p.decisions == plans[0].decisions for p in plans)
    assert all(list(p.qparams.items()) == list(plans[0].qparams.items()) for p in plans)


def test_a_float_recipe_makes_nothing_integer(any_case):
    plan = any_case.plan(Recipe(precision="fp32"))
    assert not plan.integer and not plan.qparams
    assert all(d.precision is Precision.FP32 and d.reason for d in plan.decisions)


# --- rules ---


@pytest.mark.parametrize("match", ["second.1", "sec*", "second_1", "relu_2"])
def test_a_rule_names_a_layer_by_path_or_variable(model_of, match: str):
    recipe = Recipe(precision="int8", rules=[Rule(match, Precision.FP32)])
    decisions = model_of("conv_bn_relu").decisions(recipe)
    assert decisions["relu_2"].reason == f"rule {match!r}"
    assert decisions["relu"].precision is Precision.INT8


def test_a_rule_names_a_kind(model_of):
    recipe = Recipe(precision="int8", rules=[Rule("avg_pool2d", Precision.FP32)])
    decisions = model_of("pools").decisions(recipe)
    pools = [d for d in decisions.values() if d.kind == "avg_pool2d"]
    assert {d.reason for d in pools} == {"rule 'avg_pool2d'"}
    # The classifier takes its input as integers whoever made it.
    assert [d.precision for d in decisions.values() if d.kind == "matmul"] == [Precision.INT8]


@pytest.mark.parametrize(("kind", "model"), [("concat", "concat"), ("max_pool2d", "flatten_linear")])
def test_rules_and_kinds_reach_operators_outside_chains(model_of, kind, model):
    for recipe, why in [
        (Recipe(precision="int8", rules=[Rule(kind, Precision.FP32)]), f"rule {kind!r}"),
        (Recipe(precision="int8", kinds=("conv2d", "matmul")), f"the recipe's kinds leave out {kind}"),
    ]:
        (decision,) = (d for d in model_of(model).plan(recipe).decisions if d.kind.endswith(kind))
        assert (decision.precision, decision.reason) == (Precision.FP32, why)


def test_one_layer_of_a_float_model(model_of):
    recipe = Recipe(rules=[Rule("second*", Precision.INT8)])
    case = model_of("conv_bn_relu")
    assert [d.name for d in case.plan(recipe).decisions if d.precision is Precision.INT8] == ["relu_2"]
    assert [str(var.name) for var in case.plan(recipe).qparams] == ["relu"]


# --- tensors ---


def test_what_is_quantized_and_who_makes_it(model_of):
    plan = model_of("conv_bn_relu").plan()
    assert [str(var.name) for var in plan.qparams] == ["x_nhwc", "relu"]
    assert [str(var.name) for var in plan.produced] == ["relu"]  # the last result stays float: nobody wants integers


def test_a_moved_tensor_shares_the_range_of_its_source(model_of):
    case = model_of("flatten_linear")
    plan, table = case.plan(), case.table()
    params = {str(var.name): p for var, p in plan.qparams.items()}
    moved = [d.name for d in plan.decisions if d.kind in ("nn.max_pool2d", "permute_dims", "reshape") and not d.reason]
    assert len(moved) == 3
    assert {params[name] for name in ["relu", *moved]} == {table.tensors["relu"].qparams}


def test_what_only_a_pass_through_operator_wants_is_quantized(model_of):
    # The pool's input is wanted through the pool, the transpose and the reshape alone.
    case = model_of("flatten_linear")
    assert "relu" in {str(var.name) for var in case.plan().produced}


class _Tail(nn.Module):
    """Integer operators whose integer result nobody wants."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(functional.relu(self.conv(x)), 2)
        return torch.softmax(torch.cat([x, x], 1).flatten(1), -1)


def test_what_nobody_wants_as_integers_is_float(build):
    case = build(_Tail(), (1, 3, 6, 6))
    decisions = case.plan().decisions
    for kind in ("nn.max_pool2d", "concat", "reshape"):
        (decision,) = (d for d in decisions if d.kind == kind)
        assert (decision.precision, decision.reason) == (Precision.FP32, UNWANTED)
    # The convolution then has no reason to store integers either.
    assert not case.plan().produced
    assert [d.precision for d in decisions if d.kind == "conv2d"] == [Precision.INT8]


class _Half(nn.Module):
    """A pool with a float reader, whose input a convolution reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = functional.relu(self.conv(x))
        return self.last(x), torch.softmax(functional.max_pool2d(x, 2), 1)


def test_a_pool_without_integer_readers_beside_a_convolution_with(build):
    case = build(_Half(), (1, 3, 6, 6))
    plan = case.plan()
    (pool,) = (d for d in plan.decisions if d.kind == "nn.max_pool2d")
    assert (pool.precision, pool.reason) == (Precision.FP32, UNWANTED)
    assert [str(var.name) for var in plan.produced] == ["relu"]


# --- declines ---


def _reasons(case) -> dict[str, str]:
    return {d.kind: d.reason for d in case.plan().decisions}


class _Between(nn.Module):
    """`middle` between two convolutions."""

    def __init__(self, middle) -> None:
        super().__init__()
        self.first, self.last, self.middle = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), middle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.first(x)))


@pytest.mark.parametrize(
    ("middle", "kind", "reason"),
    [
        (lambda x: functional.pad(x, (1, 1, 1, 1), value=99.0), "nn.pad", "pads with 99, outside of its input's range"),
        (lambda x: functional.pad(x[:, :, 1:], (1, 1, 1, 1), value=99.0), "nn.pad", "pads with 99, outside"),
        (lambda x: x.mean((1, 2), keepdim=True).expand(1, 4, 6, 6) + x, "mean", "no integer or 16-bit kernel"),
        (lambda x: torch.softmax(x, 1), "nn.softmax", "no integer or 16-bit kernel"),
        (lambda x: torch.softmax(x, 1)[:, :, 1:], "strided_slice", "its input 'softmax"),
        (lambda x: functional.relu(torch.softmax(x, 1)), "unary", "its input 'softmax"),
        (lambda x: x + torch.softmax(x, 1), "add", "its input 'softmax"),
        (lambda x: torch.cat([x, torch.softmax(x, 1)], 1)[:, :4], "concat", "its input 'softmax"),
        (lambda x: torch.cat([x, torch.ones(1, 4, 1, 6)], 2), "concat", "float|constant"),
        (lambda x: x @ x.transpose(2, 3), "batch_matmul", "the recipe's kinds leave out batch_matmul"),
    ],
)
def test_what_stays_float_says_why(build, middle, kind, reason):
    reasons = _reasons(build(_Between(middle), (1, 3, 6, 6)))
    assert any(part in reasons[kind] for part in reason.split("|")), reasons[kind]
    assert reasons["conv2d"] == ""


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("model", "tensor", "floats"),
    [
        ("residual", "a2_1", set()),  # a float residual: its reader, a convolution, stays integer
        ("forks", "a_1", {"relu"}),  # an add stays float without its first input,
        ("forks", "b_1", {"relu"}),  # and without its second
        ("concat", "right_1", {"concat"}),
        ("concat", "cat", {"concat", "last_1"}),
        ("flatten_linear", "relu", {"nn.max_pool2d", "permute_dims", "reshape"}),
    ],
)
def test_a_tensor_missing_from_the_table(model_of, without, model, tensor, floats, keep):
    case = model_of(model)
    before = _precisions(case)
    after = case.decisions(table=without(case.table(), tensor, keep=keep))
    changed = [after[name] for name, precision in before.items() if after[name].precision.value != precision]
    ends = {str(chain.end.name) for chain in case.plan().chains}
    assert {d.name if d.name in ends else d.kind for d in changed} == floats
    for decision in changed:
        assert any(words in decision.reason for words in ("calibration table", "is float", "nobody"))


def test_the_last_addend_of_a_sum_may_be_the_missing_one(graph):
    # add(add(a, b), c) is one kernel; without the range of c it stays float, and says so.
    shape, weight = (1, 5, 5, 4), relax.const(np.ones((4, 1, 1, 4), np.float32))

    def body(emit, x):
        def conv(value, name):
            return emit(relax.op.nn.conv2d(value, weight, data_layout="NHWC", kernel_layout="OHWI"), name)

        # Returned too, so that no convolution swallows the sum.
        a, b, c = (conv(x, name) for name in "abc")
        return conv(emit(relax.op.add(emit(relax.op.add(a, b), "ab"), c), "total"), "last"), a, b, c

    module = graph(body, shape)
    signature = Signature((TensorSpec("x0", shape, "float32"),), ())
    table = calibrate(module, signature, [np.ones(shape)], INT8)

    def total(table: CalibrationTable) -> Decision:
        return {d.name: d for d in make_plan(module, table, INT8, {}).decisions}["total"]

    assert total(table).precision is Precision.INT8
    edited = dataclasses.replace(table, tensors={k: v for k, v in table.tensors.items() if k != "c"})
    assert (total(edited).precision, total(edited).reason) == (Precision.FP32, "'c' is not in the calibration table")


def test_float_decisions_name_what_becomes_a_kernel(model_of):
    case, recipe = model_of("conv_bn_relu"), Recipe()
    decisions = float_decisions(case.module, "asked", recipe, {})
    assert [(d.name, d.kind) for d in decisions if d.kind == "conv2d"] == [("relu", "conv2d"), ("relu_2", "conv2d")]
    assert {(d.precision, d.reason) for d in decisions} == {(Precision.FP32, "asked")}
