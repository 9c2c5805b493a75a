import numpy as np
import pytest

from tvmq.quantize import observers
from tvmq.quantize.histogram import Histogram
from tvmq.quantize.observers import Aggregated, Fixed, MinMax, Pooled
from tvmq.recipe import Recipe
from tvmq.recipe_values import Aggregate, Observer

F32 = np.float32
CUTTING = ("percentile", "entropy", "mse", "octav", "aciq")


def MovingAverage(momentum: float) -> observers.RangeObserver:
    return observers.make(Recipe(observer="moving_average", momentum=momentum))


def Percentile(percent: float) -> Pooled:
    return observers.make(Recipe(observer="percentile", percentile=percent))


def _see(observer, *samples):
    for sample in samples:
        array = np.asarray(sample, F32)
        observer.see(array, float(array.min()), float(array.max()))
    return observer.range()


def test_the_recipe_names_the_observer():
    assert isinstance(observers.make(Recipe()), MinMax)
    average = MovingAverage(0.25)
    assert isinstance(average, Aggregated) and average.momentum == 0.25
    assert average.aggregate is Aggregate.MOVING_AVERAGE
    assert isinstance(Percentile(99.0), Pooled)
    assert isinstance(observers.make(Recipe(observer="fixed", fixed_range=3.0)), Fixed)


@pytest.mark.parametrize("statistic", list(Observer))
@pytest.mark.parametrize("aggregate", list(Aggregate))
def test_every_statistic_goes_with_every_aggregate(statistic: Observer, aggregate: Aggregate):
    if statistic is Observer.MOVING_AVERAGE:  # is an aggregate itself
        return
    data = np.random.default_rng(0).standard_normal((4, 4000)).astype(F32)
    low, high = _see(observers.make(Recipe(observer=statistic, aggregate=aggregate, fixed_range=4.0)), *data)
    assert 1 < high <= 4 * (1 + 1e-6) + data.max() and low == pytest.approx(-high, rel=0.3)


def test_aggregates_of_samples():
    samples = [[-1.0, 1.0], [-3.0, 2.0], [0.0, 9.0]]
    for aggregate, expected in (("pooled", (-3, 9)), ("widest", (-3, 9)), ("mean", (-4 / 3, 4))):
        assert _see(observers.make(Recipe(aggregate=aggregate)), *samples) == pytest.approx(expected)


def test_the_mean_of_percentiles_damps_an_outlier_that_pooling_takes():
    rng = np.random.default_rng(0)
    samples = [*rng.standard_normal((9, 1000)), 100 * rng.standard_normal(1000)]
    make = {a: observers.make(Recipe(observer="percentile", percentile=99.0, aggregate=a)) for a in ("widest", "mean")}
    assert _see(make["mean"], *samples)[1] < 0.2 * _see(make["widest"], *samples)[1]


def test_fixed_ranges_do_not_depend_on_data():
    assert _see(observers.make(Recipe(observer="fixed", fixed_range=3.0)), [1.0, 99.0]) == (-3.0, 3.0)


def test_min_max_is_exact():
    assert _see(MinMax(), [[1.5, 2.0]], [0.25], [-7.0, 3.0], [1.0]) == (-7.0, 3.0)
    assert _see(MinMax(), [5.0]) == (5.0, 5.0)


def test_moving_average_follows_its_formula():
    # The first sample starts it: (-1, 1); then low += 0.5 * (-3 - low), high += 0.5 * (2 - high).
    assert _see(MovingAverage(0.5), [-1.0, 1.0], [-3.0, 2.0]) == (-2.0, 1.5)
    assert _see(MovingAverage(0.5), [-1.0, 1.0], [-3.0, 2.0], [0.0, 9.0]) == (-1.0, 5.25)
    assert _see(MovingAverage(1.0), [-1.0, 1.0], [-3.0, 2.0]) == (-3.0, 2.0)


def test_moving_average_damps_an_outlier_that_min_max_takes():
    calm, outlier = [-1.0, 1.0], [-100.0, 100.0]
    samples = [calm] * 10 + [outlier] + [calm] * 10
    assert _see(MovingAverage(0.1), *samples)[1] < 5 < _see(MinMax(), *samples)[1]


def _percentiles(data: np.ndarray, percent: float) -> tuple[float, float]:
    tail = (100 - percent) / 2
    return float(np.percentile(data, tail)), float(np.percentile(data, 100 - tail))


