"""The micro-kernel table: for each instruction set, the inner product step that a register tile repeats.

A step takes `kr` consecutive elements of a row of A, repeated in every lane, and `kr` times `lanes` elements of a
weight panel, and adds their products to `lanes` accumulators. Its plain meaning is the same for all rows of the table:

    acc[lane] += sum over i < kr of a[i] * w[lane, i]

exact in int32 for integers. `span` says how a register tile is multiplied with it. `Widened` rows read activations that
were widened to int16, with the zero point subtracted. bfloat16 rows sum float32 products in an order of the machine's;
their dot products take denormal numbers for zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy.typing as npt
from tvm.tirx.script.builder import ir as T

from tvmq import ops
from tvmq.isa import Bf16, Int8Dot, Isa
from tvmq.kernels import neon, neon32
from tvmq.kernels.builder import BF16, FLOAT, FP16, Expr, Flat, cast, external, intrinsic, number, shuffle, splat
from tvmq.kernels.lane_loop import LaneProduct
from tvmq.kernels.spans import Broadcast, Halves, Lanes, Pairs, Squares, Step, lane
from tvmq.triple import Family


@dataclass(frozen=True)
class Product:
    """A step's instruction on registers: `emit(acc, a, w)` adds to each lane `kr` products of a and w.

    dtype: of the vectors a and w, which are as wide as acc.
    """

    dtype: str
    kr: int
    emit: Callable[[Expr, Expr, Expr], Expr]


@dataclass(frozen=True)
class Micro:
    """One row of the table.

    a_dtype: of the activations it reads; "int16" ones are widened and centred first. w_dtype: of the packed weights.
    lanes: accumulators in a vector. kr: products a step sums. span: how a register
    tile does. registers: vector registers of that width. llvm: functions that `product` calls.
    narrow: how a multiple of 8 sums is quantized, where the machine has its own way. whole: the instruction of spans
    that do not multiply words.
    """

    name: str
    a_dtype: str
    w_dtype: str
    acc_dtype: str
    lanes: int
    kr: int
    registers: int
    product: Product
    span: Broadcast | Lanes | Halves | Pairs | Squares
    llvm: str = ""
    narrow: Callable[[Expr, ops.Quantize, int], Expr] | None = None
    whole: Product | None = None

    @property
    def instruction(self) -> Product:
        """What dense products are made of."""
        return self.whole or self.product

    @property
    def single(self) -> Broadcast:
        """How one word of A, `product.kr` elements, is multiplied with a vector of words."""
        return self.span if isinstance(self.span, Broadcast) else self.span.single

    @property
    def step(self) -> Step:
        """A step of one vector with one word of A."""
        return self.single.step

    def by_words(self) -> Micro:
        """The row for templates that multiply word by word."""
        return replace(self, kr=self.single.kr, span=self.single)

    def of_runs(self) -> Micro:
        """The row for templates whose runs are whole: itself where its span does them at once, else word by word."""
        return self if isinstance(self.span, Lanes) and self.span.assembly is not None else self.by_words()

    def exact_for(self, weight: npt.NDArray[Any]) -> Micro:
        """The row itself, or one that multiplies step by step, where sums of two products would not fit 16 bits."""
        if isinstance(self.span, Pairs) and weight.min(initial=0) == -128:
            return replace(self, span=replace(self.span, steps=1))
        return self

    @property
    def widened(self) -> bool:
        """Whether activations are widened to int16 and centred before the kernel."""
        return self.a_dtype == "int16"


_FMLA = "fmla v{acc}.4s, v{w}.4s, v{a}.s[{lane}]"
_SDOT = "sdot v{acc}.4s, v{w}.16b, v{a}.4b[{lane}]"


def float_micro(isa: Isa) -> Micro:
    """float32: a broadcast, and a multiply and add that LLVM contracts where the machine can; NEON's by element."""
    lanes = max(isa.fp32_lanes, 4)

    product = _multiply_add(FLOAT, lanes)

    def step(acc: Expr, a: Flat, i: Expr, panel: Flat, j: Expr) -> Expr:
        return product.emit(acc, splat(a.load(i), lanes), panel.load(j, lanes))

    single = Broadcast(step, lanes, 1)
    span: Broadcast | Lanes = single
    llvm, registers = "", max(isa.vector_registers, 16)
    if isa.family is Family.AARCH64:
        span = _by_element(single, 4, 4, lambda acc, a, i, w: product.emit(acc, lane(a, i, lanes), w))
        span = replace(span, assembly=LaneProduct(_FMLA, "float", isa.paired_loads))
    elif _has_neon32(isa):
        span, llvm = _by_element(single, 4, 4, neon32.multiply_add), neon32.LLVM
        # LLVM does not know how long its instructions take, and loads ahead into what is free.
        registers -= 3
    return Micro(_float_name(isa), FLOAT, FLOAT, FLOAT, lanes, 1, registers, product, span, llvm)


