"""Rows of the kernel table as benchmarks see them: a loop of the instruction alone, and the matrix template around it.

`VectorRow` is a `Micro` of `kernels/micro.py`, `TileRow` one of matrix tiles (`kernels/tiles.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tvm.tirx.script.builder import ir as T

from tvmq.isa import Isa
from tvmq.kernels import builder, gemm, gemm_blocking, inline_llvm, tile_blocking
from tvmq.kernels.builder import FLOAT, FP16
from tvmq.kernels.geometry import Geometry, conv_geometry
from tvmq.kernels.lowering import SHORT, Packing
from tvmq.kernels.micro import Micro
from tvmq.kernels.micro_floats import bf16_micro, float_micro, fp16_micro
from tvmq.kernels.micro_integers import int8_micro
from tvmq.kernels.spans_folded import Halves, Pairs
from tvmq.kernels.tile_gemm import TileGemm
from tvmq.kernels.tiles import LANES, ROW_BYTES, ROWS, TILES, Dot, Unit, unit_of
from tvmq.target import Target

Array = npt.NDArray[Any]
# What loops on registers hold instead of a dtype; and their factors of floats.
_BITS = {FP16: "uint16"}
_FACTORS = {FLOAT: 1e-7, FP16: 2.0**-14}
# Rows, channels and depth of a product.
Size = tuple[int, int, int]


@dataclass(frozen=True)
class Matmul:
    """A kernel for one size: its PrimFunc reads `x_shape`, and weights as `packing` packs them. tile: in its name."""

    function: Any
    x_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    packing: Packing
    tile: str


class TableRow(Protocol):
    """One row of the kernel table; `key`: the parts of a kernel's name by which it is known, weights' dtype and ISA."""

    @property
    def key(self) -> tuple[str, str]:
        """As in ("s8", "avx512vnni")."""

    @property
    def dtypes(self) -> tuple[str, str, str]:
        """Of activations, weights and sums."""

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one turn of `loop` on one thread."""

    def loop(self, turns: int, threads: int) -> Any:
        """The PrimFunc (*operands) that repeats the instruction, on registers."""

    def operands(self, threads: int) -> tuple[Array, ...]:
        """What `loop` takes."""

    def matmul(self, size: Size, target: Target) -> Matmul:
        """The template without an epilogue, with the tile that `compile` would choose for one core."""


def table_rows(isa: Isa) -> Iterator[TableRow]:
    """The rows that an instruction set gets."""
    yield from (VectorRow(micro(isa)) for micro in (float_micro, int8_micro, bf16_micro, fp16_micro))
    unit = unit_of(isa)
    if unit is not None:
        yield from (TileRow(dot, unit) for dot in unit.dots)


@dataclass(frozen=True)
class VectorRow:
    """A micro-kernel on vectors."""

    micro: Micro

    @property
    def key(self) -> tuple[str, str]:
        """See `TableRow`."""
        return SHORT[self.micro.w_dtype], self.micro.name

    @property
    def dtypes(self) -> tuple[str, str, str]:
        """See `TableRow`."""
        return self.micro.a_dtype, self.micro.w_dtype, self.micro.acc_dtype

    @property
    def _count(self) -> int:
        """Accumulators: all registers but one for the factors, and those to work with.

        A product of several instructions holds a register between them, and several products are on their way.
        """
        working = 8 if isinstance(self.micro.span, Pairs) else 1
        return self.micro.registers - 1 - working

    @property
    def _sums(self) -> str:
        """Of the loop: float16 where products are summed in it."""
        return FP16 if isinstance(self.micro.span, Halves) else self.micro.acc_dtype

    @property
    def macs(self) -> int:
        """See `TableRow`."""
        return self._count * self.micro.lanes * self.micro.instruction.kr

    def loop(self, turns: int, threads: int) -> Any:
        """(factors, start, out): each accumulator is its own factor, so that no product equals another's."""
        m, lanes, part = self.micro, self.micro.lanes, self._count * self.micro.lanes
        # Registers of float16 hold float32 once they are loaded: the loop has their bits.
        held, sums = _BITS.get(self._sums, self._sums), f"{self._sums}x{lanes}"

        def body(f: builder.Function) -> None:
            w, start, out = f.arguments(*(((n,), held) for n in (lanes, threads * part, threads * part)))
            if m.llvm:
                f.import_llvm(m.llvm)
            with builder.parallel(threads) as thread:
                acc = f.registers(part, held)
                for i in range(0, part, lanes):
                    acc.store(start.load(thread * part + i, lanes), i, lanes)
                with builder.serial(turns):
                    for i in range(0, part, lanes):
                        value = acc.load(i, lanes)
                        factors = (T.reinterpret(m.instruction.dtype, x) for x in (value, w.load(0, lanes)))
                        made = m.instruction.emit(T.reinterpret(sums, value), *factors)
                        acc.store(T.reinterpret(f"{held}x{lanes}", made), i, lanes)
                for i in range(0, part, lanes):
                    out.store(acc.load(i, lanes), thread * part + i, lanes)

        return builder.function(body)

    def operands(self, threads: int) -> tuple[Array, ...]:
        """See `TableRow`."""
        dtype, size = self._sums, threads * self._count * self.micro.lanes
        # Factors near nothing keep float accumulators where they are; integers wrap around.
        factors = np.full(self.micro.lanes, _FACTORS.get(dtype, 3), dtype)
        bits = _BITS.get(dtype, dtype)
        return factors.view(bits), np.ones(size, dtype).view(bits), np.zeros(size, bits)

    def matmul(self, size: Size, target: Target) -> Matmul:
        """See `TableRow`."""
        m, geometry = self.micro, _geometry(size)
        blocking = gemm_blocking.choose(geometry, m, 1, target.l2_kib * 1024)
        x_shape, out_shape, weight = _shapes(size)
        prefetch = inline_llvm.prefetch_llvm(target.isa.family)
        kernel = gemm.Gemm(geometry, m, blocking, prefetch, "", (), x_shape, out_shape, m.acc_dtype, ())
        nr = blocking.tile.vectors * m.lanes
        packing = Packing("gemm", weight, 1, 1, nr, m.kr)
        return Matmul(kernel.function(), x_shape, out_shape, packing, f"{blocking.tile.pixels}x{nr}")


