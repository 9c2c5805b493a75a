"""The LLVM features of the running machine, read from /proc: what decides whether a bundle may be loaded here.

The tables hold the features that compiled tensor code can depend on, and that the kernel reports. Left out on purpose:
cryptography, random numbers, cache and state control (only reached through intrinsics that tvmq never calls; virtual
machines hide them), and LLVM's tuning flags. Flag names: Linux arch/x86/include/asm/cpufeatures.h,
arch/arm64/include/uapi/asm/hwcap.h, arch/arm/include/uapi/asm/hwcap.h.
This module does not import TVM: it also serves boards that have only the runtime.
"""

from __future__ import annotations

import platform
import re
import struct
from pathlib import Path

from tvmq.errors import TargetError
from tvmq.triple import Family

# Linux flag -> LLVM feature, where the two differ; the names after it are the same in both.
_X86_RENAMED = {
    "pni": "sse3",
    "sse4_1": "sse4.1",
    "sse4_2": "sse4.2",
    "abm": "lzcnt",
    "bmi1": "bmi",
    "3dnowprefetch": "prfchw",
    "avx512_vbmi2": "avx512vbmi2",
    "avx512_vnni": "avx512vnni",
    "avx512_bitalg": "avx512bitalg",
    "avx512_vpopcntdq": "avx512vpopcntdq",
    "avx512_bf16": "avx512bf16",
    "avx512_fp16": "avx512fp16",
    "avx_vnni": "avxvnni",
    "avx_vnni_int8": "avxvnniint8",
    "avx_vnni_int16": "avxvnniint16",
    "avx_ifma": "avxifma",
    "avx_ne_convert": "avxneconvert",
    "amx_tile": "amx-tile",
    "amx_int8": "amx-int8",
    "amx_bf16": "amx-bf16",
    "amx_fp16": "amx-fp16",
    "amx_complex": "amx-complex",
}
_X86_SAME = """sse sse2 ssse3 sse4a popcnt movbe cmov cx16 bmi2 f16c fma avx avx2 gfni
    avx512f avx512cd avx512bw avx512dq avx512vl avx512ifma avx512vbmi"""
_RISCV_SAME = "m a f d c v zba zbb zbs zfh zvfh"

_TABLES: dict[Family, dict[str, tuple[str, ...]]] = {
    Family.X86: {flag: (name,) for flag, name in (_X86_RENAMED | {name: name for name in _X86_SAME.split()}).items()},
    Family.AARCH64: {
        "fp": ("fp-armv8",),
        "asimd": ("neon",),
        "atomics": ("lse",),
        "asimdhp": ("fullfp16",),
        "asimdrdm": ("rdm",),
        "jscvt": ("jsconv",),
        "fcma": ("complxnum",),
        "lrcpc": ("rcpc",),
        "ilrcpc": ("rcpc-immo",),
        "uscat": ("lse2",),
        "sha3": ("sha3",),  # LLVM turns a ^ b ^ c into its EOR3
        "asimddp": ("dotprod",),
        "asimdfhm": ("fp16fml",),
        "sve": ("sve",),
        "sve2": ("sve2",),
        "i8mm": ("i8mm",),
        "bf16": ("bf16",),
    },
    Family.ARM: {
        "vfp": ("vfp2",),
        "vfpv3": ("vfp3",),
        # VFPv4 is the first with half-precision conversions (Arm ARM, A2.6): LLVM's "fp16" on 32-bit ARM.
        "vfpv4": ("vfp4", "fp16"),
        "vfpd32": ("d32",),
        "neon": ("neon",),
        "idiva": ("hwdiv-arm",),
        "idivt": ("hwdiv",),
        "asimdhp": ("fullfp16",),
        "asimddp": ("dotprod",),
        "asimdfhm": ("fp16fml",),
        "asimdbf16": ("bf16",),
        "i8mm": ("i8mm",),
    },
    Family.RISCV64: {name: (name,) for name in _RISCV_SAME.split()},
}

# The bits of AT_HWCAP, and after them AT_HWCAP2, in order from bit 0.
_HWCAP_BITS = {
    Family.AARCH64: (
        """fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc
        dcpop sha3 sm3 sm4 asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs sb paca pacg""",
        """dcpodp sve2 sveaes svepmull svebitperm svesha3 svesm4 flagm2 frint svei8mm svef32mm svef64mm svebf16
        i8mm bf16""",
    ),
    Family.ARM: (
        """swp half thumb 26bit fastmult fpa vfp edsp java iwmmxt crunch thumbee neon vfpv3 vfpv3d16 tls
        vfpv4 idiva idivt vfpd32 lpae evtstrm fphp asimdhp asimddp asimdfhm asimdbf16 i8mm""",
        "",
    ),
}
_AT_HWCAP, _AT_HWCAP2 = 16, 26  # include/uapi/linux/auxvec.h

