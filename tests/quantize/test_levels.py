"""Named quantizers of weights: how many levels, how near they are, and what a recipe and its report make of them."""

from __future__ import annotations

import numpy as np
import pytest

from tvmq.errors import RecipeError
from tvmq.oracle import interpret
from tvmq.quantize import numerics
from tvmq.quantize.decisions import simulated_levels
from tvmq.quantize.levels import evenly, levelled, rounded
from tvmq.quantize.refine import unused_algorithms
from tvmq.quantize.tables import nearest, normal_levels
from tvmq.recipe import Recipe
from tvmq.recipe_values import WeightLevels

KINDS = [kind for kind in WeightLevels if kind not in (WeightLevels.NONE, WeightLevels.VECTOR_CODEBOOK)]
WEIGHT = np.random.default_rng(0).standard_normal((144, 5)).astype(np.float32) * np.float32([1, 1e-3, 7, 1, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_has_no_more_values_than_its_bits_say(kind: WeightLevels) -> None:
    got = rounded(WEIGHT, kind, 4, 32)
    assert got.dtype == np.float32 and got.shape == WEIGHT.shape
    if kind is WeightLevels.CODEBOOK:
        assert len(np.unique(got)) <= 16
    for start in range(0, 144, 32):  # 144 is no multiple of 32: the last group is shorter
        assert all(len(np.unique(column)) <= 16 for column in got[start : start + 32].T)


@pytest.mark.parametrize("kind", KINDS)
def test_more_bits_are_nearer(kind: WeightLevels) -> None:
    few, many = (numerics.sqnr_db(WEIGHT[:, 0], rounded(WEIGHT[:, :1], kind, bits, 32)[:, 0]) for bits in (3, 5))
    # Powers of two are never near between two of them, however many there are.
    assert many > few + (0.5 if kind is WeightLevels.LOG2 else 6)


def test_each_quantizer_is_best_at_its_own() -> None:
    normal = WEIGHT[:, :1]
    at = {kind: numerics.sqnr_db(normal, rounded(normal, kind, 4, None)) for kind in KINDS}
    assert at[WeightLevels.CODEBOOK] > at[WeightLevels.NORMAL_FLOAT] > at[WeightLevels.UNIFORM]
    assert at[WeightLevels.UNIFORM] > at[WeightLevels.STOCHASTIC]
    powers = np.float32([[1.0], [-0.25], [0.0], [0.0625], [-0.5]])
    np.testing.assert_array_equal(rounded(powers, WeightLevels.LOG2, 4, None), powers)
    shifted = np.linspace(0.0, 1.5, 16, dtype=np.float32)[:, None]
    np.testing.assert_allclose(rounded(shifted, WeightLevels.ASYMMETRIC, 4, None), shifted, rtol=1e-6)
    assert np.abs(rounded(shifted, WeightLevels.UNIFORM, 4, None) - shifted).max() > 0.04


def test_stochastic_rounding_is_right_on_average() -> None:
    weight = np.full((10_000, 1), 0.3, np.float32)
    weight[0] = -8.0
    got = rounded(weight, WeightLevels.STOCHASTIC, 4, None)
    assert set(np.unique(got)) == {-8.0, 0.0, 1.0}
    assert abs(got[1:].mean() - 0.3) < 0.02
    np.testing.assert_array_equal(got, rounded(weight, WeightLevels.STOCHASTIC, 4, None))
    assert (got != rounded(weight, WeightLevels.STOCHASTIC, 4, None, seed=1)).any()


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zeros(kind: WeightLevels) -> None:
    assert not rounded(np.zeros((40, 3), np.float32), kind, 4, 32).any()


def test_a_vector_codebook_has_as_many_pairs_as_its_bits_say() -> None:
    odd = WEIGHT[:143]
    for bits in (2, 3, 4):
        got = rounded(odd, WeightLevels.VECTOR_CODEBOOK, bits, None)
        assert got.shape == odd.shape and got.dtype == np.float32
        pairs = got[:142].reshape(71, 2, 5).swapaxes(1, 2).reshape(-1, 2)
        assert len(np.unique(pairs, axis=0)) <= 2**bits
    few, many = (numerics.sqnr_db(odd, rounded(odd, WeightLevels.VECTOR_CODEBOOK, bits, None)) for bits in (3, 7))
    assert many > few + 6
    assert not rounded(np.zeros((3, 4), np.float32), WeightLevels.VECTOR_CODEBOOK, 4, None).any()


def test_normal_levels_are_those_of_nf4() -> None:
    # Dettmers et al., appendix E.
    want = [-1.0, -0.6961928, -0.5250730, -0.3949174, -0.2844413, -0.1847734, -0.0910500, 0.0]
    np.testing.assert_allclose(normal_levels(4)[:8], want, atol=1e-6)
    np.testing.assert_allclose(normal_levels(4)[8:], [*_ABOVE, 1.0], atol=1e-6)
    assert nearest(np.array([0.04, -0.9]), normal_levels(4)).tolist() == pytest.approx([0.0795803, -1.0])


_ABOVE = [0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568]


def _levelled(case, recipe: Recipe) -> np.ndarray:
    """What the float model computes once its weights are rounded as `recipe` asks."""
    module = levelled(case.module, case.plan(recipe), recipe, lambda: case.batches)
    return interpret.run(module, case.inputs)[0]


def test_a_recipe_rounds_weights_and_says_that_they_are_floats(model_of) -> None:
    case = model_of("conv_bn_relu")
    recipe = Recipe(weight_levels="log2", weight_bits=4, group_size=32)
    assert 5 < numerics.sqnr_db(case.reference()[0], _levelled(case, recipe)) < 40
    assert simulated_levels(recipe) == (
        "simulated: weights are rounded to log2 levels of 4 bits, a scale for groups of 32, and stored as floats"
    )
    assert levelled(case.module, case.plan(Recipe()), Recipe(), lambda: ()) is case.module


def test_algorithms_make_uniform_levels_nearer(model_of) -> None:
    case = model_of("conv_bn_relu")
    reference = case.reference()[0]

    def sqnr(*algorithms: str) -> float:
        recipe = Recipe(weight_levels="uniform", weight_bits=4, group_size=32, algorithms=algorithms)
        assert not unused_algorithms(case.module, case.plan(recipe), recipe)
        return numerics.sqnr_db(reference, _levelled(case, recipe))

    assert sqnr("gptq") > sqnr() + 1
    assert sqnr("clip_weights", "gptq") > sqnr() + 1
    wide, clipped = (
        numerics.sqnr_db(WEIGHT[:, 0], evenly(WEIGHT[:, :1], 4, None, clips)[:, 0]) for clips in (False, True)
    )
    assert clipped > wide
    idle = Recipe(weight_levels="log2", algorithms=["gptq"])
    assert unused_algorithms(case.module, case.plan(idle), idle) == ("gptq",)


def test_levels_of_an_integer_model_are_refused() -> None:
    with pytest.raises(
        RecipeError, match="weight_levels: expected precision fp32 or int4-weight with codebook, saw int8; a rule may"
    ):
        Recipe(precision="int8", weight_levels="codebook")
    with pytest.raises(RecipeError, match="weight_levels.*codebook"):
        Recipe(weight_levels="codebok")
