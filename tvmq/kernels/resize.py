"""Bilinear resizing of 8-bit channels-last images: vectors of channels, parallel over output rows.

`quantize.resampling` says what each element is; where rows and columns lie is computed there, when compiling.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvmq.kernels import builder
from tvmq.kernels.builder import FLOAT, Expr
from tvmq.kernels.pad import for_each
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
        n, oh, ow, c = self.out_shape
        _, h, w, _ = self.x_shape
        tables = [((size, 2), "int32") if pairs else ((size,), FLOAT) for size in (oh, ow) for pairs in (True, False)]
        x, rows, down, columns, across, out = f.arguments(
            (self.x_shape, self.dtype), *tables, (self.out_shape, self.dtype)
        )
        with builder.parallel(n * oh) as row, builder.serial(ow) as column:
            image, y = tirx.floordiv(row, oh), tirx.floormod(row, oh)
            lines = [T.Bind((image * h + rows.load(y * 2 + side)) * w) for side in (0, 1)]
            pixels = [T.Bind(columns.load(column * 2 + side)) for side in (0, 1)]
            share_down, share_across = T.Bind(down.load(y)), T.Bind(across.load(column))

            def move(at: Expr, lanes: int) -> None:
                m = VectorMath(lanes)

                def lerp(a: Expr, b: Expr, share: Expr) -> Expr:
                    return m.fma(m.sub(b, a), builder.splat(share, lanes), a)

                def element(line: Expr, pixel: Expr) -> Expr:
                    return T.Bind(builder.cast(x.load((line + pixel) * c + at, lanes), FLOAT, lanes))

                top, bottom = (lerp(element(line, pixels[0]), element(line, pixels[1]), share_across) for line in lines)
                whole = builder.cast(m.rint(lerp(top, bottom, share_down)), "int32", lanes)
                out.store(builder.cast(whole, self.dtype, lanes), (row * ow + column) * c + at, lanes)

            for_each(c, self.lanes, move)
