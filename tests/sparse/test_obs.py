"""Weights that make up for those that went, and what that is worth on inputs like the calibration's."""

from __future__ import annotations

import numpy as np

from tvmq.sparse import masks, obs


def problem() -> tuple[np.ndarray, np.ndarray]:
    """A weight, and inputs that are much alike."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((48, 48)) * (rng.random((48, 48)) < 0.2) + np.eye(48)
    return rng.standard_normal((16, 48)).astype(np.float32), (rng.standard_normal((400, 48)) @ mixing).astype(
        np.float32
    )


def error(x: np.ndarray, before: np.ndarray, after: np.ndarray) -> float:
    return float(np.square(x @ (before - after).T).sum())


def test_corrected_weights_come_closer_to_the_results() -> None:
    weight, x = problem()
    mask = masks.by_block(weight, 0.5)
    corrected = obs.update(weight, mask, obs.inverse(obs.gram(x)))
    assert corrected.dtype == weight.dtype
    assert not corrected[~mask].any()
    assert error(x, weight, corrected) < 0.85 * error(x, weight, weight * mask)


def test_one_weight_that_goes_is_made_up_for_as_least_squares_would() -> None:
    """Of the first column, the correction is the exact minimum over all others."""
    weight, x = problem()
    mask = np.ones(weight.shape, bool)
    mask[:, 0] = False
    h = obs.gram(x)
    damped = np.linalg.inv(obs.inverse(h))
    exact = weight.astype(np.float64).copy()
    exact[:, 1:] += np.linalg.solve(damped[1:, 1:], damped[1:, :1] * weight[:, 0]).T
    exact[:, 0] = 0
    np.testing.assert_allclose(obs.update(weight, mask, obs.inverse(h)), exact, rtol=1e-3, atol=1e-4)


def test_nothing_pruned_is_nothing_changed() -> None:
    weight, x = problem()
    np.testing.assert_array_equal(obs.update(weight, np.ones(weight.shape, bool), obs.inverse(obs.gram(x))), weight)


def test_saliency_looks_at_the_inputs() -> None:
    """Of two equal weights the one whose input is always small goes first; inputs that never vary are no error."""
    x = np.random.default_rng(0).standard_normal((100, 3)) * [1, 0.01, 0]
    scores = obs.saliency(np.ones((1, 3)), obs.inverse(obs.gram(x)))[0]
    assert scores[0] > scores[1] >= scores[2] > 0
