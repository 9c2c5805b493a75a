"""Expected ranges of fewer samples, in closed form, against draws; and what is said of samples that set extremes."""

import itertools

import numpy as np
import pytest

from tvmq.quantize import sufficiency
from tvmq.quantize.sufficiency import Extremes, judge


def _extremes(**tensors: list[tuple[float, float]]) -> Extremes:
    made = Extremes()
    for rows in zip(*tensors.values(), strict=True):
        for name, (low, high) in zip(tensors, rows, strict=True):
            made.see(name, low, high)
        made.next_sample()
    return made


def test_expected_largest_is_the_mean_over_all_subsets():
    values = np.array([3.0, 1.0, 4.0, 1.5, 9.0])
    expected = sufficiency._expected_largest(values)
    for k in range(1, 6):
        means = np.mean([max(subset) for subset in itertools.combinations(values, k)])
        assert expected[k - 1] == pytest.approx(means)


def test_equal_samples_are_enough_and_one_outlier_is_not():
    found = judge(_extremes(calm=[(-1.0, 1.0)] * 20, wild=[(-1.0, 1.0)] * 19 + [(-1.0, 50.0)]))
    assert [t.tensor for t in found.tensors] == ["wild", "calm"]
    wild, calm = found.tensors
    assert calm.needed == 1 and calm.spread == 0.0
    assert wild.needed is None and wild.spread > 0.1 and wild.high_sample == 19
    assert found.setters[19] == 1
    assert found.needed is None


def test_needed_counts_samples_and_outliers_that_return_are_enough():
    rows = [(0.0, 10.0 if i % 4 == 0 else 1.0) for i in range(64)]
    (tensor,) = judge(_extremes(x=rows)).tensors
    assert tensor.needed is not None and 8 <= tensor.needed <= 32
    assert judge(_extremes(x=rows)).needed == tensor.needed


def test_memory_does_not_grow_with_samples(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sufficiency, "BLOCKS", 8)
    made = _extremes(x=[(-float(i), float(i)) for i in range(100)])
    assert made.samples == 100 and made.block == 16
    assert len(made.of("x")) == 7
    assert made.of("x")[-1].tolist() == [-99.0, 99.0] and made.of("x")[0].tolist() == [-15.0, 15.0]


def test_constant_zero_tensors_need_one_sample():
    (tensor,) = judge(_extremes(x=[(0.0, 0.0)] * 3)).tensors
    assert (tensor.needed, tensor.spread) == (1, 0.0)
    assert judge(_extremes(x=[(0.0, 0.0)] * 3)).setters == {}


def test_nothing_seen():
    assert judge(Extremes()).needed == 0
