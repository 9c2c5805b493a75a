"""What channels of tensors hold, over calibration samples: their extremes, and how they vary."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm

from tvmq.oracle import interpret

Array = npt.NDArray[Any]
Samples = Iterable[tuple[Array, ...]]


@dataclass(frozen=True)
class ChannelsSeen:
    """Of each channel (last axis) of a tensor, [channels]: the least and the largest element, and the variance."""

    low: Array
    high: Array
    variance: Array

    @property
    def largest(self) -> Array:
        """max |x| of each channel."""
        return np.maximum(np.abs(self.low), np.abs(self.high))


class _Sums:
    """What `ChannelsSeen` is made of, so far."""

    def __init__(self, channels: int) -> None:
        self.low, self.high = np.full(channels, np.inf), np.full(channels, -np.inf)
        self.total, self.squares = np.zeros(channels), np.zeros(channels)
        self.rows = 0

    def add(self, rows: Array) -> None:
        """Take [rows, channels] in."""
        self.low, self.high = np.minimum(self.low, rows.min(axis=0)), np.maximum(self.high, rows.max(axis=0))
        self.total += rows.sum(axis=0, dtype=np.float64)
        self.squares += np.square(rows, dtype=np.float64).sum(axis=0)
        self.rows += len(rows)

    def seen(self) -> ChannelsSeen:
        """All together."""
        mean = self.total / self.rows
        return ChannelsSeen(self.low, self.high, np.maximum(self.squares / self.rows - mean**2, 0.0))


def channels_seen(module: tvm.IRModule, samples: Samples, names: set[str]) -> dict[str, ChannelsSeen]:
    """What the tensors `names` hold over all samples; nothing of those that no sample reaches."""
    sums: dict[str, _Sums] = {}
    _watch(module, samples, names, lambda name, rows: sums.setdefault(name, _Sums(rows.shape[1])).add(rows))
    return {name: found.seen() for name, found in sums.items()}


def largest_seen(module: tvm.IRModule, samples: Samples, names: set[str]) -> dict[str, Array]:
    """max |x| of each channel of the tensors `names` over all samples, float64."""
    found: dict[str, Array] = {}

    def see(name: str, rows: Array) -> None:
        found[name] = np.maximum(found.get(name, np.zeros(rows.shape[1])), np.abs(rows).max(axis=0))

    _watch(module, samples, names, see)
    return found


def _watch(module: tvm.IRModule, samples: Samples, names: set[str], see: Callable[[str, Array], None]) -> None:
    """Let `see` look at what tensors are in each inference, as [rows, channels]."""
    program = interpret.Program(module, names)
    for inputs in samples:
        program.run(inputs, lambda name, value: see(name, value.reshape(-1, value.shape[-1])))
