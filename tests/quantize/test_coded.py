"""Weights of few bits as a recipe chooses them, of convolutions above all: their matrices, and how near they are."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from tvmq import ir
from tvmq.oracle import interpret
from tvmq.quantize import groups, numerics
from tvmq.quantize.coded import coded
from tvmq.quantize.refine import unused_algorithms
from tvmq.recipe import Recipe
from tvmq.recipe_values import Precision, WeightLevels

# 45 inputs: a group of 32, and one of 13.
KERNEL = np.random.default_rng(0).standard_normal((7, 3, 3, 5)).astype(np.float32)
INT4, INT8 = Precision.INT4_WEIGHT, Precision.INT8_WEIGHT


def _back(weight: np.ndarray, precision: Precision = INT4, products: np.ndarray | None = None, **fields) -> np.ndarray:
    """What a weight becomes, as float32."""
    call = coded(weight, precision, Recipe(precision=precision, **fields), products)
    return interpret.evaluate(relax.BlockBuilder().normalize(call), {})


def test_a_kernel_is_a_matrix_of_whole_groups() -> None:
    matrix = groups.matrix_of(KERNEL, 32)
    assert matrix.shape == (64, 7) and not matrix[45:].any()
    np.testing.assert_array_equal(matrix[:45, 3], KERNEL[3].ravel())
    np.testing.assert_array_equal(groups.weight_of(matrix, KERNEL.shape), KERNEL)
    assert groups.matrix_of(KERNEL, None).shape == (45, 7)
    plain = KERNEL.reshape(7, 45)
    assert groups.matrix_of(plain, 32) is plain and groups.weight_of(plain, plain.shape) is plain


def test_a_kernel_of_few_inputs_is_a_group_of_so_many() -> None:
    for inputs, rows in ((9, 16), (24, 32), (40, 64), (64, 64)):
        call = coded(np.ones((3, 1, 1, inputs), np.float32), INT4, Recipe(precision=INT4))
        assert [part.value.numpy().shape[0] for part in call.args] == [rows, 2 if rows == 64 else 1]


@pytest.mark.parametrize("kind", WeightLevels)
def test_a_kernel_comes_back_nearly(kind: WeightLevels) -> None:
    got = _back(KERNEL, weight_levels=kind)
    assert got.shape == KERNEL.shape and got.dtype == np.float32
    least = {WeightLevels.LOG2: 13, WeightLevels.VECTOR_CODEBOOK: 7, WeightLevels.STOCHASTIC: 14}.get(kind, 18)
    assert numerics.sqnr_db(KERNEL, got) > least


@pytest.mark.parametrize("kind", ["none", "asymmetric", "stochastic"])
@pytest.mark.parametrize("group", [None, 32])
def test_eight_bits_are_nearer(kind: str, group: int | None) -> None:
    assert numerics.sqnr_db(KERNEL, _back(KERNEL, INT8, weight_levels=kind, group_size=group)) > 38


def test_a_shorter_group_has_scales_and_entries_of_its_own_weights() -> None:
    """Of 16 values that differ from zero, none is lost to the zeros that fill a group."""
    values = np.float32([-3, -2.5, -2, -1, -0.9, -0.5, -0.25, 0.05, 0.1, 0.3, 0.7, 1, 1.5, 2, 2.5, 3])
    kernel = np.resize(values, (7, 3, 3, 3)).astype(np.float32)
    kernel[:, 0, 0, 0] = 3  # the largest of the one group
    np.testing.assert_allclose(_back(kernel, weight_levels="codebook"), kernel, atol=1e-6)


def test_stochastic_rounding_is_right_on_average() -> None:
    kernel = np.full((64, 3, 3, 64), 0.3, np.float32)
    kernel[..., 0] = -8.0
    got = _back(kernel, weight_levels="stochastic", group_size=64)
    assert set(np.unique(got)) <= {-8.0, 0.0, 1.0}
    assert abs(got[kernel > 0].mean() - 0.3) < 0.01


def test_algorithms_make_weights_nearer(model_of) -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((256, 45)) @ rng.standard_normal((45, 45))

    def error(*algorithms: str, products: np.ndarray | None = None) -> float:
        off = (_back(KERNEL, products=products, algorithms=algorithms) - KERNEL).reshape(7, 45)
        return float(np.square(x @ off.T).sum())

    assert error(products=x.T @ x) < 0.8 * error()
    plain, clipped = (numerics.sqnr_db(KERNEL, _back(KERNEL, algorithms=a)) for a in ((), ("clip_weights",)))
    assert clipped > plain + 0.2
    case = model_of("conv_bn_relu")
    both = Recipe(precision="int4-weight", algorithms=["clip_weights", "gptq"])
    assert not unused_algorithms(case.module, case.plan(both), both)
    idle = Recipe(precision="int4-weight", weight_levels="codebook", algorithms=["clip_weights"])
    assert unused_algorithms(case.module, case.plan(idle), idle) == ("clip_weights",)


def test_a_convolution_reads_what_its_weight_is_dequantized_to(model_of) -> None:
    case = model_of("conv_bn_relu")
    recipe = Recipe(precision="int4-weight", weight_levels="asymmetric")
    module = case.realized(recipe)
    values = dict(ir.bindings(module))
    weights = [values[value.args[1]] for value in values.values() if ir.is_call(value, "tvmq.conv2d")]
    assert weights
    for weight in weights:
        assert ir.is_call(weight, "tvmq.dequantize_asymmetric") and len(ir.shape_of(weight)) == 4
        assert ir.dtype_of(weight.args[0]) == "int8" and ir.shape_of(weight.args[0])[0] % 32 == 0
    (reference,), (simulated,), (stored,) = case.reference(), case.run(case.qdq(recipe)), case.run(module)
    np.testing.assert_allclose(simulated, stored, rtol=1e-4, atol=1e-5)
    assert numerics.sqnr_db(reference, stored) > 15


def test_depthwise_convolutions_stay_floats(model_of) -> None:
    decisions = model_of("depthwise_separable").plan(Recipe(precision="int4-weight")).decisions
    found = {d.reason for d in decisions if d.kind == "conv2d" and d.precision is Precision.FP32}
    assert found == {"its channels read one channel each: such few weights stay floats"}
    assert any(d.kind == "conv2d" and d.precision is INT4 for d in decisions)
