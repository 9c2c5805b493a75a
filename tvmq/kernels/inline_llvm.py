"""Instructions that TensorIR has no words for, as functions of LLVM that kernels import: prefetches, bfloat16."""

from __future__ import annotations

import dataclasses

from tvm.tirx.script.builder import ir as T

from tvmq.isa import Isa
from tvmq.kernels.builder import BF16, Expr, Flat, external
from tvmq.triple import Family

# What brings a line into the first or second cache level. LLVM's own intrinsic counts as a store to anything.
_PREFETCH = {
    Family.X86: ("prefetcht0 ($0)", "prefetcht1 ($0)"),
    Family.AARCH64: ("prfm pldl1keep, [$0]", "prfm pldl2keep, [$0]"),
}
_PREFETCH_LLVM = """
define void @tvmq_prefetch_{level}(ptr %p) alwaysinline {{
  call void asm sideeffect "{instruction}", "r"(ptr %p) nounwind memory(none)
  ret void
}}
"""


def prefetch_llvm(family: Family) -> str:
    """The LLVM module that `prefetch` calls into; "" where there is no such instruction."""
    instructions = enumerate(_PREFETCH.get(family, ()), 1)
    return "".join(_PREFETCH_LLVM.format(level=level, instruction=text) for level, text in instructions)


def prefetch(flat: Flat, index: Expr, level: int) -> None:
    """Bring the cache line of the element at `index` into a cache level, 1 or 2. Needs `prefetch_llvm`.

    The element need not exist: a prefetch never faults.
    """
    T.evaluate(external("void", f"tvmq_prefetch_{level}", T.address_of(flat.buffer[index])))


_ROUNDING_LLVM = """
define <16 x i16> @tvmq_bf16_round(<16 x float> %x) alwaysinline {
  %rounded = call <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float> %x)
  %bits = bitcast <16 x bfloat> %rounded to <16 x i16>
  ret <16 x i16> %bits
}
declare <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float>)
"""


def rounding_llvm(isa: Isa) -> str:
    """The LLVM module that `rounded_by` needs; "" where no instruction rounds to bfloat16."""
    return _ROUNDING_LLVM if "avx512bf16" in isa.required_features else ""


def rounded_by(flat: Flat, llvm: str) -> Flat:
    """`flat` with stores that round by instruction, where there is one: denormal numbers become zeros."""
    return dataclasses.replace(flat, rounding="tvmq_bf16_round") if llvm and flat.dtype == BF16 else flat
