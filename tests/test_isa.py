import pytest

from tvmq.isa import Bf16, Int8Dot, derive_isa, isa_of_features
from tvmq.triple import Family

SSE = {"sse", "sse2", "sse3", "ssse3"}
AVX2 = SSE | {"avx", "avx2", "fma"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512vl"}


@pytest.mark.parametrize(
    ("family", "features", "dot", "bits", "registers"),
    [
        (Family.X86, {"sse", "sse2"}, Int8Dot.NONE, 128, 16),
        (Family.X86, SSE, Int8Dot.AVX2_PAIRS, 128, 16),
        (Family.X86, AVX2, Int8Dot.AVX2_PAIRS, 256, 16),
        (Family.X86, AVX2 | {"avxvnni"}, Int8Dot.AVX_VNNI, 256, 16),
        (Family.X86, AVX512, Int8Dot.AVX512_PAIRS, 512, 32),
        (Family.X86, AVX512 | {"avx512vnni"}, Int8Dot.AVX512_VNNI, 512, 32),
        (Family.X86, AVX512 | {"avx512vnni", "amx-tile", "amx-int8"}, Int8Dot.AMX, 512, 32),
        (Family.AARCH64, {"neon"}, Int8Dot.NEON, 128, 32),
        (Family.AARCH64, {"neon", "dotprod"}, Int8Dot.SDOT, 128, 32),
        (Family.AARCH64, {"neon", "dotprod", "i8mm", "sve"}, Int8Dot.I8MM, 128, 32),
        (Family.ARM, {"neon"}, Int8Dot.NEON, 128, 16),
        (Family.ARM, {"vfp2"}, Int8Dot.NONE, 32, 16),
        (Family.RISCV64, {"m", "f"}, Int8Dot.NONE, 32, 16),
        (Family.RISCV64, {"m", "f", "v"}, Int8Dot.NONE, 128, 32),
    ],
)
def test_ladder(family, features, dot, bits, registers):
    isa = isa_of_features(family, features)
    assert (isa.int8_dot, isa.vector_bits, isa.vector_registers) == (dot, bits, registers)
    assert isa.fp32_lanes == bits // 32


@pytest.mark.parametrize(
    ("family", "features", "bf16", "fp16"),
    [
        (Family.X86, AVX512, Bf16.NONE, False),
        (Family.X86, AVX512 | {"avx512bf16"}, Bf16.AVX512, False),
        (Family.X86, AVX512 | {"avx512bf16", "amx-bf16", "avx512fp16"}, Bf16.AMX, True),
        (Family.AARCH64, {"neon", "bf16", "fullfp16"}, Bf16.NEON, True),
        (Family.ARM, {"neon", "fp16"}, Bf16.NONE, False),  # conversions only
    ],
)
def test_halves(family, features, bf16, fp16):
    isa = isa_of_features(family, features)
    assert (isa.bf16, isa.fp16) == (bf16, fp16)


def test_fma_of_32_bit_arm_came_with_vfp4():
    assert not derive_isa("armv7l-linux-gnueabihf", "cortex-a8").fma
    assert derive_isa("armv7l-linux-gnueabihf", "cortex-a7").fma


def test_required_are_instructions_not_tuning():
    required = derive_isa("x86_64-linux-gnu", "x86-64-v4", ("avx512vnni",)).required_features
    assert {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"} <= set(required)
    assert not {"prefer-256-bit", "64bit", "fast-gather", "aes"} & set(required)
    assert list(required) == sorted(required)


def test_it_is_cached():
    assert derive_isa("aarch64-linux-gnu", "cortex-a72") is derive_isa("aarch64-linux-gnu", "cortex-a72")


def test_to_dict_is_plain():
    plain = derive_isa("aarch64-linux-gnu", "cortex-a76").to_dict()
    assert (plain["int8_dot"], plain["family"], plain["activation_dtype"]) == ("sdot", "aarch64", "int8")
