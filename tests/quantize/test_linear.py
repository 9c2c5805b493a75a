"""Dynamic and weight-only linear layers: which they are, the graph that comes of it, and how near it is to floats."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from tvmq import ir, ops
from tvmq.oracle import interpret
from tvmq.quantize import numerics
from tvmq.recipe import Recipe
from tvmq.recipe_rules import Rule
from tvmq.recipe_values import Precision

DYNAMIC = Recipe(precision="int8-dynamic")
MIXED = [
    DYNAMIC,
    Recipe(precision="int8-dynamic", per_channel=False),
    Recipe(precision="int8-weight"),
    Recipe(precision="int8", rules=[Rule("matmul", "int8-dynamic")]),
    Recipe(precision="int8", rules=[Rule("matmul", "int8-weight")]),
    Recipe(precision="bf16", rules=[Rule("matmul", "int8-dynamic")]),
    Recipe(precision="bf16", rules=[Rule("matmul", "int8-weight")]),
]


class Block(nn.Module):
    """A post-norm encoder layer: what the norms make is read by linear layers and by residual adds."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, s, width = x.shape
        q, k, v = (f(x).view(n, s, 2, width // 2).transpose(1, 2) for f in (self.query, self.key, self.value))
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, s, width)
        x = self.norm1(x + self.out(mixed))
        return self.norm2(x + self.down(functional.gelu(self.up(x))))


@pytest.fixture(scope="module")
def encoder(make_a_case):
    torch.manual_seed(0)
    return make_a_case(nn.Sequential(Block(), Block()), (1, 7, 64), batches=1)


def _calls(module, name: str) -> list:
    return [call for _, call in ir.calls(module) if ir.is_call(call, name)]


# --- every model ---


@pytest.mark.parametrize("recipe", MIXED, ids=range(len(MIXED)))
@pytest.mark.parametrize("storage", ["int8", "uint8"])
def test_what_is_realized_agrees_with_its_simulation(any_case, recipe: Recipe, storage: str) -> None:
    simulated, stored = any_case.run(any_case.qdq(recipe)), any_case.run(any_case.realized(recipe, storage=storage))
    for a, b in zip(simulated, stored, strict=True):
        assert a.shape == b.shape and b.dtype == np.float32
        assert numerics.sqnr_db(a, b) > 35


@pytest.mark.parametrize("recipe", MIXED, ids=range(len(MIXED)))
def test_no_pair_is_left(any_case, recipe: Recipe) -> None:
    left, module = ("quantize", "dequantize", "matmul"), any_case.realized(recipe)
    values, readers = dict(ir.bindings(module)), ir.users(module)
    for var, call in ir.calls(module):
        if ir.is_call(call, *ops.DEQUANTIZERS):
            assert all(ir.is_call(values[reader], "tvmq.conv2d") for reader in readers[var])
        assert not ir.is_call(call, *left) or (ir.is_call(call, "matmul") and not ir.is_constant(call.args[1])), call
        if ir.is_call(call, "tvmq.map"):
            assert ops.epilogue_of(call) != (ops.RowScale(),)


# --- decisions ---


def test_only_linear_layers_take_a_linear_precision(model_of) -> None:
    decisions = model_of("flatten_linear").plan(DYNAMIC).decisions
    assert {d.kind for d in decisions if d.precision is Precision.INT8_DYNAMIC} == {"matmul"}
    reasons = {d.kind: d.reason for d in decisions if d.precision is not Precision.INT8_DYNAMIC}
    assert reasons["conv2d"] == "int8-dynamic is for linear layers"
    products = [d for d in model_of("transformer").plan(DYNAMIC).decisions if d.kind.endswith("matmul")]
    floats = [d.reason for d in products if d.precision is Precision.FP32]
    assert floats == ["the recipe's kinds leave out batch_matmul"] * 2 and len(products) == 8


def test_no_data_is_needed(model_of) -> None:
    for recipe in MIXED[:3]:
        case = model_of("transformer")
        from tvmq.quantize.plan import make_plan

        assert make_plan(case.module, None, recipe, case.paths).float_ends


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (Recipe(precision="int4-weight"), "its 16 inputs are no multiple of the group size, 32"),
        (Recipe(precision="int8-weight", group_size=128), "its 16 inputs are no multiple of the group size, 128"),
        (Recipe(precision="int8-weight"), None),
        (Recipe(precision="int8-dynamic", group_size=128), None),
    ],
)
def test_a_layer_without_whole_groups_stays_float(model_of, recipe: Recipe, reason: str | None) -> None:
    query = next(d for d in model_of("transformer").plan(recipe).decisions if d.kind == "matmul")
    assert query.reason == (reason or "")
    assert query.precision is (Precision.FP32 if reason else recipe.precision)


