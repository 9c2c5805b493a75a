"""Linear layers with 8- or 4-bit weights and a scale a group of inputs, multiplied as float32.

A task is a panel of `nr` output channels. Few rows (a matrix times a vector) read each weight once: it is widened in
registers, multiplied with all rows, and a group's sum is multiplied by the group's scale. More rows widen a part of the
panel into the cache once, scales included, and multiply tiles of rows with that.

Weights are packed when compiling, in the order in which they are read: 8 bits [panel, K, nr]; 4 bits [panel, K / 8, nr]
words of eight inputs, the first in the lowest bits; scales [panel, group, nr].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvmq import ops
from tvmq.kernels import builder, gemm
from tvmq.kernels.builder import BF16, FLOAT, Expr, Flat, Place, Registers
from tvmq.kernels.micro import Micro
from tvmq.kernels.results import Results

Array = npt.NDArray[Any]
# Inputs in a word of 4-bit weights.
WORD = 8
# The most rows that are multiplied straight from widened registers.
FEW_ROWS = 4
# Vectors of a panel by rows: sums and group sums of all rows, a word of weights each, and a weight stay in registers.
_VECTORS = {1: 4, 2: 4, 3: 2, 4: 2}


def pack_words(weight: Array, taps: int, groups: int, nr: int, kr: int) -> Array:
    """[O, 1, 1, K] weights in [-8, 7] as int32 words: `gemm.pack` with kr = 8, and eight numbers a word."""
    nibbles = gemm.pack(weight, taps, groups, nr, kr).reshape(-1, WORD).astype(np.int64) & 15
    words: Array = (nibbles << (4 * np.arange(WORD))).sum(axis=1)
    return words.astype(np.uint32).view(np.int32)


def unpack_words(packed: Array, shape: tuple[int, ...], taps: int, groups: int, nr: int, kr: int) -> Array:
    """The inverse of `pack_words`."""
    nibbles = (packed[:, None].astype(np.int64) >> (4 * np.arange(WORD))) & 15
    return gemm.unpack((((nibbles + 8) & 15) - 8).astype(np.int8).ravel(), shape, taps, groups, nr, kr)


@dataclass(frozen=True)
class Grouped:
    """Everything that decides the code of one kernel. `lookup`: whether one instruction looks 16 levels up.

    tile: rows of x multiplied at once, at most `FEW_ROWS` of which need no widened panel.
    """

    rows: int
    depth: int
    channels: int
    group: int
    bits: int
    micro: Micro
    lookup: bool
    tile: int
    vectors: int
    epilogue: ops.Epilogue
    x_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    out_dtype: str
    operands: tuple[tuple[tuple[int, ...], str], ...]

    @property
    def nr(self) -> int:
        """Channels of a panel."""
        return self.vectors * self.micro.lanes

    @property
    def panels(self) -> int:
        """How many panels there are."""
        return -(-self.channels // self.nr)

    @property
    def step(self) -> int:
        """Inputs that one turn of the inner loop takes."""
        return WORD if self.bits == 4 else next(n for n in (8, 4, 2, 1) if self.group % n == 0)

    def function(self) -> Any:
        """The PrimFunc: (x, weights, scales, epilogue tensors..., out)."""
        return builder.function(lambda f: _Emitter(self, f).emit())


class _Emitter:
    def __init__(self, kernel: Grouped, f: builder.Function) -> None:
        self.k, self.f, self.lanes = kernel, f, kernel.micro.lanes
        k, numbers = kernel, kernel.panels * kernel.nr
        weights = ((numbers * k.depth // WORD,), "int32") if k.bits == 4 else ((numbers * k.depth,), "int8")
        scales = ((numbers * (k.depth // k.group),), BF16)
        self.x, self.w, self.scales, *self.operands, out = f.arguments(
            (k.x_shape, FLOAT), weights, scales, *k.operands, (k.out_shape, k.out_dtype)
        )
        self.results = Results(out, FLOAT, self.lanes, k.channels, k.channels % k.nr == 0)
        self.groups = k.depth // k.group

    def emit(self) -> None:
        with builder.parallel(self.k.panels) as panel:
            if self.k.rows <= FEW_ROWS:
                self._few(panel)
            else:
                self._many(panel)

    # --- weights ---

    def _weights(self, panel: Expr, k: Expr, v: int) -> list[Expr]:
        """Vector `v` of a panel's weights for each of `step` inputs from `k`, as float32."""
        nr, lanes = self.k.nr, self.lanes
        if self.k.bits == 8:
            at = (panel * self.k.depth + k) * nr + v * lanes
            return [T.Bind(self._number(self.w.load(at + i * nr, lanes))) for i in range(self.k.step)]
        at = (panel * (self.k.depth // WORD) + tirx.floordiv(k, WORD)) * nr + v * lanes
        word = T.Bind(self.w.load(at, lanes))
        return [T.Bind(self._level(word, i)) for i in range(WORD)]

    def _number(self, integers: Expr) -> Expr:
        return builder.cast(builder.cast(integers, "int32", self.lanes), FLOAT, self.lanes)

    def _level(self, word: Expr, index: int) -> Expr:
        """The number in 4 bits of each word: looked up, or shifted to the top and back, which extends its sign."""
        lanes = self.lanes
        if self.k.lookup:
            place = builder.cast(T.Ramp(tirx.const(0, "int32"), 1, lanes), "int32", lanes)
            levels = (
                (place + builder.number(8, "int32", lanes)) & builder.number(15, "int32", lanes)
            ) - builder.number(8, "int32", lanes)
            shifted = word >> builder.number(4 * index, "int32", lanes) if index else word
            table = builder.cast(levels, FLOAT, lanes)
            return builder.intrinsic(f"float32x{lanes}", "llvm.x86.avx512.permvar.sf.512", table, shifted)
        top = word << builder.number(28 - 4 * index, "int32", lanes) if index < WORD - 1 else word
        return builder.cast(top >> builder.number(28, "int32", lanes), FLOAT, lanes)

    def _scale(self, panel: Expr, group: Expr, v: int) -> Expr:
        return self.scales.load((panel * self.groups + group) * self.k.nr + v * self.lanes, self.lanes)

    # --- few rows ---

    def _few(self, panel: Expr) -> None:
        lanes, rows, vectors = self.lanes, self.k.rows, self.k.vectors
        slots = [(r, v, (r * vectors + v) * lanes) for r in range(rows) for v in range(vectors)]
        sums = self.f.registers(rows * vectors * lanes, FLOAT)
        parts = self.f.registers(rows * vectors * lanes, FLOAT)
        for _, _, slot in slots:
            sums.store(builder.number(0, FLOAT, lanes), slot, lanes)
        with builder.serial(self.groups) as group:
            for _, _, slot in slots:
                parts.store(builder.number(0, FLOAT, lanes), slot, lanes)
            with builder.serial(self.k.group // self.k.step) as step:
                self._multiply(panel, group * self.k.group + step * self.k.step, parts)
            for v in range(vectors):
                scale = T.Bind(self._scale(panel, group, v))
                for r in range(rows):
                    slot = (r * vectors + v) * lanes
                    sums.store(sums.load(slot, lanes) + parts.load(slot, lanes) * scale, slot, lanes)
        self._finish(panel, sums, 0, rows)

    def _multiply(self, panel: Expr, k: Expr, parts: Registers) -> None:
        """Add the products of `step` inputs from `k`, all rows."""
        lanes, vectors = self.lanes, self.k.vectors
        for v in range(vectors):
            for i, weight in enumerate(self._weights(panel, k, v)):
                for r in range(self.k.rows):
                    slot = (r * vectors + v) * lanes
                    x = builder.splat(self.x.load(r * self.k.depth + k + i), lanes)
                    parts.store(parts.load(slot, lanes) + x * weight, slot, lanes)

    # --- more rows ---

    def _many(self, panel: Expr) -> None:
        k = self.k
        wide = self.f.scratch(k.depth * k.nr, FLOAT)
        with builder.serial(self.groups) as group:
            scales = [T.Bind(self._scale(panel, group, v)) for v in range(k.vectors)]
            with builder.serial(k.group // k.step) as step:
                start = group * k.group + step * k.step
                for v in range(k.vectors):
                    for i, weight in enumerate(self._weights(panel, start, v)):
                        wide.store(weight * scales[v], (start + i) * k.nr + v * self.lanes, self.lanes)
        whole, rest = divmod(k.rows, k.tile)
        with builder.serial(whole) as index:
            self._tile(panel, wide, index * k.tile, k.tile)
        if rest:
            self._tile(panel, wide, tirx.const(whole * k.tile, "int32"), rest)

    def _tile(self, panel: Expr, wide: Flat, row: Expr, rows: int) -> None:
        """The products of `rows` rows with the widened panel."""
        lanes, vectors = self.lanes, self.k.vectors
        sums = self.f.registers(rows * vectors * lanes, FLOAT)
        slots = [(r, v, (r * vectors + v) * lanes) for r in range(rows) for v in range(vectors)]
        for _, _, slot in slots:
            sums.store(builder.number(0, FLOAT, lanes), slot, lanes)
        with builder.serial(self.k.depth) as k:
            for r, v, slot in slots:
                x = (row + r) * self.k.depth + k
                product = self.k.micro.step(sums.load(slot, lanes), self.x, x, wide, k * self.k.nr + v * lanes)
                sums.store(product, slot, lanes)
        self._finish(panel, sums, row, rows)

    # --- results ---

    def _finish(self, panel: Expr, sums: Registers, row: Expr, rows: int) -> None:
        """The epilogue of `rows` rows of sums."""
        lanes, vectors = self.lanes, self.k.vectors

        def finish(values: Flat | Registers, r: Expr, v: Expr, slot: Any) -> None:
            first = panel * self.k.nr + v * lanes
            place = Place(first, (row + r) * self.k.channels + first, lanes, row + r)
            self.results.finish(values, slot, place, first, self.k.epilogue, self.operands)

        if not any(isinstance(step, ops.Activate) for step in self.k.epilogue):
            for r in range(rows):
                for v in range(vectors):
                    finish(sums, r, v, (r * vectors + v) * lanes)
            return
        # A float function is a page of code: a loop over the results, from memory, instead of a copy for each.
        held = self.f.scratch(rows * vectors * lanes, FLOAT)
        for slot in range(0, rows * vectors * lanes, lanes):
            held.store(sums.load(slot, lanes), slot, lanes)
        with builder.serial(rows) as r, builder.serial(vectors) as v:
            finish(held, r, v, (r * vectors + v) * lanes)


def tile_of(rows: int, channels: int, micro: Micro, cores: int, l2_bytes: int, depth: int) -> tuple[int, int]:
    """(rows at once, vectors of a panel): the analytic default."""
    if rows <= FEW_ROWS:
        vectors = _VECTORS[rows]
        # Panels enough for every core, as long as there are accumulators enough to hide a product's latency.
        while vectors > 1 and -(-channels // (vectors * micro.lanes)) < 2 * cores:
            vectors //= 2
        return rows, vectors
    geometry = gemm.conv_geometry(
        (1, 1, rows, depth), (channels, 1, 1, depth), (1, 1, rows, channels), (1, 1), (1, 1), 1
    )
    tile = gemm.choose(geometry, micro, cores, l2_bytes).tile
    return tile.pixels, tile.vectors
