"""The factors of channels that leave the least noise: the optimum of a model of noise that measurements agree with."""

import dataclasses

import numpy as np
import pytest

from tvmq.quantize import hidden, numerics, weights
from tvmq.quantize.least_noise import ALIKE, CHANNELS, Division, _Noise, best_division
from tvmq.quantize.seen import ChannelsSeen
from tvmq.recipe import Recipe

INT8 = Recipe(precision="int8")
RECIPES = [INT8, *(dataclasses.replace(INT8, **f) for f in ({"symmetric": True}, {"per_channel": False}))]
RECIPES.append(dataclasses.replace(INT8, activation_bits=6, weight_bits=5))
K, N = 48, 40


@pytest.fixture(scope="module")
def problem() -> tuple[np.ndarray, np.ndarray]:
    """Rows whose channels differ, and weights that do too."""
    rng = np.random.default_rng(0)
    rows = rng.uniform(-1, 1, (4000, K)) * np.exp(rng.normal(0, 1, K)) + rng.normal(0, 0.3, K)
    read = rng.standard_normal((K, N)) * np.exp(rng.normal(0, 0.7, K))[:, None]
    return rows.astype(np.float32), read.astype(np.float32)


def _seen(rows: np.ndarray) -> ChannelsSeen:
    return ChannelsSeen(rows.min(axis=0), rows.max(axis=0), rows.var(axis=0, dtype=np.float64))


def _even(largest: np.ndarray) -> ChannelsSeen:
    return ChannelsSeen(-largest, largest, largest**2 / 9)


def _measured(rows: np.ndarray, read: np.ndarray, division: Division, recipe: Recipe) -> float:
    """The squared error a row that rounding makes, of the two parts apart, weights' counted as the model counts it."""
    units = np.array([*range(K), *division.copies])
    factors = division.factors[units]
    x = rows[:, units] / factors
    w = hidden.split(read * division.factors[:, None], units, 2 ** (recipe.weight_bits - 1) - 1)
    params = numerics.choose_qparams(
        float(x.min()), float(x.max()), symmetric=recipe.symmetric, bits=recipe.activation_bits
    )
    q = numerics.quantize(x, params.scale, params.zero_point, qmin=params.qmin, qmax=params.qmax)
    lost_x = (numerics.dequantize(q, params.scale, params.zero_point) - x) @ w
    chosen = weights.choose(w.astype(np.float32), 1, dataclasses.replace(recipe, algorithms=()))
    lost_w = (x - x.mean(axis=0)) @ (weights.dequantized(*chosen, 1) - w)
    return float(np.square(lost_x).sum(axis=1).mean() + ALIKE * np.square(lost_w).sum(axis=1).mean())


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_noise_that_is_expected_is_measured(problem, recipe: Recipe) -> None:
    rows, read = problem
    noise = _Noise(_seen(rows), read, recipe)
    for logs in (np.zeros(K), np.random.default_rng(1).normal(0, 0.5, K)):
        counts = np.ones(K)
        counts[3] = 3
        expected = noise.of(logs, counts)
        measured = _measured(rows, read, Division(np.exp(logs), (3, 3)), recipe)
        # P-norms are larger than extremes.
        assert 0.8 < measured / expected < 1.05


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_best_factors_leave_less_noise_than_any_near_them(problem, recipe: Recipe) -> None:
    rows, read = problem
    division = best_division(_seen(rows), read, recipe)
    assert division is not None and division.copies == ()
    least, plain = (_measured(rows, read, d, recipe) for d in (division, Division(np.ones(K, np.float32))))
    assert least < 0.6 * plain
    rng = np.random.default_rng(2)
    for _ in range(5):
        other = Division(division.factors * np.exp(rng.normal(0, 0.3, K)))
        assert _measured(rows, read, other, recipe) > least


def test_the_slope_is_that_of_the_noise(problem) -> None:
    rows, read = problem
    noise, counts = _Noise(_seen(rows), read, INT8), np.ones(K)
    counts[5] = 2
    logs = np.random.default_rng(3).normal(0, 0.5, K)
    _, slope = noise._logarithm(logs, counts)
    for k in range(0, K, 7):
        step = 0.02 * (np.arange(K) == k)
        rise = np.log(noise.of(logs + step, counts) / noise.of(logs - step, counts))
        assert slope[k] == pytest.approx(rise / 0.04, rel=0.02, abs=1e-3)


def test_there_is_one_optimum(problem) -> None:
    rows, read = problem
    noise, counts = _Noise(_seen(rows), read, INT8), np.ones(K)
    starts = (np.zeros(K), np.random.default_rng(4).normal(0, 1, K))
    first, second = (noise.minimum(start, counts, 500)[1] for start in starts)
    assert first == pytest.approx(second, rel=1e-3)


@pytest.mark.parametrize("largest", [np.ones(K), np.zeros(K), np.full(K, np.inf), np.full(K, np.nan)])
def test_even_channels_dead_ones_and_what_overflows_are_left_alone(problem, largest: np.ndarray) -> None:
    read = np.random.default_rng(0).standard_normal((K, N)).astype(np.float32)
    assert best_division(_even(largest), read, INT8) is None
    assert best_division(_even(np.ones(K)), np.zeros_like(read), INT8) is None


def test_outliers_are_divided_only_as_far_as_weights_can_take_it() -> None:
    read = np.random.default_rng(0).standard_normal((K, N)).astype(np.float32)
    outlying = np.where(np.arange(K) == 5, 20.0, 1.0)
    found = best_division(_even(outlying), read, INT8)
    assert found is not None
    others = np.delete(found.factors, 5)
    assert found.factors[5] > 2 * others.max() and others.max() < 1.5 * others.min()
    # The same channel read by weights that are large already: these would lose what it gains.
    assert best_division(_even(outlying), outlying[:, None].astype(np.float32) * read, INT8) is None


def test_dead_channels_and_weights_stay_as_they_are() -> None:
    read = np.random.default_rng(0).standard_normal((K, N)).astype(np.float32)
    read[7] = 0.0
    largest = np.where(np.arange(K) == 5, 20.0, 1.0)
    largest[9] = 0.0
    found = best_division(_even(largest), read, INT8)
    assert found is not None and (found.factors[[7, 9]] == 1.0).all()


def test_channels_get_copies_where_their_weights_cost_others_their_steps() -> None:
    rng = np.random.default_rng(0)
    width = 3 * CHANNELS
    read = rng.standard_normal((width, N)).astype(np.float32)
    largest = rng.uniform(0.5, 1.0, width)
    assert best_division(_even(largest), read, INT8, copies=True) is None
    largest[5], read[5] = 20.0, 20.0 * read[5]
    found = best_division(_even(largest), read, INT8, copies=True)
    assert found is not None and found.copies == (5, 5, 5)
    without = best_division(_even(largest), read, INT8)
    assert without is None or without.copies == ()