def test_rules_choose_layers(encoder) -> None:
    rules = [Rule("0.*", "int4-weight"), Rule("*.down", "fp32")]
    decisions = encoder.plan(Recipe(precision="int8-dynamic", rules=rules)).decisions
    found = [d.precision.value for d in decisions if d.kind == "matmul"]
    assert found == ["int4-weight"] * 6 + ["int8-dynamic"] * 5 + ["fp32"]


# --- structure ---


def test_layers_that_read_one_tensor_share_its_quantized_rows(encoder) -> None:
    module = encoder.realized(DYNAMIC)
    makers = [call for _, call in ir.calls(module) if ops.is_row_quantizer(call)]
    # The input, two attentions and two GELUs on their own; four of the norms with their rows, but the last.
    assert [ir.op_name(call).removeprefix("tvmq.") for call in makers] == [
        "map", "map", "layer_norm", "map", "layer_norm", "map", "layer_norm", "map",
    ]  # fmt: skip
    products = _calls(module, "tvmq.matmul")
    assert len(products) == 12
    assert len({call.args[0] for call in products[:3]}) == 1
    assert {ir.dtype_of(call.args[0]) for call in products} == {"int8"}


def test_a_norm_gives_rows_beside_its_values_where_both_are_read(encoder) -> None:
    norm = _calls(encoder.realized(DYNAMIC, storage="uint8"), "tvmq.layer_norm")[0]
    assert ops.row_quantizer(norm) == ops.QuantizeRows(True, 128, "uint8")
    assert ops.results(norm) == [((1, 7, 64), "float32"), ((1, 7, 64), "uint8"), ((1, 7), "float32")]


def test_a_norm_that_only_a_linear_layer_reads_gives_rows_alone(make_a_case) -> None:
    case = make_a_case(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8)), (2, 16), batches=1)
    (norm,) = _calls(case.realized(DYNAMIC), "tvmq.layer_norm")
    assert ops.row_quantizer(norm) == ops.QuantizeRows(False, 0, "int8")


def test_the_bias_of_a_dynamic_layer_is_added_after_its_scales(encoder) -> None:
    product = _calls(encoder.realized(DYNAMIC), "tvmq.matmul")[0]
    assert ops.epilogue_of(product) == (ops.Scale(), ops.RowScale(), ops.Bias())


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 64), (4, 32), (4, 64)])
def test_a_weight_only_layer_reads_floats_and_groups(encoder, bits: int, group: int | None) -> None:
    recipe = Recipe(precision=f"int{bits}-weight", group_size=group)
    product = _calls(encoder.realized(recipe), "tvmq.grouped_matmul")[0]
    assert ir.dtype_of(product.args[0]) == "float32"
    assert ir.shape_of(product.args[1]) == (64, 64) and ir.shape_of(product.args[2]) == (64 // (group or 64), 64)
    q = ir.to_numpy(product.args[1])
    assert np.abs(q.astype(int)).max() == {8: 127, 4: 8}[bits]
    assert ops.attributes(product)["bits"] == bits


# --- accuracy ---


@pytest.mark.parametrize(
    ("precision", "group", "least"),
    [("int8-dynamic", None, 40), ("int8-weight", None, 45), ("int8-weight", 32, 48), ("int4-weight", 32, 22)],
)
def test_an_encoder_is_near_its_floats(encoder, precision: str, group: int | None, least: float) -> None:
    recipe = Recipe(precision=precision, group_size=group)
    (reference,) = encoder.reference()
    (got,) = interpret.run(encoder.realized(recipe), encoder.inputs)
    assert least < numerics.sqnr_db(reference, got) < least + 15


def test_smaller_groups_are_nearer(encoder) -> None:
    (reference,) = encoder.reference()
    errors = []
    for group in (32, 64):
        recipe = Recipe(precision="int4-weight", group_size=group)
        errors.append(numerics.sqnr_db(reference, interpret.run(encoder.realized(recipe), encoder.inputs)[0]))
    assert errors[0] > errors[1]
