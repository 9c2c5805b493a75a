"""Finishing sums: the epilogue of a vector of results, and its store, whole or cut at the last channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from tvmq import ops
from tvmq.kernels import builder
from tvmq.kernels.builder import Expr, Flat, Place, Registers


@dataclass(frozen=True)
class Results:
    """Where the results of a matrix kernel go.

    channels: of one group. whole: whether every vector has all of its channels. lanes: channels in a vector.
    """

    out: Flat
    acc_dtype: str
    lanes: int
    channels: int
    whole: bool

    def finish(
        self, acc: Flat | Registers, slot: Any, place: Place, first: Expr, steps: ops.Epilogue, operands: Sequence[Flat]
    ) -> None:
        """The vector of sums at `slot` becomes the results at `place`; `first`: its first channel in the group."""

        def store(lanes: int) -> None:
            at = Place(place.channel, place.flat, lanes, place.row)
            value = builder.run_epilogue(acc.load(slot, lanes), self.acc_dtype, steps, operands, at)
            self.out.store(value, place.flat, lanes)

        if self.whole:
            store(self.lanes)
            return
        rest = self.channels % self.lanes
        with builder.when(first + self.lanes <= self.channels):
            store(self.lanes)
        if rest:
            with builder.when(tirx.EQ(first, tirx.const(self.channels - rest, "int32"))):
                store(rest)
