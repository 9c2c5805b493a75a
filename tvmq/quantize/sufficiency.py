"""Whether calibration samples suffice: how much the ranges depend on which samples were taken.

For each tensor the extremes of every sample are kept (of blocks of samples, once there are many). Three questions are
answered from them: how wide the range is expected to be with fewer samples (so, from how many on another one adds
little), how much it varies from one set of as many samples to another (bootstrap), and which samples set an extreme.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
# Blocks are merged two by two when there are more: memory does not grow with the number of samples.
BLOCKS = 1024
# The range is good enough where it is expected to be this share of that of all samples.
ENOUGH = 0.99
RESAMPLES = 200


class Extremes:
    """The smallest and largest element of each tensor in each block of samples, in order."""

    def __init__(self) -> None:
        self.block = 1  # samples a row
        self.samples = 0
        self._rows: dict[str, list[tuple[float, float]]] = {}

    def see(self, tensor: str, low: float, high: float) -> None:
        """Take the extremes of a tensor in the sample that is running."""
        rows = self._rows.setdefault(tensor, [])
        if len(rows) > self.samples // self.block:
            low, high = min(low, rows[-1][0]), max(high, rows[-1][1])
            rows.pop()
        rows.append((low, high))

    def next_sample(self) -> None:
        """The sample that was running is done."""
        self.samples += 1
        if self.samples == BLOCKS * self.block:
            self.block *= 2
            self._rows = {tensor: _merged(rows) for tensor, rows in self._rows.items()}

    def of(self, tensor: str) -> Array:
        """float64 [blocks, 2]: lows and highs."""
        return np.array(self._rows[tensor])

    @property
    def tensors(self) -> list[str]:
        """The tensors that were seen."""
        return list(self._rows)


def _merged(rows: list[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(min(a[0], b[0]), max(a[1], b[1])) for a, b in zip(rows[::2], rows[1::2], strict=True)]


@dataclass(frozen=True)
class TensorSpread:
    """One tensor: how its range depends on the samples.

    spread: standard deviation of the range's width over bootstrap sets, as a share of the width. needed: from so many
    samples on the expected width is 99 % of that of all; None where all of them are not seen to be enough (the width of
    half of them is expected to fall short of 99 %, so that it may still be growing). low_sample, high_sample: the
    sample, counted from 0, that set the extreme (the first of its block where blocks were merged).
    """

    tensor: str
    spread: float
    needed: int | None
    low_sample: int
    high_sample: int


@dataclass(frozen=True)
class Sufficiency:
    """The answer for all tensors, the least certain first. `setters`: sample -> how many extremes it alone set."""

    samples: int
    tensors: tuple[TensorSpread, ...]
    setters: dict[int, int]

    @property
    def needed(self) -> int | None:
        """The samples that 95 % of the tensors need; None where that is not known to be reached."""
        counts = sorted(self.samples + 1 if t.needed is None else t.needed for t in self.tensors)
        if not counts:
            return 0
        found = counts[min(len(counts) - 1, int(np.ceil(0.95 * len(counts))) - 1)]
        return None if found > self.samples else found

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        setters = {str(sample): count for sample, count in self.setters.items()}
        return {
            "samples": self.samples,
            "needed": self.needed,
            "setters": setters,
            "tensors": [asdict(t) for t in self.tensors],
        }


def judge(extremes: Extremes, seed: int = 0) -> Sufficiency:
    """Whether the samples suffice. `seed`: of the bootstrap."""
    rng = np.random.default_rng(seed)
    spreads, setters = [], dict[int, int]()
    blocks = max((len(extremes.of(tensor)) for tensor in extremes.tensors), default=0)
    draws = rng.integers(0, blocks, (RESAMPLES, blocks)) if blocks else np.zeros((RESAMPLES, 0), int)
    for tensor in extremes.tensors:
        rows = extremes.of(tensor)
        lows, highs = np.minimum(rows[:, 0], 0.0), np.maximum(rows[:, 1], 0.0)
        width = float(highs.max() - lows.min())
        resampled = highs[draws].max(axis=1) - lows[draws].min(axis=1)
        spread = float(resampled.std() / width) if width else 0.0
        first = [int(rows[:, 0].argmin()) * extremes.block, int(rows[:, 1].argmax()) * extremes.block]
        if width:
            for sample in first:
                setters[sample] = setters.get(sample, 0) + 1
        needed = _needed(lows, highs, width)
        spreads.append(TensorSpread(tensor, spread, needed and needed * extremes.block, *first))
    ordered = tuple(sorted(spreads, key=lambda s: (s.needed is not None, -s.spread)))
    ranked = dict(sorted(setters.items(), key=lambda item: -item[1])[:10])
    return Sufficiency(extremes.samples, ordered, ranked)


def _needed(lows: Array, highs: Array, width: float) -> int | None:
    """The least number of samples whose expected range is ENOUGH of `width`; None where that is over half of them."""
    count = len(lows)
    if not width:
        return 1
    sizes = np.arange(1, count + 1)
    expected = _expected_largest(highs) + _expected_largest(-lows)
    enough = sizes[expected >= ENOUGH * width]
    return int(enough[0]) if len(enough) and enough[0] <= max(count // 2, 1) else None


def _expected_largest(values: Array) -> Array:
    """The expected maximum of k of `values` drawn without replacement, for k = 1 ... n: float64 [n].

    P(maximum is the i-th smallest) = C(i - 1, k - 1) / C(n, k); its sum runs through a recurrence over k.
    """
    ordered = np.sort(values)
    n = len(ordered)
    chances = np.full(n, 1.0 / n)  # k = 1
    expected = np.empty(n)
    rank = np.arange(n)
    for k in range(1, n + 1):
        expected[k - 1] = chances @ ordered
        if k < n:
            # C(i-1, k) / C(n, k+1)  =  C(i-1, k-1) / C(n, k) * (i - k) / k * (k + 1) / (n - k)
            chances = chances * np.maximum(rank + 1 - k, 0) / k * (k + 1) / (n - k)
    return expected
