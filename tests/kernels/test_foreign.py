"""Kernels of 32-bit ARM and 64-bit RISC-V, called one by one under qemu-user: integers are the oracle's bit for bit.

TVM publishes no runtime for these machines, so no module runs there as a whole.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tvm
from foreign import UNTOUCHED, Calls, Machine, Memory, execute, find, link
from harness import Case, check, conv, dynamic, floats, integers, matmul, module_of, requantize, target_of, weights
from test_aarch64 import float_arithmetic, grouped_weights, row_scales
from test_aarch64 import kernels as many_kernels
from test_attention import attention, random
from test_elementwise import a_concat
from test_epilogue import a_map
from test_int16 import few
from test_pool import a_max, an_average
from tvm import tirx

from tvmq import ops
from tvmq.kernels import builder, pipeline
from tvmq.kernels.lower import lower
from tvmq.kernels.schedule import schedule
from tvmq.target import Target

# With the vectors that no shipped target has.
VECTORS = Target(
    "rv64gcv",
    "vectors of RISC-V",
    "riscv64-linux-gnu",
    "generic-rv64",
    1,
    32,
    256,
    features=tuple("mafdcv"),
    glibc="2.31",
)
# Shipped targets, and qemu's processors for them: of 32-bit ARM only the Cortex-A7 has fused multiply-add.
MACHINES = {
    "raspberry-pi-2": Machine("qemu-arm", "cortex-a7"),
    "beaglebone": Machine("qemu-arm", "cortex-a8"),
    "visionfive-2": Machine("qemu-riscv64", "sifive-u54"),
    VECTORS.name: Machine("qemu-riscv64", "rv64,v=true,vlen=128,vext_spec=v1.0"),
}
machines = pytest.mark.parametrize("target", MACHINES)


def described(name: str) -> Target:
    return VECTORS if name == VECTORS.name else target_of(name)


PADDED = (1, 1, 1, 1)
TO_INT8 = ops.Quantize(3, -128, 127, "int8")


def products() -> list[Case]:
    """Of int8: parts of tiles and of runs, taps in groups, the largest sums, an addend."""
    x, deep = integers((2, 4, 7, 5), "int8"), integers((1, 4, 5, 33), "int8")
    low, full = np.full((1, 2, 2, 64), -128, np.int8), dict(epilogue=([], ()), out_dtype="int32")
    operands, (bias, scale, last) = requantize(17, 45, "int8")
    added = (operands, (bias, scale, ops.Residual(0.37, 12), ops.Clip(-60.5, None), last))
    return [
        conv("3x3", x, weights((17, 3, 3, 5)), padding=PADDED, zero_point=7, epilogue=added, extra=(added_to(x, 17),)),
        conv("strided", x, weights((8, 3, 3, 5)), strides=(2, 3), padding=(0, 1, 2, 0), zero_point=-128),
        conv("1x1", deep, weights((31, 1, 1, 33)), zero_point=-5),
        conv("grouped", integers((1, 5, 5, 6), "int8"), weights((4, 3, 3, 3)), groups=2, zero_point=9),
        conv("least", low, np.full((9, 1, 1, 64), -128, np.int8), zero_point=127, **full),
        conv("most", low, np.full((9, 1, 1, 64), 127, np.int8), zero_point=127, **full),
        matmul("matmul", integers((13, 33), "int8"), weights((33, 17)), zero_point=100),
        matmul("row", integers((1, 64), "int8"), weights((64, 10)), zero_point=-100),
        dynamic("dynamic", floats((3, 33)), weights((33, 17)), dtype="int8"),
    ]


def added_to(x: np.ndarray, channels: int) -> np.ndarray:
    return integers((*x.shape[:3], channels), "int8", 8)


def layers() -> list[Case]:
    """Of int8: depthwise, pools, maps, parts that are joined."""
    x, images = integers((2, 7, 6, 19), "int8"), integers((1, 5, 6, 8), "int8")
    rescale = (ops.Dequantize(0.37, 3), TO_INT8)
    return [
        conv("depthwise", x, weights((19, 3, 3, 1)), groups=19, strides=(2, 1), padding=(1, 0, 1, 2), zero_point=3),
        conv("depthwise8", images, weights((8, 5, 5, 1)), groups=8, padding=(2, 2, 2, 2), zero_point=-128),
        a_max(x, (3, 3), (2, 2), PADDED),
        an_average(x, (3, 3), (2, 2), PADDED, False, 7),
        a_map("fused", x, (ops.Dequantize(0.3, 3), ops.Residual(0.77, -8), TO_INT8), (), (x[::-1].copy(),)),
        a_map("looked_up", x, (ops.Dequantize(0.047, 3), ops.Activate("silu"), ops.Multiply(77.7), TO_INT8)),
        a_concat([images, integers((1, 5, 6, 3), "int8", 1)], [rescale, ()], 3),
    ]


def of_floats() -> list[Case]:
    x = floats((2, 4, 7, 5))
    silu = ([], (ops.Activate("silu"),))
    return [
        conv("f3x3", x, floats((17, 3, 3, 5)), padding=PADDED),
        conv("f1x1", floats((1, 4, 5, 33)), floats((31, 1, 1, 33)), epilogue=silu),
        conv("fdepthwise", floats((1, 6, 7, 9)), floats((9, 3, 3, 1)), groups=9, padding=PADDED),
        matmul("fmatmul", floats((13, 33)), floats((33, 17))),
        matmul("frow", floats((1, 64)), floats((64, 10))),
        a_max(x, (3, 2), (2, 1), PADDED),
        an_average(x, (3, 3), (2, 2), PADDED, True, 0),
        a_map("quantized", x, (ops.Multiply(50.0), TO_INT8)),
        attention(*random(5, 6, 7, 3)),
    ]


@pytest.mark.emulated
@machines
def test_kernels_are_the_oracle(target: str) -> None:
    """All kinds of kernels on one machine a family; the others differ in products only."""
    others = layers() if target in ("raspberry-pi-2", "visionfive-2") else []
    check([*products(), *of_floats(), *others], described(target), MACHINES[target])


@pytest.mark.emulated
@pytest.mark.slow
@pytest.mark.parametrize("target", [name for name in MACHINES if name != VECTORS.name])
def test_many_kernels_are_the_oracle(target: str) -> None:
    """Not with RISC-V's vectors: qemu 7.2 ends itself (decode_save_opc) at an instruction of one of these kernels."""
    check([*layers(), *many_kernels(), *float_arithmetic(), *grouped_weights()], described(target), MACHINES[target])
    check([*row_scales(), *few()], described(target), MACHINES[target], exact=True)


