"""The machine that runs tvmq, as a Target: read from /proc, /sys and LLVM's name for the processor.

`detect` is a function of the two trees and a few values, so recorded machines serve as tests.
Kernel interfaces: Documentation/ABI/testing/sysfs-devices-system-cpu, Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tvmq import cpuinfo, llvm
from tvmq.cpuinfo import read_text
from tvmq.errors import TargetError
from tvmq.target import HOST, Target
from tvmq.triple import Family, parse_triple, triple_of

# What one core can count on where the kernel does not say (old device trees): the least of common Cortex-A boards,
# a Cortex-A53's 32 KiB L1 and its quarter of a 512 KiB L2.
_ASSUMED_L1D_KIB, _ASSUMED_L2_KIB = 32, 128

# Cores with at least this share of the greatest capacity are the big cluster. Linux device trees give Cortex-A55 beside
# big cores 427 to 530 of 1024 (mt8192.dtsi, rk3588-base.dtsi); big cores whose clocks differ a little stay together.
_BIG_SHARE = 0.75


def detect_host() -> Target:
    """This machine. Raises TargetError where it is not Linux on a known processor."""
    if sys.platform != "linux":
        raise TargetError("cannot detect this machine", expected="Linux", seen=sys.platform, hint="name a target")
    glibc = _glibc()
    return detect(
        Path("/proc"),
        Path("/sys"),
        triple=triple_of(cpuinfo.machine_family(), "gnu" if glibc else "musl"),
        cpu=llvm.host_cpu(),
        allowed=os.sched_getaffinity(0),
        glibc=glibc,
    )


def detect(proc: Path, sys_root: Path, *, triple: str, cpu: str, allowed: Iterable[int], glibc: str | None) -> Target:
    """The target of a machine with these /proc and /sys trees. Raises TargetError.

    `cpu`: LLVM's name for the processor; one it does not know for `triple` counts as generic. `allowed`: the logical
    processors that this process may run on. Of processors of several kinds the big cluster is described.
    """
    family = parse_triple(triple).family
    cpu = cpu if cpu in llvm.cpu_names(triple) else "generic"
    big = _big_cluster(sys_root, sorted(allowed))
    cores, cores_note = _cores(proc, sys_root, big)
    caches = _caches(sys_root, big[0])
    l2_shared_by = len(_physical(sys_root, caches[2].processors)) if 2 in caches else 1
    clock, clock_note = _clock_mhz(proc, sys_root, big)
    return Target(
        name=HOST,
        description=_model_name(proc, sys_root, family),
        triple=triple,
        cpu=cpu,
        features=_feature_changes(triple, cpu, cpuinfo.host_features(proc, family), family),
        cores=cores,
        l1d_kib=caches[1].kib if 1 in caches else _ASSUMED_L1D_KIB,
        l2_kib=_l2_kib(caches, l2_shared_by),
        l2_shared_by=l2_shared_by,
        l3_kib=caches[3].kib if 3 in caches else 0,
        clock_mhz=clock,
        memory_mib=_memory_mib(proc),
        glibc=glibc,
        notes=(
            ("cpu", "LLVM's host detection"),
            ("features", "what /proc/cpuinfo has besides, or lacks of, LLVM's model of the cpu"),
            ("cores", cores_note),
            ("l1d_kib", "/sys/devices/system/cpu" if 1 in caches else "assumed: the kernel does not say"),
            ("l2_kib", "/sys/devices/system/cpu" if 1 in caches else "assumed: the kernel does not say"),
            ("clock_mhz", clock_note),
        ),
    )


@dataclass(frozen=True)
class _Cache:
    kib: int
    processors: tuple[int, ...]


def _feature_changes(triple: str, cpu: str, seen: frozenset[str], family: Family) -> tuple[str, ...]:
    """What to add to and take from LLVM's model of `cpu` so that it is this machine: hypervisors mask features."""
    implied = llvm.cpu_features(triple, cpu)
    added = sorted((seen & llvm.known_features(triple)) - implied)
    removed = sorted((implied & cpuinfo.detectable(family)) - seen)
    # LLVM's own loop vectorizer stays on ymm for Intel; since VNNI (Cascade Lake, Ice Lake) zmm costs little clock.
    if "avx512vnni" in seen and "prefer-256-bit" in implied:
        removed.append("prefer-256-bit")
    return (*added, *(f"-{name}" for name in removed))


def _big_cluster(sys_root: Path, allowed: list[int]) -> list[int]:
    """The allowed processors without the little cores; all of them where the kernel gives no capacities."""
    capacity = {number: _whole(read_text(_cpu(sys_root, number) / "cpu_capacity")) or 0 for number in allowed}
    return [number for number in allowed if capacity[number] >= _BIG_SHARE * max(capacity.values())]


def _cores(proc: Path, sys_root: Path, processors: list[int]) -> tuple[int, str]:
    """Physical cores this process may fill, and why: hyper-threads count once, a cgroup's quota is a limit."""
    physical = len(_physical(sys_root, processors))
    quota = _cgroup_quota(proc, sys_root)
    if quota is not None and quota < physical:
        return max(1, int(quota)), f"cgroup CPU quota of {quota:g}; {physical} physical cores allowed"
    return physical, "physical cores this process may run on, hyper-threads counted once"


