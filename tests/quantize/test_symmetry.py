"""Which tensors have no zero point, and which integers there are."""

from __future__ import annotations

import numpy as np
import pytest

from tvmq.oracle import interpret
from tvmq.quantize import numerics
from tvmq.quantize.symmetry import choose, loss_db
from tvmq.recipe import Recipe
from tvmq.recipe_values import PowerOfTwo

MIXED = Recipe(precision="int8", symmetric_loss=0.5)


@pytest.mark.parametrize(
    ("low", "high", "symmetric"),
    [(-1.0, 1.0, True), (-1.0, 0.95, True), (-0.9, 1.0, True), (-1.0, 0.8, False), (0.0, 6.0, False), (0.0, 0.0, True)],
)
def test_each_tensor_gets_a_zero_point_where_that_pays(low: float, high: float, symmetric: bool) -> None:
    found = choose(low, high, MIXED)
    assert found == numerics.choose_qparams(low, high, symmetric=symmetric)
    assert (found.zero_point == 0) == symmetric


@pytest.mark.parametrize(("low", "decibels"), [(-1.0, 0.034), (-0.75, 1.19), (0.0, 6.05)])
def test_the_loss_is_that_of_the_noise(low: float, decibels: float) -> None:
    both = [numerics.choose_qparams(low, 1.0, symmetric=kind) for kind in (True, False)]
    assert loss_db(*both) == pytest.approx(decibels, abs=0.01)
    x = np.random.default_rng(0).uniform(low, 1.0, 200_000).astype(np.float32)
    rounded = [numerics.dequantize(numerics.quantize(x, p.scale, p.zero_point), p.scale, p.zero_point) for p in both]
    measured = numerics.sqnr_db(x, rounded[1]) - numerics.sqnr_db(x, rounded[0])
    assert measured == pytest.approx(decibels, abs=0.1)


def test_powers_of_two_that_are_equal_need_no_zero_point() -> None:
    recipe = Recipe(precision="int8", symmetric_loss=0.5, power_of_two=PowerOfTwo.ACTIVATIONS)
    assert choose(-1.0, 0.6, recipe).zero_point == 0
    assert choose(-1.0, 0.6, MIXED).zero_point != 0


def test_without_a_loss_it_is_one_or_the_other() -> None:
    assert choose(-1.0, 1.0, Recipe(precision="int8")) == numerics.choose_qparams(-1.0, 1.0)
    assert choose(0.0, 1.0, Recipe(precision="int8", symmetric=True)).zero_point == 0


@pytest.mark.parametrize("bits", [8, 7, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_narrow_ranges_leave_the_least_integer_out(bits: int, symmetric: bool) -> None:
    top = 2 ** (bits - 1) - 1
    found = numerics.choose_qparams(-1.0, 3.0, symmetric=symmetric, bits=bits, narrow=True)
    assert (found.qmin, found.qmax) == (-top, top)
    ends = [(q - found.zero_point) * found.scale for q in (-top, top)]
    assert ends == pytest.approx([-3.0, 3.0] if symmetric else [-1.0, 3.0], abs=0.501 * found.scale)
    assert found.limits == pytest.approx(tuple(ends))


def test_a_model_has_both_and_no_integer_beyond_its_range(model_of) -> None:
    case = model_of("residual")
    recipe = Recipe(precision="int8", symmetric_loss=3.0, narrow_range=True)
    params = list(case.plan(recipe).qparams.values())
    assert {p.zero_point == 0 for p in params} == {True, False}
    # Of a range with zero in its middle or at its end, as a rectifier's is.
    assert {p.qmin for p in params} == {-127}
    (want,), (got,) = case.run(case.qdq(recipe)), interpret.run(case.realized(recipe), case.inputs)
    assert numerics.sqnr_db(want, got) > 30
