"""A program's channels-first image as its first convolution wants it: channels-last, converted and padded at once.

    out[n, y, x, c] = steps(x[n, c, y - top, x - left]) inside, `value` outside

A vector of each channel is loaded; what is stored are vectors of their elements in turns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvmq import ops
from tvmq.kernels import builder, inline_llvm
from tvmq.kernels.builder import Expr, Flat
from tvmq.kernels.pad import Pad, converted
from tvmq.kernels.vector_epilogue import Place, run_epilogue

# Images with more channels are transposed on their own: one vector a channel is held in registers.
MOST_CHANNELS = 8


@dataclass(frozen=True)
class Entry:
    """Transposes an NCHW image, runs `steps` (without tensor operands), and pads what they give as `pad` says."""

    x_dtype: str
    steps: ops.Epilogue
    pad: Pad
    lanes: int
    rounding: str  # what `inline_llvm.rounded_by` needs
    # `Micro.narrow`, where vectors of pixels are quantized channel by channel; lanes are a multiple of 8 then.
    narrow: Callable[[Expr, ops.Quantize, int], Expr] | None = None

    @property
    def x_shape(self) -> tuple[int, int, int, int]:
        """NCHW."""
        n, h, w, c = self.pad.x_shape
        return n, c, h, w

    def function(self) -> Any:
        """The PrimFunc: (x, out)."""
        return builder.function(self._emit)

    def _emit(self, f: builder.Function) -> None:
        x, out = f.arguments((self.x_shape, self.x_dtype), (self.pad.out_shape, self.pad.out_dtype))
        out = inline_llvm.rounded_by(out, self.rounding)
        if out.rounding:
            f.import_llvm(self.rounding)
        _, c, h, w = self.x_shape

        def copy(image: Expr, y: Expr, target: Expr) -> None:
            source = (image * (c * h) + y) * w
            builder.for_each(w, self.lanes, lambda at, n: self._pixels(x, source + at, out, target + at * c, n))

        self.pad.each_row(out, copy)

    def _pixels(self, x: Flat, source: Expr, out: Flat, target: Expr, count: int) -> None:
        """`count` pixels of a row: the elements of c vectors in turns are c vectors again."""
        _, c, h, w = self.x_shape
        loaded = [T.Bind(x.load(source + channel * (h * w), count)) for channel in range(c)]
        if self.narrow is not None and count % 8 == 0:
            place = Place(tirx.const(0, "int32"), target, count, None, self.narrow)
            planes = [T.Bind(run_epilogue(plane, x.value_dtype, self.steps, (), place)) for plane in loaded]
            order = [channel * count + pixel for pixel in range(count) for channel in range(c)]
            out.store_bits(_shuffle(planes, order, c * count), target, c * count)
            return
        for part in range(c):
            turns = [divmod(part * count + i, c) for i in range(count)]
            value = _shuffle(loaded, [channel * count + pixel for pixel, channel in turns], count)
            flat = target + part * count
            place = Place(tirx.const(0, "int32"), flat, count)
            value = run_epilogue(value, x.value_dtype, self.steps, (), place)
            out.store(converted(value, self.pad.x_dtype, out, self.pad.value, count), flat, count)


def _shuffle(vectors: list[Expr], indices: list[int], lanes: int) -> Expr:
    """Elements of the concatenated vectors, by index."""
    if lanes == 1:
        return vectors[indices[0]]
    return vectors[0] if len(vectors) == 1 else tirx.Shuffle(vectors, [tirx.const(i, "int32") for i in indices])