def _has_neon32(isa: Isa) -> bool:
    return isa.family is Family.ARM and isa.vector_bits == 128


def _by_element(single: Broadcast, steps: int, width: int, product: Callable[[Expr, Expr, int, Expr], Expr]) -> Lanes:
    """A span whose factors are stored as they are multiplied."""

    def load_w(w: Flat, at: Expr, count: int) -> list[Expr]:
        assert count == 1
        return [T.Bind(w.bits(at, single.lanes * single.kr))]

    return Lanes(single, steps, width, lambda x, row: x.bits(row, width), load_w, product)


def _multiply_add(dtype: str, lanes: int) -> Product:
    return Product(f"{dtype}x{lanes}", 1, lambda acc, a, w: acc + a * w)


def bf16_micro(isa: Isa) -> Micro:
    """The best bfloat16 step of an instruction set."""
    if "avx512bf16" in isa.required_features:
        return _bf16_dot("avx512bf16", "llvm.x86.avx512bf16.dpbf16ps.512", 16, isa)
    if isa.bf16 is Bf16.NEON and isa.family is Family.AARCH64:
        return _bfmmla(isa)
    return _bf16_pairs(isa)


# TVM has no bfloat16 vectors: the operands come as integers.
_DOT = """
define <{n} x float> @tvmq_bf16_{name}(<{n} x float> %acc, <{n} x i32> %a, <{n} x i32> %b) alwaysinline {{
  %x = bitcast <{n} x i32> %a to <{m} x bfloat>
  %y = bitcast <{n} x i32> %b to <{m} x bfloat>
  %r = call <{n} x float> @{call}(<{n} x float> %acc, <{m} x bfloat> %x, <{m} x bfloat> %y)
  ret <{n} x float> %r
}}
declare <{n} x float> @{call}(<{n} x float>, <{m} x bfloat>, <{m} x bfloat>)
"""


def _bf16_dot(name: str, call: str, lanes: int, isa: Isa) -> Micro:
    """vdpbf16ps and bfdot: pairs of bfloat16 products into float32."""
    vector = f"int32x{lanes}"
    product = Product(vector, 2, lambda acc, a, w: external(f"float32x{lanes}", "tvmq_bf16_dot", acc, a, w))

    def step(acc: Expr, a: Flat, i: Expr, panel: Flat, j: Expr) -> Expr:
        pairs = splat(T.reinterpret("int32", a.bits(i, 2)), lanes)
        return product.emit(acc, pairs, T.reinterpret(vector, panel.bits(j, 2 * lanes)))

    llvm = _DOT.format(name="dot", n=lanes, m=2 * lanes, call=call)
    span = Broadcast(step, lanes, 2)
    return Micro(name, BF16, BF16, FLOAT, lanes, 2, isa.vector_registers, product, span, llvm)


def _bfmmla(isa: Isa) -> Micro:
    """bfmmla: two rows of four bfloat16 by two channels of four, into float32; bfdot for words."""
    words = _bf16_dot("bfdot", "llvm.aarch64.neon.bfdot.v4f32.v8bf16", 4, isa)
    whole = Product("int32x4", 4, lambda acc, a, w: external("float32x4", "tvmq_bf16_square", acc, a, w))
    span = Squares(words.single, 4, lambda acc, *both: whole.emit(acc, *(T.reinterpret("int32x4", v) for v in both)))
    llvm = words.llvm + _DOT.format(name="square", n=4, m=8, call="llvm.aarch64.neon.bfmmla")
    return replace(words, name="bfmmla", kr=4, span=span, llvm=llvm, whole=whole)


