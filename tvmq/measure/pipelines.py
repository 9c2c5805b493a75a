"""The inner loops of ARM micro-kernels in models of processors (llvm-mca), beside their instruction alone.

There is no board to measure: LLVM's scheduling models tell how many cycles a loop takes where every load hits the first
cache level. Cycles are those of the steady state, from two numbers of iterations. The peak is that of the instruction's
units: what a model says of products that wait for nothing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tvm

from tvmq.errors import DeviceError
from tvmq.files import scratch_folder
from tvmq.kernels import builder
from tvmq.kernels.lowering import SHORT
from tvmq.measure.instructions import Matmul, Size, VectorRow, table_rows
from tvmq.measure.report import percent, table
from tvmq.target import Target

# 64-bit ARM processors that LLVM 19 has models of its own for, the oldest first. Its Cortex-A76 is
# modelled as a Cortex-A57: the Neoverse N1, the same core for servers, stands for it. With the flag of targets that run
# in order.
_IN_ORDER = ("slow-paired-128",)
PROCESSORS: dict[str, tuple[str, ...]] = {
    "cortex-a53": _IN_ORDER,
    "cortex-a55": _IN_ORDER,
    "cortex-a72": (),
    "neoverse-n1": (),
    "cortex-a510": _IN_ORDER,
    "neoverse-n2": (),
    "neoverse-v1": (),
}
# The least share of the peak that is wanted: the Neoverses as the Cortex-A76, which runs out of order.
GOALS = {"cortex-a55": 0.75, **dict.fromkeys(("neoverse-n1", "neoverse-n2", "neoverse-v1"), 0.85)}
# About the size of a product: its rows are made whole tiles.
SIZE: Size = (784, 128, 256)
TRIPLE = "aarch64-linux-gnu"
_ITERATIONS = (200, 400)
_COMMANDS = ("llvm-mca-19", "llvm-mca-20", "llvm-mca-21", "llvm-mca-22")
_TURNS = 100
_BRANCH = re.compile(r"\s+(b|cb|tb)[^/]*\s(\.L\w+)$")
# Multiply-accumulates of the instructions that kernels use on 128 bits; smull and smlal are those from bytes.
_MACS = {
    **dict.fromkeys(("fmla",), 4),
    **dict.fromkeys(("smull", "smull2", "smlal", "smlal2", "bfdot"), 8),
    **dict.fromkeys(("sdot", "bfmmla"), 16),
    **dict.fromkeys(("smmla",), 32),
}
# What adds such products up, and belongs to them.
_SUMS = ("sadalp",)


@dataclass(frozen=True)
class Row:
    """A kernel's inner loop: instructions and cycles of a turn, its multiply-accumulates, and the share of the peak.

    peak: multiply-accumulates a cycle of the instruction alone, where none waits for another.
    """

    processor: str
    kernel: str
    instructions: int
    cycles: float
    macs: int
    peak: float

    @property
    def share(self) -> float:
        """Of the peak."""
        return self.macs / self.cycles / self.peak

    @property
    def goal(self) -> float | None:
        """The share that is wanted of the processor, None where none was set."""
        return GOALS.get(self.processor)


@dataclass(frozen=True)
class Pipelines:
    """The table."""

    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"rows": [{**asdict(row), "share": row.share, "goal": row.goal} for row in self.rows]}

    def to_markdown(self) -> str:
        """One row a processor and kernel."""
        columns = (
            "processor",
            "kernel",
            "instructions",
            "cycles",
            "MACs",
            "MACs a cycle",
            "peak",
            "of the peak",
            "goal",
        )
        cells = (
            (
                row.processor,
                row.kernel,
                row.instructions,
                f"{row.cycles:.1f}",
                row.macs,
                f"{row.macs / row.cycles:.1f}",
                f"{row.peak:.1f}",
                percent(row.share),
                percent(row.goal),
            )
            for row in self.rows
        )
        return f"inner loops in LLVM's models of processors: no measurement\n\n{table(columns, cells)}"


def run(processors: Sequence[str] = tuple(PROCESSORS), progress: Callable[[str], None] | None = None) -> Pipelines:
    """The rows of each processor. Raises DeviceError without llvm-mca, TargetError for an unknown processor."""
    command = _mca()
    rows = []
    for name in processors:
        target = target_of(name)
        for row in table_rows(target.isa):
            if isinstance(row, VectorRow):
                if progress:
                    progress(f"{name} {'-'.join(row.key)}")
                rows.append(_row(command, target, row))
    return Pipelines(rows)


def target_of(processor: str) -> Target:
    """A target with one of the processors. Raises TargetError for one that LLVM does not know."""
    features = PROCESSORS.get(processor, ())
    return Target("pipeline", "a processor", TRIPLE, processor, 1, 32, 512, features=features)


def _row(command: str, target: Target, row: VectorRow) -> Row:
    m, matmul = row.micro, whole_tiles(row, target)
    alone, loop = (inner_loop(assembly(code, target)) for code in (row.loop(_TURNS, 1), matmul.function))
    peak = products(alone) / least_cycles(command, target, alone)
    name = f"{SHORT[m.a_dtype]}-{SHORT[m.w_dtype]}-matmul-{matmul.tile}-{m.name}"
    return Row(target.cpu, name, len(loop), cycles(command, target, loop), products(loop), peak)


def whole_tiles(row: VectorRow, target: Target) -> Matmul:
    """The template at about SIZE, without a remainder: its loop, unrolled, may have more products than that of tiles.

    Raises ValueError where each number of rows gets another tile.
    """
    rows, channels, depth = SIZE
    for _ in range(4):
        matmul = row.matmul((rows, channels, depth), target)
        pixels = int(matmul.tile.partition("x")[0])
        if rows % pixels == 0:
            return matmul
        rows -= rows % pixels
    raise ValueError(f"no tile divides {rows} rows")


def assembly(function: Any, target: Target) -> list[str]:
    """The lines of a PrimFunc's code."""
    compiled = tvm.compile(builder.module({"kernel": function}), target=target.tvm_target())
    with scratch_folder() as folder:
        path = Path(folder) / "kernel.s"
        compiled.mod.write_to_file(str(path), "s")
        return path.read_text(encoding="utf-8").splitlines()