@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9, 99.99])
@pytest.mark.parametrize("size", [31, 1000, 100_000])
def test_percentile_agrees_with_numpy_to_a_bin(percent: float, size: int):
    rng = np.random.default_rng(size)
    data = rng.laplace(size=size).astype(F32)
    observer = Percentile(percent)
    low, high = _see(observer, *np.array_split(data, 7))
    width = observer.histogram.width
    ordered = np.sort(data)
    # NumPy interpolates between two elements where the histogram takes one of them: a bin and a gap apart at most.
    for got, want in zip((low, high), _percentiles(data, percent), strict=True):
        at = np.searchsorted(ordered, want)
        gap = ordered[min(at + 1, size - 1)] - ordered[max(at - 2, 0)]
        assert abs(got - want) <= width + gap


def test_the_share_of_elements_inside_is_what_was_asked():
    data = np.random.default_rng(0).standard_normal(200_000).astype(F32)
    low, high = _see(Percentile(99.0), *np.array_split(data, 5))
    assert np.mean((data >= low) & (data <= high)) == pytest.approx(0.99, abs=2e-3)


def test_percentile_100_is_min_max():
    samples = np.random.default_rng(0).standard_normal((5, 1000)).astype(F32)
    assert _see(Percentile(100.0), *samples) == _see(MinMax(), *samples)


def test_one_sided_tensors_are_cut_at_their_far_end_only():
    data = np.random.default_rng(0).exponential(size=100_000).astype(F32)
    observer = Percentile(99.0)
    low, high = _see(observer, data)
    assert low == float(data.min())
    assert high == pytest.approx(np.percentile(data, 99.0), abs=observer.histogram.width)
    low, high = _see(Percentile(99.0), -data)
    assert high == float(-data.min())
    assert low == pytest.approx(np.percentile(-data, 1.0), abs=observer.histogram.width)


def test_an_outlier_is_cut():
    data = np.concatenate([np.linspace(0, 1, 99_999), [1000.0]])
    low, high = _see(Percentile(99.9), data)
    assert low == 0.0 and high < 1.0 + 2000 / Histogram.BINS


def test_the_range_doubles_and_the_memory_does_not_grow():
    seen = Histogram()
    counted = 0
    for exponent in range(-30, 31):
        sample = np.linspace(-(10.0**exponent), 10.0**exponent, 17, dtype=F32)
        seen.see(sample, float(sample.min()), float(sample.max()))
        counted += sample.size
        assert seen.counts.shape == (Histogram.BINS,)
        assert seen.total == counted
        assert seen.bound >= np.abs(sample).max()
    assert seen.bound < 4e30


def test_doubling_keeps_each_element_in_its_bin():
    data = np.random.default_rng(0).uniform(-1, 1, 10_000).astype(F32)
    doubled, direct = Percentile(98.0), Percentile(98.0)
    parts = data[np.abs(data) < 0.1], data[np.abs(data) >= 0.1]
    for a, b in zip(_see(doubled, *parts), _see(direct, data), strict=True):
        assert a == pytest.approx(b, abs=2 * doubled.histogram.width)


def test_the_largest_element_is_counted():
    for size in (1.0, 3.0, 0.1, 1e-30, 3.4e38):
        sample = np.array([-size, size, 0.0], F32)
        assert Histogram.of(sample).total == 3


@pytest.mark.parametrize(
    "make",
    [MinMax, lambda: MovingAverage(0.1), *(lambda name=n: observers.make(Recipe(observer=name)) for n in CUTTING)],
)
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e30, -1e30, 1e-30, 3.4e38, 1e-42])
def test_constant_tensors(make, value: float):
    expected = float(F32(value))
    low, high = _see(make(), np.full(9, value), np.full((2, 2), value))
    assert low == pytest.approx(expected) and high == pytest.approx(expected)


@pytest.mark.parametrize("scale", [1e30, 1e-20, 3e38])
def test_percentile_at_extreme_sizes(scale: float):
    data = (np.linspace(-1, 1, 10_001) * scale).astype(F32)
    with np.errstate(all="raise", under="ignore"):
        low, high = _see(Percentile(99.0), data[4000:6000], data)
    tails = np.percentile(np.concatenate([data[4000:6000], data]).astype(np.float64), [0.5, 99.5])
    assert [low, high] == pytest.approx(tails.tolist(), rel=1e-2)


def test_zeros_first_then_values():
    low, high = _see(Percentile(99.9), np.zeros(1000), np.linspace(-1, 1, 1000))
    assert low == pytest.approx(-1, abs=0.01) and high == pytest.approx(1, abs=0.01)
