"""Max and average pooling of channels-last images: vectors of channels, parallel over output rows or channel blocks.

The input is padded already (with the lowest value for max, with the zero point for average).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvmq import ops
from tvmq.kernels import builder
from tvmq.kernels.builder import FLOATS, Expr, Flat
from tvmq.kernels.pixels import Pixel, pixel_at
from tvmq.kernels.vector_epilogue import Place, run_epilogue
from tvmq.quantize import anchors, numerics

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Pool:
    """Everything that decides the code of one pooling kernel; shapes are NHWC, `x_shape` padded.

    kind: "max", or "avg": the sum of x - zero_point, times the reciprocals of the counts (a tensor operand over the
    output's pixels), then the epilogue. read: steps for each element of float x first.
    """

    kind: str
    x_shape: tuple[int, int, int, int]
    dtype: str
    window: tuple[int, int]
    strides: tuple[int, int]
    dilation: tuple[int, int]
    out_shape: tuple[int, int, int, int]
    out_dtype: str
    epilogue: ops.Epilogue
    operands: tuple[tuple[tuple[int, ...], str], ...]
    zero_point: int
    lanes: int
    read: ops.Epilogue = ()

    def function(self) -> Any:
        """The PrimFunc: (x, [reciprocals,] epilogue tensors..., out)."""
        return builder.function(self._emit)

    def _emit(self, f: builder.Function) -> None:
        n, oh, ow, c = self.out_shape
        pixels = [((oh * ow,), "float32")] if self.kind == "avg" else []
        x, *middle, out = f.arguments(
            (self.x_shape, self.dtype), *pixels, *self.operands, (self.out_shape, self.out_dtype)
        )
        blocks = -(-c // self.lanes)
        rows_first = n * oh > 1
        rest = c % self.lanes
        with (
            builder.parallel(n * oh if rows_first else blocks) as outer,
            builder.serial(blocks if rows_first else 1) as inner,
            builder.serial(ow) as column,
        ):
            row, block = (outer, inner) if rows_first else (inner, outer)
            pixel = pixel_at(self.out_shape, row, column)
            if c >= self.lanes:
                with builder.when(block < c // self.lanes):
                    self._pixel(f, x, middle, out, pixel, block, self.lanes)
            if rest:
                with builder.when(tirx.EQ(block, tirx.const(c // self.lanes, "int32"))):
                    self._pixel(f, x, middle, out, pixel, block, rest)

    def _pixel(
        self,
        f: builder.Function,
        x: Flat,
        middle: Sequence[Flat],
        out: Flat,
        pixel: Pixel,
        block: Expr,
        lanes: int,
    ) -> None:
        _, hp, wp, c = self.x_shape
        wide = self._sum_dtype(x)
        acc = f.registers(lanes, wide)
        acc.store(builder.number(self._initial(), wide, lanes), 0, lanes)
        base = (
            (pixel.image * hp + pixel.y * self.strides[0]) * wp + pixel.column * self.strides[1]
        ) * c + block * self.lanes
        with builder.serial(self.window[0]) as ky, builder.serial(self.window[1]) as kx:
            value = x.load(base + (ky * self.dilation[0] * wp + kx * self.dilation[1]) * c, lanes)
            if self.kind == "max":
                acc.store(T.max(acc.load(0, lanes), value), 0, lanes)
            else:
                value = run_epilogue(value, x.value_dtype, self.read, (), Place(base, base, lanes))
                value = value if self.dtype in FLOATS else builder.cast(value, wide, lanes)
                acc.store(acc.load(0, lanes) + value, 0, lanes)
        flat = pixel.flat + block * self.lanes
        result = acc.load(0, lanes)
        if self.kind == "avg":
            count = middle[0].load(pixel.index)
            result = self._float(result, lanes) * builder.splat(count, lanes)
            place = Place(block * self.lanes, flat, lanes)
            result = run_epilogue(result, "float32", self.epilogue, middle[1:], place)
        out.store(result, flat, lanes)

    def _sum_dtype(self, x: Flat) -> str:
        return x.value_dtype if self.kind == "max" or self.dtype in FLOATS else "int32"

    def _initial(self) -> float:
        """The lowest value for max; minus all zero points for a sum of integers."""
        if self.kind == "max":
            return lowest(self.dtype)
        return float(-self.zero_point * self.window[0] * self.window[1])

    def _float(self, value: Expr, lanes: int) -> Expr:
        return value if self.dtype in FLOATS else builder.cast(value, "float32", lanes)


def lowest(dtype: str) -> float:
    """What no element of `dtype` is below."""
    return -math.inf if dtype in FLOATS else float(np.iinfo(dtype).min)


def reciprocal_counts(
    image: tuple[int, int],
    window: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[int],
    count_include_pad: bool,
) -> Array:
    """float32(1 / count) of each output pixel, flat: how many elements its average is over."""
    ones = np.ones((1, *image, 1))
    geometry = {"strides": strides, "padding": padding, "dilation": (1, 1)}
    windows = anchors.windows(ones, window, pad_value=1.0 if count_include_pad else 0.0, **geometry)
    return np.asarray(numerics.reciprocal(windows.sum(axis=(3, 4)))).ravel()
