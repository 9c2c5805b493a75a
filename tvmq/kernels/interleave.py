"""Products of narrow elements that lie in different rows: rows are interleaved, so that a lane holds a channel of each.

x86 interleaves within 128 bits ("segments"). Vector v of the `rows` vectors that interleaving makes holds, in its lanes
4 s to 4 s + 3, channels 4 v to 4 v + 3 of segment s:

    rows = 2, 16-bit elements          a0 a1 .. a7 | a8 .. a15        b0 b1 .. b7 | b8 .. b15
    vector 0, 32-bit lanes             a0b0 a1b1 a2b2 a3b3 | a8b8 .. a11b11
    vector 1                           a4b4 a5b5 a6b6 a7b7 | a12b12 .. a15b15

Packing two vectors into one of half as wide elements works within segments too, and restores the order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvmq import ops
from tvmq.isa import Int8Dot, Isa
from tvmq.kernels.builder import BF16, FLOAT, Expr, Flat, external, intrinsic, number

# Lanes of 32 bits in a segment.
_SEGMENT = 4
# Lanes that a vector may have.
WIDTHS = (16, 8, 4)
# (an interleaved vector or weights, how many of its rows there are, lanes) -> the operands of `dot`
_Split = Callable[[Expr, int, int], tuple[Expr, ...]]


@dataclass(frozen=True)
class RowDot:
    """Products of `rows` rows of `dtype`, a lane of `acc_dtype` each, exact in int32.

    widths: lanes of the vectors it takes, the most first. registers: of the widest. a_split, w_split: the parts of 32
    bits that an instruction takes; dot: (accumulators, part of activations, of weights, lanes) -> accumulators. llvm:
    functions that it calls.
    """

    name: str
    rows: int
    dtype: str
    acc_dtype: str
    widths: tuple[int, ...]
    registers: int
    a_split: _Split
    w_split: _Split
    dot: Callable[[Expr, Expr, Expr, int], Expr]
    llvm: str = ""

    def channels(self, lanes: int) -> int:
        """Channels of vectors of `lanes` lanes, interleaved."""
        return lanes * self.rows


def row_dot(isa: Isa, dtype: str) -> RowDot | None:
    """The product of rows of uint8 or bfloat16 activations, None where elements are better widened one by one."""
    if "avx2" not in isa.required_features:
        return None
    if dtype == BF16:
        return _bf16_dot(isa) if "avx512bf16" in isa.required_features else _bf16_widened(isa)
    if dtype != "uint8":
        return None
    return _vnni(isa) if isa.int8_dot in (Int8Dot.AVX_VNNI, Int8Dot.AVX512_VNNI, Int8Dot.AMX) else _pairs(isa)


def _widths(isa: Isa) -> tuple[int, ...]:
    if isa.vector_bits == 512:
        return WIDTHS if "avx512vl" in isa.required_features else WIDTHS[:1]
    return WIDTHS[1:]


def _whole(value: Expr, rows: int, lanes: int) -> tuple[Expr, ...]:
    return (value,)


@functools.cache
def _vnni(isa: Isa) -> RowDot:
    """vpdpbusd: four rows."""

    def dot(acc: Expr, a: Expr, w: Expr, lanes: int) -> Expr:
        quads = (T.reinterpret(f"int8x{4 * lanes}", value) for value in (a, w))
        return intrinsic(f"int32x{lanes}", f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", acc, *quads)

    name = "avxvnni" if isa.int8_dot is Int8Dot.AVX_VNNI else "avx512vnni"
    return RowDot(name, 4, "uint8", "int32", _widths(isa), isa.vector_registers, _whole, _whole, dot)


_PAIRS = {16: "llvm.x86.avx512.pmaddw.d.512", 8: "llvm.x86.avx2.pmadd.wd", 4: "llvm.x86.sse2.pmadd.wd"}


@functools.cache
def _pairs(isa: Isa) -> RowDot:
    """vpmaddwd: four rows as the pairs (0, 2) and (1, 3) of int16."""

    def split(dtype: str) -> _Split:
        def parts(value: Expr, rows: int, lanes: int) -> tuple[Expr, ...]:
            words, vector = T.reinterpret(f"{dtype}x{2 * lanes}", value), f"int16x{2 * lanes}"
            eight = number(8, dtype, 2 * lanes)
            even, odd = T.Bind((words << eight) >> eight), T.Bind(words >> eight)
            return tuple(T.reinterpret(vector, part) for part in ((even, odd) if rows > 1 else (even,)))

        return parts

    def dot(acc: Expr, a: Expr, w: Expr, lanes: int) -> Expr:
        return acc + intrinsic(f"int32x{lanes}", _PAIRS[lanes], a, w)

    name = "avx512bw" if isa.vector_bits == 512 else "avx2"
    return RowDot(name, 4, "uint8", "int32", _widths(isa), isa.vector_registers, split("uint16"), split("int16"), dot)


_BF16_DOT = """
define <{n} x float> @tvmq_bf16_rows_{n}(<{n} x float> %acc, <{n} x i32> %a, <{n} x i32> %b) alwaysinline {{
  %x = bitcast <{n} x i32> %a to <{m} x bfloat>
  %y = bitcast <{n} x i32> %b to <{m} x bfloat>
  %r = call <{n} x float> @llvm.x86.avx512bf16.dpbf16ps.{bits}(<{n} x float> %acc, <{m} x bfloat> %x, <{m} x bfloat> %y)
  ret <{n} x float> %r
}}
declare <{n} x float> @llvm.x86.avx512bf16.dpbf16ps.{bits}(<{n} x float>, <{m} x bfloat>, <{m} x bfloat>)
"""


@functools.cache
def _bf16_dot(isa: Isa) -> RowDot:
    """vdpbf16ps: two rows."""

    def dot(acc: Expr, a: Expr, w: Expr, lanes: int) -> Expr:
        return external(f"float32x{lanes}", f"tvmq_bf16_rows_{lanes}", acc, a, w)

    widths = _widths(isa)
    llvm = "".join(_BF16_DOT.format(n=n, m=2 * n, bits=32 * n) for n in widths)
    return RowDot("avx512bf16", 2, BF16, FLOAT, widths, isa.vector_registers, _whole, _whole, dot, llvm)


@functools.cache
def _bf16_widened(isa: Isa) -> RowDot:
    """Two rows, widened by a shift and by a mask."""

    def split(value: Expr, rows: int, lanes: int) -> tuple[Expr, ...]:
        bits, vector = T.reinterpret(f"uint32x{lanes}", value), f"float32x{lanes}"
        first = T.Bind(T.reinterpret(vector, bits << number(16, "uint32", lanes)))
        second = T.Bind(T.reinterpret(vector, bits & number(0xFFFF0000, "uint32", lanes)))
        return (first, second) if rows > 1 else (first,)

    def dot(acc: Expr, a: Expr, w: Expr, lanes: int) -> Expr:
        return acc + a * w

    name = "avx512" if isa.vector_bits == 512 else "avx2"
    return RowDot(name, 2, BF16, FLOAT, _widths(isa), isa.vector_registers, split, split, dot)


def interleave(rows: Sequence[Expr], lanes: int) -> list[Expr]:
    """Vectors of `lanes` lanes from as many rows, two or four, of elements of 32 bits together: see the text above."""
    bits, count = 32 // len(rows), lanes * len(rows)
    streams = [[row] for row in rows]
    while len(streams) > 1:
        streams = [
            [_unpack(a, b, bits, count, high) for a, b in zip(even, odd, strict=True) for high in (False, True)]
            for even, odd in zip(streams[::2], streams[1::2], strict=True)
        ]
        bits, count = 2 * bits, count // 2
    return streams[0]


def _unpack(a: Expr, b: Expr, bits: int, count: int, high: bool) -> Expr:
    """The low or high halves of all segments of a and b, `count` elements of `bits`, as pairs of twice the bits."""
    segment = 32 * _SEGMENT // bits
    starts = range(segment // 2 if high else 0, count, segment)
    order = [start + i + source for start in starts for i in range(segment // 2) for source in (0, count)]
    joined = T.Shuffle([a, b], order)
    return T.Bind(T.reinterpret(f"int{2 * bits}x{count // 2}", joined))


@dataclass(frozen=True)
class Interleaved:
    """A buffer read in the order of interleaved vectors: `load(i)` has the lanes that belong to channel i's vector."""

    flat: Flat
    rows: int

    def load(self, index: Expr, lanes: int = 1) -> Expr:
        """`lanes` elements: four of each segment."""
        if lanes <= _SEGMENT:
            return self.flat.load(index, lanes)
        starts = range(0, lanes * self.rows, _SEGMENT * self.rows)
        return T.Shuffle([self.flat.load(index + start, _SEGMENT) for start in starts], list(range(lanes)))


