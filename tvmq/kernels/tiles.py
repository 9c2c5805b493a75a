"""Matrix tiles (Intel AMX): eight two-dimensional registers, and the few instructions that kernels call on them.

A kernel sees tiles only through `Unit` and `Tiles`, so that its addressing, packing and edges can be run where the
instructions do not exist: the tests have a unit that computes what the manual says. Source: Intel 64 and IA-32
Architectures Software Developer's Manual, volume 2 (LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TDPBUSD, TDPBF16PS,
TILERELEASE).
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvmq.isa import Bf16, Int8Dot, Isa
from tvmq.kernels import builder
from tvmq.kernels.builder import BF16, FLOAT, Expr, Flat

# Palette 1: eight tiles of at most 16 rows of 64 bytes.
TILES = 8
ROWS = 16
ROW_BYTES = 64
# 32-bit accumulators in a row of a tile: the channels of a tile of results.
LANES = ROW_BYTES // 4


@dataclass(frozen=True)
class Dot:
    """A product of tiles: acc[m, n] += sum over k and i < kr of a[m, k * kr + i] * b[k, n * kr + i].

    instruction: its LLVM name. kr: products summed into an accumulator from four bytes.
    """

    instruction: str
    a_dtype: str
    w_dtype: str
    acc_dtype: str
    kr: int

    @property
    def item(self) -> int:
        """Bytes of an element of A, and of B."""
        return 4 // self.kr


INT8 = Dot("llvm.x86.tdpbusd", "uint8", "int8", "int32", 4)
# Pairs of products are added one after the other, in float32; denormal numbers count as zeros.
BFLOAT16 = Dot("llvm.x86.tdpbf16ps", BF16, BF16, FLOAT, 2)


class Tiles(Protocol):
    """The instructions, on tiles by number. `stride`: bytes from a row in memory to the next."""

    def zero(self, tile: int) -> None:
        """All rows become zero."""

    def load(self, tile: int, source: Flat, index: Expr, stride: int) -> None:
        """Rows from memory; what the configuration leaves of the tile becomes zero."""

    def dot(self, dot: Dot, acc: int, a: int, b: int) -> None:
        """`dot` on three tiles."""

    def store(self, tile: int, target: Flat, index: Expr, stride: int) -> None:
        """Rows to memory."""


class Unit(Protocol):
    """A tile unit: hashable, since it is part of what decides a kernel's code."""

    @property
    def name(self) -> str:
        """Its part of a kernel's name, as in the kernel table."""

    @property
    def dots(self) -> tuple[Dot, ...]:
        """The products that it has."""

    def task(self, f: builder.Function, shapes: Sequence[tuple[int, int]]) -> AbstractContextManager[Tiles]:
        """Tiles for the code inside, (rows, bytes a row) each: every thread configures its own, and releases them."""


def configuration(shapes: Sequence[tuple[int, int]]) -> bytes:
    """The 64 bytes that LDTILECFG reads: palette 1, start row 0, bytes a row of each tile, rows of each tile."""
    assert len(shapes) <= TILES
    assert all(0 < rows <= ROWS and 0 < row <= ROW_BYTES and row % 4 == 0 for rows, row in shapes), shapes
    columns = [row for _, row in shapes] + [0] * (16 - len(shapes))
    rows = [rows for rows, _ in shapes] + [0] * (16 - len(shapes))
    return struct.pack("<2B14x16H16B", 1, 0, *columns, *rows)


def configured(f: builder.Function, shapes: Sequence[tuple[int, int]]) -> Flat:
    """The configuration in memory of the task's own."""
    memory = f.scratch(16, "int32")
    for i, (word,) in enumerate(struct.iter_unpack("<i", configuration(shapes))):
        memory.store(tirx.const(word, "int32"), i)
    return memory


@dataclass(frozen=True)
class Amx:
    """The instructions themselves."""

    dots: tuple[Dot, ...]
    name: str = "amx"

    @contextlib.contextmanager
    def task(self, f: builder.Function, shapes: Sequence[tuple[int, int]]) -> Iterator[Tiles]:
        """See `Unit.task`."""
        _instruction("ldtilecfg", _address(configured(f, shapes), 0))
        yield _Instructions()
        # A thread that keeps tiles in use makes every switch to another thread save 8 KiB.
        _instruction("tilerelease")


class _Instructions:
    def zero(self, tile: int) -> None:
        _instruction("tilezero", T.uint8(tile))

    def load(self, tile: int, source: Flat, index: Expr, stride: int) -> None:
        _instruction("tileloadd64", T.uint8(tile), _address(source, index), T.int64(stride))

    def dot(self, dot: Dot, acc: int, a: int, b: int) -> None:
        T.evaluate(T.call_llvm_intrin("void", dot.instruction, T.uint8(acc), T.uint8(a), T.uint8(b)))

    def store(self, tile: int, target: Flat, index: Expr, stride: int) -> None:
        _instruction("tilestored64", T.uint8(tile), _address(target, index), T.int64(stride))


def _instruction(name: str, *args: Any) -> None:
    T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{name}", *args))


def _address(flat: Flat, index: Expr) -> Expr:
    return T.address_of(flat.buffer[index])


# The LLVM feature, and the name of the function that asks the kernel for it, in every library that may use it.
FEATURE = "amx-tile"
PERMISSION = "tvmq_allow_tiles"


def permission() -> Any:
    """The PrimFunc (answer): asks Linux to let this process use tiles; answer[0] (int32) becomes 0, or -1 if refused.

    It is part of a library, since tiles are asked for by the process that runs them: this one, or a board's server.
    """

    def body(f: builder.Function) -> None:
        (answer,) = f.arguments(((1,), "int32"))
        # SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA: Linux, Documentation/arch/x86/xstate.rst.
        asked = T.call_extern("int64", "syscall", T.int64(158), T.int64(0x1023), T.int64(18))
        answer.store(tirx.Cast("int32", asked), 0)

    return builder.function(body).with_attrs({"global_symbol": PERMISSION, "op_pattern": 8})


def unit_of(isa: Isa) -> Unit | None:
    """The tile unit of an instruction set, None where it has none."""
    dots = (INT8,) * (isa.int8_dot is Int8Dot.AMX) + (BFLOAT16,) * (isa.bf16 is Bf16.AMX)
    return Amx(dots) if dots else None
