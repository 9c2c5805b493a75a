"""Tables of 256 entries: what an epilogue makes of each 8-bit integer, computed once and looked up.

    out[i] = table[x[i]]

With AVX-512 VBMI 64 elements are looked up by two permutations of 128 bytes each, one of which an element's sign picks;
elsewhere element by element. The table is the oracle's, so that every machine agrees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx

from tvmq import ops
from tvmq.isa import Isa
from tvmq.kernels import builder
from tvmq.kernels.builder import Expr
from tvmq.kernels.elementwise import in_blocks
from tvmq.quantize import numerics

Array = npt.NDArray[Any]
ENTRIES = 256
_LANES = 64
_PERMUTE = """
define <64 x i8> @tvmq_lookup(<64 x i8> %x, <64 x i8> %a, <64 x i8> %b, <64 x i8> %c, <64 x i8> %d) alwaysinline {
  %low = call <64 x i8> @llvm.x86.avx512.vpermi2var.qi.512(<64 x i8> %a, <64 x i8> %x, <64 x i8> %b)
  %high = call <64 x i8> @llvm.x86.avx512.vpermi2var.qi.512(<64 x i8> %c, <64 x i8> %x, <64 x i8> %d)
  %upper = icmp slt <64 x i8> %x, zeroinitializer
  %r = select <64 x i1> %upper, <64 x i8> %high, <64 x i8> %low
  ret <64 x i8> %r
}
declare <64 x i8> @llvm.x86.avx512.vpermi2var.qi.512(<64 x i8>, <64 x i8>, <64 x i8>)
"""


def is_looked_up(call: Any, dtype: str) -> bool:
    """Whether a `tvmq.map` on `dtype` is from 8 bits to 8 bits, of nothing else, and more than a few instructions."""
    steps = ops.epilogue_of(call)
    if dtype not in numerics.INT_RANGE or not steps or not isinstance(steps[-1], ops.Quantize):
        return False
    if steps[-1].dtype not in numerics.INT_RANGE:
        return False
    activated = any(isinstance(step, ops.Activate) for step in steps)
    return activated and not any(isinstance(step, ops.OPERAND_STEPS) for step in steps)


def table(steps: ops.Epilogue, dtype: str) -> Array:
    """What `steps` make of each integer of `dtype`, in the order of its bits as uint8."""
    return np.asarray(numerics.epilogue(np.arange(ENTRIES, dtype=np.uint8).view(dtype), (), steps))


def permute_llvm(isa: Isa) -> str:
    """The LLVM module for `Lookup` of an instruction set; "" where it needs none."""
    return _PERMUTE if "avx512vbmi" in isa.required_features else ""


@dataclass(frozen=True)
class Lookup:
    """A table over a tensor; llvm: of `permute_llvm`."""

    shape: tuple[int, ...]
    dtype: str
    out_dtype: str
    llvm: str

    def function(self) -> Any:
        """The PrimFunc: (x, table, out)."""
        return builder.function(self._emit)

    def _emit(self, f: builder.Function) -> None:
        x, entries, out = f.arguments(
            (self.shape, self.dtype), ((ENTRIES,), self.out_dtype), (self.shape, self.out_dtype)
        )
        if self.llvm:
            f.import_llvm(self.llvm)

        def run(at: Expr, lanes: int) -> None:
            if lanes == _LANES and self.llvm:
                parts = [entries.load(tirx.const(start, "int32"), lanes) for start in range(0, ENTRIES, lanes)]
                out.store(
                    builder.external(f"{self.out_dtype}x{lanes}", "tvmq_lookup", x.load(at, lanes), *parts), at, lanes
                )
                return
            for i in range(lanes):
                index = tirx.Cast("uint8", x.load(at + i)) if self.dtype == "int8" else x.load(at + i)
                out.store(entries.load(tirx.Cast("int32", index)), at + i)

        in_blocks(math.prod(self.shape), _LANES, run)
