"""LLVM triples: which machine family, C library and float ABI a target's code is for, and how zig spells it.

Checked here, before LLVM is asked anything: TVM 0.27 crashes the process when it is given an architecture LLVM lacks.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from tvmq.errors import TargetError, nearest


class Family(Enum):
    """The instruction set families that tvmq compiles for."""

    X86 = "x86"
    AARCH64 = "aarch64"
    ARM = "arm"
    RISCV64 = "riscv64"


_FAMILY_OF_ARCH = {
    "x86_64": Family.X86,
    "aarch64": Family.AARCH64,
    "arm": Family.ARM,
    "armv7": Family.ARM,
    "armv7a": Family.ARM,
    "armv7l": Family.ARM,
    "armv8l": Family.ARM,
    "riscv64": Family.RISCV64,
}

# 32-bit ARM names its float ABI in the environment; only the hard-float one is used by the boards' distributions.
_ENVIRONMENTS = {
    Family.X86: ("gnu", "musl"),
    Family.AARCH64: ("gnu", "musl"),
    Family.ARM: ("gnueabihf", "musleabihf"),
    Family.RISCV64: ("gnu", "musl"),
}

_ZIG_ARCH = {Family.X86: "x86_64", Family.AARCH64: "aarch64", Family.ARM: "arm", Family.RISCV64: "riscv64"}


@dataclass(frozen=True)
class Triple:
    """A Linux triple, taken apart. `environment` is one of "gnu", "musl", "gnueabihf", "musleabihf"."""

    family: Family
    environment: str

    @property
    def libc(self) -> str:
        """The C library: "gnu" or "musl"."""
        return "musl" if self.environment.startswith("musl") else "gnu"

    def zig(self, glibc: str | None) -> str:
        """The `-target` of `zig cc`, e.g. "aarch64-linux-gnu.2.28"; without `glibc` zig takes its own default."""
        version = f".{glibc}" if glibc and self.libc == "gnu" else ""
        return f"{_ZIG_ARCH[self.family]}-linux-{self.environment}{version}"


def parse_triple(text: str) -> Triple:
    """Take apart `arch-linux-environment` or `arch-vendor-linux-environment`. Raises TargetError."""
    parts = text.split("-")
    family = _FAMILY_OF_ARCH.get(parts[0])
    if family is None:
        known = ", ".join(_FAMILY_OF_ARCH)
        hint = nearest(parts[0], _FAMILY_OF_ARCH)
        raise TargetError(
            f"triple {text!r} has an unknown architecture", expected=known, seen=repr(parts[0]), hint=hint
        )
    environments = _ENVIRONMENTS[family]
    if len(parts) not in (3, 4) or parts[-2] != "linux" or parts[-1] not in environments:
        known = " or ".join(f"{parts[0]}-linux-{environment}" for environment in environments)
        raise TargetError(f"triple {text!r} is not one that tvmq links for", expected=known)
    return Triple(family, parts[-1])


def triple_of(family: Family, libc: str) -> str:
    """The triple of a Linux machine of `family` with the C library "gnu" or "musl"."""
    arch = "armv7l" if family is Family.ARM else _ZIG_ARCH[family]
    environment = next(name for name in _ENVIRONMENTS[family] if name.startswith(libc))
    return f"{arch}-linux-{environment}"
