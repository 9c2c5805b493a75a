"""The register tile of all matrix kernels: rows x vectors of accumulators, and one step of their products."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tvmq.kernels import builder
from tvmq.kernels.builder import Expr, Flat, Registers
from tvmq.kernels.micro import Micro
from tvmq.kernels.spans import Lanes, Sums


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
        count = micro.span.slots(rows, vectors)
        self.acc = f.registers(count * micro.lanes, micro.acc_dtype)
        self.sums = Sums(self.acc, self.lanes)
        assert start is None or micro.span.plain
        for slot in range(count):
            zero = builder.number(0, micro.acc_dtype, self.lanes)
            self.sums.store(start(slot % vectors) if start else zero, slot)

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

    def multiply(self, a: Flat, rows: Sequence[Expr], panel: Flat, w: Expr, steps: int) -> None:
        """As `step`, for so many steps as a whole span of the micro-kernel has, or for one."""
        self.micro.span.multiply(self.sums, a, rows, panel, w, self.vectors, steps)

    def run(
        self, a: Flat, at: Expr, rows: Sequence[int], panel: Flat, w: Expr, steps: int, ahead: Expr | None = None
    ) -> bool:
        """A whole run from a[at + rows[row]], where the span of the micro-kernel can do it at once: see `Lanes.run`."""
        span = self.micro.span
        if not isinstance(span, Lanes) or not span.runs(steps):
            return False
        span.run(self.sums, a, at, rows, panel, w, self.vectors, steps, ahead)
        return True

    def collect(self, row: int, vector: int) -> Expr:
        """The sums of a row and a vector of channels."""
        return self.micro.span.collect(self.sums, row, vector, self.vectors)

    def collected(self, f: builder.Function) -> Registers:
        """All sums, where `slots` says."""
        if self.micro.span.plain:
            return self.acc
        final = f.registers(self.rows * self.vectors * self.lanes, self.micro.acc_dtype)
        for row, v, slot in self.slots():
            final.store(self.collect(row, v), slot, self.lanes)
        return final

    def load(self, slot: int) -> Expr:
        """A vector of sums."""
        return self.acc.load(slot, self.lanes)
