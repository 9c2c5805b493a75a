"""Products of two activations in integers: which they are, the graph that comes of it, and how near it is to floats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from tvm import relax

from tvmq import ir, ops
from tvmq.deploy.executor import load
from tvmq.graph.products import product_kind
from tvmq.importer.load import import_model
from tvmq.oracle import interpret
from tvmq.pipeline import compile_model
from tvmq.quantize import numerics
from tvmq.quantize.decisions import source_decisions
from tvmq.quantize.realize import realize
from tvmq.recipe import Recipe
from tvmq.recipe_rules import Rule
from tvmq.recipe_values import DEFAULT_KINDS, KINDS, Precision

STATIC = Recipe(precision="int8", kinds=KINDS)
DYNAMIC = Recipe(precision="int8-dynamic", kinds=KINDS)
SHAPE = (2, 9, 32)


class Heads(nn.Module):
    """Self-attention of two heads between linear layers; written out with a mask, or one operator."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(SHAPE[2], SHAPE[2]) for _ in range(4))
        self.whole = whole

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, S, 32] -> [N, S, 32]."""
        n, s, width = x.shape
        q, k, v = (f(x).view(n, s, 2, width // 2).transpose(1, 2) for f in (self.query, self.key, self.value))
        if self.whole:
            mixed = functional.scaled_dot_product_attention(q, k, v)
        else:
            scores = q @ k.transpose(-1, -2) / 4.0
            mixed = torch.softmax(scores + torch.linspace(-1, 1, s), -1) @ v
        return self.out(mixed.transpose(1, 2).reshape(n, s, width))


@pytest.fixture(scope="module", params=[False, True], ids=["written_out", "whole"])
def heads(request, make_a_case):
    torch.manual_seed(0)
    network = Heads(request.param)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(2)
    return make_a_case(network, SHAPE, batches=2)


def _calls(module, name: str) -> list:
    return [call for _, call in ir.calls(module) if ir.is_call(call, name)]


def _products(case, recipe: Recipe) -> list[tuple[str, str]]:
    found = [d for d in case.plan(recipe).decisions if d.kind in ("batch_matmul", "nn.attention")]
    return [(d.precision.value, d.reason) for d in found]


# --- decisions ---


@pytest.mark.parametrize("precision", ["int8", "int8-dynamic"])
def test_a_recipe_names_their_kinds(heads, precision: str) -> None:
    kind = "attention" if heads.torch_module.whole else "batch_matmul"
    count = 1 if heads.torch_module.whole else 2
    assert _products(heads, Recipe(precision=precision)) == [("fp32", f"the recipe's kinds leave out {kind}")] * count
    for recipe in (
        Recipe(precision=precision, kinds=(*DEFAULT_KINDS, kind)),
        Recipe(precision=precision, rules=[Rule(kind, precision)]),
    ):
        assert _products(heads, recipe) == [(precision, "")] * count


def test_a_rule_names_one_product(make_a_case) -> None:
    case = make_a_case(Heads(False), SHAPE, batches=1)
    recipe = Recipe(precision="int8", rules=[Rule("batch_matmul#1", "int8-dynamic"), Rule("batch_matmul", "fp32")])
    assert _products(case, recipe) == [("fp32", "rule 'batch_matmul'"), ("int8-dynamic", "")]


def test_operands_without_a_range_keep_a_product_float(heads, without) -> None:
    table = heads.table(STATIC)
    key = next(call for _, call in ir.calls(heads.module) if product_kind(call)).args[1]
    decisions = heads.plan(STATIC, without(table, str(key.name), keep=True)).decisions
    reasons = [d.reason for d in decisions if d.kind in ("batch_matmul", "nn.attention")]
    assert reasons[0] == f"the calibration table keeps {str(key.name)!r} float"


def test_sums_that_may_not_fit_stay_float(heads, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "MOST_DEPTH", 15)
    assert _products(heads, DYNAMIC)[0] == ("fp32", "sums of 16 products may not fit 32 bits")


# --- the graph ---


@pytest.mark.parametrize("recipe", [STATIC, DYNAMIC], ids=["static", "dynamic"])
@pytest.mark.parametrize("storage", ["int8", "uint8"])
def test_both_products_read_integers_and_softmax_makes_rows(heads, recipe: Recipe, storage: str) -> None:
    module = heads.realized(recipe, storage=storage)
    if heads.torch_module.whole and recipe is STATIC:
        (call,) = _calls(module, "tvmq.attention")
        assert [ir.dtype_of(arg) for arg in (*call.args, call)] == [storage] * 4
        return
    products = _calls(module, "tvmq.batch_matmul")
    assert [ir.dtype_of(arg) for call in products for arg in call.args[:2]] == [storage] * 4
    assert not _calls(module, "tvmq.attention") and not _calls(module, "matmul")
    (softmax,) = _calls(module, "tvmq.softmax")
    assert ops.row_quantizer(softmax) is not None
    # Keys are read as they are, and so are values that have scales of columns.
    assert [ops.attributes(call)["transposed"] for call in products] == [True, recipe is DYNAMIC]


def test_scales_are_steps_of_the_product(heads) -> None:
    module, table = heads.realized(STATIC), heads.table(STATIC).tensors
    call = next(call for _, call in ir.calls(heads.module) if product_kind(call))
    # The range of what only moves elements is that of its source, which has the same elements.
    q, k = (table[str(arg.name)].qparams.scale for arg in call.args[:2])
    if heads.torch_module.whole:
        (product,) = _calls(module, "tvmq.attention")
        assert ops.attributes(product)["scale"] == pytest.approx(q * k / 4, rel=1e-5)
        assert [type(step) for step in ops.epilogue_of(product)] == [ops.Multiply, ops.Quantize]
        return
    scores, mixed = _calls(module, "tvmq.batch_matmul")
    (step,) = ops.epilogue_of(scores)
    assert isinstance(step, ops.Multiply) and step.factor == pytest.approx(q * k / 4, rel=1e-5)
    assert [type(step) for step in ops.epilogue_of(mixed)] == [ops.Multiply, ops.RowScale, ops.Quantize]
    assert ir.dtype_of(mixed) == "int8"
    assert not _calls(module, "divide")


def test_float_products_are_scaled_too(make_a_case) -> None:
    class Scaled(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            twice = x @ y
            return (x @ y.relu()) / 3.0 + twice * 2.0 + twice

    case = make_a_case(Scaled(), (2, 3, 4), (2, 4, 5), batches=1)
    module = realize(case.module)
    factors = [ops.epilogue_of(call) for call in _calls(module, "tvmq.batch_matmul")]
    assert sorted(factors, key=len) == [(), (ops.Multiply(float(np.float32(1) / np.float32(3))),)]
    for got, want in zip(case.run(module), case.reference(), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


# --- results ---


@pytest.mark.parametrize("recipe", [STATIC, DYNAMIC], ids=["static", "dynamic"])
def test_what_is_realized_agrees_with_its_simulation_and_with_floats(heads, recipe: Recipe) -> None:
    simulated = heads.run(heads.qdq(recipe))
    stored = [heads.run(heads.realized(recipe, storage=storage)) for storage in ("int8", "uint8")]
    np.testing.assert_array_equal(stored[0][0], stored[1][0])
    assert numerics.sqnr_db(simulated[0], stored[0][0]) > 35
    assert numerics.sqnr_db(heads.reference()[0], stored[0][0]) > 30


@pytest.mark.parametrize(("recipe", "whole"), [(STATIC, True), (DYNAMIC, False)], ids=["static", "dynamic"])
def test_a_compiled_model(recipe: Recipe, whole: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Heads(whole).eval()
    x = np.random.default_rng(0).standard_normal((3, *SHAPE)).astype(np.float32)
    model = import_model(network, (torch.from_numpy(x[0]),))
    compiled = compile_model(model, "host", recipe, list(x), tmp_path / "m.tvmq")
    rows = [row for row in compiled.operators if row["kind"] in ("batch_matmul", "nn.attention")]
    assert {row["precision"] for row in rows} == {recipe.precision.value}
    executor = load(compiled.path)
    (got,) = executor(x[1])
    with torch.no_grad():
        want = network(torch.from_numpy(x[1])).numpy()
    assert numerics.sqnr_db(want, got) > 25
    if whole:
        # All of it is integers: equal bits everywhere.
        assert executor.bundle.manifest["exact"]
    executor.close()


def test_a_range_of_softmax_is_taken_where_another_reader_wants_it(make_a_case) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(9, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            p = torch.softmax(x, -1)
            return p @ y, self.fc(p)

    case = make_a_case(Twice(), (2, 3, 9), (2, 9, 5), batches=1)
    module = case.realized(STATIC)
    (product,) = _calls(module, "tvmq.batch_matmul")
    assert ir.dtype_of(product.args[0]) == "int8"
    for got, want in zip(interpret.run(module, case.inputs), case.reference(), strict=True):
        assert numerics.sqnr_db(want, got) > 30


def test_models_that_quantize_both_operands_run_on_integers(graph) -> None:
    def body(emit, x, y):
        def pair(value, scale: float, zero: int):
            args = relax.const(scale, "float32"), relax.const(zero, "int8")
            q = emit(relax.op.quantize(value, *args, axis=-1, out_dtype="int8"), "q")
            return emit(relax.op.dequantize(q, *args, axis=-1), "dq")

        product = emit(relax.op.matmul(pair(x, 0.03, 4), pair(y, 0.02, -5)), "product")
        return pair(product, 0.07, 1)

    qdq = graph(body, (2, 3, 8), (2, 8, 5))
    module = realize(qdq)
    (product,) = _calls(module, "tvmq.batch_matmul")
    assert [ir.dtype_of(t) for t in (*product.args, product)] == ["int8"] * 3
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 8), (2, 8, 5))]
    simulated, got = (interpret.run(m, inputs)[0] for m in (qdq, module))
    assert numerics.sqnr_db(simulated, got) > 35
    assert Precision.INT8 in {d.precision for d in source_decisions(qdq) if d.kind == "batch_matmul"}
