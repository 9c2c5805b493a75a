"""Which of two series is faster: found where it is, not claimed where it is not, and as often wrong as announced."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tvmq.deploy.latency import latency, median_interval
from tvmq.measure.significance import compare


def noisy(seed: int, rounds: int, factor: float, noise: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Two series with a common slow-down of rounds, heavy tails, and a true ratio of `factor`."""
    rng = np.random.default_rng(seed)
    common = 1 + rng.exponential(0.5, rounds)
    first, second = (np.exp(noise * rng.standard_t(2, rounds)) for _ in range(2))
    return 10 * common * first, 10 * factor * common * second


def test_a_clear_difference_is_found() -> None:
    first, second = noisy(0, 20, 0.7)
    (found,) = compare([("a", first), ("b", second)])
    assert found.significant
    assert not found.noisy
    assert found.warning is None
    assert found.low is not None
    assert found.high is not None
    assert found.low < 0.7 < found.high < 1
    assert found.p < 0.05
    assert str(found).startswith("b: significantly faster than a at 95 % confidence: time x 0.")
    (reverse,) = compare([("b", second), ("a", first)])
    assert "a: significantly slower than b" in str(reverse)
    assert reverse.p == found.p


def test_chance_is_called_significant_as_seldom_as_announced() -> None:
    claims = [compare([("a", a), ("b", b)])[0].significant for a, b in (noisy(seed, 10, 1.0) for seed in range(400))]
    assert np.mean(claims) < 0.05
    assert np.mean(claims) > 0, "a test that never claims anything shows nothing"


def test_the_interval_holds_the_true_median_as_often_as_announced() -> None:
    rng = np.random.default_rng(1)
    held = []
    for _ in range(400):
        low, high = median_interval(rng.exponential(1.0, 12).tolist()) or (0.0, 0.0)
        held.append(low <= np.log(2) <= high)
    assert 0.95 <= np.mean(held) < 1


@pytest.mark.parametrize(("count", "expected"), [(5, None), (6, (0, 5)), (8, (0, 7)), (9, (1, 7)), (20, (5, 14))])
def test_the_interval_s_ranks_are_those_of_the_tables(count: int, expected: tuple[float, float] | None) -> None:
    assert median_interval([float(i) for i in reversed(range(count))]) == expected


def test_noise_above_the_difference_is_warned_of() -> None:
    (found,) = compare([("a", [1.0] * 10), ("b", [0.9, 0.95, 1.0, 1.02, 1.06] * 2)])
    assert not found.significant
    assert found.warning is not None
    assert "rounds differ by 7.4 %, more than the difference of 0.0 %" in found.warning
    assert "no significant difference to a" in str(found)


def test_too_few_rounds_are_said() -> None:
    (found,) = compare([("a", [1.0] * 5), ("b", [0.5] * 5)])
    assert not found.significant
    assert str(found) == "b: 5 rounds are too few to compare at 95 % confidence; raise --repeat"


def test_equal_times_are_no_difference() -> None:
    (found,) = compare([("a", [1.0] * 10), ("a again", [1.0] * 10)])
    assert (found.ratio, found.p, found.noise, found.significant, found.noisy) == (1.0, 1.0, 0.0, False, False)


def test_several_bundles_share_the_confidence() -> None:
    first, second = noisy(0, 8, 0.7)
    found = compare([("a", first), *((name, second) for name in "bcde")])
    assert [one.bundle for one in found] == list("bcde")
    assert found[0].confidence == pytest.approx(0.9875)
    assert compare([("a", first)]) == []
    json.dumps([one.to_dict() for one in found])


def test_a_latency_has_its_times_and_their_interval() -> None:
    found = latency([3.0, 1.0, 2.0, 9.0, 4.0, 5.0], 1, 2)
    assert (found.low_ms, found.median_ms, found.high_ms, found.repeat) == (1.0, 3.5, 9.0, 6)
    assert found.times_ms == (3.0, 1.0, 2.0, 9.0, 4.0, 5.0)
    assert latency([1.0] * 5, 1, 2).low_ms is None