# Tiles 0 to 3 are accumulators, 4 and 5 of A, 6 and 7 of B: four products of them between two into the same.
_PRODUCTS = ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7))


@dataclass(frozen=True)
class TileRow:
    """A product of matrix tiles."""

    dot: Dot
    unit: Unit

    @property
    def key(self) -> tuple[str, str]:
        """See `TableRow`."""
        return SHORT[self.dot.w_dtype], self.unit.name

    @property
    def dtypes(self) -> tuple[str, str, str]:
        """See `TableRow`."""
        return self.dot.a_dtype, self.dot.w_dtype, self.dot.acc_dtype

    @property
    def macs(self) -> int:
        """See `TableRow`."""
        return len(_PRODUCTS) * ROWS * LANES * ROW_BYTES // self.dot.item

    def loop(self, turns: int, threads: int) -> Any:
        """(factors, out): whole tiles, loaded once."""

        def body(f: builder.Function) -> None:
            x, out = f.arguments(((ROWS * ROW_BYTES,), "uint8"), ((threads * ROWS * LANES,), self.dot.acc_dtype))
            with builder.parallel(threads) as thread, self.unit.task(f, [(ROWS, ROW_BYTES)] * TILES) as tiles:
                for acc, _, _ in _PRODUCTS:
                    tiles.zero(acc)
                for factor in range(len(_PRODUCTS), TILES):
                    tiles.load(factor, x, 0, ROW_BYTES)
                with builder.serial(turns):
                    for product in _PRODUCTS:
                        tiles.dot(self.dot, *product)
                for acc, _, _ in _PRODUCTS:
                    tiles.store(acc, out, thread * (ROWS * LANES), ROW_BYTES)

        return builder.function(body)

    def operands(self, threads: int) -> tuple[Array, ...]:
        """See `TableRow`; all factors are zero, and no sum overflows."""
        return np.zeros(ROWS * ROW_BYTES, np.uint8), np.zeros(threads * ROWS * LANES, self.dot.acc_dtype)

    def matmul(self, size: Size, target: Target) -> Matmul:
        """See `TableRow`."""
        geometry = _geometry(size)
        blocking, _ = tile_blocking.choose(geometry, self.dot, 1, target.l1d_kib * 1024, target.l2_kib * 1024)
        x_shape, out_shape, weight = _shapes(size)
        kernel = TileGemm(geometry, self.dot, self.unit, blocking, (), x_shape, out_shape, self.dot.acc_dtype, ())
        packing = Packing("tiles", weight, 1, 1, blocking.channels, self.dot.kr)
        return Matmul(kernel.function(), x_shape, out_shape, packing, f"{blocking.pixels}x{blocking.channels}")


def _shapes(size: Size) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of activations, results and weights, as a 1x1 convolution has them."""
    rows, channels, depth = size
    return (1, 1, rows, depth), (1, 1, rows, channels), (channels, 1, 1, depth)


def _geometry(size: Size) -> Geometry:
    x_shape, out_shape, weight = _shapes(size)
    return conv_geometry(x_shape, weight, out_shape, (1, 1), (1, 1), 1)
