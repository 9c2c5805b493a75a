"""Depthwise convolution: vectors of channels, a few pixels of a row at a time, so that loaded pixels are reused.

Weights are packed as [channel block, kh * kw, lanes]. The input is padded already. 8-bit products are exact in int32;
bfloat16 is multiplied and added as float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from tvm import tirx

from tvmq import ops
from tvmq.kernels import builder, inline_llvm
from tvmq.kernels.builder import FLOATS, Expr
from tvmq.kernels.vector_epilogue import Place, run_epilogue

Array = npt.NDArray[Any]
Inside = tuple[bool, ...]


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


T = TypeVar("T")


def runs(items: Sequence[T]) -> list[tuple[int, int, T]]:
    """(start, stop, item) of each run of equal items."""
    found: list[tuple[int, int, T]] = []
    for index, item in enumerate(items):
        if found and found[-1][2] == item:
            found[-1] = (found[-1][0], index + 1, item)
        else:
            found.append((index, index + 1, item))
    return found


@dataclass(frozen=True)
class Depthwise:
    """Everything that decides the code of one depthwise kernel; shapes are NHWC.

    padding: rows above and columns to the left of the image; like those below and to the right, they hold `zero_point`.
    columns: output pixels of a row in one step; the last step may have fewer. A row of a block of channels is a task;
    blocks_first: whether those that follow each other are of one block, else of one row.
    """

    x_shape: tuple[int, int, int, int]
    x_dtype: str
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int]
    zero_point: int
    out_shape: tuple[int, int, int, int]
    out_dtype: str
    epilogue: ops.Epilogue
    operands: tuple[tuple[tuple[int, ...], str], ...]
    lanes: int
    columns: int
    blocks_first: bool
    rounding: str = ""  # what `inline_llvm.rounded_by` needs
    # `Micro.narrow`, for integers whose lanes are a multiple of 8.
    narrow: Callable[[Expr, ops.Quantize, int], Expr] | None = field(default=None, kw_only=True)

    @property
    def acc_dtype(self) -> str:
        """int32 for integers."""
        return "float32" if self.x_dtype in FLOATS else "int32"

    @property
    def code_size(self) -> int:
        """How many taps are written out: those of a piece, for each kind of row and of piece."""
        rows = runs([self._taps_inside(0, y) for y in range(self.out_shape[1])])
        return len(rows) * len(runs(self._pieces())) * self.kernel[0] * self.kernel[1]

    def function(self) -> Any:
        """The PrimFunc: (x, packed weights, epilogue tensors..., out)."""
        return builder.function(self._emit)

    def _emit(self, f: builder.Function) -> None:
        n, oh, _, c = self.out_shape
        blocks = -(-c // self.lanes)
        taps = self.kernel[0] * self.kernel[1]
        w_dtype = self.x_dtype if self.x_dtype in FLOATS else "int8"
        x, w, *operands, out = f.arguments(
            (self.x_shape, self.x_dtype),
            ((blocks * taps * self.lanes,), w_dtype),
            *self.operands,
            (self.out_shape, self.out_dtype),
        )
        out = inline_llvm.rounded_by(out, self.rounding)
        if out.rounding:
            f.import_llvm(self.rounding)
        rest = c % self.lanes
        with self.tasks(n * oh, blocks) as (row, block):
            image, y = tirx.floordiv(row, oh), tirx.floormod(row, oh)
            for start, stop, inside in runs([self._taps_inside(0, i) for i in range(oh)]):
                with builder.when(tirx.all(y >= start, y < stop)):

                    def width(
                        lanes: int, inside: Inside = inside, image: Expr = image, y: Expr = y, block: Expr = block
                    ) -> None:
                        def piece(column: Expr, taps: tuple[Inside, ...]) -> None:
                            self._piece(f, x, w, operands, out, (image, y, block), column, (inside, taps), lanes)

                        self._row(piece)

                    if c >= self.lanes:
                        with builder.when(block < c // self.lanes):
                            width(self.lanes)
                    if rest:
                        with builder.when(tirx.EQ(block, tirx.const(c // self.lanes, "int32"))):
                            width(rest)

    @contextlib.contextmanager
    def tasks(self, rows: int, blocks: int) -> Iterator[tuple[Expr, Expr]]:
        """(row, block of channels), over all of both, in parallel."""
        with builder.parallel(rows * blocks) as index:
            inner = rows if self.blocks_first else blocks
            outer, inside = tirx.floordiv(index, inner), tirx.floormod(index, inner)
            yield (inside, outer) if self.blocks_first else (outer, inside)

    def _taps_inside(self, axis: int, position: int) -> Inside:
        """Which taps of an output row (axis 0) or column (axis 1) lie in the image."""
        first = position * self.strides[axis] - self.padding[axis]
        extent = self.x_shape[1 + axis]
        return tuple(0 <= first + tap * self.dilation[axis] < extent for tap in range(self.kernel[axis]))

    def _pieces(self) -> list[tuple[Inside, ...]]:
        """Which taps of its pixels' columns lie in the image, for each piece of a row."""
        width = self.out_shape[2]
        inside = [self._taps_inside(1, column) for column in range(width)]
        return [tuple(inside[start : start + self.columns]) for start in range(0, width, self.columns)]

    def _row(self, piece: Callable[[Expr, tuple[Inside, ...]], None]) -> None:
        """All pieces of a row: a loop over equal ones."""
        for start, stop, taps in runs(self._pieces()):
            if stop - start == 1:
                piece(tirx.const(start * self.columns, "int32"), taps)
                continue
            with builder.serial(stop - start) as index:
                piece((start + index) * self.columns, taps)

    def _piece(
        self,
        f: builder.Function,
        x: builder.Flat,
        w: builder.Flat,
        operands: Sequence[builder.Flat],
        out: builder.Flat,
        place: tuple[Expr, Expr, Expr],
        column: Expr,
        inside: tuple[Inside, tuple[Inside, ...]],
        lanes: int,
    ) -> None:
        """Output pixels of one row from `column` on, `lanes` channels.

        inside: which rows of taps, and for each pixel which columns of taps, lie in the image.
        """
        image, y, block = place
        _, height, width, c = self.x_shape
        rows, across = inside
        columns = len(across)
        _, oh, ow, _ = self.out_shape
        kh, kw = self.kernel
        acc = f.registers(columns * lanes, self.acc_dtype)
        bias = bool(self.epilogue) and isinstance(self.epilogue[0], ops.Bias)
        for i in range(columns):
            start = operands[0].load(block * self.lanes, lanes) if bias else builder.number(0, self.acc_dtype, lanes)
            acc.store(start, i * lanes, lanes)
        top, left = y * self.strides[0] - self.padding[0], column * self.strides[1] - self.padding[1]
        base = ((image * height + top) * width + left) * c + block * self.lanes
        for ky in range(kh):
            for kx in range(kw):
                weight = self._wide(w.load((block * (kh * kw) + ky * kw + kx) * self.lanes, lanes), lanes)
                for i in range(columns):
                    exists = rows[ky] and across[i][kx]
                    if not exists and self.zero_point == 0:
                        continue
                    offset = (ky * self.dilation[0] * width + i * self.strides[1] + kx * self.dilation[1]) * c
                    value = builder.number(self.zero_point, self.acc_dtype, lanes)
                    if exists:
                        value = self._wide(x.load(base + offset, lanes), lanes)
                    acc.store(acc.load(i * lanes, lanes) + value * weight, i * lanes, lanes)
        for i in range(columns):
            flat = ((image * oh + y) * ow + column + i) * c + block * self.lanes
            at = Place(block * self.lanes, flat, lanes, None, self.narrow if lanes % 8 == 0 else None)
            steps, rest = (self.epilogue[1:], operands[1:]) if bias else (self.epilogue, operands)
            out.store(run_epilogue(acc.load(i * lanes, lanes), self.acc_dtype, steps, rest, at), flat, lanes)

    def _wide(self, value: Expr, lanes: int) -> Expr:
        # By way of int16: instructions that multiply into int32 take that.
        return value if self.x_dtype in FLOATS else builder.cast(builder.cast(value, "int16", lanes), "int32", lanes)
