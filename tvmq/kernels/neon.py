"""64-bit NEON: sums of pairs of products, and what its vector instructions do to the end of an integer epilogue."""

from __future__ import annotations

from tvm.tirx.script.builder import ir as T

from tvmq import ops
from tvmq.kernels.builder import Expr, intrinsic, joined, number, shuffle

# Lanes of int8 that one narrowing makes.
LANES = 8


def add_pairs(sums: Expr, products: Expr) -> Expr:
    """Pairs of eight int16 added to four int32: sadalp."""
    return sums + intrinsic("int32x4", "llvm.aarch64.neon.saddlp", products)


def add_neighbours(low: Expr, high: Expr) -> Expr:
    """Sums of neighbours of two vectors of four int32, as one."""
    return intrinsic("int32x4", "llvm.aarch64.neon.addp", low, high)


def quantize(value: Expr, step: ops.Quantize, lanes: int) -> Expr:
    """`clip(nearbyint(value) + zero_point, qmin, qmax)` of `lanes` float32, a multiple of 8, as int8.

    fcvtns rounds half to even and saturates, sqxtn saturates twice, and the zero point is added between with
    saturation: what was out of range stays out of range, so that the clip is where the last narrowing puts it.
    """
    value = T.Bind(value)
    halves = [_narrowed(value, first, step.zero_point) for first in range(0, lanes, LANES)]
    value = joined(halves, LANES)
    if step.qmin > -128:
        value = T.max(value, number(step.qmin, "int8", lanes))
    return value if step.qmax == 127 else T.min(value, number(step.qmax, "int8", lanes))


def _narrowed(value: Expr, first: int, zero_point: int) -> Expr:
    """8 lanes of `value` from `first` on."""
    parts = [shuffle([value], range(at, at + 4)) for at in (first, first + 4)]
    integers = [intrinsic("int32x4", "llvm.aarch64.neon.fcvtns", part) for part in parts]
    short = joined([intrinsic("int16x4", "llvm.aarch64.neon.sqxtn", part) for part in integers], 4)
    if zero_point:
        short = intrinsic("int16x8", "llvm.sadd.sat", short, number(zero_point, "int16", LANES))
    return intrinsic("int8x8", "llvm.aarch64.neon.sqxtn", short)
