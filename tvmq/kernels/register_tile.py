"""The register tile of all matrix kernels: rows x vectors of accumulators, and one step of their products."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tvmq.kernels import builder
from tvmq.kernels.builder import Expr, Flat
from tvmq.kernels.micro import Micro


class RegisterTile:
    """acc[row, vector], zeros at first, or what `start(vector)` gives for every row."""

    def __init__(
        self,
        f: builder.Function,
        micro: Micro,
        rows: int,
        vectors: int,
        start: Callable[[int], Expr] | None = None,
    ) -> None:
        self.micro, self.rows, self.vectors, self.lanes = micro, rows, vectors, micro.lanes
        self.acc = f.registers(rows * vectors * micro.lanes, micro.acc_dtype)
        for _, v, slot in self.slots():
            zero = builder.number(0, micro.acc_dtype, self.lanes)
            self.acc.store(start(v) if start else zero, slot, self.lanes)

    def slots(self) -> Iterator[tuple[int, int, int]]:
        """(row, vector, index of the first accumulator) of each vector of accumulators."""
        for row in range(self.rows):
            for v in range(self.vectors):
                yield row, v, (row * self.vectors + v) * self.lanes

    def step(self, a: Flat, at: Callable[[int], Expr], panel: Flat, w: Expr) -> None:
        """acc[row, v] += `kr` elements of `a` from at(row), times those of the panel's vector v; `w`: its first."""
        for row, v, slot in self.slots():
            acc = self.acc.load(slot, self.lanes)
            product = self.micro.step(acc, a, at(row), panel, w + v * self.lanes * self.micro.kr)
            self.acc.store(product, slot, self.lanes)

    def load(self, slot: int) -> Expr:
        """A vector of sums."""
        return self.acc.load(slot, self.lanes)
