"""Products of two activations: [batch, M, K] with [batch, K, N], or with [batch, N, K] transposed; floats or 8 bits.

A task takes one panel of columns of one batch: it copies the panel into the order in which products read it, then
multiplies all rows with it, a register tile at a time. Of integers the zero points' share of the products is

    sum (x - zx) (y - zy)  =  sum x y  -  zx * sum y  -  zy * sum x  +  K zx zy

where the sums of columns are products with ones, made once a panel, and those of rows are made beside the products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx

from tvmq import ops
from tvmq.kernels import builder, word_panels
from tvmq.kernels.builder import FLOAT, Expr, Flat, Registers
from tvmq.kernels.micro import Micro
from tvmq.kernels.register_tile import RegisterTile
from tvmq.kernels.results import Results
from tvmq.kernels.vector_epilogue import Place


@dataclass(frozen=True)
class BatchMatmul:
    """x: [batch, m, depth], or [1, m, depth] for every batch where `shared`. transposed: y is [batch, n, k].

    depth: `k` in whole steps of `micro`; past k, integers of x are their zero point. shapes: of x, y and the result,
    with as many leading axes as they have. zero_points: of x and y as the products read them. micro: a row that
    multiplies word by word. rows, vectors: of a register tile. operands: (shape, dtype) of each epilogue tensor.
    """

    shapes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    y_dtype: str
    out_dtype: str
    batch: int
    m: int
    k: int
    n: int
    shared: bool
    transposed: bool
    zero_points: tuple[int, int]
    micro: Micro
    rows: int
    vectors: int
    epilogue: ops.Epilogue
    operands: tuple[tuple[tuple[int, ...], str], ...]

    @property
    def steps(self) -> int:
        """Steps of the micro-kernel in a row."""
        return -(-self.k // self.micro.kr)

    @property
    def depth(self) -> int:
        """Elements from one row of x to the next."""
        return self.steps * self.micro.kr

    def function(self) -> Any:
        """The PrimFunc: (x, y, epilogue tensors..., out)."""
        return builder.function(_Emitter(self).emit)


class _Emitter:
    def __init__(self, kernel: BatchMatmul) -> None:
        self.s, self.m, self.lanes = kernel, kernel.micro, kernel.micro.lanes
        self.nr = kernel.vectors * self.lanes
        self.panels = -(-kernel.n // self.nr)

    def emit(self, f: builder.Function) -> None:
        s, m = self.s, self.m
        x_shape, y_shape, out_shape = s.shapes
        self.x, self.y, *self.operands, out = f.arguments(
            (x_shape, m.a_dtype), (y_shape, s.y_dtype), *s.operands, (out_shape, s.out_dtype)
        )
        if m.llvm:
            f.import_llvm(m.llvm)
        self.f = f
        self.results = Results(out, m.acc_dtype, self.lanes, s.n, s.n % self.nr == 0)
        with builder.parallel(s.batch * self.panels) as task:
            batch, panel = tirx.floordiv(task, self.panels), tirx.floormod(task, self.panels)
            packed = f.scratch(s.depth * self.nr, m.w_dtype)
            if m.w_dtype == FLOAT:
                self._pack(packed, batch, panel * self.nr)
            else:
                self._pack_words(packed, batch, panel * self.nr)
            self._sum_columns(packed)
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

    def _pack_words(self, packed: Flat, batch: Expr, first: Expr) -> None:
        """The same in words of 8-bit integers; what columns past the end hold, nobody reads."""
        s = self.s
        along, across = (1, s.k) if s.transposed else (s.n, 1)
        start = batch * (s.k * s.n) + first * across
        matrix = word_panels.Matrix(self.y, start, s.k, along, across)

        def columns(count: int) -> None:
            word_panels.pack(packed, matrix, count, self.nr, self.m)

        full, rest = divmod(s.n, self.nr)
        builder.either(first + self.nr <= s.n, full, rest, lambda: columns(self.nr), lambda: columns(rest))

    def _sum_columns(self, packed: Flat) -> None:
        """What sums start from, a vector of columns each; None where that is zero. And ones to sum rows with."""
        s, m, (zx, zy) = self.s, self.m, self.s.zero_points
        self.start: Registers | None = None
        self.ones: Flat | None = None
        if zx:
            ones = self._ones(m.kr, m.a_dtype)
            sums = RegisterTile(self.f, m, 1, s.vectors)
            with builder.serial(s.steps) as step:
                sums.step(ones, lambda _row: tirx.const(0, "int32"), packed, step * (self.nr * m.kr))
            self.start = self.f.registers(self.nr, m.acc_dtype)
            for _, _, slot in sums.slots():
                total = builder.number(zx, m.acc_dtype, self.lanes) * sums.load(slot)
                constant = builder.number(s.depth * zx * zy, m.acc_dtype, self.lanes)
                self.start.store(constant - total, slot, self.lanes)
        if zy:
            self.ones = self._ones(m.kr * self.lanes, m.w_dtype)

    def _ones(self, count: int, dtype: str) -> Flat:
        ones = self.f.scratch(count, dtype)
        ones.store(builder.number(1, dtype, count), 0, count)
        return ones

    def _tile(self, packed: Flat, batch: Expr, row: Expr, panel: Expr, rows: int) -> None:
        s, m, lanes = self.s, self.m, self.lanes
        start = self.start
        acc = RegisterTile(self.f, m, rows, s.vectors, (lambda v: start.load(v * lanes, lanes)) if start else None)
        sums = RegisterTile(self.f, m, rows, 1) if self.ones is not None else None
        first_row = (0 if s.shared else batch * s.m) + row
        base = first_row * s.depth
        with builder.serial(s.steps) as step:

            def at(i: int, step: Expr = step) -> Expr:
                return base + i * s.depth + step * m.kr

            acc.step(self.x, at, packed, step * (self.nr * m.kr))
            if sums is not None and self.ones is not None:
                sums.step(self.x, at, self.ones, tirx.const(0, "int32"))
        for i, v, slot in acc.slots():
            if sums is not None:
                share = builder.number(s.zero_points[1], m.acc_dtype, lanes) * sums.load(i * lanes)
                acc.acc.store(acc.load(slot) - share, slot, lanes)
            first = panel * self.nr + v * lanes
            flat = (batch * s.m + row + i) * s.n + first
            place = Place(batch * s.n + first, flat, lanes, first_row + i)
            self.results.finish(acc.acc, slot, place, first, s.epilogue, self.operands)
