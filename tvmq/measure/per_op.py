"""Where a bundle's time goes: its kernels beside what the machine can do, in multiply-accumulates and in bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tvm

from tvmq import ir, ops
from tvmq.deploy import bundle as bundles
from tvmq.deploy.bundle import Bundle
from tvmq.deploy.executor import Executor, OpTime
from tvmq.measure import peak
from tvmq.measure.instructions import table_rows
from tvmq.measure.report import figure, percent, table
from tvmq.target import Target

# TVM's kernel of embeddings.
_LOOKUPS = "tvm-take"
# Products with a constant matrix.
_PRODUCTS = ("matmul", "grouped_matmul", "asymmetric_matmul", "lookup_matmul")


@dataclass(frozen=True)
class Limits:
    """What the machine reaches on `threads` threads.

    gmacs: 10^9 multiply-accumulates a second of the target's rows of the kernel table ("s8-avx512vnni"), on registers.
    gbytes: 10^9 bytes a second read from memory.
    """

    threads: int
    gmacs: dict[str, float]
    gbytes: float

    def to_markdown(self) -> str:
        """One sentence."""
        rates = ", ".join(f"{name} {rate:.0f}" for name, rate in self.gmacs.items())
        return (
            f"Measured limits on {self.threads} threads, 10^9 multiply-accumulates a second: {rates}; memory "
            f"{self.gbytes:.0f} GB/s. Kernels are timed in repetition: what a cache holds exceeds the bandwidth.\n"
        )


@dataclass(frozen=True)
class KernelCost:
    """All calls of one kernel in an inference.

    ms: in sum; share: of all kernels' ms. macs: multiply-accumulates as the model states them (Winograd does fewer).
    peak_share: of the time that they would take at the instruction's peak; None where a kernel has no products, or is
    not tvmq's. bytes: operands and results, each once a call. memory_share: of the time that they would take at the
    memory's bandwidth; above 1 they came from a cache; None for lookups, which read little of their operands.
    """

    kernel: str
    calls: int
    ms: float
    share: float
    macs: int
    peak_share: float | None
    bytes: int
    memory_share: float | None


@dataclass(frozen=True)
class PerOp:
    """The kernels of one model in one precision, the most expensive first. kernels_ms: their sum, each timed alone."""

    model: str
    precision: str
    kernels_ms: float
    kernels: list[KernelCost]

    def to_markdown(self) -> str:
        """One row a kernel."""
        head = f"Where the time goes: {self.model} {self.precision}, {self.kernels_ms:.2f} ms in kernels timed alone\n"
        columns = ("kernel", "calls", "ms", "of the time", "M MAC", "of the peak", "MB", "of the bandwidth")
        cells = (
            (
                kernel.kernel,
                kernel.calls,
                figure(kernel.ms, 3),
                percent(kernel.share),
                figure(kernel.macs / 1e6, 1) if kernel.macs else "",
                percent(kernel.peak_share),
                figure(kernel.bytes / 1e6),
                percent(kernel.memory_share),
            )
            for kernel in self.kernels
        )
        return f"{head}\n{table(columns, cells)}"


def measure_limits(target: Target, threads: int, *, repeat: int = 10, stream_bytes: int | None = None) -> Limits:
    """The limits of this machine with `target`'s instructions."""
    gmacs = {}
    for row in table_rows(target.isa):
        instruction = peak.products(row, target, threads)
        gmacs["-".join(row.key)] = max(instruction() for _ in range(repeat)) / 1e9
    size = {} if stream_bytes is None else {"size": stream_bytes}
    return Limits(threads, gmacs, peak.bandwidth(target, threads, **size) / 1e9)


def profile(model: str, precision: str, executor: Executor, limits: Limits) -> PerOp:
    """The kernels of an executor's bundle, timed on its inputs."""
    times = executor.profile()
    rows = aggregate(times, macs_of(executor.bundle), limits)
    return PerOp(model, precision, sum(time.ms for time in times), rows)


def aggregate(times: Sequence[OpTime], macs: Mapping[str, int], limits: Limits) -> list[KernelCost]:
    """Calls of equal kernels in one row, the most expensive first. `macs`: of operators, by name."""
    total = sum(time.ms for time in times)
    calls: dict[str, list[OpTime]] = {}
    for time in times:
        calls.setdefault(time.kernel, []).append(time)
    rows = []
    for kernel, same in calls.items():
        ms, moved = sum(time.ms for time in same), sum(time.bytes for time in same)
        products, peak_rate = sum(macs.get(time.name, 0) for time in same), _peak_of(kernel, limits)
        peak_share = products / (peak_rate * ms * 1e6) if peak_rate and products else None
        memory_share = None if kernel.startswith(_LOOKUPS) else moved / (limits.gbytes * ms * 1e6)
        rows.append(KernelCost(kernel, len(same), ms, ms / total, products, peak_share, moved, memory_share))
    return sorted(rows, key=lambda row: -row.ms)


def _peak_of(kernel: str, limits: Limits) -> float | None:
    """The rate of the instruction in a kernel's name: "u8-s8-conv2d-13x32-avx512vnni" is made with "s8-avx512vnni"."""
    parts = re.fullmatch(r"\w+-(f32|bf16|f16|s8|w4|w8)-.*-(\w+)", kernel)
    if parts is None:
        return None
    # Depthwise and attention kernels on bfloat16 compute in float32, and so do weights of 4 and 8 bits.
    return limits.gmacs.get(f"{parts[1]}-{parts[2]}", limits.gmacs.get(f"f32-{parts[2]}"))


def macs_of(bundle: Bundle) -> dict[str, int]:
    """Multiply-accumulates of each operator of a bundle that has any, by its name."""
    ops.register()
    module = tvm.ir.load_json(bundle.members[bundles.ORACLE].decode())
    counts = {str(var.name): _macs(call) for var, call in ir.calls(module)}
    return {name: count for name, count in counts.items() if count}


def _macs(call: Any) -> int:
    kind = ir.op_name(call).removeprefix(ops.PREFIX)
    results = math.prod(ir.shape_of(call)) if kind in ("conv2d", *_PRODUCTS, "attention") else 0
    if kind == "conv2d":
        return results * math.prod(ir.shape_of(call.args[1])[1:])
    if kind in _PRODUCTS:
        return results * ir.shape_of(call.args[0])[-1]
    if kind == "attention":
        # Queries and keys are [N, S, heads, depth]: a score for each key, then a sum over the keys.
        return (math.prod(ir.shape_of(call.args[0])) + results) * ir.shape_of(call.args[1])[1]
    return 0