@pytest.mark.emulated
def test_a_wrong_shape_is_refused_by_the_kernel_s_own_checks(tmp_path: Path) -> None:
    """Which shows that the kernels are called as TVM's runtime does."""
    target, machine = target_of("raspberry-pi-2"), MACHINES["raspberry-pi-2"]
    emulator = find(machine.emulator)
    module = schedule(lower(module_of([a_map("m", floats((3, 8)), (ops.Multiply(2.0),))]), target).module, target)
    calls = Calls(module, [floats((3, 8))])
    ((name, (x, out)),) = calls.calls
    program = link({name: module[name]}, target, tmp_path)
    calls.calls = [(name, [dataclasses.replace(x, shape=(3, 7)), out])]
    with pytest.raises(AssertionError, match=r"1: .*p0.*shape"):
        execute([emulator, "-cpu", machine.cpu, str(program)], [name], calls)


@pytest.mark.parametrize(
    ("case", "instructions"),
    [
        (lambda: matmul("m", floats((13, 32)), floats((32, 17))), r"vmla\.f32\s+q\d+, q\d+, d\d+\[1\]"),
        (lambda: matmul("m", integers((13, 32), "int8"), weights((32, 17))), r"vpadal\.s16"),
    ],
    ids=["float", "int8"],
)
def test_the_instructions_are_in_the_code(case: Callable[[], Case], instructions: str) -> None:
    target = target_of("beaglebone")
    module = schedule(lower(module_of([case()]), target).module, target)
    kernels = {str(var.name_hint): f for var, f in module.functions.items() if isinstance(f, tirx.PrimFunc)}
    made = tvm.compile(builder.module(kernels), target=target.tvm_target(), tir_pipeline=pipeline.register())
    code = made.mod.inspect_source("asm")
    assert re.search(instructions, code)
    assert not re.search(r"\bbl\s+(nearbyint|rint|round)", code), "a call for each element"


def test_writes_outside_of_results_are_seen() -> None:
    memory = Memory()
    given, made = memory.given(np.arange(3, dtype=np.int8)), memory._place((5,), np.dtype(np.float32))
    memory.written.append(made)
    after = bytearray(memory.content)
    after[made.start : made.stop] = bytes(20)
    memory.check(bytes(after))
    for place in (given.start, made.start - 1, made.stop):
        wrong = bytearray(after)
        wrong[place] ^= UNTOUCHED
        with pytest.raises(AssertionError, match=f"first at {place}"):
            memory.check(bytes(wrong))
