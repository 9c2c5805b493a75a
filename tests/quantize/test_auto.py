"""`auto`: which precision the estimate gives, on targets that differ in their instructions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from samples import calibration_of
from tvm import relax

from tvmq import ir
from tvmq.errors import RecipeError
from tvmq.graph.fusion import find_chains
from tvmq.kernels.rates import rates_of
from tvmq.model import Model
from tvmq.pipeline import compile_model, quantize
from tvmq.quantize import auto
from tvmq.quantize.auto import Rates, estimate
from tvmq.recipe import Recipe
from tvmq.recipe_values import Precision
from tvmq.target import load_target

AUTO = Recipe(precision="auto")
FP32, BF16, INT8 = Precision.FP32, Precision.BF16, Precision.INT8
ALL = {FP32, BF16, INT8}
op = relax.op
DEPTHWISE = {FP32: 8.0, BF16: 5.0, INT8: 5.0}


def _chain(graph, extent: int, channels: int, groups: int = 1):
    def body(emit, x):
        weight = relax.const(np.ones((channels, 3, 3, channels // groups), np.float32))
        layouts = {"data_layout": "NHWC", "kernel_layout": "OHWI", "out_layout": "NHWC"}
        return emit(op.nn.conv2d(x, weight, padding=(1, 1), groups=groups, **layouts), "c")

    (chain,) = find_chains(graph(body, (1, extent, extent, channels)))
    return chain


@pytest.mark.parametrize(
    ("target", "faster"),
    [
        ("x86-64-avx512-vnni", {INT8: 3.5}),
        ("x86-64-amx", {INT8: 10.0, BF16: 5.0}),
        ("graviton3", {INT8: 3.0, BF16: 1.7}),
        ("raspberry-pi-5", {INT8: 3.0}),
        ("raspberry-pi-4b", {}),
    ],
)
def test_rates_follow_the_instructions(target: str, faster: dict[Precision, float]) -> None:
    """At least so many times float32's products; what has no instructions is at most half as fast again."""
    matrix = rates_of(load_target(target)).matrix
    assert (BF16 in matrix) == (BF16 in faster)
    for precision, rate in matrix.items():
        if precision in faster:
            assert rate > faster[precision] * matrix[FP32]
        else:
            assert rate < 1.5 * matrix[FP32]


@pytest.mark.parametrize(
    ("target", "with_data", "without"),
    [
        ("x86-64-amx", INT8, BF16),
        ("graviton3", INT8, BF16),
        ("x86-64-avx512-vnni", INT8, FP32),
        ("raspberry-pi-5", INT8, FP32),
        ("x86-64-avx2", INT8, FP32),
    ],
)
def test_a_large_convolution_takes_the_fastest(graph, target: str, with_data: Precision, without: Precision) -> None:
    chain, rates = _chain(graph, 28, 128), rates_of(load_target(target))
    assert auto.choose(chain, [FP32], rates, ALL)[0] is with_data
    assert auto.choose(chain, [FP32], rates, ALL - {INT8})[0] is without


def test_a_conversion_may_cost_more_than_it_gains(graph) -> None:
    rates = rates_of(load_target("x86-64-avx512-vnni"))
    chain = _chain(graph, 4, 4)
    precision, why = auto.choose(chain, [FP32], rates, ALL)
    assert precision is FP32
    assert why.startswith("auto: estimated thousands of slots: fp32 ")
    assert "int8" in why
    assert auto.choose(chain, [INT8], rates, ALL)[0] is INT8


def test_the_widest_wins_where_nothing_is_gained(graph) -> None:
    rates = Rates({FP32: 8.0, BF16: 8.0}, DEPTHWISE)
    chain = _chain(graph, 8, 8, groups=8)
    assert auto.choose(chain, [FP32], rates, ALL)[0] is FP32


def test_the_estimate_is_products_bytes_and_a_conversion(graph) -> None:
    chain, rates = _chain(graph, 4, 8), Rates({FP32: 2.0, BF16: 4.0}, DEPTHWISE)
    products, elements, weights = 4 * 4 * 8 * 72, 4 * 4 * 8, 8 * 72
    assert estimate(chain, FP32, FP32, rates) == products / 2 + 4 * (2 * elements + weights) / 16
    converted = elements * (4 + 2) / 16 + 2000
    assert estimate(chain, BF16, FP32, rates) == products / 4 + 2 * (2 * elements + weights) / 16 + converted


@pytest.mark.parametrize(
    ("reads", "expected"), [([INT8, INT8], INT8), ([INT8, BF16], BF16), ([FP32], BF16), ([BF16], BF16)]
)
def test_operators_without_weights_follow(reads: list[Precision], expected: Precision) -> None:
    rates = Rates({FP32: 8.0, BF16: 16.0, INT8: 32.0}, DEPTHWISE)
    assert auto.choose(None, reads, rates, ALL)[0] is expected
    assert auto.choose(None, reads, Rates({FP32: 8.0}, DEPTHWISE), ALL)[0] is FP32


@pytest.mark.parametrize("target", ["x86-64-avx512-vnni", "raspberry-pi-4b", "x86-64-amx"])
@pytest.mark.parametrize("with_data", [True, False])
@pytest.mark.parametrize("name", ["residual", "transformer", "concat"])
def test_plans_keep_to_the_target_and_the_data(
    imported: Callable[[str], Model], name: str, with_data: bool, target: str
) -> None:
    model, rates = imported(name), rates_of(load_target(target))
    data = calibration_of(model) if with_data else None
    decided = quantize(model, AUTO, data, rates=rates)
    precisions = {decision.precision for decision in decided.decisions}
    assert with_data or INT8 not in precisions
    assert BF16 in rates.matrix or BF16 not in precisions
    assert (decided.table is not None) == with_data
    for decision in decided.decisions:
        assert decision.reason or decision.precision is not FP32
        if decision.kind in ("conv2d", "matmul") and "both operands" not in decision.reason:
            assert decision.reason.startswith("auto: estimated"), decision


def test_a_compiled_model_explains_itself(imported: Callable[[str], Model], tmp_path: Path) -> None:
    model = imported("residual")
    done = compile_model(model, "host", AUTO, calibration_of(model), tmp_path / "m.tvmq")
    assert any(row["reason"].startswith("auto: estimated") for row in done.operators)


def test_auto_needs_a_target(imported: Callable[[str], Model]) -> None:
    with pytest.raises(RecipeError, match="precision auto: expected a target"):
        quantize(imported("residual"), AUTO)


def test_a_rule_may_ask_for_it(imported: Callable[[str], Model]) -> None:
    recipe = Recipe(precision="fp32", rules=[{"match": "conv2d", "precision": "auto"}])
    decided = quantize(imported("residual"), recipe, rates=rates_of(load_target("x86-64-amx")))
    assert all(d.reason.startswith("auto") for d in decided.decisions if d.kind == "conv2d")
    assert ir.main(decided.module) is not None
