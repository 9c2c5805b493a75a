"""Ranges of least error against a search by brute force, and the closed forms against the distributions they assume."""

import numpy as np
import pytest

from tvmq.quantize import ranges
from tvmq.quantize.histogram import Histogram

F32 = np.float32
RNG = np.random.default_rng(0)
DATA = {
    "normal": RNG.standard_normal(100_000),
    "laplace": RNG.laplace(size=100_000),
    "relu": np.maximum(RNG.standard_normal(100_000), 0),
    "negative": -RNG.exponential(size=100_000),
    "outliers": np.concatenate([RNG.standard_normal(100_000), [40.0, -60.0]]),
    "uneven": np.concatenate([RNG.exponential(size=90_000), -0.1 * RNG.exponential(size=10_000)]),
}


def _noise(data: np.ndarray, low: float, high: float, bits: int) -> float:
    step = (high - low) / (2**bits - 1)
    rounded = np.clip(np.rint(data / step), np.rint(low / step), np.rint(high / step)) * step
    return float(np.square(data - rounded).mean())


def _seen(name: str) -> tuple[np.ndarray, Histogram]:
    data = DATA[name].astype(F32)
    return data, Histogram.of(data)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", DATA)
def test_mse_is_as_good_as_any_cut_of_a_grid(name: str, bits: int):
    data, seen = _seen(name)
    found = _noise(data, *ranges.mse(seen, bits, symmetric=False), bits)
    low, high = float(data.min()), float(data.max())
    shares = np.linspace(0.05, 1, 25)
    best = min(_noise(data, a * low, b * high, bits) for a in shares for b in shares)
    assert found <= 1.03 * best


@pytest.mark.parametrize("name", ["normal", "outliers"])
def test_symmetric_mse_cuts_both_ends_alike(name: str):
    low, high = ranges.mse(_seen(name)[1], 4, symmetric=True)
    assert low == pytest.approx(-high)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["normal", "laplace", "relu", "negative", "outliers"])
def test_octav_is_near_the_best_symmetric_cut(name: str, bits: int):
    data, seen = _seen(name)
    found = _noise(data, *ranges.octav(seen, bits), bits)
    reach = float(np.abs(data).max())
    ends = [(max(-s, float(data.min())), min(s, float(data.max()))) for s in np.linspace(0.02, 1, 80) * reach]
    assert found <= 1.1 * min(_noise(data, *end, bits) for end in ends)


@pytest.mark.parametrize(("bits", "ratio"), [(2, 2.83), (3, 3.89), (4, 5.03)])
def test_aciq_has_the_ratios_of_its_paper(bits: int, ratio: float):
    low, high = ranges.aciq(_seen("laplace")[1], bits)
    assert high == pytest.approx(ratio, rel=0.02) and low == pytest.approx(-ratio, rel=0.02)


@pytest.mark.parametrize("name", ["relu", "negative"])
@pytest.mark.parametrize("rule", [ranges.aciq, ranges.octav, ranges.entropy])
def test_one_sided_tensors_keep_their_near_end(name: str, rule):
    data, seen = _seen(name)
    low, high = rule(seen, 4)
    assert (low == data.min()) if name == "relu" else (high == data.max())
    if name == "relu" and rule is ranges.aciq:
        return  # half of a normal distribution ends before the exponential one that aciq takes it for is cut
    assert abs(low) < abs(float(data.min())) or abs(high) < abs(float(data.max()))


@pytest.mark.parametrize(
    "rule", [ranges.aciq, ranges.octav, ranges.entropy, lambda s, b: ranges.mse(s, b, symmetric=False)]
)
def test_an_outlier_is_cut_at_four_bits(rule):
    low, high = rule(_seen("outliers")[1], 4)
    assert -20 < low < -1.5 and 1.5 < high < 20


def test_entropy_keeps_what_fits_the_levels():
    data = np.repeat(np.linspace(0, 1, 256), 50).astype(F32)
    assert ranges.entropy(Histogram.of(data), 8)[1] == pytest.approx(1.0, abs=0.01)