_FLAG_KEYS = {Family.X86: "flags", Family.AARCH64: "Features", Family.ARM: "Features", Family.RISCV64: "isa"}

_FAMILY_OF_MACHINE = {
    "x86_64": Family.X86,
    "amd64": Family.X86,
    "aarch64": Family.AARCH64,
    "arm64": Family.AARCH64,
    "armv7l": Family.ARM,
    "armv8l": Family.ARM,
    "riscv64": Family.RISCV64,
}


def detectable(family: Family) -> frozenset[str]:
    """The LLVM features that `host_features` can report on a machine of `family`."""
    return frozenset(name for names in _TABLES[family].values() for name in names)


def host_features(proc: Path = Path("/proc"), family: Family | None = None) -> frozenset[str]:
    """The LLVM features of this machine that compiled code can depend on; tuning flags are not among them.

    `proc` is where /proc is (recorded trees in tests); `family` None is that of this process. Raises TargetError where
    the machine does not say.
    """
    family = family or machine_family()
    flags = cpuinfo_flags(read_text(proc / "cpuinfo"), family) or _auxv_flags(proc, family)
    if not flags:
        where = proc / "cpuinfo"
        raise TargetError("cannot tell this machine's instructions", expected=f"{_FLAG_KEYS[family]!r} in {where}")
    return features_of_flags(flags, family)


def features_of_flags(flags: frozenset[str], family: Family) -> frozenset[str]:
    """Linux flag names -> LLVM feature names; flags that no compiled code depends on are dropped."""
    table = _TABLES[family]
    return frozenset(name for flag in flags for name in table.get(flag, ()))


def cpuinfo_flags(text: str, family: Family) -> frozenset[str]:
    """The flags that all processors in a /proc/cpuinfo have; empty where it is of another family."""
    lines = cpuinfo_values(text, _FLAG_KEYS[family])
    split = _riscv_extensions if family is Family.RISCV64 else lambda line: frozenset(line.split())
    return frozenset.intersection(*map(split, lines)) if lines else frozenset()


def cpuinfo_values(text: str, key: str) -> list[str]:
    """What /proc/cpuinfo says for `key`, one string a processor."""
    return [value.strip() for value in re.findall(rf"^{re.escape(key)}[ \t]*:(.*)$", text, re.MULTILINE)]


def machine_family() -> Family:
    """The family of this process: a 32-bit process on a 64-bit kernel is ARM. Raises TargetError."""
    family = _FAMILY_OF_MACHINE.get(platform.machine().lower())
    if family is None:
        known = ", ".join(_FAMILY_OF_MACHINE)
        raise TargetError("this machine is of an unknown kind", expected=known, seen=platform.machine() or "nothing")
    pointer_bytes = struct.calcsize("P")
    return Family.ARM if family is Family.AARCH64 and pointer_bytes == 4 else family


def read_text(path: Path) -> str:
    """The file's text, empty where there is none: kernels differ in which of these files they have."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").rstrip("\n\0")
    except OSError:
        return ""


def _riscv_extensions(isa: str) -> frozenset[str]:
    # "rv64imafdcv_zicsr_zba": single letters, then names after underscores; g stands for imafd.
    base, *named = isa.lower().split("_")
    letters = base.removeprefix("rv64").replace("g", "imafd")
    return frozenset(letters) | frozenset(named)


def _auxv_flags(proc: Path, family: Family) -> frozenset[str]:
    """The flags that the kernel gave this process. Under qemu-user /proc/cpuinfo is the host's, but this is right."""
    if family not in _HWCAP_BITS:
        return frozenset()
    try:
        raw = (proc / "self" / "auxv").read_bytes()
    except OSError:
        return frozenset()
    pair = struct.Struct("<QQ" if family is Family.AARCH64 else "<II")
    entries: dict[int, int] = dict(pair.iter_unpack(raw[: len(raw) // pair.size * pair.size]))
    first, second = _HWCAP_BITS[family]
    return _set_bits(entries.get(_AT_HWCAP, 0), first) | _set_bits(entries.get(_AT_HWCAP2, 0), second)


def _set_bits(value: int, names: str) -> frozenset[str]:
    return frozenset(name for bit, name in enumerate(names.split()) if value >> bit & 1)
