"""Bilinear and bicubic resizing of 8-bit channels-last images: vectors of channels, parallel over output rows.

`quantize.resampling` says what each element is; where rows and columns lie is computed there, when compiling. The
columns of an output row are summed first, once for all outputs that read them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvmq import ops
from tvmq.kernels import builder
from tvmq.kernels.builder import FLOAT, Expr
from tvmq.kernels.pixels import pixel_at
from tvmq.kernels.vector_epilogue import Place, run_epilogue
from tvmq.kernels.vector_math import VectorMath


@dataclass(frozen=True)
class Resize:
    """Shapes are NHWC. Sums of neighbours less the zero point, `taps` along each axis, then the epilogue.

    Two taps have one weight, the share of the second; four have one each.
    """

    x_shape: tuple[int, int, int, int]
    dtype: str
    out_shape: tuple[int, int, int, int]
    out_dtype: str
    zero_point: int
    epilogue: ops.Epilogue
    taps: int
    lanes: int

    def function(self) -> Any:
        """The PrimFunc: (x, neighbours and weights of rows, of columns, out); see `resampling`."""
        return builder.function(self._emit)

    def _emit(self, f: builder.Function) -> None:
        n, oh, ow, c = self.out_shape
        _, h, w, _ = self.x_shape
        weights, read = 1 if self.taps == 2 else self.taps, (ops.Dequantize(1.0, self.zero_point),)
        tables = [((size, k), kind) for size in (oh, ow) for k, kind in ((self.taps, "int32"), (weights, FLOAT))]
        x, rows, down, columns, across, out = f.arguments(
            (self.x_shape, self.dtype), *tables, (self.out_shape, self.out_dtype)
        )

        def of(table: builder.Flat, index: Expr, count: int) -> list[Expr]:
            return [T.Bind(table.load(index * count + i)) for i in range(count)]

        with builder.parallel(n * oh) as row:
            column = f.scratch(w * c, FLOAT)
            pixel = pixel_at(self.out_shape, row, tirx.const(0, "int32"))
            lines = [T.Bind((pixel.image * h + line) * (w * c)) for line in of(rows, pixel.y, self.taps)]
            shares = of(down, pixel.y, weights)

            def down_columns(at: Expr, lanes: int) -> None:
                def element(where: Expr) -> Expr:
                    return T.Bind(run_epilogue(x.load(where, lanes), self.dtype, read, (), Place(at, where, lanes)))

                column.store(_weighed([element(line + at) for line in lines], shares, lanes), at, lanes)

            builder.for_each(w * c, self.lanes, down_columns)
            with builder.serial(ow) as place:
                starts = [T.Bind(neighbour * c) for neighbour in of(columns, place, self.taps)]
                parts = of(across, place, weights)

                def along(at: Expr, lanes: int) -> None:
                    flat = (row * ow + place) * c + at
                    total = _weighed([T.Bind(column.load(start + at, lanes)) for start in starts], parts, lanes)
                    out.store(run_epilogue(total, FLOAT, self.epilogue, (), Place(at, flat, lanes)), flat, lanes)

                builder.for_each(c, self.lanes, along)


def _weighed(taps: Sequence[Expr], weights: Sequence[Expr], lanes: int) -> Expr:
    """The sum of taps by their weights, from the first on; of two, what lies between them."""
    m, (first, *others) = VectorMath(lanes), taps
    weight, *rest = (builder.splat(weight, lanes) for weight in weights)
    if not rest:
        return m.fma(m.sub(others[0], first), weight, first)
    total = m.mul(first, weight)
    for tap, weight in zip(others, rest, strict=True):
        total = m.fma(tap, weight, total)
    return total