def _bf16_pairs(isa: Isa) -> Micro:
    """Pairs of bfloat16 widened to float32, by a shift and by a mask, multiplied and added as `float_micro` does."""
    lanes = max(isa.fp32_lanes, 4)
    product = _multiply_add(FLOAT, lanes)

    def step(acc: Expr, a: Flat, i: Expr, panel: Flat, j: Expr) -> Expr:
        pairs = splat(T.reinterpret("uint32", a.bits(i, 2)), lanes)
        weights = T.reinterpret(f"uint32x{lanes}", panel.bits(j, 2 * lanes))
        for half in (_lower, _upper):
            acc = product.emit(acc, half(pairs, lanes), half(weights, lanes))
        return acc

    registers = max(isa.vector_registers, 16)
    span = Broadcast(step, lanes, 2, products=2, a_unpacks=2, w_unpacks=2, temporaries=4)
    return Micro(_float_name(isa), BF16, BF16, FLOAT, lanes, 2, registers, product, span)


def _lower(pairs: Expr, lanes: int) -> Expr:
    """The first bfloat16 of each pair in uint32, as float32."""
    return T.reinterpret(f"float32x{lanes}", pairs << number(16, "uint32", lanes))


def _upper(pairs: Expr, lanes: int) -> Expr:
    """The second."""
    return T.reinterpret(f"float32x{lanes}", pairs & number(0xFFFF0000, "uint32", lanes))


def fp16_micro(isa: Isa) -> Micro:
    """float16: sums of a few products in float16 where vectors multiply it; else widened, and multiplied as float32."""
    wide = float_micro(isa)
    if isa.family is Family.AARCH64 and isa.fp16:
        return _fp16_neon(isa)
    single = replace(wide.single, a_unpacks=1, w_unpacks=1, temporaries=1)
    return replace(wide, a_dtype=FP16, w_dtype=FP16, span=single, llvm="")


def _fp16_neon(isa: Isa) -> Micro:
    """fmla of 8 float16 by element; float32 for what is left of a run."""
    product = _multiply_add(FLOAT, 8)

    def step(acc: Expr, a: Flat, i: Expr, panel: Flat, j: Expr) -> Expr:
        return product.emit(acc, splat(a.load(i), 8), panel.load(j, 8))

    single = Broadcast(step, 8, 1, products=2, a_unpacks=1, w_unpacks=2, temporaries=3)
    whole = _multiply_add(FP16, 8)
    return Micro("neonfp16", FP16, FP16, FLOAT, 8, 1, isa.vector_registers, product, Halves(single), whole=whole)


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
    return _neon(isa) if _has_neon32(isa) else _widening(isa)


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
    return _neon_words(isa) if isa.family is Family.AARCH64 or _has_neon32(isa) else _widening(isa)


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

    span = _by_element(Broadcast(step, 4, 4), 4, 16, by_lane)
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
    product = _multiply_add("int32", lanes)

    def step(acc: Expr, a: Flat, i: Expr, panel: Flat, j: Expr) -> Expr:
        wide = cast(cast(panel.load(j, lanes), "int16", lanes), "int32", lanes)
        return product.emit(acc, splat(cast(a.load(i), "int32", 1), lanes), wide)

    registers = max(isa.vector_registers, 16)
    span = Broadcast(step, lanes, 1, w_unpacks=1, temporaries=1)
    return Micro("generic", "int16", "int8", "int32", lanes, 1, registers, product, span)


def _float_name(isa: Isa) -> str:
    if isa.family.value == "x86":
        return {512: "avx512", 256: "avx2" if isa.fma else "avx"}.get(isa.vector_bits, "sse")
    return "neon" if isa.vector_bits == 128 and isa.family.value in ("aarch64", "arm") else "generic"
