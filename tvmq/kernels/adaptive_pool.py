"""Averages over windows that differ in size: output i of m is over input floor(i n / m) to ceil((i + 1) n / m)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvmq import ops
from tvmq.kernels import builder
from tvmq.kernels.builder import FLOAT, FLOATS, Expr
from tvmq.kernels.pixels import each_pixel
from tvmq.kernels.vector_epilogue import Place, run_epilogue


@dataclass(frozen=True)
class AdaptivePool:
    """Shapes are NHWC. The sum of x - zero_point, times the reciprocal of its count, then the epilogue."""

    x_shape: tuple[int, int, int, int]
    dtype: str
    out_shape: tuple[int, int, int, int]
    out_dtype: str
    epilogue: ops.Epilogue
    operands: tuple[tuple[tuple[int, ...], str], ...]
    zero_point: int
    lanes: int

    def function(self) -> Any:
        """The PrimFunc: (x, reciprocals of the counts, epilogue tensors..., out)."""
        return builder.function(self._emit)

    def _emit(self, f: builder.Function) -> None:
        _, oh, ow, c = self.out_shape
        _, h, w, _ = self.x_shape
        x, shares, *operands, out = f.arguments(
            (self.x_shape, self.dtype), ((oh * ow,), FLOAT), *self.operands, (self.out_shape, self.out_dtype)
        )
        dtype = FLOAT if self.dtype in FLOATS else "int32"
        with each_pixel(self.out_shape) as pixel:
            top, height = _span(pixel.y, h, oh)
            left, width = _span(pixel.column, w, ow)
            share = T.Bind(shares.load(pixel.index))

            def pool(at: Expr, lanes: int) -> None:
                acc = f.registers(lanes, dtype)
                acc.store(builder.number(0, dtype, lanes), 0, lanes)
                with builder.serial(height) as ky, builder.serial(width) as kx:
                    value = x.load((((pixel.image * h + top + ky) * w) + left + kx) * c + at, lanes)
                    if dtype != FLOAT:
                        value = builder.cast(value, dtype, lanes) - builder.number(self.zero_point, dtype, lanes)
                    acc.store(acc.load(0, lanes) + value, 0, lanes)
                total = acc.load(0, lanes)
                total = total if dtype == FLOAT else builder.cast(total, FLOAT, lanes)
                mean = builder.fenced(total * builder.splat(share, lanes), lanes)
                place = Place(at, pixel.flat + at, lanes)
                out.store(run_epilogue(mean, FLOAT, self.epilogue, operands, place), place.flat, lanes)

            builder.for_each(c, self.lanes, pool)


def _span(index: Expr, extent: int, count: int) -> tuple[Expr, Expr]:
    """(first, how many) of the elements that output `index` is over."""
    first = T.Bind(tirx.floordiv(index * extent, count))
    return first, T.Bind(tirx.floordiv((index + 1) * extent + (count - 1), count) - first)
