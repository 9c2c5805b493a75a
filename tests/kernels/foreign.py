"""Kernels on machines that TVM publishes no runtime for: a small C program calls them one by one under qemu-user.

The program (`call_kernels.c`) is linked by zig with the kernels' object, for the target itself. All tensors lie in one
piece of memory, apart from each other, so that what a kernel writes outside of its results is seen.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from tvm import relax, tirx
from tvm_ffi import libinfo

from tvmq import ir
from tvmq.deploy.crosslink import zig_cc
from tvmq.kernels import builder, pipeline
from tvmq.kernels.lowering import Lowered
from tvmq.kernels.schedule import schedule
from tvmq.target import Target

Array = np.ndarray
PROGRAM = Path(__file__).with_name("call_kernels.c")
# DLPack's type codes, by NumPy's kinds.
CODES = {"i": 0, "u": 1, "f": 2}
# Tensors start at multiples of it, and are as far apart at least.
ALIGNMENT = 64
# What is between tensors, and in results that no kernel wrote.
UNTOUCHED = 0xA5
TIMEOUT_S = 120


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies in memory."""

    start: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def stop(self) -> int:
        return self.start + self.dtype.itemsize * int(np.prod(self.shape))

    def words(self) -> tuple[int, ...]:
        return CODES[self.dtype.kind], 8 * self.dtype.itemsize, self.start, len(self.shape), *self.shape

    def of(self, memory: bytes) -> Array:
        return np.frombuffer(memory[self.start : self.stop], self.dtype).reshape(self.shape)


@dataclass
class Memory:
    """All tensors. written: those that kernels make."""

    content: bytearray = field(default_factory=lambda: bytearray([UNTOUCHED] * ALIGNMENT))
    written: list[Tensor] = field(default_factory=list)

    def given(self, array: Array) -> Tensor:
        tensor = self._place(array.shape, array.dtype)
        self.content[tensor.start : tensor.stop] = np.ascontiguousarray(array).tobytes()
        return tensor

    def made(self, ty: Any) -> Any:
        """Room for a value of a Relax type: a tensor, or a list of them."""
        if isinstance(ty, relax.TupleType):
            return [self.made(part) for part in ty.fields]
        self.written.append(self._place(tuple(int(extent) for extent in ty.shape.values), np.dtype(str(ty.dtype))))
        return self.written[-1]

    def _place(self, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
        tensor = Tensor(len(self.content), shape, dtype)
        self.content += bytes([UNTOUCHED]) * (-(-tensor.stop // ALIGNMENT) * ALIGNMENT + ALIGNMENT - tensor.start)
        return tensor

    def check(self, after: bytes) -> None:
        """Nothing but results was written."""
        left = bytearray(after)
        for tensor in self.written:
            left[tensor.start : tensor.stop] = self.content[tensor.start : tensor.stop]
        differs = np.flatnonzero(np.frombuffer(left, np.uint8) != np.frombuffer(self.content, np.uint8))
        assert len(left) == len(self.content)
        assert not differs.size, f"{differs.size} bytes outside of results were written, first at {differs[0]}"


class Calls:
    """The calls of a scheduled module's main on `inputs`: (kernel, tensors) each, and what main returns."""

    def __init__(self, module: tvm.IRModule, inputs: Sequence[Array]) -> None:
        self.memory = Memory()
        self.calls: list[tuple[str, list[Tensor]]] = []
        params = ir.main(module).params
        self.values: dict[Any, Any] = {p: self.memory.given(x) for p, x in zip(params, inputs, strict=True)}
        for var, value in ir.bindings(module):
            self.values[var] = self._value(value)
        self.results: list[Tensor] = [self._value(output) for output in ir.outputs(module)]

    def _value(self, value: Any) -> Any:
        if isinstance(value, relax.Var):
            return self.values[value]
        if isinstance(value, relax.Tuple):
            return [self._value(part) for part in value.fields]
        if isinstance(value, relax.TupleGetItem):
            return self._value(value.tuple_value)[value.index]
        if ir.is_constant(value):
            return self.memory.given(ir.to_numpy(value))
        if ir.is_call(value, "reshape"):
            whole = self._value(value.args[0])
            return Tensor(whole.start, ir.shape_of(value), whole.dtype)
        assert ir.is_call(value, "call_tir"), f"no kernel: {value}"
        arguments = [self._value(arg) for arg in value.args[1].fields]
        made = self.memory.made(value.ty)
        results = made if isinstance(made, list) else [made]
        self.calls.append((str(value.args[0].name_hint), [*arguments, *results]))
        return made


@dataclass(frozen=True)
class Machine:
    """A processor of qemu-user. emulator: "qemu-arm"."""

    emulator: str
    cpu: str

    def run(self, lowered: Lowered, inputs: Sequence[Array], target: Target) -> list[Array]:
        """What main of a lowered module returns. See `find` for where the emulator is missing."""
        emulator = find(self.emulator)
        module = schedule(lowered.module, target)
        arrays = [*inputs, *lowered.parameters.values()]
        calls = Calls(module, [np.asarray(x, order="C") for x in arrays])
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            kernels = {str(var.name_hint): f for var, f in module.functions.items() if isinstance(f, tirx.PrimFunc)}
            program = link(kernels, target, folder)
            after = execute([emulator, "-cpu", self.cpu, str(program)], list(kernels), calls)
        calls.memory.check(after)
        return [result.of(after) for result in calls.results]


def find(emulator: str) -> str:
    """Where an emulator is. Without it the test is skipped, and fails on CI, which installs it."""
    found = shutil.which(emulator)
    if found is None:
        reason = f"no {emulator} on this machine; on Debian: apt-get install qemu-user"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return str(found)


def link(kernels: dict[str, Any], target: Target, folder: Path) -> Path:
    """The program that calls `kernels`."""
    objects, program = folder / "kernels.o", folder / "call_kernels"
    with tvm.transform.PassContext(opt_level=3):
        compiled = tvm.compile(builder.module(kernels), target=target.tvm_target(), tir_pipeline=pipeline.register())
    compiled.mod.write_to_file(str(objects), "o")
    include = [f"-I{path}" for path in (libinfo.find_include_path(), libinfo.find_dlpack_include_path())]
    names = "-DKERNELS=" + "".join(f"KERNEL({name})" for name in kernels)
    flags = ["-nostdlib", "-static", "-O2", "-fno-builtin", names, *include]
    zig_cc(target.zig_triple, [*flags, str(PROGRAM), str(objects), "-lcompiler_rt"], program)
    program.chmod(0o755)  # qemu exits with 1, and says nothing, where it is not
    return program


def execute(command: Sequence[str], kernels: Sequence[str], calls: Calls) -> bytes:
    """The memory after the calls."""
    numbers = [len(calls.calls), len(calls.memory.content)]
    for name, tensors in calls.calls:
        numbers += [kernels.index(name), len(tensors), *(word for tensor in tensors for word in tensor.words())]
    given = np.array(numbers, np.int64).tobytes() + calls.memory.content
    done = subprocess.run(command, input=given, capture_output=True, timeout=TIMEOUT_S, check=False)
    assert (done.returncode, done.stderr) == (0, b""), f"{done.returncode}: {done.stderr.decode()}"
    return done.stdout
