"""The matrix template for tile registers: what `gemm` computes, 16 pixels by 16 channels by 64 bytes an instruction.

A tiles are read straight from the image: their rows are consecutive output pixels, `sx` apart, of a row or of the whole
image read as one row (pixels that are no output are skipped at the end). B tiles are packed when compiling: [group,
panel, tap, step, width / kr, channels, kr]. Accumulators go through a small buffer to the vector epilogue.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvmq import ops
from tvmq.kernels import builder, gemm, inline_llvm
from tvmq.kernels.builder import Expr
from tvmq.kernels.geometry import Geometry
from tvmq.kernels.results import Results
from tvmq.kernels.tile_blocking import Run, TileBlocking
from tvmq.kernels.tiles import LANES, ROW_BYTES, TILES, Dot, Tiles, Unit
from tvmq.kernels.vector_epilogue import Place
from tvmq.triple import Family

Array = npt.NDArray[Any]


def pack(weight: Array, taps: int, groups: int, nr: int, kr: int) -> Array:
    """[O, kh, kw, I / groups] weights in panels of `nr` channels, every run in the steps of `Run`; flat."""
    channels, run = weight.shape[0], Run(weight[0].size // taps, kr)
    runs = weight.reshape(channels, taps, run.length)
    steps = np.zeros((channels, taps, run.steps, run.width), weight.dtype)
    for step, own, source in _own(run):
        steps[:, :, step, own] = runs[:, :, source]
    return gemm.pack(steps.reshape(channels, taps, 1, -1), taps, groups, nr, kr)


def unpack(packed: Array, shape: tuple[int, ...], taps: int, groups: int, nr: int, kr: int) -> Array:
    """The inverse of `pack`: [O, kh, kw, I / groups] weights of `shape`."""
    run = Run(math.prod(shape[1:]) // taps, kr)
    flat = gemm.unpack(packed, (shape[0], taps, 1, run.steps * run.width), taps, groups, nr, kr)
    steps = flat.reshape(shape[0], taps, run.steps, run.width)
    runs = np.concatenate([steps[:, :, step, own] for step, own, _ in _own(run)], axis=2)
    return np.ascontiguousarray(runs).reshape(shape)


def _own(run: Run) -> list[tuple[int, slice, slice]]:
    """(step, where in it, where in the run) of the products that each step computes first."""
    pieces = []
    for step in range(run.steps):
        first, end = step * run.width, min((step + 1) * run.width, run.length)
        start = min(first, run.last)
        pieces.append((step, slice(first - start, end - start), slice(first, end)))
    return pieces


@dataclass(frozen=True)
class TileGemm:
    """Everything that decides the code of one kernel; see `gemm.Gemm`."""

    geometry: Geometry
    dot: Dot
    unit: Unit
    blocking: TileBlocking
    epilogue: ops.Epilogue
    x_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    out_dtype: str
    operands: tuple[tuple[tuple[int, ...], str], ...]

    def function(self) -> Any:
        """The PrimFunc: (x, panels, epilogue tensors..., out)."""
        return builder.function(_Emitter(self).emit)


class _Emitter:
    def __init__(self, kernel: TileGemm) -> None:
        self.k = kernel
        self.g, self.b, self.dot = kernel.geometry, kernel.blocking, kernel.dot
        self.strips, self.run = self.b.strips, Run(self.g.length, self.dot.kr)
        self.nr = self.b.channels
        self.panels = -(-self.g.channels // self.nr)  # of a group
        self.step_size = self.nr * self.run.width
        self.size = self.g.groups * self.panels * len(self.g.taps) * self.run.steps * self.step_size
        self.tiles = self.strips.tiles * self.strips.count * self.g.images
        self.cout = self.g.groups * self.g.channels

    def emit(self, f: builder.Function) -> None:
        k, dot = self.k, self.dot
        self.x, self.w, *self.operands, self.out = f.arguments(
            (k.x_shape, dot.a_dtype), ((self.size,), dot.w_dtype), *k.operands, (k.out_shape, k.out_dtype)
        )
        f.import_llvm(inline_llvm.prefetch_llvm(Family.X86))
        whole = self.g.channels % self.nr == 0
        self.results = Results(self.out, dot.acc_dtype, LANES, self.g.channels, whole)
        self._tasks(f)

    def _tasks(self, f: builder.Function) -> None:
        """Parallel over parts of the panels and of the blocks; neighbours share the larger operand's part."""
        panels, blocks = self.g.groups * self.panels, -(-self.tiles // self.b.down)
        panel_tasks, block_tasks = -(-panels // self.b.panels_per_task), -(-blocks // self.b.blocks_per_task)
        with builder.parallel(panel_tasks * block_tasks) as task, self.k.unit.task(f, self._shapes()) as tiles:
            self.acc = f.scratch(self.b.down * self.b.across * self.strips.rows * LANES, self.dot.acc_dtype)
            if self.size >= math.prod(self.k.x_shape):
                p, b = tirx.floordiv(task, block_tasks), tirx.floormod(task, block_tasks)
            else:
                b, p = tirx.floordiv(task, panel_tasks), tirx.floormod(task, panel_tasks)
            with _part(p, self.b.panels_per_task, panels) as panel, _part(b, self.b.blocks_per_task, blocks) as block:
                self._block(tiles, panel, block)

    def _shapes(self) -> list[tuple[int, int]]:
        """Of each tile: accumulators, then A, then B."""
        rows, width = self.strips.rows, self.run.width * self.dot.item
        down, across = self._registers()
        accumulators = [(rows, ROW_BYTES)] * (self.b.down * self.b.across)
        return accumulators + [(rows, width)] * down + [(width // 4, ROW_BYTES)] * across

    def _registers(self) -> tuple[int, int]:
        """Tiles for A and for B: all of the fewer operands stay during a step, the others take turns in the rest."""
        down, across = self.b.down, self.b.across
        spare = TILES - down * across
        return (min(down, spare - across), across) if across <= down else (down, min(across, spare - down))

    def _block(self, tiles: Tiles, panel: Expr, block: Expr) -> None:
        """`down` tiles of pixels, or those that are left."""
        first, full, rest = block * self.b.down, self.tiles // self.b.down, self.tiles % self.b.down
        builder.either(
            block < full,
            full,
            rest,
            lambda: self._products(tiles, panel, first, self.b.down),
            lambda: self._products(tiles, panel, first, rest),
        )

    def _products(self, tiles: Tiles, panel: Expr, first: Expr, down: int) -> None:
        """All products of `down` tiles of pixels with a panel, then the epilogue."""
        group = tirx.floordiv(panel, self.panels)
        bases = [T.Bind(self._base(first + i) + group * self.g.sg) for i in range(down)]
        for tile in range(down * self.b.across):
            tiles.zero(tile)
        with builder.taps(self.g.taps) as (tap, offset), builder.serial(self.run.steps) as step:
            start = step * self.run.width
            if self.run.length % self.run.width:
                start = tirx.min(start, tirx.const(self.run.last, "int32"))
            at = T.Bind(offset + start)
            w = T.Bind(((panel * len(self.g.taps) + tap) * self.run.steps + step) * self.step_size)
            self._step(tiles, [base + at for base in bases], w)
        for tile in range(down * self.b.across):
            tiles.store(tile, self.acc, tile * self.strips.rows * LANES, ROW_BYTES)
        self._finish(group, tirx.floormod(panel, self.panels) * self.nr, first, down)

    def _step(self, tiles: Tiles, starts: list[Expr], w: Expr) -> None:
        """One tile of K: each operand is loaded once, just before its first product."""
        down, across = len(starts), self.b.across
        a_tiles, b_tiles = self._registers()
        a_first = self.b.down * across
        b_first = a_first + a_tiles
        item, kr = self.dot.item, self.dot.kr
        self._fetch_ahead(w)

        def load_a(i: int) -> None:
            tiles.load(a_first + i % a_tiles, self.x, starts[i], self.g.sx * item)

        def load_b(j: int) -> None:
            tiles.load(b_first + j % b_tiles, self.w, w + j * LANES * kr, self.nr * kr * item)

        def dot(i: int, j: int) -> None:
            tiles.dot(self.dot, i * across + j, a_first + i % a_tiles, b_first + j % b_tiles)

        if across <= self.b.down:
            for i in range(down):
                load_a(i)
                for j in range(across):
                    if i == 0:
                        load_b(j)
                    dot(i, j)
        else:
            for j in range(across):
                load_b(j)
                for i in range(down):
                    if j == 0:
                        load_a(i)
                    dot(i, j)

    def _fetch_ahead(self, w: Expr) -> None:
        """Ask for the weights of a later step, a cache line at a time; never past the last one."""
        if not self.b.ahead:
            return
        line = ROW_BYTES // self.dot.item
        later = T.Bind(tirx.min(w + self.b.ahead // self.dot.item, tirx.const(self.size - self.step_size, "int32")))
        for i in range(self.step_size // line):
            inline_llvm.prefetch(self.w, later + i * line, 1)

    def _position(self, tile: Expr) -> tuple[Expr, Expr, Expr, Expr]:
        """(image, strip, first pixel in the strip, pixels that an earlier tile has) of a tile of pixels."""
        s = self.strips
        strip, index = tirx.floordiv(tile, s.tiles), tirx.floormod(tile, s.tiles)
        start = index * s.rows
        early = tirx.min(start, tirx.const(s.length - s.rows, "int32")) if s.length % s.rows else start
        return tirx.floordiv(strip, s.count), tirx.floormod(strip, s.count), early, start - early

    def _base(self, tile: Expr) -> Expr:
        """Where a tile's first pixel reads."""
        image, strip, start, _ = self._position(tile)
        return image * self.g.sn + strip * self.g.sy + start * self.g.sx

    def _finish(self, group: Expr, channel: Expr, first: Expr, down: int) -> None:
        """The epilogue of all accumulators, from `channel` of `group` on."""
        with builder.serial(down) as i:
            image, strip, start, done = (T.Bind(value) for value in self._position(first + i))
            with builder.span(done, self.strips.rows - done) as row:
                if self.strips.flat:
                    y = T.Bind(tirx.floordiv(start + row, self.strips.pitch))
                    x = T.Bind(start + row - y * self.strips.pitch)
                    with builder.when(x < self.g.width):
                        self._row(group, channel, i, row, (image * self.g.height + y) * self.g.width + x)
                else:
                    self._row(group, channel, i, row, (image * self.g.height + strip) * self.g.width + start + row)

    def _row(self, group: Expr, channel: Expr, i: Expr, row: Expr, pixel: Expr) -> None:
        """The results of one pixel."""
        at = T.Bind(pixel * self.cout + group * self.g.channels)

        def vector(j: Expr) -> None:
            slot = (i * self.b.across + j) * (self.strips.rows * LANES) + row * LANES
            first = channel + j * LANES
            place = Place(group * self.g.channels + first, at + first, LANES, pixel)
            self.results.finish(self.acc, slot, place, first, self.k.epilogue, self.operands)

        if any(isinstance(step, ops.Activate) for step in self.k.epilogue):
            # A float function is a page of code: a loop, instead of a copy for each.
            with builder.serial(self.b.across) as j:
                vector(j)
            return
        for j in range(self.b.across):
            vector(j)


def _part(index: Expr, size: int, extent: int) -> Any:
    """A loop over part `index` of `extent`, in parts of `size`."""
    return builder.span(index * size, size if extent % size == 0 else tirx.min(size, extent - index * size))
