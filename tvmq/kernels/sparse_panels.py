"""Sparse products: the matrix template, over the places where a panel of output channels is not zero.

    for each entry of the panel: acc[pixel] += x[pixel + place] * values[entry]

The register tile, the epilogue and the geometry are those of `gemm.Gemm`; a place is an offset into the input, so that
a block of a weight may be anywhere in a convolution's taps. A panel is one or a few vectors of output channels:
patterns of 16 x 1 blocks and the like (with four int8 to a word, 16 x 4) cost no more than their density.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvmq.kernels import builder, gemm
from tvmq.kernels.builder import Expr, Flat
from tvmq.kernels.micro import Micro
from tvmq.kernels.register_tile import RegisterTile
from tvmq.kernels.sparse_stream import Layout


@dataclass(frozen=True)
class SparsePanels:
    """A `gemm.Gemm` whose weights are a stream: the places are offsets of elements of x."""

    gemm: gemm.Gemm
    layout: Layout

    def function(self) -> Any:
        """The PrimFunc: (x, stream, epilogue tensors..., out)."""
        return builder.function(_Emitter(self).emit)


class _Emitter(gemm.Emitter):
    def __init__(self, kernel: SparsePanels) -> None:
        super().__init__(kernel.gemm)
        self.layout = kernel.layout

    def weights(self) -> tuple[tuple[int], str]:
        return (self.layout.words,), "int32"

    def tasks(self, bands: int, run: Callable[[Expr, Expr], None]) -> None:
        """Parallel over (part of the panels, block of bands)."""
        per_task = self.k.blocking.rows_per_task
        blocks = -(-bands // per_task)
        with builder.parallel(blocks * self.layout.parts) as task:
            part, block = tirx.floordiv(task, blocks), tirx.floormod(task, blocks)
            first = T.Bind(self.w.load(part))
            count = per_task
            if bands % per_task:
                count = tirx.min(tirx.const(per_task, "int32"), bands - block * per_task)
            with builder.span(first, self.w.load(part + 1) - first) as panel, builder.serial(count) as turn:
                run(panel, block * per_task + turn)

    def products(
        self, panel: Expr, _column: Expr, base: Expr, pixels: Sequence[tuple[int, int]], tile: RegisterTile
    ) -> None:
        m, lanes, layout = self.m, self.m.lanes, self.layout
        first = T.Bind(self.w.load(layout.starts + panel))
        with builder.span(first, self.w.load(layout.starts + panel + 1) - first) as entry:
            place = T.Bind(base + self.w.load(layout.places + entry))
            values = layout.values + entry * self.nr
            for i, v, slot in tile.slots():
                y, x = pixels[i]
                factor = splat_word(m, self.x, place + (y * self.g.sy + x * self.g.sx))
                weights = T.reinterpret(m.product.dtype, self.w.load(values + v * lanes, lanes))
                tile.acc.store(m.product.emit(tile.load(slot), factor, weights), slot, lanes)


def splat_word(m: Micro, x: Flat, i: Expr) -> Expr:
    """The word of x that begins at element `i` in every lane, as the product takes it."""
    kr = m.product.kr
    if kr == 1:
        value = x.load(i)
        return builder.splat(value if m.acc_dtype == builder.FLOAT else builder.cast(value, "int32", 1), m.lanes)
    word = T.reinterpret("int32", x.bits(i, kr))
    return T.reinterpret(m.product.dtype, builder.splat(word, m.lanes))
