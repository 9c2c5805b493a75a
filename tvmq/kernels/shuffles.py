"""Vectors whose elements change places: square transposes in registers, and float pairs rounded into words."""

from __future__ import annotations

from collections.abc import Sequence

from tvm.tirx.script.builder import ir as T

from tvmq.isa import Isa
from tvmq.kernels.builder import Expr, cast, external, narrow, number

_ZIP = """
define <{n} x float> @tvmq_zip_{half}(<{n} x float> %a, <{n} x float> %b) alwaysinline {{
  %r = shufflevector <{n} x float> %a, <{n} x float> %b, <{n} x i32> <{order}>
  ret <{n} x float> %r
}}
"""
_PAIR_LANES = 16
_PAIR = """
define <16 x i32> @tvmq_bf16_pair(<16 x float> %low, <16 x float> %high) alwaysinline {
  %both = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float> %high, <16 x float> %low)
  %zipped = shufflevector <32 x bfloat> %both, <32 x bfloat> poison, <32 x i32> <ORDER>
  %words = bitcast <32 x bfloat> %zipped to <16 x i32>
  ret <16 x i32> %words
}
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)
"""


def zip_llvm(lanes: int) -> str:
    """The LLVM module that `transposed` needs for vectors of `lanes`."""
    return "".join(
        _ZIP.format(n=lanes, half=half, order=_alternating(start, lanes // 2, lanes))
        for half, start in (("low", 0), ("high", lanes // 2))
    )


def _alternating(start: int, count: int, distance: int) -> str:
    """Indices start, start + distance, start + 1, start + 1 + distance, ... as LLVM writes them."""
    return ", ".join(f"i32 {start + i + offset}" for i in range(count) for offset in (0, distance))


def transposed(rows: Sequence[Expr]) -> list[Expr]:
    """The columns of a square of float32: as many vectors as each has lanes, a power of two. Needs `zip_llvm`.

    Zipping the first half of the rows with the second doubles the distance at which a column's elements lie apart.
    """
    vectors, lanes = list(rows), len(rows)
    for _ in range(lanes.bit_length() - 1):
        pairs = zip(vectors[: lanes // 2], vectors[lanes // 2 :], strict=True)
        vectors = [
            T.Bind(external(f"float32x{lanes}", f"tvmq_zip_{half}", a, b)) for a, b in pairs for half in ("low", "high")
        ]
    return vectors


def pair_llvm(isa: Isa) -> str:
    """The LLVM module for `rounded_pair` of an instruction set; "" where it needs none."""
    if "avx512bf16" not in isa.required_features:
        return ""
    return _PAIR.replace("ORDER", _alternating(0, _PAIR_LANES, _PAIR_LANES))


def rounded_pair(low: Expr, high: Expr, lanes: int, llvm: str) -> Expr:
    """uint16 vector of 2 * lanes: bfloat16 bits of low and high in turns.

    llvm: of `pair_llvm`, whose instruction makes zeros of denormal numbers.
    """
    wide = f"uint16x{2 * lanes}"
    if llvm and lanes == _PAIR_LANES:
        return T.reinterpret(wide, external(f"int32x{lanes}", "tvmq_bf16_pair", low, high))
    halves = [cast(narrow(value, lanes), "uint32", lanes) for value in (low, high)]
    return T.reinterpret(wide, halves[0] | (halves[1] << number(16, "uint32", lanes)))