def inner_loop(lines: Sequence[str]) -> list[str]:
    """The instructions of the innermost loop with the most products, its branch too. Raises ValueError for none."""
    loops = [loop for loop in _innermost(lines) if products(loop)]
    if not loops:
        raise ValueError("no loop with products")
    return max(loops, key=products)


def _innermost(lines: Sequence[str]) -> Iterator[list[str]]:
    """The instructions between each label and a branch back to it, where there is no other label between.

    Labels that nothing branches to, of debugging information, do not count.
    """
    targets = {found[2] for line in lines if (found := _BRANCH.match(line))}
    start, label = 0, ""
    for index, line in enumerate(lines):
        branch = _BRANCH.match(line)
        if (found := re.match(r"(\.L\w+):", line)) and found[1] in targets:
            start, label = index + 1, found[1]
        elif label and branch and branch[2] == label:
            texts = (text.split("//")[0].strip() for text in lines[start : index + 1])
            yield [text for text in texts if text and not text.startswith(".")]


def products(loop: Sequence[str]) -> int:
    """Multiply-accumulates of a loop: what its instructions say that they do."""
    return sum(_MACS.get(line.split()[0], 0) * (2 if line.startswith("fmla") and ".8h" in line else 1) for line in loop)


def cycles(command: str, target: Target, loop: Sequence[str]) -> float:
    """Cycles of a turn of `loop`, by llvm-mca. Raises DeviceError where it fails."""
    first, second = (
        _model([*_command(command, target), f"-iterations={n}"], loop, r"Total Cycles:\s+(\d+)") for n in _ITERATIONS
    )
    return (second - first) / (_ITERATIONS[1] - _ITERATIONS[0])


def least_cycles(command: str, target: Target, loop: Sequence[str]) -> float:
    """Cycles that the units need for the products of `loop`. Raises DeviceError where llvm-mca fails."""
    alone = [line for line in loop if line.split()[0] in (*_MACS, *_SUMS)]
    return _model(_command(command, target), alone, r"Block RThroughput:\s+([\d.]+)")


def _command(command: str, target: Target) -> list[str]:
    features = ",".join(f"+{name}" for name in target.features)
    return [command, f"-mtriple={target.triple}", f"-mcpu={target.cpu}", *([f"-mattr={features}"] if features else [])]


def _model(command: Sequence[str], lines: Sequence[str], figure: str) -> float:
    """A figure of llvm-mca's summary of instructions."""
    # A branch needs its label.
    text = "\n".join([*(f"{line.split()[-1]}:" for line in lines[-1:] if ".L" in line), *lines, ""])
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    found = re.search(figure, done.stdout)
    if found is None:
        raise DeviceError(f"{command[0]} cannot model {command[2]}", seen=done.stderr.strip().split("\n")[0])
    return float(found[1])


def _mca() -> str:
    for command in _COMMANDS:
        if found := shutil.which(command):
            return found
    hint = "on Debian: apt-get install llvm-19"
    raise DeviceError("cannot model pipelines", expected=_COMMANDS[0], seen="none on the PATH", hint=hint)
