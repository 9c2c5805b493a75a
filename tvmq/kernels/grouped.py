"""Linear layers with 8- or 4-bit weights and a scale a group of inputs, multiplied as float32.

A task is a panel of `nr` output channels. Few rows (a matrix times a vector) read each weight once: it is widened in
registers, multiplied with all rows, and a group's sum is multiplied by the group's scale. More rows widen the panel
into the cache once, scales included, and multiply tiles of rows with that.

Weights are packed when compiling, in the order in which they are read: 8 bits [panel, K, nr]; 4 bits [panel, K / 8, nr]
words of eight inputs, the first in the lowest bits, each plus 8; scales [panel, group, nr]. Few rows take 4 bits where
they are in the word: input i of a word counts 16**i, by which x is divided beforehand (a power of 2: nothing is
rounded), and the 8 that is too much costs 8 times the sum of a group of x, from which the group's sum starts. So does
what zero points cost, where weights are asymmetric.
Places in a table are looked up (level_table.py), and what they name is multiplied with x as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvmq import ops
from tvmq.kernels import builder, gemm, gemm_blocking
from tvmq.kernels.builder import BF16, FLOAT, Expr, Flat, Registers
from tvmq.kernels.geometry import Geometry, conv_geometry
from tvmq.kernels.level_table import ENTRIES, LevelTable
from tvmq.kernels.micro import Micro
from tvmq.kernels.results import Results
from tvmq.kernels.rowwise import row_sum
from tvmq.kernels.vector_epilogue import Place

Array = npt.NDArray[Any]
# Inputs in a word of 4-bit weights, and what makes these positive.
WORD = 8
OFFSET = 8
# The most rows that are multiplied straight from widened registers.
FEW_ROWS = 4
# Vectors of a panel by rows: sums and group sums of all rows, a word of weights each, and a weight stay in registers.
_VECTORS = {1: 4, 2: 4, 3: 2, 4: 2}


def pack_words(weight: Array, taps: int, groups: int, nr: int, kr: int) -> Array:
    """[O, 1, 1, K] weights in [-8, 7] as int32 words: `gemm.pack` with kr = 8, and eight numbers a word."""
    nibbles = gemm.pack(weight, taps, groups, nr, kr).reshape(-1, WORD).astype(np.int64) + OFFSET
    words: Array = (nibbles << (4 * np.arange(WORD))).sum(axis=1)
    return words.astype(np.uint32).view(np.int32)


def unpack_words(packed: Array, shape: tuple[int, ...], taps: int, groups: int, nr: int, kr: int) -> Array:
    """The inverse of `pack_words`."""
    nibbles = (packed[:, None].astype(np.int64) >> (4 * np.arange(WORD))) & 15
    return gemm.unpack((nibbles - OFFSET).astype(np.int8).ravel(), shape, taps, groups, nr, kr)


@dataclass(frozen=True)
class Grouped:
    """Everything that decides the code of one kernel. `tile`: the rows that are multiplied at once.

    table: how the numbers are looked up that 4 bits are the places of; None where these are numbers themselves. width:
    how many inputs, that follow each other, 4 bits stand for. zero_points: whether groups have them, int8.
    """

    rows: int
    depth: int
    channels: int
    group: int
    bits: int
    micro: Micro
    tile: int
    vectors: int
    epilogue: ops.Epilogue
    x_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    out_dtype: str
    operands: tuple[tuple[tuple[int, ...], str], ...]
    table: LevelTable | None = None
    width: int = 1
    zero_points: bool = False

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
        return WORD * self.width if self.bits == 4 else next(n for n in (8, 4, 2, 1) if self.group % n == 0)

    def function(self) -> Any:
        """The PrimFunc: (x, weights, scales, zero points or table if there are such, epilogue tensors..., out)."""
        return builder.function(lambda f: _Emitter(self, f).emit())


class _Emitter:
    def __init__(self, kernel: Grouped, f: builder.Function) -> None:
        self.k, self.f, self.lanes = kernel, f, kernel.micro.lanes
        k, numbers = kernel, kernel.panels * kernel.nr
        weights = ((numbers * k.depth // k.step,), "int32") if k.bits == 4 else ((numbers * k.depth,), "int8")
        scales = ((numbers * (k.depth // k.group),), BF16)
        entries: list[tuple[tuple[int, ...], str]] = [((k.width, ENTRIES), FLOAT)] if k.table is not None else []
        if k.zero_points:
            entries.append(((numbers * (k.depth // k.group),), "int8"))
        self.x, self.w, self.scales, *self.operands, out = f.arguments(
            (k.x_shape, FLOAT), weights, scales, *entries, *k.operands, (k.out_shape, k.out_dtype)
        )
        if k.table is not None:
            f.import_llvm(k.table.llvm)
            self.entries = self.operands.pop(0)
        if k.zero_points:
            self.zeros = self.operands.pop(0)
        self.results = Results(out, FLOAT, self.lanes, k.channels, k.channels % k.nr == 0)
        self.groups = k.depth // k.group
        # Whether weights are what x is multiplied by, once they are widened: in few rows 4 bits need more.
        self.whole = k.bits == 8 or k.table is not None
        # Whether the sums of few rows start from sums of x.
        self.summed = k.zero_points or not self.whole

    def emit(self) -> None:
        if self.k.rows <= FEW_ROWS and self.summed:
            self._prepare()
        with builder.parallel(self.k.panels) as panel:
            if self.k.table is not None:
                starts = range(0, self.k.width * ENTRIES, ENTRIES)
                self.held = [self.k.table.hold(self.entries, start) for start in starts]
            if self.k.rows <= FEW_ROWS:
                self._few(panel)
            else:
                self._many(panel)

    # --- weights ---

    def _looked_up(self, panel: Expr, k: Expr, v: int, table: LevelTable) -> list[Expr]:
        """What vector `v` of a panel's 4-bit weights stands for, for the inputs from `k`."""
        word = self._word(panel, k, v)
        shifted = [T.Bind(word >> builder.number(4 * i, "int32", self.lanes)) for i in range(WORD)]
        return [T.Bind(table.entries(held, places)) for places in shifted for held in self.held]

    def _bytes(self, panel: Expr, k: Expr, v: int) -> list[Expr]:
        """Vector `v` of a panel's 8-bit weights for each of `step` inputs from `k`, as float32."""
        at = (panel * self.k.depth + k) * self.k.nr + v * self.lanes
        return [T.Bind(self._float(self.w.load(at + i * self.k.nr, self.lanes))) for i in range(self.k.step)]

    def _word(self, panel: Expr, k: Expr, v: int) -> Expr:
        """Vector `v` of a panel's words of 4-bit weights for the inputs from `k`."""
        step = self.k.step
        at = (panel * (self.k.depth // step) + tirx.floordiv(k, step)) * self.k.nr + v * self.lanes
        return T.Bind(self.w.load(at, self.lanes))

    def _last(self, word: Expr) -> Expr:
        """The last 4 bits of words, as numbers."""
        bits = T.reinterpret(f"uint32x{self.lanes}", word) >> builder.number(28, "uint32", self.lanes)
        return T.reinterpret(f"int32x{self.lanes}", bits)

    def _float(self, integers: Expr) -> Expr:
        return builder.cast(builder.cast(integers, "int32", self.lanes), FLOAT, self.lanes)

    def _scale(self, panel: Expr, group: Expr, v: int) -> Expr:
        return self.scales.load((panel * self.groups + group) * self.k.nr + v * self.lanes, self.lanes)

    def _zero(self, panel: Expr, group: Expr, v: int, offset: int = 0) -> Expr:
        """The zero points of a vector of channels plus `offset`, as float32."""
        zeros = self.zeros.load((panel * self.groups + group) * self.k.nr + v * self.lanes, self.lanes)
        wide = builder.cast(zeros, "int32", self.lanes) + builder.number(offset, "int32", self.lanes)
        return T.Bind(builder.cast(wide, FLOAT, self.lanes))

    # --- few rows ---

    def _prepare(self) -> None:
        """x over the powers of 16 that its weights count for in a word, and what each group's sum starts from.

        The latter is for each 1 that is too much in a weight.
        """
        k, lanes = self.k, WORD
        self.starts = self.f.scratch(k.rows * self.groups, FLOAT)
        with builder.serial(k.rows * self.groups) as group:
            start = group * k.group
            total = row_sum(self.f, k.group, lambda at, n: self.x.load(start + at, n))
            self.starts.store(total * builder.number(-1 if k.zero_points else -OFFSET, FLOAT), group)
        if self.whole:
            return
        scaled = self.f.scratch(k.rows * k.depth, FLOAT)
        place = T.Ramp(tirx.const(0, "int32"), 1, lanes)
        last = tirx.EQ(place, builder.number(WORD - 1, "int32", lanes))  # is shifted down instead
        power = T.Select(last, builder.number(0, "int32", lanes), place * builder.number(4, "int32", lanes))
        bits = (builder.number(127, "int32", lanes) - power) << builder.number(23, "int32", lanes)
        factor = T.Bind(T.reinterpret(f"float32x{lanes}", bits))
        builder.for_each(k.rows * k.depth, lanes, lambda at, n: scaled.store(self.x.load(at, n) * factor, at, n))
        self.x = scaled

    def _few(self, panel: Expr) -> None:
        lanes, rows, vectors = self.lanes, self.k.rows, self.k.vectors
        slots = [(r, v, (r * vectors + v) * lanes) for r in range(rows) for v in range(vectors)]
        sums = self.f.registers(rows * vectors * lanes, FLOAT)
        parts = self.f.registers(rows * vectors * lanes, FLOAT)
        for _, _, slot in slots:
            sums.store(builder.number(0, FLOAT, lanes), slot, lanes)
        with builder.serial(self.groups) as group:
            zeros = []
            if self.k.zero_points:
                zeros = [self._zero(panel, group, v, 0 if self.whole else OFFSET) for v in range(vectors)]
            for r, v, slot in slots:
                start = self.starts.load(r * self.groups + group) if self.summed else builder.number(0, FLOAT)
                each = builder.splat(start, lanes)
                parts.store(each * zeros[v] if zeros else each, slot, lanes)
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
            for i, weight in enumerate(self._in_place(panel, k, v)):
                for r in range(self.k.rows):
                    slot = (r * vectors + v) * lanes
                    x = builder.splat(self.x.load(r * self.k.depth + k + i), lanes)
                    parts.store(parts.load(slot, lanes) + x * weight, slot, lanes)

    def _in_place(self, panel: Expr, k: Expr, v: int) -> list[Expr]:
        """The weights of `step` inputs from `k` as float32; of 4 bits times what `_prepare` divided x by."""
        if self.k.table is not None:
            return self._looked_up(panel, k, v, self.k.table)
        if self.k.bits == 8:
            return self._bytes(panel, k, v)
        word = self._word(panel, k, v)
        masked = [word & builder.number(15 << 4 * i, "int32", self.lanes) for i in range(WORD - 1)]
        return [T.Bind(self._float(bits)) for bits in [*masked, self._last(word)]]

    # --- more rows ---

    def _many(self, panel: Expr) -> None:
        k, lanes = self.k, self.lanes
        wide = self.f.scratch(k.depth * k.nr, FLOAT)
        with builder.serial(self.groups) as group:
            scales = [T.Bind(self._scale(panel, group, v)) for v in range(k.vectors)]
            zeros = [self._zero(panel, group, v) for v in range(k.vectors)] if k.zero_points else []
            with builder.serial(k.group // k.step) as step:
                start = group * k.group + step * k.step
                for v in range(k.vectors):
                    for i, weight in enumerate(self._numbers(panel, start, v)):
                        centred = weight - zeros[v] if zeros else weight
                        wide.store(centred * scales[v], (start + i) * k.nr + v * lanes, lanes)
        whole, rest = divmod(k.rows, k.tile)
        with builder.serial(whole) as index:
            self._tile(panel, wide, index * k.tile, k.tile)
        if rest:
            self._tile(panel, wide, tirx.const(whole * k.tile, "int32"), rest)

    def _numbers(self, panel: Expr, k: Expr, v: int) -> list[Expr]:
        """The weights of `step` inputs from `k` as float32."""
        if self.k.table is not None:
            return self._looked_up(panel, k, v, self.k.table)
        if self.k.bits == 8:
            return self._bytes(panel, k, v)
        word, lanes = self._word(panel, k, v), self.lanes
        shifted = [word << builder.number(28 - 4 * i, "int32", lanes) for i in range(WORD)]
        offset = builder.number(OFFSET, "int32", lanes)
        return [T.Bind(self._float(self._last(bits) - offset)) for bits in shifted]

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
    tile = gemm_blocking.choose(geometry_of(rows, depth, channels), micro, cores, l2_bytes).tile
    return tile.pixels, tile.vectors


def geometry_of(rows: int, depth: int, channels: int) -> Geometry:
    """The product as a convolution of one row of pixels."""
    out = (1, 1, rows, channels)
    return conv_geometry((1, 1, rows, depth), (channels, 1, 1, depth), out, (1, 1), (1, 1), 1)


def fits(rows: int, vectors: int, micro: Micro) -> bool:
    """Whether few rows' sums, those of a group, a panel's words, a weight and an input fit the registers."""
    return 2 * rows * vectors + vectors + 2 <= micro.registers
