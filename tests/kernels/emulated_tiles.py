"""Matrix tiles as the manual describes them, in NumPy: what the instructions do, on any machine.

Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2: LDTILECFG, TILELOADD, TILESTORED, TILEZERO,
TDPBUSD, TDPBF16PS, TILERELEASE. Where a kernel has the instruction it calls back here; where the processor would fault, it fails.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm.tirx.script.builder import ir as T

from tvmq.kernels import builder
from tvmq.kernels.builder import Expr, Flat
from tvmq.kernels.tiles import BFLOAT16, INT8, LANES, ROW_BYTES, ROWS, TILES, Dot, Tiles, configured

CALLBACK = "tvmq.tests.tile"


class Fault(Exception):
    """What the processor would answer with #GP or #UD."""


class Thread:
    """The tile registers of one thread: `shapes` is None without a configuration."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] | None = None
        self.data = np.zeros((TILES, ROWS, ROW_BYTES), np.uint8)

    def configure(self, memory: Any) -> None:
        raw = bytes(_memory(memory, 64))
        rows, row_bytes = raw[48:56], struct.unpack("<8H", raw[16:32])
        _require((raw[0], any(raw[1:16]), any(raw[32:48]), any(raw[56:])) == (1, False, False, False), "palette 1")
        _require(max(rows) <= ROWS and max(row_bytes) <= ROW_BYTES, "shapes that a tile has")
        self.shapes, self.data[:] = list(zip(rows, row_bytes, strict=True)), 0

    def release(self) -> None:
        self.shapes, self.data[:] = None, 0

    def zero(self, tile: int) -> None:
        self.shape(tile)
        self.data[tile] = 0

    def load(self, tile: int, address: Any, stride: int) -> None:
        rows, width = self.shape(tile)
        self.data[tile] = 0
        self.data[tile, :rows, :width] = _rows(address, rows, width, stride)

    def store(self, tile: int, address: Any, stride: int) -> None:
        rows, width = self.shape(tile)
        _rows(address, rows, width, stride)[:] = self.data[tile, :rows, :width]

    def dot(self, kind: str, acc: int, a: int, b: int) -> None:
        (m, n), (a_rows, a_width), (k, b_width) = (self.shape(tile) for tile in (acc, a, b))
        _require(a_rows == m, "rows of the accumulators are those of A")
        _require(b_width == n, "columns of the accumulators are those of B")
        _require(a_width == k * 4, "columns of A are rows of B")
        dtype, operands = DOTS[kind]
        sums = self.data[acc].view(dtype)
        x, w = operands(self.data[a], self.data[b])
        sums[:m] += x[:m] @ w
        sums[m:] = 0

    def shape(self, tile: int) -> tuple[int, int]:
        _require(self.shapes is not None, "a configuration")
        assert self.shapes is not None
        _require(all(self.shapes[tile]), f"a shape of tile {tile}")
        return self.shapes[tile]


def _int8(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """TDPBUSD: u8 [m, 4 k] and s8 [k, n, 4] as int32 [m, 4 k] and [4 k, n]."""
    w = b.view(np.int8).reshape(ROWS, LANES, 4).transpose(0, 2, 1).reshape(ROW_BYTES, LANES)
    return a.astype(np.int32), w.astype(np.int32)


def _bfloat16(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """TDPBF16PS: bf16 [m, 2 k] and [k, n, 2] as float32 [m, 2 k] and [2 k, n]. The order of its sums is not kept."""
    w = b.view("bfloat16").reshape(ROWS, LANES, 2).transpose(0, 2, 1).reshape(ROWS * 2, LANES)
    return a.view("bfloat16").astype(np.float32), w.astype(np.float32)


DOTS: dict[str, tuple[Any, Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]]] = {
    INT8.instruction: (np.int32, _int8),
    BFLOAT16.instruction: (np.float32, _bfloat16),
}


def _memory(address: Any, size: int) -> Any:
    return (ctypes.c_uint8 * size).from_address(address.value)


def _rows(address: Any, rows: int, width: int, stride: int) -> np.ndarray:
    """The bytes of a tile in memory, as they are there."""
    flat = np.frombuffer(_memory(address, (rows - 1) * stride + width), np.uint8)
    return np.lib.stride_tricks.as_strided(flat, (rows, width), (stride, 1))


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise Fault(f"the processor would fault: expected {what}")


_threads: dict[int, Thread] = {}
COUNTS: Counter[str] = Counter()
"""How many times each instruction ran."""


@tvm.register_global_func(CALLBACK)
def _run(instruction: str, *operands: Any) -> None:
    COUNTS[instruction] += 1
    # Not threading.local: Python forgets about TVM's threads between two calls.
    getattr(_threads.setdefault(threading.get_ident(), Thread()), instruction)(*operands)


@dataclass(frozen=True)
class Emulated:
    """A unit that has no need of the instructions. Its name is the real one's: so are its kernels, but for these."""

    dots: tuple[Dot, ...] = (INT8, BFLOAT16)
    name: str = "amx"

    @contextlib.contextmanager
    def task(self, f: builder.Function, shapes: Sequence[tuple[int, int]]) -> Iterator[Tiles]:
        _call("configure", _address(configured(f, shapes), 0))
        yield _Calls()
        _call("release")


class _Calls:
    def zero(self, tile: int) -> None:
        _call("zero", tile)

    def load(self, tile: int, source: Flat, index: Expr, stride: int) -> None:
        _call("load", tile, _address(source, index), stride)

    def dot(self, dot: Dot, acc: int, a: int, b: int) -> None:
        _call("dot", dot.instruction, acc, a, b)

    def store(self, tile: int, target: Flat, index: Expr, stride: int) -> None:
        _call("store", tile, _address(target, index), stride)


def _call(instruction: str, *operands: Any) -> None:
    T.evaluate(T.call_packed(CALLBACK, instruction, *operands))


def _address(flat: Flat, index: Expr) -> Expr:
    return T.address_of(flat.buffer[index])
