"""Finishing sums: the epilogue of a vector of results, and its store, whole or cut at the last channel."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from tvmq import ops
from tvmq.kernels import builder
from tvmq.kernels.builder import Expr, Flat, Registers
from tvmq.kernels.vector_epilogue import Place, run_epilogue


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

    def store(self, value: Expr, place: Place, steps: ops.Epilogue, operands: Sequence[Flat]) -> None:
        """A vector of sums, of any width, becomes the results at `place`, where all of its channels are."""
        self.out.store(run_epilogue(value, self.acc_dtype, steps, operands, place), place.flat, place.lanes)

    def finish(
        self, acc: Flat | Registers, slot: Any, place: Place, first: Expr, steps: ops.Epilogue, operands: Sequence[Flat]
    ) -> None:
        """The vector of sums at `slot` becomes the results at `place`; `first`: its first channel in the group."""

        def store(lanes: int) -> None:
            self.store(acc.load(slot, lanes), dataclasses.replace(place, lanes=lanes), steps, operands)

        if self.whole:
            store(self.lanes)
            return
        rest = self.channels % self.lanes
        with builder.when(first + self.lanes <= self.channels):
            store(self.lanes)
        if rest:
            with builder.when(tirx.EQ(first, tirx.const(self.channels - rest, "int32"))):
                store(rest)
