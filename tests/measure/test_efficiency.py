"""The kernel table as a benchmark: loops of an instruction alone, kernels beside them, and what a machine lacks."""

from __future__ import annotations

import numpy as np
import pytest
import tvm

from tvmq.cpuinfo import host_features
from tvmq.detect import detect_host
from tvmq.isa import Int8Dot
from tvmq.measure import efficiency, instructions, peak
from tvmq.measure.efficiency import Efficiency, Row, kernel_table
from tvmq.measure.instructions import VectorRow, table_rows
from tvmq.target import load_target
from tvmq.triple import Family

SMALL = (16, 32, 24)
HOST_ROWS = [row for row in table_rows(load_target("host").isa) if isinstance(row, VectorRow)]


def test_the_table_of_x86_has_every_micro_kernel_once():
    table = [(level.name, "-".join(row.key)) for level, row in kernel_table(Family.X86)]
    assert table == [
        ("avx2", "f32-avx2"),
        ("avx2", "s8-avx2"),
        ("avx2", "bf16-avx2"),
        ("avx2", "f16-avx2"),
        ("avx-vnni", "s8-avxvnni"),
        ("avx512", "f32-avx512"),
        ("avx512", "s8-avx512bw"),
        ("avx512", "bf16-avx512"),
        ("avx512", "f16-avx512"),
        ("avx512-vnni", "s8-avx512vnni"),
        ("avx512-bf16", "bf16-avx512bf16"),
        ("amx", "s8-amx"),
        ("amx", "bf16-amx"),
    ]


@pytest.mark.parametrize("family", Family)
def test_every_family_has_a_table(family):
    names = ["-".join(row.key) for _, row in kernel_table(family)]
    assert len(names) == len(set(names)) >= 3


@pytest.mark.parametrize("row", HOST_ROWS, ids=lambda row: "-".join(row.key))
def test_a_loop_runs_its_product_so_many_times(row):
    """In integers: the loop's sums are those of the plain meaning, n turns after n - 1."""
    target = detect_host()
    operands = [row.operands(2) for _ in range(2)]
    for turns, arrays in zip((3, 4), operands, strict=True):
        tensors = [tvm.runtime.tensor(array) for array in arrays]
        peak.build(row.loop(turns, 2), target, 2)(*tensors)
        arrays[-1][:] = tensors[-1].numpy()
    earlier, later = (arrays[-1] for arrays in operands)
    size = row.macs // row.micro.product.kr
    assert later.shape == (2 * size,)
    if row.micro.acc_dtype == "int32":
        assert np.array_equal(later, _turn(row, earlier, operands[0][0]))
    else:
        assert (later >= earlier).all()


def _turn(row: VectorRow, acc: np.ndarray, w: np.ndarray) -> np.ndarray:
    """One more turn: each accumulator times the factors, as the table's plain meaning has it."""
    m = row.micro
    a_dtype = {"uint8": np.uint8, "int16": np.int16, "int8": np.int8}.get(m.a_dtype, np.int32)
    w_dtype = {"int16": np.int16}.get(m.a_dtype, np.int8)
    if m.product.kr == 1:
        a_dtype = w_dtype = np.int32
    a = acc.view(a_dtype).reshape(-1, m.product.kr).astype(np.int64)
    b = np.tile(w, acc.size // w.size).view(w_dtype).reshape(-1, m.product.kr).astype(np.int64)
    return (acc + (a * b).sum(axis=1)).astype(np.int32)


@pytest.mark.parametrize("row", HOST_ROWS, ids=lambda row: "-".join(row.key))
def test_the_kernel_that_is_timed_computes_the_product(row):
    target = detect_host()
    kernel = row.matmul(SMALL, target)
    rows, channels, depth = SMALL
    rng = np.random.default_rng(0)
    x, w = (rng.integers(0, 5, shape).astype(np.float32) for shape in (kernel.x_shape, kernel.packing.shape))
    a_dtype, w_dtype, acc_dtype = row.dtypes
    arrays = x.astype(a_dtype), kernel.packing.pack(w.astype(w_dtype)), np.zeros(kernel.out_shape, acc_dtype)
    bits = {"bfloat16": np.uint16}
    tensors = [tvm.runtime.tensor(array.view(bits.get(str(array.dtype), array.dtype))) for array in arrays]
    peak.build(kernel.function, target, 1)(*tensors)
    want = x.reshape(rows, depth) @ w.reshape(channels, depth).T
    assert np.array_equal(tensors[-1].numpy().reshape(rows, channels), want)


def test_what_this_machine_can_run_is_measured_and_the_rest_says_why():
    found = efficiency.run([SMALL], repeat=1)
    assert len(found.rows) == len(list(kernel_table(detect_host().family)))
    measured = [row for row in found.rows if not row.note]
    assert measured
    for row in measured:
        assert row.size == SMALL
        assert row.gops > 0
        assert row.share == pytest.approx(row.gops / row.peak_gops)
        assert row.cube_share is None
    for row in found.rows:
        if row.note:
            assert row.note.startswith("this machine lacks ")
            assert row.gops is None


def test_another_encoding_of_the_same_instruction_counts():
    features = host_features()
    if "avx512vnni" not in features or "avxvnni" in features:
        pytest.skip("needs a machine with AVX512-VNNI and without AVX-VNNI")
    (level, row), *_ = [(level, row) for level, row in kernel_table(Family.X86) if level.name == "avx-vnni"]
    assert row.key == ("s8", "avxvnni")
    assert not efficiency._row(level, row, detect_host(), [SMALL], 1).note


def test_amx_is_a_row_where_the_target_has_it():
    isa = load_target("x86-64-amx").isa
    assert isa.int8_dot is Int8Dot.AMX
    assert [row.key[1] for row in table_rows(isa) if isinstance(row, instructions.TileRow)] == ["amx", "amx"]


def test_the_markdown_has_a_row_a_kernel():
    rows = [
        Row("f32-f32-matmul-13x32-avx512", "avx512", (512, 512, 512), 95.04, 100.0, 0.9504, 0.9504),
        Row("u8-s8-matmul-amx", "amx", note="this machine lacks amx-int8"),
    ]
    lines = Efficiency("a processor", 3, rows).to_markdown().splitlines()
    assert lines[0] == "a processor, one thread; the best of 3 repeats, kernel and peak in turns"
    assert lines[-2:] == [
        "| f32-f32-matmul-13x32-avx512 | avx512 | 512x512x512 | 95.0 | 100.0 | 95 % | 95 % |  |",
        "| u8-s8-matmul-amx | amx |  |  |  |  |  | this machine lacks amx-int8 |",
    ]
