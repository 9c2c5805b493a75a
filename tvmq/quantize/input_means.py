"""The means of what layers with weights read, gathered while ranges are: one tensor a layer, however many samples."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from tvmq.graph.fusion import Chain

Array = npt.NDArray[Any]


class InputMeans:
    """The mean of what each of `chains` reads, over the samples that were seen."""

    def __init__(self, chains: Iterable[Chain] = ()) -> None:
        self._pictures = dict[str, bool]()
        for chain in chains:
            name = str(chain.x.name)
            # A convolution takes the edges of its picture apart; a linear layer's rows are alike.
            self._pictures[name] = self._pictures.get(name, False) or chain.kind == "conv2d"
        self._sums: dict[str, Array] = {}
        self._counts: dict[str, int] = {}

    def see(self, name: str, value: Array) -> None:
        """Take what the tensor `name` was in one inference, if a layer reads it: [N, .., channels]."""
        if name not in self._pictures or value.size == 0:
            return
        samples = value if self._pictures[name] else value.reshape(-1, value.shape[-1])
        total = samples[0] if len(samples) == 1 else samples.sum(axis=0)
        if name in self._sums:
            self._sums[name] += total
        else:
            self._sums[name] = total.astype(np.float64)
        self._counts[name] = self._counts.get(name, 0) + len(samples)

    def of(self, chain: Chain) -> Array | None:
        """Float64 [1, .., channels], the mean of what `chain` reads; None where nothing was seen."""
        name = str(chain.x.name)
        return self._sums[name][np.newaxis] / self._counts[name] if name in self._sums else None
