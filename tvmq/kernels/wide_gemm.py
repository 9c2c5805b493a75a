"""Products of int16 activations with int8 weights: the matrix template, whose int32 sums become floats block by block.

    sums = 0
    for each block:  acc = 0;  acc += its products (int32);  sums += float32(acc)
    sums -> epilogue

A block, as `quantize.wide.blocks` says, is some runs of a kernel's taps, or a part of one: never more products than
int32 holds, whatever the activations are. Weights stay int8 in their panels, and are widened as they are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvmq.kernels import builder, gemm
from tvmq.kernels.builder import FLOAT, Expr, Registers
from tvmq.kernels.micro import Micro
from tvmq.kernels.register_tile import RegisterTile


@dataclass(frozen=True)
class WideGemm:
    """A `gemm.Gemm` with blocks: of `runs` whole runs each, or, where that is 1, of `steps` steps of a run at most."""

    gemm: gemm.Gemm
    runs: int
    steps: int

    def function(self) -> Any:
        """The PrimFunc: (x, panels, epilogue tensors..., out)."""
        return builder.function(_Emitter(self).emit)


class _Emitter(gemm.Emitter):
    def __init__(self, kernel: WideGemm) -> None:
        super().__init__(kernel.gemm)
        self.kernel = kernel

    @property
    def sums_dtype(self) -> str:
        return FLOAT

    @property
    def starts_with_bias(self) -> bool:
        return False

    def register_tile(self, rows: int, _start: Callable[[int], Expr] | None) -> RegisterTile:
        return WideTile(self.f, self.m, rows, self.tile.vectors)

    def products(
        self, panel: Expr, column: Expr, base: Expr, pixels: Sequence[tuple[int, int]], tile: RegisterTile
    ) -> None:
        assert isinstance(tile, WideTile)
        taps, runs = self.g.taps, self.kernel.runs
        within = [tap - taps[0] for tap in taps[:runs]]
        with builder.taps(taps[::runs]) as (block, first):
            with builder.taps(within) as (tap, offset):
                place = panel, column, base + first + offset
                self._parts(place, pixels, tile, block * runs + tap)
            if self.steps <= self.kernel.steps:
                tile.end_block()

    def _parts(
        self, place: tuple[Expr, Expr, Expr], pixels: Sequence[tuple[int, int]], tile: WideTile, tap: Expr
    ) -> None:
        """A run; a longer one than a block ends several."""
        whole, rest = divmod(self.steps, self.kernel.steps)
        if self.steps <= self.kernel.steps:
            self.run(place, pixels, tile, tap, 0, self.steps)
            return
        with builder.serial(whole) as part:
            self.run(place, pixels, tile, tap, part * self.kernel.steps, self.kernel.steps)
            tile.end_block()
        if rest:
            self.run(place, pixels, tile, tap, whole * self.kernel.steps, rest)
            tile.end_block()


class WideTile(RegisterTile):
    """A register tile whose sums are those of a block; those of all blocks are floats."""

    def __init__(self, f: builder.Function, micro: Micro, rows: int, vectors: int) -> None:
        super().__init__(f, micro, rows, vectors)
        assert micro.span.plain
        self.totals = f.registers(rows * vectors * self.lanes, FLOAT)
        for _, _, slot in self.slots():
            self.totals.store(builder.number(0, FLOAT, self.lanes), slot, self.lanes)

    def end_block(self) -> None:
        """Add the sums to those of all blocks, and start anew."""
        for _, _, slot in self.slots():
            sums = builder.cast(self.load(slot), FLOAT, self.lanes)
            self.totals.store(self.totals.load(slot, self.lanes) + sums, slot, self.lanes)
            self.acc.store(builder.number(0, self.micro.acc_dtype, self.lanes), slot, self.lanes)

    def collect(self, row: int, vector: int) -> Expr:
        """See `RegisterTile`."""
        return self.totals.load((row * self.vectors + vector) * self.lanes, self.lanes)

    def collected(self, _f: builder.Function) -> Registers:
        """See `RegisterTile`."""
        return self.totals
