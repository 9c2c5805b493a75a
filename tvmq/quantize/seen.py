"""What channels of tensors hold, over calibration samples: their extremes and how they vary."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm

from tvmq.oracle import interpret

Array = npt.NDArray[Any]


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


def channels_seen(
    module: tvm.IRModule, samples: Iterable[tuple[Array, ...]], names: set[str]
) -> dict[str, ChannelsSeen]:
    """What the tensors `names` hold over all samples; nothing of those that no sample reaches."""
    sums: dict[str, _Sums] = {}

    def watch(name: str, value: Array) -> None:
        rows = value.reshape(-1, value.shape[-1])
        sums.setdefault(name, _Sums(rows.shape[1])).add(rows)

    program = interpret.Program(module, names)
    for inputs in samples:
        program.run(inputs, watch)
    return {name: found.seen() for name, found in sums.items()}
