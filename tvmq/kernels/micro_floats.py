"""The float rows of the micro-kernel table: float32, bfloat16 and float16 products, summed in float32."""

from __future__ import annotations

from dataclasses import replace

from tvm.tirx.script.builder import ir as T

from tvmq.isa import Bf16, Isa
from tvmq.kernels import neon32
from tvmq.kernels.builder import BF16, FLOAT, FP16, Expr, Flat, external, number, splat
from tvmq.kernels.lane_loop import LaneProduct
from tvmq.kernels.micro import Micro, Product, by_element, has_neon32, multiply_add
from tvmq.kernels.spans import Broadcast, Lanes, lane
from tvmq.kernels.spans_folded import Halves, Squares
from tvmq.triple import Family

_FMLA = "fmla v{acc}.4s, v{w}.4s, v{a}.s[{lane}]"


def float_micro(isa: Isa) -> Micro:
    """float32: a broadcast, and a multiply and add that LLVM contracts where the machine can; NEON's by element."""
    lanes = max(isa.fp32_lanes, 4)

    product = multiply_add(FLOAT, lanes)

    def step(acc: Expr, a: Flat, i: Expr, panel: Flat, j: Expr) -> Expr:
        return product.emit(acc, splat(a.load(i), lanes), panel.load(j, lanes))

    single = Broadcast(step, lanes, 1)
    span: Broadcast | Lanes = single
    llvm, registers = "", max(isa.vector_registers, 16)
    if isa.family is Family.AARCH64:
        span = by_element(single, 4, 4, lambda acc, a, i, w: product.emit(acc, lane(a, i, lanes), w))
        span = replace(span, assembly=LaneProduct(_FMLA, "float", isa.paired_loads))
    elif has_neon32(isa):
        span, llvm = by_element(single, 4, 4, neon32.multiply_add), neon32.LLVM
        # LLVM does not know how long its instructions take, and loads ahead into what is free.
        registers -= 3
    return Micro(_float_name(isa), FLOAT, FLOAT, FLOAT, lanes, 1, registers, product, span, llvm)


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
    product = multiply_add(FLOAT, lanes)

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
    product = multiply_add(FLOAT, 8)

    def step(acc: Expr, a: Flat, i: Expr, panel: Flat, j: Expr) -> Expr:
        return product.emit(acc, splat(a.load(i), 8), panel.load(j, 8))

    single = Broadcast(step, 8, 1, products=2, a_unpacks=1, w_unpacks=2, temporaries=3)
    whole = multiply_add(FP16, 8)
    return Micro("neonfp16", FP16, FP16, FLOAT, 8, 1, isa.vector_registers, product, Halves(single), whole=whole)


def _float_name(isa: Isa) -> str:
    if isa.family.value == "x86":
        return {512: "avx512", 256: "avx2" if isa.fma else "avx"}.get(isa.vector_bits, "sse")
    return "neon" if isa.vector_bits == 128 and isa.family.value in ("aarch64", "arm") else "generic"
