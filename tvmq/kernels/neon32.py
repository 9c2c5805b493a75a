"""32-bit NEON: instructions that LLVM calls differently than 64-bit ones, or does not choose by itself."""

from __future__ import annotations

from tvm.tirx.script.builder import ir as T

from tvmq.kernels.builder import Expr, external, intrinsic, joined, shuffle

# Lanes of a register of 128 bits, and the halves of it, registers too, that hold them.
_LANES = 4
_HALVES = "eeff"
# LLVM would broadcast the lane and multiply, and on Cortex-A8 add apart: with fused products allowed it makes no vmla.
_MULTIPLY_ADD = """
define <4 x float> @tvmq_vmla_{lane}(<4 x float> %acc, <4 x float> %a, <4 x float> %w) alwaysinline {{
  %r = call <4 x float> asm "vmla.f32 ${{0:q}}, ${{3:q}}, ${{2:{half}}}[{index}]", "=w,0,t,w"(
    <4 x float> %acc, <4 x float> %a, <4 x float> %w)
  ret <4 x float> %r
}}
"""
LLVM = "".join(_MULTIPLY_ADD.format(lane=lane, half=_HALVES[lane], index=lane % 2) for lane in range(_LANES))
"""The LLVM module that `multiply_add` needs."""


def multiply_add(sums: Expr, a: Expr, lane: int, w: Expr) -> Expr:
    """`sums + a[lane] * w` of four float32, rounded twice: vmla by element."""
    return external("float32x4", f"tvmq_vmla_{lane}", sums, a, w)


def add_pairs(sums: Expr, products: Expr) -> Expr:
    """Pairs of eight int16 added to four int32: vpadal."""
    return intrinsic("int32x4", "llvm.arm.neon.vpadals", sums, products)


def add_neighbours(low: Expr, high: Expr) -> Expr:
    """Sums of neighbours of two vectors of four int32, as one: vpadd adds halves of registers."""
    both = [T.Bind(low), T.Bind(high)]
    sums = (intrinsic("int32x2", "llvm.arm.neon.vpadd", *(shuffle([v], (i, i + 1)) for i in (0, 2))) for v in both)
    return joined(list(sums), 2)
