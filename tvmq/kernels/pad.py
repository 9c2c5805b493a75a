"""Padding of channels-last images, which also converts: 8-bit integers where a micro-kernel wants int16, floats.

    out[n, y, x, c] = x[n, y - top, x - left, c] inside, `value` outside
    widened: out = int16(x) - value inside, 0 outside

A row of pixels is copied as one run. Convolutions read a padded image, so that their kernels know no borders.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx

from tvmq.kernels import builder
from tvmq.kernels.builder import Expr, Flat

# Elements that one vector copy moves: 64 bytes of 8-bit, which LLVM splits for narrower machines.
_LANES = {"uint8": 64, "int8": 64, "int16": 32, "bfloat16": 32, "float16": 32, "float32": 16}


@dataclass(frozen=True)
class Pad:
    """Pads (top, left, bottom, right) pixels, and appends channels up to `channels`, to an NHWC image."""

    x_shape: tuple[int, int, int, int]
    x_dtype: str
    padding: tuple[int, int, int, int]
    channels: int
    value: float
    out_dtype: str

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """The padded shape."""
        n, h, w, _ = self.x_shape
        top, left, bottom, right = self.padding
        return n, h + top + bottom, w + left + right, self.channels

    @property
    def copies(self) -> bool:
        """Whether it does anything at all."""
        return self.out_shape != self.x_shape or self.out_dtype != self.x_dtype

    def function(self) -> Any:
        """The PrimFunc: (x, out)."""
        return builder.function(self._emit)

    def _emit(self, f: builder.Function) -> None:
        x, out = f.arguments((self.x_shape, self.x_dtype), (self.out_shape, self.out_dtype))
        _, h, w, c = self.x_shape
        channels = self.channels

        def copy(image: Expr, y: Expr, target: Expr) -> None:
            source = (image * h + y) * (w * c)
            if c == channels:
                self._copy(x, source, out, target, w * c)
                return
            with builder.serial(w) as pixel:
                self._copy(x, source + pixel * c, out, target + pixel * channels, c)
                fill(out, target + pixel * channels + c, channels - c, self.value)

        self.each_row(out, copy)

    def each_row(self, out: Flat, copy: Callable[[Expr, Expr, Expr], None]) -> None:
        """Store `out`, its rows in parallel: `copy(image, y, target)` stores row y of an image, the rest is `value`."""
        _, h, w, _ = self.x_shape
        n, height, width, channels = self.out_shape
        top, left, _, right = self.padding
        with builder.parallel(n * height) as row:
            image, y = tirx.floordiv(row, height), tirx.floormod(row, height) - top
            inside = tirx.And(y >= 0, y < h)
            start = row * (width * channels)
            with builder.when(inside):
                fill(out, start, left * channels, self.value)
                copy(image, y, start + left * channels)
                fill(out, start + (left + w) * channels, right * channels, self.value)
            with builder.when(tirx.Not(inside)):
                fill(out, start, width * channels, self.value)

    def _copy(self, x: Flat, source: Expr, out: Flat, target: Expr, count: int) -> None:
        def move(at: Expr, lanes: int) -> None:
            if x.dtype == out.dtype:
                out.store_bits(x.bits(source + at, lanes), target + at, lanes)
                return
            out.store(converted(x.load(source + at, lanes), x.dtype, out, self.value, lanes), target + at, lanes)

        builder.for_each(count, _LANES[self.out_dtype], move)


def fill(out: Flat, start: Expr, count: int, value: float) -> None:
    """Store `count` times what `value` is in `out`."""
    stored = 0 if out.dtype == "int16" else value
    builder.for_each(
        count, _LANES[out.dtype], lambda at, n: out.store(builder.number(stored, out.value_dtype, n), start + at, n)
    )


def converted(value: Expr, dtype: str, out: Flat, zero: float, lanes: int) -> Expr:
    """`value` of `dtype` as `out` holds it: less `zero` where 8-bit integers become int16."""
    if out.dtype == "int16" and dtype != "int16":
        return builder.cast(value, "int16", lanes) - builder.number(zero, "int16", lanes)
    return value
