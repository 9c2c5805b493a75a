"""Linear layers with 8- or 4-bit weights and a scale a group of inputs, multiplied as float32.

A task is a panel of `nr` output channels. Few rows (a matrix times a vector) read each weight once: it is widened in
registers, multiplied with all rows, and a group's sum is multiplied by the group's scale. More rows widen the panel
into the cache once, scales included, and multiply tiles of rows with that.

Weights are packed as coded_panels.py says. Few rows take 4 bits where they are in the word: input i of a word counts
16**i, by which x is divided beforehand (a power of 2: nothing is rounded), and the 8 that is too much costs 8 times the
sum of a group of x, from which the group's sum starts. So does what zero points cost, where weights are asymmetric.
What places in a table name is multiplied with x as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvmq import ops
from tvmq.kernels import builder, gemm_blocking
from tvmq.kernels.builder import FLOAT, Expr, Flat, Registers
from tvmq.kernels.coded_panels import OFFSET, WORD, CodedPanels, Coding
from tvmq.kernels.geometry import Geometry, conv_geometry
from tvmq.kernels.level_table import LevelTable
from tvmq.kernels.micro import Micro
from tvmq.kernels.results import Results
from tvmq.kernels.rowwise import row_sum
from tvmq.kernels.vector_epilogue import Place

# The most rows that are multiplied straight from widened registers.
FEW_ROWS = 4
# Vectors of a panel by rows: sums and group sums of all rows, a word of weights each, and a weight stay in registers.
_VECTORS = {1: 4, 2: 4, 3: 2, 4: 2}


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
    def coding(self) -> Coding:
        """How its weights are coded."""
        table, lanes = self.table, self.micro.lanes
        return Coding(
            self.panels, self.depth, self.group, self.bits, lanes, self.vectors, table, self.width, self.zero_points
        )

    def function(self) -> Any:
        """The PrimFunc: (x, weights, scales, zero points or table if there are such, epilogue tensors..., out)."""
        return builder.function(lambda f: _Emitter(self, f).emit())


class _Emitter:
    def __init__(self, kernel: Grouped, f: builder.Function) -> None:
        self.k, self.f, self.lanes = kernel, f, kernel.micro.lanes
        k, coding = kernel, kernel.coding
        self.x, *tensors, out = f.arguments(
            (k.x_shape, FLOAT), *coding.arguments(), *k.operands, (k.out_shape, k.out_dtype)
        )
        self.w = CodedPanels(coding, f, tensors)
        self.operands = self.w.rest
        self.results = Results(out, FLOAT, self.lanes, k.channels, k.channels % k.nr == 0)
        self.groups, self.step = coding.groups, coding.step
        # Whether weights are what x is multiplied by, once they are widened: in few rows 4 bits need more.
        self.whole = k.bits == 8 or k.table is not None
        # Whether the sums of few rows start from sums of x.
        self.summed = k.zero_points or not self.whole

    def emit(self) -> None:
        if self.k.rows <= FEW_ROWS and self.summed:
            self._prepare()
        with builder.parallel(self.k.panels) as panel:
            self.w.begin()
            if self.k.rows <= FEW_ROWS:
                self._few(panel)
            else:
                self._many(panel)

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
                zeros = [self.w.zero(panel, group, v, 0 if self.whole else OFFSET) for v in range(vectors)]
            for r, v, slot in slots:
                start = self.starts.load(r * self.groups + group) if self.summed else builder.number(0, FLOAT)
                each = builder.splat(start, lanes)
                parts.store(each * zeros[v] if zeros else each, slot, lanes)
            with builder.serial(self.k.group // self.step) as step:
                self._multiply(panel, group * self.k.group + step * self.step, parts)
            for v in range(vectors):
                scale = T.Bind(self.w.scale(panel, group, v))
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
            return self.w.looked_up(panel, k, v, self.k.table)
        if self.k.bits == 8:
            return self.w.bytes(panel, k, v)
        word = self.w.word(panel, k, v)
        masked = [word & builder.number(15 << 4 * i, "int32", self.lanes) for i in range(WORD - 1)]
        return [T.Bind(self.w.to_float(bits)) for bits in [*masked, self.w.last(word)]]

    # --- more rows ---

    def _many(self, panel: Expr) -> None:
        k = self.k
        wide = self.f.scratch(k.depth * k.nr, FLOAT)
        self.w.widen(panel, wide, 0, k.depth)
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
    tile = gemm_blocking.choose(geometry_of(rows, depth, channels), micro, cores, l2_bytes).tile
    return tile.pixels, tile.vectors


def geometry_of(rows: int, depth: int, channels: int) -> Geometry:
    """The product as a convolution of one row of pixels."""
    out = (1, 1, rows, channels)
    return conv_geometry((1, 1, rows, depth), (channels, 1, 1, depth), out, (1, 1), (1, 1), 1)


def fits(rows: int, vectors: int, micro: Micro) -> bool:
    """Whether few rows' sums, those of a group, a panel's words, a weight and an input fit the registers."""
    return 2 * rows * vectors + vectors + 2 <= micro.registers
