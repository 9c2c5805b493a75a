"""Each micro-kernel step against its plain meaning, and which one an instruction set gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tvm
from harness import LEVELS, check, conv, integers, matmul, runnable, target_of, weights
from tvm.tirx.script.builder import ir as T

from tvmq.isa import Int8Dot
from tvmq.kernels import builder, micro_integers
from tvmq.kernels.micro import Micro
from tvmq.kernels.micro_floats import bf16_micro, float_micro
from tvmq.kernels.micro_integers import int8_micro
from tvmq.kernels.spans import Sums
from tvmq.target import Target

RUN_LEVELS = [name for name in LEVELS if name not in ("amx", "avx-vnni")]


def one_step(m: Micro) -> object:
    """(a, w, acc) -> acc after one step of one row and one vector of channels."""

    def body(f: builder.Function) -> None:
        a, w, acc = f.arguments(((m.kr,), m.a_dtype), ((m.lanes * m.kr,), m.w_dtype), ((m.lanes,), m.acc_dtype))
        if m.llvm:
            f.import_llvm(m.llvm)
        count = m.span.slots(1, 1)
        sums = Sums(f.registers(count * m.lanes, m.acc_dtype), m.lanes)
        for slot in range(count):
            sums.store(builder.number(0, m.acc_dtype, m.lanes), slot)
        m.span.multiply(sums, a, [T.int32(0)], w, T.int32(0), 1, 1)
        acc.store(acc.load(0, m.lanes) + m.span.collect(sums, 0, 0, 1), 0, m.lanes)

    return builder.function(body)


def run_step(m: Micro, target: Target, a: np.ndarray, w: np.ndarray, acc: np.ndarray) -> np.ndarray:
    compiled = tvm.compile(builder.module({"step": one_step(m)}), target=target.tvm_target())
    tensors = [tvm.runtime.tensor(array) for array in (a, w, acc)]
    compiled["step"](*tensors)
    return tensors[2].numpy()


def plain(m: Micro, a: np.ndarray, w: np.ndarray, acc: np.ndarray) -> np.ndarray:
    return acc + (w.reshape(m.lanes, m.kr).astype(np.int64) * a.astype(np.int64)).sum(axis=1).astype(acc.dtype)


@pytest.mark.parametrize("name", RUN_LEVELS)
def test_a_step_is_its_plain_meaning(name: str) -> None:
    target = runnable(name)
    m = int8_micro(target.isa)
    rng = np.random.default_rng(0)
    low, high = {"int16": (-255, 255), "uint8": (0, 255), "int8": (-128, 127)}[m.a_dtype]
    acc = rng.integers(-(2**30), 2**30, m.lanes).astype(np.int32)
    rows = [rng.integers(low, high + 1, m.kr), np.full(m.kr, low), np.full(m.kr, high)]
    panels = [rng.integers(-127, 128, m.lanes * m.kr), np.full(m.lanes * m.kr, -128), np.full(m.lanes * m.kr, 127)]
    for a, w in [(a.astype(m.a_dtype), w.astype(np.int8)) for a in rows for w in panels]:
        np.testing.assert_array_equal(run_step(m, target, a, w, acc), plain(m, a, w, acc))


@pytest.mark.parametrize("name", RUN_LEVELS)
def test_a_float_step_is_its_plain_meaning(name: str) -> None:
    target = runnable(name)
    m = float_micro(target.isa)
    # Small whole numbers: exact, fused or not.
    a, w, acc = (np.arange(n).astype(np.float32) - 3 for n in (1, m.lanes, m.lanes))
    np.testing.assert_array_equal(run_step(m, target, a, w, acc), acc + a * w)


@pytest.mark.parametrize("name", RUN_LEVELS)
def test_a_bfloat16_step_is_its_plain_meaning(name: str) -> None:
    target = runnable(name)
    m = bf16_micro(target.isa)
    # Small whole numbers: exact in every order.
    a, w, acc = (np.arange(n) - 3 for n in (m.kr, m.kr * m.lanes, m.lanes))
    a, w, acc = a.astype("bfloat16"), w.astype("bfloat16"), acc.astype(np.float32)
    products = w.reshape(m.lanes, m.kr).astype(np.float32) * a.astype(np.float32)
    got = run_step(m, target, a.view(np.uint16), w.view(np.uint16), acc)
    np.testing.assert_array_equal(got, acc + products.sum(axis=1))


@pytest.mark.parametrize(
    ("name", "int8", "bfloat16", "float32"),
    [
        ("sse2", "generic", "sse", "sse"),
        ("avx", "generic", "avx", "avx"),
        ("avx2", "avx2", "avx2", "avx2"),
        ("avx-vnni", "avxvnni", "avx2", "avx2"),
        ("avx512-pairs", "avx512bw", "avx512", "avx512"),
        ("avx512-vnni", "avx512vnni", "avx512", "avx512"),
        ("amx", "avx512vnni", "avx512bf16", "avx512"),
        ("raspberry-pi-3b", "neon", "neon", "neon"),
        ("raspberry-pi-4b", "neon", "neon", "neon"),
        ("raspberry-pi-5", "sdot", "neon", "neon"),
        ("graviton3", "smmla", "bfmmla", "neon"),
        ("raspberry-pi-2", "neon", "neon", "neon"),
    ],
)
def test_the_best_step_of_an_instruction_set(name: str, int8: str, bfloat16: str, float32: str) -> None:
    isa = target_of(name).isa
    assert (int8_micro(isa).name, bf16_micro(isa).name, float_micro(isa).name) == (int8, bfloat16, float32)


@pytest.mark.parametrize("name", LEVELS)
def test_the_levels_are_what_they_are_called(name: str) -> None:
    expected = LEVELS[name][1]
    assert expected is None or target_of(name).isa.int8_dot is expected


def test_a_processor_without_vectors_still_has_a_step() -> None:
    isa = Target("scalar", "no vectors", "riscv64-linux-gnu", "generic-rv64", 1, 32, 256).isa
    assert isa.int8_dot is Int8Dot.NONE
    assert int8_micro(isa).widened
    assert float_micro(isa).lanes >= 4
    assert bf16_micro(isa).lanes >= 4


def test_256_bit_vnni_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step of AVX-VNNI with its AVX-512VL spelling, for machines that have only that."""
    target = runnable("avx512-vnni")
    monkeypatch.setattr(
        micro_integers, "int8_micro", lambda isa: micro_integers._vnni("avxvnni", 256, target_of("avx-vnni").isa)
    )
    check(
        [
            conv("c", integers((2, 7, 9, 5), "uint8"), weights((19, 3, 3, 5)), padding=(1, 1, 1, 1), zero_point=77),
            matmul("m", integers((3, 13), "uint8"), weights((13, 33)), zero_point=200),
        ],
        target,
    )


@pytest.mark.parametrize(
    ("name", "micro", "instruction"),
    [
        ("avx2", int8_micro, "vpmaddwd"),
        ("avx-vnni", int8_micro, "vpdpbusd"),
        ("avx512-pairs", int8_micro, "vpmaddwd"),
        ("avx512-vnni", int8_micro, "vpdpbusd"),
        ("raspberry-pi-4b", int8_micro, "smull"),
        ("raspberry-pi-5", int8_micro, "sdot"),
        ("graviton3", int8_micro, "smmla"),
        ("raspberry-pi-2", int8_micro, "vpadal"),
        ("amx", bf16_micro, "vdpbf16ps"),
        ("graviton3", bf16_micro, "bfmmla"),
        ("raspberry-pi-4b", bf16_micro, "fmla"),
    ],
)
def test_the_instruction_is_in_the_code(name: str, micro: Callable, instruction: str, tmp_path: Path) -> None:
    target = target_of(name)
    compiled = tvm.compile(builder.module({"step": one_step(micro(target.isa))}), target=target.tvm_target())
    path = tmp_path / "step.s"
    compiled.mod.write_to_file(str(path), "s")
    assert instruction in path.read_text()
