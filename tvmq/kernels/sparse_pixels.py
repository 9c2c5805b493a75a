"""Sparse products whose lanes are pixels: a weight is in all lanes, so that zeros may lie anywhere.

    x [pixels, words]  ->  columns [words, pixels of a task]      squares transposed in registers
    for each entry of `rows` output channels: acc[row, pixels] += columns[place, pixels] * values[entry, row]
    acc [channels of a vector, pixels]  ->  out [pixels, channels]      transposed back, and the epilogue

For products with one tap at stride 1: linear layers and 1x1 convolutions. What the transposes take does not depend on
the zeros; `sparse_pixel_blocking` weighs it against panels of whole vectors (`sparse_panels`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvmq import ops
from tvmq.kernels import builder, inline_llvm
from tvmq.kernels.builder import FLOAT, Expr, Flat
from tvmq.kernels.geometry import Geometry
from tvmq.kernels.micro import Micro
from tvmq.kernels.results import Results
from tvmq.kernels.shuffles import transposed, zip_llvm
from tvmq.kernels.sparse_stream import Layout
from tvmq.kernels.vector_epilogue import Place


@dataclass(frozen=True)
class SparsePixels:
    """Everything that decides the code of one kernel; places are indices into the columns of a task.

    vectors: of pixels in a task. parts: of the output channels, for cores that pixels alone do not fill. rounding: what
    `inline_llvm.rounded_by` needs, or "".
    """

    geometry: Geometry
    micro: Micro
    layout: Layout
    vectors: int
    parts: int
    rounding: str
    epilogue: ops.Epilogue
    x_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    out_dtype: str
    operands: tuple[tuple[tuple[int, ...], str], ...]

    def function(self) -> Any:
        """The PrimFunc: (x, stream, epilogue tensors..., out)."""
        return builder.function(_Emitter(self).emit)


class _Emitter:
    def __init__(self, kernel: SparsePixels) -> None:
        self.k, self.g, self.m, self.layout = kernel, kernel.geometry, kernel.micro, kernel.layout
        self.lanes = self.m.lanes
        self.pixels = kernel.vectors * self.lanes
        self.words = -(-self.g.length // self.m.product.kr)
        self.groups = -(-self.g.channels // self.lanes)

    def emit(self, f: builder.Function) -> None:
        k, lanes = self.k, self.lanes
        x, self.w, *self.operands, out = f.arguments(
            (k.x_shape, self.m.a_dtype), ((self.layout.words,), "int32"), *k.operands, (k.out_shape, k.out_dtype)
        )
        self.out = inline_llvm.rounded_by(out, k.rounding)
        for text in filter(None, (self.m.llvm, zip_llvm(lanes), self.out.rounding and k.rounding)):
            f.import_llvm(text)
        self.f = f
        whole = self.g.channels % lanes == 0
        self.results = Results(self.out, self.m.acc_dtype, lanes, self.g.channels, whole)
        per_part = -(-self.groups // k.parts)
        with builder.parallel(-(-self.g.width // self.pixels) * k.parts) as task:
            block, part = tirx.floordiv(task, k.parts), tirx.floormod(task, k.parts)
            columns = f.scratch(self.words * self.pixels, FLOAT)
            sums = f.scratch(lanes * self.pixels, self.m.acc_dtype)
            first = block * self.pixels
            self._columns(x, columns, first)
            count = tirx.min(tirx.const(per_part, "int32"), self.groups - part * per_part) if k.parts > 1 else per_part
            with builder.span(part * per_part, count) as group:
                with builder.serial(lanes // self.layout.rows) as index:
                    self._panel(columns, sums, group, index)
                with builder.serial(k.vectors) as vector:
                    self._finish(sums, group, vector, first)

    def _pixel(self, first: Expr, vector: Expr) -> Expr:
        """The first pixel of a vector; the last ones overlap rather than leave the image."""
        return T.Bind(tirx.min(first + vector * self.lanes, tirx.const(self.g.width - self.lanes, "int32")))

    def _columns(self, x: Flat, columns: Flat, first: Expr) -> None:
        """The words of the task's pixels, transposed; the last ones overlap too."""
        lanes, kr = self.lanes, self.m.product.kr
        with builder.serial(self.k.vectors) as vector:
            pixel = self._pixel(first, vector)

            def row(i: int, word: Expr, count: int) -> Expr:
                bits = x.bits((pixel + i) * self.g.sx + word * kr, count * kr)
                return T.reinterpret(FLOAT if count == 1 else f"{FLOAT}x{count}", bits)

            if self.words < lanes:
                with builder.serial(self.words) as word:
                    for i in range(lanes):
                        columns.store(row(i, word, 1), word * self.pixels + vector * lanes + i)
                return
            with builder.serial(-(-self.words // lanes)) as square:
                word = T.Bind(tirx.min(square * lanes, tirx.const(self.words - lanes, "int32")))
                rows = [T.Bind(row(i, word, lanes)) for i in range(lanes)]
                for j, column in enumerate(transposed(rows)):
                    columns.store(column, (word + j) * self.pixels + vector * lanes, lanes)

    def _panel(self, columns: Flat, sums: Flat, group: Expr, index: Expr) -> None:
        """The sums of `rows` output channels for all pixels of the task."""
        m, lanes, layout, vectors = self.m, self.lanes, self.layout, self.k.vectors
        panel = T.Bind(group * (lanes // layout.rows) + index)
        acc = self.f.registers(layout.rows * self.pixels, m.acc_dtype)
        slots = [(r, v, (r * vectors + v) * lanes) for r in range(layout.rows) for v in range(vectors)]
        for _, _, slot in slots:
            acc.store(builder.number(0, m.acc_dtype, lanes), slot, lanes)

        def multiply() -> None:
            start = T.Bind(self.w.load(layout.starts + panel))
            with builder.span(start, self.w.load(layout.starts + panel + 1) - start) as entry:
                place = T.Bind(self.w.load(layout.places + entry))
                values = layout.values + entry * layout.rows
                factors = [
                    T.Bind(T.reinterpret(m.product.dtype, columns.load(place + v * lanes, lanes)))
                    for v in range(vectors)
                ]
                weights = [
                    T.Bind(T.reinterpret(m.product.dtype, builder.splat(self.w.load(values + r), lanes)))
                    for r in range(layout.rows)
                ]
                for r, v, slot in slots:
                    acc.store(m.product.emit(acc.load(slot, lanes), factors[v], weights[r]), slot, lanes)

        # The last vector of channels may have fewer panels; what stands in their place is not stored.
        self._where(layout.panels * layout.rows % lanes != 0, panel < layout.panels, multiply)
        for r, v, slot in slots:
            sums.store(acc.load(slot, lanes), (index * layout.rows + r) * self.pixels + v * lanes, lanes)

    def _where(self, needed: bool, condition: Expr, body: Callable[[], None]) -> None:
        if not needed:
            body()
            return
        with builder.when(condition):
            body()

    def _finish(self, sums: Flat, group: Expr, vector: Expr, first: Expr) -> None:
        """The results of a vector of pixels and a vector of channels."""
        lanes, cout, k = self.lanes, self.g.channels, self.k
        pixel = self._pixel(first, vector)
        channel = T.Bind(group * lanes)
        dtype = f"{FLOAT}x{lanes}"
        rows = [T.Bind(T.reinterpret(dtype, sums.load(i * self.pixels + vector * lanes, lanes))) for i in range(lanes)]
        results = [T.reinterpret(f"{self.m.acc_dtype}x{lanes}", column) for column in transposed(rows)]

        def finish(values: Any, i: Expr) -> None:
            place = Place(channel, (pixel + i) * cout + channel, lanes, pixel + i)
            self.results.finish(values, i * lanes, place, channel, k.epilogue, self.operands)

        if any(isinstance(step, ops.Activate) for step in k.epilogue):
            # A float function is a page of code: a loop over the results, from memory.
            kept = self.f.scratch(lanes * lanes, self.m.acc_dtype)
            for i, value in enumerate(results):
                kept.store(value, i * lanes, lanes)
            with builder.serial(lanes) as turn:
                finish(kept, turn)
            return
        final = self.f.registers(lanes * lanes, self.m.acc_dtype)
        for i, value in enumerate(results):
            final.store(value, i * lanes, lanes)
        for i in range(lanes):
            finish(final, i)
