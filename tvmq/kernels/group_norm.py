"""Group norm of channels-last images: sums a row, then an image, of vectors of channels, rows in parallel.

The order of sums is that of `functions.group_norm`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvmq import ops
from tvmq.kernels import builder
from tvmq.kernels.builder import FLOAT, Expr, Flat
from tvmq.kernels.vector_epilogue import Place, run_epilogue
from tvmq.kernels.vector_math import VectorMath


@dataclass(frozen=True)
class GroupNorm:
    """Shapes are NHWC. read: the steps that make floats of elements of x, where these are integers."""

    shape: tuple[int, int, int, int]
    dtype: str
    out_dtype: str
    groups: int
    epsilon: float
    read: ops.Epilogue
    epilogue: ops.Epilogue
    operands: tuple[tuple[tuple[int, ...], str], ...]
    lanes: int

    def function(self) -> Any:
        """The PrimFunc: (x, gamma, beta, epilogue tensors..., out)."""
        return builder.function(self._emit)

    def _emit(self, f: builder.Function) -> None:
        n, h, w, c = self.shape
        x, gamma, beta, *operands, out = f.arguments(
            (self.shape, self.dtype), ((c,), FLOAT), ((c,), FLOAT), *self.operands, (self.shape, self.out_dtype)
        )
        rows, mean, inverse = f.scratch(n * h * c, FLOAT), f.scratch(n * c, FLOAT), f.scratch(n * c, FLOAT)
        one = VectorMath(1)
        share = one.number(1.0 / (h * w * (c // self.groups)))

        def value(flat: Expr, at: Expr, lanes: int) -> Expr:
            return run_epilogue(x.load(flat, lanes), x.value_dtype, self.read, (), Place(at, flat, lanes))

        def centred(row: Expr, flat: Expr, at: Expr, lanes: int) -> Expr:
            return VectorMath(lanes).sub(value(flat, at, lanes), mean.load(row // h * c + at, lanes))

        def square(row: Expr, flat: Expr, at: Expr, lanes: int) -> Expr:
            difference = centred(row, flat, at, lanes)
            return VectorMath(lanes).mul(difference, difference)

        def inverse_deviation(total: Expr) -> Expr:
            variance = one.add(one.mul(total, share), one.number(self.epsilon))
            return one.div(one.number(1.0), one.sqrt(variance))

        self._row_sums(f, rows, lambda _row, flat, at, lanes: value(flat, at, lanes))
        self._of_groups(f, rows, mean, lambda total: one.mul(total, share))
        self._row_sums(f, rows, square)
        self._of_groups(f, rows, inverse, inverse_deviation)
        with builder.parallel(n * h) as row, builder.serial(w) as column:
            start = (row * w + column) * c

            def scaled(at: Expr, lanes: int) -> None:
                m, flat = VectorMath(lanes), start + at
                unit = m.mul(centred(row, flat, at, lanes), inverse.load(row // h * c + at, lanes))
                result = m.fma(unit, gamma.load(at, lanes), beta.load(at, lanes))
                out.store(run_epilogue(result, FLOAT, self.epilogue, operands, Place(at, flat, lanes)), flat, lanes)

            builder.for_each(c, self.lanes, scaled)

    def _row_sums(self, f: builder.Function, rows: Flat, element: Callable[[Expr, Expr, Expr, int], Expr]) -> None:
        """The sum of each row of pixels, a channel at a time, of `element(row, flat index, channel, lanes)`."""
        n, h, w, c = self.shape
        with builder.parallel(n * h) as row:

            def add(at: Expr, lanes: int) -> None:
                total = _sum(f, w, lanes, lambda column: element(row, (row * w + column) * c + at, at, lanes))
                rows.store(total, row * c + at, lanes)

            builder.for_each(c, self.lanes, add)

    def _of_groups(self, f: builder.Function, rows: Flat, out: Flat, finish: Callable[[Expr], Expr]) -> None:
        """`finish` of the sum over each group of an image, for each of its channels."""
        n, h, _, c = self.shape
        each = c // self.groups
        with builder.serial(n) as image:

            def add(at: Expr, lanes: int) -> None:
                total = _sum(f, h, lanes, lambda y: rows.load((image * h + y) * c + at, lanes))
                out.store(total, image * c + at, lanes)

            builder.for_each(c, self.lanes, add)
            with builder.serial(self.groups) as group:
                start = image * c + group * each
                result = f.registers(1, FLOAT)
                result.store(finish(_sum(f, each, 1, lambda channel: out.load(start + channel))), 0)
                with builder.serial(each) as channel:
                    out.store(result.load(0), start + channel)


def _sum(f: builder.Function, count: int, lanes: int, element: Callable[[Expr], Expr]) -> Expr:
    """The sum of `element(i)` for i from 0 to count - 1, in this order."""
    total = f.registers(lanes, FLOAT)
    total.store(builder.number(0.0, FLOAT, lanes), 0, lanes)
    with builder.serial(count) as i:
        total.store(total.load(0, lanes) + element(i), 0, lanes)
    return total.load(0, lanes)
