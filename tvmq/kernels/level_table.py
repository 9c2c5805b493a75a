"""16 numbers that the lowest 4 bits of words choose among: kept in registers where an instruction picks from there.

    AVX-512  vpermps, one register            AVX2  vpermps twice, the fourth bit picks
    AArch64  tbl, four registers of bytes     others  element by element, from memory

Each way takes words whose higher bits are anything: what was shifted down needs no mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from tvmq.isa import Isa
from tvmq.kernels.builder import Expr, Flat, external
from tvmq.triple import Family

ENTRIES = 16
_AVX512 = """
define <16 x float> @tvmq_level(<16 x i32> %at, <16 x float> %table) alwaysinline {
  %r = call <16 x float> @llvm.x86.avx512.permvar.sf.512(<16 x float> %table, <16 x i32> %at)
  ret <16 x float> %r
}
declare <16 x float> @llvm.x86.avx512.permvar.sf.512(<16 x float>, <16 x i32>)
"""
_AVX2 = """
define <8 x float> @tvmq_level(<8 x i32> %at, <8 x float> %lower, <8 x float> %upper) alwaysinline {
  %low = call <8 x float> @llvm.x86.avx2.permps(<8 x float> %lower, <8 x i32> %at)
  %high = call <8 x float> @llvm.x86.avx2.permps(<8 x float> %upper, <8 x i32> %at)
  %fourth = shl <8 x i32> %at, splat (i32 28)
  %picks = icmp slt <8 x i32> %fourth, zeroinitializer
  %r = select <8 x i1> %picks, <8 x float> %high, <8 x float> %low
  ret <8 x float> %r
}
declare <8 x float> @llvm.x86.avx2.permps(<8 x float>, <8 x i32>)
"""
# A lane's four bytes are those from 4 times its place on.
_AARCH64 = """
define <4 x float> @tvmq_level(
  <4 x i32> %at, <4 x float> %a, <4 x float> %b, <4 x float> %c, <4 x float> %d
) alwaysinline {
  %place = and <4 x i32> %at, splat (i32 15)
  %first = mul <4 x i32> %place, splat (i32 67372036)
  %words = add <4 x i32> %first, splat (i32 50462976)
  %bytes = bitcast <4 x i32> %words to <16 x i8>
  %a8 = bitcast <4 x float> %a to <16 x i8>
  %b8 = bitcast <4 x float> %b to <16 x i8>
  %c8 = bitcast <4 x float> %c to <16 x i8>
  %d8 = bitcast <4 x float> %d to <16 x i8>
  %found = call <16 x i8> @llvm.aarch64.neon.tbl4.v16i8(
    <16 x i8> %a8, <16 x i8> %b8, <16 x i8> %c8, <16 x i8> %d8, <16 x i8> %bytes
  )
  %r = bitcast <16 x i8> %found to <4 x float>
  ret <4 x float> %r
}
declare <16 x i8> @llvm.aarch64.neon.tbl4.v16i8(<16 x i8>, <16 x i8>, <16 x i8>, <16 x i8>, <16 x i8>)
"""
_ELEMENT = """
  %place{i} = extractelement <{lanes} x i32> %places, i32 {i}
  %from{i} = getelementptr float, ptr %table, i32 %place{i}
  %entry{i} = load float, ptr %from{i}
  %r{i} = insertelement <{lanes} x float> {before}, float %entry{i}, i32 {i}"""


@dataclass(frozen=True)
class LevelTable:
    """How an instruction set looks up `lanes` entries at once; llvm: the function that does. registers: that hold them.

    registers 0: the table stays in memory.
    """

    lanes: int
    registers: int
    llvm: str

    def hold(self, table: Flat, start: int) -> list[Expr]:
        """What `entries` takes of the table that begins at `start`, read once."""
        if not self.registers:
            return [T.address_of(table.buffer[tirx.const(start, "int32")])]
        places = (tirx.const(start + i * self.lanes, "int32") for i in range(self.registers))
        return [T.Bind(table.load(place, self.lanes)) for place in places]

    def entries(self, held: Sequence[Expr], words: Expr) -> Expr:
        """The entries that the lowest 4 bits of a vector of int32 words name, float32."""
        return external(f"float32x{self.lanes}", "tvmq_level", words, *held)


def level_table(isa: Isa, lanes: int) -> LevelTable:
    """The way of an instruction set, for vectors of `lanes` float32."""
    if lanes == ENTRIES and "avx512f" in isa.required_features:
        return LevelTable(lanes, 1, _AVX512)
    if lanes == ENTRIES // 2 and "avx2" in isa.required_features:
        return LevelTable(lanes, 2, _AVX2)
    if lanes == ENTRIES // 4 and isa.family is Family.AARCH64:
        return LevelTable(lanes, 4, _AARCH64)
    return LevelTable(lanes, 0, _from_memory(lanes))


def _from_memory(lanes: int) -> str:
    vector = f"<{lanes} x float>"
    before = ["poison", *(f"%r{i}" for i in range(lanes - 1))]
    steps = "".join(_ELEMENT.format(i=i, lanes=lanes, before=before[i]) for i in range(lanes))
    return f"""
define {vector} @tvmq_level(<{lanes} x i32> %at, ptr %table) alwaysinline {{
  %places = and <{lanes} x i32> %at, splat (i32 15){steps}
  ret {vector} %r{lanes - 1}
}}
"""
