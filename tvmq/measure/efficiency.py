"""Micro-kernel efficiency: each row of the kernel table, on one thread, beside the measured peak of its instruction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tvmq.cpuinfo import host_features
from tvmq.detect import detect_host
from tvmq.kernels.lowering import SHORT
from tvmq.measure import peak
from tvmq.measure.instructions import Size, TableRow, table_rows
from tvmq.measure.report import figure, percent, table
from tvmq.target import Target
from tvmq.triple import Family

Progress = Callable[[str], None]
# All operands of the cube fit a second-level cache of 4 MiB in float32, and one of 1 MiB in int8.
CUBE: Size = (512, 512, 512)
SIZES: tuple[Size, ...] = (CUBE, (196, 256, 256), (784, 128, 256), (128, 384, 1536))


@dataclass(frozen=True)
class Level:
    """Instructions that rows of the table are for. `features`: of LLVM, besides those that all of a family have.

    `others`: features that have the same instructions in another encoding.
    """

    name: str
    features: tuple[str, ...]
    others: tuple[str, ...] = ()


_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_VNNI = (*_AVX512, "avx512vnni")
_LEVELS: dict[Family, tuple[Level, ...]] = {
    Family.X86: (
        Level("avx2", _AVX2),
        Level("avx-vnni", (*_AVX2, "avxvnni"), _VNNI),
        Level("avx512", _AVX512),
        Level("avx512-vnni", _VNNI),
        Level("avx512-bf16", (*_VNNI, "avx512bf16")),
        Level("amx", (*_VNNI, "avx512bf16", "amx-tile", "amx-int8", "amx-bf16")),
    ),
    Family.AARCH64: (
        Level("neon", ()),
        Level("dotprod", ("dotprod",)),
        Level("fp16", ("fullfp16",)),
        Level("bf16", ("bf16",)),
    ),
    Family.ARM: (Level("neon", ("neon",)),),
    Family.RISCV64: (Level("v", ("v",)),),
}
# LLVM's names for processors that have what all of a family have, and their triples.
_FIRST = {
    Family.X86: ("x86_64-linux-gnu", "x86-64"),
    Family.AARCH64: ("aarch64-linux-gnu", "generic"),
    Family.ARM: ("armv7l-linux-gnueabihf", "generic"),
    Family.RISCV64: ("riscv64-linux-gnu", "generic-rv64"),
}


@dataclass(frozen=True)
class Row:
    """One row of the kernel table at the size that it is best at, or why it was not measured.

    gops and peak_gops: 10^9 operations a second (a multiply-accumulate is two) of the kernel and of the instruction
    alone. share: of the two. cube_share: the same at 512 x 512 x 512.
    """

    kernel: str
    level: str
    size: Size | None = None
    gops: float | None = None
    peak_gops: float | None = None
    share: float | None = None
    cube_share: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Efficiency:
    """The table, and what it was measured on."""

    processor: str
    repeat: int
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """One row a kernel."""
        head = f"{self.processor}, one thread; the best of {self.repeat} repeats, kernel and peak in turns\n"
        columns = ("kernel", "level", "best size", "GOP/s", "peak GOP/s", "of the peak", "at 512x512x512", "note")
        cells = (
            (
                row.kernel,
                row.level,
                "x".join(map(str, row.size or ())),
                figure(row.gops, 1),
                figure(row.peak_gops, 1),
                percent(row.share),
                percent(row.cube_share),
                row.note,
            )
            for row in self.rows
        )
        return f"{head}\n{table(columns, cells)}"


def run(sizes: Sequence[Size] = SIZES, repeat: int = 20, progress: Progress | None = None) -> Efficiency:
    """Measure every row of the table that this machine can run; the others say what it lacks. Raises TargetError."""
    host = detect_host()
    rows = []
    for level, row in kernel_table(host.family):
        if progress:
            progress("-".join(row.key))
        rows.append(_row(level, row, host, sizes, repeat))
    return Efficiency(host.description, repeat, rows)


def kernel_table(family: Family) -> Iterator[tuple[Level, TableRow]]:
    """The kernel table of a family: each row at the first level that has it."""
    seen = set()
    for level in _LEVELS[family]:
        for row in table_rows(_target(family, level.features, 1).isa):
            if row.key not in seen:
                seen.add(row.key)
                yield level, row


def _target(family: Family, features: tuple[str, ...], l2_kib: int) -> Target:
    triple, cpu = _FIRST[family]
    return Target("level", "one level of a family", triple, cpu, 1, 32, l2_kib, features=features)


def _row(level: Level, row: TableRow, host: Target, sizes: Sequence[Size], repeat: int) -> Row:
    a_dtype, w_dtype, _ = row.dtypes
    name = f"{SHORT[a_dtype]}-{SHORT[w_dtype]}-matmul-{{}}{row.key[1]}"
    options = [level.features, *([level.others] if level.others else [])]
    targets = [replace(_target(host.family, features, host.l2_kib), l1d_kib=host.l1d_kib) for features in options]
    lacks = [target.missing_features(host_features()) for target in targets]
    if all(lacks):
        return Row(name.format(""), level.name, note=f"this machine lacks {', '.join(lacks[0])}")
    target = targets[lacks.index(())]
    instruction = peak.products(row, target)
    kernels = {size: peak.matmul(row, target, size) for size in sizes}
    best, rates = 0.0, dict.fromkeys(sizes, 0.0)
    for _ in range(repeat):
        best = max(best, instruction())
        rates = {size: max(rate, kernels[size][1]()) for size, rate in rates.items()}
    size = max(sizes, key=lambda size: rates[size])
    name = name.format(f"{kernels[size][0]}-")
    cube = rates[CUBE] / best if CUBE in rates else None
    return Row(name, level.name, size, 2e-9 * rates[size], 2e-9 * best, rates[size] / best, cube)
