"""The matrix template: convolution, dense and grouped convolution as register-tiled products over weight panels.

Weights are packed when compiling: [group, panel, tap, length / kr, nr, kr], zero-padded; `nr` is a few vectors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx

from tvmq import ops
from tvmq.kernels import builder, inline_llvm
from tvmq.kernels.builder import Expr, Flat, Registers
from tvmq.kernels.gemm_blocking import BYTES, PREFETCHING_SLOTS, Blocking
from tvmq.kernels.geometry import Geometry
from tvmq.kernels.micro import Micro
from tvmq.kernels.register_tile import RegisterTile
from tvmq.kernels.results import Results
from tvmq.kernels.vector_epilogue import Place

Array = npt.NDArray[Any]


def pack(weight: Array, taps: int, groups: int, nr: int, kr: int) -> Array:
    """[O, kh, kw, I / groups] weights as [groups * panels * taps * length / kr * nr * kr], flat, zero-padded."""
    channels = weight.shape[0] // groups
    length = weight[0].size // taps
    panels, padded = -(-channels // nr), -(-length // kr) * kr
    full = np.zeros((groups, panels * nr, taps, padded), weight.dtype)
    full[:, :channels, :, :length] = weight.reshape(groups, channels, taps, length)
    split = full.reshape(groups, panels, nr, taps, padded // kr, kr)
    return np.ascontiguousarray(split.transpose(0, 1, 3, 4, 2, 5)).ravel()


def unpack(packed: Array, shape: tuple[int, ...], taps: int, groups: int, nr: int, kr: int) -> Array:
    """The inverse of `pack`: [O, kh, kw, I / groups] weights of `shape`."""
    channels, length = shape[0] // groups, math.prod(shape[1:]) // taps
    panels, padded = -(-channels // nr), -(-length // kr) * kr
    split = packed.reshape(groups, panels, taps, padded // kr, nr, kr).transpose(0, 1, 4, 2, 3, 5)
    full = split.reshape(groups, panels * nr, taps, padded)
    return np.ascontiguousarray(full[:, :channels, :, :length]).reshape(shape)


@dataclass(frozen=True)
class Gemm:
    """Everything that decides the code of one matrix kernel.

    prefetch, rounding: what `inline_llvm.prefetch` and `inline_llvm.rounded_by` need, or "".
    """

    geometry: Geometry
    micro: Micro
    blocking: Blocking
    prefetch: str
    rounding: str
    epilogue: ops.Epilogue
    x_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    out_dtype: str
    operands: tuple[tuple[tuple[int, ...], str], ...]  # (shape, dtype) of each epilogue tensor

    def function(self) -> Any:
        """The PrimFunc: (x, panels, epilogue tensors..., out)."""
        return builder.function(Emitter(self).emit)


class Emitter:
    """Emits a `Gemm`. `weights`, `tasks` and `products` say how its panels are read, for kernels that have others."""

    def __init__(self, gemm: Gemm) -> None:
        self.k = gemm
        self.g, self.m, self.tile = gemm.geometry, gemm.micro, gemm.blocking.tile
        self.nr = self.tile.vectors * self.m.lanes
        self.panels = -(-self.g.channels // self.nr)
        self.steps = self.g.padded_length(self.m.kr) // self.m.kr
        self.panel_size = len(self.g.taps) * self.steps * self.nr * self.m.kr
        self.cout = self.g.groups * self.g.channels

    def emit(self, f: builder.Function) -> None:
        """The body of the function."""
        k = self.k
        self.x, self.w, *self.operands, self.out = f.arguments(
            (k.x_shape, self.m.a_dtype), self.weights(), *k.operands, (k.out_shape, k.out_dtype)
        )
        self.out = inline_llvm.rounded_by(self.out, k.rounding)
        for text in filter(None, (self.m.llvm, k.prefetch, self.out.rounding and k.rounding)):
            f.import_llvm(text)
        self.f = f
        self.results = Results(self.out, self.sums_dtype, self.m.lanes, self.g.channels, self._padded_operands())
        if self.g.height * self.g.images == 1:
            self._flat()
        else:
            self._image()

    @property
    def sums_dtype(self) -> str:
        """Of the sums that the epilogue is told."""
        return self.m.acc_dtype

    @property
    def starts_with_bias(self) -> bool:
        """Whether sums may start from the bias instead of zeros."""
        return self.m.span.plain and bool(self.k.epilogue) and isinstance(self.k.epilogue[0], ops.Bias)

    def register_tile(self, rows: int, start: Callable[[int], Expr] | None) -> RegisterTile:
        """The sums of so many pixels, and what they start from."""
        return RegisterTile(self.f, self.m, rows, self.tile.vectors, start)

    def weights(self) -> tuple[tuple[int], str]:
        """The shape and dtype of the packed weights."""
        return (self.g.groups * self.panels * self.panel_size,), self.m.w_dtype

    def _flat(self) -> None:
        """One long row of pixels: bands are its tiles."""
        bands = -(-self.g.width // self.tile.columns)
        self.tasks(bands, lambda panel, band: self._columns(panel, 0, 0, 1, band))

    def _image(self) -> None:
        per_image = -(-self.g.height // self.tile.rows)

        def band(panel: Expr, index: Expr) -> None:
            image, row = tirx.floordiv(index, per_image), tirx.floormod(index, per_image)
            rest = self.g.height % self.tile.rows
            whole = row < self.g.height // self.tile.rows

            def run(rows: int) -> None:
                full = self.g.width // self.tile.columns
                if full:
                    with builder.serial(full) as column:
                        self._micro_kernel(
                            panel, image, row * self.tile.rows, column * self.tile.columns, rows, self.tile.columns
                        )
                if self.g.width % self.tile.columns:
                    start = full * self.tile.columns
                    self._micro_kernel(
                        panel, image, row * self.tile.rows, start, rows, self.g.width % self.tile.columns
                    )

            builder.either(whole, self.g.height // self.tile.rows, rest, lambda: run(self.tile.rows), lambda: run(rest))

        self.tasks(per_image * self.g.images, band)

    def _columns(self, panel: Expr, image: Expr, row: Expr, rows: int, index: Expr) -> None:
        full, rest = self.g.width // self.tile.columns, self.g.width % self.tile.columns
        start = index * self.tile.columns
        builder.either(
            index < full,
            full,
            rest,
            lambda: self._micro_kernel(panel, image, row, start, rows, self.tile.columns),
            lambda: self._micro_kernel(panel, image, row, start, rows, rest),
        )

    def tasks(self, bands: int, run: Callable[[Expr, Expr], None]) -> None:
        """Parallel over (panel, block of bands), or over (block, panel)."""
        per_task = self.k.blocking.rows_per_task
        blocks = -(-bands // per_task)
        panels = self.g.groups * self.panels
        with builder.parallel(blocks * panels) as task:
            if self.k.blocking.panels_first:
                panel, block = tirx.floordiv(task, blocks), tirx.floormod(task, blocks)
            else:
                block, panel = tirx.floordiv(task, panels), tirx.floormod(task, panels)
            count = per_task
            if bands % per_task:
                count = tirx.min(tirx.const(per_task, "int32"), bands - block * per_task)
            with builder.serial(count) as self.turn:
                run(panel, block * per_task + self.turn)

    def _micro_kernel(self, panel: Expr, image: Expr, row: Expr, column: Expr, rows: int, columns: int) -> None:
        """One register tile: all products of its pixels with a panel, then the epilogue."""
        m, lanes = self.m, self.m.lanes
        group, index = tirx.floordiv(panel, self.panels), tirx.floormod(panel, self.panels)
        base = image * self.g.sn + row * self.g.sy + column * self.g.sx + group * self.g.sg
        pixels = [(y, x) for y in range(rows) for x in range(columns)]
        vectors = self.tile.vectors
        steps = self.k.epilogue
        activates = any(isinstance(step, ops.Activate) for step in steps)
        starts_with_bias = self.starts_with_bias and self._padded_operands()
        channel = group * self.g.channels + index * self.nr
        first_sums = (lambda v: self.operands[0].load(channel + v * lanes, lanes)) if starts_with_bias else None
        tile = self.register_tile(len(pixels), first_sums)
        self.products(panel, column, base, pixels, tile)
        rest = steps[1:] if starts_with_bias else steps
        operands = self.operands[1:] if starts_with_bias else self.operands

        def place_of(y: Expr, x: Expr, v: Expr, width: int = lanes) -> Place:
            pixel = (image * self.g.height + row + y) * self.g.width + column + x
            at = channel + v * lanes
            return Place(at, pixel * self.cout + at, width, pixel, m.narrow if width > lanes else None)

        def finish(values: Flat | Registers, y: Expr, x: Expr, v: Expr, slot: Any) -> None:
            self.results.finish(values, slot, place_of(y, x, v), index * self.nr + v * lanes, rest, operands)

        if not activates:
            together = self._together(rest)
            final = tile.collected(self.f)
            for i, v, slot in tile.slots():
                if together == 1 or v >= vectors // together * together:
                    finish(final, *pixels[i], v, slot)
                elif v % together == 0:
                    value = builder.joined(
                        [final.load(at, lanes) for at in range(slot, slot + together * lanes, lanes)], lanes
                    )
                    self.results.store(value, place_of(*pixels[i], v, together * lanes), rest, operands)
            return
        # A float function is a page of code: a loop over the results, from memory, instead of a copy for each.
        results = self.f.scratch(len(pixels) * vectors * lanes, self.sums_dtype)
        for i, v, slot in tile.slots():
            results.store(tile.collect(i, v), slot, lanes)
        with builder.serial(rows) as y, builder.serial(columns) as x, builder.serial(self.tile.vectors) as v:
            finish(results, y, x, v, ((y * columns + x) * self.tile.vectors + v) * lanes)

    def products(
        self, panel: Expr, column: Expr, base: Expr, pixels: Sequence[tuple[int, int]], tile: RegisterTile
    ) -> None:
        """Add all products of the pixels, which lie (row, column) from `base`, with a panel: a row of `tile` each."""
        with self._taps() as (tap, offset):
            self.run((panel, column, base + offset), pixels, tile, tap, 0, self.steps)

    def run(
        self,
        place: tuple[Expr, Expr, Expr],
        pixels: Sequence[tuple[int, int]],
        tile: RegisterTile,
        tap: Expr,
        start: Expr,
        steps: int,
    ) -> None:
        """Add the products of `steps` steps of a tap, from step `start`; place: panel, column, where the tap begins."""
        m, span, size = self.m, self.m.span, self.nr * self.m.kr
        panel, column, base = place
        first = (panel * len(self.g.taps) + tap) * self.steps
        prefetches = (
            bool(self.k.prefetch) and self.k.blocking.prefetch and tile.rows * tile.vectors >= PREFETCHING_SLOTS
        )
        offsets = [y * self.g.sy + x * self.g.sx for y, x in pixels]
        ahead = self._ahead(panel, column, tap * self.steps + start) if prefetches else None
        if tile.run(self.x, base + start * m.kr, offsets, self.w, (first + start) * size, steps, ahead):
            return

        def multiply(step: Expr, count: int) -> None:
            if prefetches:
                inline_llvm.prefetch(self.w, self._ahead(panel, column, tap * self.steps + step), 2)
            rows = [base + step * m.kr + row for row in offsets]
            tile.multiply(self.x, rows, self.w, (first + step) * size, count)

        whole = steps // span.steps
        if whole:
            with builder.serial(whole) as turn:
                multiply(start + turn * span.steps, span.steps)
        if steps % span.steps:
            with builder.serial(steps % span.steps) as turn:
                multiply(start + whole * span.steps + turn, 1)

    def _together(self, steps: ops.Epilogue) -> int:
        """How many vectors of a pixel are finished at once: where the machine narrows several of them into one."""
        narrows = (
            self.m.narrow is not None and self._padded_operands() and steps and isinstance(steps[-1], ops.Quantize)
        )
        return next(n for n in (4, 2, 1) if self.tile.vectors >= n) if narrows else 1

    def _ahead(self, panel: Expr, column: Expr, step: Expr) -> Expr:
        """Where a line of the next panel is to bring near: over the first tiles of a panel, all of them."""
        line = 64 // BYTES[self.m.w_dtype]
        spans = self.m.span.steps
        lines = -(-self.nr * self.m.kr * spans // line)
        across = -(-self.g.width // self.tile.columns)
        flat = self.g.height * self.g.images == 1
        turn = self.turn if flat else self.turn * across + tirx.floordiv(column, self.tile.columns)
        part = tirx.min(turn, tirx.const(lines - 1, "int32"))
        ahead = (part * (len(self.g.taps) * self.steps // spans) + tirx.floordiv(step, spans)) * line
        return (panel + 1) * self.panel_size + ahead

    def _padded_operands(self) -> bool:
        """Whether a full vector of a channel operand can be read at every panel: no panel is cut short."""
        return self.g.channels % self.nr == 0

    def _taps(self) -> Any:
        return builder.taps(self.g.taps)
