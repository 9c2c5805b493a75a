"""Products of two activations: float32 [batch, M, K] with [batch, K, N], or with [batch, N, K] transposed.

A task takes one panel of columns of one batch: it copies the panel into the order in which products read it, then
multiplies all rows with it, a register tile at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from tvmq.kernels import builder
from tvmq.kernels.builder import FLOAT, Expr, Flat, Place
from tvmq.kernels.micro import Micro
from tvmq.kernels.register_tile import RegisterTile
from tvmq.kernels.results import Results


@dataclass(frozen=True)
class BatchMatmul:
    """x: [batch, m, k], or [1, m, k] for every batch where `shared`. transposed: y is [batch, n, k].

    shapes: of x, y and the result, with as many leading axes as they have. rows, vectors: of a register tile.
    """

    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    batch: int
    m: int
    k: int
    n: int
    shared: bool
    transposed: bool
    micro: Micro
    rows: int
    vectors: int

    def function(self) -> Any:
        """The PrimFunc: (x, y, out), all float32."""
        return builder.function(_Emitter(self).emit)


class _Emitter:
    def __init__(self, kernel: BatchMatmul) -> None:
        self.s, self.lanes = kernel, kernel.micro.lanes
        self.nr = kernel.vectors * self.lanes
        self.panels = -(-kernel.n // self.nr)

    def emit(self, f: builder.Function) -> None:
        s = self.s
        self.x, self.y, out = f.arguments(*((shape, FLOAT) for shape in s.shapes))
        self.f = f
        self.results = Results(out, FLOAT, self.lanes, s.n, s.n % self.nr == 0)
        with builder.parallel(s.batch * self.panels) as task:
            batch, panel = tirx.floordiv(task, self.panels), tirx.floormod(task, self.panels)
            packed = f.scratch(s.k * self.nr, FLOAT)
            self._pack(packed, batch, panel * self.nr)
            if s.m >= s.rows:
                with builder.serial(s.m // s.rows) as block:
                    self._tile(packed, batch, block * s.rows, panel, s.rows)
            if s.m % s.rows:
                self._tile(packed, batch, tirx.const(s.m - s.m % s.rows, "int32"), panel, s.m % s.rows)

    def _pack(self, packed: Flat, batch: Expr, first: Expr) -> None:
        """packed[k, column] of the panel that starts at column `first`; columns past the end are zeros."""
        s, lanes = self.s, self.lanes

        def copy(column: Expr, count: int, k: Expr) -> None:
            if s.transposed:
                for i in range(count):
                    source = (batch * s.n + first + column + i) * s.k + k
                    packed.store(self.y.load(source), k * self.nr + column + i)
            else:
                value = self.y.load((batch * s.k + k) * s.n + first + column, count)
                packed.store(value, k * self.nr + column, count)

        def zeros(k: Expr) -> None:
            for v in range(s.vectors):
                packed.store(builder.number(0.0, FLOAT, lanes), k * self.nr + v * lanes, lanes)

        rest = s.n % self.nr
        with builder.when(first + self.nr <= s.n), builder.serial(s.k) as k:
            for v in range(s.vectors):
                copy(tirx.const(v * lanes, "int32"), lanes, k)
        if rest:
            with builder.when(first + self.nr > s.n), builder.serial(s.k) as k:
                zeros(k)
                for start in range(0, rest, lanes):
                    copy(tirx.const(start, "int32"), min(lanes, rest - start), k)

    def _tile(self, packed: Flat, batch: Expr, row: Expr, panel: Expr, rows: int) -> None:
        s, lanes = self.s, self.lanes
        acc = RegisterTile(self.f, s.micro, rows, s.vectors)
        base = ((0 if s.shared else batch * s.m) + row) * s.k
        with builder.serial(s.k) as k:
            acc.step(self.x, lambda i: base + i * s.k + k, packed, k * self.nr)
        for i, v, slot in acc.slots():
            first = panel * self.nr + v * lanes
            place = Place(first, (batch * s.m + row + i) * s.n + first, lanes)
            self.results.finish(acc.acc, slot, place, first, (), ())