def restore(vectors: Sequence[Expr], lanes: int) -> Expr:
    """All channels of interleaved vectors, in their order."""
    order = [v * lanes + s + i for s in range(0, lanes, _SEGMENT) for v in range(len(vectors)) for i in range(_SEGMENT)]
    return T.Shuffle(list(vectors), order)


_PACK_32 = {16: "llvm.x86.avx512.packssdw.512", 8: "llvm.x86.avx2.packssdw", 4: "llvm.x86.sse2.packssdw.128"}
_PACK_16 = {16: "llvm.x86.avx512.packuswb.512", 8: "llvm.x86.avx2.packuswb", 4: "llvm.x86.sse2.packuswb.128"}


def quantize(vectors: Sequence[Expr], step: ops.Quantize, lanes: int) -> Expr:
    """`step`, to uint8, of four interleaved float32 vectors: all channels in their order.

    Instructions that saturate keep the lower limit: a number below all int32 becomes the least of them.
    """
    zero_point, high = step.zero_point, number(float(step.qmax - step.zero_point), FLOAT, lanes)
    integers = [intrinsic(f"int32x{lanes}", "llvm.lrint", T.min(vector, high)) for vector in vectors]
    words = [intrinsic(f"int16x{2 * lanes}", _PACK_32[lanes], *integers[i : i + 2]) for i in range(0, len(integers), 2)]
    if zero_point:
        shift = number(zero_point, "int16", 2 * lanes)
        words = [intrinsic(f"int16x{2 * lanes}", "llvm.sadd.sat", word, shift) for word in words]
    packed = intrinsic(f"uint8x{4 * lanes}", _PACK_16[lanes], *words)
    return tirx.max(packed, number(step.qmin, "uint8", 4 * lanes)) if step.qmin > 0 else packed
