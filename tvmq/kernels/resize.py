"""Bilinear resizing of 8-bit channels-last images: vectors of channels, parallel over output rows.

`quantize.resampling` says what each element is; where rows and columns lie is computed there, when compiling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.tirx.script.builder import ir as T

from tvmq.kernels import builder
from tvmq.kernels.builder import FLOAT, Expr
from tvmq.kernels.pixels import each_pixel
from tvmq.kernels.vector_math import VectorMath


@dataclass(frozen=True)
class Resize:
    """Shapes are NHWC."""

    x_shape: tuple[int, int, int, int]
    dtype: str
    out_shape: tuple[int, int, int, int]
    lanes: int

    def function(self) -> Any:
        """The PrimFunc: (x, neighbours and shares of rows, of columns, out); see `resampling.places`."""
        return builder.function(self._emit)

    def _emit(self, f: builder.Function) -> None:
        _, oh, ow, c = self.out_shape
        _, h, w, _ = self.x_shape
        tables = [((size, 2), "int32") if pairs else ((size,), FLOAT) for size in (oh, ow) for pairs in (True, False)]
        x, rows, down, columns, across, out = f.arguments(
            (self.x_shape, self.dtype), *tables, (self.out_shape, self.dtype)
        )
        with each_pixel(self.out_shape) as pixel:
            lines = [T.Bind((pixel.image * h + rows.load(pixel.y * 2 + side)) * w) for side in (0, 1)]
            places = [T.Bind(columns.load(pixel.column * 2 + side)) for side in (0, 1)]
            share_down, share_across = T.Bind(down.load(pixel.y)), T.Bind(across.load(pixel.column))

            def move(at: Expr, lanes: int) -> None:
                m = VectorMath(lanes)

                def lerp(a: Expr, b: Expr, share: Expr) -> Expr:
                    return m.fma(m.sub(b, a), builder.splat(share, lanes), a)

                def element(line: Expr, place: Expr) -> Expr:
                    return T.Bind(builder.cast(x.load((line + place) * c + at, lanes), FLOAT, lanes))

                top, bottom = (lerp(element(line, places[0]), element(line, places[1]), share_across) for line in lines)
                whole = builder.cast(m.rint(lerp(top, bottom, share_down)), "int32", lanes)
                out.store(builder.cast(whole, self.dtype, lanes), pixel.flat + at, lanes)

            builder.for_each(c, self.lanes, move)
