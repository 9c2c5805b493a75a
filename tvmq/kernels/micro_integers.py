"""The integer rows of the micro-kernel table: int8 and int16 activations by int8 weights, exact in int32."""

from __future__ import annotations

from dataclasses import replace

from tvm.tirx.script.builder import ir as T

from tvmq.isa import Int8Dot, Isa
from tvmq.kernels import neon, neon32
from tvmq.kernels.builder import Expr, Flat, cast, intrinsic, shuffle, splat
from tvmq.kernels.lane_loop import LaneProduct
from tvmq.kernels.micro import Micro, Product, by_element, has_neon32, multiply_add
from tvmq.kernels.spans import Broadcast, Lanes, lane
from tvmq.kernels.spans_folded import Pairs, Squares
from tvmq.triple import Family

_SDOT = "sdot v{acc}.4s, v{w}.16b, v{a}.4b[{lane}]"


def int8_micro(isa: Isa) -> Micro:
    """The best exact int8 step of an instruction set."""
    dot = isa.int8_dot
    if dot in (Int8Dot.AVX512_VNNI, Int8Dot.AMX):
        return _vnni("avx512vnni", 512, isa)
    if dot is Int8Dot.AVX_VNNI:
        return _vnni("avxvnni", 256, isa)
    if dot is Int8Dot.AVX512_PAIRS:
        return _pairs("avx512bw", 512, isa)
    # AVX without AVX2 has 256-bit vectors of floats only.
    if dot is Int8Dot.AVX2_PAIRS and "avx2" in isa.required_features:
        return _pairs("avx2", 256, isa)
    if isa.family is Family.AARCH64:
        arm = {Int8Dot.I8MM: _smmla, Int8Dot.SDOT: _sdot, Int8Dot.NEON: _neon}
        return arm.get(dot, _widening)(isa)
    return _neon(isa) if has_neon32(isa) else _widening(isa)


def int16_micro(isa: Isa) -> Micro:
    """The best exact step of int16 activations and int8 weights, which are widened as they are loaded.

    LLVM makes one instruction, vpdpwssd, of vpmaddwd and the addition where VNNI has it.
    """
    if isa.int8_dot in (Int8Dot.AVX512_VNNI, Int8Dot.AMX):
        return _pairs("avx512vnni", 512, isa)
    if isa.int8_dot is Int8Dot.AVX512_PAIRS:
        return _pairs("avx512bw", 512, isa)
    if "avx2" in isa.required_features:
        return _pairs("avxvnni" if isa.int8_dot is Int8Dot.AVX_VNNI else "avx2", 256, isa)
    return _neon_words(isa) if isa.family is Family.AARCH64 or has_neon32(isa) else _widening(isa)


def _vnni(name: str, bits: int, isa: Isa) -> Micro:
    """vpdpbusd: u8 x s8 quads into int32. LLVM 22 types its operands as bytes."""
    lanes, call = bits // 32, f"llvm.x86.avx512.vpdpbusd.{bits}"
    vector = f"int8x{4 * lanes}"
    product = Product(vector, 4, lambda acc, a, w: intrinsic(f"int32x{lanes}", call, acc, a, w))

    def step(acc: Expr, a: Flat, i: Expr, panel: Flat, j: Expr) -> Expr:
        quad = T.reinterpret("int32", a.load(i, 4))
        return product.emit(acc, T.reinterpret(vector, splat(quad, lanes)), panel.load(j, 4 * lanes))

    span = Broadcast(step, lanes, 4)
    return Micro(name, "uint8", "int8", "int32", lanes, 4, isa.vector_registers, product, span)


def _pairs(name: str, bits: int, isa: Isa) -> Micro:
    """vpmaddwd: int16 pairs into int32, exact, where pmaddubsw would saturate. Weights are widened on load."""
    lanes = bits // 32
    call = "llvm.x86.avx512.pmaddw.d.512" if bits == 512 else "llvm.x86.avx2.pmadd.wd"
    vector = f"int16x{2 * lanes}"
    product = Product(vector, 2, lambda acc, a, w: acc + intrinsic(f"int32x{lanes}", call, a, w))

    def step(acc: Expr, a: Flat, i: Expr, panel: Flat, j: Expr) -> Expr:
        pair = T.reinterpret("int32", a.load(i, 2))
        weights = cast(panel.load(j, 2 * lanes), "int16", 2 * lanes)
        return product.emit(acc, T.reinterpret(vector, splat(pair, lanes)), weights)

    # AVX needs a second instruction to add a pair product, and one to widen a vector of weights.
    span = Broadcast(step, lanes, 2, products=2, w_unpacks=1, temporaries=2)
    return Micro(name, "int16", "int8", "int32", lanes, 2, isa.vector_registers, product, span)


