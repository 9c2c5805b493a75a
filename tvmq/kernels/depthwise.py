"""Depthwise convolution: vectors of channels, a few pixels of a row at a time, so that loaded pixels are reused.

Weights are packed as [channel block, kh * kw, lanes]. The input is padded already. 8-bit products are exact in int32;
bfloat16 is multiplied and added as float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx

from tvmq import ops
from tvmq.kernels import builder
from tvmq.kernels.builder import FLOATS, Expr, Place

Array = npt.NDArray[Any]


def pack(weight: Array, lanes: int) -> Array:
    """[C, kh, kw, 1] weights as [C / lanes * kh * kw * lanes], flat, zero-padded."""
    c, kh, kw, _ = weight.shape
    blocks = -(-c // lanes)
    full = np.zeros((blocks * lanes, kh * kw), weight.dtype)
    full[:c] = weight.reshape(c, kh * kw)
    return np.ascontiguousarray(full.reshape(blocks, lanes, kh * kw).transpose(0, 2, 1)).ravel()


def unpack(packed: Array, shape: tuple[int, ...], lanes: int) -> Array:
    """The inverse of `pack`: [C, kh, kw, 1] weights of `shape`."""
    c, kh, kw, _ = shape
    full = packed.reshape(-1, kh * kw, lanes).transpose(0, 2, 1).reshape(-1, kh * kw)
    return np.ascontiguousarray(full[:c]).reshape(shape)


@dataclass(frozen=True)
class Depthwise:
    """Everything that decides the code of one depthwise kernel; shapes are NHWC, `x_shape` padded."""

    x_shape: tuple[int, int, int, int]
    x_dtype: str
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilation: tuple[int, int]
    out_shape: tuple[int, int, int, int]
    out_dtype: str
    epilogue: ops.Epilogue
    operands: tuple[tuple[tuple[int, ...], str], ...]
    lanes: int
    registers: int

    @property
    def acc_dtype(self) -> str:
        """int32 for integers."""
        return "float32" if self.x_dtype in FLOATS else "int32"

    @property
    def columns(self) -> int:
        """Output pixels of a row in one step: accumulators take half of the registers, and pieces are equal."""
        width = self.out_shape[2]
        most = max(1, min(width, self.registers // 2, 8))
        pieces = -(-width // most)
        return -(-width // pieces)

    def function(self) -> Any:
        """The PrimFunc: (x, packed weights, epilogue tensors..., out)."""
        return builder.function(self._emit)

    def _emit(self, f: builder.Function) -> None:
        n, oh, ow, c = self.out_shape
        blocks = -(-c // self.lanes)
        taps = self.kernel[0] * self.kernel[1]
        w_dtype = self.x_dtype if self.x_dtype in FLOATS else "int8"
        x, w, *operands, out = f.arguments(
            (self.x_shape, self.x_dtype),
            ((blocks * taps * self.lanes,), w_dtype),
            *self.operands,
            (self.out_shape, self.out_dtype),
        )
        with builder.parallel(n * oh) as row, builder.serial(blocks) as block:
            image, y = tirx.floordiv(row, oh), tirx.floormod(row, oh)

            def piece(
                column: Expr, columns: int, lanes: int, image: Expr = image, y: Expr = y, block: Expr = block
            ) -> None:
                self._piece(f, x, w, operands, out, (image, y, block), column, columns, lanes)

            def width(lanes: int) -> None:
                full = ow // self.columns
                with builder.serial(full) as column:
                    piece(column * self.columns, self.columns, lanes)
                if ow % self.columns:
                    piece(tirx.const(full * self.columns, "int32"), ow % self.columns, lanes)

            rest = c % self.lanes
            if c >= self.lanes:
                with builder.when(block < c // self.lanes):
                    width(self.lanes)
            if rest:
                with builder.when(tirx.EQ(block, tirx.const(c // self.lanes, "int32"))):
                    width(rest)

    def _piece(
        self,
        f: builder.Function,
        x: builder.Flat,
        w: builder.Flat,
        operands: Sequence[builder.Flat],
        out: builder.Flat,
        place: tuple[Expr, Expr, Expr],
        column: Expr,
        columns: int,
        lanes: int,
    ) -> None:
        """`columns` output pixels of one row, `lanes` channels."""
        image, y, block = place
        _, hp, wp, c = self.x_shape
        _, oh, ow, _ = self.out_shape
        kh, kw = self.kernel
        acc = f.registers(columns * lanes, self.acc_dtype)
        bias = bool(self.epilogue) and isinstance(self.epilogue[0], ops.Bias)
        for i in range(columns):
            start = operands[0].load(block * self.lanes, lanes) if bias else builder.number(0, self.acc_dtype, lanes)
            acc.store(start, i * lanes, lanes)
        base = ((image * hp + y * self.strides[0]) * wp + column * self.strides[1]) * c + block * self.lanes
        for ky in range(kh):
            for kx in range(kw):
                weight = self._wide(w.load((block * (kh * kw) + ky * kw + kx) * self.lanes, lanes), lanes)
                for i in range(columns):
                    offset = (ky * self.dilation[0] * wp + i * self.strides[1] + kx * self.dilation[1]) * c
                    value = self._wide(x.load(base + offset, lanes), lanes)
                    acc.store(acc.load(i * lanes, lanes) + value * weight, i * lanes, lanes)
        for i in range(columns):
            flat = ((image * oh + y) * ow + column + i) * c + block * self.lanes
            at = Place(block * self.lanes, flat, lanes)
            steps, rest = (self.epilogue[1:], operands[1:]) if bias else (self.epilogue, operands)
            out.store(builder.run_epilogue(acc.load(i * lanes, lanes), self.acc_dtype, steps, rest, at), flat, lanes)

    def _wide(self, value: Expr, lanes: int) -> Expr:
        return value if self.x_dtype in FLOATS else builder.cast(value, "int32", lanes)
