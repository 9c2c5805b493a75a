"""What a target's instructions can do for tensor code, derived from its LLVM features here and nowhere else."""

from __future__ import annotations

import functools
from collections.abc import Set
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from tvmq import cpuinfo, llvm
from tvmq.triple import Family, parse_triple


class Int8Dot(Enum):
    """The best instruction for int8 dot products into int32, from none to matrix tiles."""

    NONE = "none"
    AVX2_PAIRS = "sse-avx2 pairs"
    """pmaddubsw: u8 x s8 pairs, int16 sums that saturate; then pmaddwd. SSSE3 has it on 128 bits, AVX2 on 256."""
    AVX512_PAIRS = "avx512 pairs"
    """The same on 512 bits (AVX512BW without VNNI)."""
    AVX_VNNI = "avx-vnni"
    """vpdpbusd on 256 bits: four u8 x s8 products added to int32 without saturation."""
    AVX512_VNNI = "avx512-vnni"
    """vpdpbusd on 512 bits."""
    AMX = "amx"
    """tdpbusd: 16x64 by 64x16 tiles of u8 x s8 into int32."""
    NEON = "neon"
    """smull and smlal: widening products in int16, pairwise adds into int32."""
    SDOT = "sdot"
    """sdot: four s8 x s8 products added to int32, 128 bits."""
    I8MM = "i8mm"
    """smmla: 2x8 by 8x2 of s8 x s8 into int32, 128 bits; usdot and sdot besides."""


class Bf16(Enum):
    """The best instruction for bfloat16 dot products into float32."""

    NONE = "none"
    AVX512 = "avx512-bf16"
    AMX = "amx-bf16"
    NEON = "neon-bf16"


@dataclass(frozen=True)
class Isa:
    """What the instructions of one target can do.

    `vector_bits` is the widest fixed vector that code should be written for: 32 where there is no vector unit; SVE
    counts as the 128 bits of NEON. `vector_registers` counts registers of that width. `fma`: float32 fused multiply-add
    in vectors. `fp16`: half-precision arithmetic, not only conversion. `paired_loads`: whether two vectors are as well
    loaded by one instruction as by two; processors that run in order wait for it. `required_features`: LLVM features,
    sorted, that code for this target may use and that a machine must have to load it.
    """

    family: Family
    vector_bits: int
    vector_registers: int
    fma: bool
    int8_dot: Int8Dot
    bf16: Bf16
    fp16: bool
    paired_loads: bool
    required_features: tuple[str, ...]

    @property
    def fp32_lanes(self) -> int:
        """float32 elements in one vector."""
        return self.vector_bits // 32

    @property
    def activation_dtype(self) -> str:
        """ "uint8" on x86, whose dot products are u8 x s8, else "int8"."""
        return "uint8" if self.family is Family.X86 else "int8"

    def to_dict(self) -> dict[str, object]:
        """JSON-able: enums as their values."""
        return {
            "family": self.family.value,
            "vector_bits": self.vector_bits,
            "vector_registers": self.vector_registers,
            "fp32_lanes": self.fp32_lanes,
            "fma": self.fma,
            "int8_dot": self.int8_dot.value,
            "bf16": self.bf16.value,
            "fp16": self.fp16,
            "paired_loads": self.paired_loads,
            "activation_dtype": self.activation_dtype,
            "required_features": list(self.required_features),
        }


@functools.cache
def derive_isa(triple: str, cpu: str, features: tuple[str, ...] = ()) -> Isa:
    """The Isa of LLVM's `cpu` with `features` ("name" or "-name") applied. The arguments must be valid."""
    return isa_of_features(parse_triple(triple).family, llvm.cpu_features(triple, cpu, features))


def isa_of_features(family: Family, features: Set[str]) -> Isa:
    """The Isa of a set of effective LLVM features: every implied one is a member."""
    bits, registers = _vectors(family, features)
    return Isa(
        family=family,
        vector_bits=bits,
        vector_registers=registers,
        fma=_fma(family, features),
        int8_dot=_first(_INT8_DOTS[family], features, Int8Dot.NONE),
        bf16=_first(_BF16S[family], features, Bf16.NONE),
        fp16=_FP16[family] in features,
        paired_loads=family is Family.AARCH64 and "slow-paired-128" not in features,
        required_features=tuple(sorted(features & cpuinfo.detectable(family))),
    )


# (feature, what it gives), the best first.
_INT8_DOTS: dict[Family, tuple[tuple[str, Int8Dot], ...]] = {
    Family.X86: (
        ("amx-int8", Int8Dot.AMX),
        ("avx512vnni", Int8Dot.AVX512_VNNI),
        ("avxvnni", Int8Dot.AVX_VNNI),
        ("avx512bw", Int8Dot.AVX512_PAIRS),
        ("ssse3", Int8Dot.AVX2_PAIRS),
    ),
    Family.AARCH64: (("i8mm", Int8Dot.I8MM), ("dotprod", Int8Dot.SDOT), ("neon", Int8Dot.NEON)),
    Family.ARM: (("i8mm", Int8Dot.I8MM), ("dotprod", Int8Dot.SDOT), ("neon", Int8Dot.NEON)),
    Family.RISCV64: (),
}
_BF16S: dict[Family, tuple[tuple[str, Bf16], ...]] = {
    Family.X86: (("amx-bf16", Bf16.AMX), ("avx512bf16", Bf16.AVX512)),
    Family.AARCH64: (("bf16", Bf16.NEON),),
    Family.ARM: (("bf16", Bf16.NEON),),
    Family.RISCV64: (),
}
_FP16 = {Family.X86: "avx512fp16", Family.AARCH64: "fullfp16", Family.ARM: "fullfp16", Family.RISCV64: "zvfh"}

# (feature, vector bits, registers of that width), the widest first. 32-bit ARM has 16 q registers where it has 32 d
# registers; RISC-V's V guarantees 128 bits (its zvl128b).
_VECTORS: dict[Family, tuple[tuple[str, int, int], ...]] = {
    Family.X86: (("avx512f", 512, 32), ("avx", 256, 16), ("sse2", 128, 16)),
    Family.AARCH64: (("neon", 128, 32),),
    Family.ARM: (("neon", 128, 16),),
    Family.RISCV64: (("v", 128, 32),),
}
_SCALAR_ONLY = (32, 16)  # one float32 at a time, in at least the 16 registers of VFPv3-D16


def _vectors(family: Family, features: Set[str]) -> tuple[int, int]:
    return next(((bits, count) for name, bits, count in _VECTORS[family] if name in features), _SCALAR_ONLY)


def _fma(family: Family, features: Set[str]) -> bool:
    # AArch64's vectors always have it; 32-bit ARM's since VFPv4 (Arm ARM); the AVX-512 foundation includes its own.
    names = {
        Family.X86: {"fma", "avx512f"},
        Family.AARCH64: {"neon"},
        Family.ARM: {"vfp4"},
        Family.RISCV64: {"f"},
    }
    return bool(names[family] & features)


_T = TypeVar("_T")


def _first(table: tuple[tuple[str, _T], ...], features: Set[str], otherwise: _T) -> _T:
    return next((value for name, value in table if name in features), otherwise)