def _sdot(isa: Isa) -> Micro:
    """sdot: s8 x s8 quads into int32."""
    product = Product("int8x16", 4, lambda acc, a, w: intrinsic("int32x4", "llvm.aarch64.neon.sdot", acc, w, a))

    def step(acc: Expr, a: Flat, i: Expr, panel: Flat, j: Expr) -> Expr:
        quad = T.reinterpret("int32", a.load(i, 4))
        return product.emit(acc, T.reinterpret("int8x16", splat(quad, 4)), panel.load(j, 16))

    def by_lane(acc: Expr, a: Expr, i: int, w: Expr) -> Expr:
        return product.emit(acc, T.reinterpret("int8x16", lane(T.reinterpret("int32x4", a), i, 4)), w)

    span = by_element(Broadcast(step, 4, 4), 4, 16, by_lane)
    span = replace(span, assembly=LaneProduct(_SDOT, "i32", isa.paired_loads))
    return Micro("sdot", "int8", "int8", "int32", 4, 4, isa.vector_registers, product, span, narrow=neon.quantize)


def _smmla(isa: Isa) -> Micro:
    """smmla: two rows of eight s8 by two channels of eight, into int32; sdot for words."""
    words = _sdot(isa)
    whole = Product("int8x16", 8, lambda acc, a, w: intrinsic("int32x4", "llvm.aarch64.neon.smmla", acc, a, w))
    return replace(words, name="smmla", kr=8, span=Squares(words.single, 8, whole.emit), whole=whole)


def _neon(isa: Isa) -> Micro:
    """smull, smlal and sadalp: products in int16, in pairs, added to int32 in pairs; mla for words of one byte."""
    words = _widening(isa)
    if isa.family is Family.AARCH64:
        span, narrow = Pairs(words.single, neon.add_pairs, neon.add_neighbours), neon.quantize
    else:
        span, narrow = Pairs(words.single, neon32.add_pairs, neon32.add_neighbours, twice=False), None
    whole = Product("int8x16", 4, span.product)
    return replace(words, name="neon", a_dtype="int8", kr=8, span=span, narrow=narrow, whole=whole)


def _neon_words(isa: Isa) -> Micro:
    """smlal by element (vmlal of 32-bit ARM): int16 x int16 into int32. Weights are widened eight at a time."""
    words = _widening(isa)

    def load_w(w: Flat, at: Expr, count: int) -> list[Expr]:
        wide = T.Bind(cast(w.load(at, 4 * count), "int16", 4 * count))
        return [shuffle([wide], range(4 * v, 4 * v + 4)) for v in range(count)]

    def product(acc: Expr, a: Expr, i: int, w: Expr) -> Expr:
        return acc + cast(lane(a, i, 4), "int32", 4) * cast(w, "int32", 4)

    span = Lanes(words.single, 8, 8, lambda x, row: x.load(row, 8), load_w, product, group=2, unpacks=1)
    return replace(words, name="neon", span=span, registers=isa.vector_registers)


def _widening(isa: Isa) -> Micro:
    """int16 x int16 into int32 in plain vector code."""
    lanes = max(isa.vector_bits // 32, 4)
    product = multiply_add("int32", lanes)

    def step(acc: Expr, a: Flat, i: Expr, panel: Flat, j: Expr) -> Expr:
        wide = cast(cast(panel.load(j, lanes), "int16", lanes), "int32", lanes)
        return product.emit(acc, splat(cast(a.load(i), "int32", 1), lanes), wide)

    registers = max(isa.vector_registers, 16)
    span = Broadcast(step, lanes, 1, w_unpacks=1, temporaries=1)
    return Micro("generic", "int16", "int8", "int32", lanes, 1, registers, product, span)
