"""Weights rounded with a view to more than one element: less error where it counts."""

import numpy as np
import pytest

from tvmq.quantize import groups, numerics, rounding, weights
from tvmq.recipe import Recipe

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("taps", [1, 9])
def test_squant_leaves_sums_of_errors_below_a_half(taps: int) -> None:
    units = RNG.uniform(-7, 7, (5, 6, taps))
    q = rounding.squant(units, -8, 7)
    errors = q - units
    assert np.abs(errors).max() < 1  # moved by one at most, to the other neighbour
    assert np.abs(errors.reshape(5, -1).sum(1)).max() <= 0.5 + 1e-9
    plain = np.rint(units) - units
    assert np.abs(plain.reshape(5, -1).sum(1)).max() > 0.5


def test_squant_stays_in_the_range() -> None:
    q = rounding.squant(np.full((1, 1, 9), 7.4), -8, 7)
    assert q.max() == 7


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_gptq_has_less_error_on_the_layer_s_inputs(bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    x = RNG.standard_normal((512, 24)) @ RNG.standard_normal((24, 24))
    weight = RNG.standard_normal((24, 10))
    scales = np.abs(weight).max(0) / top
    plain = np.clip(np.rint(weight / scales), -top, top) * scales
    better = rounding.gptq(weight, scales, x.T @ x, -top, top) * scales
    assert np.square(x @ (better - weight)).sum() < 0.7 * np.square(x @ (plain - weight)).sum()


def test_gptq_of_independent_inputs_is_rounding() -> None:
    weight = RNG.standard_normal((8, 4))
    q = rounding.gptq(weight, np.float32(0.1), np.eye(8), -127, 127, damping=0.0)
    np.testing.assert_array_equal(q, np.rint(weight / np.float32(0.1)))


def test_gptq_of_inputs_that_are_always_zero() -> None:
    products = np.diag([1.0, 0.0, 2.0])
    assert rounding.gptq(np.ones((3, 2)), np.float32(0.5), products, -8, 7).tolist() == [[2, 2]] * 3


def test_gptq_takes_scales_of_groups() -> None:
    weight = RNG.standard_normal((64, 6)).astype(np.float32)
    x = RNG.standard_normal((256, 64)) @ RNG.standard_normal((64, 64))
    scales = groups.group_scales(weight, 4, 32)
    plain = groups.dequantize_groups(groups.quantize_groups(weight, scales, 4), scales)
    q = rounding.gptq(weight, groups.each(scales, weight), x.T @ x, *groups.RANGE[4])
    better = groups.dequantize_groups(q, scales)
    assert np.square(x @ (better - weight)).sum() < 0.7 * np.square(x @ (plain - weight)).sum()


def test_clipped_scales_have_less_squared_error() -> None:
    weight = RNG.standard_normal((400, 8)).astype(np.float32)
    scales = np.abs(weight).max(0) / 7
    clipped = rounding.clipped_scales(weight, scales, -7, 7)

    def error(s: np.ndarray) -> np.ndarray:
        return np.square(np.clip(np.rint(weight / s), -7, 7) * s - weight).sum(0)

    assert (error(clipped) < error(scales)).all() and (clipped <= scales * 1.0001).all()


@pytest.mark.parametrize("algorithms", [(), ("squant",), ("gptq",), ("clip_weights", "squant"), ("clip_weights",)])
@pytest.mark.parametrize("axis", [0, 1])
def test_every_way_gives_weights_near_the_floats(algorithms: tuple, axis: int) -> None:
    shape = (6, 3, 3, 4) if axis == 0 else (12, 6)
    weight = RNG.standard_normal(shape).astype(np.float32)
    depth = weight.size // 6
    x = RNG.standard_normal((100, depth))
    recipe = Recipe(precision="int8", algorithms=list(algorithms))
    q, scales = weights.choose(weight, axis, recipe, products=x.T @ x)
    assert q.shape == weight.shape and q.dtype == np.int8 and scales.shape == (6,)
    assert numerics.sqnr_db(weight, weights.dequantized(q, scales, axis)) > 35


def test_by_default_kernels_of_several_taps_are_rounded_by_squant_and_nothing_else() -> None:
    def chosen(shape: tuple[int, ...], axis: int, *algorithms: str) -> np.ndarray:
        weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        return weights.choose(weight, axis, Recipe(precision="int8", algorithms=list(algorithms)))[0]

    for shape, axis, changes in (
        ((8, 3, 3, 4), 0, True),
        ((8, 3, 3, 1), 0, True),
        ((8, 1, 1, 4), 0, False),
        ((4, 8), 1, False),
    ):
        by_default, nearest = chosen(shape, axis, "auto"), chosen(shape, axis)
        assert np.array_equal(by_default, nearest) != changes
        assert not changes or np.array_equal(by_default, chosen(shape, axis, "squant"))