def _physical(sys_root: Path, processors: Iterable[int]) -> set[tuple[int, ...]]:
    """One entry a physical core: the logical processors that share it."""
    return {_siblings(sys_root, number) or (number,) for number in processors}


def _siblings(sys_root: Path, number: int) -> tuple[int, ...]:
    topology = _cpu(sys_root, number) / "topology"
    # The second is the name that kernels before 5.2 have alone.
    return _cpu_list(read_text(topology / "core_cpus_list") or read_text(topology / "thread_siblings_list"))


def _cgroup_quota(proc: Path, sys_root: Path) -> float | None:
    """Processors' worth of time that the control groups grant, the least on the way up; None: no limit."""
    quotas = []
    for line in read_text(proc / "self" / "cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            quotas += _quotas_above(sys_root, ("", "unified"), path, _quota_v2)
        elif "cpu" in controllers.split(","):
            quotas += _quotas_above(sys_root, ("cpu", "cpu,cpuacct"), path, _quota_v1)
    return min(quotas, default=None)


def _quotas_above(
    sys_root: Path, mounts: tuple[str, ...], path: str, quota: Callable[[Path], float | None]
) -> list[float]:
    # A container may not see its own path, only the root it was given: so every level up to the mount is tried.
    inside = Path(path.lstrip("/"))
    levels = [sys_root / "fs" / "cgroup" / mount / part for mount in mounts for part in (inside, *inside.parents)]
    return [value for value in map(quota, levels) if value is not None]


def _quota_v2(folder: Path) -> float | None:
    words = read_text(folder / "cpu.max").split()
    return _ratio(words[0], words[1]) if len(words) == 2 else None


def _quota_v1(folder: Path) -> float | None:
    return _ratio(read_text(folder / "cpu.cfs_quota_us"), read_text(folder / "cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> float | None:
    numerator, denominator = _whole(quota), _whole(period)
    return numerator / denominator if numerator and denominator else None


def _caches(sys_root: Path, number: int) -> dict[int, _Cache]:
    """Level -> the data or unified cache of one processor, those whose size the kernel gives."""
    found = {}
    for folder in sorted((_cpu(sys_root, number) / "cache").glob("index*")):
        level, kib = _whole(read_text(folder / "level")), _kib(read_text(folder / "size"))
        if level and kib and read_text(folder / "type") != "Instruction":
            found[level] = _Cache(kib, _cpu_list(read_text(folder / "shared_cpu_list")) or (number,))
    return found


def _l2_kib(caches: dict[int, _Cache], shared_by: int) -> int:
    if 2 in caches:
        return caches[2].kib // shared_by
    # An L1 without an L2 is a machine that has none; neither is a kernel that does not say.
    return 0 if 1 in caches else _ASSUMED_L2_KIB


def _clock_mhz(proc: Path, sys_root: Path, processors: list[int]) -> tuple[int | None, str]:
    khz = _whole(read_text(_cpu(sys_root, processors[0]) / "cpufreq" / "cpuinfo_max_freq"))
    if khz:
        return khz // 1000, "cpuinfo_max_freq"
    now = [float(value) for value in cpuinfo.cpuinfo_values(read_text(proc / "cpuinfo"), "cpu MHz")]
    return (round(max(now)), "the present clock in /proc/cpuinfo") if now else (None, "the kernel does not say")


def _memory_mib(proc: Path) -> int | None:
    total = cpuinfo.cpuinfo_values(read_text(proc / "meminfo"), "MemTotal")
    kib = _whole(total[0].removesuffix("kB")) if total else None
    return kib // 1024 if kib else None


def _model_name(proc: Path, sys_root: Path, family: Family) -> str:
    """What the machine calls itself: the board where the device tree names it, else the processor."""
    board = read_text(sys_root / "firmware" / "devicetree" / "base" / "model")
    names = cpuinfo.cpuinfo_values(read_text(proc / "cpuinfo"), "model name")
    return board or next(filter(None, names), f"this machine ({family.value})")


def _glibc() -> str | None:
    """The version of the C library of this process, None where it is not glibc."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (ValueError, OSError):
        return None
    return ".".join(version.split(".")[:2]) if name == "glibc" else None


def _cpu(sys_root: Path, number: int) -> Path:
    return sys_root / "devices" / "system" / "cpu" / f"cpu{number}"


def _cpu_list(text: str) -> tuple[int, ...]:
    """ "0-2,8" -> (0, 1, 2, 8)."""
    ranges = [part.split("-") for part in text.split(",") if part]
    return tuple(number for ends in ranges for number in range(int(ends[0]), int(ends[-1]) + 1))


def _kib(text: str) -> int | None:
    units = {"K": 1, "M": 1024, "G": 1024 * 1024}
    value = _whole(text[:-1])
    return value * units[text[-1]] if value and text[-1] in units else None


def _whole(text: str) -> int | None:
    """The whole number that a file holds; None for "max", "-1" or nothing."""
    return int(text) if text.strip().isdigit() else None
